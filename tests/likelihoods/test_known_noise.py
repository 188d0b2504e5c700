"""Normal errors of known size: several together, or given with each row."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from fisherflow_jax import likelihoods

rng = np.random.default_rng(2)
R = np.array([[2.0, 0.5, 0.0], [0.5, 1.0, -0.3], [0.0, -0.3, 0.5]])
MEANS, TARGETS = rng.normal(size=(2, 4, 3))
_parts = rng.normal(size=(4, 3, 3))
EACH = _parts @ np.swapaxes(_parts, 1, 2) + 0.2 * np.eye(3)
SCALES = np.array([0.5, 1.0, 2.0, 0.1])


def beside(means, covariances):
    return jnp.concatenate([means, covariances.reshape(*means.shape[:-1], 9)], -1)


TOGETHER = likelihoods.gaussian(covariance=R)
GIVEN = likelihoods.gaussian(covariance="given")
CASES = {
    "fixed": (TOGETHER, MEANS, np.tile(R, (4, 1, 1))),
    "given": (GIVEN, beside(MEANS, EACH), EACH),
}


@pytest.fixture(params=CASES)
def kind(request):
    return CASES[request.param]


def log_densities(means, targets, covariances):
    rows = zip(targets, means, covariances, strict=True)
    return [scipy.stats.multivariate_normal.logpdf(*row) for row in rows]


def test_the_density_is_scipys(kind):
    likelihood, outputs, covariances = kind
    expected = log_densities(MEANS, TARGETS, covariances)
    value = jax.jit(likelihood.log_prob)(outputs, TARGETS)
    np.testing.assert_allclose(value, expected, rtol=1e-12)
    each = jax.jit(jax.vmap(likelihood.log_prob))(outputs, TARGETS)
    np.testing.assert_allclose(each, expected, rtol=1e-12)
    # further axes are further observations
    deep = likelihood.log_prob(jnp.stack([outputs] * 2, 1), np.stack([TARGETS] * 2, 1))
    np.testing.assert_allclose(deep, np.stack([expected] * 2, 1), rtol=1e-12)
    broken = TARGETS.copy()
    broken[1, 2] = np.nan
    value = likelihood.log_prob(outputs, broken)
    np.testing.assert_array_equal(np.isnan(value), [False, True, False, False])
    np.testing.assert_array_equal(likelihood.support(broken), np.isfinite(broken))


def test_the_root_is_one_of_the_inverse(kind):
    likelihood, outputs, covariances = kind
    for rooted in (likelihood, likelihoods.rank_root(likelihood, 3)):
        columns = likelihoods.root_columns(rooted, outputs)
        assert columns.shape == (3, *outputs.shape)
        fisher = np.einsum("rni,rnj->nij", columns, columns)
        np.testing.assert_allclose(
            fisher[:, :3, :3], np.linalg.inv(covariances), rtol=1e-9, atol=1e-12
        )
        assert not fisher[:, 3:].any()  # nothing is learned of the noise
    bound = likelihoods.root_columns(likelihoods.diagonal_root(likelihood), outputs)
    gap = np.einsum("rni,rnj->nij", bound, bound)[:, :3, :3] - np.linalg.inv(
        covariances
    )
    assert np.all(np.linalg.eigvalsh(gap) > -1e-12)


def test_moments_and_samples(kind):
    likelihood, outputs, covariances = kind
    np.testing.assert_allclose(likelihood.mean(outputs), MEANS)
    variances = np.diagonal(covariances, axis1=1, axis2=2)
    np.testing.assert_allclose(likelihood.variance(outputs), variances)
    many = jnp.broadcast_to(outputs[1], (20_000, *outputs[1].shape))
    draws = np.asarray(likelihood.sample(jax.random.key(0), many)) - MEANS[1]
    assert np.all(np.abs(draws.mean(0)) < 5 * np.sqrt(variances[1] / 20_000))
    products = draws[:, :, None] * draws[:, None]
    error = products.std(0) / np.sqrt(20_000)
    assert np.all(np.abs(products.mean(0) - covariances[1]) < 5 * error)


@functools.partial(jax.jit, static_argnums=0)
def marginal_density(likelihood, *given):
    one = lambda z, y, u: likelihood.observing(u).log_prob(z, y)  # noqa: E731
    return jax.vmap(jax.value_and_grad(one))(*given)


@pytest.mark.parametrize("missing", [[], [1], [0, 2], [0, 1, 2]], ids=str)
def test_what_is_observed_has_its_marginal_density(kind, missing):
    likelihood, outputs, covariances = kind
    used, targets = np.ones((4, 3)), TARGETS.copy()
    used[:, missing], targets[:, missing] = 0, np.nan
    seen = [i for i in range(3) if i not in missing]
    marginal = covariances[:, seen][:, :, seen]
    observed = likelihood.observing(used)
    value, score = marginal_density(likelihood, outputs, targets, used)
    if seen:
        expected = log_densities(MEANS[:, seen], targets[:, seen], marginal)
        np.testing.assert_allclose(value, expected, rtol=1e-12)
    assert not np.asarray(score)[:, missing].any()
    columns = likelihoods.root_columns(observed, outputs)[..., :3]
    fisher = np.zeros((4, 3, 3))
    fisher[:, np.array(seen, int)[:, None], seen] = np.linalg.inv(marginal)
    np.testing.assert_allclose(
        np.einsum("rni,rnj->nij", columns, columns), fisher, rtol=1e-9, atol=1e-12
    )


def test_errors_that_go_together_have_no_weights_but_one_and_none():
    half = TOGETHER.observing(np.tile([1.0, 0.5, 0.0], (4, 1)))
    assert np.all(np.isnan(half.log_prob(MEANS, TARGETS)))
    assert np.all(np.isnan(half.root(MEANS, jnp.ones((4, 3)))[:, 1]))


def test_over_normal_outputs_the_covariances_add(kind):
    likelihood, outputs, covariances = kind
    assert likelihood.needs_covariance
    spread = np.zeros((4, *outputs.shape[1:] * 2))
    spread[:, :3, :3] = EACH[::-1]
    variance = np.diagonal(spread, axis1=1, axis2=2)
    value = likelihood.expected_log_prob(outputs, variance, spread, TARGETS)
    expected = log_densities(MEANS, TARGETS, covariances + EACH[::-1])
    np.testing.assert_allclose(value, expected, rtol=1e-12)


def test_a_scale_may_be_given_with_each_row():
    likelihood = likelihoods.gaussian(scale="given")
    means, targets = MEANS[:, 0], TARGETS[:, 0]
    outputs = jnp.stack([means, SCALES], -1)
    density = scipy.stats.norm.logpdf(targets, means, SCALES)
    np.testing.assert_allclose(likelihood.log_prob(outputs, targets), density)
    assert np.isnan(likelihood.log_prob(-outputs, targets)).all()
    np.testing.assert_allclose(likelihood.mean(outputs), means)
    np.testing.assert_allclose(likelihood.variance(outputs), SCALES**2)
    root = likelihood.root(outputs, jnp.ones(4))
    np.testing.assert_allclose(root, np.stack([1 / SCALES, np.zeros(4)], -1))
    spread = np.array([[1.0, 0.0]] * 4)
    value = likelihood.expected_log_prob(outputs, spread, None, targets)
    total = np.sqrt(1 + SCALES**2)
    expected = scipy.stats.norm.logpdf(targets, means, total)
    np.testing.assert_allclose(value, expected)
    many = jnp.broadcast_to(outputs, (4000, 4, 2))
    draws = np.asarray(likelihood.sample(jax.random.key(1), many))
    np.testing.assert_allclose(np.std(draws - means, 0), SCALES, rtol=0.06)
    assert likelihood.with_noise is None and likelihood.normal_errors


def test_half_precision_outputs_are_computed_with_in_float32():
    for likelihood, outputs in ((TOGETHER, MEANS), (GIVEN, beside(MEANS, EACH))):
        outputs = jnp.asarray(outputs, jnp.bfloat16)
        assert likelihood.log_prob(outputs, TARGETS).dtype == jnp.float32
        assert likelihood.variance(outputs).dtype == jnp.float32
        assert likelihood.root(outputs, jnp.ones((4, 3))).dtype == jnp.bfloat16


def test_the_noise_may_be_traced():
    @jax.jit
    @functools.partial(jax.value_and_grad, argnums=0)
    def total(factor, means, targets):
        likelihood = likelihoods.gaussian(covariance=factor * R)
        return jnp.sum(likelihood.log_prob(means, targets))

    def textbook(factor):
        return np.sum(log_densities(MEANS, TARGETS, [factor * R] * 4))

    value, slope = total(0.7, MEANS, TARGETS)
    np.testing.assert_allclose(value, textbook(0.7), rtol=1e-12)
    difference = (textbook(0.7 + 1e-5) - textbook(0.7 - 1e-5)) / 2e-5
    np.testing.assert_allclose(slope, difference, rtol=1e-8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"covariance": np.ones(2)}, r"a matrix \(k, k\).*got shape \(2,\)"),
        ({"covariance": 2.0}, r"a matrix \(k, k\).*got shape \(\)"),
        ({"covariance": np.array([[1.0, 0.5], [0.0, 1.0]])}, "symmetric"),
        ({"covariance": np.diag([1.0, np.nan])}, "symmetric"),
        ({"covariance": np.diag([1.0, 0.0])}, "lowest eigenvalue is 0"),
        ({"covariance": R, "scale": 2.0}, "a scale or a covariance, not both"),
        ({"covariance": "rows"}, "covariance is a value, or 'given'.*'rows'"),
        ({"scale": "each"}, "scale is a value, or 'given'.*'each'"),
        ({"scale": np.ones(2)}, r"one number.*covariance=jnp.diag\(scale\*\*2\)"),
    ],
    ids=lambda value: "" if isinstance(value, str) else str([*value]),
)
def test_what_is_no_noise_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        likelihoods.gaussian(**arguments)


@pytest.mark.parametrize(
    ("likelihood", "outputs", "targets", "message"),
    [
        (TOGETHER, (4, 2), (4, 2), r"the last axis of the outputs must be 3.*\(4, 2\)"),
        (TOGETHER, (4, 3), (4,), r"here \(4, 3\)"),
        (GIVEN, (4, 5), (4, 2), r"k means and the k\^2 entries.*\(4, 5\)"),
        (GIVEN, (4, 6), (4, 6), r"here \(4, 2\)"),
        (likelihoods.gaussian("given"), (4,), (4,), r"must be 2.*\(4,\)"),
        (likelihoods.gaussian("given"), (4, 2), (4, 2), r"here \(4,\)"),
    ],
)
def test_shapes_that_do_not_fit_are_named(likelihood, outputs, targets, message):
    with pytest.raises(ValueError, match=message):
        likelihood.check(np.zeros(outputs), np.zeros(targets))


def test_equal_noise_is_one_likelihood_that_prints_as_its_call():
    assert likelihoods.gaussian(covariance=R.copy()) is TOGETHER
    assert repr(GIVEN) == "gaussian(scale=1.0, covariance='given')"
    assert repr(likelihoods.gaussian("given")) == "gaussian(scale='given')"
