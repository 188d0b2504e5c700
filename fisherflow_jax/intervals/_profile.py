"""The profile of a likelihood: its root, the modified root, and where they end."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fisherflow_jax import information as ops
from fisherflow_jax._ground import checks, choices, search, trees
from fisherflow_jax._ground.batch import Batch
from fisherflow_jax.flow import Solution, log_prior_of
from fisherflow_jax.intervals import _stored as stored
from fisherflow_jax.intervals._combinations import Combinations, combinations
from fisherflow_jax.intervals._roots import STEPS, profiled
from fisherflow_jax.intervals._stored import Asked, Stored
from fisherflow_jax.likelihoods import Likelihood
from fisherflow_jax.model import Model
from fisherflow_jax.posteriors import two_sided

PyTree = Any

# A maximum is at infinity if the root is no larger at the end of the search.
_AT_THE_TOP = 1e-2
_KINDS = np.array(["flat", "one-sided", "bounded"])


class Profile(NamedTuple):
    """The profile of one combination of the parameters; each `()`, or `(m,)`.

    Made by `ff.intervals.profile`.

    Attributes:
      estimate: where the profile is highest: infinite where it rises without end, NaN
        where it is level on both sides.
      standard_error: Wald's, there.
      lower: where the likelihood root is the quantile; -inf: nowhere.
      upper: where it is minus that; inf: nowhere.
      modified_lower: the same of the modified root; NaN where there is none.
      modified_upper: the same of the modified root.
      quantile: of the normal, for the level.
      converged: whether the searches at the estimate, `lower` and `upper` ended, and
        nothing higher than the estimate was met.
      values: `(m,)`, values of the combination.
      root: `(m,)`, the likelihood root r there; falls from above zero to below.
      modified_root: `(m,)`, r*.
    """

    estimate: jax.Array
    standard_error: jax.Array
    lower: jax.Array
    upper: jax.Array
    modified_lower: jax.Array
    modified_upper: jax.Array
    quantile: jax.Array
    converged: jax.Array
    values: jax.Array
    root: jax.Array
    modified_root: jax.Array

    @property
    def verdict(self) -> Any:
        """ "bounded", "one-sided" or "flat": at how many ends the profile falls enough.

        Flat at both: the data say nothing of the combination at this level.
        """
        finite = [np.isfinite(x).astype(int) for x in (self.lower, self.upper)]
        found = _KINDS[finite[0] + finite[1]]
        return found if np.ndim(found) else str(found)


def profile(
    state: Any,
    apply_fn: Callable,
    likelihood: Likelihood,
    batches: Any,
    contrast: PyTree | str | Callable,
    *,
    level: float = 0.95,
    log_prior: Callable[[PyTree], jax.Array] | None = None,
    num_points: int = 21,
    bad_rows: str = "raise",
    to_batch: Callable[[Any], Any] | None = None,
) -> Profile:
    r"""The profile likelihood of a combination, its interval, and its verdict.

    .. math:: r(\psi) = \mathrm{sign}(\hat\psi - \psi)
       \sqrt{2 (\ell(\hat\theta) - \ell(\hat\theta_\psi))}, \qquad
       r^* = r + \frac1r \log \frac{q}{r}, \quad
       q = (\hat\psi - \psi) \Big( \frac{|I(\hat\theta)|}
       {|I_{\lambda\lambda}(\hat\theta_\psi)|} \Big)^{1/2}

    with :math:`\hat\theta_\psi` the highest point of the likelihood where
    :math:`c^\top \theta = \psi`, and :math:`\lambda` the parameters beside
    :math:`\psi`. r is standard normal to the order :math:`1/\sqrt n`, whatever the
    parameterisation; r* to :math:`n^{-3/2}`, in the canonical parameter of an
    exponential family alone: elsewhere, with a log-prior, and where the estimate is not
    finite, it is NaN.

    Args:
      state: anything with `.mean` and `.information`, such as after the stream: where
        the search begins, and on which scale; its prior does not count.
      apply_fn: `(params, inputs) -> outputs`, of any kind.
      likelihood: from `ff.likelihoods`, with nothing unknown.
      batches: all rows, as of `ff.intervals.corrected`.
      contrast: one combination, as of `ff.intervals.corrected`.
      level: of the interval, in (0, 1).
      log_prior: a function of the parameters that returns a number, added to the
        log-likelihood. `ff.geometry.jeffreys(metric)` takes most of the bias, and keeps
        the estimate finite for separated classes, with any link.
      num_points: of `values`, `root` and `modified_root`, which `ff.plots.profile`
        draws; 0 saves their time.
      bad_rows: as of `ff.intervals.corrected`.
      to_batch: makes a batch of what a loader gives, if it is none.

    Returns:
      A `Profile`, its `verdict` "bounded", "one-sided" or "flat". An end is sought as
      far as a thousand of the state's standard errors times the quantile. Cost: a
      constrained fit, of some five steps, for each of about seven trial values an end,
      and for each point.

    Raises:
      ValueError: for an unknown dispersion, a contrast of several values, and as the
        arguments say.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> model = lambda params, x: x @ params, ff.likelihoods.bernoulli()
      >>> x = jnp.stack([jnp.ones(12), jnp.linspace(-2.0, 2.0, 12)], 1)
      >>> y = (x[:, 1] > 0).astype(float)  # separated
      >>> flow = ff.fisher_flow(*model)
      >>> state = ff.warm_start(flow, flow.init(jnp.zeros(2)), (x, y))
      >>> found = ff.intervals.profile(state, *model, (x, y), "theta[1]")
      >>> print(found.verdict, found.lower.round(2), found.upper)
      one-sided 2.3 inf

    References:
      Venzon, Moolgavkar, "A method for computing profile-likelihood-based confidence
      intervals", 1988.
      Barndorff-Nielsen, "Inference on full or partial parameters based on the
      standardized signed log likelihood ratio", 1986.
      Davison, "Approximate conditional inference in generalized linear models", 1988.
    """
    model = Model(apply_fn, likelihood)
    belief = stored.believed(state, likelihood)
    if num_points:
        checks.whole(num_points, "num_points", 2)
    asked, _ = combinations(contrast, belief.mean)
    if len(asked.rows) != 1:
        raise ValueError(
            f"a profile is of one combination, and this contrast has {len(asked.rows)} "
            "values: name one entry, such as 'weight[0]'."
        )
    quantile = two_sided(level, None, trees.float_dtype(belief.mean))
    rows = stored.together(
        stored.rows_of(model, belief.mean, batches, bad_rows, to_batch)
    )
    prior = None if log_prior is None else log_prior_of(log_prior, belief.mean)
    run, arrays = (None, None) if prior is None else prior
    own = choices.shared(Asked(model, run, num_points))
    given = belief.mean, belief.information, rows, asked, quantile
    return choices.run(own, _profile, *given, arrays)


def _profile(
    own: Asked,
    mean: PyTree,
    information: Any,
    batch: Batch,
    asked: Combinations,
    quantile: jax.Array,
    arrays: Any,
) -> Profile:
    rows = Stored.of(own, mean, batch, arrays)
    row, offset = asked.rows[0], asked.offsets[0]
    start = trees.ravel(mean)
    along = trees.ravel(ops.solve(information, trees.unravel(row, mean)))
    error = jnp.sqrt(row @ along)
    center = row @ start

    best = stored.highest(rows.log_density, rows.information, start, STEPS)
    at = profiled(rows, row, start, along / error, best)
    reach = quantile * error

    def sought(side: jax.Array, modified: jax.Array) -> search.Crossing:
        """The end at a side, of the one root or of the other."""

        def evaluate(value: jax.Array) -> tuple[jax.Array, jax.Array]:
            point = at(value)
            root = jnp.where(modified, point.modified, point.root)
            return -side * root - quantile, -side * point.slope

        return search.crossing(evaluate, row @ best.mean, center, side * reach)

    sides = jnp.asarray([-1, 1, -1, 1], start.dtype)
    ends = jax.vmap(sought)(sides, jnp.asarray([False, False, True, True]))
    # the root where the search gave up, from above to below
    left = -sides[:2] * (ends.last[:2] + quantile)
    high = jnp.isinf(ends.point[:2]) & (jnp.abs(left) < _AT_THE_TOP)
    estimate = jnp.where(high[0], -jnp.inf, row @ best.mean)
    estimate = jnp.where(high[1], jnp.where(high[0], jnp.nan, jnp.inf), estimate)
    is_modified = _is_modified(rows, best, row) & jnp.isfinite(estimate)

    def kept(x: jax.Array) -> jax.Array:
        return jnp.where(is_modified, x, jnp.nan)

    span = _span(ends.point[:2], estimate, center, reach)
    values = jnp.linspace(*span, own.num_points, dtype=start.dtype)
    found = jnp.isfinite(ends.point[:2])
    points = jax.vmap(at)(
        jnp.concatenate([jnp.where(found, ends.point[:2], center), values])
    )
    # a search that fails leaves a step in the root, and no crossing
    missed = jnp.abs(points.root[:2] + sides[:2] * quantile) > _AT_THE_TOP
    ended = points.ended[:2] & ~missed
    ended = jnp.all(ended | ~found) & jnp.all(points.below)
    factors = ops.regularised(best.information, start)
    return Profile(
        estimate=estimate + offset,
        standard_error=jnp.sqrt(row @ factors.divide(row)),
        lower=ends.point[0] + offset,
        upper=ends.point[1] + offset,
        modified_lower=kept(ends.point[2]) + offset,
        modified_upper=kept(ends.point[3]) + offset,
        quantile=quantile,
        converged=((best.unfinished == 0) | jnp.any(high)) & ended,
        values=values + offset,
        root=points.root[2:],
        modified_root=kept(points.modified[2:]),
    )


def _is_modified(rows: Stored, best: Solution, row: jax.Array) -> jax.Array:
    """Whether the modified root is what it says."""
    if rows.log_prior is not None:
        return jnp.array(False)
    at, factors = best.mean, ops.regularised(best.information, best.mean)
    canonical = rows.is_canonical(at, factors.divide(row))
    return canonical & stored.determines_all(best.information, at)


def _span(
    ends: jax.Array, estimate: jax.Array, center: jax.Array, reach: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """From somewhat below the interval to somewhat above, both finite."""
    middle = jnp.where(jnp.isfinite(estimate), estimate, center)
    known, sides = jnp.isfinite(ends), jnp.asarray([-1, 1], ends.dtype)
    # beyond the one end as far as it takes to see the other side
    other = jnp.where(known[::-1], ends[::-1], middle)
    wide = jnp.maximum(reach, jnp.abs(other - middle))
    low, high = jnp.where(known, ends, other + 2 * sides * wide)
    rim = 0.1 * (high - low)
    return low - rim, high + rim
