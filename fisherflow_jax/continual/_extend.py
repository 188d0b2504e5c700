"""What is believed of a model that has grown."""

from typing import Any

import jax
import jax.numpy as jnp

from fisherflow_jax import information as ops
from fisherflow_jax._ground import checks, trees
from fisherflow_jax.posteriors import Posterior, gaussian
from fisherflow_jax.structures import Structure, as_precision

PyTree = Any


def extend(
    state: Any,
    params: PyTree,
    *,
    prior_precision: Any,
    structure: Structure | None = None,
) -> Posterior:
    r"""What is believed once a model has more parameters: a head with more classes.

    .. math:: \mathcal N\Big(\begin{pmatrix} \hat\theta \\ \theta_0 \end{pmatrix},\;
       T \begin{pmatrix} T I & 0 \\ 0 & P \end{pmatrix}^{-1}\Big)

    Parameters are known again by their names, and what was there before stands at the
    beginning of each axis: mean and information of it stay what they are. Rows, columns
    and leaves that are new have the prior, about the values that `params` gives them.

    Kronecker factors of a layer grow with its inputs (A) and outputs (G) by zeros. A
    layer has one number of the prior, so that new rows of a layer that was there can
    have no other than it has; a new layer has its own. What is exact at once is later
    K-FAC's approximation, with its one n for all layers: data that come after it are a
    share of all that were seen, and a new layer's information is as much smaller.

    Args:
      state: anything with `.mean` and `.information`. Of a flow's state, what it
        believes; a flow of the new model takes the result as its prior,
        `prior_precision=found.information`, `flow.init(found.mean)`.
      params: the new parameters, a tree whose leaves have the names of the old ones.
      prior_precision: P, a positive number, or a pytree prefix of numbers like params,
        of which those of new entries are read.
      structure: of the new model; needed where it says what new leaves belong to:
        `ff.structures.kronecker(layers)` with the new model's layers, and
        `ff.structures.block(partition)` where leaves are new. None: the state's own; a
        scalar, which cannot tell old from new, becomes a `Diagonal`.

    Returns:
      A posterior of the state's temperature. Cost: a copy.

    Raises:
      TypeError: for a mixture.
      ValueError: for a parameter that is gone or has shrunk, by name; a prior precision
        that is not positive; a structure that cannot hold what is known, as one of
        other blocks or layers, or, of a layer that grew, a precision that it has not; a
        state whose dispersion is estimated.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> information = ff.structures.Diagonal({"head": jnp.array([3.0, 15.0])})
      >>> state = ff.posterior(
      ...     {"head": jnp.array([1.0, 2.0])}, information, prior_precision=1.0
      ... )
      >>> more = {"head": jnp.zeros(3), "gate": jnp.zeros(1)}
      >>> found = ff.continual.extend(state, more, prior_precision=4.0)
      >>> found.mean["head"], ff.standard_error(found)["head"]
      (Array([1., 2., 0.], dtype=float32), Array([0.5 , 0.25, 0.5 ], dtype=float32))
    """
    believed = gaussian(state)
    if structure is not None:
        checks.made(structure, Structure, "structure", "ff.structures.block(partition)")
    if believed.dispersion is not None:
        raise ValueError(
            "the state's dispersion is estimated from sums of squares, which a "
            "posterior about more parameters would not have."
        )
    params, former = trees.real_arrays(params, "params"), believed.mean
    mean = trees.laid_over(former, params)
    dtype = trees.float_dtype(mean)
    temperature = jnp.asarray(getattr(state, "temperature", 1.0), dtype)
    with jax.ensure_compile_time_eval():
        precision = as_precision(prior_precision, params)
        if not ops.facts(precision).elementwise:
            raise ValueError(
                "prior_precision of what is new is a number, or a pytree prefix of "
                f"numbers; got a {type(precision).__name__} information."
            )
        precision = ops.scale(precision, 1 / temperature)
        entries = ops.diagonal(precision, params)

    embed = ops.embed if structure is None else structure.embed
    prior = believed.prior_precision
    if prior is not None and not _are_one_number(prior, precision):
        alike = type(prior) is type(believed.information)
        prior = (embed if alike else ops.embed)(prior, entries, former)
    return Posterior(
        mean=mean,
        information=embed(believed.information, entries, former),
        temperature=temperature,
        prior_precision=prior,
    )


def _are_one_number(prior: Any, precision: Any) -> bool:
    if not ops.facts(prior).elementwise or not checks.is_concrete((prior, precision)):
        return False
    one, other = (ops.spectral(x).values for x in (prior, precision))
    same = trees.is_leaf(one) and trees.is_leaf(other)
    return same and jnp.ndim(one) == 0 and bool(jnp.all(one == other))
