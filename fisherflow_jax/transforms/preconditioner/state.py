"""What a preconditioner keeps from step to step."""

from typing import Any, NamedTuple

import jax


class ScaleByFisherState(NamedTuple):
    """The information that a training run accumulates."""

    step: jax.Array  # () int32, updates that were not skipped
    information: Any  # a sum, or Optax's moving average; or a SecondMoment
    observations: jax.Array  # () summed weights in it: their quotient is a mean
    num_batches: jax.Array  # () int32, batches in it
    damping: jax.Array  # ()
    memory: Any  # the memory's storage
    factorisation: Any | None  # None: made anew at each step; or the LayerBases
    momentum: Any  # state of the inner transformation
    num_skipped: jax.Array  # () int32, updates refused for a non-finite value
    key: jax.Array | None  # key data, None if nothing is drawn from it


class SecondMoment(NamedTuple):
    """What is kept of squares that are no Fisher information."""

    squares: Any  # in an information's structure


def as_kept(information: Any, not_a_curvature: str | None) -> Any:
    """An information, or what must not be taken for one."""
    return SecondMoment(information) if not_a_curvature else information


def information_of(state: ScaleByFisherState) -> Any:
    """What is remembered, whether it is an information or not."""
    kept = state.information
    return kept.squares if isinstance(kept, SecondMoment) else kept
