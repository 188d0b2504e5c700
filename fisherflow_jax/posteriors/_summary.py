"""The coefficient table that statisticians expect."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from fisherflow_jax._ground import processes, tables, trees
from fisherflow_jax.posteriors._anytime import at_all_times
from fisherflow_jax.posteriors._belief import Gaussian, gaussians
from fisherflow_jax.posteriors._intervals import interval_and_error
from fisherflow_jax.posteriors._undetermined import (
    Direction,
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


@dataclass(frozen=True)
class Summary:
    """A coefficient table; `print` shows it, the fields hold its columns.

    Attributes:
      names: one a row.
      estimate, standard_error, statistic, p_value, lower, upper: a number a row.
      level: of the intervals.
      notes: lines below the table.
      statistic_name: "z", or "t" where the dispersion is estimated.
      prior_share: posterior over prior variance, a number a row; None: no prior is
        known, or there are no data.
      determined_by_prior: the rows that say so, booleans; None as above.
      undetermined: the directions that the prior determines, `Direction`s.
      anytime: with `effect_scale`: the ends of the always-valid intervals and the
        logarithms of the e-values against zero, `(lower, upper, log_e_value)`.
      events: what the state counted, by name: `batches_refused`, `rows_skipped`,
        `solves_regularised`, `searches_unfinished`; of a mixture the most of a member.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> state = ff.posterior(
      ...     jnp.array([2.0]),
      ...     ff.structures.Full(jnp.array([[99.0]])),
      ...     prior_precision=1.0,
      ... )
      >>> table = ff.summary(state, names=["dose"])
      >>> print(table.names, table.estimate, table.statistic.round(1))
      ['dose'] [2.] [20.]
    """

    names: list[str]
    estimate: np.ndarray
    standard_error: np.ndarray
    statistic: np.ndarray
    p_value: np.ndarray
    lower: np.ndarray
    upper: np.ndarray
    level: float
    notes: list[str]
    statistic_name: str
    prior_share: np.ndarray | None
    determined_by_prior: np.ndarray | None
    undetermined: tuple[Direction, ...]
    events: dict[str, int]
    anytime: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None

    def __str__(self) -> str:
        percent = f"{100 * self.level:g}%"
        head = ["", "estimate", "std. error", self.statistic_name]
        head += [f"P>|{self.statistic_name}|", f"{percent} lower", f"{percent} upper"]
        rows = [
            [name, *(_number(x) for x in values[:2]), f"{values[2]:.3f}",
             f"{values[3]:.3f}", *(_number(x) for x in values[4:])]
            for name, *values in zip(
                self.names, self.estimate, self.standard_error, self.statistic,
                self.p_value, self.lower, self.upper, strict=True,
            )
        ]  # fmt: skip
        named = self.determined_by_prior
        if named is not None and named.any() and self.prior_share is not None:
            head.append("prior")
            for row, is_named, share in zip(rows, named, self.prior_share, strict=True):
                row.append(f"{share:.2g}" if is_named else "")
        if self.anytime is not None:
            head += ["any time lower", "any time upper", "e-value"]
            for row, low, high, log in zip(rows, *self.anytime, strict=True):
                row += [_number(low), _number(high), f"{np.exp(min(log, 700)):.3g}"]
        table = tables.aligned([head, *rows], rule=True)
        return "\n".join([table, table.splitlines()[1], *self.notes])

    __repr__ = __str__


def summary(
    state: Any,
    names: Sequence[str] | PyTree | None = None,
    *,
    level: float = 0.95,
    robust: bool | str = False,
    undetermined: Sequence[Direction] | None = None,
    effect_scale: Any = None,
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

    Returns:
      A `Summary`, which prints as a table: name, estimate, standard error, z (or t,
      where the dispersion is estimated), two-sided p, lower, upper. Its fields are
      arrays.

    Raises:
      ValueError: if the names are not one a parameter, and as `standard_error` does.

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
    """
    from scipy import special

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
    spare, below = one.degrees_of_freedom, -np.abs(statistic)
    tail = special.ndtr(below) if spare is None else special.stdtr(float(spare), below)
    shares, named = parameter_shares(believed) or (None, None)
    directions = tuple(undetermined or ())
    if undetermined is None and len(members) == 1:
        directions = undetermined_directions(state, labels)
    warn_of_refused(state)
    rows = np.flatnonzero(False if named is None else named)
    warn_determined(state, directions or [labels[row] for row in rows])
    return Summary(
        names=labels,
        estimate=estimate,
        standard_error=error,
        statistic=statistic,
        p_value=2 * tail,
        lower=lower,
        upper=upper,
        level=level,
        notes=[
            *_notes(one, robust, shares),
            *_doubts(events(state), directions),
        ],
        statistic_name="z" if spare is None else "t",
        prior_share=shares,
        determined_by_prior=named,
        undetermined=directions,
        events=events(state),
        anytime=held,
    )


def _number(value: float) -> str:
    """Four decimals, or four digits where that would show none or too many."""
    plain = value == 0 or 1e-3 <= abs(value) < 1e5
    return f"{value:.4f}" if plain else f"{value:.4g}"


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


def _doubts(counted: dict[str, int], directions: Sequence[Direction]) -> list[str]:
    lines = [
        f"{name.replace('_', ' ')}: {number}"
        for name, number in counted.items()
        if number
    ]
    lines = [", ".join(lines)] if lines else []
    if directions:
        lines.append(f"determined by the prior: {listed(directions)}")
    return lines
