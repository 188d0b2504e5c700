"""The coefficient table that statisticians expect."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fisherflow_jax._ground import processes, trees
from fisherflow_jax._ground.telling import told
from fisherflow_jax.posteriors._anytime import at_all_times
from fisherflow_jax.posteriors._belief import Gaussian, gaussians
from fisherflow_jax.posteriors._coefficients import Summary
from fisherflow_jax.posteriors._intervals import interval_and_error, two_sided_tail
from fisherflow_jax.posteriors._mapping import mapped
from fisherflow_jax.posteriors._undetermined import (
    Direction,
    by_share,
    doubts,
    events,
    listed,
    parameter_shares,
    warn_determined,
    warn_of_refused,
)
from fisherflow_jax.posteriors._undetermined import (
    undetermined as undetermined_directions,
)

PyTree = Any


def summary(
    state: Any,
    names: Sequence[str] | PyTree | None = None,
    *,
    level: float = 0.95,
    robust: bool | str = False,
    undetermined: Sequence[Direction] | None = None,
    effect_scale: Any = None,
    transform: Callable[[jax.Array], jax.Array] | None = None,
) -> Summary:
    """A table of estimates, standard errors, tests and intervals.

    Args:
      state: anything with `.mean` and `.information`.
      names: one name a parameter, in ravelled order (a list, an array, or a pytree
        like the parameters); None: paths in the tree.
      level: of the intervals, in (0, 1).
      robust: with sandwich standard errors, as in `ff.standard_error`.
      undetermined: what `ff.diagnostics.undetermined` found with the data; None: what
        it finds by the state alone.
      effect_scale: adds intervals that hold at all times at once, and e-values against
        zero, as `ff.intervals.anytime`.
      transform: an increasing elementwise map of the parameters, such as `jnp.exp` for
        the rate ratios of a log link and the odds ratios of a logit. Estimates and the
        ends of intervals are mapped, and the column says so; a standard error is
        multiplied by the map's slope (the delta method); statistics and p-values are
        those of the parameters, tests that they are zero.

    Returns:
      A `Summary`, which prints as a table: name, estimate, standard error, z (or t,
      where the dispersion is estimated), two-sided p, lower, upper. Its fields are
      arrays.

    Raises:
      ValueError: if the names are not one a parameter, for a transform that is not
        increasing between the ends of an interval, and as `standard_error` does.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> flow = ff.fisher_flow(
      ...     lambda params, x: params["a"] + x * params["b"],
      ...     ff.likelihoods.gaussian(),
      ...     structure=ff.structures.full(),
      ...     memory=ff.memories.stationary(),
      ...     prior_precision=1e-6,
      ... )
      >>> x = jnp.array([-1.0, -1.0, 1.0, 1.0])
      >>> state = flow.init({"a": jnp.array(0.0), "b": jnp.array(0.0)})
      >>> state, _ = flow.update(state, (x, 1.0 + 3.0 * x))
      >>> print(ff.summary(state))
         estimate  std. error      z  P>|z|  95% lower  95% upper
      -----------------------------------------------------------
      a    1.0000      0.5000  2.000  0.046     0.0200     1.9800
      b    3.0000      0.5000  6.000  0.000     2.0200     3.9800
      -----------------------------------------------------------
      observations 4, the prior's share 0.0%
      >>> print(ff.summary(state, transform=jnp.exp).estimate.round(2))
      [ 2.72 20.09]
    """
    *columns, believed = interval_and_error(state, level, robust)
    estimate, error, lower, upper = (
        processes.on_host(trees.ravel(tree)).astype(float) for tree in columns
    )
    labels = trees.entry_names(columns[0]) if names is None else _flat(names)
    if len(labels) != len(estimate):
        raise ValueError(
            f"names must be one a parameter ({len(estimate)}); got {len(labels)}."
        )
    with np.errstate(divide="ignore", invalid="ignore"):
        statistic = estimate / error
    held = None
    if effect_scale is not None:
        log_e, low, high = (
            np.asarray(trees.ravel(tree), float)
            for tree in at_all_times(state, effect_scale, level, robust)
        )
        held = low, high, log_e
    members = gaussians(state)[1]
    # a mixture's interval is a normal one, and its members count for themselves
    one = members[0] if len(members) == 1 else Gaussian(None, None)
    spare = one.degrees_of_freedom
    p_value = two_sided_tail(statistic, spare)
    found = parameter_shares(believed)
    shares, named = (None, None) if found is None else found[:2]
    directions = tuple(undetermined or ())
    if undetermined is None and len(members) == 1:
        directions = undetermined_directions(state, labels)
    warn_of_refused(state)
    if transform is not None:
        if held is not None:
            _, low, high, _ = _mapped(transform, estimate, *held[:2])
            held = low, high, held[2]
        estimate, lower, upper, slope = _mapped(transform, estimate, lower, upper)
        error = error * slope
    wholly, some = by_share(directions, one)
    if directions:
        warn_determined(state, wholly, some, [each.share for each in some])
    elif found is not None:
        warn_determined(state, *doubts(labels, found))
    return Summary(
        names=labels,
        estimate=estimate,
        standard_error=error,
        statistic=statistic,
        p_value=p_value,
        lower=lower,
        upper=upper,
        level=level,
        notes=[
            *_notes(one, robust, shares),
            *_doubts(events(state), wholly, some),
        ],
        statistic_name="z" if spare is None else "t",
        prior_share=shares,
        determined_by_prior=named,
        undetermined=directions,
        events=events(state),
        anytime=held,
        transform=None if transform is None else told(transform),
    )


def _mapped(transform: Callable, *columns: np.ndarray) -> tuple[np.ndarray, ...]:
    """Estimates and the ends of intervals, mapped, and the map's slope at the first."""
    found = mapped(transform, *map(jnp.asarray, columns))
    return tuple(np.asarray(x, float) for x in found)


def _flat(names: Any) -> list[str]:
    """Also of arrays of strings, as data sets give their feature names."""
    return [str(name) for leaf in jax.tree.leaves(names) for name in np.ravel(leaf)]


def _notes(one: Gaussian, robust: bool | str, shares: np.ndarray | None) -> list[str]:
    parts = []
    if one.num_observations is not None:
        count = round(float(one.num_observations), 1)
        alone = "" if count else ": this is the prior"
        parts.append(f"observations {count:.12g}{alone}")
    if one.dispersion is not None and one.degrees_of_freedom is not None:
        spare = float(one.degrees_of_freedom)
        parts.append(f"dispersion {float(one.dispersion):.4g} on {spare:.1f} df")
    if one.nuisance is not None:
        error = interval_and_error(one.nuisance, 0.95, False)[1]
        for name, log in one.nuisance.mean.items():
            value = float(np.exp(log))
            parts.append(f"{name} {value:.4g} ({value * float(error[name]):.2g})")
    if robust:
        kind = "sandwich" if robust is True else robust
        parts.append(f"robust ({kind}) standard errors")
    if shares is not None:
        parts.append(f"the prior's share {shares.mean():.1%}")
    return [", ".join(parts)] if parts else []


def _doubts(
    counted: dict[str, int], wholly: Sequence[Direction], some: Sequence[Direction]
) -> list[str]:
    lines = [
        f"{name.replace('_', ' ')}: {number}"
        for name, number in counted.items()
        if number
    ]
    lines = [", ".join(lines)] if lines else []
    for how, directions in (("", wholly), (" partly", some)):
        if directions:
            lines.append(f"determined{how} by the prior: {listed(directions)}")
    return lines
