"""Likelihoods given the log of their mean: poisson, negative_binomial, gamma."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from fisherflow_jax._ground.arrays import like, widen
from fisherflow_jax.likelihoods import _distances as distances
from fisherflow_jax.likelihoods import _likelihood as shared
from fisherflow_jax.likelihoods import _quasi as quasi
from fisherflow_jax.likelihoods._likelihood import LOG, Likelihood, one_output
from fisherflow_jax.likelihoods._log_gamma import log_beta, stirling_remainder
from fisherflow_jax.likelihoods._nuisance import Nuisance, unknown


def _nonnegative(targets: ArrayLike) -> jax.Array:
    targets = jnp.asarray(targets)
    return (targets >= 0) & jnp.isfinite(targets)


def _positive(targets: ArrayLike) -> jax.Array:
    targets = jnp.asarray(targets)
    return (targets > 0) & jnp.isfinite(targets)


@shared.family
def poisson(dispersion: ArrayLike | None = 1.0) -> Likelihood:
    r"""A count, given the log of its rate.

    .. math::
      \log p(y \mid z) = y z - e^z - \log y!, \qquad
      \text{output Fisher information } e^z.

    Outputs are `(n, ...)`, the log of the expected count; targets are counts of the
    same shape, integer or floating. Targets that are not whole are allowed, with
    :math:`y! = \Gamma(y + 1)`: the score is then a quasi-score, consistent for the
    mean, and the log-probability is not normalised. A negative target has
    log-probability NaN, and a NaN gradient.

    Args:
      dispersion: a number :math:`\phi`: the variance is :math:`\phi e^z`, the score and
        the information those of a Poisson count divided by it (quasi-Poisson), the
        log-probability Efron's double Poisson. None: unknown. The likelihood is then
        that of unit dispersion; a flow estimates :math:`\phi` by Pearson's statistic.
        Draws are gamma distributed.

    Returns:
      A `Likelihood`, the same object for equal arguments.

    Raises:
      ValueError: for a dispersion that is not positive; by `check`, for shapes that
        differ.

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
      McCullagh, Nelder, "Generalized Linear Models", 1989.
      Efron, "Double exponential families and their use in generalized linear
      regression", 1986.
    """
    if not quasi.is_one(dispersion):
        return _with_dispersion(poisson(), dispersion, poisson, jnp.ones_like)

    def log_prob(log_rate: jax.Array, count: jax.Array) -> jax.Array:
        some = jnp.where(count > 0, count, 1)
        # The terms of the size of the count are kept together: their sum is small.
        log_ratio = log_rate - jnp.log(some)
        value = some * (log_ratio - jnp.expm1(log_ratio))
        value = value + stirling_remainder(some) - jnp.log(some)
        return jnp.where(count > 0, value, -jnp.exp(log_rate))

    def sample(key: jax.Array, log_rate: jax.Array) -> jax.Array:
        draws = jax.random.poisson(key, jnp.exp(log_rate))
        return draws.astype(log_rate.dtype)

    def root(log_rate: jax.Array) -> jax.Array:
        return jnp.exp(0.5 * log_rate)

    parts = _nonnegative, log_prob, jnp.exp, sample, root, distances.poisson
    return one_output("poisson", LOG, *parts)


@shared.family
def negative_binomial(
    concentration: ArrayLike | None, dispersion: ArrayLike | None = 1.0
) -> Likelihood:
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
      concentration: r, a number; the larger, the closer to Poisson. None: unknown. A
        flow then estimates its logarithm beside the parameters, under the prior
        N(0, 2^2); `state.nuisance` is a state about that.
      dispersion: a number that multiplies the variance, as for `poisson`; None:
        unknown.

    Returns:
      A `Likelihood`, the same object for equal arguments.

    Raises:
      ValueError: for a concentration or dispersion that is not positive, for both
        unknown; by `check`, for shapes that differ; where an unknown concentration
        would have to be known.

    Example:
      >>> import jax.numpy as jnp
      >>> from fisherflow_jax import likelihoods
      >>> likelihood = likelihoods.negative_binomial(concentration=2.0)
      >>> round(float(likelihood.variance(jnp.log(jnp.array([4.0])))[0]), 4)
      12.0

    References:
      Lawless, "Negative binomial and mixed Poisson regression", 1987.
    """
    name = "negative_binomial"
    if concentration is None:
        if not quasi.is_one(dispersion):
            raise ValueError(
                f"{name}: both a concentration and a dispersion scale the variance; "
                f"with concentration=None leave dispersion at 1, got {dispersion}."
            )

        def known(logs: dict[str, jax.Array]) -> Likelihood:
            return negative_binomial(jnp.exp(logs["concentration"]))

        return unknown(Nuisance(("concentration",), (0.0,), (2.0,), known))
    shared.require_positive(name, "concentration", concentration)
    if not quasi.is_one(dispersion):
        return _with_dispersion(
            negative_binomial(concentration),
            dispersion,
            lambda phi: negative_binomial(concentration, phi),
            lambda mean: 1 + mean / like(concentration, mean),
        )

    def log_odds(log_mean: jax.Array) -> tuple[jax.Array, jax.Array]:
        """log(mean / concentration), and the concentration in the same dtype."""
        r = like(concentration, log_mean)
        return log_mean - jnp.log(r), r

    def log_prob(log_mean: jax.Array, count: jax.Array) -> jax.Array:
        odds, r = log_odds(log_mean)
        some = jnp.where(count > 0, count, 1)
        log_ways = jnp.where(count > 0, -log_beta(r, some) - jnp.log(some), 0)
        value = r * jax.nn.log_sigmoid(-odds) + count * jax.nn.log_sigmoid(odds)
        return log_ways + value

    def variance(log_mean: jax.Array) -> jax.Array:
        mean = jnp.exp(log_mean)
        return mean + mean**2 / like(concentration, mean)

    def sample(key: jax.Array, log_mean: jax.Array) -> jax.Array:
        odds, r = log_odds(log_mean)
        rate_key, count_key = jax.random.split(key)
        log_gamma = jax.random.loggamma(rate_key, r, odds.shape, odds.dtype)
        rate = jnp.exp(log_gamma + odds)
        return jax.random.poisson(count_key, rate).astype(rate.dtype)

    def root(log_mean: jax.Array) -> jax.Array:
        odds, r = log_odds(log_mean)
        return jnp.sqrt(r) * jnp.exp(0.5 * jax.nn.log_sigmoid(odds))

    def distance(log_mean: jax.Array, other: jax.Array) -> jax.Array:
        r = like(concentration, log_mean)
        return distances.negative_binomial(r, log_mean, other)

    parts = _nonnegative, log_prob, variance, sample, root, distance
    return one_output(name, LOG, *parts)


