"""Intervals for a new observation, not for its mean."""

from typing import Any

import jax

from fisherflow_jax.likelihoods import Likelihood
from fisherflow_jax.posteriors import degrees_of_freedom, two_sided
from fisherflow_jax.predictions._prediction import Prediction


def observation_interval(
    prediction: Prediction,
    likelihood: Likelihood,
    level: float = 0.95,
    *,
    state: Any = None,
) -> tuple[jax.Array, jax.Array]:
    r"""Where a new target falls with probability `level`, for normal errors.

    .. math:: m \pm q \sqrt{\mathrm{Var}(m) + \sigma^2}

    `prediction.observation_std` holds both parts: what is not known of the mean, and
    the noise. For `gaussian(scale)` the noise is the scale's; where it is estimated by
    the state, or set afterwards by `likelihood.with_dispersion(value)`, it is that
    value; for `gaussian_location_scale` it is each input's own. For counts and other
    skewed targets use quantiles of draws, or conformal sets
    (`ff.calibration`), which assume no distribution.

    Args:
      prediction: from `ff.predict` with the same likelihood.
      likelihood: gaussian, with known or unknown scale, or gaussian_location_scale.
      level: the probability of covering, in (0, 1).
      state: where it estimates the dispersion, for Student's t in place of the normal.

    Returns:
      `(lower, upper)`, each like `prediction.mean`.

    Raises:
      ValueError: for a level outside (0, 1), or another likelihood.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> information = ff.structures.Scalar(jnp.array(1.0))
      >>> state = ff.posterior(jnp.array(2.0), information, prior_precision=1e-6)
      >>> likelihood = ff.likelihoods.gaussian(scale=1.0)
      >>> x = jnp.ones(1)
      >>> prediction = ff.predict(state, lambda p, x: p * x, likelihood, x)
      >>> lower, upper = ff.predictions.observation_interval(prediction, likelihood)
      >>> print(lower.round(2), upper.round(2))  # 2 -+ 1.96 sqrt(1 + 1)
      [-0.77] [4.77]
    """
    if not likelihood.normal_errors:
        raise ValueError(
            "observation_interval is for normal errors (gaussian, "
            f"gaussian_location_scale); got {likelihood.name}."
        )
    spare = None if state is None else degrees_of_freedom(state)
    reach = two_sided(level, spare, prediction.mean.dtype)
    reach = reach * prediction.observation_std
    return prediction.mean - reach, prediction.mean + reach
