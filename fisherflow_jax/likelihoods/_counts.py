"""Likelihoods of counts given the log of their mean: poisson, negative_binomial."""

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
from fisherflow_jax.likelihoods._log_gamma import log_beta, stirling_remainder


def _nonnegative(targets):
    targets = jnp.asarray(targets)
    return (targets >= 0) & jnp.isfinite(targets)


def _mean(outputs):
    return jnp.exp(widen(outputs))


@choice
def poisson():
    r"""A count, given the log of its rate.

    .. math::
      \log p(y \mid z) = y z - e^z - \log y!, \qquad
      \text{output Fisher information } e^z.

    Outputs are `(n, ...)`, the log of the expected count; targets are counts of the
    same shape, integer or floating. Targets that are not whole are allowed, with
    :math:`y! = \Gamma(y + 1)`: the score is then a quasi-score, consistent for the
    mean, and the log-probability is not normalised. A negative target has
    log-probability NaN, and a NaN gradient.

    Returns:
      A `Likelihood`, the same object for every call.

    Raises:
      ValueError: by `check`, for shapes that differ.

    Example:
      >>> import jax.numpy as jnp
      >>> from fisherflow_jax import likelihoods
      >>> likelihood = likelihoods.poisson()
      >>> log_rates, counts = jnp.log(jnp.array([2.0])), jnp.array([0])
      >>> round(float(likelihood.log_prob(log_rates, counts)[0]), 4)
      -2.0
      >>> round(float(likelihood.variance(log_rates)[0]), 4)
      2.0

    References:
      P. McCullagh and J. A. Nelder, "Generalized Linear Models", 1989.
    """
    name = "poisson"
    check = one_output_a_target(name)

    def log_prob(outputs, targets):
        check(outputs, targets)
        log_rate = widen(outputs)
        count = like(targets, log_rate)
        some = jnp.where(count > 0, count, 1)
        # The terms of the size of the count are kept together: their sum is small.
        log_ratio = log_rate - jnp.log(some)
        value = some * (log_ratio - jnp.expm1(log_ratio))
        value = value + stirling_remainder(some) - jnp.log(some)
        value = jnp.where(count > 0, value, -jnp.exp(log_rate))
        return nan_outside(_nonnegative(targets), value)

    def sample(key, outputs):
        rate = _mean(outputs)
        return jax.random.poisson(key, rate).astype(rate.dtype)

    def root(outputs, probes, key=None):
        return scaled_probes(outputs, jnp.exp(0.5 * widen(outputs)), probes)

    return Likelihood(
        name=name,
        log_prob=log_prob,
        mean=_mean,
        variance=_mean,
        sample=sample,
        root=root,
        probe_shape=tuple,
        line=widen,
        scale=LOG,
        support=_nonnegative,
        check=check,
        diagonal=True,
    )


@choice
def negative_binomial(concentration):
    r"""A count more variable than Poisson, given the log of its mean.

    With :math:`\mu = e^z` and concentration r, a Poisson count whose rate is
    gamma distributed with mean :math:`\mu` and shape r:

    .. math::
      \log p(y \mid z) = \log \frac{\Gamma(y + r)}{\Gamma(r)\, y!}
        + r \log \frac{r}{r + \mu} + y \log \frac{\mu}{r + \mu}, \qquad
      \operatorname{Var} y = \mu + \mu^2 / r,

    with output Fisher information :math:`\mu r / (r + \mu)`.

    Outputs are `(n, ...)`, the log of the expected count; targets are counts of the
    same shape, integer or floating; as for `poisson`, they need not be whole. A
    negative target has log-probability NaN, and a NaN gradient.

    Args:
      concentration: r, a number; the larger, the closer to Poisson.

    Returns:
      A `Likelihood`, the same object for equal arguments.

    Raises:
      ValueError: for a concentration that is not positive; by `check`, for shapes that
        differ.

    Example:
      >>> import jax.numpy as jnp
      >>> from fisherflow_jax import likelihoods
      >>> likelihood = likelihoods.negative_binomial(concentration=2.0)
      >>> round(float(likelihood.variance(jnp.log(jnp.array([4.0])))[0]), 4)
      12.0

    References:
      J. F. Lawless, "Negative binomial and mixed Poisson regression", 1987.
    """
    name = "negative_binomial"
    require_positive(name, "concentration", concentration)
    check = one_output_a_target(name)

    def log_odds(outputs):
        """log(mean / concentration), and the concentration in the same dtype."""
        log_mean = widen(outputs)
        r = like(concentration, log_mean)
        return log_mean - jnp.log(r), r

    def log_prob(outputs, targets):
        check(outputs, targets)
        odds, r = log_odds(outputs)
        count = like(targets, odds)
        some = jnp.where(count > 0, count, 1)
        log_ways = jnp.where(count > 0, -log_beta(r, some) - jnp.log(some), 0)
        value = r * jax.nn.log_sigmoid(-odds) + count * jax.nn.log_sigmoid(odds)
        return nan_outside(_nonnegative(targets), log_ways + value)

    def variance(outputs):
        mean = _mean(outputs)
        return mean + mean**2 / like(concentration, mean)

    def sample(key, outputs):
        odds, r = log_odds(outputs)
        rate_key, count_key = jax.random.split(key)
        log_gamma = jax.random.loggamma(rate_key, r, odds.shape, odds.dtype)
        rate = jnp.exp(log_gamma + odds)
        return jax.random.poisson(count_key, rate).astype(rate.dtype)

    def root(outputs, probes, key=None):
        odds, r = log_odds(outputs)
        factor = jnp.sqrt(r) * jnp.exp(0.5 * jax.nn.log_sigmoid(odds))
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
        support=_nonnegative,
        check=check,
        diagonal=True,
    )
