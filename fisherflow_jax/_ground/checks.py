"""What arguments are asked for, and whether their values are at hand."""

from typing import Any

import jax
import numpy as np

PyTree = Any


def holds(condition: jax.Array) -> bool:
    """Whether a condition holds everywhere, as far as its values are at hand.

    Arrays that a traced function closes over are at hand, but what is computed of them
    there is not: it is the condition that must be asked.
    """
    return isinstance(condition, jax.core.Tracer) or bool(np.all(condition))


def is_concrete(tree: PyTree) -> bool:
    """Whether the values are at hand (not traced), so that they may be checked."""
    return not any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(tree))
