"""The root of the output Fisher information, against the KL divergence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fisherflow_jax import likelihoods


def fisher_of_root(likelihood, outputs, key=None):
    """(n, d, d): L L^T of every example, over its flattened outputs."""
    columns = jax.jit(likelihoods.root_columns, static_argnums=0)(
        likelihood, outputs, key
    )
    flat = columns.reshape(*columns.shape[:2], -1)
    return np.einsum("rni,rnj->nij", flat, flat)


@pytest.mark.slow_cases
def test_root_is_that_of_the_kl_hessian(case):
    """Hessian in z' of KL(p_z || p_z') at z' = z, by quadrature over the targets."""
    targets, weights = (
        np.stack(parts)
        for parts in zip(*[case.nodes(row) for row in case.outputs], strict=True)
    )

    def cross_entropy(output, targets, weights):
        def log_prob(target):
            return case.likelihood.log_prob(output[None], target[None])[0]

        return -jnp.dot(weights, jax.vmap(log_prob)(targets))

    hessian = jax.jit(jax.vmap(jax.hessian(cross_entropy)))
    expected = np.asarray(hessian(case.outputs, targets, weights))
    fisher = fisher_of_root(case.likelihood, jnp.asarray(case.outputs))
    np.testing.assert_allclose(
        fisher, expected.reshape(fisher.shape), rtol=1e-8, atol=1e-10
    )


CLOSED_FORMS = {
    "categorical": lambda p, q: jnp.sum(
        jax.nn.softmax(p) * (jax.nn.log_softmax(p) - jax.nn.log_softmax(q))
    ),
    "bernoulli": lambda p, q: (
        jax.nn.sigmoid(p) * (p - q) + jax.nn.softplus(q) - jax.nn.softplus(p)
    ),
    "gaussian": lambda p, q: 0.5 * (p - q) ** 2 / 1.7**2,
    "gaussian_location_scale": lambda p, q: (
        q[1]
        - p[1]
        + 0.5 * (jnp.exp(2 * p[1]) + (p[0] - q[0]) ** 2) * jnp.exp(-2 * q[1])
        - 0.5
    ),
    "gamma": lambda p, q: 2.5 * (q - p + jnp.exp(p - q) - 1),
    "poisson": lambda p, q: jnp.exp(p) * (p - q) - jnp.exp(p) + jnp.exp(q),
    "negative_binomial": lambda p, q: (
        jnp.exp(p) * (p - q)
        + (2.5 + jnp.exp(p)) * (jnp.log(2.5 + jnp.exp(q)) - jnp.log(2.5 + jnp.exp(p)))
    ),
}


def test_root_is_that_of_the_closed_form_kl(case):
    if case.name not in CLOSED_FORMS:
        pytest.skip("its divergence has no closed form; quadrature above")
    divergence = CLOSED_FORMS[case.name]
    outputs = jnp.asarray(case.outputs)
    hessian = jax.jit(jax.vmap(jax.hessian(divergence, 1)))
    expected = np.asarray(hessian(outputs, outputs))
    fisher = fisher_of_root(case.likelihood, outputs)
    np.testing.assert_allclose(
        fisher, expected.reshape(fisher.shape), rtol=1e-10, atol=1e-13
    )


def test_root_is_linear_in_its_probes(case):
    outputs = jnp.asarray(case.outputs)
    rng = np.random.default_rng(1)
    first, second = rng.normal(size=(2, *case.likelihood.probe_shape(outputs.shape)))
    root = jax.jit(case.likelihood.root)
    np.testing.assert_allclose(
        root(outputs, 2.0 * first - 3.0 * second),
        2.0 * root(outputs, first) - 3.0 * root(outputs, second),
        rtol=1e-12,
        atol=1e-12,
    )


def test_root_of_one_example_ignores_the_others(case):
    outputs = jnp.asarray(case.outputs)
    probes = np.ones(case.likelihood.probe_shape(outputs.shape))
    root = jax.jit(case.likelihood.root)
    together = root(outputs, probes)
    alone = [
        root(outputs[i : i + 1], probes[i : i + 1])[0] for i in range(len(outputs))
    ]
    np.testing.assert_allclose(together, np.stack(alone), rtol=1e-13)


@pytest.mark.slow_cases
def test_root_under_jit_and_vmap(case):
    outputs = jnp.asarray(case.outputs)
    probes = jnp.ones(case.likelihood.probe_shape(outputs.shape))
    expected = case.likelihood.root(outputs, probes)
    for transform in (lambda function: function, jax.vmap):
        value = jax.jit(transform(case.likelihood.root))(outputs, probes)
        np.testing.assert_allclose(value, expected, rtol=1e-12, atol=1e-15)


def test_root_columns_are_the_root_of_unit_probes():
    likelihood = likelihoods.categorical()
    outputs = jnp.asarray(np.random.default_rng(2).normal(size=(4, 2, 3)))
    columns = likelihoods.root_columns(likelihood, outputs)
    assert columns.shape == (6, 4, 2, 3)
    probes = np.random.default_rng(3).normal(size=(4, 2, 3))
    np.testing.assert_allclose(
        jnp.einsum("rntc,nr->ntc", columns, probes.reshape(4, 6)),
        likelihood.root(outputs, probes),
        rtol=1e-12,
    )
    scalar = likelihoods.root_columns(likelihoods.poisson(), jnp.zeros(5))
    np.testing.assert_allclose(scalar, np.ones((1, 5)))


def test_root_does_not_see_a_shift_of_the_logits():
    outputs = jnp.asarray(np.random.default_rng(4).normal(size=(3, 5)))
    probes = np.random.default_rng(5).normal(size=(3, 5))
    root = likelihoods.categorical().root
    cotangents = root(outputs, probes)
    np.testing.assert_allclose(cotangents, root(outputs + 40.0, probes), atol=1e-12)
    np.testing.assert_allclose(jnp.sum(cotangents, -1), np.zeros(3), atol=1e-14)


def test_two_classes_are_a_bernoulli():
    logit = jnp.array([-3.0, 0.0, 1.3])
    pair = jnp.stack([jnp.zeros(3), logit], -1)
    one = fisher_of_root(likelihoods.bernoulli(), logit)[:, 0, 0]
    two = fisher_of_root(likelihoods.categorical(), pair)[:, 1, 1]
    np.testing.assert_allclose(one, two, rtol=1e-12)
