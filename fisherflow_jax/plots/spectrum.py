"""The eigenvalues of an information."""

import functools
from typing import Any

import jax
import numpy as np

from fisherflow_jax import information as ops
from fisherflow_jax import vectors
from fisherflow_jax.plots.axes import GREY, axes_or_new, quieten
from fisherflow_jax.structures import (
    Block,
    Compensated,
    Diagonal,
    Scalar,
    UnitBlock,
    dense,
)

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
      diagonal a sort, for block the sum of the blocks' cubes.

    Raises:
      ValueError: where a matrix of more than 4096 rows would be needed.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> from fisherflow_jax import plots
      >>> information = ff.structures.Full(jnp.array([[2.0, 1.0], [1.0, 2.0]]))
      >>> print(plots.eigenvalues(information).round(3))
      [3. 1.]
    """
    shapes = jax.eval_shape(lambda i: ops.diagonal(i, like), information)
    count = vectors.size(shapes)
    if count > _LARGEST_MATRIX:
        raise ValueError(
            f"all {count} eigenvalues of a {type(information).__name__} need its dense "
            f"matrix, of at most {_LARGEST_MATRIX} rows here: draw a part of the "
            "parameters, or a block or diagonal information."
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


def information_spectrum(
    information: Any,
    *,
    like: PyTree | None = None,
    floor: float | None = None,
    label: str | None = None,
    color: Any = None,
    ax: Any = None,
) -> Any:
    """Draws the eigenvalues of an information by rank, on a logarithmic scale.

    Few large ones say that the data determine few directions. With the `floor` at the
    prior precision the curve's crossing is the number of directions of which the data
    say more than the prior. Eigenvalues of a matrix that lie below the largest by more
    than the rounding of its type (seven powers of ten in float32) may be nothing but
    rounding.

    Args:
      information: of any structure, such as `state.information`. What of it is not
        positive cannot be drawn, and is counted below the curve.
      like: a tree with the parameters' shapes; only the scalar structure needs it.
      floor: a precision to draw as a horizontal line.
      label: for the legend, which is drawn when there is one.
      color: of the curve; None: the Axes' next.
      ax: matplotlib Axes; None: those of a new figure. Several may share them.

    Returns:
      The Axes. Cost: that of `eigenvalues`.

    Raises:
      ImportError: if `ax` is None and matplotlib is missing.
      ValueError: as `eigenvalues` does, and where no eigenvalue is positive.

    Example:
      >>> import jax.numpy as jnp
      >>> import matplotlib
      >>> matplotlib.use("agg")
      >>> import fisherflow_jax as ff
      >>> from fisherflow_jax import plots
      >>> information = ff.structures.Diagonal(jnp.array([1.0, 100.0, 10.0]))
      >>> ax = plots.information_spectrum(information)
      >>> print(ax.lines[0].get_ydata())
      [100.  10.   1.]
    """
    values = eigenvalues(information, like)
    positive = values[values > 0]
    if positive.size == 0:
        raise ValueError(
            "no eigenvalue of the information is positive; the largest is "
            f"{values.max():g}."
        )
    ax = axes_or_new(ax)
    # one point is no line, and few ranks are better seen one by one
    marker = "o" if positive.size <= 50 else None
    ranks = np.arange(1, positive.size + 1)
    (line,) = ax.plot(
        ranks, positive, marker=marker, markersize=4, color=color, label=label
    )
    missing = values.size - positive.size
    if missing:
        ax.annotate(
            f"{missing} not positive",
            (ranks[-1], positive[-1]),
            xytext=(-4, -12),
            textcoords="offset points",
            ha="right",
            color=line.get_color(),
        )
    if floor is not None:
        ax.axhline(floor, color=GREY, linestyle="--", linewidth=1, zorder=1)
    ax.set_yscale("log")
    ax.set(xlabel="rank", ylabel="eigenvalue of the information")
    quieten(ax)
    if label is not None:
        ax.legend(frameon=False)
    return ax


def _of_entries(tree: PyTree) -> np.ndarray:
    flat = np.asarray(vectors.ravel(tree), float)
    return np.sort(flat)[::-1]


def _of_matrices(matrices: list) -> np.ndarray:
    # numpy, in float64: float32 would lose the small eigenvalues beside the large
    parts = [np.linalg.eigvalsh(np.asarray(m, float)).reshape(-1) for m in matrices]
    return np.sort(np.concatenate(parts))[::-1]
