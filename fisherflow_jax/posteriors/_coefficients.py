"""A coefficient table: as text, as HTML, as a data frame."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from fisherflow_jax._ground import tables
from fisherflow_jax.posteriors._undetermined import Direction

# Of a longer table, rows at its head and as many at its tail are printed.
_MOST_ROWS, _ENDS = 40, 10


@dataclass(frozen=True)
class Summary:
    """A coefficient table; `print` shows it, the fields hold its columns.

    Of more than 40 rows the first and last 10 are printed; `to_frame()` has all.

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
      transform: the name of the map that estimates and ends went through, which stands
        over their columns; None: they are the parameters' own.

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
    transform: str | None = None

    def __str__(self) -> str:
        head, rows = self._head(), self._rows(self._shown)
        lines = tables.aligned([head, *rows], rule=True).splitlines()
        if self._left_out:
            lines.insert(2 + _ENDS, self._rest())
        return "\n".join([*lines, lines[1], *self.notes])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        """As notebooks show it."""
        rows = self._rows(self._shown)
        if self._left_out:
            rows = [*rows[:_ENDS], [self._rest()], *rows[_ENDS:]]
        return tables.html(self._head(), rows, self.notes)

    def to_frame(self) -> Any:
        """All rows as a `pandas.DataFrame`, one a parameter, indexed by their names.

        The columns are `estimate`, `standard_error`, `statistic`, `p_value`, `lower`
        and `upper`; with a transform called `exp` the first is `exp(estimate)`, and so
        are the ends. Then `prior_share`, and `anytime_lower`, `anytime_upper` and
        `log_e_value`, where they are known.

        Raises:
          ImportError: without pandas.
        """
        try:
            import pandas
        except ImportError as error:
            raise ImportError(
                "Summary.to_frame makes a pandas.DataFrame, and pandas is not "
                'installed: pip install "fisherflow-jax[pandas]". The columns are '
                "fields too, such as summary.estimate."
            ) from error
        columns: dict[str, Any] = {
            self._over("estimate"): self.estimate,
            "standard_error": self.standard_error,
            "statistic": self.statistic,
            "p_value": self.p_value,
            self._over("lower"): self.lower,
            self._over("upper"): self.upper,
        }
        if self.prior_share is not None:
            columns["prior_share"] = self.prior_share
        if self.anytime is not None:
            ends = self._over("anytime_lower"), self._over("anytime_upper")
            columns |= dict(zip((*ends, "log_e_value"), self.anytime, strict=True))
        return pandas.DataFrame(columns, index=pandas.Index(self.names, name="name"))

    @property
    def _left_out(self) -> int:
        count = len(self.names)
        return count - 2 * _ENDS if count > _MOST_ROWS else 0

    @property
    def _shown(self) -> list[int]:
        rows = [*range(len(self.names))]
        return [*rows[:_ENDS], *rows[-_ENDS:]] if self._left_out else rows

    @property
    def _tells_prior(self) -> bool:
        named = self.determined_by_prior
        return named is not None and bool(named.any()) and self.prior_share is not None

    def _rest(self) -> str:
        return f"... {self._left_out:,} more; to_frame() has all"

    def _over(self, column: str) -> str:
        return column if self.transform is None else f"{self.transform}({column})"

    def _head(self) -> list[str]:
        percent = f"{100 * self.level:g}%"
        head = ["", self._over("estimate"), "std. error", self.statistic_name]
        head += [f"P>|{self.statistic_name}|"]
        head += [f"{percent} lower", f"{percent} upper"]
        if self._tells_prior:
            head.append("prior")
        if self.anytime is not None:
            head += ["any time lower", "any time upper", "e-value"]
        return head

    def _rows(self, shown: Iterable[int]) -> list[list[str]]:
        return [[self.names[row], *self._cells(row)] for row in shown]

    def _cells(self, row: int) -> Iterator[str]:
        yield _number(self.estimate[row])
        yield _number(self.standard_error[row])
        yield f"{self.statistic[row]:.3f}"
        yield f"{self.p_value[row]:.3f}"
        yield _number(self.lower[row])
        yield _number(self.upper[row])
        if self._tells_prior:
            named, share = self.determined_by_prior, self.prior_share
            yield f"{share[row]:.2g}" if named[row] else ""  # type: ignore[index]
        if self.anytime is not None:
            low, high, log = (column[row] for column in self.anytime)
            yield _number(low)
            yield _number(high)
            yield f"{np.exp(min(log, 700)):.3g}"


def _number(value: float) -> str:
    """Four decimals, or four digits where that would show none or too many."""
    plain = value == 0 or 1e-3 <= abs(value) < 1e5
    return f"{value:.4f}" if plain else f"{value:.4g}"
