"""The scale of a posterior against scipy's minimum of an explicit loss, and laws."""

import functools
import math
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, optimize, special, stats

import fisherflow_jax as ff
from fisherflow_jax.calibration import _densities as densities
from fisherflow_jax.predictions import Outputs


def classifier(params, x):
    return jnp.tanh(x @ params["w"]) @ params["head"]


def linear(params, x):
    return x @ params


def one_logit(params, x):
    return classifier(params, x)[..., 0]


@functools.cache
def classes():
    """A posterior of a small network, and held-out data (40, 3) of three classes."""
    rng = np.random.default_rng(0)
    params = {"w": rng.normal(size=(3, 4)), "head": 3 * rng.normal(size=(4, 3))}
    x = rng.normal(size=(40, 3))
    logits = np.tanh(x @ params["w"]) @ params["head"]
    noisy = logits / 3 + rng.gumbel(size=(40, 3))
    root = rng.normal(size=(30, 24)) * np.geomspace(0.3, 3, 24)
    rows = ff.structures.full().reduce(
        {
            "head": jnp.asarray(root[:, :12].reshape(30, 4, 3)),
            "w": jnp.asarray(root[:, 12:].reshape(30, 3, 4)),
        }
    )
    state = ff.posterior(params, rows, prior_precision=0.7)
    return state, x, noisy.argmax(-1)


@functools.partial(jax.jit, static_argnums=0)
def with_jacobian(apply_fn, state, x):
    flat, unravel = jax.flatten_util.ravel_pytree(state.mean)
    jacobian = jax.jacobian(lambda p: apply_fn(unravel(p), x))(flat)
    return apply_fn(state.mean, x), jacobian, ff.information.to_dense(state.information)


def moments(state, apply_fn, x):
    """Mean and variance of the outputs, by an explicit Jacobian."""
    mean, jacobian, information = map(np.asarray, with_jacobian(apply_fn, state, x))
    covariance = np.linalg.inv(information)
    variance = np.einsum("...i,ij,...j->...", jacobian, covariance, jacobian)
    return mean, variance


log_density = jax.jit(densities.log_density, static_argnums=(0, 1))


def probit_loss(mean, variance, labels, scale):
    logits = mean / np.sqrt(1 + np.pi / 8 * scale * variance)
    return -special.log_softmax(logits, -1)[np.arange(len(labels)), labels].mean()


PROBIT = ff.predictions.probit()
NUMBERS = "scale", "before", "after", "mean_only", "boundary"


@pytest.fixture(scope="module")
def calibrated():
    with jax.numpy_dtype_promotion("strict"):
        state, x, y = classes()
        likelihood = ff.likelihoods.categorical()
        found = ff.calibrate(state, classifier, likelihood, (x, y), link=PROBIT)
    # numbers of numpy compile nothing when they are compared
    return found._replace(**{k: np.asarray(getattr(found, k)) for k in NUMBERS})


def test_classes(calibrated):
    state, x, y = classes()
    loss = functools.partial(probit_loss, *moments(state, classifier, x), np.asarray(y))
    best = optimize.minimize_scalar(
        lambda log: loss(np.exp(log)), bracket=(-1, 1), options={"xtol": 1e-10}
    )
    np.testing.assert_allclose(calibrated.scale, np.exp(best.x), rtol=1e-5)
    np.testing.assert_allclose(calibrated.before, loss(1.0), rtol=1e-10)
    np.testing.assert_allclose(calibrated.after, best.fun, rtol=1e-10)
    np.testing.assert_allclose(calibrated.mean_only, loss(0.0), rtol=1e-10)
    assert calibrated.after < min(calibrated.before, calibrated.mean_only) - 1e-3
    assert calibrated.boundary == 0 and calibrated.noise is None
    assert calibrated.likelihood is ff.likelihoods.categorical()


