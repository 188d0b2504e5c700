"""The eigenvalues of an information, and how many directions the data determine."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fisherflow_jax import information as ops
from fisherflow_jax.structures import as_precision

PyTree = Any


def eigenvalues(information: Any, like: PyTree | None = None) -> np.ndarray:
    """All eigenvalues of an information, from the largest to the smallest.

    Args:
      information: of any structure.
      like: a tree with the parameters' shapes; only the scalar structure needs it.

    Returns:
      An array `(d,)` of float64. Cost: that of the dense matrix, d^3; for scalar and
      diagonal a sort, for block the sum of the blocks' cubes, for Kronecker that of its
      factors' cubes, and for low rank on a constant diagonal d rank^2.

    Raises:
      ValueError: where a matrix of more than 4096 rows would be needed.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> information = ff.structures.Full(jnp.array([[2.0, 1.0], [1.0, 2.0]]))
      >>> print(ff.diagnostics.eigenvalues(information).round(3))
      [3. 1.]
    """
    with jax.enable_x64(True):  # float32 would lose the small ones beside the large
        wide = jax.tree.map(lambda x: jnp.asarray(np.asarray(x, float)), information)
        found = [np.ravel(x) for x in ops.eigenvalues(ops.plain(wide), like)]
    return np.sort(np.concatenate(found))[::-1]


def effective_parameters(
    information: Any, prior_precision: Any, like: PyTree | None = None
) -> jax.Array:
    r"""How many parameters the data rather than the prior determine.

    .. math:: \gamma = \mathrm{tr}\big(F (F + P)^{-1}\big)
       = \sum_j \frac{\lambda_j}{\lambda_j + p} \quad \text{for } P = p \, 1

    Args:
      information: F, without the prior.
      prior_precision: P: a positive number, a pytree prefix of numbers, or an
        information. On a Kronecker information one number a layer.
      like: a tree with the parameters' shapes; only the scalar structure needs it.

    Returns:
      A number between 0 and d. Cost: an inverse (d^3 for full); for Kronecker its
      factors' eigenvalues.

    Raises:
      ValueError: for a prior that is not positive or does not fit the parameters.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> information = ff.structures.Diagonal(jnp.array([0.0, 1.0, 9.0]))
      >>> print(ff.diagnostics.effective_parameters(information, 1.0).round(3))
      1.4

    References:
      MacKay, "Bayesian interpolation", 1992.
    """
    like = ops.diagonal(information, like) if like is None else like
    precision = as_precision(prior_precision, like, beside=information)
    logdet = ops.determinant(information, precision, like)
    # the slope of log |s F + P| at s = 1, in which nothing cancels
    one = jnp.ones((), jax.eval_shape(ops.logdet, precision, like).dtype)
    return jax.grad(lambda factor: logdet(precision, factor))(one)


def effective_rank(information: Any, like: PyTree | None = None) -> float:
    r"""The exponential of the entropy of the normalised spectrum.

    .. math:: \exp\Big(-\sum_j q_j \log q_j\Big), \qquad
       q_j = \lambda_j \Big/ \sum_k \lambda_k

    between 1 (one direction) and d (all alike). It does not depend on the scale of the
    information, and needs no threshold and no prior.

    Args:
      information: of any structure, without a prior (which fills the spectrum).
      like: a tree with the parameters' shapes; only the scalar structure needs it.

    Returns:
      A number; 0 of an information that is zero. Cost: that of
      `ff.diagnostics.eigenvalues`.

    Raises:
      ValueError: as `ff.diagnostics.eigenvalues` does.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> information = ff.structures.Diagonal(jnp.array([5.0, 5.0, 0.0]))
      >>> round(ff.diagnostics.effective_rank(information), 3)
      2.0

    References:
      Roy, Vetterli, "The effective rank: a measure of effective dimensionality", 2007.
    """
    values = eigenvalues(information, like)
    positive = values[values > 0]  # what is not positive is rounding
    if positive.size == 0:
        return 0.0
    shares = positive / positive.sum()
    return float(np.exp(-np.sum(shares * np.log(shares))))
