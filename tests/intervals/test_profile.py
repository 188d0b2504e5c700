"""Profiles, their roots and ends: against fits in numpy, exact tails, and verdicts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import brentq
from scipy.special import expit
from scipy.stats import norm, poisson

import firth
import fisherflow_jax as ff

MODEL = firth.MODEL
X, Y = firth.rows(40, np.array([-1.0, 1.5, -0.5]), seed=4)


def fitted(x, y, offset):
    """The highest log-likelihood of a logistic model with an offset, and where."""
    theta = np.zeros(x.shape[1])
    for _ in range(60):
        p = expit(x @ theta + offset)
        theta += np.linalg.solve((x * (p * (1 - p))[:, None]).T @ x, x.T @ (y - p))
    eta = x @ theta + offset
    return np.sum(y * eta - np.logaddexp(0, eta)), theta


def roots(value, x=X, y=Y, entry=1):
    """r and r* of one coefficient in numpy."""
    others = np.delete(np.arange(x.shape[1]), entry)
    peak, theta = fitted(x, y, 0.0)
    height, rest = fitted(x[:, others], y, x[:, entry] * value)
    at = np.insert(rest, entry, value)
    away = theta[entry] - value
    root = np.sign(away) * np.sqrt(2 * (peak - height))
    whole = np.linalg.slogdet(firth.information(x, theta))[1]
    part = np.linalg.slogdet(firth.information(x, at)[np.ix_(others, others)])[1]
    return root, root + np.log(away * np.exp((whole - part) / 2) / root) / root


@pytest.fixture(scope="module")
def found():
    flow = ff.fisher_flow(*MODEL, prior_precision=0.1)
    state = ff.warm_start(flow, flow.init(np.zeros(3)), (X, Y))
    return ff.intervals.profile(state, *MODEL, [(X, Y)], "theta[1]", num_points=9)


@pytest.mark.slow
def test_the_roots_and_where_they_end_are_those_of_constrained_fits(found):
    assert found.verdict == "bounded" and bool(found.converged)
    quantile = norm.ppf(0.975)
    for which, ends in enumerate(
        ((found.lower, found.upper), (found.modified_lower, found.modified_upper))
    ):
        for side, end, bracket in zip((1, -1), ends, ((-1, 2), (3, 9)), strict=True):
            expected = brentq(lambda v: roots(v)[which] - side * quantile, *bracket)  # noqa: B023
            np.testing.assert_allclose(end, expected, rtol=1e-5)
    own = np.array([roots(value) for value in np.asarray(found.values)])
    np.testing.assert_allclose(found.root, own[:, 0], atol=1e-6)
    np.testing.assert_allclose(found.modified_root, own[:, 1], atol=1e-5)
    assert found.values[0] < found.lower and found.values[-1] > found.upper


@pytest.mark.slow
def test_a_single_rate_has_the_exact_tails_of_its_counts():
    counts, model = np.array([4.0, 3.0, 5.0]), ((lambda t, x: x * t), POISSON)
    state = ff.posterior(jnp.zeros(()), ff.structures.full(), prior_precision=1.0)
    found = ff.intervals.profile(state, *model, (np.ones(3), counts), "theta")

    def above(rate):  # half of what is observed counts
        return poisson.sf(12, 3 * rate) + 0.5 * poisson.pmf(12, 3 * rate)

    tails = above(np.exp(found.modified_lower)), above(np.exp(found.modified_upper))
    np.testing.assert_allclose([tails[0], 1 - tails[1]], 0.025, atol=1e-3)
    # the likelihood root itself is off by more
    tails = above(np.exp(found.lower)), above(np.exp(found.upper))
    assert abs(1 - tails[1] - 0.025) > 2e-3 or abs(tails[0] - 0.025) > 2e-3


POISSON = ff.likelihoods.poisson()


@pytest.mark.slow
def test_a_normal_has_walds_interval_of_any_combination(at_zero):
    model, contrast = (MODEL[0], ff.likelihoods.gaussian(2.0)), np.array([1.0, -2, 0.5])
    found = ff.intervals.profile(
        at_zero(3), *model, (X, Y), lambda theta: theta @ contrast + 3.0, level=0.8
    )
    gram = X.T @ X / 4
    middle = contrast @ np.linalg.solve(gram, X.T @ Y / 4) + 3
    error = np.sqrt(contrast @ np.linalg.solve(gram, contrast))
    ends = middle + error * norm.ppf(0.9) * np.array([-1, 1])
    np.testing.assert_allclose([found.lower, found.upper], ends, rtol=1e-7)
    modified = [found.modified_lower, found.modified_upper]
    np.testing.assert_allclose(modified, ends, rtol=1e-6)
    np.testing.assert_allclose(found.estimate, middle, rtol=1e-7)
    np.testing.assert_allclose(found.standard_error, error, rtol=1e-7)
    straight = (middle - np.asarray(found.values)) / error
    np.testing.assert_allclose(found.root, straight, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("precision", [1.0, pytest.param(1e-2, marks=pytest.mark.slow)])
def test_separated_rows_bound_one_side(precision):
    x, y = firth.separated()
    flow = ff.fisher_flow(*MODEL, prior_precision=precision)
    state = ff.warm_start(flow, flow.init(np.zeros(2)), (x, y))
    found = ff.intervals.profile(state, *MODEL, (x, y), "theta[1]")
    assert found.verdict == "one-sided"
    assert found.estimate == np.inf and found.upper == np.inf
    assert np.isnan(found.modified_lower) and np.isnan(found.modified_root).all()

    def root(value):  # the likelihood rises to one
        return np.sqrt(-2 * fitted(x[:, :1], y, x[:, 1] * value)[0])

    expected = brentq(lambda v: root(v) - norm.ppf(0.975), 1, 20)
    np.testing.assert_allclose(found.lower, expected, rtol=1e-5)
    assert np.isfinite(found.values).all() and found.values[-1] > found.lower


@pytest.mark.slow
def test_redundant_columns_are_flat_and_their_sum_is_not(found):
    x = np.concatenate([X, X[:, 1:2]], 1)
    flow = ff.fisher_flow(*MODEL, prior_precision=0.1)
    state = ff.warm_start(flow, flow.init(np.zeros(4)), (x, Y))
    flat = ff.intervals.profile(state, *MODEL, (x, Y), "theta[1]", num_points=0)
    assert flat.verdict == "flat" and np.isnan(flat.estimate)
    both = ff.intervals.profile(
        state, *MODEL, (x, Y), np.array([0.0, 1, 0, 1]), num_points=0
    )
    assert both.verdict == "bounded"
    ends = [both.lower, both.upper]
    np.testing.assert_allclose(ends, [found.lower, found.upper], rtol=1e-5)
    assert np.isnan(both.modified_lower)  # determinants say nothing there


@pytest.mark.slow
def test_with_jeffreys_prior_the_profile_is_firths():
    x, y = firth.separated()
    estimator = ff.estimators.exact(*MODEL, ff.structures.full())
    flow = ff.fisher_flow(*MODEL)
    state = ff.warm_start(flow, flow.init(np.zeros(2)), (x, y))
    prior = ff.geometry.jeffreys(ff.geometry.metric(estimator, (x, y)))
    found = ff.intervals.profile(
        state, *MODEL, (x, y), "theta[1]", log_prior=prior, num_points=0
    )
    expected = firth.firth(x, y)
    np.testing.assert_allclose(found.estimate, expected[1], rtol=1e-5)
    assert found.verdict == "bounded" and np.isnan(found.modified_upper)

    def height(theta):
        eta = x @ theta
        value = np.sum(y * eta - np.logaddexp(0, eta))
        return value + 0.5 * np.linalg.slogdet(firth.information(x, theta))[1]

    # at the end, the highest point along the other parameter
    offsets = np.linspace(-30, 30, 6001)
    highest = max(height(np.array([b, float(found.lower)])) for b in offsets)
    gap = 2 * (height(expected) - highest)
    np.testing.assert_allclose(gap, norm.ppf(0.975) ** 2, rtol=1e-3)


@pytest.mark.slow
def test_a_curved_model_by_its_own_profile_mapped_over_data_sets(at_zero):
    times = np.linspace(0.1, 3, 25)

    def apply_fn(theta, t):
        return jnp.exp(theta[0]) * (1 - jnp.exp(-jnp.exp(theta[1]) * t))

    model = apply_fn, ff.likelihoods.gaussian(0.3)
    rng = np.random.default_rng(0)
    targets = np.asarray(apply_fn(np.array([0.7, 0.0]), times))
    targets = targets + 0.3 * rng.normal(size=(3, 25))

    @jax.jit
    @jax.vmap
    def interval(y):
        found = ff.intervals.profile(
            at_zero(2), *model, (jnp.asarray(times), y), "theta[1]", num_points=0
        )
        return found.lower, found.upper, found.modified_lower, found.converged

    lower, upper, modified, converged = interval(targets)
    assert converged.all() and np.isnan(modified).all()
    rates = np.exp(np.linspace(-6, 6, 4001))
    for k, y in enumerate(targets):
        curves = 1 - np.exp(-rates[:, None] * times)
        scale = curves @ y / np.sum(curves**2, 1)
        losses = np.sum((y - scale[:, None] * curves) ** 2, 1) / 0.09
        inside = losses - losses.min() < norm.ppf(0.975) ** 2
        ends = np.log(rates[inside][[0, -1]])
        np.testing.assert_allclose([lower[k], upper[k]], ends, atol=4e-3)


def test_what_has_no_profile_is_refused(at_zero):
    def profile(contrast="theta[1]", **options):
        return ff.intervals.profile(at_zero(3), *MODEL, (X, Y), contrast, **options)

    with pytest.raises(ValueError, match="has 3 values"):
        profile("theta")
    with pytest.raises(ValueError, match="num_points"):
        profile(num_points=1)
    with pytest.raises(ValueError, match="returns a number"):
        profile(log_prior=lambda theta: theta)
    with pytest.raises(ValueError, match="is unknown"):
        ff.intervals.profile(
            at_zero(3), MODEL[0], ff.likelihoods.gaussian(scale=None), (X, Y), "theta"
        )
