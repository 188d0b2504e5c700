"""Split-conformal prediction: coverage from exchangeability alone.

Scores of held-out examples say how strange their targets were. A new target is stranger
than a given share of them no more often than that share says, whatever the model, if
the new example is exchangeable with the held-out ones.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fisherflow_jax._ground import arrays, checks, counted, keys, trees

Score = Callable[[jax.Array, Any], jax.Array]

# Rounding of (n + 1) * level, which must not turn a whole number into the next.
_ROUNDING = 1e-9


class Conformal(NamedTuple):
    """Split-conformal prediction, as a pair of functions.

    Made by `ff.calibration.conformal_sets`.
    """

    fit: Callable[..., jax.Array]  # held-out predictions and targets -> threshold ()
    predict: Callable[..., Any]  # (threshold, predictions) -> sets, or (lower, upper)


def conformal_sets(score: Score | None = None) -> Conformal:
    r"""Sets of classes that hold the label with a given probability.

    With scores `s_i` of the n held-out labels,

    .. math:: C(x) = \{c : s(x, c) \le \hat q\}, \quad
       \hat q = s_{(\lceil (n + 1) \, \mathrm{level} \rceil)}, \quad
       P(y \in C(x)) \ge \mathrm{level}

    over the held-out data and the new example together, if they are exchangeable: on
    average over inputs, not for each. Given the held-out data the coverage is itself
    random, with a standard deviation near `sqrt(level (1 - level) / n)`.

    Args:
      score: `(probabilities (n, C), key) -> (n, C)`, higher for stranger classes:
        `least_ambiguous` (None), the smallest sets on average, or `adaptive`, whose
        sets grow where the model is unsure.

    Returns:
      A `Conformal(fit, predict)`:
      `threshold = fit(probabilities, labels, level=..., key=None, mask=None)`, with
      probabilities `(n, C)`, labels `(n,)` and mask `(n,)`, a number; and
      `sets = predict(threshold, probabilities, key=None)`, `(n, C)` bool. A set may be
      empty. A random score needs a key in both, not the same. Cost: a sort.

    Raises:
      ValueError: by `fit`, for a level outside (0, 1), for more targets than one an
        example (which are not exchangeable), for fewer than `level / (1 - level)`
        held-out examples (under jit the threshold is then infinite, and every class in
        the set), and as `ff.metrics.accuracy` does; by both, for a random score without
        a key.

    Example:
      >>> import jax.numpy as jnp
      >>> from fisherflow_jax import calibration
      >>> p = jnp.array([[0.8, 0.2], [0.6, 0.4], [0.3, 0.7], [0.9, 0.1]])
      >>> labels = jnp.array([0, 0, 1, 1])
      >>> conformal = calibration.conformal_sets()
      >>> threshold = conformal.fit(p, labels, level=0.6)
      >>> print(threshold)  # the third of 0.2, 0.3, 0.4, 0.9
      0.4
      >>> print(conformal.predict(threshold, jnp.array([[0.5, 0.5], [0.1, 0.9]])))
      [[False False]
       [False  True]]

    References:
      Vovk, Gammerman, Shafer, "Algorithmic learning in a random world", 2005.
      Sadinle, Lei, Wasserman, "Least ambiguous set-valued classifiers with bounded
      error levels", 2019.
    """
    score = least_ambiguous if score is None else score

    def fit(
        probabilities: jax.Array,
        labels: jax.Array,
        *,
        level: float,
        key: Any = None,
        mask: counted.Weights = None,
    ) -> jax.Array:
        _check_exchangeable(labels, mask)
        if jnp.ndim(probabilities) != 2:
            raise ValueError(
                "probabilities must be (n, C), those of two classes too; got shape "
                f"{jnp.shape(probabilities)}."
            )
        table, labels, weights, _ = counted.classified(probabilities, labels, mask)
        scores = jnp.take_along_axis(score(table, key), labels[:, None], -1)[:, 0]
        return _quantile(scores, weights, level)

    def predict(
        threshold: jax.Array, probabilities: jax.Array, *, key: Any = None
    ) -> jax.Array:
        scores = score(counted.distributions(probabilities), key)
        return scores <= jnp.asarray(threshold).astype(scores.dtype)

    return Conformal(fit, predict)


def conformal_intervals() -> Conformal:
    r"""Intervals that hold a new target with a given probability.

    .. math:: \mu(x) \pm \hat q \, \sigma(x), \quad
       \hat q = s_{(\lceil (n + 1) \, \mathrm{level} \rceil)}, \quad
       s_i = |y_i - \mu_i| / \sigma_i

    over n held-out examples; :math:`P(y \in [l, u]) \ge \mathrm{level}` if they and the
    new example are exchangeable, whether or not the `std` is right: a better one makes
    the intervals shorter, and ones everywhere make them equally wide.

    Returns:
      A `Conformal(fit, predict)`:
      `factor = fit(mean, std, targets, level=..., mask=None)`, arrays `(n,)`, a number
      to multiply a std with; and `lower, upper = predict(factor, mean, std)`. Cost: a
      sort.

    Raises:
      ValueError: by `fit`, for a level outside (0, 1), for more targets than one an
        example (which are not exchangeable), for fewer than `level / (1 - level)`
        held-out examples (under jit the factor is then infinite), and as
        `ff.metrics.gaussian_crps` does.

    Example:
      >>> import jax.numpy as jnp
      >>> from fisherflow_jax import calibration
      >>> y = jnp.array([0.1, -0.2, 0.3, -0.4])
      >>> conformal = calibration.conformal_intervals()
      >>> factor = conformal.fit(0 * y, 0 * y + 1, y, level=0.8)
      >>> lower, upper = conformal.predict(factor, jnp.array([5.0]), jnp.array([2.0]))
      >>> print(lower, upper)
      [4.2] [5.8]

    References:
      Papadopoulos, Proedrou, Vovk, Gammerman, "Inductive confidence machines for
      regression", 2002.
      Lei, G'Sell, Rinaldo, Tibshirani, Wasserman, "Distribution-free predictive
      inference for regression", 2018.
    """

    def fit(
        mean: jax.Array,
        std: jax.Array,
        targets: jax.Array,
        *,
        level: float,
        mask: counted.Weights = None,
    ) -> jax.Array:
        _check_exchangeable(targets, mask)
        (mean, std, targets), weights = counted.gaussian(mean, std, targets, mask)
        return _quantile(jnp.abs(targets - mean) / std, weights, level)

    def predict(
        threshold: jax.Array, mean: jax.Array, std: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        mean, std = trees.widen((arrays.widen(mean), arrays.widen(std)))
        if mean.shape != std.shape:
            raise ValueError(
                f"mean and std must have one shape; got {mean.shape} and {std.shape}."
            )
        reach = jnp.asarray(threshold).astype(std.dtype) * std
        return mean - reach, mean + reach

    return Conformal(fit, predict)


def least_ambiguous(probabilities: jax.Array, key: Any = None) -> jax.Array:
    r"""The score `1 - p_c` of each class, for `conformal_sets`.

    Args:
      probabilities: `(n, C)`.
      key: not used.

    Returns:
      An array `(n, C)`.

    Example:
      >>> import jax.numpy as jnp
      >>> from fisherflow_jax import calibration
      >>> print(calibration.least_ambiguous(jnp.array([[0.75, 0.25]])))
      [[0.25 0.75]]

    References:
      Sadinle, Lei, Wasserman, "Least ambiguous set-valued classifiers with bounded
      error levels", 2019.
    """
    return 1 - probabilities


def adaptive(
    probabilities: jax.Array, key: Any = None, *, randomised: bool = True
) -> jax.Array:
    r"""The probability of all likelier classes and a share of the class's own.

    .. math:: s(x, c) = \sum_{c' : p_{c'} > p_c} p_{c'} + u \, p_c

    with `u` uniform in (0, 1), one an example, and equally probable classes put in an
    order by chance. Without chance sets hold their label too often, and are larger.

    Args:
      probabilities: `(n, C)`.
      key: an int, a key, or key data.
      randomised: False (by `functools.partial`): `u = 1`, ties in the classes' order.

    Returns:
      An array `(n, C)`. Cost: a sort of the classes.

    Raises:
      ValueError: if `randomised` and there is no key.

    Example:
      >>> import functools
      >>> import jax.numpy as jnp
      >>> from fisherflow_jax import calibration
      >>> p = jnp.array([[0.2, 0.5, 0.3]])
      >>> print(calibration.adaptive(p, randomised=False))
      [[1.  0.5 0.8]]
      >>> score = functools.partial(calibration.adaptive, randomised=False)
      >>> conformal = calibration.conformal_sets(score)

    References:
      Romano, Sesia, Candes, "Classification with valid and adaptive coverage", 2020.
    """
    shape, own = probabilities.shape, (*probabilities.shape[:-1], 1)
    places = jax.lax.broadcasted_iota(jnp.int32, shape, len(shape) - 1)
    if not randomised:
        ties, share = places, jnp.ones(own, probabilities.dtype)
    elif key is None:
        raise ValueError(
            "adaptive scores are random: give a key, or the score "
            "functools.partial(adaptive, randomised=False)."
        )
    else:
        for_ties, for_share = jax.random.split(keys.typed_key(key))
        ties = jax.random.bits(for_ties, shape, jnp.uint32)
        share = jax.random.uniform(for_share, own, probabilities.dtype)
    negative, _, order = jax.lax.sort((-probabilities, ties, places), num_keys=2)
    scores = jnp.cumsum(-negative, -1) + (1 - share) * negative
    return jax.lax.sort((order, scores), num_keys=1)[1]  # back in the classes' order


def _check_exchangeable(targets: Any, mask: Any) -> None:
    if jnp.ndim(targets) != 1:
        raise ValueError(
            "conformal prediction needs exchangeable targets: one an example, shape "
            f"(n,); got shape {jnp.shape(targets)}. If those of one example are "
            "exchangeable too, flatten them."
        )
    if mask is not None and jnp.asarray(mask).dtype != bool:
        raise ValueError(
            "conformal prediction ranks exchangeable examples, which have no weights: "
            "mask must be boolean, True where one counts; got dtype "
            f"{jnp.asarray(mask).dtype}."
        )


def _quantile(scores: jax.Array, weights: jax.Array, level: float) -> jax.Array:
    """The score of rank `ceil((n + 1) level)` of the n counted ones."""
    if isinstance(level, jax.core.Tracer) or not 0 < level < 1:
        raise ValueError(f"level must be a number in (0, 1), not traced; got {level}.")
    size = scores.shape[0]
    # of every possible n, in numpy: float32 under jit would round to a wrong rank
    ranks = np.ceil((np.arange(size + 1) + 1) * level - _ROUNDING).astype(np.int32)
    count = jnp.sum(weights != 0, dtype=jnp.int32)
    rank = jnp.asarray(ranks)[count]
    if checks.is_concrete(count) and int(rank) > int(count):
        least = math.ceil(level / (1 - level) - _ROUNDING)
        raise ValueError(
            f"{int(count)} held-out examples cannot promise level {level}: at least "
            f"{least} are needed."
        )
    ordered = jnp.sort(jnp.where(weights == 0, jnp.inf, scores))
    value = ordered[jnp.minimum(rank, size) - 1]
    value = jnp.where(rank > count, jnp.inf, value)
    # a row that cannot be has weight NaN
    return value + 0 * jnp.sum(weights)
