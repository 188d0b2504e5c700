"""Standard errors and intervals of the parameters, and the quantiles they take."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import betainc, ndtri
from jax.scipy.stats import t as student_t

from fisherflow_jax import information as ops
from fisherflow_jax._ground import checks, trees
from fisherflow_jax.posteriors import _belief as belief
from fisherflow_jax.posteriors._belief import Gaussian
from fisherflow_jax.posteriors._undetermined import Believed, warn_of_parameters

PyTree = Any

# Beyond this many degrees of freedom the expansion below is exact to float64's rounding
# of the quantities it is used for, and betainc loses float32 digits.
_MANY = 200.0


def standard_error(state: Any, robust: bool | str = False) -> PyTree:
    r"""The standard error of each parameter.

    .. math:: \sqrt{\hat\phi \, (I^{-1})_{jj}} \quad \text{or, robust,} \quad
       \sqrt{(I^{-1} M I^{-1})_{jj}}, \; M = \sum_i s_i s_i^\top

    with the dispersion `phi` where it is estimated. The robust (sandwich) one is right
    for the estimate even where the model's variance is wrong (overdispersion,
    heteroscedasticity). Its `I` is the flow's information, prior included. With
    clusters `M` is :math:`\frac{G}{G - 1} \sum_g S_g S_g^\top` of the scores summed
    over each of the G clusters seen, right for rows that depend on each other there.

    Args:
      state: anything with `.mean` and `.information`.
      robust: the sandwich; the flow must have been built with `robust=True`. True or
        "HC0": as above. "HC1": times `n / (n - d)`, with clusters `(n - 1) / (n - d)`,
        for n observations and d parameters.

    Returns:
      A pytree like the parameters. Cost: an inverse (d^3 with the full structure).

    Raises:
      ValueError: for robust=True without the scores; for an unknown dispersion, or a
        small-sample factor, with too few observations.

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
      MacKinnon, White, "Some heteroskedasticity-consistent covariance matrix estimators
      with improved finite sample properties", 1985.
      Liang, Zeger, "Longitudinal data analysis using generalized linear models", 1986.
    """
    _, error, believed = _moments(state, robust)
    warn_of_parameters(state, error, believed)
    return error


def confidence_interval(
    state: Any, level: float = 0.95, robust: bool | str = False
) -> tuple[PyTree, PyTree]:
    r"""Two-sided intervals of the parameters.

    .. math:: \theta_j \pm q \, \mathrm{se}_j

    with `q` the normal quantile, or Student's t on the spare observations where the
    dispersion is estimated.

    Args:
      state: anything with `.mean` and `.information`.
      level: the probability of covering, in (0, 1).
      robust: with the sandwich variance, as in `ff.standard_error`.

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
    _, error, lower, upper, believed = interval_and_error(state, level, robust)
    warn_of_parameters(state, error, believed)
    return lower, upper


def interval_and_error(
    state: Any, level: float, robust: bool | str
) -> tuple[PyTree, PyTree, PyTree, PyTree, Believed]:
    """Of each parameter the mean, error and interval, and what they are made of."""
    mean, error, believed = _moments(state, robust)
    dtype = trees.float_dtype(error)
    quantile = two_sided(level, belief.degrees_of_freedom(state), dtype)
    lower, upper = _ends(mean, error, quantile)
    return mean, error, lower, upper, believed


# compiled as one, whatever the number of leaves
@jax.jit
def _ends(mean: PyTree, error: PyTree, quantile: jax.Array) -> tuple[PyTree, PyTree]:
    lower = jax.tree.map(lambda m, s: m - quantile * s, mean, error)
    return lower, jax.tree.map(lambda m, s: m + quantile * s, mean, error)


def _moments(state: Any, robust: bool | str) -> tuple[PyTree, PyTree, Believed]:
    """The mean and the standard error of each parameter, and what they are made of."""
    weights, members = belief.gaussians(state, robust)
    means = [member.mean for member in members]
    variances = [_variance(member, robust) for member in members]
    mean, variance = belief.mixture(weights, means, variances)
    believed = Believed(weights, members, None if robust else variances)
    return mean, jax.tree.map(jnp.sqrt, variance), believed


