"""An information kept by its inverse, to which few rows are added without inverting."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fisherflow_jax import information as ops
from fisherflow_jax._ground import linalg, trees
from fisherflow_jax.structures._algebra import dense, steps
from fisherflow_jax.structures._compensated import Compensated, on_value
from fisherflow_jax.structures._full import Full, from_matrix, full
from fisherflow_jax.structures._structure import Structure

PyTree = Any


class Inverted(NamedTuple):
    """The information whose inverse is kept, the covariance.

    Kept by `ff.fisher_flow`, of single steps under a memory that moves the parameters.
    """

    inverse: Full

    @property
    def value(self) -> Full:
        """The information itself. Cost: a factorisation and an inverse, d^3."""
        return ops.inverse(self.inverse)


class Rows(NamedTuple):
    """The information `sum_k v_k v_k^T` of a few vectors, as these."""

    vectors: PyTree  # leaves (k, *leaf.shape)

    @property
    def value(self) -> Full:
        """The matrix."""
        return full().reduce(self.vectors)


def inverted(information: Any) -> Inverted:
    """The information, kept by its inverse from here on."""
    if isinstance(information, Inverted):
        return information
    return Inverted(ops.inverse(ops.plain(information)))


def may_be(information: Any) -> bool:
    """Whether an information of this type may be kept by its inverse."""
    return isinstance(information, Full)


def of_covariance(matrix: jax.Array, like: PyTree) -> Inverted:
    """The information of a covariance `(d, d)`, in the order of `ravel`."""
    return Inverted(from_matrix(matrix, like))


def takes_rows(information: Any) -> bool:
    """Whether few rows are added to it without inverting a matrix of it."""
    return isinstance(information, Inverted)


def rows() -> Structure:
    """The structure of `Rows`, for one batch; nothing is kept in it."""
    return full()._replace(name="rows()", reduce=Rows, held_by_outer_products=None)


def _joined(covariance: jax.Array, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Joseph's form, by products with rows alone: with K the gain and W = P - K J P,
    the covariance with the rows is W - W J^T K^T + K K^T."""
    across = rows @ covariance
    spread = across @ rows.T + jnp.eye(len(rows), dtype=rows.dtype)
    gain, logdet = linalg.divided(spread, across)  # K^T
    left = covariance - gain.T @ across
    left = left - (left @ rows.T) @ gain + gain.T @ gain
    return (left + left.T) / 2, logdet


def gained(information: Inverted, site: Rows) -> tuple[Inverted, jax.Array]:
    """The sum, and what its log-determinant has grown by: that of `1 + J P J^T`."""
    covariance, like = dense.matrices(information.inverse)[0], site.vectors
    covariance, logdet = _joined(covariance, trees.ravel(like, 1))
    return Inverted(dense.with_matrices(information.inverse, [covariance])), logdet


@ops.add_to.register
def _(left: Inverted, right: Any) -> Any:
    if isinstance(right, Rows):
        return gained(left, right)[0]
    if isinstance(right, Compensated):
        return NotImplemented
    return inverted(ops.add(left.value, ops.plain(right)))


@ops.add_to.register
def _(left: Rows, right: Any) -> Any:
    return NotImplemented if isinstance(right, Inverted) else ops.add(left.value, right)


@ops.conform.register
def _(template: Inverted, information: Any) -> Inverted:
    return inverted(information)


@ops.propagate.register
def _(information: Inverted, noise: Any, transition: Any | None = None) -> Inverted:
    kept = information.inverse
    return Inverted(steps.spread(kept, noise, transition))


@ops.matvec.register
def _(information: Rows, vector: PyTree) -> PyTree:
    flat = trees.ravel(information.vectors, 1)
    return trees.unravel((flat @ trees.ravel(vector)) @ flat, vector)


@ops.solver.register
def _(information: Inverted, damping: Any = 0.0) -> Callable[[PyTree], PyTree]:
    if isinstance(damping, (int, float)) and damping == 0:
        return lambda vector: ops.matvec(information.inverse, vector)
    return ops.solver(information.value, damping)


@ops.regularised.register
def _(information: Inverted, like: PyTree | None = None) -> ops.Regularised:
    none = jnp.zeros((), jnp.int32)
    return ops.Regularised(ops.solver(information), ops.logdet(information), none)


@ops.resolved.register
def _(information: Inverted, like: PyTree | None = None) -> tuple[Inverted, PyTree]:
    """Of a covariance rounding hides no direction, however large its variance."""
    variances = ops.diagonal(information.inverse)
    return information, jax.tree.map(jnp.zeros_like, variances)


@ops.is_finite.register
def _(information: Inverted) -> jax.Array:
    """And no variance has been lost to rounding."""
    variances = trees.ravel(ops.diagonal(information.inverse))
    return jnp.all(variances > 0) & trees.all_finite(information.inverse)


@ops.scale.register
def _(information: Inverted, factor: jax.typing.ArrayLike) -> Inverted:
    return Inverted(ops.scale(information.inverse, 1 / jnp.asarray(factor)))


ops.logdet.register(Inverted, lambda i, like=None: -ops.logdet(i.inverse))
ops.inverse.register(Inverted, lambda i: i.inverse)
ops.inverse_diagonal.register(Inverted, lambda i, like=None: ops.diagonal(i.inverse))
ops.facts.register(Inverted, lambda i: ops.facts(i.inverse))
ops.restrict.register(Inverted, lambda i, *of: ops.restrict(i.value, *of))

_BY_INVERSE = (
    ops.solver,
    ops.regularised,
    ops.resolved,
    ops.logdet,
    ops.inverse,
    ops.inverse_diagonal,
    ops.facts,
)
on_value(Inverted, but=_BY_INVERSE)
on_value(Rows, but=(ops.matvec,))
