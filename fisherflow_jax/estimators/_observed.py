"""The observed information: minus the Hessian of the log-likelihood."""

from collections.abc import Callable
from typing import Any

import jax

from fisherflow_jax._ground import trees
from fisherflow_jax._ground.batch import Batch, num_examples, zero_if_missing
from fisherflow_jax.estimators._choice import choosable
from fisherflow_jax.estimators._chunking import check_chunk_size, sum_informations
from fisherflow_jax.estimators._estimator import Estimator
from fisherflow_jax.estimators._pulling import check_outputs
from fisherflow_jax.likelihoods import Likelihood
from fisherflow_jax.model import log_likelihood
from fisherflow_jax.structures import Structure
from fisherflow_jax.structures._structure import OBSERVED

PyTree = Any


@choosable
def observed(
    apply_fn: Callable | None = None,
    likelihood: Likelihood | None = None,
    structure: Structure | None = None,
    *,
    chunk_size: int | None = None,
) -> Estimator:
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
    check_chunk_size(chunk_size)
    assert apply_fn is not None and likelihood is not None and structure is not None
    structure.require(
        OBSERVED, "a Hessian is not a sum of squares, which is all it can hold."
    )
    from_matvec = structure.from_matvec
    assert from_matvec is not None

    def compute(params: PyTree, batch: Batch, key: jax.Array | None) -> Any:
        del key
        check_outputs(apply_fn, likelihood, params, batch)
        wide = trees.widen(params)

        def reduce(chunk: Batch, keys: jax.Array | None) -> Any:
            del keys
            score = jax.grad(lambda p: -log_likelihood(apply_fn, likelihood, p, chunk))
            _, product = jax.linearize(score, wide)
            return from_matvec(lambda v: zero_if_missing(chunk, product(v)), wide)

        size = chunk_size or num_examples(batch)
        return sum_informations(reduce, structure, params, batch, None, size)

    return Estimator(
        "observed",
        compute,
        structure,
        not_a_curvature="minus the Hessian need not be positive semi-definite; "
        "estimators.exact is its expectation",
    )
