"""Two outputs whose errors go together: generalised least squares, in every room."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

import fisherflow_jax as ff

rng = np.random.default_rng(8)
N, D, K = 12, 3, 2
INPUTS = rng.normal(size=(N, D))
TARGETS = INPUTS @ rng.normal(size=(D, K)) + rng.normal(size=(N, K))
_parts = rng.normal(size=(N, K, K))
EACH = _parts @ np.swapaxes(_parts, 1, 2) + 0.3 * np.eye(K)
R = np.array([[1.0, 0.6], [0.6, 0.8]])
PRECISION = 0.5
THERE = rng.uniform(size=(N, K)) < 0.6
THERE[:3] = [[True, False], [False, True], [False, False]]


def fixed(params, inputs):
    return inputs["row"] @ params


def given(params, inputs):
    noise = inputs["noise"]
    return jnp.concatenate([inputs["row"] @ params, noise.reshape(len(noise), -1)], -1)


BATCH = ({"row": INPUTS, "noise": EACH}, TARGETS)
CASES = {
    "fixed": (fixed, ff.likelihoods.gaussian(covariance=R), np.tile(R, (N, 1, 1))),
    "given": (given, ff.likelihoods.gaussian(covariance="given"), EACH),
}
START = np.zeros((D, K))
to_dense = jax.jit(ff.information.to_dense)


@pytest.fixture(params=CASES)
def name(request):
    return request.param


def least_squares(covariances):
    """Mean and information of the d k parameters, and the log-evidence."""
    design = np.stack([np.kron(x, np.eye(K)) for x in INPUTS])  # (n, k, d k)
    weighed = np.linalg.solve(covariances, design)
    information = np.einsum("nki,nkj->ij", design, weighed)
    posterior = information + PRECISION * np.eye(D * K)
    mean = np.linalg.solve(posterior, np.einsum("nki,nk->i", weighed, TARGETS))
    whole = design.reshape(-1, D * K)
    noise = scipy.linalg.block_diag(*covariances)
    marginal = scipy.stats.multivariate_normal(
        np.zeros(N * K), whole @ whole.T / PRECISION + noise
    )
    return mean, posterior, marginal.logpdf(TARGETS.ravel())


def scores_of(*case):
    model, likelihood, params, batch = case
    return jax.jit(lambda p: ff.scores(model, likelihood, p, batch))(params)


@functools.cache
def state_of(name):
    case = CASES[name]
    flow = ff.fisher_flow(*case[:2], prior_precision=PRECISION)
    state = flow.init(START)
    for rows in (slice(0, 6), slice(6, N)):
        state, info = flow.update(state, jax.tree.map(lambda x: x[rows], BATCH))  # noqa: B023
        assert not info.skipped
    return state


@pytest.mark.slow_cases
def test_the_flow_is_generalised_least_squares(name):
    state = state_of(name)
    mean, information, evidence = least_squares(CASES[name][2])
    np.testing.assert_allclose(state.mean.ravel(), mean, rtol=1e-9)
    dense = to_dense(state.information)
    np.testing.assert_allclose(dense, information, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(state.log_evidence, evidence, rtol=1e-9)
    assert state.count == N


@pytest.mark.slow_cases
def test_estimators_and_losses(name):
    model, likelihood, covariances = CASES[name]
    expected = least_squares(covariances)[1] - PRECISION * np.eye(D * K)
    full, params = ff.structures.full(), jnp.asarray(rng.normal(size=(D, K)))
    for estimator in (ff.estimators.exact, ff.estimators.observed):
        found = estimator(model, likelihood, full)(params, BATCH)
        dense = to_dense(found)
        np.testing.assert_allclose(dense, expected, rtol=1e-9, atol=1e-12)
    diagonal = ff.structures.diagonal()
    found = ff.estimators.exact(model, likelihood, diagonal)(params, BATCH)
    np.testing.assert_allclose(found.entries.ravel(), np.diag(expected), rtol=1e-9)
    means = INPUTS @ np.asarray(params)
    rows = zip(TARGETS, means, covariances, strict=True)
    total = sum(scipy.stats.multivariate_normal.logpdf(*row) for row in rows)
    loss = jax.jit(ff.negative_log_likelihood(model, likelihood))(params, BATCH)
    np.testing.assert_allclose(loss, -total / N, rtol=1e-12)
    residuals = np.linalg.solve(covariances, (TARGETS - means)[..., None])[..., 0]
    scores = scores_of(model, likelihood, params, BATCH)
    np.testing.assert_allclose(
        scores, INPUTS[:, :, None] * residuals[:, None], rtol=1e-9
    )


@pytest.mark.slow
def test_a_linear_layer_is_one_kronecker_product():
    model, likelihood, _ = CASES["fixed"]
    apply_fn = lambda params, x: x @ params  # noqa: E731
    layers = ff.layers.find_layers(apply_fn, START, INPUTS)
    flow = ff.fisher_flow(
        apply_fn,
        likelihood,
        structure=ff.structures.kronecker(layers),
        prior_precision=PRECISION,
        num_steps=1,
    )
    state, _ = flow.update(flow.init(START), (INPUTS, TARGETS))
    mean, information, _ = least_squares(CASES["fixed"][2])
    np.testing.assert_allclose(state.mean.ravel(), mean, rtol=1e-8)
    dense = ff.information.to_dense(state.information, START)
    np.testing.assert_allclose(dense, information, rtol=1e-8, atol=1e-10)


def test_predictions_know_the_noise_of_each_row(name):
    model, likelihood, covariances = CASES[name]
    state = state_of(name)
    mean, information, _ = least_squares(covariances)
    design = np.stack([np.kron(x, np.eye(K)) for x in INPUTS])
    spread = design @ np.linalg.solve(information, np.swapaxes(design, 1, 2))
    variances, noise = (np.diagonal(x, axis1=1, axis2=2) for x in (spread, covariances))
    means = INPUTS @ mean.reshape(D, K)
    found = jax.jit(lambda s: ff.predict(s, model, likelihood, BATCH[0]))(state)
    np.testing.assert_allclose(found.mean, means, rtol=1e-9)
    np.testing.assert_allclose(found.std, np.sqrt(variances), rtol=1e-9)
    total = np.sqrt(variances + noise)
    np.testing.assert_allclose(found.observation_std, total, rtol=1e-9)
    lower, upper = ff.predictions.observation_interval(found, likelihood)
    reach = scipy.stats.norm.ppf(0.975) * total
    np.testing.assert_allclose(lower, means - reach, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(upper, means + reach, rtol=1e-9, atol=1e-9)
    if model is given:
        return
    link = ff.predictions.output_samples(0, num_samples=512)
    averaged = jax.jit(lambda s: ff.predict(s, model, likelihood, BATCH[0], link=link))(
        state
    )
    np.testing.assert_allclose(averaged.mean, means, atol=0.15)
    np.testing.assert_allclose(averaged.observation_std, total, rtol=0.1)


def test_calibration_sees_the_density_of_all_targets():
    model, likelihood, covariances = CASES["given"]
    state = state_of("given")
    mean, information, _ = least_squares(covariances)
    design = np.stack([np.kron(x, np.eye(K)) for x in INPUTS])
    spread = design @ np.linalg.solve(information, np.swapaxes(design, 1, 2))
    rows = zip(TARGETS, INPUTS @ mean.reshape(D, K), spread + covariances, strict=True)
    total = sum(scipy.stats.multivariate_normal.logpdf(*row) for row in rows)
    found = ff.calibrate(state, model, likelihood, [BATCH])
    np.testing.assert_allclose(found.before, -total / N, rtol=1e-9)
    assert found.after <= found.before


@pytest.mark.parametrize("how", ["weights", "mask", "rows"])
def test_calibration_of_what_is_there(how):
    """Against numpy, over a grid of scales; what is missing holds a thousand."""
    model, likelihood, _ = CASES["fixed"]
    state = state_of("fixed")
    mean, information, _ = least_squares(CASES["fixed"][2])
    design = np.stack([np.kron(x, np.eye(K)) for x in INPUTS])
    spread = design @ np.linalg.solve(information, np.swapaxes(design, 1, 2))
    rows, there = np.arange(N) % 3.0, THERE | (how == "rows")
    batch = {
        "weights": (BATCH[0], np.where(there, TARGETS, 1e3), there.astype(float)),
        "mask": ff.Batch(BATCH[0], np.where(there, TARGETS, 1e3), rows, mask=there),
        "rows": (*BATCH, rows),
    }[how]
    rows = rows * there.any(1) if how != "weights" else there.any(1) * 1.0

    def loss(scale):
        total = 0.0
        for i in np.flatnonzero(rows):
            at = there[i]
            covariance = (scale * spread[i] + R)[at][:, at]
            gap = (TARGETS[i] - INPUTS[i] @ mean.reshape(D, K))[at]
            total -= rows[i] * scipy.stats.multivariate_normal.logpdf(
                gap, None, covariance
            )
        return total / rows.sum()

    found = ff.calibrate(state, model, likelihood, [batch])
    np.testing.assert_allclose(found.before, loss(1.0), rtol=1e-8)
    np.testing.assert_allclose(found.after, loss(float(found.scale)), rtol=1e-8)
    best = min(loss(scale) for scale in np.geomspace(1e-9, 1e6, 61))
    assert found.after <= best + 1e-9


def test_calibration_with_weights_of_the_targets_shape():
    """The noise and the scale of a diagonal gaussian, against numpy on a grid."""
    weights = rng.integers(0, 3, (N, K)).astype(float)
    model = lambda params, x: x @ params  # noqa: E731
    likelihood = ff.likelihoods.gaussian(0.7)
    flow = ff.fisher_flow(model, likelihood, prior_precision=PRECISION, num_steps=1)
    state, _ = flow.update(flow.init(START), (INPUTS, TARGETS))
    spread = np.linalg.inv(INPUTS.T @ INPUTS / 0.49 + PRECISION * np.eye(D))
    spread = np.einsum("ni,ij,nj->n", INPUTS, spread, INPUTS)[:, None]
    gap = TARGETS - INPUTS @ np.asarray(state.mean)

    def loss(scale, noise):
        logs = scipy.stats.norm.logpdf(gap, 0, np.sqrt(scale * spread + noise**2))
        return -np.sum(weights * logs) / weights.sum()

    hidden = np.where(weights > 0, TARGETS, np.nan)
    found = ff.calibrate(state, model, likelihood, [(INPUTS, hidden, weights)])
    np.testing.assert_allclose(found.before, loss(1.0, 0.7), rtol=1e-8)
    at_end = loss(float(found.scale), float(found.noise))
    np.testing.assert_allclose(found.after, at_end, rtol=1e-8)
    grid = np.geomspace(1e-4, 1e2, 41)
    assert found.after <= min(loss(s, n) for s in grid for n in grid) + 1e-9


def test_a_scale_given_with_each_row_is_weighted_least_squares():
    scales = np.exp(rng.normal(size=N))

    def apply_fn(params, inputs):
        return jnp.stack([inputs["row"] @ params, inputs["sd"]], -1)

    model = apply_fn, ff.likelihoods.gaussian(scale="given")
    flow = ff.fisher_flow(*model, prior_precision=PRECISION, num_steps=1)
    targets = TARGETS[:, 0]
    inputs = {"row": INPUTS, "sd": scales}
    state, _ = flow.update(flow.init(jnp.zeros(D)), (inputs, targets))
    posterior = INPUTS.T @ (INPUTS / scales[:, None] ** 2) + PRECISION * np.eye(D)
    mean = np.linalg.solve(posterior, INPUTS.T @ (targets / scales**2))
    np.testing.assert_allclose(state.mean, mean, rtol=1e-9)
    dense = to_dense(state.information)
    np.testing.assert_allclose(dense, posterior, rtol=1e-9)
    marginal = INPUTS @ INPUTS.T / PRECISION + np.diag(scales**2)
    evidence = scipy.stats.multivariate_normal.logpdf(targets, np.zeros(N), marginal)
    np.testing.assert_allclose(state.log_evidence, evidence, rtol=1e-9)
    found = jax.jit(lambda s: ff.predict(s, *model, inputs))(state)
    spread = np.einsum("ni,ij,nj->n", INPUTS, np.linalg.inv(posterior), INPUTS)
    total = np.sqrt(spread + scales**2)
    np.testing.assert_allclose(found.observation_std, total, rtol=1e-9)


def test_noise_that_the_parameters_move_is_refused_by_name():
    def scaled(params, x, hold=lambda noise: noise):
        noise = hold(jnp.exp(x @ params["noise"]))
        return jnp.stack([x @ params["mean"], noise], -1)

    def together(params, x):
        noise = jnp.exp(params["noise"][0]) * jnp.ones((len(x), 1))
        return jnp.concatenate([x @ params["mean"][:, None], noise], -1)

    def held(params, x):
        return scaled(params, x, jax.lax.stop_gradient)

    params = {"mean": jnp.zeros(D), "noise": jnp.zeros(D)}
    batch = INPUTS, TARGETS[:, 0]
    scale, whole = (
        ff.likelihoods.gaussian("given"),
        ff.likelihoods.gaussian(covariance="given"),
    )
    text = r"gaussian\(.*{}\): .*parameters move them.*gaussian_location_scale"
    flow = ff.fisher_flow(scaled, scale)
    for update in (flow.update, jax.jit(flow.update)):  # by shapes, at made-up values
        with pytest.raises(ValueError, match=text.format("scale='given'")):
            update(flow.init(params), batch)
    with pytest.raises(ValueError, match=text.format("scale='given'")):
        ff.negative_log_likelihood(scaled, scale)(params, batch)
    matrix = ff.estimators.exact(together, whole, ff.structures.diagonal())
    with pytest.raises(ValueError, match=text.format("covariance='given'")):
        matrix(params, (INPUTS, TARGETS[:, :1]))
    # what is taken as known at the estimate, is
    exact = ff.estimators.exact(held, scale, ff.structures.diagonal())
    information = exact(params, batch)
    found = ff.information.diagonal(information, params)
    np.testing.assert_allclose(found["mean"], np.sum(INPUTS**2, 0), rtol=1e-9)
    assert not np.any(found["noise"])


def marginal(covariances):
    """Least squares of what is there: the other targets have errors without end."""
    covariances = covariances.copy()
    covariances[~THERE] = 0.0
    np.swapaxes(covariances, 1, 2)[~THERE] = 0.0
    rows, places = np.nonzero(~THERE)
    covariances[rows, places, places] = 1.0
    design = np.stack([np.kron(x, np.eye(K)) for x in INPUTS]) * THERE[..., None]
    weighed = np.linalg.solve(covariances, design)
    information = np.einsum("nki,nkj->ij", design, weighed)
    return information, np.einsum("nki,nk->i", weighed, TARGETS * THERE)


@pytest.mark.slow_cases
@pytest.mark.parametrize(("name", "how"), [("fixed", "mask"), ("given", "weights")])
def test_what_is_missing_leaves_the_marginal_of_what_is_there(name, how):
    model, likelihood, covariances = CASES[name]
    given = np.where(THERE, TARGETS, 1e3)
    marks = {"mask": THERE} if how == "mask" else {"weights": THERE.astype(float)}
    batch = ff.Batch(BATCH[0], given, **marks)
    information, shift = marginal(covariances)
    flow = ff.fisher_flow(model, likelihood, prior_precision=PRECISION, num_steps=1)
    state, info = flow.update(flow.init(START), batch)
    posterior = information + PRECISION * np.eye(D * K)
    mean = np.linalg.solve(posterior, shift)
    np.testing.assert_allclose(state.mean.ravel(), mean, rtol=1e-9)
    dense = to_dense(state.information)
    np.testing.assert_allclose(dense, posterior, rtol=1e-9, atol=1e-12)
    seen = THERE.ravel()
    whole = np.stack([np.kron(x, np.eye(K)) for x in INPUTS]).reshape(-1, D * K)[seen]
    noise = scipy.linalg.block_diag(*covariances)[seen][:, seen]
    spread = whole @ whole.T / PRECISION + noise
    evidence = scipy.stats.multivariate_normal.logpdf(
        TARGETS.ravel()[seen], None, spread
    )
    np.testing.assert_allclose(state.log_evidence, evidence, rtol=1e-9)
    # a row without any target is no observation
    assert state.count == (THERE.any(1).sum() if how == "mask" else THERE.sum())

    for estimator in (ff.estimators.exact, ff.estimators.observed):
        found = estimator(model, likelihood, ff.structures.full())(state.mean, batch)
        dense = to_dense(found)
        np.testing.assert_allclose(dense, information, rtol=1e-9, atol=1e-12)
    scores = scores_of(model, likelihood, state.mean, batch)
    total = shift - information @ mean
    np.testing.assert_allclose(np.sum(scores, 0).ravel(), total, rtol=1e-8, atol=1e-10)


def test_the_divergence_of_a_step_is_that_of_what_is_there():
    model, likelihood, _ = CASES["fixed"]
    batch = ff.Batch(BATCH[0], np.where(THERE, TARGETS, 1e3), mask=THERE)
    clip, step = ff.clip_by_kl(model, likelihood, 1e9), rng.normal(size=(D, K))
    state = clip.init(START)
    _, state = clip.update(jnp.asarray(step), state, START, batch=batch)
    information, _ = marginal(CASES["fixed"][2])
    rows = THERE.any(1).sum()  # one without any target is no observation
    expected = step.ravel() @ information @ step.ravel() / (2 * rows)
    np.testing.assert_allclose(state.kl, expected, rtol=1e-9)


@pytest.mark.slow
def test_targets_whose_errors_go_together_have_no_weights_of_their_own():
    model, likelihood, _ = CASES["fixed"]
    batch = (*BATCH, np.full((N, K), 0.5))
    flow = ff.fisher_flow(model, likelihood)
    estimator = ff.estimators.exact(model, likelihood, ff.structures.full())
    loss = ff.negative_log_likelihood(model, likelihood)
    for ask in (
        lambda: flow.update(flow.init(START), batch),
        lambda: estimator(START, batch),
        lambda: loss(START, batch),
    ):
        with pytest.raises(ValueError, match="one weight an example"):
            ask()
    after, info = jax.jit(flow.update)(flow.init(START), batch)
    assert info.skipped and after.num_skipped == 1
