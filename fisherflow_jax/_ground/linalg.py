"""Linear algebra of stacks of matrices `(..., k, k)`.

What is built of many small operations is a compiled function: traced once a shape,
whoever asks for it, and one program where it is called by itself.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.lax import Precision
from jax.scipy.linalg import cho_solve, solve_triangular

from fisherflow_jax._ground import trees

# Up to this size the entries of a stack of matrices are written out, and up to the next
# a matrix is a few sums of products: a call of a library costs more than they do.
_WRITTEN_OUT = 3
_FEW = 12

product = functools.partial(jnp.einsum, precision=Precision.HIGHEST)


@jax.custom_batching.custom_vmap
def _turned(turn: jax.Array, matrix: jax.Array) -> jax.Array:
    half = jnp.sum(turn[:, :, None] * matrix[None], 1)
    return jnp.sum(half[:, :, None] * turn.T[None], 1)


@_turned.def_vmap
def _(size: int, batched: list, turn: jax.Array, matrix: jax.Array) -> tuple:
    return _turned_by_calls(turn, matrix), True


def _turned_by_calls(turn: jax.Array, matrix: jax.Array) -> jax.Array:
    # by the right, where one step is that of many covariances
    half = product("...ij,...kj->...ik", matrix, turn)
    return product("...ij,...kj->...ik", jnp.swapaxes(half, -1, -2), turn)


@jax.custom_jvp
def turned(turn: jax.Array, matrix: jax.Array) -> jax.Array:
    """`A P A^T`, P symmetric. Of one small matrix, as in a scan, without a call of a
    library, which takes four times as long on CPU."""
    few = turn.ndim == matrix.ndim == 2 and len(turn) <= _FEW
    return (_turned if few else _turned_by_calls)(turn, matrix)


@turned.defjvp
def _(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    (turn, matrix), (turning, moving) = primals, tangents
    across = product("...ij,...jk,...lk->...il", turning, matrix, turn)
    across = across + jnp.swapaxes(across, -1, -2)
    return turned(turn, matrix), across + _turned_by_calls(turn, moving)


def two_sum(x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The rounded sum and its exact rounding error (Knuth)."""
    total = x + y
    part = total - x
    return total, (x - (total - part)) + (y - part)


def moved(mean: Any, rest: Any, step: Any) -> tuple[Any, Any]:
    """`mean + rest + step`, trees: rounded, and what that lost; rest None: not kept."""
    if rest is None:
        return optax.tree.add(mean, step), None
    pairs = jax.tree.map(lambda x, r, s: two_sum(x, r + s), mean, rest, step)
    ends = jax.tree.structure((0, 0))
    return jax.tree.transpose(jax.tree.structure(mean), ends, pairs)


def diagonal(matrices: jax.Array) -> jax.Array:
    """The diagonals `(..., k)`."""
    # A strided slice, not a gather: its indices would be constants that XLA hoists out
    # of a scan one by one, after which equal factorisations no longer look equal to it.
    size = matrices.shape[-1]
    return matrices.reshape((*matrices.shape[:-2], size * size))[..., :: size + 1]


