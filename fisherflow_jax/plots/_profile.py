"""The profile of a likelihood, by its roots."""

from typing import Any

import numpy as np

from fisherflow_jax.plots import _axes as axes


def profile(profile: Any, *, name: str = "value", ax: Any = None) -> Any:
    """Draws the roots of a profile over its values, and the interval between them.

    The likelihood root falls from above zero to below; for a normal likelihood it is
    the straight line that Wald's interval takes it for, drawn thin. It meets the
    normal quantiles (dotted) at the ends of the interval; the modified root does so,
    where there is one.

    Args:
      profile: from `ff.intervals.profile`, with points.
      name: of the combination, below the axis.
      ax: matplotlib Axes; None: those of a new figure.

    Returns:
      The Axes, the verdict being its title.

    Raises:
      ImportError: if `ax` is None and matplotlib is missing.
      ValueError: for a profile without points, or several stacked.

    Example:
      >>> import jax.numpy as jnp
      >>> import matplotlib
      >>> matplotlib.use("agg")
      >>> import fisherflow_jax as ff
      >>> model = lambda params, x: x * params, ff.likelihoods.poisson()
      >>> flow = ff.fisher_flow(*model)
      >>> batch = jnp.ones(4), jnp.array([1.0, 2.0, 0.0, 3.0])
      >>> state, _ = flow.update(flow.init(jnp.zeros(())), batch)
      >>> found = ff.intervals.profile(state, *model, batch, "theta")
      >>> ax = ff.plots.profile(found, name="log rate")
      >>> print(ax.get_title())
      bounded
    """
    values = np.asarray(profile.values, float)
    if values.ndim != 1 or len(values) < 2:
        raise ValueError(
            "a plot is of one profile with points (num_points= of "
            f"ff.intervals.profile); got values of shape {values.shape}."
        )
    root, modified = (
        axes.same_shape(name, part, values.shape)
        for name, part in (
            ("root", profile.root),
            ("modified_root", profile.modified_root),
        )
    )
    ax, quantile = axes.axes_or_new(ax), float(profile.quantile)
    for level in (-quantile, quantile):
        ax.axhline(level, color=axes.GREY, linestyle=":", linewidth=1, zorder=1)
    ax.axhline(0, color=axes.GREY, linewidth=1, zorder=1)
    (line,) = ax.plot(values, root, label="likelihood root", zorder=4)
    if np.isfinite(profile.estimate) and np.isfinite(profile.standard_error):
        straight = (float(profile.estimate) - values) / float(profile.standard_error)
        ax.plot(values, straight, color=axes.GREY, linewidth=1, label="Wald", zorder=2)
    if np.isfinite(modified).any():
        ax.plot(values, modified, "--", label="modified root", zorder=3)
    for end in (profile.lower, profile.upper):
        if np.isfinite(end):
            ax.axvline(float(end), color=line.get_color(), linewidth=1, alpha=0.5)
    ax.set_ylim(-2 * quantile, 2 * quantile)
    ax.set_title(profile.verdict)
    return axes.finish(ax, "roots", xlabel=name, ylabel="root")
