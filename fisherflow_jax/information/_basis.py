"""Eigenvalues and the basis that they belong to."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fisherflow_jax._ground import trees

PyTree = Any
Parts = list[tuple[str, int]]  # of each leaf: its part, and d^3 of its matrices


def nothing_to_spread(what: str) -> ValueError:
    """The error that says why `spread_inverses=True` is refused.

    Example:
      >>> import fisherflow_jax as ff
      >>> type(ff.information.nothing_to_spread("a diagonal")).__name__
      'ValueError'
    """
    return ValueError(
        "spread_inverses=True renews layers or blocks by turns: of "
        f"{what} there is nothing to spread. It is for the structures kronecker and "
        "block."
    )


class Spectral(NamedTuple):
    r"""The operator :math:`B \, \mathrm{diag}(\lambda) \, B^\top`, a pytree of arrays.

    Made by `ff.information.spectral`.

    `basis.into(v)` is :math:`B^\top v`, `basis.out_of(c, like)` is :math:`B c`, a tree
    like the parameters; `basis.laid_out(v)` has the entries of `v` in the places of
    coordinates, without a turn, and `basis.diagonal(values, like)` is the operator's
    diagonal. The values are a tree like the coordinates, or a prefix
    of it (one number for all of them).
    """

    values: PyTree
    basis: Any

    def times(self, vector: PyTree) -> PyTree:
        """`B diag(values) B^T v`, like the vector."""
        return self._turn(jnp.multiply, vector)

    def divide(self, vector: PyTree) -> PyTree:
        """`B diag(1 / values) B^T v`, like the vector."""
        return self._turn(jnp.divide, vector)

    def _turn(self, function: Callable, vector: PyTree) -> PyTree:
        coordinates = self.basis.into(vector)
        return self.basis.out_of(self._each(function, coordinates), vector)

    def quotient(self, coordinates: PyTree) -> PyTree:
        """Coordinates divided by the values."""
        return self._each(jnp.divide, coordinates)

    def _each(self, function: Callable, coordinates: PyTree) -> PyTree:
        def leaf(value: jax.Array, part: PyTree) -> PyTree:
            return jax.tree.map(lambda x: function(x.astype(value.dtype), value), part)

        return jax.tree.map(leaf, _beside(self.values, coordinates), coordinates)

    def map(self, function: Callable, *trees_: PyTree) -> "Spectral":
        """`B diag(f(values)) B^T`."""
        return Spectral(jax.tree.map(function, self.values, *trees_), self.basis)

    def expanded(self, like: PyTree) -> list[jax.Array]:
        """All eigenvalues, each as often as it occurs; `like` the parameters."""
        shapes = jax.eval_shape(self.basis.into, like)
        filled = jax.tree.map(
            lambda value, part: jax.tree.map(
                lambda x: jnp.broadcast_to(value, x.shape), part
            ),
            _beside(self.values, shapes),
            shapes,
        )
        return jax.tree.leaves(filled)


def _beside(values: PyTree, coordinates: PyTree) -> PyTree:
    # a tree with holes has no coordinates of what is hidden
    if isinstance(values, dict) and isinstance(coordinates, dict):
        return {name: values[name] for name in coordinates}
    return values


class Floored(NamedTuple):
    """A spectrum of which no value is less than rounding knows, to be divided by.

    Made by `ff.information.floored`.
    """

    spectrum: Spectral
    raised: dict[Any, jax.Array]  # of each part, (): whether a value was

    def divide(self, vector: PyTree) -> PyTree:
        """As that of the spectrum."""
        return self.spectrum.divide(vector)

    def map(self, function: Callable) -> "Floored":
        return self._replace(spectrum=self.spectrum.map(function))


def floored(spectrum: Spectral) -> Spectral | Floored:
    r"""Values raised to :math:`\epsilon \max_j \lambda_j` of the matrix they belong to.

    An eigenvalue is known to that, the precision times the largest; coordinates of a
    vector below it are rounding, which a smaller divisor would blow up. Bases that
    turn nothing have exact values, and are left as they are.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> information = ff.structures.Full(jnp.diag(jnp.array([1.0, 1e-20])))
      >>> found = ff.information.floored(ff.information.spectral(information))
      >>> [bool(raised) for raised in found.raised.values()]
      [True]
    """
    raise_ = getattr(spectrum.basis, "raised", None)
    if raise_ is None:
        return spectrum
    values, raised = raise_(spectrum.values)
    return Floored(Spectral(values, spectrum.basis), raised)


def raised_along(values: jax.Array, *axes: int) -> tuple[jax.Array, jax.Array]:
    """Values of matrices that lie along these axes, and whether any was raised.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> values, raised = ff.information.raised_along(jnp.array([1.0, 0.0]), 0)
      >>> print(values, raised)
      [1.0000000e+00 1.1920929e-07] True
    """
    if not values.size:
        return values, jnp.array(False)
    eps = float(jnp.finfo(values.dtype).eps)
    least = eps * jnp.max(values, axes, keepdims=True)
    return jnp.maximum(values, least), jnp.any(values < least)


class Parameters(NamedTuple):
    """The basis of the parameters themselves: nothing is turned.

    Made by `ff.information.spectral`.
    """

    def into(self, vector: PyTree) -> PyTree:
        return vector

    def out_of(self, coordinates: PyTree, like: PyTree) -> PyTree:
        return coordinates

    def laid_out(self, vector: PyTree) -> PyTree:
        return vector

    def diagonal(self, values: PyTree, like: PyTree | None) -> PyTree:
        return values

    def parts(self, values: PyTree) -> "Parts":
        raise nothing_to_spread("an elementwise information")


class Columns(NamedTuple):
    """Eigenvectors as the columns of one matrix. Made by `ff.information.spectral`."""

    columns: jax.Array  # (d, d)

    def into(self, vector: PyTree) -> jax.Array:
        return self.laid_out(vector) @ self.columns

    def out_of(self, coordinates: jax.Array, like: PyTree) -> PyTree:
        return trees.unravel(self.columns @ coordinates, like)

    def diagonal(self, values: jax.Array, like: PyTree) -> PyTree:
        return trees.unravel(jnp.square(self.columns) @ values, like)

    def parts(self, values: PyTree) -> "Parts":
        raise nothing_to_spread("one matrix")

    def raised(self, values: jax.Array) -> tuple[jax.Array, dict]:
        values, raised = raised_along(values, -1)
        return values, {"": raised}

    def laid_out(self, vector: PyTree) -> jax.Array:
        return trees.ravel(vector).astype(self.columns.dtype)
