"""The observed information: minus the Hessian of the log-likelihood."""

import functools
from collections.abc import Callable
from typing import Any

import jax

from fisherflow_jax import information as ops
from fisherflow_jax._ground import trees
from fisherflow_jax._ground.batch import Batch, num_examples, zero_if_missing
from fisherflow_jax._ground.checks import whole
from fisherflow_jax._ground.chunks import sum_chunks
from fisherflow_jax.estimators._choice import choosable
from fisherflow_jax.estimators._estimator import Estimator
from fisherflow_jax.likelihoods import Likelihood
from fisherflow_jax.model import Model
from fisherflow_jax.structures import Structure
from fisherflow_jax.structures.capabilities import OBSERVED

PyTree = Any


@choosable
def observed(
    apply_fn: Callable | None = None,
    likelihood: Likelihood | None = None,
    structure: Structure | None = None,
    *,
    chunk_size: int | None = None,
) -> Callable[..., Estimator]:
    r"""Minus the Hessian of the log-likelihood at the data's labels.

    .. math:: -\sum_i w_i \nabla_\theta^2 \log p(y_i | f(\theta, x_i))

    Equal to the Fisher information for a canonical generalised linear model. Elsewhere
    it need not be positive semi-definite, so `ff.fisher_flow` refuses it as its
    curvature.

    Args:
      apply_fn: `(params, inputs) -> outputs`, leading axis = examples.
      likelihood: from `ff.likelihoods`.
      structure: scalar, diagonal, block or full.
      chunk_size: examples in one Hessian-vector product; None: the whole batch.

    Returns:
      An `Estimator`. Cost: d Hessian-vector products of the batch, 16 at a time, each
      about four passes; memory that of the structure.

    Raises:
      ValueError: for another structure; when called without targets.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> estimator = ff.estimators.observed(
      ...     lambda params, x: x @ params,
      ...     ff.likelihoods.poisson(),
      ...     ff.structures.full(),
      ... )
      >>> batch = (jnp.array([[1.0, 2.0]]), jnp.array([3.0]))
      >>> print(estimator(jnp.zeros(2), batch).rows.round(3))  # rate 1 times x x^T
      [[1. 2.]
       [2. 4.]]

    References:
      Efron, Hinkley, "Assessing the accuracy of the maximum likelihood estimator:
      observed versus expected Fisher information", 1978.
    """
    if chunk_size is not None:
        whole(chunk_size, "chunk_size", of="examples")
    return functools.partial(_of_model, chunk_size)


def _of_model(
    chunk_size: int | None,
    apply_fn: Callable,
    likelihood: Likelihood,
    structure: Structure,
) -> Estimator:
    structure.require(
        OBSERVED, "a Hessian is not a sum of squares, which is all it can hold."
    )
    model = Model(apply_fn, likelihood)
    return Estimator(
        "observed",
        functools.partial(_compute, model, structure, chunk_size),
        structure,
        not_a_curvature="minus the Hessian need not be positive semi-definite; "
        "estimators.exact is its expectation",
        check=model.check,
    )


def _compute(
    model: Model,
    structure: Structure,
    chunk_size: int | None,
    params: PyTree,
    batch: Batch,
    key: jax.Array | None,
) -> Any:
    del key
    model = model.traced_once()
    model.check(params, batch)
    wide, from_matvec = trees.widen(params), structure.from_matvec
    assert from_matvec is not None  # which `require` has asked

    def minus_hessian(chunk: Batch, keys: jax.Array | None) -> Any:
        del keys
        _, product = jax.linearize(
            jax.grad(lambda p: -model.log_likelihood(p, chunk)), wide
        )
        return from_matvec(lambda v: zero_if_missing(chunk, product(v)), wide)

    return sum_chunks(
        minus_hessian,
        ops.add,
        lambda: structure.isotropic(params, 0.0),
        batch,
        None,
        chunk_size or num_examples(batch),
    )
