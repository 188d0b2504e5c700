"""A batch as a flow's model sees it: functions of the parameters alone."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax

from fisherflow_jax import estimators, model
from fisherflow_jax._ground import batch as batches
from fisherflow_jax._ground.batch import Batch
from fisherflow_jax.flow._recipe import Recipe

PyTree = Any


@dataclasses.dataclass(frozen=True, eq=False)
class Observed:
    """A batch, its key, and a model that Python runs once a shape. Made in a trace."""

    recipe: Recipe
    batch: Batch
    key: jax.Array | None

    @functools.cached_property
    def apply_fn(self) -> Callable:
        return model.once(self.recipe.apply_fn)

    @functools.cached_property
    def num_observations(self) -> jax.Array:
        each_target = self.recipe.estimates_dispersion
        return batches.num_observations(self.batch, each_target=each_target)

    def total(self, function: Callable, params: PyTree) -> jax.Array:
        """`function(outputs, targets)`, summed."""
        return model.weighted_sum(self.apply_fn, function, params, self.batch)

    def log_likelihood(self, params: PyTree) -> jax.Array:
        return self.total(self.recipe.likelihood.log_prob, params)

    def information(self, params: PyTree) -> Any:
        curvature = self.recipe.bound(self.recipe.estimator.value, self.apply_fn)
        return curvature.compute(params, self.batch, self.key)

    def squared_scores(self, params: PyTree) -> Any:
        scores = self.recipe.bound(estimators.empirical, self.apply_fn)
        return scores.compute(params, self.batch, None)
