"""Likelihoods of positive targets given the log of their mean: gamma."""

import jax
import jax.numpy as jnp

from fisherflow_jax._ground.arrays import like, widen
from fisherflow_jax._ground.choices import choice
from fisherflow_jax.likelihoods._checks import one_output_a_target, require_positive
from fisherflow_jax.likelihoods._likelihood import (
    LOG,
    Likelihood,
    nan_outside,
    scaled_probes,
)
from fisherflow_jax.likelihoods._log_gamma import stirling_remainder


def _positive(targets):
    targets = jnp.asarray(targets)
    return (targets > 0) & jnp.isfinite(targets)


def _mean(outputs):
    return jnp.exp(widen(outputs))


@choice
def gamma(shape=1.0):
    r"""A positive target of constant relative error, given the log of its mean.

    With :math:`\mu = e^z` and shape a,

    .. math::
      \log p(y \mid z) = a \log(a y / \mu) - a y / \mu - \log y - \log \Gamma(a), \qquad
      \operatorname{Var} y = \mu^2 / a,

    with output Fisher information a. The dispersion is 1 / a; a = 1 is the exponential
    distribution.

    Outputs are `(n, ...)`, the log of the mean; targets are positive, of the same
    shape. A target of zero or below has log-probability NaN, and a NaN gradient.

    Args:
      shape: the shape a, a number; the relative standard deviation of a target is
        :math:`a^{-1/2}`. None: unknown. The likelihood is then that of unit dispersion,
        and `with_dispersion(phi)` the one with a = 1 / phi known.

    Returns:
      A `Likelihood`, the same object for equal arguments.

    Raises:
      ValueError: for a shape that is not positive; by `check`, for array shapes that
        differ.

    Example:
      >>> import jax.numpy as jnp
      >>> from fisherflow_jax import likelihoods
      >>> likelihood = likelihoods.gamma(shape=4.0)
      >>> round(float(likelihood.variance(jnp.log(jnp.array([2.0])))[0]), 4)
      1.0
      >>> float(likelihood.root(jnp.zeros(1), jnp.ones(1))[0])
      2.0

    References:
      P. McCullagh and J. A. Nelder, "Generalized Linear Models", 1989.
    """
    name = "gamma"
    if shape is None:
        return gamma(1.0)._replace(
            with_dispersion=lambda dispersion: gamma(1 / dispersion),
            pearson=_squared_relative_error,
            log_unit_variance=_log_squared,
        )
    require_positive(name, "shape", shape)
    check = one_output_a_target(name)

    def log_prob(outputs, targets):
        check(outputs, targets)
        log_mean = widen(outputs)
        possible = _positive(targets)
        log_target = jnp.log(jnp.where(possible, like(targets, log_mean), 1))
        log_ratio = log_target - log_mean
        a = like(shape, log_mean)
        # The terms of size a are kept together: they cancel for a large shape.
        value = a * (log_ratio - jnp.expm1(log_ratio)) - log_target
        return nan_outside(possible, value + stirling_remainder(a))

    def variance(outputs):
        mean = _mean(outputs)
        return mean**2 / like(shape, mean)

    def sample(key, outputs):
        log_mean = widen(outputs)
        a = like(shape, log_mean)
        log_gamma = jax.random.loggamma(key, a, log_mean.shape, log_mean.dtype)
        draws = jnp.exp(log_gamma - jnp.log(a) + log_mean)
        # Underflow would leave the support.
        return jnp.maximum(draws, jnp.finfo(draws.dtype).tiny)

    def root(outputs, probes, key=None):
        factor = jnp.sqrt(like(shape, widen(outputs)))
        return scaled_probes(outputs, factor, probes)

    return Likelihood(
        name=name,
        log_prob=log_prob,
        mean=_mean,
        variance=variance,
        sample=sample,
        root=root,
        probe_shape=tuple,
        line=widen,
        scale=LOG,
        support=_positive,
        check=check,
        diagonal=True,
    )


def _squared_relative_error(outputs, targets):
    one_output_a_target("gamma")(outputs, targets)
    log_mean = widen(outputs)
    return (like(targets, log_mean) * jnp.exp(-log_mean) - 1) ** 2


def _log_squared(targets):
    possible = _positive(targets)
    targets = jnp.where(possible, widen(targets), 1)
    return nan_outside(possible, 2 * jnp.log(targets))
