"""How often default intervals cover: families, structures, rows, batches.

`python benchmarks/coverage.py` draws 1,000 data sets of each of four regressions,
streams them through `ff.fisher_flow(apply_fn, likelihood, structure=...)` as it stands
(prior precision 1 around zero, no warm start), and prints the share of 95 % intervals
that hold the truth, over the five coefficients, with its standard error. `--quick`
draws 100.
"""

import argparse
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from measuring import describe_machine

import fisherflow_jax as ff

TRUTH = {"level": np.array([0.3, 0.5]), "slopes": np.array([-0.4, 0.2, 0.0])}
NUM_PARAMETERS = 5
ROWS = [5 * NUM_PARAMETERS, 20 * NUM_PARAMETERS, 100 * NUM_PARAMETERS]
SIZES = {"1": 1, "20": 20, "all": None}
STRUCTURES = {
    "full": ff.structures.full(),
    "block": ff.structures.block({"level": "level", "slopes": "slopes"}),
    "diagonal": ff.structures.diagonal(),
}


class Family(NamedTuple):
    likelihood: Any
    draw: Callable  # (generator, linear predictor) -> targets


FAMILIES = {
    "linear": Family(
        ff.likelihoods.gaussian(), lambda rng, eta: eta + rng.normal(size=eta.shape)
    ),
    "logistic": Family(
        ff.likelihoods.bernoulli(),
        lambda rng, eta: 1.0 * (rng.random(eta.shape) < 1 / (1 + np.exp(-eta))),
    ),
    "poisson": Family(
        ff.likelihoods.poisson(), lambda rng, eta: 1.0 * rng.poisson(np.exp(eta))
    ),
    "gamma": Family(
        ff.likelihoods.gamma(),
        lambda rng, eta: rng.exponential(size=eta.shape) * np.exp(eta),
    ),
}


def apply_fn(params: Any, x: jax.Array) -> jax.Array:
    return x[:, :2] @ params["level"] + x[:, 2:] @ params["slopes"]


def data(family: Family, replicates: int) -> tuple[np.ndarray, np.ndarray]:
    """An intercept and four normal columns with correlation 0.5, `(r, n, d)`."""
    rng = np.random.default_rng(11)
    shape = replicates, ROWS[-1], NUM_PARAMETERS - 1
    columns = np.sqrt(0.5) * (rng.normal(size=shape) + rng.normal(size=shape)[..., :1])
    x = np.concatenate([np.ones((*shape[:2], 1)), columns], 2)
    eta = x @ np.concatenate([TRUTH["level"], TRUTH["slopes"]])
    return x, family.draw(rng, eta)


def stream(x: np.ndarray, y: np.ndarray, rows: int, size: int | None) -> Iterator:
    """The first rows in batches, the last one padded, leaves `(r, size, ...)`.

    All in one: padded to the longest, so that one program serves all.
    """
    size = ROWS[-1] if size is None else size
    for start in range(0, rows, size):
        index = np.arange(start, start + size)
        here = np.minimum(index, len(x[0]) - 1)
        weights = np.broadcast_to(1.0 * (index < rows), (len(x), size))
        yield x[:, here], y[:, here], weights


def covered(
    update: Callable, state: Any, batches: Iterator, interval: Callable
) -> tuple[float, float]:
    """The share of intervals that hold the truth, and its standard error."""
    for batch in batches:
        state = update(state, batch)
    lower, upper = interval(state)
    inside = jax.tree.map(lambda a, t, b: (a <= t) & (t <= b), lower, TRUTH, upper)
    shares = np.mean(np.concatenate(list(inside.values()), 1), 1)  # of each data set
    return float(np.mean(shares)), float(np.std(shares) / len(shares) ** 0.5)


def table(replicates: int) -> None:
    rows = [f"n/d = {n // NUM_PARAMETERS}" for n in ROWS]
    print(f"{'':10}{'':10}{'batches of':12}" + "".join(f"{r:>18}" for r in rows))
    for name, family in FAMILIES.items():
        x, y = data(family, replicates)
        for kind, structure in STRUCTURES.items():
            flow = ff.fisher_flow(apply_fn, family.likelihood, structure=structure)
            first = flow.init(jax.tree.map(jnp.zeros_like, TRUTH))
            start = jax.tree.map(lambda a: jnp.stack([a] * replicates), first)
            update = jax.jit(jax.vmap(lambda s, b, flow=flow: flow.update(s, b)[0]))
            interval = jax.jit(jax.vmap(ff.confidence_interval))
            for label, size in SIZES.items():
                cells = [
                    covered(update, start, stream(x, y, n, size), interval)
                    for n in ROWS
                ]
                text = "".join(f"{c:11.3f} +- {e:.3f}" for c, e in cells)
                print(f"{name:10}{kind:10}{label:12}{text}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="100 data sets, not 1,000")
    replicates = 100 if parser.parse_args().quick else 1000
    jax.config.update("jax_enable_x64", True)
    print(describe_machine(["jax", "numpy"]))
    print(f"{replicates} data sets, nominal 0.95\n")
    table(replicates)


if __name__ == "__main__":
    main()
