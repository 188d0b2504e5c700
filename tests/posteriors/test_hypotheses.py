"""Functions of the parameters: their pytrees, shapes, errors and refusals."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import fisherflow_jax as ff
import structure_cases as cases
from structure_cases import DENSE_PARTS, STRUCTURES

MEAN = np.linspace(-1.0, 2.0, cases.SIZE)
FEW = [c for c in STRUCTURES if c.name in ("scalar", "full", "low_rank-4")]


@jax.jit
def nonlinear(params):
    """Four functions of all the parameters, `(2, 2)`."""
    a, b = params["conv"][:, 0, :2], params["kernel"][:2]
    return jnp.sin(a) * params["deep"][0] + b * params["deep"][1]


@functools.cache
def jacobian():
    @jax.jit
    @jax.jacfwd
    def of_flat(flat):
        return nonlinear(cases.tree(flat)).reshape(-1)

    return np.asarray(of_flat(jnp.asarray(MEAN)))


@pytest.fixture
def state(belief):
    case = next(case for case in STRUCTURES if case.name == "full")
    return belief(cases.tree(MEAN), cases.information(case))


@pytest.mark.parametrize("case", FEW, ids=repr)
def test_delta_method_of_every_structure(belief, case):
    state = belief(cases.tree(MEAN), cases.information(case))
    result = jax.jit(lambda s: ff.delta_method(s, nonlinear, level=0.8))(state)
    gradients = jacobian()
    covariance = gradients @ np.linalg.inv(cases.matrix(case)) @ gradients.T
    error = np.sqrt(np.diag(covariance)).reshape(2, 2)
    value = nonlinear(state.mean)
    reach = stats.norm.ppf(0.9) * error
    np.testing.assert_allclose(result.estimate, value, rtol=1e-12)
    np.testing.assert_allclose(result.standard_error, error, rtol=1e-9)
    np.testing.assert_allclose(result.lower, value - reach, rtol=1e-9)
    np.testing.assert_allclose(result.upper, value + reach, rtol=1e-9)


@pytest.mark.parametrize("case", [DENSE_PARTS[-1]], ids=repr)
def test_robust(belief, case):
    state = belief(
        cases.tree(MEAN), cases.information(case), cases.information(case, seed=1)
    )
    inverse, gradients = np.linalg.inv(cases.matrix(case)), jacobian()
    sandwich = inverse @ cases.matrix(case, seed=1) @ inverse
    covariance = gradients @ sandwich @ gradients.T
    result = jax.jit(lambda s: ff.delta_method(s, nonlinear, robust=True))(state)
    error = np.sqrt(np.diag(covariance)).reshape(2, 2)
    np.testing.assert_allclose(result.standard_error, error, rtol=1e-9)
    test = ff.wald_test(state, nonlinear, np.ones((2, 2)), robust=True)
    gap = np.ravel(nonlinear(state.mean)) - 1
    expected = gap @ np.linalg.solve(covariance, gap)
    np.testing.assert_allclose(test.statistic, expected, rtol=1e-8)
    np.testing.assert_allclose(test.p_value, stats.chi2.sf(expected, 4), rtol=1e-6)


def test_delta_method_of_all_parameters_is_the_interval(state):
    result = jax.jit(lambda s: ff.delta_method(s, lambda params: params))(state)
    lower, upper = jax.jit(ff.confidence_interval)(state)
    shapes = jax.tree.map(jnp.shape, state.mean)
    for field in result:
        assert jax.tree.map(jnp.shape, field) == shapes
    error = jax.jit(ff.standard_error)(state)
    np.testing.assert_allclose(cases.flat(result.standard_error), cases.flat(error))
    np.testing.assert_allclose(cases.flat(result.lower), cases.flat(lower), rtol=1e-9)
    np.testing.assert_allclose(cases.flat(result.upper), cases.flat(upper), rtol=1e-9)


def test_transform_maps_the_interval(state):
    def function(params):
        return params["deep"]

    @jax.jit
    def plain_and_moved(state):
        plain = ff.delta_method(state, function)
        return plain, ff.delta_method(state, function, transform=jax.nn.sigmoid)

    plain, moved = plain_and_moved(state)
    for name in ("estimate", "lower", "upper"):
        expected = jax.tree.map(jax.nn.sigmoid, getattr(plain, name))
        jax.tree.map(np.testing.assert_allclose, getattr(moved, name), expected)
    slope = jax.tree.map(lambda p: p * (1 - p), moved.estimate)
    expected = jax.tree.map(lambda s, e: s * e, slope, plain.standard_error)
    jax.tree.map(np.testing.assert_allclose, moved.standard_error, expected)


def test_vmap_over_states(state):
    other = state._replace(mean=cases.tree(MEAN[::-1].copy()))
    stacked = jax.tree.map(lambda *x: jnp.stack(x), state, other)
    estimate = jax.jit(lambda s: ff.delta_method(s, nonlinear))
    together = jax.vmap(estimate)(stacked)
    for index, one in enumerate((state, other)):
        for row, alone in zip(together, estimate(one), strict=True):
            np.testing.assert_allclose(row[index], alone, rtol=1e-9)


@pytest.mark.parametrize("value", [0.0, 0.7])
def test_wald_of_a_pytree_contrast(state, value):
    weights = np.random.default_rng(0).normal(size=cases.SIZE)
    test = ff.wald_test(state, cases.tree(weights), value)
    case = next(case for case in STRUCTURES if case.name == "full")
    variance = weights @ np.linalg.solve(cases.matrix(case), weights)
    statistic = (weights @ MEAN - value) ** 2 / variance
    np.testing.assert_allclose(test.statistic, statistic, rtol=1e-8)
    np.testing.assert_allclose(test.p_value, stats.chi2.sf(statistic, 1), rtol=1e-6)
    np.testing.assert_allclose(test.estimate, [weights @ MEAN], rtol=1e-10)
    np.testing.assert_allclose(test.standard_error, [np.sqrt(variance)], rtol=1e-9)
    assert test.degrees_of_freedom == 1


def test_wald_with_an_unknown_dispersion_is_f(state):
    unknown = state._replace(
        dispersion=jnp.asarray(2.0),
        degrees_of_freedom=jnp.asarray(7.5),
        count=jnp.asarray(22.0),
    )
    known = ff.wald_test(state, nonlinear)
    test = ff.wald_test(unknown, nonlinear)
    np.testing.assert_allclose(test.statistic, known.statistic / 2 / 4, rtol=1e-9)
    expected = stats.f.sf(test.statistic, 4, 7.5)
    np.testing.assert_allclose(test.p_value, expected, rtol=1e-9)


def dependent(params):
    a, b = params["deep"][1], params["kernel"]
    return jnp.stack([a[0], b[0, 0], a[1], 3 * a[0] - 0.7 * b[0, 0]])


def fixed(params):
    return jnp.stack([params["deep"][0], jnp.ones_like(params["deep"][0])])


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("contrast", [dependent, fixed])
def test_dependent_contrasts(state, contrast, dtype):
    state = jax.tree.map(lambda x: x.astype(dtype), state)
    with pytest.raises(ValueError, match="values of the contrast are linearly depend"):
        ff.wald_test(state, contrast)


def test_nearly_dependent_contrasts_of_different_scale_are_tested(state):
    def contrast(params):
        a, b = params["deep"][1]
        return jnp.stack([1e-6 * a, 1e6 * (a + 1e-3 * b)])

    def same(params):
        return params["deep"][1]

    expected = ff.wald_test(state, same).statistic
    np.testing.assert_allclose(
        ff.wald_test(state, contrast).statistic, expected, rtol=1e-6
    )


@pytest.mark.parametrize(
    "contrast",
    [
        np.ones(cases.SIZE),
        {"conv": np.ones((2, 1, 3))},
        {**cases.PARAMS, "kernel": 1.0},
    ],
)
def test_a_contrast_that_does_not_fit(state, contrast):
    with pytest.raises(ValueError, match="a contrast is a pytree like the parameters"):
        ff.wald_test(state, contrast)


def test_a_value_that_does_not_fit(state):
    with pytest.raises(ValueError, match=r"each of the 4 values .* got shape \(3,\)"):
        ff.wald_test(state, nonlinear, np.zeros(3))


@pytest.mark.parametrize("test", [ff.delta_method, ff.wald_test])
def test_a_bank_is_refused(state, test):
    bank = ff.BankState((state, state), jnp.log(jnp.array([0.5, 0.5])))
    with pytest.raises(TypeError, match="mixture, not a Gaussian"):
        test(bank, nonlinear)
