"""How good predicted distributions of numbers are: proper scores."""

import math

import jax
import jax.numpy as jnp
from jax.scipy.special import ndtr

from fisherflow_jax._ground import counted
from fisherflow_jax._ground.counted import Weights


def gaussian_negative_log_likelihood(
    mean: jax.Array, std: jax.Array, targets: jax.Array, *, weights: Weights = None
) -> jax.Array:
    r"""The mean negative log-density of the targets, in nats.

    .. math:: \frac{1}{\sum_i w_i} \sum_i w_i \left[
       \tfrac 12 \left(\frac{y_i - \mu_i}{\sigma_i}\right)^2
       + \log \sigma_i + \tfrac 12 \log 2\pi \right]

    Args:
      mean: `(n, ...)`.
      std: `(n, ...)`, of a new target (`Prediction.observation_std`), positive.
      targets: `(n, ...)`.
      weights: `(n, ...)`, or `(n,)` for whole examples: at least 0, or booleans; what
        has weight 0, or False, is padding and is not read. None: all count once.

    Returns:
      A number. Cost: one pass over the arrays.

    Raises:
      ValueError: for shapes that differ, nothing to count, and (where the values are at
        hand; under jit the result is NaN) a std that is not positive or a value that is
        not finite.

    Example:
      >>> import jax.numpy as jnp
      >>> from fisherflow_jax import metrics
      >>> y = jnp.array([1.0, -1.0])
      >>> nll = metrics.gaussian_negative_log_likelihood(0 * y, 0 * y + 1, y)
      >>> print(nll.round(3))
      1.419

    References:
      Good, "Rational decisions", 1952.
    """
    (mean, std, targets), known = counted.gaussian(mean, std, targets, weights)
    z = (targets - mean) / std
    half_log_two_pi = 0.5 * math.log(2 * math.pi)
    return counted.mean(0.5 * z * z + jnp.log(std) + half_log_two_pi, known)


def gaussian_crps(
    mean: jax.Array, std: jax.Array, targets: jax.Array, *, weights: Weights = None
) -> jax.Array:
    r"""The mean continuous ranked probability score of normal predictions.

    .. math:: \mathrm{CRPS} = \int (F(x) - 1\{x \ge y\})^2 dx =
       \sigma \left[ z (2 \Phi(z) - 1) + 2 \varphi(z) - \frac{1}{\sqrt\pi} \right],
       \quad z = \frac{y - \mu}{\sigma}

    In the targets' unit, and the absolute error as `std` goes to zero.

    Args:
      mean: `(n, ...)`.
      std: `(n, ...)`, of a new target (`Prediction.observation_std`), positive.
      targets: `(n, ...)`.
      weights: `(n, ...)`, or `(n,)` for whole examples: at least 0, or booleans; what
        has weight 0, or False, is padding and is not read. None: all count once.

    Returns:
      A number, at least 0. Cost: one pass over the arrays.

    Raises:
      ValueError: as `gaussian_negative_log_likelihood` does.

    Example:
      >>> import jax.numpy as jnp
      >>> from fisherflow_jax import metrics
      >>> y = jnp.array([1.0, -1.0])
      >>> print(metrics.gaussian_crps(0 * y, 0 * y + 1, y).round(3))
      0.602

    References:
      Gneiting, Raftery, "Strictly proper scoring rules, prediction, and estimation",
      2007.
    """
    (mean, std, targets), known = counted.gaussian(mean, std, targets, weights)
    z = jnp.abs(targets - mean) / std
    density = jnp.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
    # 1 - 2 Phi(-z) keeps the digits that 2 Phi(z) - 1 would lose in the tail
    score = z * (1 - 2 * ndtr(-z)) + 2 * density - 1 / math.sqrt(math.pi)
    return counted.mean(std * score, known)


def sample_crps(
    samples: jax.Array,
    targets: jax.Array,
    *,
    fair: bool = True,
    weights: Weights = None,
) -> jax.Array:
    r"""The mean continuous ranked probability score of predictions given by samples.

    .. math:: \mathrm{CRPS} = \mathrm E |X - y| - \tfrac 12 \mathrm E |X - X'|

    with the expectations taken over k samples. Where they are draws of a predictive
    distribution the second is over pairs of different ones, which makes the score's
    expectation that of the distribution, whatever k.

    Args:
      samples: `(k, n, ...)`, k draws a target.
      targets: `(n, ...)`.
      fair: True: over the k (k - 1) pairs of different samples; False: over all k^2,
        the score of the samples' own distribution function (an ensemble's).
      weights: `(n, ...)`, or `(n,)` for whole examples: at least 0, or booleans; what
        has weight 0, or False, is padding and is not read. None: all count once.

    Returns:
      A number. Cost: a sort of the samples.

    Raises:
      ValueError: for shapes that differ, fewer than two samples with `fair`, nothing to
        count, and (where the values are at hand; under jit the result is NaN) a value
        that is not finite.

    Example:
      >>> import jax.numpy as jnp
      >>> from fisherflow_jax import metrics
      >>> samples = jnp.array([[0.0], [1.0], [2.0]])
      >>> y = jnp.array([1.0])  # 2/3 - 1/2 * 4/3
      >>> print(metrics.sample_crps(samples, y).round(3))
      0.0
      >>> print(metrics.sample_crps(samples, y, fair=False).round(3))
      0.222

    References:
      Gneiting, Raftery, "Strictly proper scoring rules, prediction, and estimation",
      2007.
      Ferro, "Fair scores for ensemble forecasts", 2014.
    """
    samples, targets = jnp.asarray(samples), jnp.asarray(targets)
    count = samples.shape[0] if samples.ndim else 0
    least = 2 if fair else 1
    if samples.shape[1:] != targets.shape or count < least:
        raise ValueError(
            f"samples must be (k, *targets' shape {targets.shape}) with k at least "
            f"{least}; got shape {samples.shape}."
        )
    (samples, targets), known = counted.measured(
        targets.shape, weights, stacked="samples", samples=samples, targets=targets
    )
    # about the target, where float32 has its digits
    errors = jnp.sort(samples - targets[None], axis=0)
    ranks = jnp.arange(1 - count, count, 2).astype(errors.dtype)
    pairs = count * (count - 1) if fair else count * count
    spread = jnp.sum(ranks[:, None] * errors, 0) / pairs
    return counted.mean(jnp.mean(jnp.abs(errors), 0) - spread, known)
