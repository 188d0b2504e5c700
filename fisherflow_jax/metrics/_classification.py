"""How good predicted classes are: accuracy, proper scores, and how scores rank."""

import jax
import jax.numpy as jnp

from fisherflow_jax._ground import checks, counted
from fisherflow_jax._ground.counted import Weights


def accuracy(
    probabilities: jax.Array, labels: jax.Array, *, weights: Weights = None
) -> jax.Array:
    r"""The share of labels that are the most probable class.

    .. math:: \frac{1}{\sum_i w_i} \sum_i w_i 1\{\arg\max_c p_{ic} = y_i\}

    Of equally probable classes the first is taken.

    Args:
      probabilities: `(n, ..., C)`; or `(n, ...)`, the probability of label 1, which is
        then predicted where it is above one half.
      labels: `(n, ...)`, whole numbers from 0 to C - 1.
      weights: `(n, ...)`, or `(n,)` for whole examples: at least 0, or booleans; what
        has weight 0, or False, is padding and is not read. None: all count once.

    Returns:
      A number. Cost: one pass over the probabilities.

    Raises:
      ValueError: for shapes that do not go together, nothing to count, and (where the
        values are at hand; under jit the result is NaN) labels out of range or
        probabilities that do not sum to one.

    Example:
      >>> import jax.numpy as jnp
      >>> from fisherflow_jax import metrics
      >>> p = jnp.array([[0.7, 0.3], [0.4, 0.6], [0.9, 0.1]])
      >>> print(metrics.accuracy(p, jnp.array([0, 1, 1])).round(3))
      0.667
    """
    table, labels, known, _ = counted.classified(probabilities, labels, weights)
    correct = jnp.argmax(table, -1).astype(labels.dtype) == labels
    return counted.mean(correct.astype(table.dtype), known)


def negative_log_likelihood(
    probabilities: jax.Array, labels: jax.Array, *, weights: Weights = None
) -> jax.Array:
    r"""The mean negative log-probability of the labels, in nats.

    .. math:: -\frac{1}{\sum_i w_i} \sum_i w_i \log p_{i y_i}

    Infinite where a label had probability zero. That also happens where a probability
    underflowed: of logits, take `ff.negative_log_likelihood(apply_fn, likelihood)`.

    Args:
      probabilities: `(n, ..., C)`; or `(n, ...)`, the probability of label 1.
      labels: `(n, ...)`, whole numbers from 0 to C - 1.
      weights: `(n, ...)`, or `(n,)` for whole examples: at least 0, or booleans; what
        has weight 0, or False, is padding and is not read. None: all count once.

    Returns:
      A number. Cost: one pass over the probabilities.

    Raises:
      ValueError: as `accuracy` does.

    Example:
      >>> import jax.numpy as jnp
      >>> from fisherflow_jax import metrics
      >>> p = jnp.array([[0.5, 0.5], [0.2, 0.8]])
      >>> print(metrics.negative_log_likelihood(p, jnp.array([0, 1])).round(3))
      0.458

    References:
      Good, "Rational decisions", 1952.
    """
    table, labels, known, _ = counted.classified(probabilities, labels, weights)
    chosen = jnp.take_along_axis(table, labels[:, None], -1)[:, 0]
    return counted.mean(-jnp.log(chosen), known)


def brier(
    probabilities: jax.Array, labels: jax.Array, *, weights: Weights = None
) -> jax.Array:
    r"""The mean squared error of the probabilities.

    .. math:: \frac{1}{\sum_i w_i} \sum_i w_i \sum_c (p_{ic} - 1\{y_i = c\})^2

    from 0 to 2. Of probabilities of label 1 alone it is the mean of `(p - y)^2`, from 0
    to 1: half of what the same two classes written out give.

    Args:
      probabilities: `(n, ..., C)`; or `(n, ...)`, the probability of label 1.
      labels: `(n, ...)`, whole numbers from 0 to C - 1.
      weights: `(n, ...)`, or `(n,)` for whole examples: at least 0, or booleans; what
        has weight 0, or False, is padding and is not read. None: all count once.

    Returns:
      A number. Cost: one pass over the probabilities.

    Raises:
      ValueError: as `accuracy` does.

    Example:
      >>> import jax.numpy as jnp
      >>> from fisherflow_jax import metrics
      >>> p = jnp.array([0.5, 0.8])
      >>> print(metrics.brier(p, jnp.array([0, 1])).round(3))
      0.145
      >>> both = jnp.stack([1 - p, p], -1)
      >>> print(metrics.brier(both, jnp.array([0, 1])).round(3))
      0.29

    References:
      Brier, "Verification of forecasts expressed in terms of probability", 1950.
    """
    table, labels, known, single = counted.classified(probabilities, labels, weights)
    target = jax.nn.one_hot(labels, table.shape[-1], dtype=table.dtype)
    squares = jnp.square(table - target)
    return counted.mean(squares[:, 1] if single else jnp.sum(squares, -1), known)


