"""Averaged class probabilities against 100,000 draws of the outputs, and their time.

Posteriors at the prior of the training: wine, digits, and a net of one logit. One or
two minutes on a core.

    python benchmarks/averages.py
"""

import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from measuring import describe_machine, measure, seconds, table
from scipy import special
from sklearn.datasets import load_breast_cancer, load_digits, load_wine
from sklearn.model_selection import train_test_split

import fisherflow_jax as ff

GROUPS, DRAWS = 10, 10_000  # of draws of the outputs
ROWS, ROUNDS = 100, 3
STEPS = 500  # of the training
LEAST_STD = 0.05
LINKS = {
    "default": None,
    "probit": ff.predictions.probit(),
    "512 draws": ff.predictions.output_samples(0, 512),
}


def network(params: dict, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ params["w"] + params["b"]) @ params["v"] + params["c"]


def one_logit(params: dict, x: jax.Array) -> jax.Array:
    return network(params, x)[:, 0]


def trained(model: tuple, x: jax.Array, y: jax.Array, sizes: tuple) -> dict:
    """A network's parameters near the maximum a posteriori for prior precision 1."""
    keys = jax.random.split(jax.random.key(0), 2)
    wide, hidden, outputs = sizes
    params = {
        "w": jax.random.normal(keys[0], (wide, hidden)) * wide**-0.5,
        "b": jnp.zeros(hidden),
        "v": jax.random.normal(keys[1], (hidden, outputs)) * hidden**-0.5,
        "c": jnp.zeros(outputs),
    }
    loss = ff.negative_log_likelihood(*model)
    optimizer = optax.adam(optax.cosine_decay_schedule(0.02, STEPS))

    def objective(params: dict) -> jax.Array:
        squares = optax.tree.norm(params, squared=True)
        return loss(params, (x, y)) + 0.5 * squares / len(x)

    def step(carry: tuple, _: None) -> tuple:
        params, state = carry
        updates, state = optimizer.update(jax.grad(objective)(params), state)
        return (optax.apply_updates(params, updates), state), None

    start = params, optimizer.init(params)
    return jax.jit(lambda c: jax.lax.scan(step, c, length=STEPS))(start)[0][0]


def problem(load: Any, hidden: int) -> tuple:
    """A model, its parameters, the data of the training, and others."""
    x, y = load(return_X_y=True)
    parts = train_test_split(x, y, test_size=0.25, random_state=0, stratify=y)
    center, spread = parts[0].mean(0), parts[0].std(0)
    spread[spread == 0] = 1
    train, test = (jnp.asarray((p - center) / spread) for p in parts[:2])
    labels, others = map(jnp.asarray, parts[2:])
    classes = int(np.max(y)) + 1
    model = network, ff.likelihoods.categorical()
    if classes == 2:
        model, classes = (one_logit, ff.likelihoods.bernoulli()), 1
    params = trained(model, train, labels, (train.shape[1], hidden, classes))
    return model, params, (train, labels), (test[:ROWS], others[:ROWS])


class Shares(NamedTuple):
    """Averages of the probabilities `(..., n, k)` over draws, and of their squares."""

    first: np.ndarray
    second: np.ndarray

    @property
    def std(self) -> np.ndarray:
        return np.sqrt(np.maximum(self.second - np.square(self.first), 0))


def drawn(outputs: ff.predictions.Outputs) -> Shares:
    """Of each group of draws from the outputs' normal, `(groups, n, k)`."""
    generator = np.random.default_rng(1)
    mean = np.asarray(outputs.mean, np.float32)
    mean = mean.reshape((len(mean), -1))
    values, basis = np.linalg.eigh(np.asarray(outputs.covariance, float))
    root = basis * np.sqrt(np.maximum(values, 0))[:, None, :]
    first, second = np.zeros((2, GROUPS, *mean.shape))
    for group in range(GROUPS):
        z = generator.standard_normal((mean.shape[1], DRAWS), np.float32)
        for row in range(len(mean)):
            logits = mean[row][:, None] + root[row].astype(np.float32) @ z
            one = len(logits) == 1
            share = special.expit(logits) if one else special.softmax(logits, 0)
            first[group, row] = share.mean(1, dtype=float)
            second[group, row] = np.square(share).mean(1, dtype=float)
    return Shares(first, second)


