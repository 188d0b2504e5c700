"""Estimates with their intervals; lines with a band, over an input or a stream."""

from typing import Any

import jax
import numpy as np

from fisherflow_jax._ground import checks
from fisherflow_jax.plots import _axes as axes
from fisherflow_jax.posteriors import confidence_interval

PyTree = Any

# More lines than this cannot be told apart.
_MOST_LINES = 10


def intervals(
    estimate: Any,
    lower: PyTree | None = None,
    upper: PyTree | None = None,
    *,
    level: float = 0.95,
    robust: bool | str = False,
    chosen: Any = None,
    num_rows: int = 40,
    names: Any = None,
    truth: PyTree | None = None,
    label: str | None = None,
    color: Any = None,
    ax: Any = None,
) -> Any:
    """Draws an interval a parameter, one below the other: a forest plot.

    Args:
      estimate: a state, anything with `.mean` and `.information`; or a pytree, which
        needs `lower` and `upper`.
      lower: like the estimate; with `upper`, the ends of intervals of any kind. None:
        those of `ff.confidence_interval` of the state.
      upper: like the estimate.
      level: of a state's intervals, in (0, 1).
      robust: with a state's sandwich, as in `ff.standard_error`.
      chosen: None, all parameters; or which are drawn: a predicate of the name, a list
        of names (`["head"]`), booleans like the parameters or a prefix of them.
      num_rows: how many are drawn at most, the first ones; a line says how many more
        there are.
      names: one a parameter, in ravelled order, of all; None: paths in the tree.
      truth: like the estimate, drawn as crosses.
      label: for the legend, which is drawn when there is one.
      color: of the intervals; None: the Axes' next.
      ax: matplotlib Axes; None: those of a new figure, as high as the rows need. Others
        may be drawn on them.

    Returns:
      The Axes, with a line at zero.

    Raises:
      ImportError: if `ax` is None and matplotlib is missing.
      ValueError: for shapes that differ, names that do not fit, or a lower end above
        the upper one.

    Example:
      >>> import jax.numpy as jnp
      >>> import matplotlib
      >>> matplotlib.use("agg")
      >>> import fisherflow_jax as ff
      >>> mean = {"slope": jnp.array([1.0, 3.0]), "offset": jnp.array(-0.5)}
      >>> ones = {"slope": jnp.ones(2), "offset": jnp.ones(())}
      >>> information = ff.structures.Diagonal(ones)
      >>> state = ff.posterior(mean, information, prior_precision=1.0)
      >>> ax = ff.plots.intervals(state)
      >>> print([tick.get_text() for tick in ax.get_yticklabels()])
      ['offset', 'slope[0]', 'slope[1]']
    """
    if lower is None and upper is None:
        lower, upper = confidence_interval(estimate, level=level, robust=robust)
    if hasattr(estimate, "information"):
        estimate = estimate.mean
    middle, low, high = axes.ends(estimate, lower, upper, 0)
    if (low > high).any():
        place = int(np.argmax(low > high))
        raise ValueError(
            "lower must not be above upper; parameter "
            f"{place} has [{low[place]:g}, {high[place]:g}]."
        )
    labels = np.array(axes.names_of(estimate, names, 0, len(middle)))
    marks = None if truth is None else axes.columns(truth, 0, "truth", middle.shape)
    wanted = axes.entries(estimate, chosen)
    rows = wanted[: checks.whole(num_rows, "num_rows")]
    ax = axes.axes_or_new(ax, height=0.8 + 0.25 * max(len(rows), 4))
    # several sets of intervals on one Axes stand beside each other, not over each other
    places = np.arange(len(rows)) + 0.2 * len(ax.containers)
    ax.axvline(0, color=axes.GREY, linewidth=1, zorder=1)
    # the ends are drawn, not their distance: an estimate may lie outside its interval
    artist = ax.errorbar(
        middle[rows], places, fmt="o", markersize=5, color=color, label=label, zorder=3
    )
    color = artist.lines[0].get_color()
    ax.hlines(places, low[rows], high[rows], color=color, zorder=2)
    if marks is not None:
        ax.plot(marks[rows], places, "x", color="black", markersize=7, zorder=4)
    ax.set_yticks(np.arange(len(rows)), labels[rows])
    ax.set_ylim(len(rows) - 0.4, -0.6)  # the first on top
    more = len(wanted) - len(rows)
    axis = "estimate" if not more else f"estimate ({more:,} more parameters not drawn)"
    return axes.finish(ax, label, xlabel=axis)


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
    infos: Any = None,
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
      infos: what the updates reported, as the scan stacked it, of a memory that raises
        alarms (`ff.memories.adaptive`): each alarm is a line, and what it cut off, from
        the change that it dates to the alarm, a grey field. Steps are counted as the
        memory counts them, from the stream's first; of a part of a stream give the
        alarms alone, `infos.memory.alarm`, `(steps,)` booleans.
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
    alarms = None if infos is None else _alarms(infos, steps)
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
    if alarms is not None:
        _mark(ax, np.asarray(x), *alarms)
    return axes.finish(ax, labels[0], xlabel=axis, ylabel="estimate")


def _alarms(infos: Any, steps: int) -> tuple[np.ndarray, np.ndarray | None]:
    """The steps with an alarm, and those that each dates its change to, if it does."""
    report = getattr(infos, "memory", infos)
    alarm = np.asarray(getattr(report, "alarm", report))
    if alarm.dtype != bool or alarm.shape != (steps,):
        raise ValueError(
            f"infos are what {steps} updates of ff.memories.adaptive reported, "
            f"stacked, or their alarms, ({steps},) booleans; got "
            f"{checks.described(infos)}."
        )
    change = getattr(report, "change_point", None)
    found = np.flatnonzero(alarm)
    return found, None if change is None else np.asarray(change)[found]


def _mark(ax: Any, x: np.ndarray, alarms: np.ndarray, changes: Any) -> None:
    for number, step in enumerate(alarms):
        label = None if number else "alarm"
        ax.axvline(
            x[step], color="black", linestyle="--", linewidth=1, label=label, zorder=5
        )
        if changes is not None and 0 <= changes[number] <= step:
            start = x[changes[number]]
            ax.axvspan(start, x[step], color=axes.GREY, alpha=0.25, linewidth=0)


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
