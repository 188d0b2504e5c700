"""Empirical, observed and squared-gradient information against derivatives by JAX."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import estimator_cases as cases
import fisherflow_jax as ff
from estimator_cases import NAMED, STRUCTURES, WEIGHTS

EXACT = {"rtol": 1e-9, "atol": 1e-11}
FULL = ff.structures.full()
every_model = pytest.mark.parametrize(
    "model", [NAMED[name] for name in ("tokens", "location_scale", "poisson")], ids=repr
)


def run(factory, model, structure=FULL, weights=WEIGHTS, **options):
    batch = (*model.batch, weights)
    return cases.dense_information(factory, model, structure, batch, **options)


@functools.cache
def in_every_structure(factory, *names, **options):
    structures = {name: STRUCTURES[name] for name in names or STRUCTURES}
    return run(factory, NAMED["categorical"], structures, **options)


@every_model
def test_empirical_is_the_sum_of_squared_scores(model):
    result = run(ff.estimators.empirical, model, chunk_size=3)
    scores = cases.scores(model.name)
    expected = np.einsum("n,nd,ne->de", WEIGHTS, scores, scores)
    np.testing.assert_allclose(result, expected, **EXACT)


@pytest.mark.parametrize("name", STRUCTURES)
def test_empirical_in_every_structure(name):
    model = NAMED["categorical"]
    result = in_every_structure(ff.estimators.empirical)[name]
    scores = cases.scores(model.name)
    expected = np.einsum("n,nd,ne->de", WEIGHTS, scores, scores)
    np.testing.assert_allclose(result, cases.kept(name, expected), **EXACT)


@functools.cache
def hessian(name):
    model = NAMED[name]
    flat, unravel = ravel_pytree(model.params)

    @jax.jit
    @jax.hessian
    def second_derivative(flat):
        outputs = model.apply_fn(unravel(flat), model.inputs)
        values = model.likelihood.log_prob(outputs, jnp.asarray(model.targets))
        return -jnp.dot(WEIGHTS, values.reshape((len(WEIGHTS), -1)).sum(1))

    return np.asarray(second_derivative(flat))


@pytest.mark.slow_cases
@every_model
def test_observed_is_minus_the_hessian(model):
    result = run(ff.estimators.observed, model)
    np.testing.assert_allclose(result, hessian(model.name), **EXACT)


CURVED = ["scalar", "diagonal", "units", "groups", "full"]


@pytest.mark.slow_cases
@pytest.mark.parametrize("name", CURVED)
def test_observed_in_every_structure_that_can_hold_it(name):
    result = in_every_structure(ff.estimators.observed, *CURVED, chunk_size=3)[name]
    expected = cases.kept(name, hessian("categorical"))
    np.testing.assert_allclose(result, expected, **EXACT)


def test_observed_is_refused_by_low_rank():
    model = NAMED["categorical"]
    with pytest.raises(ValueError, match=r"low_rank\(16\) does not go with the observ"):
        ff.estimators.observed(model.apply_fn, model.likelihood, STRUCTURES["low_rank"])


def test_observed_is_the_fisher_information_of_a_canonical_linear_model():
    x, y = cases.draw(7, 2, seed=1), np.array([0.0, 1, 1, 0, 3, 2, 1])
    build = [ff.estimators.observed, ff.estimators.exact]
    found = [
        jax.jit(e(lambda params, x: x @ params, ff.likelihoods.poisson(), FULL))(
            np.array([0.3, -0.2]), (x, y)
        )
        for e in build
    ]
    np.testing.assert_allclose(found[0].rows, found[1].rows, **EXACT)


def test_only_what_may_be_a_curvature_says_nothing():
    model = NAMED["categorical"]
    arguments = model.apply_fn, model.likelihood, STRUCTURES["diagonal"]
    for name in ("exact", "monte_carlo", "empirical"):
        assert getattr(ff.estimators, name)(*arguments).not_a_curvature is None
    for name in ("observed", "squared_gradient"):
        assert getattr(ff.estimators, name)(*arguments).not_a_curvature


@pytest.mark.parametrize("name", STRUCTURES)
def test_squared_gradient_is_the_square_of_the_mean_score(name):
    model = NAMED["categorical"]
    result = in_every_structure(ff.estimators.squared_gradient)[name]
    mean = WEIGHTS @ cases.scores(model.name) / WEIGHTS.sum()
    expected = cases.kept(name, np.outer(mean, mean))
    np.testing.assert_allclose(result, expected, **EXACT)


def test_a_ready_gradient_needs_no_model():
    estimator = ff.estimators.squared_gradient(structure=STRUCTURES["units"])
    gradient = jax.tree.map(lambda x: x + 0.5, NAMED["labels"].params)
    information = jax.jit(estimator.from_gradient)(gradient)
    flat = np.asarray(ravel_pytree(gradient)[0])
    expected = cases.kept("units", np.outer(flat, flat))
    np.testing.assert_allclose(cases.dense(information, gradient), expected, **EXACT)


def test_squared_gradient_says_what_it_was_built_without():
    model = NAMED["labels"]
    with pytest.raises(TypeError, match=r"structure comes from a call such as .* None"):
        ff.estimators.squared_gradient(model.apply_fn, model.likelihood)
    estimator = ff.estimators.squared_gradient(structure=STRUCTURES["units"])
    with pytest.raises(ValueError, match="built without apply_fn and likelihood"):
        estimator(model.params, model.batch)


@pytest.mark.parametrize("name", ["empirical", "observed", "squared_gradient"])
def test_estimators_of_the_datas_labels_ask_for_them(name):
    model = NAMED["labels"]
    estimator = getattr(ff.estimators, name)(model.apply_fn, model.likelihood, FULL)
    with pytest.raises(ValueError, match="needs targets; the batch's are None"):
        estimator(model.params, (model.inputs, None))
