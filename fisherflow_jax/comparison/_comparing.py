"""How far estimates are from the truth: numbers, a table of them, and pictures."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from fisherflow_jax._ground.tables import aligned
from fisherflow_jax.comparison._measurement import Measurement

# what Sun (2026) counts as having vanished
SMALL = 1e-5


class Comparison(NamedTuple):
    """An estimate beside the truth; informations are of one observation.

    Made by `ff.comparison.compare`.
    """

    name: str
    relative_error: float  # sum |estimate - truth| / sum truth
    total_ratio: float  # sum estimate / sum truth; 1 without bias or common noise
    log_correlation: float  # of the logarithms, where both are positive
    num_positive: int  # how many entries that is
    num_entries: int
    share_small: float  # of the estimate's entries, those under the bound `small`
    layers: dict[str, float]  # relative error within each layer
    seconds: float | None
    passes: int | None


def compare(
    truth: Measurement, others: Sequence[Measurement], *, small: float = SMALL
) -> list[Comparison]:
    r"""The error of estimates of the diagonal information against the truth.

    .. math:: \text{error} = \frac{\sum_j |\hat F_j - F_j|}{\sum_j F_j}, \quad
       \text{ratio} = \frac{\sum_j \hat F_j}{\sum_j F_j}

    of the average over observations. One square of a sum over examples has noise that
    is common to its entries: the correlation of logarithms does not see it, the error
    and the ratio do.

    Args:
      truth: a measurement, of `ff.estimators.exact` for instance.
      others: measurements at the same parameters.
      small: the bound of `share_small`, for the information of one observation.

    Returns:
      A `Comparison` for the truth itself and for each other, in their order. A layer is
      the parameters that differ only in the last part of their name. Errors are NaN
      where the truth is zero throughout.

    Raises:
      ValueError: for measurements of other parameters, naming the first that differs.

    Example:
      >>> import numpy as np
      >>> from fisherflow_jax import comparison
      >>> def measurement(name, entries):
      ...     settings = {"name": name, "options": {}, "num_examples": 1.0}
      ...     return comparison.Measurement({"head.w": np.array(entries)}, settings)
      >>> truth = measurement("exact", [1.0, 2.0, 1.0])
      >>> _, drawn = comparison.compare(truth, [measurement("drawn", [1.0, 3.0, 0.0])])
      >>> drawn.relative_error, drawn.total_ratio, drawn.num_positive, drawn.layers
      (0.5, 1.0, 2, {'head': 0.5})

    References:
      Sun, "Deterministic Bounds and Random Estimates of Metric Tensors on
      Neuromanifolds", 2026.
    """
    for other in others:
        _check_same_parameters(truth, other)
    return [_one(truth, other, small) for other in (truth, *others)]


def by_layer(leaves: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """All entries of each layer, in one row; a layer's name lacks the last part.

    Example:
      >>> import numpy as np
      >>> from fisherflow_jax.comparison._comparing import by_layer
      >>> list(by_layer({"block_0.query.kernel": np.ones(2), "w": np.ones(1)}))
      ['block_0.query', 'w']
    """
    rows: dict[str, list[np.ndarray]] = {}
    for name, leaf in leaves.items():
        rows.setdefault(name.rpartition(".")[0] or name, []).append(leaf.ravel())
    return {layer: np.concatenate(parts) for layer, parts in rows.items()}


def _check_same_parameters(truth: Measurement, other: Measurement) -> None:
    shapes, others = (
        {path: leaf.shape for path, leaf in each.information.items()}
        for each in (truth, other)
    )
    for path in (*shapes, *others):
        if shapes.get(path) != others.get(path):
            raise ValueError(
                f"{other.label} is of other parameters than {truth.label}: {path} has "
                f"shape {others.get(path, 'none')}, for {shapes.get(path, 'none')}."
            )


def _one(truth: Measurement, other: Measurement, small: float) -> Comparison:
    rows, estimates = by_layer(truth.average), by_layer(other.average)
    true, estimate = (np.concatenate([*each.values()]) for each in (rows, estimates))
    both = (true > 0) & (estimate > 0)
    errors = {name: _relative_error(row, estimates[name]) for name, row in rows.items()}
    return Comparison(
        name=other.label,
        relative_error=_relative_error(true, estimate),
        total_ratio=_ratio(estimate.sum(), true.sum()),
        log_correlation=_correlation(np.log(true[both]), np.log(estimate[both])),
        num_positive=int(both.sum()),
        num_entries=true.size,
        share_small=float(np.mean(estimate < small)),
        layers=errors,
        seconds=other.settings.get("seconds"),
        passes=other.settings.get("passes"),
    )


def _ratio(numerator: Any, denominator: Any) -> float:
    return float(numerator / denominator) if denominator > 0 else float("nan")


def _relative_error(true: np.ndarray, estimate: np.ndarray) -> float:
    return _ratio(np.abs(estimate - true).sum(), true.sum())


def _correlation(x: np.ndarray, y: np.ndarray) -> float:
    if x.size < 2:
        return float("nan")
    x, y = x - x.mean(), y - y.mean()
    return _ratio(x @ y, np.sqrt((x @ x) * (y @ y)))


def table(comparisons: Sequence[Comparison]) -> str:
    """Comparisons as two plain tables: of all parameters, and of each layer.

    Example:
      >>> import numpy as np
      >>> from fisherflow_jax import comparison
      >>> settings = {"name": "exact", "options": {}, "num_examples": 1.0}
      >>> truth = comparison.Measurement({"w": np.array([1.0, 2.0])}, settings)
      >>> print(comparison.table(comparison.compare(truth, [])))
      estimator  error  ratio  log corr.  positive  small  passes  seconds
      --------------------------------------------------------------------
      exact      0.000  1.000     1.0000       2/2  0.000       -        -
      <BLANKLINE>
      error by layer  exact
      ---------------------
      w               0.000
    """
    measures = "error", "ratio", "log corr.", "positive", "small", "passes", "seconds"
    rows = [["estimator", *measures]]
    for each in comparisons:
        rows.append(
            [
                each.name,
                f"{each.relative_error:.3f}",
                f"{each.total_ratio:.3f}",
                f"{each.log_correlation:.4f}",
                f"{each.num_positive}/{each.num_entries}",
                f"{each.share_small:.3f}",
                "-" if each.passes is None else str(each.passes),
                "-" if each.seconds is None else f"{each.seconds:.2f}",
            ]
        )
    layers = [["error by layer", *(each.name for each in comparisons)]]
    for layer in comparisons[0].layers:
        layers.append([layer, *(f"{each.layers[layer]:.3f}" for each in comparisons)])
    return f"{aligned(rows, rule=True)}\n\n{aligned(layers, rule=True)}"


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
