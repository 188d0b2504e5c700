"""Everything since the last change: a two-sample test at each update."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from scipy.special import chdtri

from fisherflow_jax import information as ops
from fisherflow_jax._ground import checks, choices, trees
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
    """What an adaptive memory says of an update, in `info.memory`."""

    alarm: jax.Array  # () bool
    statistic: jax.Array  # () the largest of the windows'; NaN: none could be tested
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
    alarms). An alarm is raised when the largest
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
      Storage: `size` sites; cost: log2(size) solves an update. Full structure only:
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
        threshold = float(chdtri(dimension, _TAIL / average_run_length))

        age = (window.head - 1 - jnp.arange(size, dtype=jnp.int32)) % size
        width = jnp.asarray(widths, jnp.int32)
        newest = (age[None, :] < width[:, None]).astype(site.weight.dtype)
        sums = jax.vmap(lambda weights: total(window.sites, weights))(newest)
        values = jax.vmap(lambda s: _statistic(s, belief, window.reference))(sums)
        # too few observations leave the window's information singular
        testable = (width <= length - guard) & (sums.weight >= 2 * dimension)
        testable = testable & jnp.isfinite(values)
        values = jnp.where(testable, values, -jnp.inf)

        best = jnp.argmax(values)
        alarm = values[best] > threshold
        statistic = jnp.where(jnp.any(testable), values[best], jnp.nan)
        chosen = jax.tree.map(lambda x: x[best], sums)
        cut = belief.replaced_by(chosen, window.reference)
        belief = optax.tree.where(alarm, cut, belief)
        change = jnp.where(alarm, window.head - width[best], -1)
        length = jnp.where(alarm, width[best], length)
        report = ChangeReport(
            alarm=alarm,
            statistic=statistic,
            threshold=jnp.asarray(threshold, statistic.dtype),
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


def _statistic(window: Sum, belief: Belief, origin: PyTree) -> jax.Array:
    """The Wald statistic of a window against everything before it."""
    information, sums, shift = window.curvature, belief.sums, window.linear.vector
    rest = ops.add(sums.curvature, ops.scale(information, -1.0))
    offset = optax.tree.sub(belief.mean, origin)
    rest_shift = optax.tree.sub(ops.matvec(sums.curvature, offset), shift)
    reference = ops.solve(rest, rest_shift)
    score = optax.tree.sub(shift, ops.matvec(information, reference))
    # (I_w + I_w I_r^-1 I_w)^-1 = I_w^-1 I_r I^-1
    gap = ops.solve(information, score)
    if sums.quadratic:
        return _robust_statistic(window, rest, gap, sums)
    inner = ops.matvec(rest, ops.solve(sums.curvature, score))
    statistic = trees.dot(gap, inner)
    if sums.linear is None:
        return statistic
    # by the estimated dispersion: of the data alone, wherever the prior is centred
    return statistic * (sums.weight - trees.size(belief.mean)) / sums.linear.own


def _robust_statistic(window: Sum, rest: Any, gap: PyTree, sums: Sum) -> jax.Array:
    """The same with the sandwich variance of both estimates.

    The scores of a short window alone say too little of their variance, so that of all
    observations is taken, in proportion to each side's.
    """
    share, meat = window.weight / sums.weight, ops.plain(*sums.quadratic)
    covariance = ops.add(
        ops.sandwich(window.curvature, ops.scale(meat, share)),
        ops.sandwich(rest, ops.scale(meat, 1 - share)),
    )
    return trees.dot(gap, ops.solve(covariance, gap))
