"""Prior precisions: a number, a pytree prefix, or an information."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fisherflow_jax import information as ops
from fisherflow_jax._ground import checks, trees
from fisherflow_jax.structures._algebra import dense
from fisherflow_jax.structures._block import Block, UnitBlock
from fisherflow_jax.structures._diagonal import Diagonal
from fisherflow_jax.structures._full import Full
from fisherflow_jax.structures._low_rank import LowRank
from fisherflow_jax.structures._scalar import Scalar

PyTree = Any


def as_precision(prior_precision: Any, params: PyTree, beside: Any = None) -> Any:
    """The prior precision as an information.

    Args:
      prior_precision: a number, a pytree prefix of numbers, or an information.
      params: the parameters.
      beside: an information whose structure must hold the prior exactly; None: any.

    Raises:
      ValueError: if it is not positive, or does not fit the parameters or `beside`.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> ff.structures.as_precision(2.0, {"w": jnp.zeros(3)})
      Scalar(value=Array(2., dtype=float32))
    """
    precision = _as_precision(prior_precision, params)
    if beside is not None:
        numbers = prior_precision
        if ops.is_information(numbers):
            if not ops.facts(precision).elementwise:
                return precision
            numbers = ops.spectral(precision, params).values
        ops.check_prior(beside, numbers, params)
    return precision


def _as_precision(prior_precision: Any, params: PyTree) -> Any:
    if ops.is_information(prior_precision):
        dtype = trees.float_dtype(params)
        precision = jax.tree.map(lambda x: jnp.asarray(x, dtype), prior_precision)
        values = ops.diagonal(precision, params)
        if jax.tree.map(jnp.shape, values) != jax.tree.map(jnp.shape, params):
            raise ValueError(
                "prior_precision is an information about another tree than the "
                f"parameters: {jax.tree.map(jnp.shape, values)}."
            )
        if not checks.is_traced(precision):
            _check_symmetric(precision)
            logdet = ops.logdet(precision, params)
            if not checks.holds(jnp.isfinite(logdet)):
                raise ValueError(
                    "a prior_precision given as an information must be positive "
                    f"definite; its log-determinant is {logdet}."
                )
        return precision
    _check_positive(prior_precision)
    if trees.is_leaf(prior_precision) and jnp.ndim(prior_precision) == 0:
        # a number takes no memory, whatever the structure
        return Scalar(jnp.asarray(prior_precision, trees.float_dtype(params)))
    return Diagonal(trees.broadcast_prefix(prior_precision, params, "prior_precision"))


def _check_symmetric(precision: Any) -> None:
    if not isinstance(precision, (Full, Block, UnitBlock)):
        return
    for matrix in dense.matrices(precision):
        if checks.is_traced(matrix):
            continue
        values = checks.readable(matrix)
        bound = 1e-5 * abs(values).max(initial=0.0)
        if not checks.holds(abs(values - values.swapaxes(-1, -2)) <= bound):
            raise ValueError("a prior_precision given as a matrix must be symmetric.")


def starting_information(nothing: Any, precision: Any) -> Any:
    """What a flow believes before any data: the prior, as rich as the structure.

    A prior richer than the structure makes the belief as rich as itself.

    Raises:
      ValueError: for a prior that low_rank cannot hold.
    """
    information = ops.add(nothing, precision)
    if isinstance(nothing, LowRank) and not isinstance(information, LowRank):
        raise ValueError(
            "structure low_rank keeps its rank only beside a diagonal prior_precision "
            f"(a number or a pytree prefix); got a {type(precision).__name__}."
        )
    return information


def _check_positive(prior_precision: PyTree) -> None:
    for leaf in jax.tree.leaves(prior_precision):
        if checks.is_traced(leaf):
            continue
        values = checks.readable(leaf)
        if not checks.holds((values > 0) & (values < np.inf)):
            raise ValueError(
                "prior_precision must be positive and finite, so that the information "
                f"can be inverted before any data; got {checks.shown(leaf)}."
            )
