"""The bound of Cramér and Rao: simulations, nuisance, what is not determined."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import polygamma

import fisherflow_jax as ff

geo, ops, Full = ff.geometry, ff.information, ff.structures.Full


def test_efficiency_of_the_median():
    """2 / pi in the limit: .637; at n = 101 .649 +- .005."""
    n, num_samples = 101, 20_000
    draws = np.random.default_rng(0).normal(size=(num_samples, n))
    # the information of n standard normals
    model = lambda mean, x: mean + 0 * x, ff.likelihoods.gaussian()
    estimator = ff.estimators.exact(*model, ff.structures.full())
    mean = jnp.zeros(())
    information = estimator(mean, (jnp.ones(n), None))
    bound = float(geo.cramer_rao(information, mean)[0, 0])
    efficiency = bound / np.median(draws, 1).var()
    assert 0.637 <= efficiency <= 0.66  # standard error .0065
    assert bound / draws.mean(1).var() == pytest.approx(1, abs=0.04)


def test_a_biased_estimator():
    """Three estimators of a normal's variance, n = 10, all 10/9 of their own bound."""
    n, num_samples = 10, 200_000
    draws = np.random.default_rng(1).normal(size=(num_samples, n))
    sums = n * draws.var(1)
    variance = jnp.array(1.0)
    known_mean = Full(jnp.asarray([n / (2 * variance**2)]))
    for count in (n - 1, n, n + 1):
        bias = lambda v, c=count: v * ((n - 1) / c - 1)  # noqa: E731
        bound = geo.cramer_rao(known_mean, variance, bias=bias)[0, 0]
        exact = 2 * (n - 1) / count**2
        np.testing.assert_allclose(exact / bound, 10 / 9, rtol=1e-12)
        ratio = (sums / count).var() / bound
        assert ratio == pytest.approx(10 / 9, abs=0.02)  # standard error .005
    # below the unbiased bound of 2 / n
    assert geo.cramer_rao(known_mean, variance, bias=bias)[0, 0] < 2 / n


@pytest.mark.slow
def test_nuisance():
    """The rate of a gamma distribution is unknown: .0904 in place of .4904."""
    params = {"shape": jnp.array(2.5), "rate": jnp.array(1.7)}
    matrix = np.array([[2.5 / 1.7**2, -1 / 1.7], [-1 / 1.7, polygamma(1, 2.5)]])
    rows = {"rate": matrix[:, 0], "shape": matrix[:, 1]}
    information = Full(jax.tree.map(jnp.asarray, rows))
    bound = geo.cramer_rao(information, params, lambda p: p["shape"])
    efficient = ops.efficient(information, "shape", params)
    np.testing.assert_allclose(efficient, 1 / bound, rtol=1e-10)
    np.testing.assert_allclose(efficient, [[0.0904]], atol=5e-5)
    np.testing.assert_allclose(ops.to_dense(information)[1, 1], 0.4904, atol=5e-5)
    both = geo.cramer_rao(information, params)
    np.testing.assert_allclose(both, np.linalg.inv(matrix), rtol=1e-10)
    # of a ratio, by the delta method
    found = jax.jit(
        lambda i: geo.cramer_rao(i, params, lambda p: p["shape"] / p["rate"])
    )(information)  # fmt: skip
    slope = np.array([-2.5 / 1.7**2, 1 / 1.7])
    expected = slope @ np.linalg.inv(matrix) @ slope
    np.testing.assert_allclose(found, [[expected]], rtol=1e-10)


@pytest.mark.slow
def test_what_the_data_do_not_determine():
    x = np.random.default_rng(2).normal(size=(50, 2))
    twice = np.column_stack([x[:, 0], x[:, 0], x[:, 1]])
    information = ff.structures.full().reduce(jnp.asarray(twice))
    params = jnp.array([0.3, 0.4, 0.5])
    with pytest.raises(ValueError, match=r"along \+1 theta\[0\] -1 theta\[1\]"):
        geo.cramer_rao(information, params)
    jitted = jax.jit(lambda i: geo.cramer_rao(i, params))(information)
    np.testing.assert_array_equal(np.isinf(np.diag(jitted)), [True, True, False])
    # their sum is determined, and so is what is beside it
    function = lambda p: jnp.stack([p[0] + p[1], p[2]])  # noqa: E731
    found = geo.cramer_rao(information, params, function)
    np.testing.assert_allclose(found, np.linalg.inv(x.T @ x), rtol=1e-9)
    with pytest.raises(ValueError, match="a bias is a tree like what is estimated"):
        geo.cramer_rao(information, params, function, bias=lambda p: p)


def test_other_parameters_than_those_of_the_information():
    with pytest.raises(ValueError, match="params are those of the information"):
        geo.cramer_rao(Full(jnp.eye(2)), jnp.ones(3))
