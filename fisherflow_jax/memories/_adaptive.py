"""Everything since the last change: a two-sample test at each update."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fisherflow_jax import information as ops
from fisherflow_jax._ground import checks, choices, linalg, trees
from fisherflow_jax.memories._memory import Belief, Memory, Sum, total
from fisherflow_jax.memories._windowed import Window, empty_window, push
from fisherflow_jax.structures.capabilities import ADAPTIVE

# The tests of neighbouring windows and updates are dependent. The tail probability of
# one test that gives a run length L is c / L; simulated over 1 to 20 parameters and run
# lengths of 500 to 2000, c is 0.22 to 0.33.
_TAIL = 0.25

PyTree = Any


class Segment(NamedTuple):
    """The last sites, and how long ago the last change was."""

    window: Window
    length: jax.Array  # () int32, updates since the last cut


class ChangeReport(NamedTuple):
    """What an adaptive memory says of an update, in `info.memory`.

    Made by `ff.memories.adaptive`.
    """

    alarm: jax.Array  # () bool
    statistic: jax.Array  # () of the window furthest above its threshold; NaN: none
    threshold: jax.Array  # () an alarm is a statistic above it
    change_point: jax.Array  # () int32, index of the first update after the change; -1


@choices.choice
def adaptive(
    average_run_length: float = 5000.0, *, size: int = 64, guard: int = 10
) -> Memory:
    r"""Remembers everything since the last change, which it finds by itself.

    At each update the newest `w = 1, 2, 4, ..., size` batches are tested against all
    before them, by the two-sample Wald statistic

    .. math:: T_w = (\theta_w - \theta_r)^\top (I_w^{-1} + I_r^{-1})^{-1}
       (\theta_w - \theta_r) \sim \chi^2_d,

    computed from the score of the window at the rest's estimate: divided by the
    estimated dispersion, if that is unknown; with the sandwich variance of both, if the
    flow is built with `robust=True` (without it, overdispersed counts raise false
    alarms). A window whose information is singular (redundant columns, dummies that sum
    to the intercept) is tested along what it determines, with its rank in place of d.
    An alarm is raised when a statistic
    exceeds the quantile that gives `average_run_length` updates between false alarms;
    the belief is then cut to the window that raised it and the prior: what came after
    the change is kept, what came before is dropped. Made for jumps; for continuous
    drift use `ff.bank` or `random_walk`.

    Args:
      average_run_length: mean number of updates between false alarms.
      size: batches kept; windows of the powers of two up to it are tested.
      guard: batches that must lie before a window for it to be tested.

    Returns:
      A `Memory` whose `info.memory` is a `ChangeReport` (alarm, statistic, threshold,
      change_point: the index of an update, counted from the first with the warm start
      included).
      Storage: `size` sites; cost: log2(size) solves an update, with `robust=True` or
      singular windows eigenvectors too. Full structure only:
      elsewhere the statistic is not chi-square.

    Raises:
      ValueError: for a run length of at most 1, a size below 1, a negative guard; when
        the flow is built with another structure.

    Example:
      >>> import fisherflow_jax as ff
      >>> ff.memories.adaptive(1000).name
      'adaptive(1000)'

    References:
      Willsky, Jones, "A generalized likelihood ratio approach to the detection and
      estimation of jumps in linear systems", 1976.
      Lai, "Sequential changepoint detection in quality control and dynamical systems",
      1995.
    """
    if not average_run_length > 1:
        raise ValueError(
            f"average_run_length must be above 1 update; got {average_run_length}."
        )
    checks.whole(size, "size")
    checks.whole(guard, "guard", least=0)
    widths = [1 << k for k in range(size.bit_length()) if 1 << k <= size]

    def init(zeros: Sum) -> Segment:
        return Segment(empty_window(zeros, size), jnp.zeros((), jnp.int32))

    def remember(storage: Segment, belief: Belief, site: Sum):
        window = push(storage.window, belief, site, size)
        length = storage.length + 1
        dimension = trees.size(belief.mean)

        age = (window.head - 1 - jnp.arange(size, dtype=jnp.int32)) % size
        width = jnp.asarray(widths, jnp.int32)
        newest = (age[None, :] < width[:, None]).astype(site.weight.dtype)
        sums = jax.vmap(lambda weights: total(window.sites, weights))(newest)
        # one by one, so that only a window without full rank takes eigenvectors
        values, ranks = jax.lax.map(
            lambda s: _statistic(s, belief, window.reference), sums
        )
        quantiles = _quantiles(dimension, _TAIL / average_run_length)
        thresholds = jnp.asarray(quantiles, values.dtype)[ranks]
        # too few observations leave the window's information singular
        testable = (width <= length - guard) & (sums.weight >= 2 * dimension)
        testable = testable & jnp.isfinite(values) & (ranks > 0)
        excess = jnp.where(testable, values - thresholds, -jnp.inf)

        best = jnp.argmax(excess)
        alarm = excess[best] > 0
        statistic = jnp.where(jnp.any(testable), values[best], jnp.nan)
        chosen = jax.tree.map(lambda x: x[best], sums)
        cut = belief.replaced_by(chosen, window.reference)
        belief = optax.tree.where(alarm, cut, belief)
        change = jnp.where(alarm, window.head - width[best], -1)
        length = jnp.where(alarm, width[best], length)
        report = ChangeReport(
            alarm=alarm,
            statistic=statistic,
            threshold=thresholds[best],
            change_point=change,
        )
        return Segment(window, length), belief, report

    return Memory(
        name=f"adaptive({average_run_length})",
        init=init,
        predict=lambda storage, believed, batch, like: believed,
        remember=remember,
        needs={
            ADAPTIVE: "its statistic is chi-square only with the full structure. Where "
            "that is too large, watch some parameters: ff.only(apply_fn, params, "
            "chosen), such as a last layer, with structure=ff.structures.full()."
        },
    )


def _quantiles(most: int, tail: float) -> np.ndarray:
    """Of chi-square, with none up to so many degrees of freedom."""
    from scipy.special import chdtri  # a fifth of the package's import

    return chdtri(np.arange(most + 1), tail)


def _statistic(
    window: Sum, belief: Belief, origin: PyTree
) -> tuple[jax.Array, jax.Array]:
    """The Wald statistic of a window against everything before it, and its rank."""
    information, sums, shift = window.curvature, belief.sums, window.linear.vector
    rest = ops.add(sums.curvature, ops.scale(information, -1.0))
    offset = optax.tree.sub(belief.mean, origin)
    rest_shift = optax.tree.sub(ops.matvec(sums.curvature, offset), shift)
    divide = ops.regularised(rest, origin).divide
    score = optax.tree.sub(shift, ops.matvec(information, divide(rest_shift)))
    if sums.quadratic:
        return _robust_statistic(window, divide, score, sums)
    # (I_w + I_w I_r^-1 I_w)^+ = I_w^+ I_r I^-1 for a score, which I_w spans
    filled, hidden = ops.resolved(information, origin)
    size = trees.size(origin)
    rank = size - jnp.round(jnp.sum(trees.ravel(hidden))).astype(jnp.int32)
    inner = ops.regularised(sums.curvature, origin).divide(score)
    statistic = trees.dot(ops.solve(filled, score), ops.matvec(rest, inner))
    if sums.linear is None:
        return statistic, rank
    # by the estimated dispersion: of the data alone, wherever the prior is centred
    return statistic * (sums.weight - size) / sums.linear.own, rank


def _robust_statistic(
    window: Sum, divide: Callable, score: PyTree, sums: Sum
) -> tuple[jax.Array, jax.Array]:
    """The same with the sandwich variance of both estimates.

    The scores of a short window alone say too little of their variance, so that of all
    observations is taken, in proportion to each side's.
    """
    share = window.weight / sums.weight
    meat = ops.to_dense(ops.plain(*sums.quadratic), score)
    matrix, scales = linalg.equilibrated(ops.to_dense(window.curvature, score))
    values, basis = linalg.eigh(matrix)
    seen = values > len(matrix) * float(jnp.finfo(matrix.dtype).eps)
    basis = jnp.where(seen[None, :], basis, 0)
    # the difference of the estimates along what the window determines, and its variance
    own = basis / (scales[:, None] * jnp.where(seen, values, 1)[None, :])
    gap = trees.ravel(score) @ own
    along = trees.unravel((basis * scales[:, None]).T, score)
    other = trees.ravel(jax.vmap(divide)(along), 1)
    variance = share * own.T @ meat @ own + (1 - share) * other @ meat @ other.T
    variance = variance + jnp.diag((~seen).astype(gap.dtype))
    variance, scales = linalg.equilibrated(variance)
    root = linalg.cholesky(variance)
    whitened = linalg.solve_lower(root, (gap / scales)[:, None])
    return jnp.sum(jnp.square(whitened)), jnp.sum(seen).astype(jnp.int32)
