"""The log marginal likelihood against closed forms, and its maximum against scipy's."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from scipy import optimize, stats

import fisherflow_jax as ff
from fisherflow_jax.calibration import (
    log_marginal_likelihood,
    maximize_marginal_likelihood,
)

RNG = np.random.default_rng(0)
X = RNG.normal(size=(30, 3))
Y = X @ RNG.normal(size=(3, 2)) + RNG.normal(size=2) + 0.5 * RNG.normal(size=(30, 2))
PARAMS = {"b": np.zeros(2), "w": np.zeros((3, 2))}
ONES = np.concatenate([np.ones((30, 1)), X], 1)
# the rows of the design of all targets, in the order of ravel: b first
DESIGN = np.einsum("ni,oj->noij", ONES, np.eye(2)).reshape(60, 8)


def apply_fn(params, x):
    with jax.numpy_rank_promotion("allow"):
        return x @ params["w"] + params["b"]


@functools.cache
def information(name):
    layers = ff.layers.find_layers(apply_fn, PARAMS, jnp.asarray(X))
    structure = {
        "scalar": ff.structures.scalar(),
        "diagonal": ff.structures.diagonal(),
        "block": ff.structures.block(lambda path: path),
        "full": ff.structures.full(),
        "low_rank": ff.structures.low_rank(8),
        "kronecker": ff.structures.kronecker(layers),
    }[name]
    likelihood = ff.likelihoods.gaussian()
    estimator = ff.estimators.exact(apply_fn, likelihood, structure)
    return jax.jit(estimator.compute)(
        PARAMS, ff.Batch(jnp.asarray(X), None, jnp.ones(30)), None
    )


@functools.cache
def dense(name):
    to_dense = jax.jit(ff.information.to_dense)
    return np.asarray(to_dense(information(name), PARAMS))


def flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def solved(prior, noise):
    """The posterior mean, and the closed-form log-evidence."""
    gram = DESIGN.T @ DESIGN / noise**2 + np.diag(prior)
    mean = np.linalg.solve(gram, DESIGN.T @ Y.ravel() / noise**2)
    covariance = noise**2 * np.eye(60) + DESIGN @ np.diag(1 / prior) @ DESIGN.T
    evidence = stats.multivariate_normal.logpdf(Y.ravel(), np.zeros(60), covariance)
    params = {"b": mean[:2], "w": mean[2:].reshape(3, 2)}
    return params, evidence


@jax.jit
def fit_of(mean, noise):
    outputs = DESIGN @ ravel_pytree(mean)[0]
    return jax.scipy.stats.norm.logpdf(Y.ravel(), outputs, noise).sum()


def entries(prior):
    whole = {k: np.broadcast_to(prior[k], PARAMS[k].shape) for k in PARAMS}
    return flat(whole)


@pytest.mark.parametrize("prior", [0.7, {"b": 0.4, "w": 3.0}], ids=["one", "two"])
@pytest.mark.parametrize("name", ["full", "low_rank", "kronecker"])
def test_exact_for_linear_regression(name, prior):
    """Kronecker too: every example has the same output Fisher."""
    if name == "kronecker" and isinstance(prior, dict):
        prior = {"b": 0.4, "w": 0.4}
    each = entries(prior if isinstance(prior, dict) else {"b": prior, "w": prior})
    mean, expected = solved(each, 0.5)

    @jax.jit
    def found(information, fit):
        scaled = ff.information.scale(information, 1 / 0.25)
        return log_marginal_likelihood(mean, scaled, fit, prior)

    value = found(information(name), fit_of(mean, 0.5))
    np.testing.assert_allclose(value, expected, rtol=1e-10)


@pytest.mark.parametrize("name", ["scalar", "full", "kronecker"])
def test_gradients(name):
    """With the dense matrix, and finite differences in it, for prior and noise."""
    mean, _ = solved(np.full(8, 0.7), 0.5)
    kept, theta = dense(name), flat(mean)

    def reference(logs):
        prior = np.full(8, np.exp(logs[0]))
        matrix = kept / np.exp(2 * logs[1]) + np.diag(prior)
        logdet = np.linalg.slogdet(matrix)[1]
        fit = float(fit_of(mean, np.exp(logs[1])))
        return fit + 0.5 * (np.log(prior).sum() - logdet - prior @ theta**2)

    def ours(logs):
        noise = jnp.exp(logs[1])
        scaled = ff.information.scale(information(name), noise**-2)
        fit = fit_of(mean, noise)
        return log_marginal_likelihood(mean, scaled, fit, jnp.exp(logs[0]))

    logs = jnp.array([0.3, -0.4])
    value, slope = jax.jit(jax.value_and_grad(ours))(logs)
    np.testing.assert_allclose(value, reference(logs), rtol=1e-10)
    expected = optimize.approx_fprime(np.asarray(logs), reference, 1e-6)
    np.testing.assert_allclose(slope, expected, rtol=1e-4)


def evidence(name, mean, logs, unknown):
    """Of the dense matrix, for the logarithms of (b, w, dispersion)."""
    kept, theta = dense(name), flat(mean)
    prior = np.exp(np.repeat(logs[:2], [2, 6]))
    dispersion = np.exp(logs[2]) if unknown else 0.25
    logdet = np.linalg.slogdet(kept / dispersion + np.diag(prior))[1]
    fit = float(fit_of(mean, np.sqrt(dispersion)))
    return fit + 0.5 * (np.log(prior).sum() - logdet - prior @ theta**2)


@pytest.mark.parametrize("name", ["full", "diagonal"])
def test_a_prior_a_group_and_the_noise(name):
    mean, _ = solved(np.full(8, 0.7), 0.5)
    found = maximize_marginal_likelihood(
        ff.likelihoods.gaussian(scale=None),
        mean,
        information(name),
        lambda dispersion: fit_of(mean, jnp.sqrt(dispersion)),
        prior_precision={"b": 1.0, "w": 1.0},
    )
    best = optimize.minimize(lambda x: -evidence(name, mean, x, True), np.zeros(3))
    numbers = [*found.prior_precision.values(), found.dispersion]
    np.testing.assert_allclose(np.log(numbers), best.x, atol=1e-4)
    np.testing.assert_allclose(found.after, -best.fun, rtol=1e-9)
    start = evidence(name, mean, np.zeros(3), True)
    np.testing.assert_allclose(found.before, start, rtol=1e-10)
    assert found.converged and found.after > found.before


@pytest.mark.slow_cases
@pytest.mark.parametrize("name", ["full", "block", "kronecker"])
def test_one_number(name):
    mean, _ = solved(np.full(8, 0.7), 0.5)
    scaled = ff.information.scale(information(name), 4.0)
    found = maximize_marginal_likelihood(
        ff.likelihoods.gaussian(scale=0.5), mean, scaled, fit_of(mean, 0.5)
    )
    best = optimize.minimize_scalar(
        lambda x: -evidence(name, mean, np.array([x, x]), False), bracket=(-1, 1)
    )
    np.testing.assert_allclose(np.log(found.prior_precision), best.x, atol=1e-6)
    np.testing.assert_allclose(found.after, -best.fun, rtol=1e-10)
    assert found.dispersion is None


def test_parameters_at_the_prior_mean():
    mean = jnp.zeros(3)
    flat = ff.structures.Diagonal(jnp.ones(3))
    found = maximize_marginal_likelihood(ff.likelihoods.gaussian(), mean, flat, 0.0)
    assert found.prior_precision > 1e6 and np.isfinite(found.after)
    shifted = log_marginal_likelihood(mean + 2, flat, 0.0, 1.0, prior_mean=mean + 2)
    np.testing.assert_allclose(shifted, -1.5 * np.log(2))


def test_float32():
    """MacKay's fixed point: effective parameters over the squared norm."""
    mean, _ = solved(np.full(8, 0.7), 0.5)
    fit, data = fit_of(mean, 1.0), information("full")
    found = maximize_marginal_likelihood(
        ff.likelihoods.gaussian(),
        *jax.tree.map(lambda x: np.asarray(x, np.float32), (mean, data, fit)),
    )
    assert found.after.dtype == jnp.float32
    values = np.linalg.eigvalsh(dense("full"))
    norm = np.sum(np.square(flat(mean)))
    prior = float(found.prior_precision)
    np.testing.assert_allclose(
        prior, np.sum(values / (values + prior)) / norm, rtol=1e-2
    )
    logs = 8 * np.log(prior) - np.sum(np.log(values + prior))
    np.testing.assert_allclose(
        found.after, fit + 0.5 * (logs - prior * norm), rtol=1e-5
    )


