"""Functions of the parameters: their standard errors, intervals and tests."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fisherflow_jax import information as ops
from fisherflow_jax._ground import processes, trees
from fisherflow_jax.posteriors import _belief as belief
from fisherflow_jax.posteriors._belief import Gaussian
from fisherflow_jax.posteriors._intervals import check_level, two_sided
from fisherflow_jax.posteriors._mapping import mapped
from fisherflow_jax.posteriors._undetermined import warn_of_values

PyTree = Any

# Smallest eigenvalue of the contrasts' correlation matrix, in units of rounding.
_RANK_TOLERANCE = 10.0


class Estimate(NamedTuple):
    """A function of the parameters, each field shaped like its value.

    Attributes:
      estimate: the value at the mean.
      standard_error: by the delta method, on the scale of the value.
      lower: end of the interval.
      upper: end of the interval.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> information = ff.structures.Diagonal(jnp.full(2, 199.0))
      >>> state = ff.posterior(jnp.array([1.0, 2.0]), information, prior_precision=1.0)
      >>> found = ff.delta_method(state, lambda params: params[1] - params[0])
      >>> print(found.estimate, found.standard_error.round(3))
      1.0 0.1
    """

    estimate: PyTree
    standard_error: PyTree
    lower: PyTree
    upper: PyTree


class WaldTest(NamedTuple):
    """A test that functions of the parameters have given values.

    Attributes:
      statistic: chi-square; F where the dispersion is estimated.
      degrees_of_freedom: k, of the hypothesis.
      p_value: the probability of a larger statistic under it.
      estimate: `(k,)`, the functions' values at the mean.
      standard_error: `(k,)`, theirs.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> information = ff.structures.Diagonal(jnp.full(2, 199.0))
      >>> state = ff.posterior(jnp.array([1.0, 2.0]), information, prior_precision=1.0)
      >>> test = ff.wald_test(state, jnp.array([-1.0, 1.0]))
      >>> print(
      ...     test.degrees_of_freedom,
      ...     round(float(test.statistic), 1),
      ...     test.p_value < 1e-9,
      ... )
      1 100.0 True
    """

    statistic: float
    degrees_of_freedom: int
    p_value: float
    estimate: np.ndarray
    standard_error: np.ndarray


def delta_method(
    state: Any,
    function: Callable[[PyTree], PyTree],
    *,
    level: float = 0.95,
    robust: bool | str = False,
    transform: Callable[[jax.Array], jax.Array] | None = None,
) -> Estimate:
    r"""The standard error and interval of a function of the parameters.

    .. math:: \mathrm{Var}\, g(\theta) = \nabla g^\top \, I^{-1} \, \nabla g

    Args:
      state: anything with `.mean` and `.information`.
      function: parameters -> an array or a pytree of arrays, differentiable at the
        mean.
      level: of the interval, in (0, 1).
      robust: with the sandwich variance, as in `ff.standard_error`.
      transform: an increasing elementwise map applied last: the interval is taken
        before it and mapped, so that it stays where the transform's values are. Odds
        ratios are `function=lambda p: p, transform=jnp.exp`.

    Returns:
      An `Estimate(estimate, standard_error, lower, upper)`. Cost: one factorisation,
      and a backward pass and a solve for each value.

    Raises:
      ValueError: for a level outside (0, 1), a transform that is not increasing
        between the ends of an interval, and as `standard_error` does.

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
    check_level(level)
    one = belief.gaussian(state, robust)
    value, covariance = _moments(state, one, function, robust)
    error = jnp.sqrt(jnp.diagonal(covariance))
    reach = two_sided(level, belief.degrees_of_freedom(state), error.dtype) * error
    lower, upper = value - reach, value + reach
    if transform is not None:
        value, lower, upper, slope = mapped(transform, value, lower, upper)
        error = slope * error
    like = jax.eval_shape(function, one.mean)
    return Estimate(
        estimate=trees.unravel(value, like),
        standard_error=trees.unravel(error, like),
        lower=trees.unravel(lower, like),
        upper=trees.unravel(upper, like),
    )