def errors(found: ff.Prediction, exact: Shares) -> np.ndarray:
    """Of means the largest, of standard deviations the 90th percentile, relative."""
    mean, std = (np.reshape(x, exact.first.shape) for x in found[:2])
    some = exact.std > LEAST_STD
    ratio = np.abs(std[some] / exact.std[some] - 1)
    return np.array([np.max(np.abs(mean - exact.first)), np.quantile(ratio, 0.9)])


def with_errors(found: ff.Prediction, groups: Shares) -> tuple:
    """The errors, and what the draws leave open of them: a jackknife over groups."""
    all_of_them = Shares(*(x.mean(0) for x in groups))
    without = [
        errors(found, Shares(*(np.delete(x, i, 0).mean(0) for x in groups)))
        for i in range(GROUPS)
    ]
    spread = np.std(without, 0) * np.sqrt(GROUPS - 1)
    return errors(found, all_of_them), spread, int(np.sum(all_of_them.std > LEAST_STD))


def loss(model: tuple, state: Any, data: tuple) -> float:
    """Of what `ff.predict` predicts, by its own mean."""
    share, labels = np.asarray(ff.predict(state, *model, data[0]).mean), data[1]
    if share.ndim == 1:
        share = np.stack([1 - share, share], 1)
    return -np.mean(np.log(share[np.arange(len(labels)), labels]))


def timed(arguments: tuple, link: Any) -> Any:
    return lambda _: jax.block_until_ready(ff.predict(*arguments, link=link))


def compared(model: tuple, state: Any, data: tuple) -> list[str]:
    """A row of the table."""
    outputs = ff.predictions.linearized_outputs(
        state, model[0], data[0], covariance=True
    )
    groups, cells = drawn(outputs), []
    calls = {
        label: timed((state, *model, data[0]), link) for label, link in LINKS.items()
    }
    times = measure(calls, dict.fromkeys(calls, ROUNDS))
    for label in LINKS:
        found = times[label].outputs[0]
        (mean, std), spread, count = with_errors(found, groups)
        cells.append(
            f"{mean:.4f} ({spread[0]:.4f}), {std:.1%} ({spread[1]:.1%}), "
            f"{seconds(times[label].median)} ({times[label].spread})"
        )
    found = ff.calibrate(state, *model, data)
    gap = loss(model, found.posterior, data) - float(found.after)
    return [str(count), *cells, f"{abs(gap):.0e}"]


def main() -> None:
    start = time.perf_counter()
    print(describe_machine(("jax", "numpy", "scikit-learn")), "\n")
    rows = []
    for name, load, hidden in (
        ("wine", load_wine, 16),
        ("two classes", load_breast_cancer, 16),
        ("digits", load_digits, 50),
    ):
        model, params, batch, data = problem(load, hidden)
        layers = ff.layers.find_layers(model[0], params, data[0])
        for kind in (
            ff.structures.kronecker(layers),
            ff.structures.diagonal(),
            ff.structures.full(),
        ):
            estimator = ff.estimators.exact(*model, kind, chunk_size=64)
            information = jax.jit(estimator)(params, batch)
            state = ff.posterior(params, information, prior_precision=1.0)
            rows.append((f"{name}, {kind.name}", *compared(model, state, data)))
    print(table(("", "entries", *LINKS, "NLL"), rows))
    print(
        "\nEach: the largest error of a mean; the 90th percentile of the relative "
        "error of\nstandard deviations above "
        f"{LEAST_STD}, so many entries; in brackets what {GROUPS * DRAWS:,} draws\n"
        "leave open of either, one standard error; the time of `ff.predict` of up to\n"
        f"{ROWS} rows, median and range of {ROUNDS} calls by turns. NLL: by how much "
        "that of the\ncalibrated predictions is not what `ff.calibrate` reported."
    )
    print(f"{time.perf_counter() - start:.0f} seconds in all.")


if __name__ == "__main__":
    main()
