"""How often a model is traced, and what equal choices compile again: nothing."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fisherflow_jax as ff

COMPILED = []


def _listen(event, seconds, **_):
    if event == "/jax/core/compile/backend_compile_duration":
        COMPILED.append(seconds)


jax.monitoring.register_event_duration_secs_listener(_listen)

PARAMS = {"w": np.full((3, 2), 0.3), "b": np.zeros(2), "gain": np.ones(2)}
X, Y = np.linspace(-1, 1, 18).reshape((6, 3)), np.array([0, 1, 0, 0, 1, 1])
CHOICES = {
    "exact": ff.estimators.exact(),
    "whole": ff.estimators.exact(fast_squares=False, chunk_size=4),
    "groups": ff.estimators.monte_carlo(groups=3),
    "batch": ff.estimators.hutchinson(num_probes=2),
    "labels": ff.estimators.empirical(),
    "observed": ff.estimators.observed(),
    "squared": ff.estimators.squared_gradient(),
}
# of one example, of a group, of the batch
SHAPES = {"groups": 3, "observed": 1, "squared": 1}


def model():
    traced = []

    def apply_fn(params, x):
        traced.append(x.shape)
        hidden = jnp.tanh(x @ params["w"] + params["b"][None])
        return params["gain"][None] * hidden

    return apply_fn, traced


@pytest.mark.slow_cases
@pytest.mark.parametrize("structure", [ff.structures.full(), ff.structures.diagonal()])
@pytest.mark.parametrize("name", CHOICES)
def test_once_a_shape_and_never_again(name, structure):
    choice, (apply_fn, traced) = CHOICES[name], model()
    categorical = ff.likelihoods.categorical()

    def estimate():
        estimator = choice.bind(apply_fn, categorical, structure)
        information = estimator(PARAMS, (X, Y), key=0)
        if estimator.describe_paths is not None:
            estimator.paths(PARAMS, (X, Y))
        return information

    first = estimate()
    assert len(traced) == len(set(traced)) == SHAPES.get(name, 2)
    COMPILED.clear()
    second = estimate()
    assert (len(COMPILED), len(traced)) == (0, SHAPES.get(name, 2))
    chex.assert_trees_all_equal(first, second)


def test_an_eager_call_is_the_compiled_one_and_looks_at_values():
    estimator = ff.estimators.exact(
        lambda p, x: x @ p, ff.likelihoods.bernoulli(), ff.structures.full()
    )
    batch = X, Y.astype(float)
    one, other = estimator(np.ones(3), batch), jax.jit(estimator)(np.ones(3), batch)
    np.testing.assert_array_equal(one.rows, other.rows)


def test_a_traced_number_is_compiled_by_nobody():
    def trace_of(scale):
        likelihood = ff.likelihoods.gaussian(scale=scale)
        estimator = ff.estimators.exact(
            lambda p, x: x @ p, likelihood, ff.structures.diagonal()
        )
        return estimator(jnp.ones(3), (X, None)).entries.sum()

    gradient = jax.grad(trace_of)(2.0)
    np.testing.assert_allclose(gradient, -2 * (X**2).sum() / 8, rtol=1e-5)
