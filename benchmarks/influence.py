"""Do influences foretell what models trained on halves of the data do? On digits.

    python benchmarks/influence.py            # about two minutes on one core
    python benchmarks/influence.py --quick    # 30 halves in place of 60

A network 64-16-10 (tanh, prior precision 1) is trained on 400 of scikit-learn's digits,
and again on random halves of them, from the same start. Printed are linear
data-modelling scores of `ff.influence.effects` for the losses of 100 test images, with
standard errors over these, for structures and for the prior that is added to the
information, and by one Newton step with each row's leverage; the ceiling, which is the
score of the same halves trained from another start; and eigenvalue-corrected Kronecker
influences beside a reference of numpy that forms the gradient of every row: values,
times, and what a wider network takes. Needs the extra `benchmarks`.
"""

import argparse
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from measuring import describe_machine, measure, seconds, table
from scipy.stats import spearmanr
from sklearn.datasets import load_digits

import fisherflow_jax as ff

NUM_ROWS, NUM_QUERIES, HIDDEN, NUM_STEPS = 400, 100, 16, 800
PRIORS, PRIOR = (0.1, 1.0, 10.0, 100.0), 1.0
LIKELIHOOD = ff.likelihoods.categorical()


def apply_fn(params: dict, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ params["w"] + params["b"]) @ params["v"] + params["c"]


MODEL = apply_fn, LIKELIHOOD


def initial(seed: int) -> dict:
    keys = jax.random.split(jax.random.key(seed))
    return {
        "w": jax.random.normal(keys[0], (64, HIDDEN)) / 8,
        "b": jnp.zeros(HIDDEN),
        "v": jax.random.normal(keys[1], (HIDDEN, 10)) / 4,
        "c": jnp.zeros(10),
    }


@jax.jit
def train(params: dict, x: jax.Array, y: jax.Array, kept: jax.Array) -> dict:
    """Fitted to the rows that are kept, by Adam whose steps end at nothing."""
    optimizer = optax.adam(optax.cosine_decay_schedule(0.02, NUM_STEPS))

    def loss(params: dict) -> jax.Array:
        losses = -LIKELIHOOD.log_prob(apply_fn(params, x), y)
        squares = sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(params))
        return (jnp.sum(kept * losses) + PRIOR / 2 * squares) / len(y)

    def step(carry: tuple, _: None) -> tuple:
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss)(params), state)
        return (optax.apply_updates(params, updates), state), None

    start = params, optimizer.init(params)
    return jax.lax.scan(step, start, None, NUM_STEPS)[0][0]


class Problem(NamedTuple):
    """A trained network, and what networks trained on halves of the data do."""

    params: dict
    rows: tuple[jax.Array, jax.Array]
    queries: tuple[jax.Array, jax.Array]
    masks: np.ndarray  # (halves, rows)
    losses: jax.Array  # (halves, queries)
    others: jax.Array  # (halves, queries), from another start


def problem(num_halves: int) -> Problem:
    images, labels = load_digits(return_X_y=True)
    generator = np.random.default_rng(0)
    order = generator.permutation(len(labels))[: NUM_ROWS + NUM_QUERIES]
    images = ((images - images.mean()) / images.std()).astype(np.float32)[order]
    x, y = jnp.asarray(images), jnp.asarray(labels[order])
    places = [generator.permutation(NUM_ROWS) for _ in range(num_halves)]
    masks = np.stack(places) < NUM_ROWS // 2
    rows, queries = (x[:NUM_ROWS], y[:NUM_ROWS]), (x[NUM_ROWS:], y[NUM_ROWS:])

    def losses(seed: int) -> jax.Array:
        """Of the queries, for each half."""
        fit = functools.partial(train, initial(seed), *rows)
        params = jax.lax.map(fit, jnp.asarray(masks, jnp.float32), batch_size=10)
        outputs = jax.vmap(apply_fn, (0, None))(params, queries[0])
        return -LIKELIHOOD.log_prob(
            outputs, jnp.broadcast_to(queries[1], (len(masks), NUM_QUERIES))
        )

    params = train(initial(0), *rows, jnp.ones(NUM_ROWS))
    return Problem(params, rows, queries, masks, losses(0), losses(1))


