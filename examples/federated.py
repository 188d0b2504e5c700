"""Ten clients with few classes each fit one network, and send sums.

    python examples/federated.py [--seeds 3] [--folder .]

Scikit-learn's digits are split over ten clients by a Dirichlet draw (0.1) of each
class. In a round every client trains a network 64-16-10 from the server's parameters,
by 40 steps of Adam on its own rows, and sends what the server adds up:

- FedAvg: its parameters, weighted by its rows.
- merge: its parameters and its information there, for `ff.merge`, which needs no more
  than the sums of the information, and of that times the way each client went. The
  prior is about the parameters of the round's start.
- sites: the change of what it has said so far (its site). A client trains beside all
  that the others have said (the cavity), so that its rows count once, however many
  rounds there are.

Clients have different numbers of rows: they are padded with rows of weight 0, so that
one program trains all of them. A client that is missing adds nothing to a merge, and
keeps its site. Sites on diagonals, all at once, diverge: they are shown for that.

Printed: test accuracy in percent after rounds 1, 3, 6 and 10 (sites stop at 6), with
standard errors where there are several seeds, and the mean negative log-likelihood. At
the end the server takes in what full sites found (`flow.absorb`), and predicts with it,
calibrated on half of the held-out rows.
"""

import argparse
import functools
import time
from collections.abc import Callable
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import figures
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import fisherflow_jax as ff

NUM_CLIENTS, ROUNDS, STEPS, RATE, HIDDEN = 10, 10, 40, 5e-3, 16
SHOWN = 1, 3, 6, 10
SITE_ROUNDS = 6
PRIOR, DAMPING = 1.0, 0.5


def apply_fn(params: dict, x: jax.Array) -> jax.Array:
    hidden = jax.nn.relu(x @ params["w1"] + params["b1"])
    return hidden @ params["w2"] + params["b2"]


MODEL = apply_fn, ff.likelihoods.categorical()
LOSS = ff.negative_log_likelihood(*MODEL)
FLOWS = {
    name: ff.fisher_flow(
        *MODEL, structure=structure, prior_precision=PRIOR, compensated=False
    )
    for name, structure in {
        "diagonal": ff.structures.diagonal(),
        "full": ff.structures.full(),
    }.items()
}


def initial(seed: int) -> dict:
    keys = jax.random.split(jax.random.key(seed))
    return {
        "w1": jax.random.normal(keys[0], (64, HIDDEN)) * np.sqrt(2 / 64),
        "b1": jnp.zeros(HIDDEN),
        "w2": jax.random.normal(keys[1], (HIDDEN, 10)) * np.sqrt(1 / HIDDEN),
        "b2": jnp.zeros(10),
    }


def split(seed: int) -> tuple[ff.Batch, tuple]:
    """The clients' rows, stacked and padded with weight 0, and held-out rows."""
    rng = np.random.default_rng(seed)
    x, y = load_digits(return_X_y=True)
    x = (x / 16).astype(np.float32)
    order = rng.permutation(len(x))
    trained, held_out = order[:1297], order[1297:]
    own: list[list] = [[] for _ in range(NUM_CLIENTS)]
    for digit in range(10):
        rows = trained[y[trained] == digit]
        cuts = np.cumsum(rng.dirichlet([0.1] * NUM_CLIENTS))[:-1] * len(rows)
        for client, part in enumerate(np.split(rows, cuts.astype(int))):
            own[client] += list(part)
    size = max(map(len, own))
    rows = np.stack([np.resize(part or trained[:1], size) for part in own])
    weights = np.arange(size) < np.array([[len(part)] for part in own])
    arrays = x[rows], y[rows], weights.astype(np.float32)
    return ff.Batch(*map(jnp.asarray, arrays)), (x[held_out], y[held_out])


