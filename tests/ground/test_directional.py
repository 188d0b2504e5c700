"""Derivatives along directions, against whole arrays of derivatives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fisherflow_jax._ground.directional import derivative

RNG = np.random.default_rng(0)
X = RNG.normal(size=(20, 3))
Y = (RNG.random(20) < 0.5).astype(float)
LABELS = RNG.integers(0, 3, 20)


def logistic(theta):
    return jnp.sum(Y * (X @ theta) - jnp.logaddexp(0.0, X @ theta))


def softmax(theta):
    logits = jax.nn.log_softmax(X @ theta.reshape((3, 3)))
    return jnp.sum(logits[jnp.arange(20), LABELS])


def network(theta):
    hidden = jnp.tanh(X @ theta[:6].reshape((3, 2)))
    return -jnp.sum(jnp.square(hidden @ theta[6:] - Y))


@pytest.mark.slow_cases
@pytest.mark.parametrize(
    ("function", "size"), [(logistic, 3), (softmax, 9), (network, 8)]
)
def test_thirds_are_contractions_of_the_array_of_thirds(function, size):
    at, *directions = RNG.normal(size=(4, size))
    whole = jax.jit(jax.jacfwd(jax.jacfwd(jax.jacfwd(function))))(at)
    expected = np.einsum("ijk,i,j,k", whole, *directions)
    found = jax.jit(lambda *given: derivative(function, *given))(at, *directions)
    scale = np.linalg.norm(whole) * np.prod(np.linalg.norm(directions, axis=1))
    assert abs(float(found - expected)) < 1e-10 * scale
    assert abs(expected) > 1e-3 * scale


def test_a_tree_of_parameters_and_any_number_of_directions():
    at, along = {"a": jnp.array(0.3), "b": jnp.array([0.2])}, {"a": 1.0, "b": [2.0]}
    along = jax.tree.map(jnp.asarray, along, is_leaf=lambda x: not isinstance(x, dict))

    def function(p):
        return jnp.exp(p["a"] + jnp.sum(p["b"]))

    for order in range(4):
        found = derivative(function, at, *[along] * order)
        np.testing.assert_allclose(found, 3.0**order * np.exp(0.5), rtol=1e-6)
