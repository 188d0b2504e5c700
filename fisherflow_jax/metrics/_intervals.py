"""Whether intervals and sets hold what they promise, and how large they are."""

import jax
import jax.numpy as jnp

from fisherflow_jax._ground import checks, counted
from fisherflow_jax._ground.counted import Weights


def interval_coverage(
    lower: jax.Array, upper: jax.Array, targets: jax.Array, *, weights: Weights = None
) -> jax.Array:
    r"""The share of targets within their interval, ends included.

    .. math:: \frac{1}{\sum_i w_i} \sum_i w_i 1\{l_i \le y_i \le u_i\}

    Args:
      lower: `(n, ...)`, may be infinite.
      upper: `(n, ...)`, may be infinite, not below `lower`.
      targets: `(n, ...)`.
      weights: `(n, ...)`, or `(n,)` for whole examples: at least 0, or booleans; what
        has weight 0, or False, is padding and is not read. None: all count once.

    Returns:
      A number from 0 to 1. Cost: one pass over the arrays.

    Raises:
      ValueError: for shapes that differ, nothing to count, and (where the values are at
        hand; under jit the result is NaN) a NaN or a lower end above the upper one.

    Example:
      >>> import jax.numpy as jnp
      >>> from fisherflow_jax import metrics
      >>> y = jnp.array([0.0, 0.5, 2.0, -3.0])
      >>> print(metrics.interval_coverage(0 * y - 1, 0 * y + 1, y))
      0.5
    """
    (lower, upper, targets), known = _ends(lower, upper, weights, targets=targets)
    inside = (lower <= targets) & (targets <= upper)
    return counted.mean(inside.astype(lower.dtype), known)


def interval_width(
    lower: jax.Array, upper: jax.Array, *, weights: Weights = None
) -> jax.Array:
    r"""The mean width of intervals, in the targets' unit.

    .. math:: \frac{1}{\sum_i w_i} \sum_i w_i (u_i - l_i)

    Args:
      lower: `(n, ...)`.
      upper: `(n, ...)`, not below `lower`.
      weights: `(n, ...)`, or `(n,)` for whole examples: at least 0, or booleans; what
        has weight 0, or False, is padding and is not read. None: all count once.

    Returns:
      A number, infinite where an interval is. Cost: one pass over the arrays.

    Raises:
      ValueError: as `interval_coverage` does.

    Example:
      >>> import jax.numpy as jnp
      >>> from fisherflow_jax import metrics
      >>> print(metrics.interval_width(jnp.zeros(2), jnp.array([1.0, 3.0])))
      2.0
    """
    (lower, upper), known = _ends(lower, upper, weights)
    # both ends infinite, of one sign: an empty interval
    return counted.mean(jnp.where(upper == lower, 0.0, upper - lower), known)


def interval_score(
    lower: jax.Array,
    upper: jax.Array,
    targets: jax.Array,
    *,
    level: float,
    weights: Weights = None,
) -> jax.Array:
    r"""The mean width, and a penalty for each target left out: a proper score.

    .. math:: (u - l) + \frac{2}{1 - \mathrm{level}} [(l - y)_+ + (y - u)_+]

    Coverage alone is best for infinite intervals and width alone for empty ones; this
    score is best, in expectation, for the true central interval.

    Args:
      lower: `(n, ...)`.
      upper: `(n, ...)`, not below `lower`.
      targets: `(n, ...)`.
      level: the probability of covering that the intervals claim, in (0, 1).
      weights: `(n, ...)`, or `(n,)` for whole examples: at least 0, or booleans; what
        has weight 0, or False, is padding and is not read. None: all count once.

    Returns:
      A number, at least 0. Cost: one pass over the arrays.

    Raises:
      ValueError: for a level outside (0, 1), and as `interval_coverage` does.

    Example:
      >>> import jax.numpy as jnp
      >>> from fisherflow_jax import metrics
      >>> y = jnp.array([0.5, 1.25])
      >>> print(metrics.interval_score(0 * y, 0 * y + 1, y, level=0.5))
      1.5

    References:
      Gneiting, Raftery, "Strictly proper scoring rules, prediction, and estimation",
      2007.
    """
    checks.fraction(level, "level")
    (lower, upper, targets), known = _ends(lower, upper, weights, targets=targets)
    outside = jnp.maximum(lower - targets, 0.0) + jnp.maximum(targets - upper, 0.0)
    return counted.mean(upper - lower + outside * (2 / (1 - level)), known)