def test_the_posterior_is_the_same_but_for_its_scale(calibrated):
    state, x, y = classes()
    _, variance = moments(state, classifier, x)
    outputs = ff.predictions.linearized_outputs(calibrated.posterior, classifier, x)
    expected = calibrated.scale * variance
    np.testing.assert_allclose(outputs.variance, expected, rtol=1e-8)
    np.testing.assert_allclose(calibrated.posterior.temperature, calibrated.scale)
    likelihood = ff.likelihoods.categorical()
    again = ff.calibrate(
        calibrated.posterior, classifier, likelihood, (x, y), link=PROBIT
    )
    np.testing.assert_allclose(again.scale, 1.0, rtol=1e-5)
    np.testing.assert_allclose(again.before, calibrated.after, rtol=1e-12)
    assert again.after <= again.before


def test_batches_padding_and_multiplicities(calibrated):
    """Neither changes the mean; multiplicities are repeated rows."""
    state, x, y = classes()
    likelihood = ff.likelihoods.categorical()
    padded_x = np.concatenate([x, np.full((20, 3), np.nan)])
    padded_y = np.concatenate([y, np.full(20, 7)])
    weights = np.repeat([2.0, 0.0], [40, 20])
    stacked = ff.Stacked(
        padded_x.reshape(3, 20, 3), padded_y.reshape(3, 20), weights.reshape(3, 20)
    )
    loader = ((x[i : i + 20], y[i : i + 20]) for i in (0, 20))
    for data in (loader, stacked):
        found = ff.calibrate(state, classifier, likelihood, data, link=PROBIT)
        np.testing.assert_allclose(found.scale, calibrated.scale, rtol=1e-6)
        np.testing.assert_allclose(found.after, calibrated.after, rtol=1e-12)
    # some twice, some once, some not at all
    weights = np.repeat([2.0, 1.0, 0.0], [8, 24, 8])
    rows = np.r_[0:8, 0:8, 8:32]
    model = classifier, likelihood
    found = ff.calibrate(state, *model, (x, y, weights), link=PROBIT)
    expected = ff.calibrate(state, *model, (x[rows], y[rows]), link=PROBIT)
    np.testing.assert_allclose(found.scale, expected.scale, rtol=1e-6)
    np.testing.assert_allclose(found.after, expected.after, rtol=1e-12)


def test_jit_and_float32(calibrated):
    state, x, y = classes()
    likelihood = ff.likelihoods.categorical()
    with jax.enable_x64(False):
        state, x, y = jax.tree.map(
            lambda a: jnp.asarray(np.asarray(a), a.dtype.str.replace("8", "4")),
            (state, x, y),
        )
        found = jax.jit(
            lambda state, x, y: ff.calibrate(
                state, classifier, likelihood, (x, y), link=PROBIT
            )[2:]
        )(state, x, y)
        scale, _, _, after, _, _ = found
        assert scale.dtype == after.dtype == jnp.float32
    np.testing.assert_allclose(scale, calibrated.scale, rtol=5e-3)
    np.testing.assert_allclose(after, calibrated.after, rtol=1e-5)


def test_links(calibrated):
    state, x, y = classes()
    likelihood = ff.likelihoods.categorical()
    link = ff.predictions.output_samples(jax.random.key(0), 50)
    sampled = ff.calibrate(state, classifier, likelihood, (x, y), link=link)
    assert 0.3 < sampled.scale / calibrated.scale < 3
    assert abs(sampled.after - calibrated.after) < 0.05
    with pytest.raises(ValueError, match="link makes probabilities of classes"):
        gaussian = ff.likelihoods.gaussian()
        ff.calibrate(state, one_logit, gaussian, (x, x[:, 0]), link=link)


@functools.cache
def many_classes():
    """The last layer of more classes than the points of the average serve."""
    rng = np.random.default_rng(8)
    mean, entries = 3 * rng.normal(size=(3, 65)), 10 ** rng.uniform(-1, 1, (3, 65))
    x = rng.normal(size=(12, 3))
    y = np.argmax(x @ mean / 3 + rng.gumbel(size=(12, 65)), -1)
    information = ff.structures.Diagonal(jnp.asarray(entries))
    state = ff.posterior(mean, information, prior_precision=0.1)
    return state, x, y


scaled = jax.jit(ff.information.scale)


