"""Values of single rows, against numpy on the same draws, and quadrature."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import fisherflow_jax as ff
import selection_cases as cases
from fisherflow_jax import selection


def of(likelihood, acquisition, pool=cases.POOL, **options):
    state, own = cases.state("diagonal", likelihood), cases.LIKELIHOODS[likelihood]
    return selection.values(state, cases.apply_fn, own, pool, acquisition, **options)


def probabilities(likelihood, inputs, draws=None):
    """Of classes `(S, n, C)`, the model linearised at the mean."""
    at = cases.params(likelihood)
    flat, unravel = ravel_pytree(at)
    outputs = np.asarray(cases.apply_fn(at, inputs))[None]
    if draws is not None:
        rows = jax.jacrev(lambda p: cases.apply_fn(unravel(p), inputs))(flat)
        steps = np.concatenate(
            [np.reshape(x, (len(x), -1)) for x in jax.tree.leaves(draws)], 1
        )
        outputs = outputs + np.tensordot(steps - flat, np.asarray(rows), (1, -1))
    if likelihood == "bernoulli":
        outputs = np.stack([np.zeros_like(outputs), outputs], -1)
    p = np.exp(outputs)
    return p / p.sum(-1, keepdims=True)


def entropy(p):
    return -np.sum(p * np.log(p), -1)


@pytest.mark.parametrize("likelihood", ["bernoulli", "categorical"])
def test_values_of_the_probabilities_at_the_mean(likelihood):
    p = probabilities(likelihood, cases.POOL)[0]
    found = of(likelihood, selection.entropy())
    np.testing.assert_allclose(found, entropy(p), rtol=1e-10)
    best = np.sort(p, -1)
    found = of(likelihood, selection.margin())
    np.testing.assert_allclose(found, best[:, -2] - best[:, -1], rtol=1e-9, atol=1e-12)


@pytest.mark.slow_cases
@pytest.mark.parametrize("likelihood", ["bernoulli", "categorical"])
def test_values_of_draws(likelihood):
    draws = ff.sample(cases.state("diagonal", likelihood), 5, (6,))
    p = probabilities(likelihood, cases.POOL, draws)
    expected = entropy(p.mean(0)) - entropy(p).mean(0)
    found = of(likelihood, selection.disagreement(5, 6), chunk_size=11)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)
    at = probabilities(likelihood, cases.ELSEWHERE, draws)
    together = np.einsum("snk,sml->nmkl", p, at) / 6
    apart = np.einsum("nk,ml->nmkl", p.mean(0), at.mean(0))
    expected = np.sum(together * np.log(together / apart), (2, 3)).mean(1)
    acquisition = selection.predictive_information(cases.ELSEWHERE, 5, 6)
    found = of(likelihood, acquisition)
    np.testing.assert_allclose(found, expected, rtol=1e-8, atol=1e-12)


def test_disagreement_by_quadrature():
    """z = theta x, theta normal: two standard errors of 2,000 draws are about .01."""
    state = ff.posterior(jnp.array(0.5), ff.structures.full(), prior_precision=0.25)
    x = jnp.array([0.2, 1.0, 3.0])
    model = lambda p, x: p * x, ff.likelihoods.bernoulli()
    found = selection.values(state, *model, x, selection.disagreement(0, 2000))
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    p = 1 / (1 + np.exp(-(0.5 + 2 * nodes) * np.asarray(x)[:, None]))
    weights = weights / weights.sum()
    both = np.stack([p, 1 - p], -1).clip(1e-300)
    expected = entropy(np.einsum("xqk,q->xk", both, weights)) - entropy(both) @ weights
    np.testing.assert_allclose(found, expected, atol=0.015)


def test_gains_of_single_rows_are_those_before_any_choice():
    state, added = cases.state("diagonal", "bernoulli"), cases.informations("bernoulli")
    base = cases.dense(state.information, state.mean)
    for acquisition, middle in (
        (selection.information_gain(), None),
        (selection.variance_reduction(), np.eye(len(base))),
    ):
        found = of("bernoulli", acquisition, chunk_size=7)
        expected = cases.brute_force(base, added, 0, middle)[2]
        np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_one_class_has_no_margin():
    params, pool = jnp.ones(2), jnp.ones((3, 2))
    state = ff.posterior(params, ff.structures.full(), prior_precision=1.0)
    model = lambda params, x: (x @ params)[:, None], ff.likelihoods.categorical()
    found = selection.values(state, *model, pool, selection.margin())
    np.testing.assert_array_equal(found, -1)


@pytest.mark.slow
@jax.numpy_dtype_promotion("strict")
def test_half_precision_parameters():
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), cases.params("bernoulli"))
    found = []
    for params in (half, jax.tree.map(lambda x: x.astype(jnp.float32), half)):
        state = ff.posterior(params, ff.structures.diagonal(), prior_precision=4.0)
        model, pool = (cases.apply_fn, ff.likelihoods.bernoulli()), cases.POOL
        pool = pool.astype(jnp.bfloat16).astype(params["w"].dtype)
        drawn = selection.values(state, *model, pool, selection.disagreement(0, 50))
        found.append((drawn, selection.greedy(state, *model, pool, 3).gains))
    for low, high in zip(*found, strict=True):
        assert low.dtype == jnp.float32
        np.testing.assert_allclose(low, high, rtol=0.1, atol=0.01)