def entropy(probabilities: jax.Array) -> jax.Array:
    r"""How spread each prediction is, in nats: a score for `auroc`.

    .. math:: -\sum_c p_c \log p_c

    Args:
      probabilities: `(n, ..., C)`.

    Returns:
      An array `(n, ...)` from 0 (certain) to `log C` (uniform).

    Raises:
      ValueError: for an empty array, and for probabilities that do not sum to one where
        they are at hand (under jit the row is NaN).

    Example:
      >>> import jax.numpy as jnp
      >>> from fisherflow_jax import metrics
      >>> print(metrics.entropy(jnp.array([[1.0, 0.0], [0.5, 0.5]])).round(3))
      [0.    0.693]

    References:
      Shannon, "A mathematical theory of communication", 1948.
    """
    return jnp.sum(jax.scipy.special.entr(counted.distributions(probabilities)), -1)


def confidence(probabilities: jax.Array) -> jax.Array:
    """The probability of the most probable class, a score for `auroc`.

    Args:
      probabilities: `(n, ..., C)`.

    Returns:
      An array `(n, ...)` from `1 / C` to 1.

    Raises:
      ValueError: as `entropy` does.

    Example:
      >>> import jax.numpy as jnp
      >>> from fisherflow_jax import metrics
      >>> print(metrics.confidence(jnp.array([[0.3, 0.7], [0.5, 0.5]])))
      [0.7 0.5]

    References:
      Hendrycks, Gimpel, "A baseline for detecting misclassified and out-of-distribution
      examples in neural networks", 2017.
    """
    return jnp.max(counted.distributions(probabilities), -1)


def auroc(
    scores: jax.Array, positive: jax.Array, *, weights: Weights = None
) -> jax.Array:
    r"""The area under the receiver operating characteristic.

    .. math:: P(s_+ > s_-) + \tfrac 12 P(s_+ = s_-)

    over pairs of a positive and a negative example, each of the weight of one times
    that of the other: the Mann-Whitney statistic with midranks for ties. To detect what
    is out of distribution, score by `entropy` (or minus `confidence`) and call positive
    what is out of it.

    Args:
      scores: `(n, ...)`, higher for what is thought positive; may be infinite.
      positive: `(n, ...)` bool.
      weights: `(n, ...)`, or `(n,)` for whole examples: at least 0, or booleans; what
        has weight 0, or False, is padding and is not read. None: all count once.

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
    positive = jnp.asarray(positive)
    if positive.dtype != bool or positive.shape != jnp.shape(scores):
        raise ValueError(
            f"positive must be boolean and have the scores' shape {jnp.shape(scores)}; "
            f"got {positive.dtype} of shape {positive.shape}."
        )
    (scores,), known = counted.measured(
        positive.shape, weights, infinite=True, scores=scores
    )
    positive, nothing = positive.reshape(-1), jnp.zeros_like(known)
    above, below = (jnp.where(x, known, nothing) for x in (positive, ~positive))
    kinds = [jnp.sum(x != 0, dtype=jnp.int32) for x in (above, below)]
    if checks.is_concrete(kinds) and 0 in map(int, kinds):
        raise ValueError(
            "auroc compares positive with negative examples; got "
            f"{int(kinds[0])} positive and {int(kinds[1])} negative."
        )
    lower, upto = (
        counted.weight_below(scores, below, side) for side in ("left", "right")
    )
    # a NaN among the negatives is in every sum of them
    return counted.mean((lower + upto) / (2 * jnp.sum(below)), above)