def informations(params: dict, rows: tuple) -> dict[str, Any]:
    """By structure, without a prior."""
    kinds, (x, _) = ff.structures, rows
    layers = ff.layers.find_layers(apply_fn, params, x)

    def exact(structure: Any) -> Any:
        return jax.jit(ff.estimators.exact(*MODEL, structure))(params, (x, None))

    plain = exact(kinds.kronecker(layers))
    corrected = kinds.kronecker(layers, eigenvalue_correction=plain)
    of_layer = kinds.block(lambda name: "first" if name in "wb" else "last")
    return {
        "scalar": exact(kinds.scalar()),
        "diagonal": exact(kinds.diagonal()),
        "Kronecker": plain,
        "Kronecker, corrected": exact(corrected),
        "block, one a layer": exact(of_layer),
        "full": exact(kinds.full()),
    }


def effects(own: Problem, information: Any, prior: float, **options: Any) -> jax.Array:
    state = ff.posterior(own.params, information, prior_precision=prior)
    return ff.influence.effects(state, *MODEL, own.rows, own.queries, **options)


def one_step(own: Problem, information: Any) -> tuple[np.ndarray, int]:
    """Effects by the row's leverage, and how many rows have a block of 1 or more.

    Of these, which are refused outside jit, the effects are those to first order.
    """
    step = jax.jit(lambda *given: effects(*given, PRIOR, first_order=False))
    found = step(own, information)
    first = effects(own, information, PRIOR, first_order=True)
    refused = jnp.isnan(found)
    return jnp.where(refused, first, found), int(refused[0].sum())


def scores(own: Problem, found: jax.Array) -> jax.Array:
    return ff.testing.linear_datamodelling_score(found, own.masks, own.losses)


def ceiling(own: Problem) -> np.ndarray:
    """The score of the same halves, trained from another start."""
    pairs = zip(own.others.T, own.losses.T, strict=True)
    return np.array([spearmanr(*pair).statistic for pair in pairs])


def told(values: jax.Array) -> str:
    return f"{values.mean():.3f} +- {values.std(ddof=1) / len(values) ** 0.5:.3f}"


def print_scores(own: Problem) -> None:
    print(f"\nceiling, trained from another start: {told(ceiling(own))}\n")
    rows = []
    for name, information in informations(own.params, own.rows).items():
        cells = [
            told(scores(own, effects(own, information, prior, first_order=True)))
            for prior in PRIORS
        ]
        found, refused = one_step(own, information)
        rows.append((name, *cells, told(scores(own, found)), str(refused)))
    header = ("first order, prior:", *map(str, PRIORS), "one step, 1.0", "refused")
    print(table(header, rows))


# ---- beside a dense reference


