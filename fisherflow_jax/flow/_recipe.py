"""What is chosen of a flow."""

import dataclasses
from collections.abc import Callable
from typing import Any

from fisherflow_jax import estimators
from fisherflow_jax._ground.checks import whole
from fisherflow_jax._ground.choices import Compared
from fisherflow_jax.estimators import Estimator
from fisherflow_jax.likelihoods import Likelihood
from fisherflow_jax.memories import Memory
from fisherflow_jax.structures import Structure, capabilities, full

PyTree = Any


@dataclasses.dataclass(frozen=True, repr=False)
class Recipe:
    """The choices of `ff.fisher_flow`; recipes of equal choices are equal."""

    apply_fn: Callable
    likelihood: Likelihood
    structure: Structure
    memory: Memory
    estimator: Compared
    prior_precision: Compared
    num_steps: int
    robust: bool
    marginal: bool
    compensated: bool
    chunk_size: int | None

    @property
    def estimates_dispersion(self) -> bool:
        return self.likelihood.with_dispersion is not None

    def bound(self, estimator: Any, apply_fn: Callable) -> Estimator:
        """An estimator of this model, in the structure that a batch is measured in."""
        options: dict[str, Any] = {}
        if self.chunk_size is not None:
            options["chunk_size"] = self.chunk_size
        inner = full() if self.marginal else self.structure
        return estimators.bind(estimator, apply_fn, self.likelihood, inner, **options)

    def check(self) -> None:
        """Raises for choices that do not go together, naming them."""
        whole(self.num_steps, "num_steps")
        require = self.structure.require
        for capability, reason in self.memory.needs.items():
            require(capability, reason)
        if self.robust:
            require(
                capabilities.ROBUST,
                "a recompressed sum of squared scores is not the middle of a sandwich.",
            )
        if self.marginal:
            require(
                capabilities.MARGINAL,
                "it is for scalar, diagonal and block, which lose correlations.",
            )
        if self.compensated:
            require(capabilities.COMPENSATED, "its addition is not a sum of entries.")
        curvature = self.bound(self.estimator.value, self.apply_fn)
        if curvature.not_a_curvature:
            raise ValueError(
                f"estimators.{curvature.name} cannot be a flow's curvature: "
                f"{curvature.not_a_curvature}."
            )

    def __repr__(self) -> str:
        name = getattr(self.apply_fn, "__name__", None) or repr(self.apply_fn)
        parts = [
            name,
            repr(self.likelihood),
            f"structure={self.structure!r}",
            f"memory={self.memory!r}",
        ]
        if self.estimator.value is not estimators.exact:
            parts.append(f"estimator={self.estimator.value!r}")
        return f"fisher_flow({', '.join(parts)})"
