"""Averaged class probabilities: the points, the integrals, and what predict makes."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special
from scipy.stats import qmc

import fisherflow_jax as ff
import prediction_cases as cases
from fisherflow_jax._ground import linalg, quadrature, sobol
from prediction_cases import MODELS
from program_size import largest

CATEGORICAL, BERNOULLI = ff.likelihoods.categorical(), ff.likelihoods.bernoulli()
LINK, PLUG_IN = ff.predictions.quadrature(), ff.predictions.plug_in()
RNG = np.random.default_rng(11)


@functools.partial(jax.jit, static_argnums=(1, 2))
def averaged(given, link, likelihood):
    return link(given, likelihood)


# ---- the points


def columns(net):
    """What the bits of the index add to a net, `(10, d)`."""
    # scipy lists points in the order of Gray's code: 1, 3, 7, ... have one bit each
    return np.array([net[2 ** (bit + 1) - 1] ^ net[0] for bit in range(10)])


def bits(numbers):
    """Column b of dimension d as bits, the largest first: `(d, 10, 10)`."""
    return (numbers.T[:, None, :] >> np.arange(9, -1, -1)[None, :, None]) & 1


def test_the_net_is_sobols_scrambled():
    """In each dimension a lower triangular matrix times the columns of scipy's."""
    dimensions = sobol.MOST_DIMENSIONS
    own = sobol.digits(dimensions)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = qmc.Sobol(dimensions, scramble=False, bits=10).random(1024)
    theirs = bits(columns((1024 * plain).astype(int)))
    powers = np.array([own[2**bit] ^ own[0] for bit in range(10)])
    ours = bits(powers)
    for dimension in range(dimensions):
        # the scramble S with ours = S theirs modulo 2, by their inverse
        square = theirs[dimension]
        inverse = np.rint(np.linalg.inv(square) * np.linalg.det(square)).astype(int)
        scramble = ours[dimension] @ inverse % 2
        assert np.array_equal(np.triu(scramble), np.eye(10, dtype=int)), dimension


def test_the_points_are_of_mean_zero_and_covariance_one():
    points = sobol.normal_points(63)
    np.testing.assert_allclose(points.mean(0), 0, atol=1e-14)
    np.testing.assert_allclose(points.T @ points / 1024, np.eye(63), atol=1e-12)
    np.testing.assert_allclose(sobol.normal_points(5), points[:, :5], atol=1e-12)
    # each coordinate nearly the quantiles of 1,024 equal shares
    middles = special.ndtri((np.arange(1024) + 0.5) / 1024)
    assert np.max(np.abs(np.sort(points, 0) - middles[:, None])) < 0.35


# ---- the integrals


