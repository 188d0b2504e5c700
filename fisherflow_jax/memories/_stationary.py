"""Everything is remembered at full weight."""

from typing import NamedTuple

import jax

from fisherflow_jax._ground.choices import choice
from fisherflow_jax.memories._memory import Belief, Memory, keep


class Stationary(NamedTuple):
    """Stores nothing."""

    @property
    def remembers_all(self) -> bool:
        return True

    def aged(self, belief: Belief, steps: jax.Array) -> Belief:
        del steps
        return belief


@choice
def stationary() -> Memory:
    r"""Remembers every batch at full weight: parameters that do not change.

    .. math:: I_t = I_{t-1} + F_t

    With the full structure and a linear-Gaussian model this is recursive least squares,
    the Kalman filter without process noise, and the Bayesian batch posterior, in any
    order and any batch size.

    Returns:
      A `Memory`. Cost and storage: none.

    Example:
      >>> import fisherflow_jax as ff
      >>> ff.memories.stationary().name
      'stationary()'
    """
    return Memory(
        name="stationary()",
        init=lambda zeros: Stationary(),
        predict=lambda storage, believed, batch, like: believed,
        remember=keep,
    )
