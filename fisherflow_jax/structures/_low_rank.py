"""A diagonal plus a few directions."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fisherflow_jax import information as ops
from fisherflow_jax._ground import choices, linalg, trees
from fisherflow_jax._ground.checks import holds, is_traced, whole
from fisherflow_jax.structures._diagonal import Diagonal
from fisherflow_jax.structures._full import Full, from_matrix
from fisherflow_jax.structures._scalar import Scalar
from fisherflow_jax.structures._structure import Structure

PyTree = Any


class LowRank(NamedTuple):
    """Information `diag(base) + factors^T factors`.

    Kept by `ff.structures.low_rank`.
    """

    base: PyTree  # like the parameters
    factors: PyTree  # leaf (rank, *leaf.shape)


@choices.choice
def low_rank(rank: int) -> Structure:
    r"""Keeps `rank` directions and the diagonal of all the rest.

    A sum is recompressed: the `rank` leading singular directions of the stacked
    factors are kept whole, and of what is left the diagonal. The diagonal (so the
    trace) of the information is therefore exact, the information stays positive
    definite after any number of updates, and correlations outside the kept directions
    are lost.

    Args:
      rank: the number of directions, at least 1.

    Returns:
      A `Structure` whose information is a `LowRank`. Memory d (rank + 1); a solve costs
      d rank^2, an update d (k + rank)^2 for k pulled-back vectors at a time.

    Raises:
      ValueError: if `rank` is not a positive whole number.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> stack = jnp.array([[3.0, 0.0, 0.0], [0.0, 1.0, 1.0]])
      >>> information = ff.structures.low_rank(1).reduce(stack)
      >>> print(ff.information.to_dense(information).round(3))
      [[9. 0. 0.]
       [0. 1. 0.]
       [0. 0. 1.]]

    References:
      Chang, Duran-Martin, Shestopaloff, Jones, Murphy, "Low-rank extended Kalman
      filtering for online learning of neural networks from streaming data", 2023.
    """
    whole(rank, "rank")

    def isotropic(params: PyTree, value: jax.typing.ArrayLike) -> LowRank:
        dtype = trees.float_dtype(params)
        return LowRank(
            jax.tree.map(lambda x: jnp.full(x.shape, value, dtype), params),
            jax.tree.map(lambda x: jnp.zeros((rank, *x.shape), dtype), params),
        )

    def reduce(stack: PyTree) -> LowRank:
        zero = isotropic(jax.tree.map(lambda x: x[0], stack), 0.0)
        return _compress(zero.base, trees.widen(stack), rank)

    return Structure(f"low_rank({rank})", reduce, isotropic, gathers=True)


def _compress(base: PyTree, stack: PyTree, rank: int) -> LowRank:
    """`diag(base) + sum_k v_k v_k^T` with at most `rank` directions."""
    flat = trees.ravel(stack, 1)
    if flat.shape[0] > rank:
        _, values, directions = linalg.svd(flat)
        rows = values[:, None] * directions
        flat, rest = rows[:rank], rows[rank:]
        spread = trees.unravel(jnp.sum(jnp.square(rest), 0), base)
        base = jax.tree.map(jnp.add, base, spread)
    # fewer vectors, or fewer parameters, than directions; without leaves one axis alone
    flat = jnp.pad(flat, [(0, rank - len(flat))] + [(0, 0)] * (flat.ndim - 1))
    return LowRank(base, trees.unravel(flat, base))


def _rank(information: LowRank) -> int:
    return next((x.shape[0] for x in jax.tree.leaves(information.factors)), 0)


def _whole(information: LowRank) -> Full | None:
    """The matrix itself where it is no larger than the factors, else None.

    A direct factorisation is then cheaper, and exact: the formulas below subtract two
    numbers that agree but for the base's share.
    """
    if _rank(information) < trees.size(information.base):
        return None
    return from_matrix(ops.to_dense(information), information.base)


def _flat(information: LowRank) -> tuple[jax.Array, jax.Array]:
    return trees.ravel(information.base), trees.ravel(information.factors, 1)


def _whitened(information: LowRank, damping: Any = 0.0):
    """Base `b (d,)`, factors `W = U b^-1/2 (r, d)`, Cholesky of `1 + W W^T`."""
    base, factors = _flat(information)
    base = base + damping
    whitened = factors / jnp.sqrt(base)[None, :]
    gram = jnp.eye(whitened.shape[0], dtype=base.dtype) + whitened @ whitened.T
    return base, whitened, linalg.cholesky(gram)


@ops.matvec.register
def _(information: LowRank, vector: PyTree) -> PyTree:
    base, factors = _flat(information)
    flat = trees.ravel(vector).astype(base.dtype)
    product = base * flat + factors.T @ (factors @ flat)
    return trees.unravel(product, information.base)


@ops.solver.register
def _(information: LowRank, damping: jax.typing.ArrayLike = 0.0):
    whole = _whole(information)
    if whole is not None:
        return ops.solver(whole, damping)
    base, whitened, factor = _whitened(information, damping)
    root = jnp.sqrt(base)

    def solve(vector: PyTree) -> PyTree:
        flat = trees.ravel(vector).astype(base.dtype) / root
        inner = linalg.cholesky_solve(factor, (whitened @ flat)[:, None])[:, 0]
        return trees.unravel((flat - whitened.T @ inner) / root, information.base)

    return solve


@ops.whitener.register
def _(
    information: LowRank,
    damping: jax.typing.ArrayLike = 0.0,
    like: PyTree | None = None,
) -> ops.Whitener:
    whole = _whole(information)
    if whole is not None:
        return ops.whitener(whole, damping)
    base, factors = _flat(information)
    scales = jnp.sqrt(base + damping)
    whitened = factors / scales[None]
    # (1 + W^T W)^-1/2 through the small Gram matrix, stable at zero eigenvalues
    values, basis = linalg.eigh(linalg.product("ri,si->rs", whitened, whitened))
    root = jnp.sqrt(1 + jnp.maximum(values, 0.0))
    weights = -1 / (root * (1 + root))

    def turn(flat: jax.Array) -> jax.Array:
        """A vector `(d,)` times the symmetric root."""
        inner = linalg.product("i,ri->r", flat, whitened) @ basis
        back = (inner * weights) @ basis.T
        return flat + linalg.product("r,ri->i", back, whitened)

    def laid_out(vector: PyTree) -> jax.Array:
        return trees.ravel(vector).astype(base.dtype)

    return ops.Whitener(
        jax.vmap(lambda vector: turn(laid_out(vector) / scales)),
        lambda draw: trees.unravel(turn(draw) / scales, information.base),
        laid_out,
    )


@ops.eigenvalues.register
def _(information: LowRank, like: PyTree | None = None) -> list[jax.Array]:
    base, factors = _flat(information)
    rank, count = factors.shape
    alike = not is_traced(base) and holds(base == base[0])
    if not alike or rank > ops.LARGEST_DENSE:
        return ops.eigenvalues.dispatch(object)(information, like)
    # those of the small Gram matrix, or, of few parameters, as many as there are
    gram = linalg.eigh(factors @ factors.T)[0][::-1][:count]
    rest = jnp.zeros((count - gram.size,), gram.dtype)
    return [base[0] + jnp.concatenate([jnp.maximum(gram, 0), rest])]


@ops.restrict.register
def _(information: LowRank, shown: PyTree, like: PyTree | None = None) -> LowRank:
    return LowRank(
        trees.punch(information.base, shown), trees.punch(information.factors, shown)
    )


@ops.embed.register
def _(
    information: LowRank,
    entries: PyTree,
    like: PyTree | None = None,
    template: Any | None = None,
) -> LowRank:
    rank, dtype = _rank(information), trees.float_dtype(information)
    none = jax.tree.map(lambda x: jnp.zeros((rank, *x.shape), dtype), entries)
    base = ops.embed(Diagonal(information.base), entries).entries
    return LowRank(base, trees.laid_over(information.factors, none))


@ops.logdet.register
def _(information: LowRank, like: PyTree | None = None) -> jax.Array:
    base, _, factor = _whitened(information)
    return jnp.sum(jnp.log(base)) + 2 * jnp.sum(jnp.log(jnp.diagonal(factor)))


@ops.trace.register
def _(information: LowRank, like: PyTree | None = None) -> jax.Array:
    base, factors = _flat(information)
    return jnp.sum(base) + jnp.sum(jnp.square(factors))


@ops.diagonal.register
def _(information: LowRank, like: PyTree | None = None) -> PyTree:
    base, factors = _flat(information)
    return trees.unravel(base + jnp.sum(jnp.square(factors), 0), information.base)


@ops.inverse_diagonal.register
def _(information: LowRank, like: PyTree | None = None) -> PyTree:
    whole = _whole(information)
    if whole is not None:
        return ops.inverse_diagonal(whole)
    base, whitened, factor = _whitened(information)
    half = linalg.solve_lower(factor, whitened)
    # the share of the base, which rounding may bring to zero or below
    share = 1 - jnp.sum(jnp.square(half), 0)
    flat = jnp.maximum(share, jnp.finfo(base.dtype).eps) / base
    return trees.unravel(flat, information.base)


@ops.to_dense.register
def _(information: LowRank, like: PyTree | None = None) -> jax.Array:
    base, factors = _flat(information)
    return jnp.diag(base) + factors.T @ factors


@ops.add_to.register
def _(left: LowRank, right: Any) -> Any:
    if isinstance(right, LowRank):
        base = jax.tree.map(jnp.add, left.base, right.base)
        factors = left.factors, right.factors
        stack = jax.tree.map(lambda *x: jnp.concatenate(x), *factors)
        return _compress(base, stack, _rank(left))
    if isinstance(right, (Scalar, Diagonal)):
        diagonal = ops.diagonal(right, left.base)
        return left._replace(base=jax.tree.map(jnp.add, left.base, diagonal))
    return NotImplemented


@ops.scale.register
def _(information: LowRank, factor: jax.typing.ArrayLike) -> LowRank:
    factor = jnp.asarray(factor, trees.float_dtype(information))
    root = jnp.sqrt(factor)
    return LowRank(
        jax.tree.map(lambda x: x * factor, information.base),
        jax.tree.map(lambda x: x * root, information.factors),
    )


@ops.total.register
def _(stacked: LowRank, weights: jax.Array) -> LowRank:
    # all directions are kept: a memory solves with the whole sum, and what it stores is
    # brought back to the rank by conform
    root = jnp.sqrt(weights)

    def flatten(x: jax.Array) -> jax.Array:
        weighted = x * root.reshape((-1,) + (1,) * (x.ndim - 1))
        return weighted.reshape((-1, *x.shape[2:]))

    base = jax.tree.map(lambda x: jnp.tensordot(weights, x, 1), stacked.base)
    return LowRank(base, jax.tree.map(flatten, stacked.factors))


@ops.conform.register
def _(template: LowRank, information: Any) -> Any:
    if not isinstance(information, LowRank):  # a richer one, which holds the sum
        return information
    return _compress(information.base, information.factors, _rank(template))


@ops.fuse.register
def _(start: LowRank, parts: Sequence[LowRank]) -> LowRank:
    # factors with signs: those of the parts count once, those of the start are taken
    # off again but once; the signed sum is diagonal in the span of all of them
    copies = jnp.asarray(len(parts) - 1, trees.float_dtype(start))
    bases, factors = zip(*(_flat(part) for part in parts), strict=True)
    start_base, start_factors = _flat(start)
    base = sum(bases[1:], start=bases[0]) - copies * start_base
    rows = jnp.concatenate([*factors, jnp.sqrt(copies) * start_factors])
    signs = jnp.ones(rows.shape[0], rows.dtype).at[-start_factors.shape[0] :].set(-1)
    span = linalg.orthonormal(rows.T)
    mixing = linalg.product("ij,kj->ik", span.T, rows)
    values, rotation = linalg.eigh((mixing * signs[None, :]) @ mixing.T)
    directions = (span @ rotation).T
    kept = jnp.sqrt(jnp.maximum(values, 0.0))[:, None] * directions
    negative = jnp.minimum(values, 0.0)[:, None] * jnp.square(directions)
    base = jnp.maximum(base + jnp.sum(negative, 0), start_base)
    return LowRank(trees.unravel(base, start.base), trees.unravel(kept, start.base))