def dense_reference(own: Problem, prior: float) -> np.ndarray:
    """Eigenvalue-corrected Kronecker influences from the gradient of every row.

    In float64, a layer at a time: eigenvectors of the sums of squares of what enters
    the layer and of what returns to it, and the mean of squared gradients along them.
    """
    (x, y), (xq, yq) = own.rows, own.queries
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), own.params)
    x, xq = np.asarray(x, np.float64), np.asarray(xq, np.float64)
    total = np.zeros((NUM_QUERIES, NUM_ROWS))

    def ones(inputs: np.ndarray) -> np.ndarray:
        return np.concatenate([inputs, np.ones((len(inputs), 1))], 1)

    def passed(x: np.ndarray) -> tuple:
        hidden = np.tanh(x @ params["w"] + params["b"])
        logits = hidden @ params["v"] + params["c"]
        chances = np.exp(logits - logits.max(1, keepdims=True))
        return hidden, chances / chances.sum(1, keepdims=True)

    def back(hidden: np.ndarray, cotangents: np.ndarray) -> np.ndarray:
        """`(n, ..., 10)` to the hidden layer."""
        shape = (len(hidden), *(1,) * (cotangents.ndim - 2), HIDDEN)
        return (cotangents @ params["v"].T) * (1 - hidden**2).reshape(shape)

    (hidden, chances), (hidden_q, chances_q) = passed(x), passed(xq)
    # a root of diag(p) - p p^T: (1 - p 1^T) sqrt(p), its columns on the first axis
    columns = np.sqrt(chances)[:, :, None] * (np.eye(10) - chances[:, None])
    residuals, residuals_q = chances - np.eye(10)[y], chances_q - np.eye(10)[yq]
    layers = (
        (ones(x), back(hidden, columns), back(hidden, residuals))
        + (ones(xq), back(hidden_q, residuals_q)),
        (ones(hidden), columns, residuals, ones(hidden_q), residuals_q),
    )
    for entering, roots, returned, entering_q, returned_q in layers:
        left = np.linalg.eigh(entering.T @ entering)[1]
        right = np.linalg.eigh(np.einsum("nro,nrp->op", roots, roots))[1]
        turned = (entering @ left) ** 2, np.sum((roots @ right) ** 2, 1)
        values = turned[0].T @ turned[1] + prior
        gradients = np.einsum("ni,no->nio", entering @ left, returned @ right)
        of_queries = np.einsum("ni,no->nio", entering_q @ left, returned_q @ right)
        solved = (of_queries / values).reshape((NUM_QUERIES, -1))
        total += solved @ gradients.reshape((NUM_ROWS, -1)).T
    return total


def print_reference(own: Problem) -> None:
    information = informations(own.params, own.rows)["Kronecker, corrected"]
    functions: dict[str, Callable] = {
        "effects, tapped": lambda _: effects(own, information, PRIOR, first_order=True),
        "numpy, all gradients": lambda _: dense_reference(own, PRIOR),
    }
    timings = measure(functions, dict.fromkeys(functions, 7))
    found, expected = (timing.outputs[0] for timing in timings.values())
    gap = np.abs(np.asarray(found) - expected).max() / np.abs(expected).max()
    print(
        f"\neigenvalue-corrected, {NUM_QUERIES} x {NUM_ROWS}: largest difference from "
        f"numpy in float64 {gap:.1e} of the largest\n"
    )
    rows = [
        (name, told(scores(own, jnp.asarray(timing.outputs[0]))))
        + (seconds(timing.first), seconds(timing.median), timing.spread)
        for name, timing in timings.items()
    ]
    print(table(("", "score", "first call", "median", "range"), rows))


def print_memory() -> None:
    """Of a network 784-256-10, from the compiled program alone."""
    sizes = {"w": (784, 256), "b": (256,), "v": (256, 10), "c": (10,)}
    params = {name: jnp.zeros(size) for name, size in sizes.items()}
    rows, queries = (
        (jnp.zeros((count, 784)), jnp.zeros(count, int)) for count in (2000, 100)
    )
    layers = ff.layers.find_layers(apply_fn, params, rows[0])
    state = ff.posterior(params, ff.structures.kronecker(layers), prior_precision=1.0)
    found = jax.jit(lambda *given: ff.influence.effects(given[0], *MODEL, *given[1:]))
    program = found.lower(state, rows, queries).compile()
    held = program.memory_analysis().temp_size_in_bytes
    whole = 4 * len(rows[0]) * sum(leaf.size for leaf in params.values())
    print(
        "\na network 784-256-10, Kronecker, 100 queries x 2000 rows: the program holds "
        f"{held / 1e6:.0f} MB beside\nits arguments; the gradients of the rows alone "
        f"would be {whole / 1e6:.0f} MB"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="30 halves")
    num_halves = 30 if parser.parse_args().quick else 60
    print(describe_machine(("jax", "jaxlib", "numpy")))
    own = problem(num_halves)
    print_scores(own)
    print_reference(own)
    print_memory()


if __name__ == "__main__":
    main()
