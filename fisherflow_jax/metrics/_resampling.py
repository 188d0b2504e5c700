"""How far a metric would move on other examples: the bootstrap."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fisherflow_jax._ground import checks, counted
from fisherflow_jax._ground.keys import typed_key


class Bootstrap(NamedTuple):
    """A metric with its band, each shaped like the metric.

    Made by `ff.metrics.bootstrap`.
    """

    value: jax.Array  # of the examples themselves
    lower: jax.Array
    upper: jax.Array
    bias: jax.Array  # mean over the resamples, less the value


def bootstrap(
    metric: Callable[..., jax.Array],
    *arrays: jax.Array,
    key: Any,
    level: float = 0.9,
    num_resamples: int = 200,
    weights: counted.Weights = None,
    batch_size: int = 25,
) -> Bootstrap:
    r"""A metric with a band for the examples it happened to be measured on.

    With `m` the metric and `q` quantiles over resamples of the examples, drawn with
    replacement, the band is the pivotal one:

    .. math:: \left[ 2m - q_{(1 + \mathrm{level}) / 2},\;
       2m - q_{(1 - \mathrm{level}) / 2} \right]

    It takes off the bias by which a finite sample raises a calibration error, as the
    percentiles themselves would not. Whole examples are drawn, so that the targets of
    one example (pixels, tokens) stay together.

    A calibration error is a sum of absolute values, for which no bootstrap is right
    near zero: of 90 % bands of the ECE (10 bins, 300 and 2000 examples) 81 % to 89 %
    held the truth where the model was overconfident (percentiles: 51 % to 93 %), but
    only 43 % and 47 % where it was calibrated and the truth zero (percentiles: none).

    Args:
      metric: `(*arrays, weights=weights)` -> a number or an array;
        `functools.partial` for options.
      arrays: what the metric takes, each with the leading axis n.
      key: an int, a key, or key data.
      level: of the band, in (0, 1).
      num_resamples: at least 2; the ends are quantiles of as many values.
      weights: as the metric takes them, `(n, ...)` or `(n,)`, numbers or booleans; an
        example is drawn with its own, and never one of which nothing counts.
      batch_size: resamples at a time. Memory: batch_size times the arrays.

    Returns:
      A `Bootstrap(value, lower, upper, bias)`. Cost: the metric num_resamples times.

    Raises:
      ValueError: for leading axes that differ, a level outside (0, 1), fewer than two
        resamples, and as the metric does.

    Example:
      >>> import jax.numpy as jnp
      >>> from fisherflow_jax import metrics
      >>> p = jnp.linspace(0.05, 0.95, 200)
      >>> y = jnp.arange(200) % 5 < 2
      >>> band = metrics.bootstrap(metrics.brier, p, y, key=0)
      >>> bool(band.lower < band.value) and bool(band.value < band.upper)
      True

    References:
      Efron, "Bootstrap methods: another look at the jackknife", 1979.
      Davison, Hinkley, "Bootstrap methods and their application", 1997.
    """
    checks.fraction(level, "level")
    checks.whole(num_resamples, "num_resamples", least=2)
    arrays = tuple(jnp.asarray(x) for x in arrays)
    counts = {x.shape[0] if x.ndim else 0 for x in arrays}
    if len(counts) != 1 or 0 in counts:
        raise ValueError(
            "bootstrap draws examples: every array has the same leading axis n, at "
            f"least 1; got shapes {[x.shape for x in arrays]}."
        )
    count = counts.pop()
    value = metric(*arrays, weights=weights)
    shape = (count,) if weights is None else (count, *jnp.shape(weights)[1:])
    given = counted.weights_in_full(weights, shape)
    examples = jnp.any(counted.used(given).reshape((count, -1)), -1)
    first = jnp.argsort(~examples)  # stable: the examples that count, then the padding
    number = jnp.sum(examples, dtype=jnp.int32)
    places = jnp.arange(count, dtype=jnp.int32)

    def resample(key: jax.Array) -> jax.Array:
        index = first[jax.random.randint(key, (count,), 0, number, dtype=jnp.int32)]
        kept = (places < number).reshape((-1,) + (1,) * (given.ndim - 1))
        drawn = jnp.where(kept, given[index], jnp.zeros_like(given))
        return metric(*(x[index] for x in arrays), weights=drawn)

    keys = jax.random.split(typed_key(key), num_resamples)
    values = jax.lax.map(resample, keys, batch_size=batch_size)
    tails = jnp.asarray([(1 + level) / 2, (1 - level) / 2], values.dtype)
    upper, lower = jnp.quantile(values, tails, axis=0)
    return Bootstrap(
        value, 2 * value - upper, 2 * value - lower, jnp.mean(values, 0) - value
    )