def train(params: dict, rows: ff.Batch, anchor: Any = None) -> dict:
    """Where a client ends, on its own rows and a penalty about the anchor."""
    count, optimizer = jnp.maximum(rows.weights.sum(), 1.0), optax.adam(RATE)

    def loss(params: dict) -> jax.Array:
        value = LOSS(params, rows)
        if anchor is None:
            return value
        penalty = ff.continual.elastic_penalty(anchor, params, num_observations=count)
        return value + penalty

    def step(_: int, carry: tuple) -> tuple:
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss)(params), state)
        return optax.apply_updates(params, updates), state

    return jax.lax.fori_loop(0, STEPS, step, (params, optimizer.init(params)))[0]


class Sites(NamedTuple):
    """The server's parameters, and what each client has said: stacks of `(10, ...)`."""

    params: dict
    origin: dict  # where the prior has its mean
    information: Any
    shift: dict  # information times (its mean less the origin)


# ---- a round: (server, clients, which are present) -> server


def average(server: dict, clients: ff.Batch, present: jax.Array) -> dict:
    trained = jax.vmap(train, (None, 0))(server, clients)
    weights = present * clients.weights.sum(1)
    shares = weights / weights.sum()
    return jax.tree.map(lambda x: jnp.tensordot(shares, x, 1), trained)


def merge(
    flow: ff.FisherFlow, server: dict, clients: ff.Batch, present: jax.Array
) -> dict:
    def client(rows: ff.Batch, present: jax.Array) -> tuple:
        params = train(server, rows)
        return params, ff.information.scale(flow.evaluate(params, rows)[2], present)

    found = jax.vmap(client)(clients, present)
    pairs = [jax.tree.map(itemgetter(k), found) for k in range(NUM_CLIENTS)]
    return ff.merge(pairs, server, prior_precision=PRIOR).mean


def sites(
    flow: ff.FisherFlow, server: Sites, clients: ff.Batch, present: jax.Array
) -> Sites:
    prior = flow.init(server.origin).information

    def total(stack: Any) -> Any:
        return ff.information.total(stack, jnp.ones(NUM_CLIENTS))

    known = ff.information.add(total(server.information), prior)
    pull = jax.tree.map(lambda x: x.sum(0), server.shift)

    def solved(information: Any, shift: dict) -> dict:
        step = ff.information.solver(information)(shift)
        return optax.tree.add(server.origin, step)

    def client(site: tuple, rows: ff.Batch, present: jax.Array) -> tuple:
        """The change of its site, half of what it would be."""
        information = ff.information.add(known, ff.information.scale(site[0], -1.0))
        mean = solved(information, optax.tree.sub(pull, site[1]))
        cavity = ff.Posterior(mean, information, jnp.ones(()))
        params = train(server.params, rows, cavity)
        _, score, found = flow.evaluate(params, rows)
        away = optax.tree.sub(params, server.origin)
        shift = optax.tree.add(ff.information.matvec(found, away), score)
        return jax.tree.map(
            lambda x, y: present * DAMPING * (x - y), (found, shift), site
        )

    own = server.information, server.shift
    changes = jax.vmap(client)(own, clients, present)
    information, shift = optax.tree.add(own, changes)
    known = ff.information.add(total(information), prior)
    params = solved(known, jax.tree.map(lambda x: x.sum(0), shift))
    return Sites(params, server.origin, information, shift)


def no_sites(flow: ff.FisherFlow, params: dict) -> Sites:
    none = ff.information.scale(flow.init(params).information, 0.0)
    stacked = jax.tree.map(lambda x: jnp.stack([x] * NUM_CLIENTS), none)
    shift = jax.tree.map(lambda x: jnp.zeros((NUM_CLIENTS, *x.shape)), params)
    return Sites(params, params, stacked, shift)


class Method(NamedTuple):
    round: Callable
    num_rounds: int = ROUNDS
    begin: Callable = lambda params: params
    params: Callable = lambda server: server


def by_sites(flow: ff.FisherFlow) -> Method:
    return Method(
        jax.jit(functools.partial(sites, flow)),
        SITE_ROUNDS,
        functools.partial(no_sites, flow),
        lambda server: server.params,
    )


