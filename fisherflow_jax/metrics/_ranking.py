"""How well a score tells two kinds of examples apart."""

import jax
import jax.numpy as jnp

from fisherflow_jax._ground.arrays import widen
from fisherflow_jax._ground.checks import is_concrete
from fisherflow_jax.metrics import _rows as rows


def auroc(
    scores: jax.Array, positive: jax.Array, *, mask: jax.Array | None = None
) -> jax.Array:
    r"""The area under the receiver operating characteristic.

    .. math:: P(s_+ > s_-) + \tfrac 12 P(s_+ = s_-)

    over pairs of a positive and a negative example: the Mann-Whitney statistic with
    midranks for ties. To detect what is out of distribution, score by `entropy` (or
    minus `confidence`) and call positive what is out of it.

    Args:
      scores: `(n, ...)`, higher for what is thought positive; may be infinite.
      positive: `(n, ...)` bool.
      mask: `(n, ...)`, or `(n,)` for whole examples; False is padding and is not read.

    Returns:
      A number from 0 to 1, one half for a score that knows nothing. Cost: a sort.

    Raises:
      ValueError: for shapes that differ, a `positive` that is not boolean, nothing to
        count, and (where the values are at hand; under jit the result is NaN) a NaN
        score or only one kind of examples.

    Example:
      >>> import jax.numpy as jnp
      >>> from fisherflow_jax import metrics
      >>> inside = metrics.entropy(jnp.array([[0.9, 0.1], [0.3, 0.7]]))
      >>> outside = metrics.entropy(jnp.array([[0.6, 0.4], [0.7, 0.3]]))
      >>> scores = jnp.concatenate([inside, outside])
      >>> print(metrics.auroc(scores, jnp.array([False, False, True, True])))
      0.875

    References:
      Hanley, McNeil, "The meaning and use of the area under a receiver operating
      characteristic (ROC) curve", 1982.
    """
    scores, positive = widen(scores), jnp.asarray(positive)
    if positive.dtype != bool or positive.shape != scores.shape:
        raise ValueError(
            f"positive must be boolean and have the scores' shape {scores.shape}; got "
            f"{positive.dtype} of shape {positive.shape}."
        )
    used = rows.counted(mask, scores.shape).reshape(-1)
    scores, positive = scores.reshape(-1), positive.reshape(-1)
    nan = jnp.isnan(scores)
    rows.refuse(used, ~nan, scores, "scores must be numbers, not NaN")
    scores = jnp.where(used & ~nan, scores, jnp.zeros_like(scores))
    above, below = used & positive, used & ~positive
    num_above = jnp.sum(above, dtype=jnp.int32)
    num_below = jnp.sum(below, dtype=jnp.int32)
    if is_concrete((num_above, num_below)) and 0 in (num_above, num_below):
        raise ValueError(
            "auroc compares positive with negative examples; got "
            f"{int(num_above)} positive and {int(num_below)} negative."
        )
    order = jnp.argsort(scores)
    ordered = scores[order]
    # whole numbers: float32 cannot count beyond 2^24
    running = jnp.cumsum(below[order], dtype=jnp.int32)
    running = jnp.concatenate([jnp.zeros((1,), jnp.int32), running])
    lower = running[jnp.searchsorted(ordered, scores, side="left")]
    upto = running[jnp.searchsorted(ordered, scores, side="right")]
    beaten = (lower.astype(scores.dtype) + upto.astype(scores.dtype)) / 2
    share = beaten / num_below.astype(scores.dtype)
    weights = rows.weights_of(above, jnp.ones_like(above), scores.dtype)
    value = rows.mean(share, weights)
    # a NaN among the negatives is in no weight of the mean over the positives
    return jnp.where(jnp.any(used & nan), jnp.nan, value)
