"""The past is forgotten by a constant factor an update."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fisherflow_jax._ground import checks, choices
from fisherflow_jax.memories._memory import Belief, Memory, MovingAverage, keep


class Decay(NamedTuple):
    """The rate, kept in the state so that `ff.merge` can age it."""

    decay: jax.Array  # ()
    floored: jax.Array  # () bool

    def aged(self, belief: Belief, steps: jax.Array) -> Belief:
        factor = self.decay ** steps.astype(self.decay.dtype)
        beliefs = belief.faded_to_prior(factor), belief.faded(factor)
        return optax.tree.where(self.floored, *beliefs)


@choices.choice
def exponential(decay: Any, *, floor: bool = True) -> Memory:
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
      decay: the factor an update (not an observation), in (0, 1]; may be traced.
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
    at_hand = checks.is_concrete(decay)
    if at_hand and not 0 < decay <= 1:
        raise ValueError(f"decay must be in (0, 1]; got {decay}.")

    def init(zeros) -> Decay:
        return Decay(
            jnp.asarray(decay, zeros.weight.dtype), jnp.asarray(floor, jnp.bool_)
        )

    def predict(storage: Decay, believed: Any, batch: Any, like: Any) -> Any:
        fade = believed.faded_to_prior if floor else believed.faded
        return fade(storage.decay)

    def debias(information: Any, steps: jax.Array) -> Any:
        # not by the summed weights, which round differently than Optax's power
        steps = steps.astype(jnp.result_type(decay))
        return optax.tree.bias_correction(information, decay, steps)

    # nothing is forgotten at a decay of one, and a mean over all is a sum's
    average = MovingAverage(1 - decay, debias)
    return Memory(
        name=f"exponential({decay if at_hand else 'traced'})",
        init=init,
        predict=predict,
        remember=keep,
        average=None if at_hand and decay == 1 else average,
    )
