"""Everything is remembered at full weight."""

from typing import NamedTuple

import jax

from fisherflow_jax.memories._memory import Belief, Memory, Prior, age, keep


class Stationary(NamedTuple):
    """Stores nothing."""


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
    return Memory("stationary()", lambda zeros: Stationary(), _predict, keep)


def _predict(storage: Stationary, belief: Belief, prior: Prior) -> Belief:
    return belief


@age.register
def _(storage: Stationary, belief: Belief, prior: Prior, steps: jax.Array) -> Belief:
    return belief
