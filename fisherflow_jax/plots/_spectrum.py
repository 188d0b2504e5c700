"""A drawing of the eigenvalues of an information."""

from typing import Any

import numpy as np

from fisherflow_jax.diagnostics import eigenvalues
from fisherflow_jax.plots._axes import GREY, axes_or_new, finish

PyTree = Any


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
    return finish(ax, label, xlabel="rank", ylabel="eigenvalue of the information")