@pytest.mark.slow_cases
@pytest.mark.parametrize("case", ["several", "one logit", "very many"])
def test_it_reports_what_predict_predicts(case):
    state, x, y = many_classes() if case == "very many" else classes()
    apply_fn = {"several": classifier, "one logit": one_logit}.get(case, linear)
    likelihood = ff.likelihoods.categorical()
    if case == "one logit":
        likelihood, y = ff.likelihoods.bernoulli(), y == 0
    found = ff.calibrate(state, apply_fn, likelihood, (x, y))

    @jax.jit
    def loss(state):
        share = ff.predict(state, apply_fn, likelihood, x).mean
        if share.ndim > 1:
            share = jnp.take_along_axis(share, y[:, None], 1)[:, 0]
        else:
            share = jnp.where(y, share, 1 - share)
        return -jnp.mean(jnp.log(share))

    np.testing.assert_allclose(loss(state), found.before, rtol=1e-9)
    np.testing.assert_allclose(loss(found.posterior), found.after, rtol=1e-9)
    assert found.after < min(found.before, found.mean_only) - 1e-3
    # a better scale is not to be had
    for factor in (0.8, 1.25):
        other = found.posterior._replace(
            information=scaled(found.posterior.information, factor)
        )
        assert loss(other) > found.after


def test_the_mean_alone_is_best():
    state, x, _ = classes()
    right = np.asarray(with_jacobian(one_logit, state, x)[0]) > 0
    likelihood = ff.likelihoods.bernoulli()
    with pytest.warns(ff.DataWarning, match="ends at .*e-.*without any uncertainty"):
        found = ff.calibrate(state, one_logit, likelihood, (x, right))
    assert found.boundary == -1 and found.scale < 1e-6
    np.testing.assert_allclose(found.after, found.mean_only, rtol=1e-6)
    assert found.after < found.before
    # what is believed is still a posterior
    assert np.isfinite(ff.log_density(found.posterior, state.mean))
    other = jax.tree.map(jnp.array, state)  # of which nothing was said
    with warnings.catch_warnings():
        warnings.simplefilter("error", ff.DataWarning)
        ff.calibrate(state, one_logit, likelihood, (x, right))
        wrong = ff.calibrate(other, one_logit, likelihood, (x, ~right))
    assert wrong.boundary == 1 and wrong.scale > 1e6
    np.testing.assert_allclose(wrong.after, np.log(2), rtol=1e-3)


@functools.cache
def many_problems():
    """Outputs of 300 models, from nearly perfect to worse than chance.

    With informations a million times too small or too large.
    """
    rng = np.random.default_rng(6)
    size = 10.0 ** rng.uniform(-6, 6, size=(300, 1, 1))
    entries = size * 10.0 ** rng.uniform(-2, 2, size=(300, 2, 3))
    x, truth = rng.normal(size=(300, 12, 2)), rng.normal(size=(300, 2, 3))
    noise = rng.gumbel(size=(300, 12, 3)) * 10.0 ** rng.uniform(-2, 1, (300, 1, 1))
    y = np.argmax(np.einsum("knd,kdc->knc", x, truth) + noise, -1)
    means = truth * 10.0 ** rng.uniform(-1, 1.5, size=(300, 1, 1))
    return means, entries, x, y


def test_never_worse_than_what_was_given_nor_than_the_mean_alone():
    @jax.jit
    @jax.vmap
    def run(mean, entries, x, y):
        state = ff.Posterior(mean, ff.structures.Diagonal(entries), jnp.ones(()))
        likelihood = ff.likelihoods.categorical()
        found = ff.calibrate(state, linear, likelihood, (x, y), link=PROBIT)
        return found._replace(posterior=None, likelihood=None)

    found = run(*many_problems())
    assert np.all(found.after <= found.before)
    assert np.all(found.after <= found.mean_only + 1e-8 * (1 + found.mean_only))
    assert np.all(np.isfinite(found.scale) & (found.scale > 0))
    # the problems are of all kinds
    assert set(np.asarray(found.boundary)) == {-1, 0, 1}
    gain = np.minimum(found.before, found.mean_only) - found.after
    assert np.mean(gain > 0.01) > 0.2