def _with_dispersion(
    family: Likelihood,
    dispersion: ArrayLike | None,
    again: Callable[[ArrayLike], Likelihood],
    excess: Callable[[jax.Array], jax.Array],
) -> Likelihood:
    """Of counts whose variance is the mean times `excess(mean)`, given its log."""

    def saturated(count: jax.Array) -> jax.Array:
        some = jnp.where(count > 0, count, 1)
        return jnp.where(count > 0, family.log_prob(jnp.log(some), some), 0)

    def pearson(log_mean: jax.Array, count: jax.Array) -> jax.Array:
        mean = jnp.exp(log_mean)
        return ((count - mean) * jnp.exp(-0.5 * log_mean)) ** 2 / excess(mean)

    def sample(key: jax.Array, log_mean: jax.Array, variance: jax.Array) -> jax.Array:
        return quasi.gamma_draws(key, jnp.exp(log_mean), variance)

    return quasi.with_dispersion(family, dispersion, again, saturated, pearson, sample)


@shared.family
def gamma(shape: ArrayLike | None = 1.0) -> Likelihood:
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
      McCullagh, Nelder, "Generalized Linear Models", 1989.
    """
    name = "gamma"
    if shape is None:
        return gamma(1.0)._replace(
            with_dispersion=lambda dispersion: gamma(1 / dispersion),
            pearson=shared.on_both(name, lambda z, y: (y * jnp.exp(-z) - 1) ** 2),
            log_unit_variance=_log_square,
        )
    shared.require_positive(name, "shape", shape)

    def log_prob(log_mean: jax.Array, targets: jax.Array) -> jax.Array:
        log_target = jnp.log(targets)
        log_ratio = log_target - log_mean
        a = like(shape, log_mean)
        # The terms of size a are kept together: they cancel for a large shape.
        value = a * (log_ratio - jnp.expm1(log_ratio)) - log_target
        return value + stirling_remainder(a)

    def variance(log_mean: jax.Array) -> jax.Array:
        mean = jnp.exp(log_mean)
        return mean**2 / like(shape, mean)

    def sample(key: jax.Array, log_mean: jax.Array) -> jax.Array:
        a = like(shape, log_mean)
        log_gamma = jax.random.loggamma(key, a, log_mean.shape, log_mean.dtype)
        draws = jnp.exp(log_gamma - jnp.log(a) + log_mean)
        # Underflow would leave the support.
        return jnp.maximum(draws, jnp.finfo(draws.dtype).tiny)

    def root(log_mean: jax.Array) -> jax.Array:
        return jnp.sqrt(like(shape, log_mean))

    def distance(log_mean: jax.Array, other: jax.Array) -> jax.Array:
        return distances.flat(root(log_mean), log_mean, other)

    return one_output(name, LOG, _positive, log_prob, variance, sample, root, distance)


def _log_square(targets: ArrayLike) -> jax.Array:
    return shared.nan_outside(_positive(targets), 2 * jnp.log(widen(targets)))
