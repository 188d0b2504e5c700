"""Laplace's approximation of the log marginal likelihood, of any structure."""

from typing import Any

import jax
import jax.numpy as jnp

from fisherflow_jax import information as ops
from fisherflow_jax._ground import trees
from fisherflow_jax._ground.checks import holds
from fisherflow_jax.calibration._determinant import check_layers, determinant
from fisherflow_jax.posteriors._gaussian import check_about
from fisherflow_jax.structures import Diagonal, Scalar
from fisherflow_jax.structures import _prior as priors

PyTree = Any


def log_marginal_likelihood(
    mean: PyTree,
    information: Any,
    log_likelihood: jax.typing.ArrayLike,
    prior_precision: Any,
    *,
    prior_mean: PyTree | None = None,
) -> jax.Array:
    r"""The log-evidence of the data under a model and a prior.

    .. math:: \log p(D) \approx \log p(D \mid \hat\theta)
       - \tfrac12 (\hat\theta - \mu)^\top P (\hat\theta - \mu)
       + \tfrac12 \log |P| - \tfrac12 \log |F + P|

    the logarithm of :math:`p(D \mid \hat\theta) p(\hat\theta) |H / 2 \pi|^{-1/2}` with
    `H = F + P`. Exact for a linear model with gaussian noise at its posterior mean,
    when the structure holds its information exactly. Differentiable with respect to all
    arrays: the prior precision, the mean, and, through the information and the
    log-likelihood, the noise.

    Args:
      mean: the estimate, best the maximum a posteriori under this prior.
      information: F, without the prior, a sum over the observations.
      log_likelihood: `log p(D | mean)`, a sum over the observations.
      prior_precision: P: a positive number, a pytree prefix of numbers, or an
        information. On a Kronecker information one number a layer.
      prior_mean: a pytree like the mean; None: zeros.

    Returns:
      A number, in nats. Cost: a log-determinant: d^3 for full, I^3 + O^3 a layer for
      Kronecker, d rank^2 for low rank. No pass of the model.

    Raises:
      ValueError: for a prior that is not positive or has more than one number a layer
        of a Kronecker information, an information about another tree, or a
        log-likelihood that is no number.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> information = ff.structures.Diagonal(jnp.array([3.0]))
      >>> def evidence(prior_precision):
      ...     return ff.calibration.log_marginal_likelihood(
      ...         jnp.array([0.5]), information, -2.0, prior_precision
      ...     )
      >>> value, slope = jax.value_and_grad(evidence)(1.0)
      >>> print(value.round(3), slope.round(3))  # -2 - 1 / 8 - log 2
      -2.818 0.25

    References:
      MacKay, "Bayesian interpolation", 1992.
      Immer, Bauer, Fortuin, Raetsch, Khan, "Scalable marginal likelihood estimation for
      model selection in deep learning", 2021.
    """
    mean = trees.real_arrays(mean, "mean")
    check_about(information, mean)
    log_likelihood = as_number(log_likelihood, mean)
    step = step_from(mean, prior_mean)
    precision = priors.as_precision(prior_precision, mean)
    prior_logdet = ops.logdet(precision, mean)
    if precision is prior_precision or not isinstance(precision, (Scalar, Diagonal)):
        total = ops.logdet(ops.add(information, precision), mean)
    else:
        check_layers(information, prior_precision, mean)
        one = jnp.ones((), trees.float_dtype(mean))
        total = determinant(information, mean)(ops.diagonal(precision, mean), one)
    distance = ops.quadratic_form(precision, step)
    return log_likelihood + 0.5 * (prior_logdet - total - distance)


def as_number(log_likelihood: jax.typing.ArrayLike, like: PyTree) -> jax.Array:
    """Raises unless it is one number, finite where it is at hand."""
    value = jnp.asarray(log_likelihood, trees.float_dtype(like))
    if value.shape != ():
        raise ValueError(
            "log_likelihood is one number, the sum over the observations; got shape "
            f"{value.shape}."
        )
    if not holds(jnp.isfinite(value)):
        raise ValueError(f"log_likelihood must be finite; got {value}.")
    return value


def step_from(mean: PyTree, prior_mean: PyTree | None) -> PyTree:
    """`mean - prior_mean`."""
    if prior_mean is None:
        return trees.widen(mean)
    shapes = [jax.tree.map(jnp.shape, tree) for tree in (prior_mean, mean)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"prior_mean must be like the mean: got shapes {shapes[0]}, not "
            f"{shapes[1]}."
        )
    return jax.tree.map(lambda x, y: x - y, mean, prior_mean)
