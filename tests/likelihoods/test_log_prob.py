"""The log-probability: against scipy, its support, dtypes and extra axes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from fisherflow_jax import likelihoods


@pytest.mark.slow_cases
def test_log_prob_is_that_of_scipy(case):
    value = case.likelihood.log_prob(jnp.asarray(case.outputs), case.targets)
    expected = case.log_prob(case.outputs, case.targets)
    np.testing.assert_allclose(value, expected, rtol=1e-11, atol=1e-12)


def test_log_prob_of_every_node_is_that_of_scipy(case):
    log_prob = jax.jit(case.likelihood.log_prob)
    for row in case.outputs:
        targets, _ = case.nodes(row)
        outputs = np.broadcast_to(row, (len(targets), *row.shape))
        expected = case.log_prob(outputs, targets)
        value = np.asarray(log_prob(outputs, targets))
        likely = expected > -200  # scipy's own pmf loses digits far out
        np.testing.assert_allclose(value[likely], expected[likely], rtol=1e-9)
        if np.issubdtype(targets.dtype, np.integer):
            np.testing.assert_allclose(np.sum(np.exp(value)), 1.0, rtol=1e-11)


@pytest.mark.slow_cases
def test_impossible_targets_give_nan_in_value_and_gradient(case):
    def total(outputs, targets):
        value = case.likelihood.log_prob(outputs, targets)
        return jnp.sum(value), value

    evaluate = jax.jit(jax.grad(total, has_aux=True))
    for kind in (int, float):
        impossible = [target for target in case.impossible if type(target) is kind]
        if not impossible:
            continue
        targets = np.array([*impossible, 1])
        rows = np.zeros(len(targets), int)
        gradient, value = evaluate(case.outputs[rows], targets)
        assert np.all(np.isnan(value[:-1])) and np.all(np.isnan(gradient[:-1]))
        assert np.isfinite(value[-1]) and np.all(np.isfinite(gradient[-1]))


def test_support_names_the_impossible_targets(case):
    support = case.likelihood.support
    assert np.all(support(case.targets))
    assert support(case.targets).shape == case.targets.shape
    for target in case.impossible:
        # The number of classes is unknown to the support of a categorical.
        if not (case.name == "categorical" and target > 0):
            assert not support(jnp.asarray(target)), target


@pytest.mark.slow_cases
def test_targets_of_any_type_are_cast(case):
    outputs = jnp.asarray(case.outputs)
    log_prob = jax.jit(case.likelihood.log_prob)
    expected = log_prob(outputs, case.targets)
    if case.name == "categorical":
        types = [jnp.int8, jnp.uint32]
    elif np.issubdtype(case.targets.dtype, np.integer):
        types = [jnp.int8, jnp.float32]
    else:
        types = [jnp.float32]
    for dtype in types:
        value = log_prob(outputs, jnp.asarray(case.targets, dtype))
        assert value.dtype == jnp.float64
        np.testing.assert_allclose(value, expected, rtol=1e-6, atol=1e-6)


def test_small_integer_classes_do_not_wrap():
    outputs = jnp.zeros((2, 300))
    value = likelihoods.categorical().log_prob(outputs, jnp.array([200, 0], jnp.uint8))
    np.testing.assert_allclose(value, -np.log(300.0))


def test_bernoulli_takes_booleans_and_shares():
    likelihood = likelihoods.bernoulli()
    logits = jnp.array([0.4, -1.0, 2.0])
    yes = jnp.array([True, False, True])
    np.testing.assert_allclose(
        likelihood.log_prob(logits, yes),
        likelihood.log_prob(logits, jnp.array([1, 0, 1])),
    )
    assert np.all(likelihood.support(yes))
    p = np.asarray(likelihood.mean(logits))
    share = np.array([0.3, 0.0, 0.9])
    np.testing.assert_allclose(
        likelihood.log_prob(logits, share),
        share * np.log(p) + (1 - share) * np.log1p(-p),
        rtol=1e-12,
    )


@pytest.mark.parametrize(
    "likelihood", [likelihoods.poisson(), likelihoods.negative_binomial(2.0)]
)
def test_counts_need_not_be_whole(likelihood):
    outputs, targets = jnp.array([0.5]), jnp.array([1.5])
    score = jax.jit(jax.grad(lambda z: likelihood.log_prob(z, targets)[0]))(outputs)
    quasi_score = likelihood.mean(outputs) * (targets - likelihood.mean(outputs))
    quasi_score = quasi_score / likelihood.variance(outputs)
    np.testing.assert_allclose(score, quasi_score, rtol=1e-12)


@pytest.mark.slow_cases
def test_further_axes_are_independent_targets(case):
    likelihood = case.likelihood
    rows = np.array([[0, 1, 2], [3, 1, 0]])

    @jax.jit
    def evaluate(outputs, targets, probes):
        likelihood.check(outputs, targets)
        per_target = (
            likelihood.log_prob(outputs, targets),
            likelihood.mean(outputs),
            likelihood.variance(outputs),
            likelihood.line(outputs),
            likelihood.root(outputs, probes),
        )
        key = jax.random.key(0)
        sampled = jax.eval_shape(likelihood.sample, key, outputs).shape
        assert sampled == targets.shape == per_target[0].shape
        return per_target

    outputs, targets = case.outputs[rows], case.targets[rows]
    probes = np.random.default_rng(0).normal(size=likelihood.probe_shape(outputs.shape))

    def flat(array):
        return array.reshape(6, *array.shape[2:])

    deep = evaluate(outputs, targets, probes)
    for value, expected in zip(
        deep, evaluate(flat(outputs), flat(targets), flat(probes)), strict=True
    ):
        np.testing.assert_allclose(flat(value), expected, rtol=1e-12, atol=1e-15)


@pytest.mark.slow_cases
def test_under_jit_and_vmap(case):
    outputs, targets = jnp.asarray(case.outputs), jnp.asarray(case.targets)
    expected = case.likelihood.log_prob(outputs, targets)
    for transform in (lambda function: function, jax.vmap):
        value = jax.jit(transform(case.likelihood.log_prob))(outputs, targets)
        np.testing.assert_allclose(value, expected, rtol=1e-12)


@pytest.mark.parametrize(
    "likelihood, outputs, targets, expected",
    [
        (
            likelihoods.gamma(shape=1e4),
            0.7,
            2.03,
            lambda z, y: scipy.stats.gamma.logpdf(y, 1e4, scale=np.exp(z) / 1e4),
        ),
        (
            likelihoods.poisson(),
            13.8,
            985_000.0,
            lambda z, y: scipy.stats.poisson.logpmf(y, np.exp(z)),
        ),
        (
            likelihoods.negative_binomial(1e6),
            0.7,
            3.0,
            lambda z, y: scipy.stats.poisson.logpmf(y, np.exp(z)),
        ),
        (
            likelihoods.negative_binomial(2.0),
            13.8,
            985_000.0,
            lambda z, y: scipy.stats.nbinom.logpmf(y, 2.0, 2.0 / (2.0 + np.exp(z))),
        ),
        (
            likelihoods.student_t(1e6, 1.0),
            0.7,
            1.2,
            lambda z, y: scipy.stats.norm.logpdf(y - z),
        ),
    ],
    ids=["gamma", "poisson", "concentrated", "dispersed", "student_t"],
)
def test_large_terms_do_not_cancel_in_float32(likelihood, outputs, targets, expected):
    outputs, targets = np.float32([outputs]), np.float32([targets])
    value = jax.jit(likelihood.log_prob)(outputs, targets)
    assert value.dtype == jnp.float32
    reference = expected(outputs.astype(float), targets.astype(float))
    np.testing.assert_allclose(value, reference, rtol=1e-4)


def test_gamma_normaliser_on_both_sides_of_its_series():
    log_prob = jax.jit(lambda a, z, y: likelihoods.gamma(a).log_prob(z, y))
    for shape in (0.01, 1.0, 15.9, 16.0, 16.1, 300.0, 1e5):
        targets = np.array([1.1])
        value = log_prob(shape, np.array([0.1]), targets)
        expected = scipy.stats.gamma.logpdf(targets, shape, scale=np.exp(0.1) / shape)
        np.testing.assert_allclose(value, expected, rtol=1e-9)
