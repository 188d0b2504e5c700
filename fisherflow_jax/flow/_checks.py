"""What a flow accepts of parameters and values."""

from typing import Any

import jax
import numpy as np

from fisherflow_jax._ground import batch as batches
from fisherflow_jax._ground import trees
from fisherflow_jax._ground.batch import Batch
from fisherflow_jax._ground.checks import holds, is_concrete
from fisherflow_jax.likelihoods import Likelihood

PyTree = Any


def parameters(tree: PyTree, name: str) -> PyTree:
    """The parameters as real arrays of float32 or wider, all of one type."""
    return trees.widen(trees.real_arrays(tree, name))


def check_taken_in(skipped: jax.Array, likelihood: Likelihood, batch: Batch) -> None:
    """Raises where an update is seen to have failed (not under jit), saying why."""
    if not is_concrete(skipped) or not skipped:
        return
    if holds(batches.is_finite(batch)):
        possible = likelihood.support(batch.targets)
        used = batch.weights > 0
        at_hand = is_concrete((possible, used))
        if at_hand and not np.asarray(possible)[np.asarray(used)].all():
            raise ValueError(
                f"the batch holds targets that {likelihood.name} cannot produce (under "
                "jit it would be skipped and counted)."
            )
        raise ValueError(
            "the batch's log-likelihood, its information or the updated belief is not "
            "finite (under jit it would be skipped and counted): a label beyond the "
            "model's classes, an overflow, or an information that is not positive "
            "definite in this precision?"
        )
    raise ValueError(
        "the batch holds a NaN or an infinite value in a row of positive weight "
        "(under jit it would be skipped and counted)."
    )
