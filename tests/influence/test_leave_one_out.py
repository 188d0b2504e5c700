"""Least squares against statsmodels, and logistic regression against refits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import statsmodels.api as sm
from sklearn.datasets import load_breast_cancer, load_diabetes
from statsmodels.stats.outliers_influence import OLSInfluence

import fisherflow_jax as ff
from beliefs import Belief


def linear(params, x):
    return x @ params


@pytest.fixture(scope="module")
def least_squares():
    """Design, targets, a state with an estimated dispersion, and statsmodels' fit."""
    data = load_diabetes()
    x = sm.add_constant(data.data / data.data.std(0))
    y = data.target / data.target.std()
    fit = sm.OLS(y, x).fit()
    state = Belief(
        jnp.asarray(fit.params),
        ff.structures.Full(jnp.asarray(x.T @ x)),
        dispersion=jnp.asarray(fit.mse_resid),
        degrees_of_freedom=jnp.asarray(fit.df_resid),
    )
    return x, y, state, fit


@pytest.mark.slow
def test_what_is_left_out_does_not_depend_on_the_temperature(least_squares):
    x, y, _, fit = least_squares
    structure, model = ff.structures.full(), (linear, ff.likelihoods.gaussian())
    information = ff.estimators.exact(*model, structure)(fit.params, (x, None))
    found = []
    for temperature in (1.0, 7.0):
        state = ff.posterior(
            jnp.asarray(fit.params),
            information,
            prior_precision=1e-3,
            temperature=temperature,
        )
        own = state, *model, (x, y)
        found.append(
            (
                ff.influence.leave_one_out(*own),
                ff.influence.effects(*own, (x[:2], y[:2]), first_order=True),
                ff.influence.effects(*own, on=state.mean),
            )
        )
    for one, other in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-8, atol=1e-10)


@pytest.mark.slow
def test_least_squares_has_the_diagnostics_of_statsmodels(least_squares):
    x, y, state, fit = least_squares
    (count, size), expected = x.shape, OLSInfluence(fit)
    likelihood = ff.likelihoods.gaussian(scale=None)
    own = state, linear, likelihood, (x, y)
    found = ff.influence.leave_one_out(*own)
    close = {"rtol": 1e-10, "atol": 1e-12}
    np.testing.assert_allclose(found.leverage, expected.hat_matrix_diag, **close)
    np.testing.assert_allclose(ff.influence.leverage(*own), found.leverage, **close)
    np.testing.assert_allclose(
        found.cooks_distance, expected.cooks_distance[0], **close
    )
    np.testing.assert_allclose(y - found.outputs, expected.resid_press, **close)
    moved = -ff.influence.effects(*own, on=jnp.eye(size)).T
    np.testing.assert_allclose(moved, expected.dfbeta, **close)
    own_effects = jnp.diagonal(ff.influence.effects(*own, own[3]))
    np.testing.assert_allclose(ff.influence.self_influence(*own), own_effects, **close)
    # what follows, as the docstring has it
    residuals, leverage, variance = fit.resid, found.leverage, state.dispersion
    without = (count - size) * variance - residuals**2 / (1 - leverage)
    without = without / (count - size - 1)
    scales = np.sqrt(np.diag(np.linalg.inv(x.T @ x)))
    dfbetas = moved / (np.sqrt(without)[:, None] * scales)
    np.testing.assert_allclose(dfbetas, expected.dfbetas, **close)
    studentised = residuals / np.sqrt(without * (1 - leverage))
    np.testing.assert_allclose(
        studentised, expected.resid_studentized_external, **close
    )
    dffits = studentised * np.sqrt(leverage / (1 - leverage))
    np.testing.assert_allclose(dffits, expected.dffits[0], **close)


def test_least_squares_left_out_is_fitted_again(least_squares):
    """With known noise and a ridge: predictions, log-probabilities, contrasts."""
    x, y, *_ = least_squares
    noise, prior, rows = 0.7, 3.0, [0, 3, 141]
    information = x.T @ x / noise**2 + prior * np.eye(x.shape[1])

    def fitted(x, y):
        matrix = x.T @ x / noise**2 + prior * np.eye(x.shape[1])
        return np.linalg.solve(matrix, x.T @ y / noise**2)

    params = fitted(x, y)
    state = Belief(jnp.asarray(params), ff.structures.Full(jnp.asarray(information)))
    own = state, linear, ff.likelihoods.gaussian(scale=noise), (x, y)
    found = ff.influence.leave_one_out(*own)
    effects = ff.influence.effects(*own, on=jax.jacobian(lambda p: x[:4] @ p)(params))
    for row in rows:
        others = np.arange(len(y)) != row
        again = fitted(x[others], y[others])
        np.testing.assert_allclose(found.outputs[row], x[row] @ again, rtol=1e-10)
        log_prob = -(((y[row] - x[row] @ again) / noise) ** 2) / 2
        log_prob = log_prob - np.log(noise * np.sqrt(2 * np.pi))
        np.testing.assert_allclose(found.log_prob[row], log_prob, rtol=1e-10)
        moved = again - params
        cook = moved @ information @ moved / len(params)
        np.testing.assert_allclose(found.cooks_distance[row], cook, rtol=1e-9)
        np.testing.assert_allclose(
            effects[:, row], x[:4] @ moved, rtol=1e-9, atol=1e-12
        )


