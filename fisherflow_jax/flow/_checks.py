"""What a flow accepts: parameters, batches and options that go together."""

from typing import Any

import jax
import numpy as np

from fisherflow_jax._ground import batch as batches
from fisherflow_jax._ground import trees
from fisherflow_jax._ground.batch import Batch
from fisherflow_jax._ground.checks import holds, is_concrete
from fisherflow_jax.likelihoods import Likelihood
from fisherflow_jax.memories._memory import Memory
from fisherflow_jax.structures import Structure
from fisherflow_jax.structures import _structure as capabilities

PyTree = Any


def parameters(tree: PyTree, name: str) -> PyTree:
    """The parameters as real arrays of float32 or wider, all of one type."""
    return trees.widen(trees.real_arrays(tree, name))


def check_values(likelihood: Likelihood, batch: Batch) -> None:
    """Raises for impossible values where they are at hand (not under jit)."""
    if batch.targets is None:
        raise ValueError("a flow learns from targets; the batch's are None.")
    leaves = (*batches.split(batch.inputs)[0], batch.targets, batch.weights)
    if not is_concrete(leaves):
        return
    if not holds(batches.is_finite(batch)):
        raise ValueError(
            "the batch holds a NaN or an infinite value in a row of positive weight "
            "(under jit it would be skipped and counted)."
        )
    possible = likelihood.support(batch.targets)
    used = batch.weights > 0
    if not is_concrete((possible, used)):
        return
    if not np.asarray(possible)[np.asarray(used)].all():
        raise ValueError(
            f"the batch holds targets that {likelihood.name} cannot produce (under jit "
            "it would be skipped and counted)."
        )


def check_taken_in(sound: jax.Array) -> None:
    """Raises where an update is seen to have failed (not under jit)."""
    if is_concrete(sound) and not bool(sound):
        raise ValueError(
            "the batch's log-likelihood, its information or the updated belief is not "
            "finite (under jit it would be skipped and counted): a label beyond the "
            "model's classes, an overflow, or an information that is not positive "
            "definite in this precision?"
        )


def check_options(
    structure: Structure,
    memory: Memory,
    num_steps: int,
    robust: bool,
    marginal: bool,
    compensated: bool,
) -> None:
    if not isinstance(num_steps, int) or num_steps < 1:
        raise ValueError(
            f"num_steps must be a positive whole number; got {num_steps!r}."
        )
    for capability, reason in memory.needs.items():
        structure.require(capability, reason)
    if robust:
        structure.require(
            capabilities.ROBUST,
            "a recompressed sum of squared scores is not the middle of a sandwich.",
        )
    if marginal:
        structure.require(
            capabilities.MARGINAL,
            "it is for scalar, diagonal and block, which lose correlations.",
        )
    if compensated:
        structure.require(
            capabilities.COMPENSATED, "its addition is not a sum of entries."
        )
