"""Stacks of matrices: one by one on CPU, and a stack of one takes no loop."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fisherflow_jax._ground import linalg
from program_size import stacks_in_lapack


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


@pytest.mark.slow_cases
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


def symmetric(matrix):
    return (matrix + matrix.T) / 2 + 8 * jnp.eye(4)


ALONE = {
    "cholesky": (
        lambda m: linalg.cholesky(symmetric(m)),
        lambda m: jnp.linalg.cholesky(symmetric(m)),
    ),
    "steady_cholesky": (
        lambda m: jnp.tril(linalg.steady_cholesky(symmetric(m))[0]),
        lambda m: jnp.linalg.cholesky(symmetric(m)),
    ),
    "eigh": (
        lambda m: linalg.eigh(symmetric(m))[0],
        lambda m: jnp.linalg.eigvalsh(symmetric(m)),
    ),
    "svd": (lambda m: linalg.svd(m[:2])[1], lambda m: jnp.linalg.svd(m[:2], False)[1]),
    "orthonormal": (linalg.orthonormal, lambda m: jnp.linalg.qr(m)[0]),
    "inverse_of_lower": (
        lambda m: linalg.inverse_of_lower(m),
        lambda m: jnp.linalg.inv(jnp.tril(m)),
    ),
    "solve_lower": (
        lambda m: linalg.solve_lower(m, m[:, :2]),
        lambda m: jnp.linalg.solve(jnp.tril(m), m[:, :2]),
    ),
    "solve_lower_transposed": (
        lambda m: linalg.solve_lower_transposed(m, m[:, :2]),
        lambda m: jnp.linalg.solve(jnp.tril(m).T, m[:, :2]),
    ),
    "cholesky_solve": (
        lambda m: linalg.cholesky_solve(m, m[:, :2]),
        lambda m: jnp.linalg.solve(jnp.tril(m) @ jnp.tril(m).T, m[:, :2]),
    ),
    "solve": (
        lambda m: linalg.solve(m, jnp.cos(m)),
        lambda m: jnp.linalg.solve(m, jnp.cos(m)),
    ),
}


@pytest.mark.slow_cases
@pytest.mark.parametrize("name", ALONE)
def test_lapack_is_given_one_matrix_at_a_time(name):
    """Of a stack it waits for the threads that it runs on: two at once never end."""
    ours, plain = ALONE[name]
    stack = definite(2, 3).astype("d") + jnp.arange(4.0)

    def twice(function):
        def total(m):
            return jnp.sum(jnp.sin(function(m)))

        # a basis of columns has no derivative, that of an svd is jax's own
        also = {"orthonormal": [], "svd": []}.get(name, [jax.grad(total)])
        return jax.vmap(jax.vmap(lambda m: [f(m) for f in (function, *also)]))

    program = jax.jit(twice(ours)).lower(stack).compile()
    same = functools.partial(np.testing.assert_allclose, rtol=1e-8, atol=1e-10)
    jax.tree.map(same, program(stack), twice(plain)(stack))
    assert not stacks_in_lapack(program)
    assert stacks_in_lapack(jax.jit(twice(plain)).lower(stack).compile())


def test_the_derivative_of_an_svd_is_that_of_jax():
    matrix = definite().astype("d")[:3]

    def total(function, m):
        left, values, right = function(m)
        return jnp.sum(jnp.abs(left)) + jnp.sum(values * jnp.abs(right[:, 0]))

    plain = functools.partial(jnp.linalg.svd, full_matrices=False)
    slopes = [jax.grad(total, 1)(function, matrix) for function in (linalg.svd, plain)]
    np.testing.assert_allclose(*slopes, rtol=1e-10)


def test_columns_beside_one_matrix_are_solved_at_once():
    """Many vectors, one factor: no loop."""
    factor = linalg.cholesky(definite())
    columns = jnp.asarray(np.random.default_rng(1).normal(size=(5, 4, 1)), "f")
    solve = jax.vmap(linalg.cholesky_solve, (None, 0))
    assert "scan" not in str(jax.make_jaxpr(solve)(factor, columns))
    expected = np.linalg.solve(np.asarray(definite()), columns)
    np.testing.assert_allclose(solve(factor, columns), expected, rtol=1e-5)


SIDES = [10, 2, 3, 4, 12, 13]


def moved(side, *shape, seed=0):
    """Steps, and covariances: definite, their variances far apart."""
    rng = np.random.default_rng(seed)
    turns, roots = rng.normal(size=(2, *shape, side, side))
    spread = np.exp(rng.normal(size=side))
    matrices = spread[:, None] * (roots @ np.swapaxes(roots, -1, -2)) * spread
    return turns, matrices + np.eye(side)


@pytest.mark.slow_cases
@pytest.mark.parametrize("side", SIDES)
def test_a_covariance_is_turned_alone_and_within_stacks(side):
    """One small matrix by sums, stacks by calls, whichever of the two is a stack."""
    turns, matrices = moved(side, 2, 3)
    expected = turns @ matrices @ np.swapaxes(turns, -1, -2)
    same = functools.partial(np.testing.assert_allclose, rtol=1e-11, atol=1e-11)
    same(jax.jit(linalg.turned)(turns, matrices), expected)
    same(linalg.turned(turns[0, 0], matrices[0, 0]), expected[0, 0])
    same(jax.vmap(jax.vmap(linalg.turned))(turns, matrices), expected)
    one, each = linalg.turned, matrices[:, 0]
    step = turns[0, 0]
    same(jax.vmap(one, (None, 0))(step, each), step @ each @ step.T)
    steps, alone = turns[:, 0], matrices[0, 0]
    across = steps @ alone @ np.swapaxes(steps, -1, -2)
    same(jax.vmap(one, (0, None))(steps, alone), across)
    single = one(jnp.asarray(step, "f"), jnp.asarray(alone, "f"))
    assert single.dtype == jnp.float32
    # of the entries' own sizes: a difference within one is rounded to them
    size = np.abs(step) @ np.abs(alone) @ np.abs(step).T
    assert np.max(np.abs(single - expected[0, 0]) / size) < 1e-5


@pytest.mark.slow_cases
@pytest.mark.parametrize("side", SIDES)
def test_a_definite_system_is_solved_alone_and_within_stacks(side):
    columns, matrices = moved(side, 2, 3, seed=1)
    expected = np.linalg.solve(matrices, columns)
    same = functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-9)
    same(jax.jit(linalg.definite_solve)(matrices, columns), expected)
    same(linalg.definite_solve(matrices[0, 0], columns[0, 0]), expected[0, 0])
    same(jax.vmap(jax.vmap(linalg.definite_solve))(matrices, columns), expected)
    wide = jax.vmap(linalg.definite_solve, (None, 0))(matrices[0, 0], columns[0])
    same(wide, np.linalg.solve(matrices[0, 0][None], columns[0]))
    # one that is not definite costs no other
    matrices[0, 1, :, -1] = matrices[0, 1, -1, :] = 0
    matrices[0, 1, -1, -1] = -1
    found = linalg.definite_solve(matrices, columns)
    assert np.all(np.isnan(found[0, 1, -1]))
    np.testing.assert_array_equal(np.isnan(found).any((-1, -2)).sum(), 1)
    same(found[1], expected[1])


@pytest.mark.slow_cases
@pytest.mark.parametrize("side", [10, 3, 13])
def test_derivatives_of_turns_and_definite_solves(side):
    """Along symmetric changes, forward and back, alone and in a scan over a stack."""
    turns, matrices = moved(side, 2, seed=2)
    turning, moving = moved(side, 2, seed=3)
    both = (turns, matrices), (turning, moving)

    def plain_turned(a, p):
        return a @ p @ jnp.swapaxes(a, -1, -2)

    def plain_solve(a, p):
        return jnp.linalg.solve(p, a)

    def own_solve(a, p):
        return linalg.definite_solve(p, a)

    def in_scan(function):
        def run(*stacks):
            return jax.lax.scan(lambda _, x: (_, function(*x)), 0, stacks)[1]

        return run

    def slopes(function):
        weights = jnp.cos(jnp.arange(side))
        total = lambda *args: jnp.sum(weights * jnp.sin(function(*args)))  # noqa: E731
        back = jax.grad(total, (0, 1))(*both[0])
        return back[0], back[1] + jnp.swapaxes(back[1], -1, -2)

    same = functools.partial(np.testing.assert_allclose, rtol=1e-7, atol=1e-8)
    for own, plain in ((linalg.turned, plain_turned), (own_solve, plain_solve)):
        expected = jax.jvp(plain, *both)
        for function in (own, jax.vmap(own), in_scan(own)):
            jax.tree.map(same, jax.jvp(function, *both), expected)
            jax.tree.map(same, slopes(function), slopes(plain))
