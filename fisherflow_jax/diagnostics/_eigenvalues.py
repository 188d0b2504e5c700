"""The eigenvalues of an information."""

import functools
from typing import Any

import jax
import numpy as np

from fisherflow_jax import information as ops
from fisherflow_jax._ground import trees
from fisherflow_jax.structures import (
    Block,
    Compensated,
    Diagonal,
    EigenKronecker,
    Kronecker,
    LowRank,
    Scalar,
    UnitBlock,
)
from fisherflow_jax.structures._algebra import dense

PyTree = Any

# A matrix of this order takes 128 MiB in float64, and seconds for its eigenvalues.
_LARGEST_MATRIX = 4096


@functools.singledispatch
def eigenvalues(information: Any, like: PyTree | None = None) -> np.ndarray:
    """All eigenvalues of an information, from the largest to the smallest.

    Args:
      information: of any structure.
      like: a tree with the parameters' shapes; only the scalar structure needs it.

    Returns:
      An array `(d,)` of float64. Cost: that of the dense matrix, d^3; for scalar and
      diagonal a sort, for block the sum of the blocks' cubes, for Kronecker that of its
      factors' cubes, and for low rank on a constant diagonal d rank^2.

    Raises:
      ValueError: where a matrix of more than 4096 rows would be needed.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> information = ff.structures.Full(jnp.array([[2.0, 1.0], [1.0, 2.0]]))
      >>> print(ff.diagnostics.eigenvalues(information).round(3))
      [3. 1.]
    """
    shapes = jax.eval_shape(lambda i: ops.diagonal(i, like), information)
    count = trees.size(shapes)
    if count > _LARGEST_MATRIX:
        raise ValueError(
            f"all {count} eigenvalues of a {type(information).__name__} need its dense "
            f"matrix, of at most {_LARGEST_MATRIX} rows here: take a part of the "
            "parameters, or a block, diagonal or Kronecker information."
        )
    return _of_matrices([ops.to_dense(information, like)])


@eigenvalues.register
def _(information: Scalar, like: PyTree | None = None) -> np.ndarray:
    return _of_entries(ops.diagonal(information, like))


@eigenvalues.register
def _(information: Diagonal, like: PyTree | None = None) -> np.ndarray:
    return _of_entries(information.entries)


@eigenvalues.register
def _(information: Compensated, like: PyTree | None = None) -> np.ndarray:
    return eigenvalues(information.value, like)


@eigenvalues.register(Block)
@eigenvalues.register(UnitBlock)
def _of_blocks(information: Any, like: PyTree | None = None) -> np.ndarray:
    return _of_matrices(dense.matrices(information))


@eigenvalues.register
def _(information: LowRank, like: PyTree | None = None) -> np.ndarray:
    base = np.asarray(trees.ravel(information.base), float)
    factors = np.asarray(trees.ravel(information.factors, 1), float)
    rank, count = factors.shape
    if np.any(base != base[0]) or rank > _LARGEST_MATRIX:
        return eigenvalues.dispatch(object)(information, like)
    # those of the small Gram matrix, or, of few parameters, as many as there are
    gram = np.linalg.eigvalsh(factors @ factors.T)[::-1][:count]
    directions = np.concatenate([np.maximum(gram, 0), np.zeros(count - gram.size)])
    return np.sort(base[0] + directions)[::-1]


@eigenvalues.register
def _(information: Kronecker, like: PyTree | None = None) -> np.ndarray:
    count = float(information.num_observations)
    parts = []
    for name, factor in information.input_factors.items():
        inputs = _of_factor(factor)
        outputs = _of_factor(information.output_factors[name])
        # no observations: the factors are zero, and so is their product
        products = inputs[:, :, None] * outputs[:, None, :] / (count or 1.0)
        parts.append(products + float(information.shifts[name]))
    return _sorted([*parts, *information.other_entries.values()])


@eigenvalues.register
def _(information: EigenKronecker, like: PyTree | None = None) -> np.ndarray:
    parts = [
        np.asarray(values, float) + float(information.shifts[name])
        for name, values in information.eigenvalues.items()
    ]
    return _sorted([*parts, *information.other_entries.values()])


def _of_factor(factor: jax.Array) -> np.ndarray:
    """Of a factor `(K, D, D)`, or of a diagonal `(K, D)`: `(K, D)`."""
    values = np.asarray(factor, float)
    # rounding brings the smallest eigenvalues of a singular factor below zero
    return values if values.ndim == 2 else np.maximum(np.linalg.eigvalsh(values), 0)


def _of_entries(tree: PyTree) -> np.ndarray:
    return _sorted([trees.ravel(tree)])


def _of_matrices(matrices: list) -> np.ndarray:
    # numpy, in float64: float32 would lose the small eigenvalues beside the large
    return _sorted([np.linalg.eigvalsh(np.asarray(m, float)) for m in matrices])


def _sorted(parts: list) -> np.ndarray:
    flat = [np.asarray(part, float).reshape(-1) for part in parts]
    return np.sort(np.concatenate(flat))[::-1]
