"""The information of a batch, as an estimator measures it within an update."""

from typing import Any

import jax

from fisherflow_jax._ground import batch as batches
from fisherflow_jax._ground.batch import Batch
from fisherflow_jax._ground.keys import typed_key
from fisherflow_jax.estimators import Estimator
from fisherflow_jax.memories import Memory
from fisherflow_jax.transforms.preconditioner import correct as correction
from fisherflow_jax.transforms.preconditioner.remember import Remembered, take_in
from fisherflow_jax.transforms.preconditioner.restrict import has_holes, restrict

PyTree = Any


def measure(
    estimator: Estimator,
    updates: PyTree,
    batch: Batch | None,
    key: jax.Array | None,
    model: PyTree,
    step: jax.Array,
) -> Any:
    """A sum over the batch, about the parameters that `updates` shows."""
    if estimator.from_gradient is not None:
        return estimator.from_gradient(updates)
    assert batch is not None
    typed = None
    if key is not None:
        # folded, so that one key may be given to all updates
        typed = jax.random.fold_in(typed_key(key), step)
    information = estimator.compute(model, batch, typed)
    return restrict(information, updates) if has_holes(updates) else information


def take_batch(
    estimator: Estimator,
    memory: Memory,
    before: tuple[Remembered, Any],
    updates: PyTree,
    turns: correction.Groups | None,
    batch: Batch | None,
    key: jax.Array | None,
    model: PyTree,
    step: jax.Array,
) -> tuple[Remembered, Any]:
    """What is remembered after the batch, and the bases where there are such."""
    remembered, bases = before

    def measured(estimator: Estimator) -> Any:
        return measure(estimator, updates, batch, key, model, step)

    weight = None
    if batch is not None:
        weight = batches.num_observations(batch, each_target=False)
        weight = weight.astype(remembered.observations.dtype)
    if turns is None:
        return take_in(memory, remembered, measured(estimator), weight, updates), bases
    assert weight is not None
    return correction.refresh(
        memory, remembered, bases, estimator, measured, weight, updates, turns
    )
