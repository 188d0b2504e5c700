"""Regressions beside statsmodels: errors, intervals, tables, tests, delta method."""

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import fisherflow_jax as ff

ALL = ["stackloss", "logit", "poisson", "scotland"]
ESTIMATED = ["stackloss", "scotland"]  # the dispersion is unknown

# statsmodels' sandwich takes the observed Hessian where the link is not canonical, as
# that of scotland; there the robust variance is tested by hand
both_kinds = pytest.mark.parametrize(
    "name, robust", [(name, False) for name in ALL] + [(name, True) for name in ALL[:3]]
)


def slack(name):
    """How far our solution may be from statsmodels', in standard errors."""
    # without a canonical link Fisher scoring converges linearly
    return 1e-4 if name == "scotland" else 1e-6


def close(result, expected, rtol=1e-6, atol=0.0):
    result, expected = np.asarray(result), np.asarray(expected)
    np.testing.assert_array_less(
        np.abs(result - expected), rtol * np.abs(expected) + atol
    )


@pytest.mark.slow_cases
@both_kinds
def test_estimates_and_standard_errors(fit, name, robust):
    state, reference = fit(name).state, fit(name).reference(robust)
    close(state.mean, reference.params, atol=slack(name) * reference.bse)
    close(ff.standard_error(state, robust), reference.bse)


def test_robust_standard_errors_by_hand(fit):
    state, model = fit("scotland").state, fit("scotland").model
    x, y = model.exog, model.endog
    scores = x * (y / np.exp(x @ np.asarray(state.mean)) - 1)[:, None]
    inverse = np.linalg.inv(x.T @ x)
    expected = np.sqrt(np.diag(inverse @ scores.T @ scores @ inverse))
    close(ff.standard_error(state, robust=True), expected)


@both_kinds
@pytest.mark.parametrize("level", [0.9, 0.95, 0.999])
def test_intervals(fit, name, robust, level):
    reference = fit(name).reference(robust)
    expected = reference.conf_int(alpha=1 - level)
    lower, upper = ff.confidence_interval(fit(name).state, level, robust)
    atol = slack(name) * reference.bse
    close(lower, expected[:, 0], atol=atol)
    close(upper, expected[:, 1], atol=atol)
    close(upper - lower, expected[:, 1] - expected[:, 0])  # t, where it is estimated


@pytest.mark.parametrize("name", ESTIMATED)
def test_dispersion(fit, name):
    state, reference = fit(name).state, fit(name).reference()
    close(state.dispersion, reference.scale)
    close(state.degrees_of_freedom, reference.df_resid)


def test_published_values(fit):
    stackloss = fit("stackloss").state
    close(stackloss.mean, [-39.91967, 0.71564, 1.29529, -0.15212], rtol=1e-4)
    error = [11.896, 0.13486, 0.36802, 0.15629]
    close(ff.standard_error(stackloss), error, rtol=1e-4)
    close(stackloss.dispersion, 10.51941)
    close(fit("scotland").state.dispersion, 0.00359267, rtol=2e-6)


@both_kinds
def test_summary_columns(fit, name, robust):
    reference = fit(name).reference(robust)
    table = ff.summary(fit(name).state, level=0.9, robust=robust)
    atol = slack(name) * reference.bse
    close(table.estimate, reference.params, atol=atol)
    close(table.standard_error, reference.bse)
    close(table.statistic, reference.tvalues, atol=slack(name))
    # the relative error of a far tail is that of the statistic times its size
    close(table.p_value, reference.pvalues, rtol=1e-3)
    interval = reference.conf_int(alpha=0.1)
    close(table.lower, interval[:, 0], atol=atol)
    close(table.upper, interval[:, 1], atol=atol)
    assert table.statistic_name == ("t" if name in ESTIMATED else "z")
    assert table.level == 0.9


