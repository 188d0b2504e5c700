"""What is believed after a task that a training loop has learned."""

from typing import Any

import jax
import jax.numpy as jnp

from fisherflow_jax import information as ops
from fisherflow_jax._ground import checks, trees
from fisherflow_jax.accumulation import gathered
from fisherflow_jax.posteriors import Posterior, check_about, gaussian

PyTree = Any


def consolidate(
    state: Any,
    mean: PyTree,
    information: Any,
    *,
    decay: jax.typing.ArrayLike = 1.0,
) -> Posterior:
    r"""The posterior after a task, the prior of the next one.

    .. math:: \mathcal N\big(\theta_t,\; (\lambda (I - P) + P + F_t)^{-1}\big)

    With `elastic_penalty` as the training's anchor it is Bayes' rule by Laplace's
    approximation, one quadratic for all tasks: a diagonal is elastic weight
    consolidation with Huszar's correction, and with a decay its online form; a
    Kronecker structure is the structured online Laplace approximation. A flow's state
    takes the same by `flow.absorb`, with its memory.

    Args:
      state: what was believed before the task: anything with `.mean` and
        `.information`.
      mean: where training ended, like the state's.
      information: F, of the task's data at that mean: a sum over its observations, not
        an average over training, or an `Accumulation`.
      decay: the share of what earlier tasks said that is kept, in [0, 1]. The prior P
        is not forgotten, so that directions that no task sees stay held.

    Returns:
      A posterior of the state's temperature, about `mean`. Cost: two additions.

    Raises:
      TypeError: for a mixture.
      ValueError: for a mean or an information about other parameters, or not finite; a
        decay outside [0, 1]; or one below 1 where the state does not say its prior.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> before = ff.posterior(
      ...     jnp.zeros(2), ff.structures.diagonal(), prior_precision=1.0
      ... )
      >>> task = ff.structures.Diagonal(jnp.array([24.0, 99.0]))
      >>> after = ff.continual.consolidate(before, jnp.array([0.5, 1.0]), task)
      >>> ff.standard_error(after)
      Array([0.2, 0.1], dtype=float32)

    References:
      Schwarz et al., "Progress and compress: a scalable framework for continual
      learning", 2018.
    """
    checks.decay(decay, "decay")
    believed = gaussian(state)
    if believed.dispersion is not None:
        raise ValueError(
            "the state's dispersion is estimated from sums of squares, which a task's "
            "mean and information do not tell: fit it by the flow's own update."
        )
    mean = trees.real_arrays(mean, "mean")
    trees.check_shapes(mean, believed.mean, "the mean must be like the state's")
    for name, leaf in trees.named_leaves(mean):
        if not checks.holds(jnp.isfinite(leaf)):
            raise ValueError(f"the mean must be finite; parameter {name} is not.")
    information = gathered(information)
    check_about(information, mean)
    dtype = trees.float_dtype(mean)
    temperature = jnp.asarray(getattr(state, "temperature", 1.0), dtype)
    prior, kept = believed.prior_precision, believed.information
    if not checks.is_concrete(decay) or decay != 1:
        if prior is None:
            raise ValueError(
                "a decay below 1 keeps the prior, and this state does not say what its "
                "prior is: start from ff.posterior(..., prior_precision=...)."
            )
        kept = ops.add(ops.scale(kept, decay), ops.scale(prior, 1 - decay))
    added = ops.scale(information, 1 / temperature)
    return Posterior(
        mean=mean,
        information=ops.conform(kept, ops.add(kept, added)),
        temperature=temperature,
        prior_precision=prior,
    )
