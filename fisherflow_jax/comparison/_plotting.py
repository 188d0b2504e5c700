"""Estimates as pictures: histograms of their entries, and error against cost."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from fisherflow_jax.comparison._comparing import by_layer, compare
from fisherflow_jax.comparison._measurement import Measurement

_COLUMNS, _MOST_BINS = 4, 60
_PANEL = 3.2, 2.4  # inches


def plot(truth: Measurement, others: Sequence[Measurement]) -> Any:
    """Histograms of log10 of the entries, a panel a layer, and error against seconds.

    Args:
      truth: a measurement, of `ff.estimators.exact` for instance; drawn filled.
      others: measurements at the same parameters.

    Returns:
      A matplotlib `Figure`: `figure.savefig("file.png")`. The information is that of
      one observation; entries that are zero are left out of the histograms. An
      estimate without seconds is left out of the last panel.

    Raises:
      ImportError: if matplotlib is missing.
      ValueError: for measurements of other parameters.

    Example:
      >>> import numpy as np
      >>> from fisherflow_jax import comparison
      >>> settings = {"name": "exact", "options": {}, "num_examples": 1.0}
      >>> truth = comparison.Measurement({"head.w": np.array([1.0, 2.0])}, settings)
      >>> [axes.get_title() for axes in comparison.plot(truth, []).axes]
      ['head', 'error against cost']
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "ff.comparison.plot draws with matplotlib, which is not installed: "
            "pip install matplotlib."
        ) from error
    comparisons = compare(truth, others)
    layers = [by_layer(each.average) for each in (truth, *others)]
    num_panels = len(layers[0]) + 1
    num_columns = min(_COLUMNS, num_panels)
    num_rows = math.ceil(num_panels / num_columns)
    size = (_PANEL[0] * num_columns, _PANEL[1] * num_rows)
    # no pyplot: needs no display, and leaves no figure open
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(num_rows, num_columns, squeeze=False).ravel()
    names = [each.name for each in comparisons]
    for panel, layer in zip(panels, layers[0], strict=False):
        _histograms(panel, names, [each[layer] for each in layers])
        panel.set_title(layer, fontsize="small")
    legends = [panel.get_legend_handles_labels() for panel in panels]
    longest = max(legends, key=lambda legend: len(legend[1]))  # a layer may be zero
    figure.legend(*longest, loc="outside upper center", ncols=3)
    _errors(panels[num_panels - 1], comparisons[1:])
    for panel in panels[num_panels:]:
        panel.remove()
    for panel in figure.axes:
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(labelsize="x-small")
    return figure


def _histograms(panel: Any, names: list[str], rows: list[np.ndarray]) -> None:
    logs = [np.log10(row[row > 0]) for row in rows]
    finite = np.concatenate(logs)
    if not finite.size:
        panel.text(0.5, 0.5, "all zero", ha="center", transform=panel.transAxes)
        return
    low, high = finite.min(), finite.max()
    num_bins = min(_MOST_BINS, math.isqrt(rows[0].size) + 4)
    bins = np.linspace(low - 0.05, high + 0.05, num_bins)
    for number, (name, values) in enumerate(zip(names, logs, strict=True)):
        panel.hist(
            values,
            bins,
            histtype="step" if number else "stepfilled",
            color=f"C{number - 1}" if number else "0.85",
            label=name,
        )
    panel.set_xlabel("log10 information", fontsize="x-small")
    panel.set_yticks([])


def _errors(panel: Any, comparisons: Sequence[Any]) -> None:
    from matplotlib.ticker import MaxNLocator

    panel.set_title("error against cost", fontsize="small")
    panel.set_xlabel("seconds", fontsize="x-small")
    panel.set_ylabel("relative error", fontsize="x-small")
    timed = [(i, each) for i, each in enumerate(comparisons) if each.seconds]
    for number, each in timed:
        panel.plot(each.seconds, each.relative_error, "o", color=f"C{number}")
    if not timed:
        return
    for axis, scale, values in (
        (panel.xaxis, panel.set_xscale, [each.seconds for _, each in timed]),
        (panel.yaxis, panel.set_yscale, [each.relative_error for _, each in timed]),
    ):
        # ticks of a logarithm that spans less than a decade collide
        if min(values) > 0 and max(values) > 10 * min(values):
            scale("log")
        else:
            axis.set_major_locator(MaxNLocator(4))
