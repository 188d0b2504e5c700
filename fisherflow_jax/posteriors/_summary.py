"""The coefficient table that statisticians expect."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from scipy import stats

from fisherflow_jax._ground import trees
from fisherflow_jax.posteriors._intervals import (
    confidence_interval,
    degrees_of_freedom_of,
    dispersion_of,
    standard_error,
)

PyTree = Any


@dataclass(frozen=True)
class Summary:
    """A coefficient table; `print` shows it, the fields hold its columns."""

    names: list[str]
    estimate: np.ndarray
    standard_error: np.ndarray
    statistic: np.ndarray
    p_value: np.ndarray
    lower: np.ndarray
    upper: np.ndarray
    level: float
    notes: list[str]
    statistic_name: str  # "z", or "t" where the dispersion is estimated

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
        widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
        lines = [
            "  ".join(
                cell.ljust(width) if i == 0 else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in [head, *rows]
        ]
        rule = "-" * max(len(line) for line in lines)
        return "\n".join([lines[0], rule, *lines[1:], rule, *self.notes])

    __repr__ = __str__


def summary(
    state: Any,
    names: Sequence[str] | PyTree | None = None,
    *,
    level: float = 0.95,
    robust: bool = False,
) -> Summary:
    """A table of estimates, standard errors, tests and intervals.

    Args:
      state: anything with `.mean` and `.information`.
      names: one name a parameter, in ravelled order (a list, an array, or a pytree
        like the parameters); None: paths in the tree.
      level: of the intervals, in (0, 1).
      robust: with sandwich standard errors.

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
      observations 4
    """
    lower, upper = confidence_interval(state, level, robust)
    columns = [
        np.asarray(trees.ravel(tree), float)
        for tree in (state.mean, standard_error(state, robust), lower, upper)
    ]
    estimate, error, lower, upper = columns
    labels = _paths(state.mean) if names is None else _flat(names)
    if len(labels) != len(estimate):
        raise ValueError(
            f"names must be one a parameter ({len(estimate)}); got {len(labels)}."
        )
    with np.errstate(divide="ignore", invalid="ignore"):
        statistic = estimate / error
    spare = degrees_of_freedom_of(state)
    if spare is None:
        p_value = 2 * stats.norm.sf(np.abs(statistic))
    else:
        p_value = 2 * stats.t.sf(np.abs(statistic), float(spare))
    return Summary(
        labels,
        estimate,
        error,
        statistic,
        p_value,
        lower,
        upper,
        level,
        _notes(state, robust),
        "z" if spare is None else "t",
    )


def _number(value: float) -> str:
    """Four decimals, or four digits where that would show none or too many."""
    plain = value == 0 or 1e-3 <= abs(value) < 1e5
    return f"{value:.4f}" if plain else f"{value:.4g}"


def _flat(names: Any) -> list[str]:
    """Also of arrays of strings, as data sets give their feature names."""
    return [str(name) for leaf in jax.tree.leaves(names) for name in np.ravel(leaf)]


def _paths(tree: PyTree) -> list[str]:
    labels = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        if leaf.ndim == 0:
            labels.append(name or "theta")
            continue
        for index in np.ndindex(leaf.shape):
            place = ",".join(str(i) for i in index)
            labels.append(f"{name or 'theta'}[{place}]")
    return labels


def _notes(state: Any, robust: bool) -> list[str]:
    parts = []
    count = getattr(state, "count", None)
    if count is not None and not callable(count):  # every tuple has a method `count`
        parts.append(f"observations {round(float(count), 1):.12g}")
    dispersion = dispersion_of(state)
    spare = degrees_of_freedom_of(state)
    if dispersion is not None and spare is not None:
        parts.append(f"dispersion {float(dispersion):.4g} on {float(spare):.1f} df")
    if robust:
        parts.append("robust (sandwich) standard errors")
    return [", ".join(parts)] if parts else []