def wald_test(
    state: Any,
    contrast: PyTree | Callable[[PyTree], PyTree],
    value: jax.typing.ArrayLike = 0.0,
    *,
    robust: bool | str = False,
) -> WaldTest:
    r"""Tests that functions of the parameters have given values.

    .. math:: W = (g - v)^\top \, (G I^{-1} G^\top)^{-1} (g - v) \sim \chi^2_k

    and `W / k` against the F distribution where the dispersion is estimated.

    Args:
      state: anything with `.mean` and `.information`.
      contrast: a pytree like the parameters, the weights of one linear combination; or
        a function from the parameters to an array (or a pytree) of k values.
      value: what they are under the hypothesis: a number, or k of them.
      robust: with the sandwich variance, as in `ff.standard_error`.

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
    from scipy import special

    one = belief.gaussian(state, robust)
    function = contrast if callable(contrast) else linear(contrast, one.mean)
    estimate, covariance = processes.on_host(_moments(state, one, function, robust))
    count = len(estimate)
    expected = np.asarray(value, float).reshape(-1)
    if len(expected) not in (1, count):
        raise ValueError(
            f"value must be a number or one for each of the {count} values of the "
            f"contrast; got shape {np.shape(value)}."
        )
    gap = estimate.astype(float) - expected
    matrix = covariance.astype(float)
    scales = np.sqrt(np.diagonal(matrix))
    # a fixed value has scale zero: its empty row of correlations makes the rank fall
    safe = np.where(scales > 0, scales, 1.0)
    correlation = matrix / np.outer(safe, safe)
    rounding = _RANK_TOLERANCE * count * float(jnp.finfo(covariance.dtype).eps)
    if np.linalg.matrix_rank(correlation, tol=rounding, hermitian=True) < count:
        raise ValueError(
            f"the {count} values of the contrast are linearly dependent (or fixed), so "
            "they cannot be tested together: drop the redundant ones."
        )
    statistic = float(gap / scales @ np.linalg.solve(correlation, gap / scales))
    spare = belief.degrees_of_freedom(state)
    if spare is None:
        p_value = special.chdtrc(count, statistic)
    else:
        statistic = statistic / count
        p_value = special.fdtrc(count, float(spare), statistic)
    return WaldTest(
        statistic=statistic,
        degrees_of_freedom=count,
        p_value=float(p_value),
        estimate=estimate,
        standard_error=scales,
    )


def linear(contrast: PyTree, mean: PyTree) -> Callable[[PyTree], jax.Array]:
    rule = (
        "a contrast is a pytree like the parameters, or a function of them, of several "
        "at once lambda params: rows @ params"
    )
    trees.check_shapes(contrast, mean, rule)
    dtype = trees.float_dtype(mean)
    weights = jax.tree.map(lambda x: jnp.asarray(x, dtype), contrast)
    return lambda params: trees.dot(weights, params)


def _moments(
    state: Any,
    one: Gaussian,
    function: Callable[[PyTree], PyTree],
    robust: bool | str,
) -> tuple[jax.Array, jax.Array]:
    """The function's value, ravelled `(k,)`, and its covariance matrix `(k, k)`."""
    value, vjp = jax.vjp(lambda params: trees.ravel(function(params)), one.mean)
    gradients = jax.vmap(lambda e: vjp(e)[0])(np.eye(len(value), dtype=value.dtype))
    meat = one.meat if robust else None
    solved, covariance = _solved(one.information, meat, one.dispersion, gradients)
    warn_of_values(state, one, gradients, solved)
    return value, covariance


# compiled as one: operation by operation, a first call takes several times as long
@jax.jit
def _solved(
    information: Any, meat: Any, dispersion: jax.Array | None, gradients: PyTree
) -> tuple[PyTree, jax.Array]:
    """Solved for each gradient, and the covariance; with a meat that of a sandwich."""
    solved = jax.vmap(ops.solver(information))(gradients)
    if meat is not None:
        right = jax.vmap(lambda v: ops.matvec(meat, v))(solved)
        return solved, trees.ravel(solved, 1) @ trees.ravel(right, 1).T
    covariance = trees.ravel(gradients, 1) @ trees.ravel(solved, 1).T
    return solved, covariance if dispersion is None else dispersion * covariance