@functools.cache
def moments_of_a_sigmoid(m, s):
    """By a sum over points on the scales of all that is integrated."""
    grid = np.linspace(-12, 12, 20_001)
    centers = [(m, s), (0.0, 3.0), (m + s**2, s), (m + 2 * s**2, s)]
    z = np.unique(np.concatenate([c + w * grid for c, w in centers]))
    log_weights = -np.square((z - m) / s) / 2 + np.log(np.gradient(z))
    log_weights -= special.logsumexp(log_weights)
    log_mean = special.logsumexp(log_weights + special.log_expit(z))
    log_rest = special.logsumexp(log_weights + special.log_expit(-z))
    away = special.expit(z) - np.exp(log_mean)
    return log_mean, log_rest, np.exp(log_weights) @ np.square(away)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_the_average_of_a_sigmoid(dtype):
    means, stds = (0.0, 0.3, -2.0, 5.0, -20.0), (1e-3, 0.3, 1.99, 2.01, 3.0, 20.0, 1e4)
    mean, std = map(np.ravel, np.meshgrid(means, stds))
    given = np.asarray(mean, dtype), np.asarray(std, dtype) ** 2
    found = jax.tree.map(np.asarray, jax.jit(quadrature.sigmoid_moments)(*given))
    for i, (m, s) in enumerate(zip(mean, std, strict=True)):
        log_mean, log_rest, exact = moments_of_a_sigmoid(m, s)
        error = 1e-5 if dtype == "float64" else 1e-4
        assert abs(found.log_mean[i] - log_mean) < error, (m, s)
        assert abs(found.log_rest[i] - log_rest) < error, (m, s)
        rtol = 2e-3 if exact > 1e-10 else 2e-2
        np.testing.assert_allclose(found.variance[i], exact, rtol=rtol)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_sigmoids_that_are_nearly_zero(dtype):
    """Where neither the mean nor what it is divided by is a number above zero."""
    mean, std = map(np.ravel, np.meshgrid([-100.0, -300, -1e4], [3.0, 12.0, 200.0]))
    given = jnp.asarray(mean, dtype), jnp.asarray(std, dtype) ** 2
    found = jax.jit(quadrature.sigmoid_moments)(*given)
    np.testing.assert_array_equal(found.variance[mean / std < -50], 0)
    assert np.all(np.isfinite(found.log_mean) & np.isfinite(found.variance))
    grid = np.linspace(-8, 8, 40_001)
    for m, s, log_mean in zip(mean, std, found.log_mean, strict=True):
        # over the exponential where it is one, else over the normal's own tail
        z = np.unique(np.concatenate([m + s**2 + s * grid, s * grid, 9 * grid]))
        log_weights = -np.square((z - m) / s) / 2 + np.log(np.gradient(z))
        log_all = np.log(s * np.sqrt(2 * np.pi))
        exact = special.logsumexp(log_weights + special.log_expit(z)) - log_all
        np.testing.assert_allclose(log_mean, exact, rtol=1e-3)


def test_a_root_of_singular_and_of_broken_matrices():
    rows = RNG.normal(size=(3, 5, 2))
    singular = rows @ np.swapaxes(rows, 1, 2)
    stack = jnp.asarray(
        np.stack([*singular, np.zeros((5, 5)), np.diag(np.arange(5.0))])
    )
    found = linalg.semidefinite_root(stack)
    again = found @ jnp.swapaxes(found, -1, -2)
    np.testing.assert_allclose(again, stack, atol=1e-7)
    definite = singular[0] + np.eye(5)
    factor = np.linalg.cholesky(definite)
    found = linalg.semidefinite_root(jnp.asarray(definite))
    np.testing.assert_allclose(found, factor, rtol=1e-12, atol=1e-12)
    broken = stack.at[0, 1, 1].set(jnp.nan)
    assert np.isnan(linalg.semidefinite_root(broken)[0]).any()


def wide_outputs(classes, rows=40, size=4.0):
    """As unsure as a network is at the prior of its training."""
    mean = 4 * RNG.normal(size=(rows, classes))
    root = RNG.normal(size=(rows, classes, classes + 2))
    root *= np.geomspace(0.1, 1, classes + 2)
    root *= size * RNG.uniform(0.2, 1.5, (rows, 1, 1)) / np.sqrt(classes / 4)
    return mean, root


