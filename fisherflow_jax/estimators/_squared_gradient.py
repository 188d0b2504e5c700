"""The square of a batch's mean gradient: Adam's second moment."""

import functools
from collections.abc import Callable
from typing import Any

import jax

from fisherflow_jax._ground.batch import Batch, zero_if_missing
from fisherflow_jax.estimators._choice import choosable
from fisherflow_jax.estimators._estimator import Estimator
from fisherflow_jax.likelihoods import Likelihood
from fisherflow_jax.model import Model
from fisherflow_jax.structures import Structure

PyTree = Any


@functools.partial(choosable, needs_model=False)
def squared_gradient(
    apply_fn: Callable | None = None,
    likelihood: Likelihood | None = None,
    structure: Structure | None = None,
) -> Callable[..., Estimator]:
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
      ValueError: without a structure; when called with a batch but built without
        `apply_fn` and `likelihood`.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> estimator = ff.estimators.squared_gradient(structure=ff.structures.diagonal())
      >>> estimator.from_gradient(jnp.array([1.0, -3.0]))
      Diagonal(entries=Array([1., 9.], dtype=float32))

    References:
      Kingma, Ba, "Adam: a method for stochastic optimization", 2015.
    """
    return _of_model


def _of_model(
    apply_fn: Callable | None,
    likelihood: Likelihood | None,
    structure: Structure | None,
) -> Estimator:
    if structure is None:
        raise ValueError("squared_gradient needs structure=, from ff.structures.")
    reduce = structure.reduce
    model = None
    if apply_fn is not None and likelihood is not None:
        model = Model(apply_fn, likelihood)

    def from_gradient(gradient: PyTree) -> Any:
        return reduce(jax.tree.map(lambda x: x[None], gradient))

    def compute(params: PyTree, batch: Batch, key: jax.Array | None) -> Any:
        del key
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
    )
