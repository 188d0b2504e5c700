"""Estimates with their intervals; lines with a band, over an input or a stream."""

from typing import Any

import jax
import numpy as np

from fisherflow_jax.plots import _axes as axes

PyTree = Any

# More lines than this cannot be told apart.
_MOST_LINES = 10


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
    middle, low, high = axes.ends(estimate, lower, upper, 0)
    if (low > high).any():
        place = int(np.argmax(low > high))
        raise ValueError(
            "lower must not be above upper; parameter "
            f"{place} has [{low[place]:g}, {high[place]:g}]."
        )
    labels = axes.names_of(estimate, names, 0, len(middle))
    marks = None if truth is None else axes.columns(truth, 0, "truth", middle.shape)
    ax = axes.axes_or_new(ax)
    # several sets of intervals on one Axes stand beside each other, not over each other
    places = np.arange(len(middle)) + 0.2 * len(ax.containers)
    ax.axvline(0, color=axes.GREY, linewidth=1, zorder=1)
    # the ends are drawn, not their distance: an estimate may lie outside its interval
    artist = ax.errorbar(
        middle, places, fmt="o", markersize=5, color=color, label=label, zorder=3
    )
    ax.hlines(places, low, high, color=artist.lines[0].get_color(), zorder=2)
    if marks is not None:
        ax.plot(marks, places, "x", color="black", markersize=7, zorder=4)
    ax.set_yticks(np.arange(len(middle)), labels)
    ax.set_ylim(len(middle) - 0.4, -0.6)  # the first on top
    return axes.finish(ax, label, xlabel="estimate")


def prediction_band(
    inputs: jax.Array,
    mean: jax.Array,
    lower: jax.Array,
    upper: jax.Array,
    *,
    targets: jax.Array | None = None,
    label: str | None = None,
    color: Any = None,
    ax: Any = None,
) -> Any:
    """Draws predictions over one input as a line with its band.

    Args:
      inputs: `(n,)`, in any order.
      mean: `(n,)`, such as `prediction.mean`.
      lower: `(n,)`; with `upper`, of the mean or of new targets.
      upper: `(n,)`.
      targets: `(n,)`, drawn as points.
      label: for the legend, which is drawn when there is one.
      color: of line and band; None: the Axes' next.
      ax: matplotlib Axes; None: those of a new figure.

    Returns:
      The Axes.

    Raises:
      ImportError: if `ax` is None and matplotlib is missing.
      ValueError: for shapes that differ or are not `(n,)`.

    Example:
      >>> import jax.numpy as jnp
      >>> import matplotlib
      >>> matplotlib.use("agg")
      >>> from fisherflow_jax import plots
      >>> x = jnp.linspace(0.0, 1.0, 20)
      >>> ax = plots.prediction_band(x, x**2, x**2 - 0.1, x**2 + 0.1)
      >>> print(len(ax.lines), len(ax.collections))
      1 1
    """
    x = np.asarray(inputs, float)
    if x.ndim != 1 or x.size == 0:
        raise ValueError(
            f"inputs must be (n,), one number an example; got shape {x.shape}."
        )
    order = np.argsort(x)
    middle, low, high = (
        axes.same_shape(name, values, x.shape)[order]
        for name, values in (("mean", mean), ("lower", lower), ("upper", upper))
    )
    points = None if targets is None else axes.same_shape("targets", targets, x.shape)
    ax = axes.axes_or_new(ax)
    _band(ax, x[order], middle, low, high, label, color)
    if points is not None:
        ax.plot(x, points, ".", color="black", markersize=4, alpha=0.6, zorder=1)
    return axes.finish(ax, label, xlabel="input", ylabel="target")


def estimate_over_stream(
    estimate: PyTree,
    lower: PyTree,
    upper: PyTree,
    *,
    observations: jax.Array | None = None,
    truth: PyTree | None = None,
    names: Any = None,
    ax: Any = None,
) -> Any:
    """Draws estimates with their bands as data streamed in.

    Args:
      estimate: leaves `(steps, ...)`: means that a scan over `flow.update` stacked.
      lower: like the estimate; with `upper`, `jax.vmap(ff.confidence_interval)` of the
        stacked states.
      upper: like the estimate.
      observations: `(steps,)`, the horizontal axis, such as `states.count`; None: steps
        from 1.
      truth: like one step's estimate; or with the steps too, where it drifts. Drawn
        dotted.
      names: one a parameter, in ravelled order; None: paths in the tree.
      ax: matplotlib Axes; None: those of a new figure.

    Returns:
      The Axes.

    Raises:
      ImportError: if `ax` is None and matplotlib is missing.
      ValueError: for shapes that differ, names that do not fit, or more than 10
        parameters (choose those to show).

    Example:
      >>> import jax.numpy as jnp
      >>> import matplotlib
      >>> matplotlib.use("agg")
      >>> from fisherflow_jax import plots
      >>> mean = {"rate": jnp.array([0.5, 0.4, 0.45])}
      >>> lower, upper = ({"rate": mean["rate"] + d} for d in (-0.1, 0.1))
      >>> ax = plots.estimate_over_stream(mean, lower, upper)
      >>> print(ax.get_legend().get_texts()[0].get_text())
      rate
    """
    middle, low, high = axes.ends(estimate, lower, upper, 1)
    steps, count = middle.shape
    if count > _MOST_LINES:
        raise ValueError(
            f"{count} lines cannot be told apart: choose at most {_MOST_LINES} of the "
            "parameters, such as estimate['bias']."
        )
    axis = "steps" if observations is None else "observations"
    x = np.arange(1, steps + 1) if observations is None else observations
    x = axes.same_shape("observations", x, (steps,))
    labels = axes.names_of(estimate, names, 1, count)
    true = None if truth is None else _truth(truth, estimate, middle.shape)
    ax = axes.axes_or_new(ax)
    for index, name in enumerate(labels):
        color = _band(
            ax, x, middle[:, index], low[:, index], high[:, index], name, None
        )
        if true is not None:
            ax.plot(x, true[:, index], ":", color=color, linewidth=1.5, zorder=4)
    return axes.finish(ax, labels[0], xlabel=axis, ylabel="estimate")


def _truth(truth: PyTree, estimate: PyTree, shape: tuple[int, ...]) -> np.ndarray:
    given = [np.shape(x) for x in jax.tree.leaves(truth)]
    over_steps = [np.shape(x) for x in jax.tree.leaves(estimate)]
    if given == over_steps:
        return axes.columns(truth, 1, "truth")
    if given == [shape_of_leaf[1:] for shape_of_leaf in over_steps]:
        return np.broadcast_to(axes.columns(truth, 0, "truth"), shape)
    raise ValueError(
        f"truth must be like the estimate, shapes {over_steps}, or like one step of "
        f"it; got {given}."
    )


def _band(ax: Any, x, middle, low, high, label, color) -> Any:
    """Draws the line and its band; returns their colour."""
    (line,) = ax.plot(x, middle, color=color, label=label, linewidth=1.5, zorder=3)
    ax.fill_between(
        x, low, high, color=line.get_color(), alpha=0.2, linewidth=0, zorder=2
    )
    return line.get_color()