def draws(mean, root, number=100_000):
    """Mean and standard deviation of the softmax of draws of the logits."""
    first, second = np.zeros(mean.shape), np.zeros(mean.shape)
    for _ in range(10):
        z = RNG.normal(size=(root.shape[-1], number // 10)).astype(np.float32)
        logits = mean[..., None] + root @ z
        share = special.softmax(logits, 1)
        first += share.sum(-1) / number
        second += np.square(share).sum(-1) / number
    return first, np.sqrt(second - first**2)


def check_against_draws(found, wanted):
    """Means within .02; nine of ten standard deviations above .05 within a fifth."""
    mean, std = wanted
    assert np.max(np.abs(found.mean - mean)) < 0.02
    some = std > 0.05
    assert some.sum() > 20
    assert np.quantile(np.abs(found.std / std - 1)[some], 0.9) < 0.2


@pytest.mark.slow_cases
@pytest.mark.parametrize("classes", [2, 10])
def test_classes_against_a_hundred_thousand_draws(classes):
    mean, root = wide_outputs(classes)
    whole = root @ np.swapaxes(root, 1, 2)
    # what all logits share is no uncertainty of the probabilities
    shared, wanted = whole + 100.0, draws(mean, root)
    for covariance in (whole, shared):
        variance = np.diagonal(covariance, axis1=1, axis2=2)
        given = ff.predictions.Outputs(mean, variance, covariance)
        found = averaged(given, LINK, CATEGORICAL)
        np.testing.assert_allclose(np.sum(found.mean, -1), 1, rtol=1e-12)
        check_against_draws(found, wanted)


def test_two_classes_are_one_logit():
    mean, root = wide_outputs(2)
    covariance = root @ np.swapaxes(root, 1, 2)
    variance = np.diagonal(covariance, axis1=1, axis2=2)
    given = ff.predictions.Outputs(mean, variance, covariance)
    apart = np.array([1.0, -1.0])
    logit = mean @ apart, np.einsum("nij,i,j->n", covariance, apart, apart)
    one = ff.predictions.Outputs(*map(jnp.asarray, logit))
    two, one = averaged(given, LINK, CATEGORICAL), averaged(one, LINK, BERNOULLI)
    np.testing.assert_allclose(two.mean[:, 0], one.mean, atol=1e-3)
    np.testing.assert_allclose(two.std[:, 0], one.std, atol=3e-3)


def test_little_uncertainty_is_linear():
    """The standard deviation is then that by linearisation, and exact."""
    mean, root = wide_outputs(6, size=1e-4)
    share = special.softmax(mean, -1)
    slope = share[:, :, None] * (np.eye(6) - share[:, None, :])
    expected = np.sqrt(np.sum((slope @ root) ** 2, -1))
    covariance = root @ np.swapaxes(root, 1, 2)
    variance = np.diagonal(covariance, axis1=1, axis2=2)
    given = ff.predictions.Outputs(mean, variance, covariance)
    found = averaged(given, LINK, CATEGORICAL)
    np.testing.assert_allclose(found.mean, share, rtol=1e-6)
    np.testing.assert_allclose(found.std, expected, rtol=1e-3)


@pytest.mark.parametrize(
    ("size", "mean_error", "std_error"), [(0.5, 0.015, 0.1), (2, 0.2, 0.5)]
)
def test_how_far_off_more_than_64_classes_are(size, mean_error, std_error):
    """What the docstring says, for logits of these standard deviations."""
    mean, root = 3 * RNG.normal(size=(20, 100)), RNG.normal(size=(20, 100, 100))
    root *= np.geomspace(0.05, 1, 100)
    root *= size / np.sqrt(np.mean(np.sum(root**2, -1)))
    share = special.softmax(mean, -1)
    slope = (np.eye(100) - share[:, None]) / (1 - share[..., None])
    line = np.sum(np.square(slope @ root), -1)
    variance = np.sum(root**2, -1)
    given = ff.predictions.Outputs(
        jnp.asarray(mean), jnp.asarray(variance), line_variance=jnp.asarray(line)
    )
    found = averaged(given, LINK, CATEGORICAL)
    np.testing.assert_allclose(np.sum(found.mean, -1), 1, rtol=1e-12)
    exact, std = draws(mean, root, 10_000)
    assert np.max(np.abs(found.mean - exact)) < mean_error
    some = std > 0.05
    assert np.quantile(np.abs(found.std / std - 1)[some], 0.9) < std_error
    # closer than what the network says alone
    assert np.max(np.abs(share - exact)) > 1.5 * np.max(np.abs(found.mean - exact))


# ---- predict


@functools.partial(jax.jit, static_argnames=("name", "link"))
def predicted(state, name, link=None):
    model = MODELS[name]
    return ff.predict(state, model.apply_fn, CATEGORICAL, model.inputs, link=link)


@pytest.mark.slow
def test_positions_one_after_the_other():
    """Of tokens; what the link makes of covariances, and the intervals as before."""
    state, model = cases.state("tokens", "diagonal"), MODELS["tokens"]
    found = predicted(state, "tokens")
    outputs = ff.predictions.linearized_outputs(
        state, model.apply_fn, model.inputs, covariance=True
    )
    wanted = averaged(outputs, LINK, CATEGORICAL)
    np.testing.assert_allclose(found.mean, wanted.mean, rtol=1e-9)
    np.testing.assert_allclose(found.std, wanted.std, rtol=1e-7)
    plain = predicted(state, "tokens", PLUG_IN)
    np.testing.assert_allclose(found.lower, plain.lower, rtol=1e-9)
    np.testing.assert_allclose(found.upper, plain.upper, rtol=1e-9)


@pytest.mark.slow
def test_very_many_classes_form_no_covariance():
    classes, rows = 80, 3
    params, x = RNG.normal(size=(4, classes)), RNG.normal(size=(rows, 4))
    entries = RNG.uniform(1, 9, size=params.shape)
    state = ff.Posterior(params, ff.structures.Diagonal(entries), jnp.ones(()))

    def linear(params, x):
        return x @ params

    def found(state):
        return ff.predict(state, linear, CATEGORICAL, x)

    program = jax.make_jaxpr(found)(state)
    assert largest(program.jaxpr) < rows * classes**2 / 4
    outputs = ff.predictions.linearized_outputs(state, linear, x, line_of=CATEGORICAL)
    wanted = averaged(outputs, LINK, CATEGORICAL)
    found = jax.jit(found)(state)
    np.testing.assert_allclose(found.mean, wanted.mean, rtol=1e-12)
    np.testing.assert_allclose(found.std, wanted.std, rtol=1e-9)
    jacobian = jax.jit(jax.jacrev(lambda p: CATEGORICAL.line(linear(p, x))))(params)
    line = np.sum(np.square(jacobian) / entries, (-2, -1))
    np.testing.assert_allclose(outputs.line_variance, line, rtol=1e-9)
    with pytest.raises(ValueError, match="of more than 64 classes the variance"):
        LINK(outputs._replace(line_variance=None), CATEGORICAL)


@pytest.mark.parametrize("link", [None, ff.predictions.probit()])
def test_the_dispersion_of_shares_is_in_a_new_one(link):
    """The expected variance of a target is the dispersion times E p (1 - p)."""
    state = ff.Posterior(
        jnp.ones(()), ff.structures.Scalar(jnp.asarray(0.5)), jnp.ones(())
    )
    x = np.array([0.3, -2.0])
    found = ff.predict(
        state, lambda p, x: p * x, ff.likelihoods.bernoulli(3.0), x, link=link
    )
    if link is None:
        z = x[:, None] + np.sqrt(2) * np.abs(x)[:, None] * np.linspace(-8, 8, 2001)
        weights = np.exp(-(np.linspace(-8, 8, 2001) ** 2) / 2)
        share = special.expit(z)
        mean, inside = (
            (w @ weights) / weights.sum() for w in (share, share - share**2)
        )
        expected = 3 * inside + mean - inside - mean**2
    else:
        expected = 3 * (found.mean - found.mean**2) - 2 * found.std**2
    np.testing.assert_allclose(found.observation_std**2, expected, rtol=1e-5)


def test_unsure_rates_are_said_once():
    """The rate at the mean is then far below the mean of the rate."""
    state = ff.Posterior(
        jnp.ones(2), ff.structures.Scalar(jnp.asarray(0.25)), jnp.ones(())
    )
    likelihood, x = ff.likelihoods.poisson(), jnp.eye(2)

    def rates(x, **options):
        return ff.predict(state, lambda p, x: x @ p, likelihood, x, **options)

    with pytest.warns(ff.DataWarning, match="of 2 predicted rates.*above 1, up to 4"):
        found = rates(x)
    np.testing.assert_allclose(found.mean, np.e, rtol=1e-12)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rates(x)  # said
        fresh = state._replace(mean=jnp.ones(2))
        for options in ({"link": PLUG_IN}, {"link": ff.predictions.log_normal()}):
            ff.predict(fresh, lambda p, x: x @ p, likelihood, x, **options)
        ff.predict(fresh, lambda p, x: x @ p, likelihood, x / 4)
        jax.jit(lambda s: ff.predict(s, lambda p, x: x @ p, likelihood, x))(fresh)
