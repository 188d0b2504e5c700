"""Where two parameters may be together."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fisherflow_jax import information as ops
from fisherflow_jax._ground import checks, trees
from fisherflow_jax.plots import _axes as axes
from fisherflow_jax.posteriors import Gaussian, gaussian

PyTree = Any


def information_ellipse(
    state: Any,
    names: Any = None,
    *,
    level: float | None = 0.95,
    label: str | None = None,
    color: Any = None,
    ax: Any = None,
) -> Any:
    r"""Draws the ellipse of two parameters, all others being free.

    .. math:: (\theta - \hat\theta)^\top C^{-1} (\theta - \hat\theta) = r^2, \qquad
       C = \text{the two rows and columns of } I^{-1}

    with :math:`r^2 = -2 \log(1 - \text{level})`, the quantile of chi-square with two
    degrees of freedom; where the dispersion is estimated, twice that of F. The two rows
    of I itself, and not of its inverse, would hold the others fixed.

    Args:
      state: anything with `.mean` and `.information`, such as a flow's state or a
        posterior; or an information, drawn around zero.
      names: two entries' names, such as `["w[0]", "b"]`; None: of two parameters.
      level: of the region, in (0, 1); None: r = 1, of a metric its unit ball.
      label: for the legend, which is drawn when there is one.
      color: of the line; None: the Axes' next.
      ax: matplotlib Axes; None: those of a new figure. Several ellipses may share them.

    Returns:
      The Axes. Cost: two solves with the information.

    Raises:
      ImportError: if `ax` is None and matplotlib is missing.
      TypeError: for a mixture, which has no ellipse, and an information that stores no
        shapes.
      ValueError: for other than two names, one that no entry has, a level outside
        (0, 1), or a covariance of the two that is not positive definite.

    Example:
      >>> import jax.numpy as jnp
      >>> import matplotlib
      >>> matplotlib.use("agg")
      >>> import fisherflow_jax as ff
      >>> metric = ff.structures.Full(jnp.array([[3.0, 1.0], [1.0, 1.5]]))
      >>> ax = ff.plots.information_ellipse(metric, level=None)
      >>> points = ax.lines[0].get_xydata()
      >>> print(bool((abs(((points @ metric.rows) * points).sum(1) - 1) < 1e-5).all()))
      True
    """
    if level is not None:
        checks.fraction(level, "level")
    about = _about(state)
    entries = trees.entry_names(about.mean)
    chosen = _chosen(names, entries)
    middle = np.asarray(trees.ravel(about.mean), float)[chosen]
    units = np.zeros((2, len(entries)))
    units[np.arange(2), chosen] = 1
    rows = trees.unravel(jnp.asarray(units, trees.float_dtype(about.mean)), about.mean)
    solve = ops.solver(about.information)
    block = np.asarray(trees.ravel(jax.vmap(solve)(rows), 1), float)[:, chosen]
    if about.dispersion is not None:
        block = block * float(about.dispersion)
    if not (np.all(np.isfinite(block)) and np.linalg.eigvalsh(block).min() > 0):
        raise ValueError(
            f"the covariance of {entries[chosen[0]]} and {entries[chosen[1]]} is not "
            f"positive definite: {block.tolist()}."
        )
    turn = np.linspace(0, 2 * np.pi, 201)
    circle = np.stack([np.cos(turn), np.sin(turn)])
    root = np.linalg.cholesky((block + block.T) / 2)
    points = middle[:, None] + _radius(level, about) * root @ circle
    ax = axes.axes_or_new(ax)
    (line,) = ax.plot(*points, color=color, label=label, linewidth=1.5)
    ax.plot(*middle, "+", color=line.get_color())
    texts = {"xlabel": entries[chosen[0]], "ylabel": entries[chosen[1]]}
    return axes.finish(ax, label, **texts)


def _about(state: Any) -> Gaussian:
    if not ops.is_information(state):
        return gaussian(state)
    like = ops.shapes(state, None)
    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)
    return Gaussian(mean=zero, information=ops.plain(state))


def _chosen(names: Any, entries: list[str]) -> list[int]:
    names = [names] if isinstance(names, str) else names
    names = entries if names is None else [str(name) for name in names]
    missing = [name for name in names if name not in entries]
    if len(names) != 2 or names[0] == names[1] or missing:
        more = " and more" if len(entries) > 10 else ""
        raise ValueError(
            "an ellipse is of two entries: give names=, two of "
            f"{entries[:10]}{more}; got {names[:10]}."
        )
    return [entries.index(name) for name in names]


def _radius(level: float | None, about: Gaussian) -> float:
    if level is None:
        return 1.0
    tail, spare = math.log1p(-level), about.degrees_of_freedom
    if spare is None:
        return math.sqrt(-2 * tail)
    # twice the quantile of F with 2 and nu degrees of freedom, which has a closed form
    return math.sqrt(float(spare) * math.expm1(-2 * tail / float(spare)))
