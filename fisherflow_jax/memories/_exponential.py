"""The past is forgotten by a constant factor an update."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from fisherflow_jax import information as ops
from fisherflow_jax.memories._memory import (
    Belief,
    Memory,
    MovingAverage,
    Prior,
    age,
    keep,
)


class Decay(NamedTuple):
    """The rate, kept in the state so that `ff.merge` can age it."""

    decay: jax.Array  # ()
    floored: jax.Array  # () bool


def exponential(decay: float, *, floor: bool = True) -> Memory:
    r"""Forgets by the factor `decay` at each update, down to the prior.

    .. math:: I^-_t = \lambda I_{t-1} + (1 - \lambda) I_0, \quad
       I^-_t \theta^-_t = \lambda I_{t-1} \theta_{t-1} + (1 - \lambda) I_0 \theta_0

    About `1 / (1 - decay)` updates are remembered. The prior keeps its weight (the
    floor), so that directions no longer excited fall back to it instead of winding up.
    Linear-Gaussian: recursive least squares with a forgetting factor. The intervals are
    those of a drifting state; if the parameters do not drift they are too wide by the
    factor `sqrt(1 + decay)`.

    In `ff.scale_by_fisher`, which has no prior, it is Optax's moving average of the
    batches' means, `(1 - decay) F / n` being added to what is remembered.

    Args:
      decay: the factor an update (not an observation), in (0, 1].
      floor: False forgets the prior too, as textbook recursive least squares does.

    Returns:
      A `Memory`. Cost: one solve an update with the floor; storage: none.

    Raises:
      ValueError: for a decay outside (0, 1].

    Example:
      >>> import fisherflow_jax as ff
      >>> ff.memories.exponential(0.99).name
      'exponential(0.99)'

    References:
      Kulhavy, Zarrop, "On a general concept of forgetting", 1993.
    """
    if not 0 < decay <= 1:
        raise ValueError(f"decay must be in (0, 1]; got {decay}.")

    def init(zeros) -> Decay:
        return Decay(
            jnp.asarray(decay, zeros.weight.dtype), jnp.asarray(floor, jnp.bool_)
        )

    def predict(storage: Decay, belief: Belief, prior: Prior) -> Belief:
        if not floor or prior.precision is None:
            return _fade(belief, storage.decay)
        return _fade_to_prior(belief, prior, storage.decay)

    def debias(information, steps: jax.Array):
        # not by the summed weights, which round differently than Optax's power
        return optax.tree.bias_correction(information, decay, steps)

    # nothing is forgotten at a decay of one, and a mean over all is a sum's
    average = None if decay == 1 else MovingAverage(1 - decay, debias)
    return Memory(f"exponential({decay})", init, predict, keep, average=average)


def _fade(belief: Belief, factor: jax.Array) -> Belief:
    return Belief(
        belief.mean,
        ops.scale(belief.information, factor),
        # an outer product of scores carries the weight twice
        None if belief.meat is None else ops.scale(belief.meat, jnp.square(factor)),
        belief.count * factor,
        None if belief.residual is None else belief.residual * factor,
    )


def _fade_to_prior(belief: Belief, prior: Prior, factor: jax.Array) -> Belief:
    rest = ops.scale(prior.precision, 1 - factor)
    faded = _fade(belief, factor)
    information = ops.add(faded.information, rest)
    # the mean moves by an increment: I theta is never carried, it loses digits
    offset = optax.tree.sub(belief.mean, prior.origin)
    step = ops.solve(information, ops.matvec(rest, offset))
    mean = optax.tree.sub(belief.mean, step)
    residual = faded.residual
    if residual is not None:
        residual = residual + ops.quadratic_form(faded.information, step)
        offset = optax.tree.sub(mean, prior.origin)
        residual = residual + ops.quadratic_form(rest, offset)
    return faded._replace(mean=mean, information=information, residual=residual)


@age.register
def _(storage: Decay, belief: Belief, prior: Prior, steps: jax.Array) -> Belief:
    factor = storage.decay ** steps.astype(storage.decay.dtype)
    to_prior, plain = _fade_to_prior(belief, prior, factor), _fade(belief, factor)
    return jax.tree.map(lambda x, y: jnp.where(storage.floored, x, y), to_prior, plain)
