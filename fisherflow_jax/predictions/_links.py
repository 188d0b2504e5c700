r"""From normal outputs to expected targets: links, for `ff.predict(..., link=...)`.

A link is called as `link(outputs, likelihood)` with `Outputs` and returns `Averaged`.
Any such function will do; one that reads `outputs.covariance` says so by an attribute
`covariance = True`.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fisherflow_jax._ground import checks
from fisherflow_jax._ground.arrays import safe_sqrt
from fisherflow_jax._ground.checks import whole
from fisherflow_jax._ground.keys import key_data, typed_key
from fisherflow_jax.likelihoods import LOG, SOFTMAX, Likelihood
from fisherflow_jax.predictions._streaming import Outputs
from fisherflow_jax.products import root


class Averaged(NamedTuple):
    """Moments of the expected target over the posterior, each `(n, ...)`.

    One is made by `ff.predictions.probit`.
    """

    mean: jax.Array  # for categorical class probabilities (n, ..., C), summing to one
    std: jax.Array | None = None  # of the expected target; None: by linearisation
    noise: jax.Array | None = None  # expected variance of a target; None: at the mean


@dataclasses.dataclass(frozen=True)
class Link:
    """A named link; called as `link(outputs, likelihood) -> Averaged`.

    One is made by `ff.predictions.probit`.
    """

    name: str
    average: Callable[[Outputs, Likelihood], Averaged]
    # whether outputs of several classes need theirs; a number: up to so many classes
    covariance: bool | int = False
    streamed: bool = False  # whether `ff.predict` compiles it, a chunk at a time

    def __call__(self, outputs: Outputs, likelihood: Likelihood) -> Averaged:
        return self.average(outputs, likelihood)


def check_link(link: Any) -> None:
    """Raises unless it is a link, or None."""
    if link is not None:
        checks.function(
            link,
            "fisherflow_jax.predictions",
            "a link is a function of (Outputs, likelihood)",
            "ff.predictions.probit()",
        )


def is_categorical(likelihood: Likelihood, link: str) -> bool:
    """Of several classes, or of yes and no.

    Raises:
      ValueError: for any other.
    """
    if likelihood.is_classes:
        return likelihood.scale == SOFTMAX
    raise ValueError(
        f"{link} is a link for class probabilities (categorical, bernoulli); got "
        f"{likelihood.name}. For a gaussian the mean needs no link, for a log mean "
        "there is log_normal(), and output_samples serves any likelihood."
    )


def plug_in() -> Link:
    r"""The network's own: the expected target at the mean of the parameters.

    .. math:: \mathrm{E}\,\mu(z) \approx \mu(m), \qquad
       \mathrm{std}(\mu) \approx \Big|\frac{d\mu}{d\eta}\Big| \, \mathrm{std}(\eta)

    The default of rates and locations, as in software for generalised linear models;
    of classes by name alone, since what a posterior's scale says of probabilities is
    then lost.

    Returns:
      A `Link`. Cost: none beside the variances.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> outputs = ff.predictions.Outputs(jnp.array([2.0]), jnp.array([8.0]))
      >>> link = ff.predictions.plug_in()
      >>> print(link(outputs, ff.likelihoods.bernoulli()).mean.round(3))
      [0.881]
    """
    return Link("plug_in", _plug_in)


def _plug_in(outputs: Outputs, likelihood: Likelihood) -> Averaged:
    return Averaged(likelihood.mean(outputs.mean))


def probit() -> Link:
    r"""Shrinks each logit by its variance: MacKay's approximation.

    .. math:: \mathrm{E}\,\sigma(z) \approx
       \sigma\!\left(\frac{m}{\sqrt{1 + \pi v / 8}}\right), \qquad
       \mathrm{E}\,\mathrm{softmax}(z)_c \approx
       \mathrm{softmax}\!\left(\frac{m_c}{\sqrt{1 + \pi v_c / 8}}\right)_c

    for one logit, and for several classes the mean-field form, which ignores their
    correlations. The shift that softmax does not see matters there: keep logits near
    zero mean.

    Returns:
      A `Link`. Cost: none beside the variances.

    Raises:
      ValueError: when called with another likelihood than categorical or bernoulli.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> outputs = ff.predictions.Outputs(jnp.array([2.0]), jnp.array([8.0]))
      >>> link = ff.predictions.probit()
      >>> print(link(outputs, ff.likelihoods.bernoulli()).mean.round(3))
      [0.729]

    References:
      MacKay, "The evidence framework applied to classification networks", 1992.
      Lu, Ie, Sha, "Mean-field approximation to Gaussian-softmax integral with
      application to uncertainty estimation", 2020.
    """
    return Link("probit", _probit)


def _probit(outputs: Outputs, likelihood: Likelihood) -> Averaged:
    return _shrunk(*outputs[:2], is_categorical(likelihood, "probit()"))


# compiled as one: operation by operation a first call takes several times as long
@functools.partial(jax.jit, static_argnums=2)
def _shrunk(mean: jax.Array, variance: jax.Array, several: bool) -> Averaged:
    shrunk = mean / jnp.sqrt(1 + math.pi / 8 * variance)
    return Averaged(jax.nn.softmax(shrunk) if several else jax.nn.sigmoid(shrunk))


def output_samples(key: Any, num_samples: int = 256) -> Link:
    r"""Averages the expected target over draws of the outputs.

    .. math:: z_s \sim \mathcal N(m, \mathrm{Cov}(z)), \qquad
       \tfrac1S \textstyle\sum_s \mu(z_s)

    The outputs of one position are drawn together, with the same numbers at every
    example. Serves every likelihood.

    Args:
      key: an int, a key, or key data.
      num_samples: S; the error of a probability is at most `0.5 / sqrt(S)`.

    Returns:
      A `Link`. Memory: one draw of all outputs at a time; the covariances, k^2 numbers
      a position, for likelihoods that mix outputs.

    Raises:
      ValueError: unless `num_samples` is a whole number above 1.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> outputs = ff.predictions.Outputs(jnp.array([2.0]), jnp.array([8.0]))
      >>> link = ff.predictions.output_samples(0, num_samples=4096)
      >>> print(link(outputs, ff.likelihoods.bernoulli()).mean.round(1))
      [0.7]
    """
    whole(num_samples, "num_samples", least=2, of="draws")
    data = key_data(key)
    if data is None:
        raise ValueError("output_samples needs a key: an int, or a key of jax.random.")

    def average(outputs: Outputs, likelihood: Likelihood) -> Averaged:
        several = likelihood.mixes_outputs and outputs.mean.ndim > 1
        whole = _covariance(outputs, "output_samples") if several else None
        of = likelihood.mean, likelihood.variance
        return _over_draws(*outputs[:2], whole, data, of, num_samples)

    return Link("output_samples", average, covariance=True)


# compiled once a likelihood and shape, whatever the key
@functools.partial(jax.jit, static_argnums=(4, 5))
def _over_draws(
    mean: jax.Array,
    variance: jax.Array,
    covariance: jax.Array | None,
    key: Any,
    of: tuple[Callable, Callable],
    number: int,
) -> Averaged:
    """Over draws from the normal: `of` an output the expected target, its variance."""
    if covariance is not None:
        spread = root(covariance)
    else:
        spread = jnp.sqrt(jnp.maximum(variance, jnp.finfo(variance.dtype).tiny))

    def one(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        draw = jax.random.normal(key, mean.shape[1:], mean.dtype)
        draw = jnp.broadcast_to(draw, mean.shape)
        if spread.ndim > mean.ndim:
            drawn = mean + jnp.einsum("...ij,...j->...i", spread, draw)
        else:
            drawn = mean + spread * draw
        return of[0](drawn), of[1](drawn)

    keys = jax.random.split(typed_key(key), number)
    center, square, noise = drawn_moments(one, keys, of[0](mean))
    return Averaged(center, safe_sqrt(square), noise)


def drawn_moments(
    one: Callable[[jax.Array], tuple[jax.Array, jax.Array]],
    keys: jax.Array,
    center: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of `value, noise = one(key)`: the mean and variance of value, mean of noise.

    Around the value at the mean, so that few draws of small spread lose nothing.
    """

    def step(sums: Any, key: jax.Array) -> tuple[Any, None]:
        value, own = one(key)
        away = value - center
        return (sums[0] + away, sums[1] + jnp.square(away), sums[2] + own), None

    shapes = jax.eval_shape(one, keys[0])
    zero, noise = (jnp.zeros(x.shape, x.dtype) for x in shapes)
    sums, _ = jax.lax.scan(step, (zero, zero, noise), keys)
    shift, square, noise = (x / keys.shape[0] for x in sums)
    return center + shift, jnp.maximum(square - jnp.square(shift), 0), noise