def test_a_scale_that_the_search_misses_is_kept():
    """A link with a peak at the scale given, far narrower than the search's steps."""
    state, x, _ = classes()
    state = ff.Posterior(state.mean, state.information, state.temperature)
    given = ff.predictions.linearized_outputs(state, one_logit, x).variance

    def peaked(outputs, likelihood):
        log = jnp.log(outputs.variance / given)
        chance = 0.5 - 0.1 * jnp.tanh(log) + 0.3 * jnp.exp(-1e8 * jnp.square(log))
        return ff.predictions.Averaged(chance)

    likelihood = ff.likelihoods.bernoulli()
    found = ff.calibrate(state, one_logit, likelihood, (x, jnp.ones(40)), link=peaked)
    np.testing.assert_allclose(found.after, -np.log(0.8), rtol=1e-9)
    assert found.scale == 1 and found.after == found.before


def test_never_worse_with_noise():
    """Also where every target has the same variance: only their sum can be found."""

    @jax.jit
    @jax.vmap
    def run(mean, entries, x, y):
        state = ff.Posterior(mean, ff.structures.Diagonal(entries), jnp.ones(()))
        found = ff.calibrate(state, linear, ff.likelihoods.gaussian(0.3), (x, y))
        return found._replace(posterior=None, likelihood=None)

    means, entries, x, labels = many_problems()
    y = labels.astype(float)
    found = run(means[..., 0], entries[..., 0], x, y)
    same = run(means[..., 0], entries[..., 0], np.ones_like(x), y)
    for each in (found, same):
        assert np.all(each.after <= each.before)
        assert np.all(each.after <= each.mean_only + 1e-8 * (1 + abs(each.mean_only)))
    np.testing.assert_array_equal(same.boundary, 0)
    variance = np.sum(1 / entries[..., 0], -1)
    away = np.einsum("knd,kd->kn", np.ones_like(x), means[..., 0]) - y
    total = np.mean(np.square(away), -1)
    np.testing.assert_allclose(same.scale * variance + same.noise**2, total, rtol=1e-6)
    np.testing.assert_allclose(same.scale / same.noise**2, 1 / 0.09, rtol=1e-6)


@functools.cache
def regression():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(60, 4)) * [1, 1, 3, 0.3]
    truth = rng.normal(size=4)
    y = x @ truth + 0.3 * rng.normal(size=60)
    information = ff.structures.Full(jnp.asarray(x[:6].T @ x[:6]))
    mean = np.linalg.lstsq(x[:6], y[:6])[0]
    state = ff.posterior(mean, information, prior_precision=1e-3)
    return state, x[6:], y[6:]


def test_scale_and_noise_together():
    state, x, y = regression()
    mean, variance = moments(state, linear, x)

    def loss(logs):
        std = np.sqrt(np.exp(logs[0]) * variance + np.exp(2 * logs[1]))
        return -stats.norm.logpdf(y, mean, std).mean()

    best = optimize.minimize(loss, [0.0, 0.0], method="BFGS", options={"gtol": 1e-9})
    likelihood = ff.likelihoods.gaussian(scale=2.0)
    found = ff.calibrate(state, linear, likelihood, (x, y))
    np.testing.assert_allclose(np.log([found.scale, found.noise]), best.x, atol=1e-4)
    np.testing.assert_allclose(found.after, best.fun, rtol=1e-7)
    np.testing.assert_allclose(found.before, loss([0, np.log(2)]), rtol=1e-10)
    np.testing.assert_allclose(
        found.likelihood.variance(jnp.zeros(1))[0], found.noise**2
    )
    alone = np.sqrt(np.mean((np.asarray(y) - mean) ** 2))
    expected = -stats.norm.logpdf(y, mean, alone).mean()
    np.testing.assert_allclose(found.mean_only, expected, rtol=1e-10)


