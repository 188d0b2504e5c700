"""Estimates of parameters with their intervals."""

from typing import Any

import numpy as np

from fisherflow_jax.plots._axes import (
    GREY,
    axes_or_new,
    columns,
    names_of,
    quieten,
    same_shape,
)

PyTree = Any


def intervals(
    estimate: PyTree,
    lower: PyTree,
    upper: PyTree,
    *,
    names: Any = None,
    truth: PyTree | None = None,
    label: str | None = None,
    color: Any = None,
    ax: Any = None,
) -> Any:
    """Draws an interval a parameter, one below the other.

    Args:
      estimate: a pytree, such as `state.mean`.
      lower: like the estimate; with `upper`, what `ff.confidence_interval` returns.
      upper: like the estimate.
      names: one a parameter, in ravelled order; None: paths in the tree.
      truth: like the estimate, drawn as crosses.
      label: for the legend, which is drawn when there is one.
      color: of the intervals; None: the Axes' next.
      ax: matplotlib Axes; None: those of a new figure. Others may be drawn on them.

    Returns:
      The Axes.

    Raises:
      ImportError: if `ax` is None and matplotlib is missing.
      ValueError: for shapes that differ, names that do not fit, or a lower end above
        the upper one.

    Example:
      >>> import jax.numpy as jnp
      >>> import matplotlib
      >>> matplotlib.use("agg")
      >>> from fisherflow_jax import plots
      >>> mean = {"slope": jnp.array(1.0), "offset": jnp.array(-0.5)}
      >>> ends = [{name: x + d for name, x in mean.items()} for d in (-0.2, 0.2)]
      >>> ax = plots.intervals(mean, *ends)
      >>> print([tick.get_text() for tick in ax.get_yticklabels()])
      ['offset', 'slope']
    """
    middle = columns(estimate, 0, "estimate")
    low = same_shape("lower", columns(lower, 0, "lower"), middle.shape)
    high = same_shape("upper", columns(upper, 0, "upper"), middle.shape)
    if (low > high).any():
        place = int(np.argmax(low > high))
        raise ValueError(
            "lower must not be above upper; parameter "
            f"{place} has [{low[place]:g}, {high[place]:g}]."
        )
    labels = names_of(estimate, names, 0, len(middle))
    marks = None
    if truth is not None:
        marks = same_shape("truth", columns(truth, 0, "truth"), middle.shape)
    ax = axes_or_new(ax)
    # several sets of intervals on one Axes stand beside each other, not over each other
    places = np.arange(len(middle)) + 0.2 * len(ax.containers)
    ax.axvline(0, color=GREY, linewidth=1, zorder=1)
    # the ends are drawn, not their distance: an estimate may lie outside its interval
    artist = ax.errorbar(
        middle, places, fmt="o", markersize=5, color=color, label=label, zorder=3
    )
    ax.hlines(places, low, high, color=artist.lines[0].get_color(), zorder=2)
    if marks is not None:
        ax.plot(marks, places, "x", color="black", markersize=7, zorder=4)
    ax.set_yticks(np.arange(len(middle)), labels)
    ax.set_ylim(len(middle) - 0.4, -0.6)  # the first on top
    ax.set_xlabel("estimate")
    quieten(ax)
    if label is not None:
        ax.legend(frameon=False)
    return ax