def test_classes_are_warned_of():
    flat = ff.structures.Diagonal(jnp.ones(2))
    with pytest.warns(UserWarning, match=r"held-out data with ff\.calibrate") as seen:
        maximize_marginal_likelihood(
            ff.likelihoods.categorical(), jnp.ones(2), flat, 0.0
        )
    assert len(seen) == 1


FLAT = ff.structures.Diagonal(jnp.ones(2))


@pytest.mark.parametrize(
    "arguments, text",
    [
        ((FLAT, 0.0, 0.0), "prior_precision must be positive"),
        ((FLAT, 0.0, -1.0), "prior_precision must be positive"),
        ((FLAT, 0.0, jnp.nan), "prior_precision must be positive"),
        ((FLAT, jnp.nan, 1.0), "log_likelihood must be finite"),
        ((FLAT, jnp.zeros(2), 1.0), "log_likelihood is one number"),
        ((ff.structures.Diagonal(jnp.ones(3)), 0.0, 1.0), "about another tree"),
        ((ff.structures.Diagonal(-jnp.ones(2)), 0.0, 1.0), "finite and not negative"),
    ],
)
def test_bad_input(arguments, text):
    data, fit, prior = arguments
    with pytest.raises(ValueError, match=text):
        log_marginal_likelihood(jnp.ones(2), data, fit, prior)
    with pytest.raises(ValueError, match=text):
        maximize_marginal_likelihood(
            ff.likelihoods.gaussian(), jnp.ones(2), data, fit, prior_precision=prior
        )


