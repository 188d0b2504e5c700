"""The log-likelihood of a batch, and the mean loss that matches it."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fisherflow_jax import batch as batches
from fisherflow_jax import meshes, vectors
from fisherflow_jax.batch import Batch
from fisherflow_jax.likelihoods import Likelihood

PyTree = Any


def weighted_sum(
    apply_fn: Callable, function: Callable, params: PyTree, batch: Batch
) -> jax.Array:
    """`function(outputs, targets)` summed over targets and weighted over examples.

    In float32 or wider, whatever the type of the outputs.
    """
    outputs = apply_fn(params, batches.unshare(batch.inputs))

    def total(outputs: PyTree, targets: PyTree, weights: jax.Array) -> jax.Array:
        values = function(outputs, targets)
        values = values.astype(vectors.wide_dtype(values.dtype))
        values = jnp.sum(values.reshape((values.shape[0], -1)), axis=1)
        weights = weights.astype(values.dtype)
        # where, so that a row of weight zero stays out even if it is not finite
        kept = jnp.where(weights == 0, jnp.zeros_like(values), weights * values)
        return jnp.sum(kept)

    return meshes.replicated(total, outputs, batch.targets, batch.weights)


def log_likelihood(
    apply_fn: Callable, likelihood: Likelihood, params: PyTree, batch: Batch
) -> jax.Array:
    """The weighted sum of the examples' log-likelihoods, a number."""
    if batch.targets is None:
        raise ValueError("the log-likelihood needs targets; the batch's are None.")
    return weighted_sum(apply_fn, likelihood.log_prob, params, batch)


def negative_log_likelihood(
    apply_fn: Callable, likelihood: Likelihood
) -> Callable[[PyTree, Any], jax.Array]:
    r"""The mean loss of a batch, on the scale of the Fisher information.

    .. math:: \ell(\theta) = -\frac{1}{\sum_i w_i}
       \sum_i w_i \log p(y_i | f(\theta, x_i))

    Its gradient is minus the mean score and its expected Hessian the mean Fisher
    information, so that gradients from Optax and curvature from this package agree.

    Args:
      apply_fn: `(params, inputs) -> outputs`, leading axis = examples.
      likelihood: from `ff.likelihoods`.

    Returns:
      A function `(params, batch) -> ()`; the batch is `(inputs, targets)` or
      `(inputs, targets, weights)`. Cost: one forward pass.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> loss = ff.negative_log_likelihood(
      ...     lambda params, x: x @ params, ff.likelihoods.poisson()
      ... )
      >>> print(loss(jnp.zeros(2), (jnp.ones((3, 2)), jnp.array([0.0, 1.0, 1.0]))))
      1.0
    """

    def loss(params: PyTree, batch: Any) -> jax.Array:
        batch = batches.as_batch(batch)
        total = log_likelihood(apply_fn, likelihood, params, batch)
        return -total / jnp.sum(batch.weights).astype(total.dtype)

    return loss
