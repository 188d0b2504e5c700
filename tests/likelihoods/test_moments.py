"""Mean, variance, samples and the unbounded line of the mean."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from fisherflow_jax import likelihoods


def indicator(case, targets):
    """The quantity whose mean is `likelihood.mean`: one-hot for classes."""
    if case.name == "categorical":
        return np.eye(case.outputs.shape[-1])[np.asarray(targets)]
    return np.asarray(targets, dtype=float)


def test_moments_are_those_of_quadrature(case):
    mean = case.likelihood.mean(jnp.asarray(case.outputs))
    variance = case.likelihood.variance(jnp.asarray(case.outputs))
    assert mean.shape == variance.shape
    for i, row in enumerate(case.outputs):
        targets, weights = case.nodes(row)
        values = indicator(case, targets)
        first, second = weights @ values, weights @ values**2
        np.testing.assert_allclose(mean[i], first, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(variance[i], second - first**2, rtol=1e-8)


@pytest.mark.slow_cases
def test_samples_have_the_moments_and_scores(case):
    """Mean, variance and the covariance of the score, within 5 standard errors.

    The scores of samples have mean 0 and covariance L L^T, the output Fisher.
    """
    num_draws = 20_000
    likelihood, outputs = case.likelihood, jnp.asarray(case.outputs)

    @jax.jit
    def draw(key, outputs):
        stacked = jnp.broadcast_to(outputs, (num_draws, *outputs.shape))
        targets = likelihood.sample(key, stacked)
        likelihood.check(stacked, targets)

        def total(stacked):
            return jnp.sum(likelihood.log_prob(stacked, targets))

        columns = likelihoods.root_columns(likelihood, outputs)
        columns = columns.reshape(*columns.shape[:2], -1)
        fisher = jnp.einsum("rni,rnj->nij", columns, columns)
        return (
            targets,
            likelihood.support(targets),
            jax.grad(total)(stacked),
            (likelihood.mean(outputs), likelihood.variance(outputs), fisher),
        )

    def agree(draws, expected):
        error = draws.std(0) / np.sqrt(num_draws)
        assert np.all(np.abs(draws.mean(0) - expected) <= 5 * error + 1e-12)

    targets, possible, scores, (mean, variance, fisher) = draw(
        jax.random.key(7), outputs
    )
    assert targets.shape == (num_draws, *case.targets.shape)
    assert np.all(possible)
    mean = np.asarray(mean)
    values = indicator(case, targets)
    agree(values, mean)
    agree((values - mean) ** 2, variance)
    scores = np.asarray(scores).reshape(num_draws, len(outputs), -1)
    agree(scores, 0.0)
    agree(scores[..., :, None] * scores[..., None, :], fisher)


def test_mean_is_read_back_from_its_line(case):
    outputs = jnp.asarray(case.outputs)
    line, mean = case.likelihood.line(outputs), case.likelihood.mean(outputs)
    assert line.shape == mean.shape
    np.testing.assert_allclose(case.likelihood.scale.inverse(line), mean, rtol=1e-12)
    values = np.sort(np.concatenate([np.linspace(-4, 4, 33), np.ravel(line)]))
    assert np.all(np.diff(case.likelihood.scale.inverse(jnp.asarray(values))) >= 0)


def test_line_of_a_class_is_its_log_odds():
    outputs = np.random.default_rng(0).normal(size=(20, 6)) * 10
    outputs[0] = 0.0
    outputs[1, :2] = outputs[1].max() + 1.0
    line = jax.jit(likelihoods.categorical().line)(outputs)
    expected = np.stack(
        [
            outputs[:, c] - scipy.special.logsumexp(np.delete(outputs, c, 1), axis=1)
            for c in range(6)
        ],
        -1,
    )
    np.testing.assert_allclose(line, expected, rtol=1e-12, atol=1e-12)


def test_line_of_a_class_has_the_gradient_of_the_log_odds():
    """d line_c / d z_c = 1, d line_c / d z_j = -p_j / (1 - p_c)."""
    outputs = np.array([[0.3, -1.2, 2.0, 2.0], [200.0, 0.0, -200.0, 1.0]])
    line = likelihoods.categorical().line
    jacobians = jax.jit(jax.vmap(jax.jacobian(lambda z: line(z[None])[0])))(outputs)
    for row, jacobian in zip(outputs, jacobians, strict=True):
        expected = np.eye(4)
        for c in range(4):
            others = np.arange(4) != c
            expected[c, others] = -scipy.special.softmax(row[others])
        np.testing.assert_allclose(jacobian, expected, rtol=1e-12, atol=1e-14)


def test_variance_of_student_t_is_infinite_for_two_degrees_of_freedom():
    outputs = jnp.zeros(2)
    assert np.all(np.isinf(likelihoods.student_t(2.0, 1.0).variance(outputs)))
    variance = likelihoods.student_t(2.5, 2.0).variance(outputs)
    np.testing.assert_allclose(variance, [20.0, 20.0])


def test_gamma_samples_stay_positive_for_a_tiny_shape():
    likelihood = likelihoods.gamma(shape=1e-3)
    outputs = jnp.zeros(2000, jnp.float32)
    targets = jax.jit(likelihood.sample)(jax.random.key(0), outputs)
    assert np.all(likelihood.support(targets))
    assert np.all(np.isfinite(likelihood.log_prob(outputs, targets)))
