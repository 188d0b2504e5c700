"""Stacks of matrices: one by one on CPU, and a stack of one takes no loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fisherflow_jax._ground import linalg


def definite(*shape):
    roots = np.random.default_rng(0).normal(size=(*shape, 4, 4)).astype(np.float32)
    return jnp.asarray(roots @ np.swapaxes(roots, -1, -2) + np.eye(4, dtype="f"))


@pytest.mark.parametrize("shape", [(), (1,), (3,), (1, 1), (2, 3), (0,)])
def test_factors_are_those_of_each_matrix(shape):
    stack = definite(*shape)
    factors, (values, columns) = linalg.cholesky(stack), linalg.eigh(stack)
    assert factors.shape == columns.shape == stack.shape
    assert values.shape == stack.shape[:-1]
    for place in np.ndindex(shape):
        alone = jnp.linalg.cholesky(stack[place], symmetrize_input=False)
        np.testing.assert_array_equal(factors[place], alone)
        for ours, theirs in zip(
            (values[place], columns[place]), jnp.linalg.eigh(stack[place]), strict=True
        ):
            np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("function", [linalg.cholesky, linalg.eigh])
def test_a_stack_of_one_takes_no_loop(function):
    def loops(shape):
        text = str(jax.make_jaxpr(function)(definite(*shape)))
        return "scan" in text or "platform_index" in text

    assert not loops((1,))
    assert loops((2,))


@pytest.mark.parametrize("function", [linalg.cholesky, linalg.eigh])
def test_a_vmap_makes_no_stack_of_single_matrices(function):
    """Nor does one within another, and derivatives are those of jax's own."""
    stack, twice = definite(3), definite(2, 3)
    text = str(jax.make_jaxpr(jax.vmap(function))(stack))
    assert "scan" in text and "platform_index" in text
    found, nested = jax.vmap(function)(stack), jax.jit(jax.vmap(jax.vmap(function)))
    jax.tree.map(np.testing.assert_array_equal, found, function(stack))
    jax.tree.map(np.testing.assert_array_equal, nested(twice), function(twice))
    own = getattr(jnp.linalg, function.__name__)
    weights = jnp.asarray(np.random.default_rng(1).normal(size=(3, 4, 4)))

    def total(function, matrices):
        parts = jax.tree.leaves(jax.vmap(function)(matrices + 0.0 * weights))
        return sum(jnp.sum(jnp.sin(part)) for part in parts)

    wide = stack.astype(weights.dtype)
    slopes = [jax.grad(total, argnums=1)(f, wide) for f in (function, own)]
    slopes = [slope + jnp.swapaxes(slope, -1, -2) for slope in slopes]
    np.testing.assert_allclose(*slopes, rtol=1e-9)


def test_products_are_not_rounded_to_fewer_digits():
    product = jax.make_jaxpr(lambda x: linalg.product("ij,jk", x, x))(definite())
    assert "HIGHEST" in str(product)


def test_inverses_of_a_stack_are_made_one_by_one():
    """LAPACK of a stack waits for the threads it runs on: two at once never end."""
    from fisherflow_jax.structures._algebra import dense

    root = np.random.default_rng(0).normal(size=(3, 5, 5)) + 3 * np.eye(5)
    stack = root @ np.swapaxes(root, 1, 2)
    program = jax.jit(dense.inverse_matrix).lower(jnp.asarray(stack)).compile()
    np.testing.assert_allclose(program(stack), np.linalg.inv(stack), rtol=1e-10)
    if jax.default_backend() == "cpu":
        calls = [x for x in program.as_text().splitlines() if "lapack_" in x]
        assert calls and not any("[3,5,5]" in call for call in calls)