def _covariance(outputs: Outputs, link: str) -> jax.Array:
    if outputs.covariance is None:
        raise ValueError(
            f"{link} needs the covariance of the outputs: "
            "ff.predictions.linearized_outputs(..., covariance=True)."
        )
    return outputs.covariance


def laplace_bridge(normalized: bool = False) -> Link:
    r"""The Dirichlet whose Laplace approximation over logits is the outputs' normal.

    With `m` and `V` conditioned on logits that sum to zero,

    .. math:: \alpha_c = \frac{1}{V_{cc}} \Big(1 - \frac2C
       + \frac{e^{m_c}}{C^2} \sum_j e^{-m_j}\Big), \qquad
       \mathrm{E}\,p_c = \frac{\alpha_c}{\sum_j \alpha_j},

    input by input and position by position. It is no approximation of the normal's
    own mean where variances are large. A bernoulli is two classes.

    Args:
      normalized: first divides V by :math:`s = \bar V_{cc} / \sqrt{C / 2}` and m by
        :math:`\sqrt s`, a correction for large variances.

    Returns:
      A `Link`; its standard deviations are the Dirichlet's. Memory: the covariances,
      C^2 numbers a position.

    Raises:
      ValueError: when called with another likelihood than categorical or bernoulli.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> outputs = ff.predictions.Outputs(
      ...     jnp.array([[1.0, 0.0, -1.0]]), jnp.ones((1, 3)), jnp.eye(3)[None]
      ... )
      >>> link = ff.predictions.laplace_bridge()
      >>> print(link(outputs, ff.likelihoods.categorical()).mean.round(3))
      [[0.549 0.276 0.175]]

    References:
      Hobbhahn, Kristiadi, Hennig, "Fast predictive uncertainty for classification with
      Bayesian deep networks", 2022.
    """

    def average(outputs: Outputs, likelihood: Likelihood) -> Averaged:
        several = is_categorical(likelihood, "laplace_bridge()")
        whole = _covariance(outputs, "laplace_bridge") if several else None
        return _bridge(*outputs[:2], whole, normalized)

    return Link("laplace_bridge", average, covariance=True)