METHODS = {
    "FedAvg": Method(jax.jit(average)),
    "merge, diagonal": Method(jax.jit(functools.partial(merge, FLOWS["diagonal"]))),
    "merge, full": Method(jax.jit(functools.partial(merge, FLOWS["full"]))),
    "sites, diagonal": by_sites(FLOWS["diagonal"]),
    "sites, full": by_sites(FLOWS["full"]),
}
HALF = "FedAvg", "merge, diagonal", "merge, full", "sites, full"


@jax.jit
def judged(params: dict, held_out: tuple) -> jax.Array:
    right = jnp.argmax(apply_fn(params, held_out[0]), -1) == held_out[1]
    return jnp.stack([100 * jnp.mean(right), LOSS(params, held_out)])


def run(method: Method, seed: int, share: float) -> tuple[np.ndarray, Any]:
    """Accuracy and negative log-likelihood after each round, and the server's end."""
    clients, held_out = split(seed)
    rng, server = np.random.default_rng(100 + seed), method.begin(initial(seed))
    readings = []
    for _ in range(method.num_rounds):
        present = rng.permutation(NUM_CLIENTS) < share * NUM_CLIENTS
        server = method.round(server, clients, jnp.asarray(present, jnp.float32))
        readings.append(judged(method.params(server), held_out))
    return np.stack(readings), server


def believed(server: Sites, clients: ff.Batch) -> ff.FlowState:
    """What the server knows after its rounds, as a flow's state."""
    flow = FLOWS["full"]
    known = ff.information.total(server.information, jnp.ones(NUM_CLIENTS))
    rows = clients.weights.sum()
    return flow.absorb(flow.init(server.origin), server.params, known, rows)


def judged_by_halves(server: Sites, clients: ff.Batch, held_out: tuple) -> list[float]:
    """On half of the held-out rows: the NLL of its parameters, and averaged over them.

    The other half sets the scale of what is not known of the parameters.
    """
    half, other = ([part[i::2] for part in held_out] for i in range(2))
    found = ff.calibrate(believed(server, clients), *MODEL, tuple(other))
    predicted = ff.predict(found.posterior, *MODEL, half[0])
    averaged = ff.metrics.negative_log_likelihood(predicted.mean, half[1])
    return [float(LOSS(server.params, tuple(half))), float(averaged)]


def cell(found: np.ndarray, number: int) -> str:
    """Of `(seeds, rounds, 2)`: accuracy, its standard error, and the NLL."""
    if number > found.shape[1]:
        return ""
    accuracy, loss = found[:, number - 1].T
    error = ""
    if len(accuracy) > 1:
        error = f" ± {accuracy.std(ddof=1) / np.sqrt(len(accuracy)):.1f}"
    return f"{accuracy.mean():.1f}{error} ({loss.mean():.2g})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=Path())
    given = parser.parse_args()
    print(f"{'accuracy (NLL) after rounds':30s}" + "".join(f"{n:>22d}" for n in SHOWN))
    curves = {}
    rows = [(name, 1.0) for name in METHODS] + [(name, 0.5) for name in HALF]
    for name, share in rows:
        began = time.perf_counter()
        runs = [run(METHODS[name], s, share) for s in range(given.seeds)]
        found = np.stack([readings for readings, _ in runs])
        label = name if share == 1 else f"{name}, half missing"
        curves[label] = found[..., 0].mean(0)
        text = "".join(f"{cell(found, number):>22s}" for number in SHOWN)
        seconds = time.perf_counter() - began
        print(f"{label:30s}{text}{seconds:7.1f} s", flush=True)
        if label == "sites, full":
            plain, averaged = judged_by_halves(runs[0][1], *split(0))
    print(f"NLL of full sites {plain:.3f}, calibrated and averaged {averaged:.3f}")
    figures.rounds(given.folder / "federated.png", curves)


if __name__ == "__main__":
    main()
