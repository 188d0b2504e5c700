"""One temperature for all logits, found on held-out data."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fisherflow_jax import likelihoods
from fisherflow_jax._ground import arrays, checks, counted, search
from fisherflow_jax.likelihoods import Likelihood

# The search covers this many powers of e to both sides of the largest logit's size.
_REACH = 14.0


class TemperatureScaling(NamedTuple):
    """A temperature, and the mean negative log-likelihood without and with it.

    Made by `ff.calibration.temperature_scaling`.
    """

    temperature: jax.Array  # (); divide logits by it
    before: jax.Array  # (), nats a target, at temperature 1
    after: jax.Array  # ()


def temperature_scaling(
    logits: jax.Array,
    labels: jax.Array,
    *,
    likelihood: Likelihood | None = None,
    weights: counted.Weights = None,
) -> TemperatureScaling:
    r"""The temperature at which logits predict held-out labels best.

    .. math:: T^* = \arg\min_{T > 0} -\frac{1}{\sum_i w_i}
       \sum_i w_i \log p(y_i \mid z_i / T)

    Convex in `1 / T`, so that there is one minimum at most; found by Newton's method in
    `log T`, by bisection where that leaves the bracket. The most probable class, so the
    accuracy, stays as it is. Use `logits / scaling.temperature` from then on.

    Args:
      logits: `(n, ..., C)` of the mean model on data that it was not trained on
        (bernoulli: `(n, ...)`).
      labels: `(n, ...)`.
      likelihood: `ff.likelihoods.categorical()` (None) or `ff.likelihoods.bernoulli()`.
      weights: `(n, ...)`, or `(n,)` for whole examples: at least 0, or booleans; what
        has weight 0, or False, is padding and is not read. None: all count once.

    Returns:
      A `TemperatureScaling(temperature, before, after)`. Cost: about ten passes over
      the logits, none of the model. Memory: a few copies of the logits.

    Raises:
      ValueError: for shapes that do not go together, nothing to count, and (where the
        values are at hand; under jit the result is NaN) labels that cannot be, logits
        that are not finite, or no best temperature: labels that are all ranked first
        ask for zero, labels no better than a guess for infinity.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> from fisherflow_jax import calibration
      >>> logits = jnp.array([[4.0, 0.0]]).repeat(4, axis=0)  # sure of the first class
      >>> labels = jnp.array([0, 0, 0, 1])  # which is right three times of four
      >>> scaling = calibration.temperature_scaling(logits, labels)
      >>> print(scaling.temperature.round(3))  # 4 / log 3
      3.641
      >>> print(scaling.before.round(3), scaling.after.round(3))
      1.018 0.562

    References:
      Guo, Pleiss, Sun, Weinberger, "On calibration of modern neural networks", 2017.
    """
    likelihood = likelihoods.categorical() if likelihood is None else likelihood
    outputs, labels = arrays.widen(logits), jnp.asarray(labels)
    likelihood.check(outputs, labels)
    given = counted.weights_in_full(weights, labels.shape)
    used = counted.used(given)
    rest = (1,) * (outputs.ndim - used.ndim)
    outputs = jnp.where(used.reshape(used.shape + rest), outputs, 0.0)
    if rest:  # without what all logits of a target share
        outputs = outputs - jnp.max(outputs, -1, keepdims=True)
    labels = jnp.where(used, labels, jnp.zeros_like(labels))
    if not checks.holds(jnp.isfinite(outputs)):
        raise ValueError("logits must be finite; got a NaN or an infinite one.")
    result, slopes = _search(outputs, labels, given, likelihood)
    if not checks.holds(jnp.isfinite(result.before)):
        raise ValueError(
            f"labels must be ones that {likelihood.name} can produce; their mean "
            f"negative log-likelihood is {float(result.before)}."
        )
    if not checks.holds(slopes[0] < 0):
        raise ValueError(
            "there is no best temperature: every label has the largest logit, so that "
            "the likelihood rises as the temperature goes to 0. Take more held-out "
            "data."
        )
    if not checks.holds(slopes[1] > 0):
        raise ValueError(
            "there is no best temperature: the logits of the labels are no larger than "
            "the others on average, so that the likelihood rises as the temperature "
            "goes to infinity."
        )
    return result


@functools.partial(jax.jit, static_argnums=3)
def _search(
    outputs: jax.Array, labels: jax.Array, given: jax.Array, likelihood: Likelihood
) -> tuple[TemperatureScaling, jax.Array]:
    """The result, and the loss's slopes at the cold and the hot end."""
    weights = counted.weights_of(given, jnp.ones_like(given, bool), outputs.dtype)

    def loss(log_temperature: jax.Array) -> jax.Array:
        values = likelihood.log_prob(outputs * jnp.exp(-log_temperature), labels)
        return -counted.mean(values, weights)

    slope = jax.grad(loss)
    size = jnp.max(jnp.abs(outputs))
    middle = jnp.log(jnp.where(size > 0, size, jnp.ones_like(size)))
    low, high = middle - _REACH, middle + _REACH
    slopes = jnp.stack([slope(low), slope(high)])
    zero = jnp.zeros((), outputs.dtype)
    point = search.rising_zero(slope, low, high, jnp.clip(zero, low, high))
    bracketed = (slopes[0] < 0) & (slopes[1] > 0)
    one = jnp.where(bracketed, jnp.ones_like(zero), jnp.nan)
    scaling = TemperatureScaling(jnp.exp(point) * one, loss(zero), loss(point) * one)
    return scaling, slopes
