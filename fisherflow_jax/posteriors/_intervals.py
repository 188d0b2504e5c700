"""Standard errors and confidence intervals of the parameters."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from fisherflow_jax import information as ops
from fisherflow_jax._ground import trees
from fisherflow_jax._ground.checks import holds
from fisherflow_jax.flow._bank import BankState
from fisherflow_jax.posteriors._quantiles import two_sided

PyTree = Any


def dispersion_of(state: Any) -> jax.Array | None:
    """The estimated dispersion, or None where it is known.

    Raises:
      ValueError: where it is at hand and there are too few observations for it.
    """
    dispersion, spare = getattr(state, "dispersion", None), degrees_of_freedom_of(state)
    if dispersion is None or spare is None:
        return None
    return jnp.where(spare > 0, dispersion, jnp.nan)


def degrees_of_freedom_of(state: Any) -> jax.Array | None:
    """For Student's t; None: normal quantiles.

    Raises:
      ValueError: as `dispersion_of` does.
    """
    if isinstance(state, BankState):
        return None
    spare = getattr(state, "degrees_of_freedom", None)
    if spare is None:
        return None
    # no more parameters can be effective than there are observations, so that too few
    # of these leave a little for the prior and rounding of either sign
    rounding = trees.size(state.mean) * float(jnp.finfo(spare.dtype).eps) ** 0.5
    none = min(max(rounding, 1e-3), 0.5)
    spare = jnp.where(spare > none, spare, jnp.zeros_like(spare))
    if not holds(spare > 0):
        raise ValueError(
            "the dispersion is unknown and cannot be estimated: "
            f"{float(jnp.min(state.count)):g} observations leave no degree of freedom "
            "beside the parameters."
        )
    return spare


def meat_of(state: Any) -> Any:
    """The sum of squared scores that robust=True asks for."""
    meat = getattr(state, "meat", None)
    if meat is None:
        raise ValueError(
            "robust=True needs the sum of squared scores, which a flow keeps when it "
            "is built with robust=True: ff.fisher_flow(..., robust=True)."
        )
    return meat


@functools.singledispatch
def variance(state: Any, robust: bool) -> PyTree:
    """The variance of each parameter, a pytree like them."""
    if robust:
        sandwich = ops.sandwich(state.information, meat_of(state))
        return ops.diagonal(sandwich, state.mean)
    values = ops.inverse_diagonal(state.information, state.mean)
    dispersion = dispersion_of(state)
    if dispersion is None:
        return values
    return jax.tree.map(lambda x: x * dispersion, values)


@variance.register
def _(state: BankState, robust: bool) -> PyTree:
    # of a mixture: the mean variance and the variance of the means
    def mix(center: jax.Array, *parts: jax.Array) -> jax.Array:
        half = len(parts) // 2
        terms = [
            weight * (spread + jnp.square(mean - center))
            for weight, mean, spread in zip(
                state.weights, parts[:half], parts[half:], strict=True
            )
        ]
        return sum(terms[1:], start=terms[0])

    means = [member.mean for member in state.members]
    spreads = [variance(member, robust) for member in state.members]
    return jax.tree.map(mix, state.mean, *means, *spreads)


def standard_error(state: Any, robust: bool = False) -> PyTree:
    r"""The standard error of each parameter.

    .. math:: \sqrt{\hat\phi \, (I^{-1})_{jj}} \quad \text{or, robust,} \quad
       \sqrt{(I^{-1} M I^{-1})_{jj}}, \; M = \sum_i s_i s_i^\top

    with the dispersion `phi` where it is estimated. The robust (sandwich) one is right
    for the estimate even where the model's variance is wrong (overdispersion,
    heteroscedasticity). Its `I` is the flow's information, prior included, and there is
    no small-sample factor: HC0.

    Args:
      state: anything with `.mean` and `.information`.
      robust: the sandwich; the flow must have been built with `robust=True`.

    Returns:
      A pytree like the parameters. Cost: an inverse (d^3 with the full structure).

    Raises:
      ValueError: for robust=True without the scores; for an unknown dispersion with too
        few observations.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> flow = ff.fisher_flow(
      ...     lambda params, x: x * params,
      ...     ff.likelihoods.gaussian(scale=2.0),
      ...     structure=ff.structures.full(),
      ...     memory=ff.memories.stationary(),
      ...     prior_precision=1e-6,
      ... )
      >>> state, _ = flow.update(
      ...     flow.init(jnp.array(0.0)), (jnp.ones(16), jnp.arange(16.0))
      ... )
      >>> print(ff.standard_error(state).round(3))  # 2 / sqrt(16)
      0.5

    References:
      White, "Maximum likelihood estimation of misspecified models", 1982.
    """
    return jax.tree.map(jnp.sqrt, variance(state, robust))


def confidence_interval(
    state: Any, level: float = 0.95, robust: bool = False
) -> tuple[PyTree, PyTree]:
    r"""Two-sided intervals of the parameters.

    .. math:: \theta_j \pm q \, \mathrm{se}_j

    with `q` the normal quantile, or Student's t on the spare observations where the
    dispersion is estimated.

    Args:
      state: anything with `.mean` and `.information`.
      level: the probability of covering, in (0, 1).
      robust: with the sandwich variance.

    Returns:
      `(lower, upper)`, pytrees like the parameters. Cost: that of `standard_error`.

    Raises:
      ValueError: for a level outside (0, 1), and as `standard_error` does.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> flow = ff.fisher_flow(
      ...     lambda params, x: x * params,
      ...     ff.likelihoods.gaussian(scale=2.0),
      ...     structure=ff.structures.full(),
      ...     memory=ff.memories.stationary(),
      ...     prior_precision=1e-6,
      ... )
      >>> state, _ = flow.update(
      ...     flow.init(jnp.array(0.0)), (jnp.ones(16), jnp.arange(16.0))
      ... )
      >>> lower, upper = ff.confidence_interval(state, level=0.95)
      >>> print(lower.round(2), upper.round(2))  # 7.5 +- 1.96 / 2
      6.52 8.48
    """
    error = standard_error(state, robust)
    dtype = trees.float_dtype(error)
    quantile = two_sided(level, degrees_of_freedom_of(state), dtype)
    lower = jax.tree.map(lambda m, s: m - quantile * s, state.mean, error)
    upper = jax.tree.map(lambda m, s: m + quantile * s, state.mean, error)
    return lower, upper
