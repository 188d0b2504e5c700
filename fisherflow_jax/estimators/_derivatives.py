"""Derivatives of a batch's loss that are no curvature: its Hessian, its gradient."""

import functools
from collections.abc import Callable
from typing import Any

import jax

from fisherflow_jax._ground import trees
from fisherflow_jax._ground.batch import Batch, num_examples, zero_if_missing
from fisherflow_jax._ground.checks import whole
from fisherflow_jax.estimators._choice import choosable
from fisherflow_jax.estimators._estimator import Estimator
from fisherflow_jax.estimators._pull import sum_informations
from fisherflow_jax.model import Model
from fisherflow_jax.structures import Structure
from fisherflow_jax.structures.capabilities import OBSERVED

PyTree = Any


@choosable
def observed(
    *, chunk_size: int | None = None, batched: bool | None = None
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
      batched: whether the model is run on whole batches, as in `exact`; None or True
        with `chunk_size`: refused where examples interact.

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

    def of_model(apply_fn: Any, likelihood: Any, structure: Structure) -> Estimator:
        structure.require(
            OBSERVED, "a Hessian is not a sum of squares, which is all it can hold."
        )
        model = Model(apply_fn, likelihood, batched)
        from_matvec = structure.from_matvec
        assert from_matvec is not None  # which `require` has asked

        def compute(params: PyTree, batch: Batch, key: jax.Array | None) -> Any:
            traced, wide = model.traced_once(), trees.widen(params)
            traced.check(params, batch)
            size = chunk_size or num_examples(batch)
            if size < num_examples(batch):
                why = f"so that chunk_size={size} would cut the batch"
                traced.check_alone(params, batch.inputs, why)

            def of_chunk(chunk: Batch, keys: None) -> Any:
                gradient = jax.grad(lambda p: -traced.log_likelihood(p, chunk))
                product = jax.linearize(gradient, wide)[1]
                return from_matvec(lambda v: zero_if_missing(chunk, product(v)), wide)

            return sum_informations(structure, of_chunk, params, batch, None, size)

        return Estimator(
            "observed",
            compute,
            structure,
            not_a_curvature="minus the Hessian need not be positive semi-definite; "
            "estimators.exact is its expectation",
            check=model.check,
            of=model,
        )

    return of_model


@functools.partial(choosable, needs_model=False)
def squared_gradient() -> Callable[..., Estimator]:
    r"""The square of the batch's mean gradient, as Adam keeps it. Not a Fisher.

    .. math:: g g^\top, \quad g = -\frac{1}{\sum_i w_i} \sum_i w_i s_i

    The one estimator that is not a sum over observations: a batch counts as one, and
    the value falls as `1 / n` where gradients are noise. Intervals from it mean
    nothing, and `ff.fisher_flow` refuses it.

    Args:
      apply_fn: `(params, inputs) -> outputs`; may be None where only `from_gradient` is
        used.
      likelihood: from `ff.likelihoods`; likewise.
      structure: from `ff.structures`.

    Returns:
      An `Estimator` with `from_gradient`: a ready mean gradient -> its square, at no
      extra pass. Called with a batch: one gradient.

    Raises:
      TypeError: without a structure.
      ValueError: when called with a batch but built without `apply_fn` and
        `likelihood`.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> estimator = ff.estimators.squared_gradient(structure=ff.structures.diagonal())
      >>> estimator.from_gradient(jnp.array([1.0, -3.0]))
      Diagonal(entries=Array([1., 9.], dtype=float32))

    References:
      Kingma, Ba, "Adam: a method for stochastic optimization", 2015.
    """
    return _squared_gradient


def _squared_gradient(apply_fn: Any, likelihood: Any, structure: Any) -> Estimator:
    model = None
    if apply_fn is not None and likelihood is not None:
        model = Model(apply_fn, likelihood)

    def from_gradient(gradient: PyTree) -> Any:
        return structure.reduce(jax.tree.map(lambda x: x[None], gradient))

    def compute(params: PyTree, batch: Batch, key: jax.Array | None) -> Any:
        if model is None:
            raise ValueError(
                "squared_gradient was built without apply_fn and likelihood, so it "
                "only squares ready gradients: call its from_gradient, or give it both."
            )
        traced = model.traced_once()
        traced.check(params, batch)
        gradient = jax.grad(traced.loss)(params, batch)
        return from_gradient(zero_if_missing(batch, gradient))

    return Estimator(
        "squared_gradient",
        compute,
        structure,
        not_a_curvature="the square of a mean gradient is not a sum over observations",
        from_gradient=from_gradient,
        check=None if model is None else model.check,
        of=model,
    )