# ---- logistic regression


def logistic(x, y, start):
    """The optimum, by Newton's method to rounding."""
    params = start
    for _ in range(60):
        means = 1 / (1 + np.exp(-x @ params))
        hessian = (x * (means * (1 - means))[:, None]).T @ x
        step = np.linalg.solve(hessian, x.T @ (y - means))
        params = params + step
        if abs(step).max() < 1e-12:
            return params
    raise AssertionError("no optimum")


@pytest.fixture(scope="module")
def classified():
    """Eight inputs of breast cancer, the optimum and its state."""
    data = load_breast_cancer()
    x = data.data[:, :8]
    x = sm.add_constant((x - x.mean(0)) / x.std(0))
    y = data.target.astype(float)
    params = logistic(x, y, np.zeros(x.shape[1]))
    likelihood = ff.likelihoods.bernoulli()
    estimator = ff.estimators.exact(linear, likelihood, ff.structures.full())
    information = jax.jit(estimator)(jnp.asarray(params), (x, y))
    return x, y, Belief(jnp.asarray(params), information)


@pytest.mark.slow
def test_one_step_of_logistic_regression_is_near_a_refit(classified):
    x, y, state = classified
    own = state, linear, ff.likelihoods.bernoulli(), (x, y)
    params, information = np.asarray(state.mean), np.asarray(state.information.rows)
    units = jnp.eye(len(params))
    steps = ff.influence.effects(*own, on=units).T
    first = ff.influence.effects(*own, on=units, first_order=True).T

    def sizes(moved):
        return np.sqrt(np.einsum("nd,de,ne->n", moved, information, moved))

    worst = np.argsort(-sizes(np.asarray(steps)))[:15]
    chosen = np.r_[worst, np.random.default_rng(0).choice(len(y), 25, replace=False)]
    others = [np.arange(len(y)) != row for row in chosen]
    again = np.stack([logistic(x[rest], y[rest], params) for rest in others])
    moved = again - params
    errors = sizes(steps[chosen] - moved) / sizes(moved)
    of_first = sizes(first[chosen] - moved) / sizes(moved)
    assert np.median(errors) <= 0.01
    assert 0.01 < np.median(of_first) <= 0.03
    # the words: where the effect is largest, the query's loss rises most
    means = 1 / (1 + np.exp(-x[:1] @ again.T))[0]
    losses = -np.log(np.where(y[0], means, 1 - means))
    before = -np.log(1 / (1 + np.exp(-x[0] @ params * (2 * y[0] - 1))))
    effects = ff.influence.effects(*own, (x[:1], y[:1]))[0][chosen]
    assert losses[np.argmax(effects)] > before > losses[np.argmin(effects)]
    np.testing.assert_allclose(
        np.corrcoef(effects, losses - before)[0, 1], 1, atol=0.02
    )


def test_leverages_sum_to_what_the_rows_determine():
    """Of errors that go together, some of them missing, beside a prior."""
    rng = np.random.default_rng(1)
    x, y = jnp.asarray(rng.normal(size=(7, 3))), jnp.asarray(rng.normal(size=(7, 2)))
    likelihood = ff.likelihoods.gaussian(covariance=jnp.array([[1.0, 0.5], [0.5, 2.0]]))
    batch = ff.Batch(x, y, mask=jnp.asarray(rng.random((7, 2)) < 0.7))
    estimator = ff.estimators.exact(linear, likelihood, ff.structures.full())

    @jax.jit
    def found(params):
        information = estimator(params, batch)
        state = ff.posterior(params, information, prior_precision=1.0)
        prior = ff.structures.Scalar(jnp.ones(()))
        leverages = ff.influence.leverage(state, linear, likelihood, batch)
        return leverages, ff.information.effective(state.information, prior, params)

    leverages, effective = found(jnp.asarray(rng.normal(size=(3, 2))))
    np.testing.assert_allclose(leverages.sum(), effective, rtol=1e-12)
    assert 2 < effective < 6
