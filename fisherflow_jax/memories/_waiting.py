"""A memory that lets the first batch be: the prior is what is believed before it."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fisherflow_jax._ground import choices, trees
from fisherflow_jax.memories._memory import (
    Belief,
    Memory,
    Sum,
    age,
    keeps_prior,
    remembers_all,
)


class Waiting(NamedTuple):
    """A memory's storage, and whether a batch has come."""

    storage: Any
    started: jax.Array  # () bool

    @property
    def remembers_all(self) -> bool:
        return remembers_all(self.storage)

    @property
    def keeps_prior(self) -> bool:
        return keeps_prior(self.storage)

    def aged(self, belief: Belief, steps: jax.Array) -> Belief:
        first = (~self.started).astype(steps.dtype)
        return age(self.storage, belief, jnp.maximum(steps - first, 0))


@choices.choice
def waiting(memory: Memory) -> Memory:
    """The memory, whose first prediction is made before the second batch.

    A batch without any weight is one too: what a filter predicts before its first
    observation is its prior, whether or not that observation is missing.

    Example:
      >>> import fisherflow_jax as ff
      >>> ff.memories.waiting(ff.memories.random_walk(0.1)).name
      "random_walk(0.1), prior_is='predicted'"
    """

    def init(zeros: Sum) -> Waiting:
        return Waiting(memory.init(zeros), jnp.zeros((), jnp.bool_))

    def predict(storage: Waiting, believed: Any, batch: Any, like: Any) -> Any:
        predicted = memory.predict(storage.storage, believed, batch, like)
        return trees.where(storage.started, predicted, believed)

    def remember(storage: Waiting, believed: Any, site: Sum) -> tuple[Any, Any, Any]:
        inner, believed, report = memory.remember(storage.storage, believed, site)
        return Waiting(inner, jnp.ones((), jnp.bool_)), believed, report

    return dataclasses.replace(
        memory,
        name=f"{memory.name}, prior_is='predicted'",
        call=f"{memory!r}, prior_is='predicted'",
        init=init,
        predict=predict,
        remember=remember,
    )
