"""What a flow accepts of parameters and values."""

from typing import Any, NamedTuple

import jax

from fisherflow_jax._ground import trees
from fisherflow_jax._ground.checks import is_concrete

PyTree = Any


def parameters(tree: PyTree, name: str) -> PyTree:
    """The parameters as real arrays of float32 or wider, all of one type."""
    return trees.widen(trees.real_arrays(tree, name))


class Sound(NamedTuple):
    """What must hold of an update, each `()` bool."""

    finite: jax.Array  # the batch
    possible: jax.Array  # its targets
    taken_in: jax.Array  # the belief that includes it


def check_sound(sound: Sound, likelihood: Any) -> None:
    """Raises where an update is seen to have failed (not under jit)."""
    if not is_concrete(sound):
        return
    if not sound.finite:
        raise ValueError(
            "the batch holds a NaN or an infinite value in a row of positive weight "
            "(under jit it would be skipped and counted)."
        )
    if not sound.possible:
        raise ValueError(
            f"the batch holds targets that {likelihood.name} cannot produce (under jit "
            "it would be skipped and counted)."
        )
    if not sound.taken_in:
        raise ValueError(
            "the batch's log-likelihood, its information or the updated belief is not "
            "finite (under jit it would be skipped and counted): a label beyond the "
            "model's classes, an overflow, or an information that is not positive "
            "definite in this precision?"
        )
