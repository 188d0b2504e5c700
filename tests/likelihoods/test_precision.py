"""Half precision, saturated logits, ties: finite, accurate, of the promised dtype."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from fisherflow_jax import likelihoods


def every_quantity(likelihood, outputs, targets, probes):
    """What is read as a number, and what is pulled back through the model."""

    def total(outputs):
        return jnp.sum(likelihood.log_prob(outputs, targets))

    read = (
        likelihood.log_prob(outputs, targets),
        likelihood.mean(outputs),
        likelihood.variance(outputs),
        likelihood.line(outputs),
        likelihood.scale.inverse(likelihood.line(outputs)),
    )
    pulled_back = (
        likelihood.root(outputs, probes),
        likelihoods.root_columns(likelihood, outputs),
        jax.grad(total)(outputs),
    )
    return read, pulled_back


def as_floats(array):
    return np.asarray(array).astype(float)


@pytest.mark.slow_cases
def test_half_precision_is_computed_in_float32(case):
    likelihood = case.likelihood
    narrow = jnp.asarray(case.outputs, jnp.bfloat16)
    shape = likelihood.probe_shape(narrow.shape)
    probes = np.random.default_rng(0).normal(size=shape)
    evaluate = jax.jit(functools.partial(every_quantity, likelihood))
    read, pulled_back = evaluate(narrow, case.targets, probes)
    wide_read, wide_pulled_back = evaluate(
        narrow.astype(jnp.float64), case.targets, probes
    )
    for value, expected in zip(read, wide_read, strict=True):
        np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6)
    step = float(jnp.finfo(jnp.bfloat16).eps)
    for value, expected in zip(pulled_back, wide_pulled_back, strict=True):
        np.testing.assert_allclose(
            as_floats(value), expected, rtol=2 * step, atol=2 * step
        )


@pytest.mark.slow_cases
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32, jnp.float64])
def test_dtypes_are_those_promised(case, dtype):
    likelihood = case.likelihood
    outputs = jnp.asarray(case.outputs, dtype)
    probes = np.ones(likelihood.probe_shape(outputs.shape))
    read, pulled_back = jax.eval_shape(
        functools.partial(every_quantity, likelihood), outputs, case.targets, probes
    )
    wide = jnp.float64 if dtype == jnp.float64 else jnp.float32
    assert [value.dtype for value in read] == [wide] * len(read)
    assert [value.dtype for value in pulled_back] == [dtype] * len(pulled_back)
    sample = jax.eval_shape(likelihood.sample, jax.random.key(0), outputs)
    is_class = jnp.issubdtype(sample.dtype, jnp.integer)
    assert is_class if case.name == "categorical" else sample.dtype == wide


SATURATED = {
    "bernoulli": np.array([200.0, -200.0, 200.0, -200.0, 0.0]),
    "categorical": np.array(
        [
            [200.0, -200.0, 0.0],
            [-200.0, 200.0, 200.0],
            [200.0, 200.0, 200.0],
            [0.0, 0.0, 0.0],
            [-200.0, -200.0, -200.0],
        ]
    ),
}


@pytest.mark.slow_cases
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("name", sorted(SATURATED))
def test_saturated_logits_stay_finite(name, dtype):
    likelihood = getattr(likelihoods, name)()
    outputs = jnp.asarray(SATURATED[name], dtype)

    @jax.jit
    def evaluate(outputs, targets):
        probes = jnp.ones(outputs.shape)

        def root_total(outputs):
            return jnp.sum(likelihood.root(outputs, probes).astype(jnp.float32))

        def line_total(outputs):
            return jnp.sum(likelihood.line(outputs))

        slopes = jax.grad(root_total)(outputs), jax.grad(line_total)(outputs)
        return every_quantity(likelihood, outputs, targets, probes), slopes

    for targets in (np.zeros(5, int), np.ones(5, int)):
        values = evaluate(outputs, targets)
        for value in jax.tree.leaves(values):
            assert np.all(np.isfinite(as_floats(value)))
        exact = evaluate(SATURATED[name], targets)
        for value, expected in zip(values[0][0], exact[0][0], strict=True):
            np.testing.assert_allclose(value, expected, rtol=1e-6, atol=1e-30)
    line = values[0][0][3]
    assert np.max(np.abs(line)) >= 199  # saturated, not clipped


def test_variance_and_root_keep_their_digits_near_certainty():
    """1 - p is not formed by subtraction: in float32 it would be 0 here."""
    logit = jnp.float32([20.0, -20.0])
    pair = jnp.stack([jnp.zeros(2, jnp.float32), logit], -1)
    exact = 1 / (np.exp(20.0) + 2 + np.exp(-20.0))
    bernoulli, categorical = likelihoods.bernoulli(), likelihoods.categorical()
    np.testing.assert_allclose(bernoulli.variance(logit), [exact] * 2, rtol=1e-5)
    root = bernoulli.root(logit, jnp.ones(2, jnp.float32))
    np.testing.assert_allclose(root, [np.sqrt(exact)] * 2, rtol=1e-5)
    np.testing.assert_allclose(
        categorical.variance(pair), np.full((2, 2), exact), rtol=1e-5
    )


def test_bernoulli_log_prob_keeps_its_digits_near_certainty():
    value = likelihoods.bernoulli().log_prob(
        jnp.float32([30.0, -30.0]), np.array([1, 0])
    )
    np.testing.assert_allclose(value, [-np.exp(-30.0)] * 2, rtol=1e-5)


def test_bernoulli_derivatives_are_exact_in_both_tails_and_between():
    z = np.array([-40.0, -3.0, 0.0, 2.0, 40.0], np.float32)
    share = np.array([0.0, 0.3, 1.0, 1.0, 1.0], np.float32)
    wide = z.astype(float)
    p, q = 1 / (1 + np.exp(-wide)), 1 / (1 + np.exp(wide))
    log_prob = likelihoods.bernoulli().log_prob
    total = lambda z, share: jnp.sum(log_prob(z, share))  # noqa: E731
    slopes = jax.jit(jax.grad(total, (0, 1)))(z, share)
    expected = share * q - (1 - share) * p, wide  # the second: log p - log q
    for found, exact in zip(slopes, expected, strict=True):
        np.testing.assert_allclose(found, exact, rtol=1e-6)
    bend = jax.jit(jax.hessian(total))(z, share)
    np.testing.assert_allclose(bend, np.diag(-p * q), rtol=1e-5)


def test_negative_binomial_stays_finite_where_its_mean_overflows():
    likelihood = likelihoods.negative_binomial(2.0)
    outputs, targets = jnp.float32([200.0, -200.0]), np.array([3, 0])
    total = lambda z: jnp.sum(likelihood.log_prob(z, targets))  # noqa: E731
    gradient = jax.jit(jax.grad(total))(outputs)
    np.testing.assert_allclose(gradient, [-2.0, 0.0], atol=1e-6)
    root = likelihood.root(outputs, jnp.ones(2, jnp.float32))
    np.testing.assert_allclose(root, [np.sqrt(2.0), 0.0], rtol=1e-6, atol=1e-30)


def test_uniform_and_tied_logits_have_the_textbook_root():
    likelihood = likelihoods.categorical()
    for outputs, p in (
        (jnp.zeros((1, 4), jnp.float32), np.full(4, 0.25)),
        (jnp.float32([[7.0, 7.0, -200.0]]), np.array([0.5, 0.5, 0.0])),
    ):
        columns = np.asarray(likelihoods.root_columns(likelihood, outputs))[:, 0]
        expected = np.diag(p) - np.outer(p, p)
        np.testing.assert_allclose(columns.T @ columns, expected, atol=1e-7)


def test_an_outlier_of_student_t_may_have_a_square_that_overflows():
    targets = np.array([0.0, 1e-10, -3.0, 1e8, 1e10, -1e20, 1e30], np.float32)
    likelihood = likelihoods.student_t(4.0, 2.0)
    outputs = jnp.zeros(7, jnp.float32)
    both = jax.jit(jax.vmap(jax.value_and_grad(likelihood.log_prob)))
    values, slopes = both(outputs, targets)
    wide = targets.astype(float)
    np.testing.assert_allclose(values, scipy.stats.t.logpdf(wide, 4, 0, 2), rtol=1e-6)
    expected = 5 * (wide / 16) / (1 + (wide / 4) ** 2)
    np.testing.assert_allclose(slopes, expected, rtol=1e-5, atol=1e-25)
