"""Functions of the parameters: their standard errors, intervals and tests."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

from fisherflow_jax import information as ops
from fisherflow_jax import vectors
from fisherflow_jax.bank import BankState
from fisherflow_jax.posterior.intervals import (
    degrees_of_freedom_of,
    dispersion_of,
    meat_of,
)
from fisherflow_jax.posterior.quantiles import two_sided

PyTree = Any


class Estimate(NamedTuple):
    """A function of the parameters, each field shaped like its value."""

    estimate: jax.Array
    standard_error: jax.Array
    lower: jax.Array
    upper: jax.Array


class WaldTest(NamedTuple):
    """A test that functions of the parameters have given values."""

    statistic: float  # chi-square; F where the dispersion is estimated
    degrees_of_freedom: int  # of the hypothesis
    p_value: float
    estimate: np.ndarray  # (k,)
    standard_error: np.ndarray  # (k,)


def delta_method(
    state: Any,
    function: Callable[[PyTree], jax.Array],
    *,
    level: float = 0.95,
    robust: bool = False,
    transform: Callable[[jax.Array], jax.Array] | None = None,
) -> Estimate:
    r"""The standard error and interval of a function of the parameters.

    .. math:: \mathrm{Var}\, g(\theta) = \nabla g^\top \, I^{-1} \, \nabla g

    Args:
      state: anything with `.mean` and `.information`.
      function: parameters -> an array, differentiable at the mean.
      level: of the interval, in (0, 1).
      robust: with the sandwich variance.
      transform: an increasing elementwise map applied last: the interval is taken
        before it and mapped, so that it stays where the transform's values are. Odds
        ratios are `function=lambda p: p, transform=jnp.exp`.

    Returns:
      An `Estimate(estimate, standard_error, lower, upper)`. Cost: one factorisation,
      and a backward pass and a solve for each value.

    Raises:
      ValueError: for a level outside (0, 1), and as `standard_error` does.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> flow = ff.fisher_flow(
      ...     lambda params, x: x * params,
      ...     ff.likelihoods.bernoulli(),
      ...     structure=ff.structures.full(),
      ...     memory=ff.memories.stationary(),
      ...     prior_precision=4.0,
      ... )
      >>> state = flow.init(jnp.array(0.0))
      >>> odds_ratio = ff.delta_method(state, lambda p: p, transform=jnp.exp)
      >>> print(odds_ratio.estimate, odds_ratio.standard_error)
      1.0 0.5
      >>> print(odds_ratio.lower.round(3), odds_ratio.upper.round(3))
      0.375 2.664

    References:
      Oehlert, "A note on the delta method", 1992.
    """
    value, covariance = _moments(state, function, robust)
    error = jnp.sqrt(jnp.diagonal(covariance)).reshape(value.shape)
    reach = two_sided(level, degrees_of_freedom_of(state), error.dtype) * error
    lower, upper = value - reach, value + reach
    if transform is None:
        return Estimate(value, error, lower, upper)
    moved, slope = jax.jvp(transform, (value,), (jnp.ones_like(value),))
    return Estimate(moved, jnp.abs(slope) * error, transform(lower), transform(upper))


def wald_test(
    state: Any,
    contrast: PyTree | Callable[[PyTree], jax.Array],
    value: jax.typing.ArrayLike = 0.0,
    *,
    robust: bool = False,
) -> WaldTest:
    r"""Tests that functions of the parameters have given values.

    .. math:: W = (g - v)^\top \, (G I^{-1} G^\top)^{-1} (g - v) \sim \chi^2_k

    and `W / k` against the F distribution where the dispersion is estimated.

    Args:
      state: anything with `.mean` and `.information`.
      contrast: a pytree like the parameters, the weights of one linear combination; or
        a function from parameters to a vector of k values.
      value: what they are under the hypothesis.
      robust: with the sandwich variance.

    Returns:
      A `WaldTest` of numbers (outside jit).

    Raises:
      ValueError: if the contrast does not fit the parameters, or its k values are
        linearly dependent.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> flow = ff.fisher_flow(
      ...     lambda params, x: x @ params,
      ...     ff.likelihoods.gaussian(),
      ...     structure=ff.structures.full(),
      ...     memory=ff.memories.stationary(),
      ...     prior_precision=1e-6,
      ... )
      >>> x = jnp.repeat(jnp.eye(2), 8, axis=0)
      >>> y = jnp.repeat(jnp.array([1.0, 3.0]), 8)
      >>> state, _ = flow.update(flow.init(jnp.zeros(2)), (x, y))
      >>> test = ff.wald_test(state, jnp.array([1.0, -1.0]))  # are they equal?
      >>> print(round(test.statistic, 3), f"{test.p_value:.0e}")
      16.0 6e-05

    References:
      Wald, "Tests of statistical hypotheses concerning several parameters when the
      number of observations is large", 1943.
    """
    function = contrast if callable(contrast) else _linear(contrast, state.mean)
    estimate, covariance = _moments(state, function, robust)
    gap = np.asarray(estimate, float).reshape(-1)
    gap = gap - np.broadcast_to(np.asarray(value, float), estimate.shape).reshape(-1)
    matrix = np.asarray(covariance, float)
    count = len(gap)
    scales = np.sqrt(np.diagonal(matrix))
    correlation = matrix / np.outer(scales, scales)
    if np.linalg.matrix_rank(correlation, hermitian=True) < count:
        raise ValueError(
            f"the {count} values of the contrast are linearly dependent (or fixed), so "
            "they cannot be tested together: drop the redundant ones."
        )
    statistic = float(gap / scales @ np.linalg.solve(correlation, gap / scales))
    spare = degrees_of_freedom_of(state)
    if spare is None:
        p_value = float(stats.chi2.sf(statistic, count))
    else:
        statistic = statistic / count
        p_value = float(stats.f.sf(statistic, count, float(spare)))
    return WaldTest(statistic, count, p_value, np.asarray(estimate).reshape(-1), scales)


def _linear(contrast: PyTree, mean: PyTree) -> Callable[[PyTree], jax.Array]:
    shapes = jax.tree.map(jnp.shape, contrast), jax.tree.map(jnp.shape, mean)
    if shapes[0] != shapes[1]:
        raise ValueError(
            "a contrast is a pytree like the parameters, or a function of them; got "
            f"shapes {shapes[0]} for parameters {shapes[1]}."
        )
    dtype = vectors.float_dtype(mean)
    weights = jax.tree.map(lambda x: jnp.asarray(x, dtype), contrast)
    return lambda params: vectors.dot(weights, params)


def _moments(
    state: Any, function: Callable[[PyTree], jax.Array], robust: bool
) -> tuple[jax.Array, jax.Array]:
    """The function's value and the covariance matrix of its entries."""
    if isinstance(state, BankState):
        raise TypeError(
            "a bank's posterior is a mixture, not a Gaussian: sample it, or take one "
            "of state.members."
        )
    value, vjp = jax.vjp(function, state.mean)
    count = int(np.prod(value.shape))
    basis = jnp.eye(count, dtype=value.dtype).reshape((count, *value.shape))
    gradients = jax.vmap(lambda e: vjp(e)[0])(basis)
    solved = jax.vmap(ops.solver(state.information))(gradients)
    if robust:
        meat = meat_of(state)
        right = jax.vmap(lambda v: ops.matvec(meat, v))(solved)
        return value, vectors.ravel(solved, 1) @ vectors.ravel(right, 1).T
    covariance = vectors.ravel(gradients, 1) @ vectors.ravel(solved, 1).T
    dispersion = dispersion_of(state)
    return value, covariance if dispersion is None else dispersion * covariance