def test_a_known_noise_is_kept():
    state, x, y = regression()
    mean, variance = moments(state, linear, x)
    likelihood = ff.likelihoods.gaussian(scale=0.2)
    found = ff.calibrate(state, linear, likelihood, (x, y), search_noise=False)
    assert found.likelihood is likelihood
    np.testing.assert_allclose(found.noise, 0.2)

    def loss(log):
        std = np.sqrt(np.exp(log) * variance + 0.04)
        return -stats.norm.logpdf(y, mean, std).mean()

    best = optimize.minimize_scalar(loss, bracket=(-1, 1))
    np.testing.assert_allclose(found.scale, np.exp(best.x), rtol=1e-4)
    np.testing.assert_allclose(found.after, best.fun, rtol=1e-7)


def test_units_do_not_matter():
    state, x, y = regression()
    likelihood = ff.likelihoods.gaussian(scale=None)
    found = ff.calibrate(state, linear, likelihood, (x, y))
    large = state._replace(mean=1e4 * state.mean)
    other = ff.calibrate(large, linear, likelihood, (x, 1e4 * y))
    np.testing.assert_allclose(other.noise, 1e4 * found.noise, rtol=1e-5)
    np.testing.assert_allclose(other.scale, 1e8 * found.scale, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the scale:fisherflow_jax.DataWarning")
def test_a_flow_of_unknown_dispersion():
    _, x, y = regression()
    likelihood = ff.likelihoods.gaussian(scale=None)
    flow = ff.fisher_flow(
        linear,
        likelihood,
        structure=ff.structures.full(),
        memory=ff.memories.stationary(),
        prior_precision=1e-3,
    )
    state, _ = jax.jit(flow.update)(flow.init(jnp.zeros(4)), (x[:20], y[:20]))
    found = ff.calibrate(state, linear, likelihood, (x[20:], y[20:]))
    before = ff.predictions.linearized_outputs(state, linear, x[20:])
    after = ff.predictions.linearized_outputs(found.posterior, linear, x[20:])
    np.testing.assert_allclose(after.variance, found.scale * before.variance)
    std = jnp.sqrt(before.variance + state.dispersion)
    expected = -stats.norm.logpdf(y[20:], before.mean, std).mean()
    np.testing.assert_allclose(found.before, expected, rtol=1e-8)


@pytest.mark.slow
def test_counts():
    state, x, _ = regression()
    y = np.random.default_rng(2).poisson(3, 54).astype(float)
    state = ff.Posterior(0.3 * state.mean, state.information, state.temperature)
    found = ff.calibrate(state, linear, ff.likelihoods.poisson(), (x, y))
    mean, variance = moments(state, linear, x)

    def loss(scale, rows):
        def one(i):
            std = np.sqrt(scale * variance[i])
            target, centre = float(y[i]), float(mean[i])

            def density(t):
                line = centre + std * t
                log_p = target * line - math.exp(line) - math.lgamma(target + 1)
                return math.exp(log_p - t * t / 2)

            value, _ = integrate.quad(
                density,
                -9,
                9,
                limit=200,
            )
            return -np.log(value / np.sqrt(2 * np.pi))

        return np.array([one(i) for i in rows])

    rows = np.arange(0, 54, 6)
    outputs = Outputs(mean, np.asarray(found.scale) * variance)
    ours = -np.asarray(log_density(ff.likelihoods.poisson(), None, outputs, y))
    np.testing.assert_allclose(ours[rows], loss(float(found.scale), rows), rtol=1e-5)
    np.testing.assert_allclose(found.after, ours.mean(), rtol=1e-10)
    assert found.after < found.before and found.after < found.mean_only


@pytest.mark.slow
def test_gamma_of_unknown_shape():
    state, x, _ = regression()
    x = x[:16]  # the search averages over each target two thousand times
    state = ff.Posterior(0.2 * state.mean, state.information, state.temperature)
    mean, variance = moments(state, linear, x)
    rng = np.random.default_rng(3)
    line = mean + np.sqrt(0.5 * variance) * rng.normal(size=16)
    y = np.exp(line) * rng.gamma(9.0, 1 / 9.0, size=16)
    found = ff.calibrate(state, linear, ff.likelihoods.gamma(shape=None), (x, y))
    nodes = np.linspace(-8, 8, 401)
    weights = np.exp(-(nodes**2) / 2)

    def loss(logs):
        scale, a = np.exp(logs[0]), np.exp(-logs[1])
        log_rate = mean[:, None] + np.sqrt(scale * variance)[:, None] * nodes
        # the density of a gamma variable of shape a over its mean, to the power a
        log_ratio = np.log(y)[:, None] - log_rate
        log_p = a * (np.log(a) + log_ratio - np.exp(log_ratio)) - special.gammaln(a)
        p = np.exp(log_p) / y[:, None]
        return -np.log(p @ (weights / weights.sum())).mean()

    best = optimize.minimize(loss, [0.0, -2.0], method="Nelder-Mead")
    np.testing.assert_allclose(found.after, best.fun, rtol=1e-5)
    np.testing.assert_allclose(np.log(found.scale), best.x[0], atol=0.02)
    dispersion = found.likelihood.variance(jnp.zeros(1))[0]
    np.testing.assert_allclose(np.log(dispersion), best.x[1], atol=0.02)


def test_location_and_scale():
    """Against tensor quadrature over both outputs of a target, correlated."""
    rng = np.random.default_rng(4)
    root = rng.normal(size=(5, 2, 2)) * 0.5
    covariance = root @ root.swapaxes(1, 2)
    mean, y = rng.normal(size=(5, 2)), rng.normal(size=5)
    nodes = np.linspace(-8, 8, 401)
    weights = np.exp(-(nodes**2) / 2)
    grid = np.stack(np.meshgrid(nodes, nodes), -1).reshape(-1, 2)
    weight = np.outer(weights, weights).ravel() / weights.sum() ** 2
    z = mean[:, None] + grid @ np.linalg.cholesky(covariance).swapaxes(1, 2)
    p = stats.norm.pdf(y[:, None], z[..., 0], np.exp(z[..., 1]))
    likelihood = ff.likelihoods.gaussian_location_scale()
    assert densities.needs_covariance(likelihood, None, mean, y)
    variance = np.diagonal(covariance, axis1=1, axis2=2)
    outputs = Outputs(*map(jnp.asarray, (mean, variance, covariance)))
    ours = log_density(likelihood, None, outputs, jnp.asarray(y))
    np.testing.assert_allclose(ours, np.log(p @ weight), rtol=1e-4)


@pytest.mark.parametrize("name", ["poisson", "student_t"])
def test_a_belief_narrower_than_rounding_is_its_mean(name):
    """In float32: else a search would take what rounding adds for a better scale."""
    rng = np.random.default_rng(6)
    mean = np.asarray(2 * rng.normal(size=100) + 1, np.float32)
    y = np.asarray(rng.poisson(np.exp(mean)), np.float32)
    likelihood = ff.likelihoods.poisson()
    if name == "student_t":
        likelihood = ff.likelihoods.student_t(4.0, 1.0)
    alone = jax.jit(likelihood.log_prob)(mean, y)
    for variance in (1e-14, 1e-10):
        given = Outputs(mean, np.full_like(mean, variance))
        found = log_density(likelihood, None, given, y)
        np.testing.assert_allclose(found, alone, rtol=1e-5, atol=3e-5)


def test_several_outputs_of_a_target():
    """Probabilities that are quadratic in the outputs are averaged exactly."""
    root = np.random.default_rng(5).normal(size=(3, 3))
    covariance = (root @ root.T)[None]
    mean, curvature = np.array([[0.3, -1.0, 0.5]]), np.diag(np.arange(1.0, 4.0))

    def log_prob(z, y):
        return jnp.log(1 + jnp.einsum("ni,ij,nj->n", z, curvature, z)) + y

    likelihood = ff.likelihoods.from_log_prob(log_prob, lambda key, z: z[:, 0])
    outputs = Outputs(mean, np.diagonal(covariance, axis1=1, axis2=2), covariance)
    second = covariance[0] + np.outer(mean[0], mean[0])
    expected = np.log(1 + np.sum(curvature * second))
    ours = log_density(likelihood, None, outputs, np.zeros(1))[0]
    np.testing.assert_allclose(ours, expected, rtol=1e-12)