def test_kernel_and_bias_share_a_number():
    data, text = information("kronecker"), "one number a layer"
    with pytest.raises(ValueError, match=text):
        log_marginal_likelihood(PARAMS, data, 0.0, {"b": 1.0, "w": 2.0})
    with pytest.raises(ValueError, match=text):
        jax.grad(
            lambda p: log_marginal_likelihood(PARAMS, data, 0.0, {"b": p, "w": 2 * p})
        )(1.0)


def test_an_unknown_dispersion_needs_a_function():
    likelihood = ff.likelihoods.gaussian(scale=None)
    with pytest.raises(ValueError, match="log_likelihood is then a function of it"):
        maximize_marginal_likelihood(likelihood, jnp.ones(2), FLAT, -3.0)
    with pytest.raises(ValueError, match="got arrays of shapes"):
        maximize_marginal_likelihood(
            likelihood, jnp.ones(2), FLAT, 0.0, prior_precision=jnp.ones(2)
        )


def test_low_rank_takes_no_spectrum():
    """Of 9000 parameters, whose dense matrix would be refused."""
    count, base, prior = 9000, 0.1, 0.7
    wide = ff.structures.LowRank(np.full(count, base), np.ones((1, count)))
    mean = np.full(count, 0.01)
    logdet = (count - 1) * np.log(base + prior) + np.log(base + prior + count)
    step = prior * count * 0.01**2
    expected = 0.5 * (count * np.log(prior) - logdet - step)
    found = jax.jit(log_marginal_likelihood)(mean, wide, 0.0, prior)
    np.testing.assert_allclose(found, expected, rtol=1e-10)
    search = maximize_marginal_likelihood(
        ff.likelihoods.gaussian(), mean, wide, 0.0, prior_precision=prior
    )
    np.testing.assert_allclose(search.before, expected, rtol=1e-10)
    directions = base + np.array([count, 0])
    share = np.sum(directions / (directions + prior) * [1, count - 1])
    found = ff.diagnostics.effective_parameters(wide, prior)
    np.testing.assert_allclose(found, share, rtol=1e-9)


def test_a_prior_given_as_an_information_fits_the_layers():
    fitting = {"b": np.full(2, 0.4), "w": np.full((3, 2), 0.4)}
    mean, _ = solved(np.full(8, 0.4), 0.5)
    kronecker = information("kronecker")
    one = log_marginal_likelihood(mean, kronecker, -3.0, 0.4)
    for prior in (
        ff.structures.Diagonal(fitting),
        ff.structures.Scalar(jnp.array(0.4)),
    ):
        again = log_marginal_likelihood(mean, kronecker, -3.0, prior)
        np.testing.assert_allclose(again, one, rtol=1e-12)
    other = ff.structures.Diagonal(fitting | {"b": jnp.array([0.4, 0.5])})
    with pytest.raises(ValueError, match="one number a layer"):
        log_marginal_likelihood(mean, kronecker, -3.0, other)
