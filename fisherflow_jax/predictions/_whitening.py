"""Vectors in coordinates in which the posterior's covariance is the identity.

For pulled-back vectors `v` of a few outputs, `left_r . right_s = v_r^T Cov v_s`. Where
a root of the information is at hand both are its solution, so that variances are sums
of squares and never negative.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.lax import Precision
from jax.scipy.linalg import solve_triangular

from fisherflow_jax import information as ops
from fisherflow_jax._ground import trees
from fisherflow_jax.posteriors._intervals import meat_of
from fisherflow_jax.structures import Block, Compensated, Full, LowRank, UnitBlock
from fisherflow_jax.structures._algebra import dense
from fisherflow_jax.structures._full import from_matrix

PyTree = Any


class Rows(NamedTuple):
    """R vectors, so that `left_r . right_s` is the covariance of r and s."""

    left: jax.Array  # (R, q)
    right: jax.Array  # (R, q)

    def mixed(self, matrix: jax.Array) -> "Rows":
        """The combinations `matrix (S, R)` of the vectors."""
        matrix = matrix.astype(self.left.dtype)
        left = jnp.matmul(matrix, self.left, precision=Precision.HIGHEST)
        if self.right is self.left:
            return Rows(left, left)
        return Rows(left, jnp.matmul(matrix, self.right, precision=Precision.HIGHEST))

    def variance(self) -> jax.Array:
        """`(R,)`."""
        return jnp.sum(self.left * self.right, -1)

    def covariance(self, other: "Rows | None" = None) -> jax.Array:
        """`(R, R)`, or `(R, S)` with S other vectors."""
        other = self if other is None else other
        return jnp.einsum(
            "rq,sq->rs", self.left, other.right, precision=Precision.HIGHEST
        )


Whitener = Callable[[PyTree], Rows]


def whitener(state: Any, robust: bool) -> Whitener:
    """Factorises once: `(leaves (R, *leaf.shape)) -> Rows`."""
    if not robust:
        return _root(state.information)
    solve, meat = ops.solver(state.information), meat_of(state)

    def sandwich(stack: PyTree) -> Rows:
        solved = jax.vmap(solve)(stack)
        filled = jax.vmap(lambda v: ops.matvec(meat, v))(solved)
        return Rows(trees.ravel(solved, 1), trees.ravel(filled, 1))

    return sandwich


@functools.singledispatch
def _root(information: Any) -> Whitener:
    """For any structure that can solve."""
    solve = ops.solver(information)

    def solved(stack: PyTree) -> Rows:
        right = jax.vmap(solve)(stack)
        return Rows(trees.ravel(stack, 1), trees.ravel(right, 1))

    return solved


@_root.register
def _(information: Compensated) -> Whitener:
    return _root(information.value)


@_root.register(Full)
@_root.register(Block)
@_root.register(UnitBlock)
def _(information: Any) -> Whitener:
    factors = [dense.factorise(m) for m in dense.matrices(information)]

    def half_solve(stack: PyTree) -> Rows:
        parts = jax.vmap(lambda v: dense.pack(information, v))(stack)
        halves = []
        for (factor, scales), part in zip(factors, parts, strict=True):
            # the R vectors as columns of one right-hand side: (..., k, R)
            columns = jnp.moveaxis(part, 0, -1) / scales[..., None]
            half = solve_triangular(factor, columns, lower=True)
            halves.append(jnp.moveaxis(half, -1, 0).reshape((part.shape[0], -1)))
        return _same(jnp.concatenate(halves, -1))

    return half_solve


@_root.register
def _(information: LowRank) -> Whitener:
    base = trees.ravel(information.base)
    factors = trees.ravel(information.factors, 1)
    if factors.shape[0] >= base.shape[0]:
        # no larger than the factors, and exact: nothing is subtracted
        return _root(from_matrix(ops.to_dense(information), information.base))
    scales = jnp.sqrt(base)
    whitened = factors / scales[None]
    # (1 + W^T W)^-1/2 by the small Gram matrix W W^T, stable at zero eigenvalues
    gram = jnp.matmul(whitened, whitened.T, precision=Precision.HIGHEST)
    values, basis = jnp.linalg.eigh(gram)
    root = jnp.sqrt(1 + jnp.maximum(values, 0.0))
    weights = -1 / (root * (1 + root))

    def rotate(stack: PyTree) -> Rows:
        scaled = trees.ravel(stack, 1).astype(base.dtype) / scales[None]
        inner = jnp.matmul(scaled, whitened.T, precision=Precision.HIGHEST) @ basis
        back = (inner * weights[None]) @ basis.T
        rest = jnp.matmul(back, whitened, precision=Precision.HIGHEST)
        return _same(scaled + rest)

    return rotate


def _same(rows: jax.Array) -> Rows:
    return Rows(rows, rows)
