r"""The log-probability of a target, averaged over a normal belief about the outputs.

.. math:: \log \int p(y \mid z) \, \mathcal N(z; m, s V) \, dz

as the likelihood knows it, by quadrature where each target has one output, and by
cubature elsewhere.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fisherflow_jax._ground import arrays, linalg, search
from fisherflow_jax._ground.quadrature import NUM_NODES, REACH, log_average
from fisherflow_jax.likelihoods import SOFTMAX, Likelihood
from fisherflow_jax.predictions import Outputs, quadrature

_POWER = 3
# The peak of a target this many standard deviations away is still found.
_FARTHEST = 40.0


def default(likelihood: Likelihood, link: Callable | None) -> Callable | None:
    """Several classes are averaged as `ff.predict` averages them.

    So is one logit, where the likelihood knows the logarithms.
    """
    if link not in (None, quadrature()):
        return link
    return quadrature() if likelihood.scale == SOFTMAX else None


def needs_covariance(
    likelihood: Likelihood, link: Callable | None, outputs: Any, targets: jax.Array
) -> bool:
    """Whether the covariances of a target's outputs count beside their variances."""
    if link is not None:
        most = getattr(link, "covariance", False)
        few = most is True or outputs.shape[-1] <= most
        return likelihood.scale == SOFTMAX and few
    if likelihood.expected_log_prob is not None:
        return likelihood.needs_covariance
    return outputs.shape != targets.shape


def log_density(
    likelihood: Likelihood, link: Callable | None, outputs: Outputs, targets: jax.Array
) -> jax.Array:
    """By a link's probabilities, as the likelihood knows it, or by the shapes.

    Returns:
      `(n, ...)`, one number a target.
    """
    if link is not None:
        probabilities = link(outputs, likelihood).mean
        # a probability that underflows is improbable, not impossible
        least = jnp.finfo(probabilities.dtype).tiny
        log_p = jnp.log(jnp.maximum(probabilities, least))
        if likelihood.scale == SOFTMAX:
            return likelihood.log_prob(log_p, targets)
        rest = jnp.log(jnp.maximum(1 - probabilities, least))
        share = arrays.like(targets, log_p)
        return share * log_p + (1 - share) * rest
    if likelihood.expected_log_prob is not None:
        return likelihood.expected_log_prob(*outputs[:3], targets)
    by_shape = _quadrature if outputs.mean.shape == targets.shape else _cubature
    return by_shape(likelihood, outputs, targets)


def _quadrature(
    likelihood: Likelihood, outputs: Outputs, targets: jax.Array
) -> jax.Array:
    r"""Two trapezoids: over the belief, and over the peak that the target makes in it.

    A likelihood much narrower than the belief falls between nodes of the first, which a
    search would exploit; the second is in :math:`u = \sinh^{-1}((z - c) / w)`, which
    resolves the peak and heavy tails. The integrand is shared out between them as
    :math:`q_A^3 : q_B^3`, by their nodes' densities.
    """
    mean, variance = arrays.widen(outputs.mean), outputs.variance
    dtype = mean.dtype
    # a belief of no width is its mean
    variance = jnp.maximum(variance, float(jnp.finfo(dtype).eps) ** 2)
    std = jnp.sqrt(variance)
    center, width = _peak(likelihood, mean, variance, targets)
    end = jnp.arcsinh(2 * REACH * std / width)
    nodes = jnp.linspace(-1, 1, NUM_NODES, dtype=dtype)
    log_step = math.log(2 / (NUM_NODES - 1))

    # z = mean + x, that beliefs narrower than the mean's rounding lose nothing
    def log_belief(x: jax.Array) -> jax.Array:
        return -0.5 * jnp.square(x / std) - jnp.log(std) - 0.5 * math.log(2 * math.pi)

    def value(x: jax.Array, sign: int) -> jax.Array:
        log_peak = -jnp.log(2 * end * jnp.hypot(width, x - center))
        share = -jax.nn.softplus(sign * _POWER * (log_belief(x) - log_peak))
        return likelihood.log_prob(mean + x, targets) + log_belief(x) + share

    def of_belief(node: jax.Array) -> jax.Array:
        return value(REACH * node * std, -1) + jnp.log(REACH * std)

    def of_peak(node: jax.Array) -> jax.Array:
        x = center + width * jnp.sinh(node * end)
        return value(x, 1) + jnp.log(end * width * jnp.cosh(node * end))

    steps = jnp.full_like(nodes, log_step)
    parts = [log_average(part, nodes, steps) for part in (of_belief, of_peak)]
    return jnp.logaddexp(*parts)


def _peak(
    likelihood: Likelihood, mean: jax.Array, variance: jax.Array, targets: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Center (from the mean) and width of likelihood times belief, at a higher peak."""

    score = jax.grad(lambda x: jnp.sum(likelihood.log_prob(mean + x, targets)))

    def slope(x: jax.Array) -> jax.Array:
        return score(x) - x / variance

    reach = _FARTHEST * jnp.sqrt(variance)
    # the likelihood's own peak, and one between it and the mean: beside a narrow peak a
    # heavy tail may leave the belief's own, which the other grid sees
    own = search.bisect(score, -reach, reach)
    both = search.bisect(slope, jnp.minimum(0, own), jnp.maximum(0, own))

    def height(x: jax.Array) -> jax.Array:
        log_prob = likelihood.log_prob(mean + x, targets)
        return log_prob - 0.5 * jnp.square(x) / variance

    center = jnp.where(height(own) > height(both), own, both)
    curvature = -jax.jvp(score, (center,), (jnp.ones_like(center),))[1]
    return center, jax.lax.rsqrt(jnp.maximum(curvature, 0) + 1 / variance)


def _cubature(
    likelihood: Likelihood, outputs: Outputs, targets: jax.Array
) -> jax.Array:
    r"""At :math:`\pm \sqrt k` along the columns of a root: exact for cubics."""
    mean = arrays.widen(outputs.mean)
    size = mean.shape[-1]
    values, basis = linalg.eigh(outputs.covariance)
    # eigenvalues below zero are rounding
    root = basis * jnp.sqrt(jnp.maximum(values, 0))[..., None, :]
    columns = math.sqrt(size) * jnp.moveaxis(root, -1, 0)
    steps = jnp.concatenate([columns, -columns])
    logs = jnp.full((2 * size,), -math.log(2 * size), mean.dtype)
    return log_average(lambda x: likelihood.log_prob(mean + x, targets), steps, logs)


def scaled(outputs: Outputs, factor: jax.Array) -> Outputs:
    """The outputs of a belief whose covariance is `factor` times as large."""
    return jax.tree.map(lambda x: factor * x, outputs)._replace(mean=outputs.mean)
