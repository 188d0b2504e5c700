"""How many directions the data determine."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fisherflow_jax import information as ops
from fisherflow_jax.diagnostics._eigenvalues import eigenvalues
from fisherflow_jax.structures import EigenKronecker, Kronecker
from fisherflow_jax.structures import _prior as priors
from fisherflow_jax.structures._algebra import eigen as eigenbasis

PyTree = Any


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
    precision = priors.as_precision(prior_precision, like)
    total = ops.add(information, precision)
    if isinstance(total, (Kronecker, EigenKronecker)):
        return _of_layers(information, total)
    return priors.effective_parameters(total, precision, like)


def _of_layers(information: Any, total: Any) -> jax.Array:
    """The sum of ratios, which do not cancel."""
    before, after = eigenbasis.spectra(information), eigenbasis.spectra(total)
    shares = [jnp.sum(before[name].values / x.values) for name, x in after.items()]
    shares += [
        jnp.sum(information.other_entries[name] / x)
        for name, x in total.other_entries.items()
    ]
    return sum(shares[1:], start=shares[0])


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
    return rank_of(eigenvalues(information, like))


def rank_of(values: np.ndarray) -> float:
    """The effective rank of a spectrum; what is not positive counts as zero."""
    positive = values[values > 0]
    if positive.size == 0:
        return 0.0
    shares = positive / positive.sum()
    return float(np.exp(-np.sum(shares * np.log(shares))))