def _variance(member: Gaussian, robust: bool | str) -> PyTree:
    """Of each parameter; NaN of one that rounding hides, and of no other."""
    information, hidden = ops.resolved(member.information, member.mean)
    factor: Any = 1.0
    if robust:
        sandwich = ops.sandwich(information, member.meat)
        values = ops.diagonal(sandwich, member.mean)
    else:
        values = ops.inverse_diagonal(information, member.mean)
        factor = 1.0 if member.dispersion is None else member.dispersion
    return _hidden(values, hidden, factor)


@jax.jit
def _hidden(values: PyTree, hidden: PyTree, factor: Any) -> PyTree:
    eps = float(jnp.finfo(trees.float_dtype(values)).eps)
    least = (10 * trees.size(values) * eps) ** 2
    return jax.tree.map(
        lambda x, share: jnp.where(share > least, jnp.nan, factor * x), values, hidden
    )


def check_level(level: float) -> None:
    checks.fraction(level, "level")


def two_sided(level: float, degrees_of_freedom: jax.Array | None, dtype) -> jax.Array:
    """The q with `P(|T| < q) = level`; normal if the degrees of freedom are None.

    Student's t by Newton's method on its distribution function, which is concave above
    zero and so approaches the quantile from the normal one without overshooting; by the
    Cornish-Fisher expansion for many degrees of freedom. NaN without any.
    """
    check_level(level)
    nu = None if degrees_of_freedom is None else degrees_of_freedom.astype(dtype)
    return _quantile(jnp.asarray((1 - level) / 2, dtype), nu)


def two_sided_tail(statistic: np.ndarray, degrees_of_freedom: Any) -> np.ndarray:
    """`P(|T| > |t|)`, values at hand; normal if the degrees of freedom are None."""
    from scipy import special

    below = -np.abs(statistic)
    if degrees_of_freedom is None:
        return 2 * special.ndtr(below)
    return 2 * special.stdtr(float(degrees_of_freedom), below)


@jax.jit
def _quantile(tail: jax.Array, nu: jax.Array | None) -> jax.Array:
    normal = -ndtri(tail)
    if nu is None:
        return normal
    few = jnp.clip(jnp.where(nu > 0, nu, 1.0), None, _MANY)

    exact = _newton(normal, few, tail)
    # beyond the largest number, for a small fraction of a degree of freedom
    exact = jnp.where(jnp.isfinite(exact), exact, jnp.inf)
    quantile = jnp.where(nu <= _MANY, exact, _expansion(normal, nu))
    return jnp.where(nu > 0, quantile, jnp.nan)


def _newton(start: jax.Array, nu: jax.Array, tail: jax.Array) -> jax.Array:
    def step(_, x: jax.Array) -> jax.Array:
        half = jnp.asarray(0.5, x.dtype)
        above = half * betainc(nu / 2, half, nu / (nu + x * x))
        return x + (above - tail) / student_t.pdf(x, nu)

    shape = jnp.broadcast_shapes(start.shape, nu.shape, tail.shape)
    return jax.lax.fori_loop(0, 60, step, jnp.broadcast_to(start, shape))


def _expansion(z: jax.Array, nu: jax.Array) -> jax.Array:
    """Fisher and Cornish, "The percentile points of distributions...", 1960."""
    y = jnp.maximum(nu, 1.0)
    z2 = z * z
    first = (z2 + 1) * z / 4
    second = ((5 * z2 + 16) * z2 + 3) * z / 96
    third = (((3 * z2 + 19) * z2 + 17) * z2 - 15) * z / 384
    fourth = ((((79 * z2 + 776) * z2 + 1482) * z2 - 1920) * z2 - 945) * z / 92160
    return z + (first + (second + (third + fourth / y) / y) / y) / y