def set_coverage(
    sets: jax.Array, labels: jax.Array, *, weights: Weights = None
) -> jax.Array:
    """The share of labels that are in their set of classes.

    Args:
      sets: `(n, ..., C)` bool, True where the class is in the set.
      labels: `(n, ...)`, whole numbers from 0 to C - 1.
      weights: `(n, ...)`, or `(n,)` for whole examples: at least 0, or booleans; what
        has weight 0, or False, is padding and is not read. None: all count once.

    Returns:
      A number from 0 to 1. Cost: one pass over the sets.

    Raises:
      ValueError: for sets that are not boolean, shapes that do not go together, nothing
        to count, and labels out of range where they are at hand (under jit the result
        is NaN).

    Example:
      >>> import jax.numpy as jnp
      >>> from fisherflow_jax import metrics
      >>> sets = jnp.array([[True, False, True], [False, True, False]])
      >>> print(metrics.set_coverage(sets, jnp.array([2, 2])))
      0.5
    """
    sets, labels = _sets(sets), jnp.asarray(labels)
    if sets.shape[:-1] != labels.shape:
        raise ValueError(
            f"sets of shape {sets.shape} and labels of shape {labels.shape} do not go "
            "together: sets are (n, ..., C) for labels (n, ...)."
        )
    given = counted.weights_in_full(weights, labels.shape).reshape(-1)
    count = sets.shape[-1]
    places, right = counted.classes(labels, counted.used(given), count)
    held = jnp.take_along_axis(sets.reshape((-1, count)), places[:, None], -1)[:, 0]
    dtype = jnp.result_type(float)
    return counted.mean(held.astype(dtype), counted.weights_of(given, right, dtype))


def set_size(sets: jax.Array, *, weights: Weights = None) -> jax.Array:
    """The mean number of classes in a set.

    Args:
      sets: `(n, ..., C)` bool, True where the class is in the set.
      weights: `(n, ...)`, or `(n,)` for whole examples: at least 0, or booleans; what
        has weight 0, or False, is padding and is not read. None: all count once.

    Returns:
      A number from 0 to C. Cost: one pass over the sets.

    Raises:
      ValueError: for sets that are not boolean, or nothing to count.

    Example:
      >>> import jax.numpy as jnp
      >>> from fisherflow_jax import metrics
      >>> sets = jnp.array([[True, False, True], [False, True, False]])
      >>> print(metrics.set_size(sets))
      1.5
    """
    sets = _sets(sets)
    given = counted.weights_in_full(weights, sets.shape[:-1])
    dtype = jnp.result_type(float)
    known = counted.weights_of(given, jnp.ones_like(given, bool), dtype)
    return counted.mean(jnp.sum(sets, -1).astype(dtype), known)


def _sets(sets: jax.Array) -> jax.Array:
    sets = jnp.asarray(sets)
    if sets.dtype != bool or sets.ndim < 2:
        raise ValueError(
            "sets must be boolean (n, ..., C), True where a class is in the set; got "
            f"{sets.dtype} of shape {sets.shape}."
        )
    return sets


def _ends(lower, upper, weights, **targets) -> counted.Measured:
    shape = jnp.shape(next(iter(targets.values()), lower))
    columns, known = counted.measured(
        shape, weights, infinite=True, lower=lower, upper=upper, **targets
    )
    ordered = columns[0] <= columns[1]
    pairs = jnp.stack(columns[:2], -1)
    counted.refuse(True, ordered, pairs, "lower must not be above upper")
    return counted.Measured(columns, jnp.where(ordered, known, jnp.nan))