@jax.jit
def equilibrated(matrices: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`D^-1/2 M D^-1/2` with a unit diagonal, and `D^1/2 (..., k)`."""
    entries = diagonal(matrices)
    scales = jax.lax.select(entries > 0, jnp.sqrt(entries), jnp.ones_like(entries))
    return matrices / (scales[..., :, None] * scales[..., None, :]), scales


def _alone(function: Callable) -> Callable:
    """`function` of one matrix, that a vmap or a stack evaluates one by one on CPU.

    jaxlib 0.10 hands the matrices of a stack to the pool of threads that waits for
    them: as many stacks at once as threads, and none ever ends. This holds for all of
    LAPACK, which is called here alone. What stands beside a matrix are its columns.
    """
    one = jax.custom_batching.custom_vmap(function)

    @one.def_vmap
    def _(size: int, batched: list, matrix: jax.Array, *columns: jax.Array):
        if not batched[0]:  # the columns of all beside one another
            wide = jnp.moveaxis(columns[0], 0, 1)
            found = one(matrix, wide.reshape((wide.shape[0], -1)))
            return jnp.moveaxis(found.reshape(wide.shape), 1, 0), True
        axes = [0 if is_batched else None for is_batched in batched]

        def each(stack: jax.Array, *columns: jax.Array) -> Any:
            if axes[1:] == [None]:
                return jax.lax.map(lambda m: one(m, *columns), stack)
            return jax.lax.map(lambda both: one(*both), (stack, *columns))

        found = jax.lax.platform_dependent(
            matrix, *columns, cpu=each, default=jax.vmap(function, axes)
        )
        return found, jax.tree.map(lambda _: True, found)

    return one


def _by_cholesky(matrix: jax.Array, columns: jax.Array) -> jax.Array:
    # from the right, which on CPU takes a third of the time of a transposed factor
    factor = jnp.linalg.cholesky(matrix, symmetrize_input=False)
    half = jax.lax.linalg.triangular_solve(factor, columns, left_side=True, lower=True)
    return jax.lax.linalg.triangular_solve(factor, half.T, lower=True).T


def _by_elimination(matrix: jax.Array, columns: jax.Array) -> jax.Array:
    """The same by Gauss and Jordan, without pivots: half of the time of small ones."""
    size = len(matrix)
    places = jnp.arange(size, dtype=jnp.int32)[:, None]

    def eliminate(j: jax.Array, pair: jax.Array) -> jax.Array:
        row = jax.lax.dynamic_slice_in_dim(pair, j, 1)
        column = jax.lax.dynamic_slice_in_dim(pair, j, 1, 1)
        pivot = jax.lax.dynamic_slice_in_dim(row, j, 1, 1)
        row = row / jnp.where(pivot > 0, pivot, jnp.nan)  # else not definite
        return jnp.where(places == j, row, pair - column * row)

    pair = jnp.concatenate([matrix, columns], 1)
    return jax.lax.fori_loop(0, size, eliminate, pair)[:, size:]


# of which the upper triangle holds anything; LAPACK reads columns, and those of a
# symmetric matrix are its rows
_lower = _alone(lambda m: jax.lax.linalg.cholesky_p.bind(m.T))
_cholesky = _alone(lambda m: jnp.linalg.cholesky(m, symmetrize_input=False))
_eigh = _alone(lambda m: tuple(jnp.linalg.eigh(m)))
_orthonormal = _alone(lambda m: jnp.linalg.qr(m)[0])
_svd = _alone(lambda m: tuple(jnp.linalg.svd(m, full_matrices=False)))
_forward = _alone(functools.partial(solve_triangular, lower=True))
_backward = _alone(functools.partial(solve_triangular, lower=True, trans="T"))
_both = _alone(lambda m, columns: cho_solve((m, True), columns))
_definite = _alone(_by_cholesky)
_eliminated = _alone(_by_elimination)
_by_lu = _alone(jnp.linalg.solve)
_by_lu_transposed = _alone(lambda m, columns: jnp.linalg.solve(m.T, columns))


@jax.custom_jvp
def cholesky(matrices: jax.Array) -> jax.Array:
    """Lower Cholesky factors of symmetric matrices; NaN where one is not definite."""
    return _each(_cholesky, matrices).reshape(matrices.shape)


@cholesky.defjvp
def _(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    factors = cholesky(*primals)
    return factors, _factors_moved(factors, tangents[0])


def solve_lower(factors: jax.Array, columns: jax.Array) -> jax.Array:
    """`L^-1 B`, L lower triangular `(..., k, k)`, B `(..., k, r)`.

    What stands above the diagonal of L is not read.
    """
    return _divided("...ij,...jk->...ik", factors, columns, _forward, _backward)


def solve_lower_transposed(factors: jax.Array, columns: jax.Array) -> jax.Array:
    """`L^-T B`, as in `solve_lower`."""
    return _divided("...ji,...jk->...ik", factors, columns, _backward, _forward)


def cholesky_solve(factors: jax.Array, columns: jax.Array) -> jax.Array:
    """`(L L^T)^-1 B`, as in `solve_lower`."""
    ways = _both, _both
    return _divided("...ij,...kj,...kl->...il", factors, columns, *ways)


def divided(matrix: jax.Array, columns: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`M^-1 B`, and the log-determinant of M, positive definite; one number is one."""
    if matrix.shape == (1, 1):
        return columns / matrix, jnp.log(matrix[0, 0])
    factor = cholesky(matrix)
    return cholesky_solve(factor, columns), 2 * jnp.sum(jnp.log(diagonal(factor)))


def definite_solve(matrices: jax.Array, columns: jax.Array) -> jax.Array:
    """`M^-1 B` of positive definite matrices; NaN where one is not."""
    size = matrices.shape[-1]
    units, scales = equilibrated(matrices)
    scales = scales[..., None]
    columns = columns / scales
    if size <= _WRITTEN_OUT:
        return _by_entries(units, columns) / scales
    one = _eliminated if size <= _FEW else _definite

    def solved(_: Any, b: jax.Array) -> jax.Array:
        return _each(one, units, b).reshape(b.shape)

    def times(x: jax.Array) -> jax.Array:
        return product("...ij,...jk->...ik", units, x)

    found = jax.lax.custom_linear_solve(times, columns, solved, symmetric=True)
    return found / scales


def _by_entries(matrices: jax.Array, columns: jax.Array) -> jax.Array:
    """The same by Cholesky's formulas, entry by entry of a stack."""
    size = matrices.shape[-1]
    factor: dict[tuple[int, int], jax.Array] = {}
    for j in range(size):
        for i in range(j, size):
            entry = matrices[..., i, j]
            entry -= sum(factor[i, k] * factor[j, k] for k in range(j))
            factor[i, j] = jnp.sqrt(entry) if i == j else entry / factor[j, j]
    rows = [columns[..., i, :] for i in range(size)]
    for i in range(size):
        rows[i] -= sum(factor[i, k][..., None] * rows[k] for k in range(i))
        rows[i] /= factor[i, i][..., None]
    for i in reversed(range(size)):
        rows[i] -= sum(factor[k, i][..., None] * rows[k] for k in range(i + 1, size))
        rows[i] /= factor[i, i][..., None]
    return jnp.stack(rows, -2)


def solve(matrices: jax.Array, columns: jax.Array) -> jax.Array:
    """`M^-1 B` by LU factors, M `(..., k, k)`, B `(..., k, r)`."""
    ways = _by_lu, _by_lu_transposed
    return _divided("...ij,...jk->...ik", matrices, columns, *ways)


def _divided(
    spec: str, matrices: jax.Array, columns: jax.Array, one: Callable, back: Callable
) -> jax.Array:
    """X with `spec(matrices, X)` the columns, by `one` matrix at a time."""
    read = matrices if one is _by_lu else jnp.tril(matrices)

    def by(one: Callable) -> Callable:
        return lambda _, b: _each(one, matrices, b).reshape(b.shape)

    def times(x: jax.Array) -> jax.Array:
        return product(spec, *[read] * spec.count(","), x)

    return jax.lax.custom_linear_solve(times, columns, by(one), by(back))


def inverse_of_lower(factors: jax.Array) -> jax.Array:
    """The inverses of lower triangular matrices."""
    identity = jnp.eye(factors.shape[-1], dtype=factors.dtype)
    return solve_lower(factors, jnp.broadcast_to(identity, factors.shape))


def _factors_moved(factors: jax.Array, tangents: jax.Array) -> jax.Array:
    """The derivative of Cholesky factors along one of their matrices."""
    inner = solve_lower(factors, tangents)
    inner = solve_lower(factors, jnp.swapaxes(inner, -1, -2))
    half = jnp.tril(inner) - jnp.triu(jnp.tril(inner)) / 2
    return product("...ij,...jk->...ik", factors, half)


@jax.jit
def steady_cholesky(matrices: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Factors of symmetric matrices of unit diagonal, and what was added to that.

    The upper triangle of a factor is not zero: whoever solves does not read it.

    The least of 0, eps, 2 eps, 4 eps, ... by which a factor exists, `(...)`, up to the
    root of eps: NaN where a matrix is further from positive definite than by rounding.
    """
    return _steady_cholesky(matrices)


@jax.custom_jvp
def _steady_cholesky(matrices: jax.Array) -> tuple[jax.Array, jax.Array]:
    eps = float(jnp.finfo(matrices.dtype).eps)
    identity = jnp.eye(matrices.shape[-1], dtype=matrices.dtype)
    identity = jnp.broadcast_to(identity, matrices.shape)

    def fails(state: tuple[jax.Array, jax.Array]) -> jax.Array:
        columns, jitter = state
        return ~jnp.isfinite(columns[..., -1]) & (2 * jitter <= eps**0.5)

    # flat, as LAPACK writes it: a matrix that a loop carries is turned before and after
    def factorised(matrices: jax.Array) -> jax.Array:
        factors = _each(_lower, matrices).reshape(matrices.shape)
        return jnp.swapaxes(factors, -1, -2).reshape((*matrices.shape[:-2], -1))

    def more(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        jitter = jnp.where(fails(state), jnp.maximum(2 * state[1], eps), state[1])
        return factorised(matrices + jitter[..., None, None] * identity), jitter

    start = factorised(matrices), jnp.zeros(matrices.shape[:-2], matrices.dtype)
    columns, jitter = jax.lax.while_loop(lambda s: jnp.any(fails(s)), more, start)
    return jnp.swapaxes(columns.reshape(matrices.shape), -1, -2), jitter


@_steady_cholesky.defjvp
def _(primals: tuple, tangents: tuple) -> tuple[tuple, tuple]:
    factors, jitter = _steady_cholesky(*primals)
    return (factors, jitter), (
        _factors_moved(jnp.tril(factors), tangents[0]),
        0 * jitter,
    )


@jax.jit
def inverse_factor(matrices: jax.Array) -> jax.Array:
    """`L^-1`, L the lower Cholesky factor; NaN where a matrix is not definite.

    Of many small matrices at once: elementwise operations alone, k times.
    """
    k, dtype = matrices.shape[-1], matrices.dtype
    below = jnp.tril(jnp.ones((k, k), dtype), -1)
    identity = jnp.broadcast_to(jnp.eye(k, dtype=dtype), matrices.shape)

    def eliminate(j: jax.Array, pair: jax.Array) -> jax.Array:
        entry = functools.partial(jax.lax.dynamic_index_in_dim, keepdims=False)
        row = entry(pair, j, pair.ndim - 2)
        root = jnp.sqrt(entry(row, j, row.ndim - 1))[..., None]
        row, column = row / root, entry(pair, j, pair.ndim - 1) / root
        column = column * jnp.broadcast_to(entry(below, j, 1), column.shape)
        pair = pair - column[..., :, None] * row[..., None, :]
        row = jnp.expand_dims(row, -2)
        return jax.lax.dynamic_update_slice_in_dim(pair, row, j, pair.ndim - 2)

    pair = jnp.concatenate([matrices, identity], -1)
    return jax.lax.fori_loop(0, k, eliminate, pair)[..., k:]


def semidefinite_root(matrices: jax.Array) -> jax.Array:
    """`L` lower triangular with `L L^T` the positive semi-definite matrices.

    A column whose pivot is rounding alone is zero, so that singular matrices have one.
    Of many small matrices at once: elementwise operations alone, k times.
    """
    k, dtype = matrices.shape[-1], matrices.dtype
    rows = jnp.arange(k, dtype=jnp.int32)
    least = 10 * k * float(jnp.finfo(dtype).eps) * diagonal(matrices)

    def eliminate(rest: jax.Array, j: jax.Array) -> tuple[jax.Array, jax.Array]:
        entry = functools.partial(jax.lax.dynamic_index_in_dim, keepdims=False)
        column = entry(rest, j, rest.ndim - 1)
        pivot = entry(column, j, column.ndim - 1)
        none = pivot <= entry(least, j, least.ndim - 1)  # a NaN is some
        root = jnp.sqrt(jnp.where(none, jnp.ones_like(pivot), pivot))[..., None]
        used = jnp.broadcast_to(rows >= j, column.shape) & ~none[..., None]
        column = jnp.where(used, column / root, jnp.zeros_like(column))
        return rest - column[..., :, None] * column[..., None, :], column

    columns = jax.lax.scan(eliminate, matrices, rows)[1]
    return jnp.moveaxis(columns, 0, -1)


@jax.custom_jvp
def eigh(matrices: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Eigenvalues `(..., k)`, ascending, and columns `(..., k, k)`.

    Columns of equal eigenvalues have no derivative: NaN.
    """
    values, columns = _each(_eigh, matrices)
    return values.reshape(matrices.shape[:-1]), columns.reshape(matrices.shape)


@eigh.defjvp
def _(primals: tuple, tangents: tuple) -> tuple[tuple, tuple]:
    values, columns = eigh(*primals)
    moved = (tangents[0] + jnp.swapaxes(tangents[0], -1, -2)) / 2
    inner = product("...ji,...jk,...kl->...il", columns, moved, columns)
    identity = jnp.broadcast_to(jnp.eye(values.shape[-1], dtype=bool), inner.shape)
    gaps = values[..., None, :] - values[..., :, None]
    turn = jnp.where(identity, 0, inner / jnp.where(identity, 1, gaps))
    turned = product("...ij,...jk->...ik", columns, turn)
    return (values, columns), (diagonal(inner), turned)


@jax.custom_jvp
def svd(matrix: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """U, singular values and V^T of one matrix, no more of them than its short side."""
    return _svd(matrix)


@svd.defjvp
def _(primals: tuple, tangents: tuple) -> tuple[tuple, tuple]:
    plain = functools.partial(jnp.linalg.svd, full_matrices=False)
    return svd(*primals), tuple(jax.jvp(plain, primals, tangents)[1])


def orthonormal(matrices: jax.Array) -> jax.Array:
    """The orthonormal columns Q of `Q R`, for any rank: of `(..., m, k)`, min(m, k)."""
    *lead, rows, columns = matrices.shape
    found = _each(_orthonormal, matrices)
    return found.reshape((*lead, rows, min(rows, columns)))


def _each(function: Callable, *arrays: jax.Array) -> Any:
    """`function` of matrices, or of stacks of them flattened to `(number, ., .)`."""
    count, sizes = math.prod(arrays[0].shape[:-2]), [x.shape[-2:] for x in arrays]
    if count == 1:
        return function(*map(jnp.reshape, arrays, sizes))
    stacks = [x.reshape((count, *n)) for x, n in zip(arrays, sizes, strict=True)]
    return jax.vmap(function)(*stacks)


def least_spare(mean: Any) -> float:
    """Degrees of freedom up to which there are none beside the parameters.

    No more parameters can be effective than there are observations, so that too few of
    these leave a little for the prior and rounding of either sign.
    """
    rounding = float(jnp.finfo(trees.float_dtype(mean)).eps) ** 0.5
    return min(max(trees.size(mean) * rounding, 1e-3), 0.5)
