"""Rules: which vectors enter at the outputs, and how many are squared as one."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from fisherflow_jax._ground.checks import whole
from fisherflow_jax.likelihoods import Likelihood

Cotangents = Callable[[Likelihood, jax.Array, Any, jax.Array | None], jax.Array]


@dataclasses.dataclass(frozen=True, repr=False)
class Rule:
    """What an estimator of pulled-back vectors does, whatever the model."""

    cotangents: Cotangents
    """`(likelihood, outputs (1, ...), targets, key) -> cotangents (R, 1, ...)`."""
    random: bool | None = False
    """Whether `cotangents` draws from its key; None: where the likelihood's root is."""
    needs_targets: bool = False
    num_columns: int = 1
    """R, where it is told at all: of estimators that square sums over groups."""
    name: str = "rule"
    root: Callable[[Likelihood], Likelihood] | None = None
    """Gives the likelihood another root; None: it keeps its own."""
    groups: int | None = None
    """Micro-batches whose sums are squared; None: every example for itself."""
    chunk_size: int | None = None
    fast_squares: bool = True

    def __repr__(self) -> str:
        return self.name

    def __post_init__(self) -> None:
        if self.chunk_size is not None:
            whole(self.chunk_size, "chunk_size", of="examples")
        if self.groups is not None:
            whole(self.groups, "groups", of="micro-batches (None: one an example)")
