"""The expected Fisher information, from the columns of a root of the output Fisher."""

from collections.abc import Callable
from typing import Any

import jax

from fisherflow_jax.estimators._choice import choosable
from fisherflow_jax.estimators._rule import Rule
from fisherflow_jax.likelihoods import Likelihood, cholesky_root, root_columns
from fisherflow_jax.structures import Structure


def _columns(
    likelihood: Likelihood, outputs: jax.Array, targets: Any, key: jax.Array | None
) -> jax.Array:
    return root_columns(likelihood, outputs, key)


@choosable
def exact(
    apply_fn: Callable | None = None,
    likelihood: Likelihood | None = None,
    structure: Structure | None = None,
    *,
    root: Callable[[Likelihood], Likelihood] = cholesky_root,
    chunk_size: int | None = None,
    fast_squares: bool = True,
) -> Rule:
    r"""The expected Fisher information, without noise.

    .. math:: F = \sum_i w_i J_i^\top L_i L_i^\top J_i

    with `J_i` the Jacobian of the outputs of example `i` and `L_i L_i^T` the Fisher
    information of its outputs: the generalised Gauss-Newton matrix, and for a canonical
    generalised linear model the Hessian of the loss. Labels are not used.

    Args:
      apply_fn: `(params, inputs) -> outputs`, leading axis = examples, each of which is
        evaluated on its own.
      likelihood: from `ff.likelihoods`; one whose root is sampled makes this estimator
        need a key.
      structure: from `ff.structures`: what is kept.
      root: a function of the likelihood, which returns it with the root whose R columns
        are pulled back; C - 1 columns for C classes by default. With
        `ff.likelihoods.diagonal_root` or `functools.partial(ff.likelihoods.rank_root,
        k=...)` the result is the bound which `hutchinson_dg` or `hutchinson_rankk`
        estimates, without noise.
      chunk_size: examples whose pulled-back vectors are held at once; None: as many as
        fit in about 64 MiB. Memory: chunk_size * R * d numbers.
      fast_squares: with the diagonal or scalar structure, square linear layers from
        their inputs and output gradients (`Estimator.paths` tells which); no vector of
        theirs is then held.

    Returns:
      An `Estimator`: `estimator(params, batch) -> information`, a sum over the batch.
      Cost: one forward and R backward passes an example, R the outputs of an example
      (one less for each categorical target). Fast squares need only the backward passes
      to the layers' outputs, and one product of squares for all R columns together.

    Raises:
      ValueError: where outputs, targets and likelihood do not fit.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> estimator = ff.estimators.exact(
      ...     lambda params, x: x @ params,
      ...     ff.likelihoods.gaussian(),
      ...     ff.structures.full(),
      ... )
      >>> x = jnp.array([[1.0, 0.0], [1.0, 2.0]])
      >>> estimator(jnp.zeros(2), (x, None)).rows  # x^T x
      Array([[2., 2.],
             [2., 4.]], dtype=float32)

    References:
      Amari, "Natural gradient works efficiently in learning", 1998.
      Martens, "New insights and perspectives on the natural gradient method", 2020.
    """
    return Rule(_columns, random=None)
