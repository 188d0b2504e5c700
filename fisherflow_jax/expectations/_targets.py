"""Points and weights of an expectation over the targets of a distribution."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fisherflow_jax._ground import checks, choices

# Of counts: how far they are summed, in standard deviations from the mean. A geometric
# tail of 40 has the probability exp(-40).
_BELOW, _ABOVE = 20.0, 40.0


class OverTargets(NamedTuple):
    """How an expectation over targets is taken. Made by the factories of this room.

    One is made by `ff.expectations.enumeration`.

    Attributes:
      call: how it was made, for printing.
      points: `(distribution, dtype, key) -> (targets (m, ...), weights (m,))`; the
        weights sum to one, less the probability that the points miss.
      num_draws: m, where the targets are drawn; None: they are not, and need no key.
    """

    call: str
    points: Callable[[Any, Any, Any], tuple[jax.Array, jax.Array]]
    num_draws: int | None = None

    def __repr__(self) -> str:
        return self.call


@choices.choice
def enumeration(num_counts: int = 1000) -> OverTargets:
    r"""The sum over the support: exact for targets that can be listed.

    .. math:: \sum_y p(y) f(y)

    Of a distribution with a finite support that is `enumerate_support()`. Of counts
    (`is_discrete`, with `mean` and `variance`) as many of them as `num_counts`, from 20
    standard deviations below the mean to 40 above; where these are more, every k-th in
    the place of k.

    Args:
      num_counts: how many counts are summed, where the support is not finite.

    Returns:
      A rule. Cost: a log-probability for each target of the support.

    Example:
      >>> import fisherflow_jax as ff
      >>> ff.expectations.enumeration()
      enumeration(num_counts=1000)
    """
    checks.whole(num_counts, "num_counts", of="targets")

    def points(distribution: Any, dtype: Any, key: Any) -> tuple[jax.Array, jax.Array]:
        listed = getattr(distribution, "enumerate_support", None)
        if listed is not None and getattr(distribution, "has_enumerate_support", True):
            targets, step = listed(), jnp.ones((), dtype)
        else:
            targets, step = _counts(distribution, num_counts, dtype)
        logs = jax.vmap(distribution.log_prob)(targets)
        return targets, step * jnp.exp(logs.astype(dtype))

    return OverTargets(f"enumeration(num_counts={num_counts})", points)


def _counts(distribution: Any, number: int, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """Counts around the mean, and how many each stands for."""
    if not getattr(distribution, "is_discrete", False):
        raise TypeError(
            f"enumeration() lists the targets of a discrete distribution; got "
            f"{type(distribution).__name__}, whose targets have quantiles()."
        )
    mean = jnp.asarray(distribution.mean, dtype)
    deviation = jnp.sqrt(jnp.asarray(distribution.variance, dtype))
    mean, deviation = jax.lax.stop_gradient((mean, deviation))
    least = getattr(getattr(distribution, "support", None), "lower_bound", 0)
    low = jnp.maximum(jnp.floor(mean - _BELOW * deviation), jnp.asarray(least, dtype))
    span = mean + _ABOVE * deviation - low
    # an odd number, of which the middle one is a count and stands for all
    half = jnp.maximum(jnp.ceil((span / number - 1) / 2), 0.0).astype(dtype)
    step = 2 * half + 1
    return low + half + step * jnp.arange(number, dtype=dtype), step


@choices.choice
def quantiles(order: int = 64, breaks: Sequence[float] = ()) -> OverTargets:
    r"""Quadrature through the quantile function, for continuous targets.

    .. math:: \mathrm{E} f(y) = \int_0^1 f(Q(u))\, du, \qquad
       u = v^4 (35 - 84 v + 70 v^2 - 20 v^3)

    with Gauss-Legendre nodes in v: graded towards both ends, where a score that grows
    without bound would cost all digits. With 50 nodes the information of smooth
    families is right to about 1e-9, with 200 to 1e-12.

    Args:
      order: nodes between two breaks.
      breaks: probabilities at which the score jumps or bends, such as `(0.5,)` for a
        Laplace distribution.

    Returns:
      A rule, for distributions with a quantile function `icdf` of one target. Cost:
      `order` quantiles a piece.

    Example:
      >>> import fisherflow_jax as ff
      >>> ff.expectations.quantiles(100, breaks=(0.5,))
      quantiles(order=100, breaks=(0.5,))
    """
    checks.whole(order, "order", of="nodes")
    ends = [0.0, *(float(x) for x in breaks), 1.0]
    pairs = list(itertools.pairwise(ends))
    if any(low >= high for low, high in pairs):
        raise ValueError(
            f"breaks are probabilities in (0, 1), ascending; got {tuple(breaks)}."
        )
    nodes, weights = np.polynomial.legendre.leggauss(order)
    v, weights = (nodes + 1) / 2, weights / 2
    below = v**4 * (35 - 84 * v + 70 * v**2 - 20 * v**3)
    density = 140 * v**3 * (1 - v) ** 3 * weights
    levels = np.concatenate([low + (high - low) * below for low, high in pairs])
    shares = np.concatenate([(high - low) * density for low, high in pairs])

    def points(distribution: Any, dtype: Any, key: Any) -> tuple[jax.Array, jax.Array]:
        name = type(distribution).__name__
        if getattr(distribution, "event_shape", ()) != ():
            raise TypeError(f"quantiles() are of one number; {name} has several.")
        if getattr(distribution, "is_discrete", False):
            raise TypeError(f"{name} is discrete: its targets have enumeration().")
        limits = jnp.finfo(dtype)
        inside = np.clip(levels, float(limits.tiny), 1 - float(limits.epsneg))
        targets = distribution.icdf(jnp.asarray(inside, dtype))
        return targets, jnp.asarray(shares, dtype)

    call = f"quantiles(order={order}, breaks={tuple(breaks)})"
    return OverTargets(call, points)


@choices.choice
def draws(num_samples: int) -> OverTargets:
    r"""The mean over targets drawn from the distribution: for any, with its noise.

    Args:
      num_samples: m; the relative error falls as :math:`m^{-1/2}`.

    Returns:
      A rule, which needs a key. Cost: m draws.

    Example:
      >>> import fisherflow_jax as ff
      >>> ff.expectations.draws(100)
      draws(100)
    """
    checks.whole(num_samples, "num_samples", of="targets")

    def points(distribution: Any, dtype: Any, key: Any) -> tuple[jax.Array, jax.Array]:
        targets = distribution.sample(key, (num_samples,))
        share = jnp.full((num_samples,), 1 / num_samples, dtype)
        return jax.lax.stop_gradient(targets), share

    return OverTargets(f"draws({num_samples})", points, num_samples)