@both_kinds
def test_wald(fit, name, robust):
    state, reference = fit(name).state, fit(name).reference(robust)
    contrast = np.zeros((2, len(state.mean)))
    contrast[0, 1], contrast[1, 1:3] = 1.0, [1.0, -1.0]
    value = np.array([0.1, -0.2])
    expected = reference.wald_test(
        (contrast, value), use_f=name in ESTIMATED, scalar=True
    )
    result = ff.wald_test(
        state, lambda p: jnp.asarray(contrast) @ p, value, robust=robust
    )
    assert isinstance(result.statistic, float) and isinstance(result.p_value, float)
    close(result.statistic, expected.statistic, atol=10 * slack(name))
    close(result.p_value, expected.pvalue, rtol=1e-3)
    assert result.degrees_of_freedom == 2
    error = np.sqrt(np.diag(contrast @ reference.cov_params() @ contrast.T))
    close(result.estimate, contrast @ reference.params, atol=slack(name) * error)
    close(result.standard_error, error)


@pytest.mark.parametrize("name", ["stackloss", "poisson"])
def test_wald_of_one_contrast_is_the_squared_statistic(fit, name):
    state, reference = fit(name).state, fit(name).reference()
    result = ff.wald_test(state, np.array([0.0, 1.0, 0.0, 0.0]))
    close(result.statistic, reference.tvalues[1] ** 2)
    close(result.p_value, reference.pvalues[1], rtol=1e-4)
    assert result.degrees_of_freedom == 1


@pytest.mark.parametrize("robust", [False, True])
def test_odds_ratios(fit, robust):
    state, reference = fit("logit").state, fit("logit").reference(robust)
    result = ff.delta_method(state, lambda p: p, transform=jnp.exp, robust=robust)
    odds = np.exp(reference.params)
    close(result.estimate, odds)
    close(result.standard_error, odds * reference.bse, rtol=2e-6)
    expected = np.exp(reference.conf_int())
    close(result.lower, expected[:, 0], rtol=2e-6)
    close(result.upper, expected[:, 1], rtol=2e-6)


@pytest.mark.parametrize("robust", [False, True])
@pytest.mark.parametrize("name", ["stackloss", "poisson"])
def test_ratio_of_coefficients(fit, name, robust):
    state, reference = fit(name).state, fit(name).reference(robust)
    b = np.asarray(reference.params)
    gradient = np.array([0.0, 1 / b[2], -b[1] / b[2] ** 2, 0.0])
    error = np.sqrt(gradient @ reference.cov_params() @ gradient)
    result = ff.delta_method(state, lambda p: p[1] / p[2], level=0.9, robust=robust)
    assert jnp.shape(result.estimate) == jnp.shape(result.lower) == ()
    close(result.estimate, b[1] / b[2], rtol=5e-6)
    close(result.standard_error, error, rtol=5e-6)
    normal = stats.norm.ppf(0.95)
    t = stats.t.ppf(0.95, reference.df_resid)
    reach = (t if name in ESTIMATED else normal) * error
    close(result.upper - result.estimate, reach, rtol=5e-6)
    close(result.estimate - result.lower, reach, rtol=5e-6)


@pytest.mark.slow_cases
@both_kinds
def test_predictions(fit, name, robust):
    case, reference = fit(name), fit(name).reference(robust)
    x = np.asarray(case.model.exog)[:5] * 0.9
    result = ff.predict(
        case.state,
        lambda params, inputs: inputs @ params,
        case.likelihood,
        x,
        link=ff.predictions.plug_in(),  # as the reference predicts
        robust=robust,
        level=0.9,
    )
    frame = reference.get_prediction(x).summary_frame(alpha=0.1)
    close(result.mean, frame["mean"], rtol=1e-5)
    close(result.std, frame["mean_se"], rtol=1e-5)
    close(result.lower, frame["mean_ci_lower"], rtol=1e-5)
    close(result.upper, frame["mean_ci_upper"], rtol=1e-5)
    if name == "stackloss" and not robust:
        reach = frame["obs_ci_upper"] - frame["mean"]
        quantile = stats.t.ppf(0.95, reference.df_resid)
        close(result.observation_std, reach / quantile)