@functools.partial(jax.jit, static_argnums=3)
def _bridge(
    mean: jax.Array, variance: jax.Array, covariance: Any, normalized: bool
) -> Averaged:
    """Of several classes; without a covariance, of yes and no."""
    if covariance is not None:
        return _dirichlet(*_sum_to_zero(mean, covariance), normalized)
    mean = jnp.stack([mean, -mean], -1) / 2
    variances = jnp.stack([variance, variance], -1) / 4
    pair = _dirichlet(mean, variances, normalized)
    return Averaged(*(x[..., 0] for x in pair))  # type: ignore[index]


def _sum_to_zero(mean: jax.Array, covariance: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and variances of logits given that they sum to zero."""
    row = jnp.sum(covariance, -1)
    total = jnp.sum(row, -1, keepdims=True)
    # nothing is known of the sum where it has no variance
    total = jnp.maximum(total, jnp.finfo(total.dtype).tiny)
    variances = jnp.diagonal(covariance, axis1=-2, axis2=-1)
    shift = row * jnp.sum(mean, -1, keepdims=True) / total
    # rounding must not make a variance negative
    least = jnp.finfo(total.dtype).eps * variances
    return mean - shift, jnp.maximum(variances - jnp.square(row) / total, least)


def _dirichlet(mean: jax.Array, variances: jax.Array, normalized: bool) -> Averaged:
    count = mean.shape[-1]
    if count == 1:
        return Averaged(jnp.ones_like(mean), jnp.zeros_like(mean), jnp.zeros_like(mean))
    variances = jnp.maximum(variances, jnp.finfo(variances.dtype).tiny)
    if normalized:
        size = jnp.mean(variances, -1, keepdims=True) / math.sqrt(count / 2)
        mean, variances = mean / jnp.sqrt(size), variances / size
    share = mean + jax.nn.logsumexp(-mean, -1, keepdims=True) - 2 * math.log(count)
    if count > 2:
        share = jnp.logaddexp(share, math.log(1 - 2 / count))
    log_alpha = share - jnp.log(variances)
    total = jax.nn.logsumexp(log_alpha, -1, keepdims=True)
    probabilities = jax.nn.softmax(log_alpha)
    whole = probabilities * (1 - probabilities)
    # 1 / (1 + alpha_0), without its overflow
    share_of_std = jax.nn.sigmoid(-total)
    return Averaged(
        probabilities,
        jnp.exp(0.5 * (jnp.log(whole) + jax.nn.log_sigmoid(-total))),
        whole * (1 - share_of_std),
    )


def log_normal() -> Link:
    r"""The exact mean of a rate whose logarithm is normal.

    .. math:: \mathrm{E}\,e^{z} = e^{m + v/2}, \qquad
       \mathrm{Var}(e^{z}) = (e^v - 1) \, e^{2 m + v}

    for poisson, negative_binomial and gamma, whose outputs are log means.

    Returns:
      A `Link`. Cost: none beside the variances; the expected variance of a target by
      quadrature.

    Raises:
      ValueError: when called with a likelihood whose outputs are no log means.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> outputs = ff.predictions.Outputs(jnp.array([0.0]), jnp.array([0.5]))
      >>> link = ff.predictions.log_normal()
      >>> print(link(outputs, ff.likelihoods.poisson()).mean.round(3))
      [1.284]
    """
    return Link("log_normal", _log_normal)


def _log_normal(outputs: Outputs, likelihood: Likelihood) -> Averaged:
    if likelihood.scale != LOG or likelihood.mixes_outputs:
        raise ValueError(
            "log_normal() is a link for outputs that are log means (poisson, "
            f"negative_binomial, gamma); got {likelihood.name}."
        )
    mean, variance = outputs.mean, outputs.variance
    rate = jnp.exp(mean + variance / 2)
    nodes, masses = np.polynomial.hermite_e.hermegauss(32)
    weights = jnp.asarray(masses / masses.sum(), mean.dtype)
    std = jnp.sqrt(jnp.maximum(variance, jnp.finfo(variance.dtype).tiny))
    at = jnp.asarray(nodes, mean.dtype).reshape((-1,) + (1,) * mean.ndim)
    values = likelihood.variance(mean[None] + std[None] * at)
    noise = jnp.tensordot(weights, values, 1)
    return Averaged(rate, rate * jnp.exp(0.5 * jnp.log(jnp.expm1(variance))), noise)
