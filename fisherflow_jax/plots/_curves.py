"""Predicted probability against frequency, and eigenvalues by rank."""

from typing import Any

import numpy as np

from fisherflow_jax._ground import checks
from fisherflow_jax.diagnostics import eigenvalues
from fisherflow_jax.metrics import ReliabilityCurve
from fisherflow_jax.plots import _axes as axes

PyTree = Any


def reliability_diagram(
    curve: ReliabilityCurve,
    *,
    level: float = 0.9,
    label: str | None = None,
    color: Any = None,
    ax: Any = None,
) -> Any:
    r"""Draws a reliability curve beside the diagonal on which frequencies are right.

    A point is a bin; its bar is Wilson's interval of a frequency seen in as many
    examples, so that a point off the diagonal whose bar reaches it says little. Below
    the diagonal the model is overconfident. The stems at the bottom are the bins'
    shares of all examples.

    Args:
      curve: of `ff.metrics.reliability_curve`.
      level: of the bars, in (0, 1).
      label: for the legend, which is drawn when there is one.
      color: of the curve; None: the Axes' next.
      ax: matplotlib Axes; None: those of a new figure. Several curves may share them.

    Returns:
      The Axes.

    Raises:
      ImportError: if `ax` is None and matplotlib is missing.
      ValueError: for a level outside (0, 1), and a curve without examples or of several
        models (a leading axis).

    Example:
      >>> import jax.numpy as jnp
      >>> import matplotlib
      >>> matplotlib.use("agg")
      >>> from fisherflow_jax import metrics, plots
      >>> p = jnp.linspace(0.0, 1.0, 50)
      >>> curve = metrics.reliability_curve(p, p > 0.4)
      >>> print(plots.reliability_diagram(curve).get_xlabel())
      predicted probability

    References:
      Murphy, Winkler, "Reliability of subjective probability forecasts of precipitation
      and temperature", 1977.
      Wilson, "Probable inference, the law of succession, and statistical inference",
      1927.
    """
    checks.fraction(level, "level")
    confidence, accuracy, number = (np.asarray(x, float) for x in curve)
    if number.ndim != 1 or not np.nansum(number) > 0:
        raise ValueError(
            "a diagram shows one curve of at least one example; got bins of shape "
            f"{number.shape} with {np.nansum(number):g} examples."
        )
    ax = axes.axes_or_new(ax)
    filled = number > 0
    confidence, accuracy, number = (x[filled] for x in (confidence, accuracy, number))
    lower, upper = _wilson(accuracy, number, level)
    ax.plot([0, 1], [0, 1], color=axes.GREY, linestyle="--", linewidth=1, zorder=1)
    artist = ax.errorbar(
        confidence,
        accuracy,
        yerr=np.stack([accuracy - lower, upper - accuracy]),
        marker="o",
        markersize=5,
        linewidth=1.5,
        elinewidth=1,
        capsize=2,
        color=color,
        label=label,
        zorder=3,
    )
    ax.vlines(
        confidence,
        0,
        number / number.sum(),
        color=artist.lines[0].get_color(),
        alpha=0.3,
        linewidth=6,
        zorder=2,
    )
    return axes.finish(
        ax,
        label,
        "upper left",
        xlim=(-0.02, 1.02),
        ylim=(0, 1.02),
        aspect="equal",
        xlabel="predicted probability",
        ylabel="frequency (stems: share of examples)",
    )


def _wilson(share: np.ndarray, number: np.ndarray, level: float):
    from scipy.special import ndtri  # slow to import

    z2 = ndtri((1 + level) / 2) ** 2
    middle = (share + z2 / (2 * number)) / (1 + z2 / number)
    spread = share * (1 - share) / number + z2 / (4 * number**2)
    reach = np.sqrt(z2 * spread) / (1 + z2 / number)
    # at shares of 0 and 1 rounding may leave the point outside its own interval
    return np.minimum(middle - reach, share), np.maximum(middle + reach, share)


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
    ax = axes.axes_or_new(ax)
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
        ax.axhline(floor, color=axes.GREY, linestyle="--", linewidth=1, zorder=1)
    ax.set_yscale("log")
    return axes.finish(ax, label, xlabel="rank", ylabel="eigenvalue of the information")
