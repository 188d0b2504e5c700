"""A Shared part of the inputs is what a closure over it would be."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import estimator_cases as cases
import fisherflow_jax as ff
from estimator_cases import COUNT

X = cases.draw(COUNT, 3, seed=1)
Y = cases.draw(COUNT, seed=2)
PARAMS = {"w": cases.draw(3, seed=3), "b": np.asarray(0.2)}
# as many rows as there are examples: nothing but the wrapper tells it apart
CENTERS = cases.draw(COUNT, 3, seed=4)


def normalise(x, statistics):
    return (x - statistics["mean"][None]) / statistics["scales"][1][None]


STATISTICS = {"mean": CENTERS[0], "scales": (CENTERS[1], np.exp(CENTERS[2]))}
KEY = jax.random.key_data(jax.random.key(4))


def with_statistics(params, inputs):
    return normalise(inputs["x"], inputs["batch"]) @ params["w"] + params["b"]


def with_dropout(params, inputs):
    x, key = inputs
    kept = jax.random.bernoulli(jax.random.wrap_key_data(key), 0.5, (3,))
    return (x * kept.astype(x.dtype)[None]) @ params["w"] + params["b"]


def with_frozen(params, inputs):
    x, centers = inputs
    distances = jnp.sum(jnp.square(x[:, None, :] - centers[None]), -1)
    return jnp.exp(-distances)[:, :3] @ params["w"] + params["b"]


CASES = {
    "batch statistics": (with_statistics, {"x": X, "batch": ff.Shared(STATISTICS)}),
    "dropout key": (with_dropout, (X, ff.Shared(KEY))),
    "frozen weights": (with_frozen, [X, ff.Shared(CENTERS)]),
}


def closed_over(name):
    return {
        "batch statistics": lambda params, x: with_statistics(
            params, {"x": x, "batch": STATISTICS}
        ),
        "dropout key": lambda params, x: with_dropout(params, (x, KEY)),
        "frozen weights": lambda params, x: with_frozen(params, [x, CENTERS]),
    }[name]


def run(factory, apply_fn, inputs, **options):
    estimator = factory(
        apply_fn, ff.likelihoods.gaussian(), ff.structures.diagonal(), **options
    )
    weights = np.array([1.0, 0.0, 2.0, 1.0, 1.0, 0.0, 1.0])
    return jax.jit(estimator)(PARAMS, (inputs, Y, weights)).entries


def same(left, right):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-12), left, right)


@pytest.mark.slow_cases
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("chunk_size", [None, 3])
def test_equal_to_closing_over_it(name, chunk_size):
    apply_fn, inputs = CASES[name]
    exact = ff.estimators.exact
    shared = run(exact, apply_fn, inputs, chunk_size=chunk_size)
    same(shared, run(exact, closed_over(name), X, chunk_size=chunk_size))


@pytest.mark.parametrize("name", ["empirical", "observed", "squared_gradient"])
def test_by_every_estimator(name):
    apply_fn, inputs = CASES["frozen weights"]
    factory = getattr(ff.estimators, name)
    options = {} if name == "squared_gradient" else {"chunk_size": 3}
    shared = run(factory, apply_fn, inputs, **options)
    same(shared, run(factory, closed_over("frozen weights"), X, **options))


def test_by_the_loss():
    apply_fn, inputs = CASES["frozen weights"]
    gaussian = ff.likelihoods.gaussian()
    shared = ff.negative_log_likelihood(apply_fn, gaussian)
    closed = ff.negative_log_likelihood(closed_over("frozen weights"), gaussian)
    same(jax.jit(shared)(PARAMS, (inputs, Y)), jax.jit(closed)(PARAMS, (X, Y)))
