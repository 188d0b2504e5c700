"""What is chosen of a flow, and a batch as its model sees it."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fisherflow_jax import estimators, model
from fisherflow_jax._ground import batch as batches
from fisherflow_jax._ground import checks, choices, screening, trees
from fisherflow_jax._ground.telling import told
from fisherflow_jax.estimators import Estimator
from fisherflow_jax.expectations import Expectation
from fisherflow_jax.likelihoods import Likelihood
from fisherflow_jax.memories import Memory
from fisherflow_jax.structures import Structure, capabilities, full

PyTree = Any


# What an option needs of the structure, and why.
_NEEDS = {
    "robust": (
        capabilities.ROBUST,
        "a recompressed sum of squared scores is not the middle of a sandwich.",
    ),
    "marginal": (
        capabilities.MARGINAL,
        "it is for scalar, diagonal and block, which lose correlations.",
    ),
    "compensated": (capabilities.COMPENSATED, "its addition is not a sum of entries."),
}


_KINDS_OF_WEIGHTS = "frequency", "sampling", "variance"


@dataclasses.dataclass(frozen=True, repr=False)
class Recipe:
    """The choices of `ff.fisher_flow`; recipes of equal choices are equal."""

    apply_fn: Callable
    likelihood: Likelihood
    structure: Structure
    memory: Memory
    estimator: choices.Compared
    prior_precision: choices.Compared
    num_steps: int
    robust: bool
    num_clusters: int | None
    weights_are: str
    marginal: bool
    compensated: bool | None
    chunk_size: int | None
    bad_rows: str
    expectation: Expectation | None = None
    num_refreshes: int = 4

    @functools.cached_property
    def model(self) -> model.Model:
        return model.Model(self.apply_fn, self.likelihood, self.batched)

    @functools.cached_property
    def batched(self) -> bool | None:
        """Whether the model is run on whole batches, if its estimator was told."""
        own = self.bound(self.estimator.value, self.apply_fn).model
        return own.batched if own is not None else None

    def traced_once(self) -> "Recipe":
        """For one update, in which the model is traced once a shape."""
        return dataclasses.replace(self, apply_fn=model.once(self.apply_fn))

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
        checks.whole(self.num_steps, "num_steps")
        screening.check_option(self.bad_rows)
        for capability, reason in self.memory.needs.items():
            self.structure.require(capability, reason)
        for option, (capability, reason) in _NEEDS.items():
            if getattr(self, option):
                self.structure.require(capability, reason)
        self._check_robust()
        self._check_expectation()
        estimator, unknown = self.estimator.value, self.likelihood.nuisance
        if unknown is not None and getattr(estimator, "bound", None):
            raise ValueError(
                f"with an unknown {' and '.join(unknown.names)} an estimator cannot be "
                f"bound to the likelihood: give estimators.{estimator.name} with "
                "options alone."
            )
        curvature = self.bound(estimator, self.apply_fn)
        if curvature.not_a_curvature:
            raise ValueError(
                f"estimators.{curvature.name} cannot be a flow's curvature: "
                f"{curvature.not_a_curvature}."
            )

    def check_root(self, params: PyTree, batch: batches.Batch) -> None:
        """Raises where the outputs at these values have no information, if it can."""
        likelihood = self.likelihood.at_start
        if not likelihood.random_root:
            outputs = self.apply_fn(params, batches.unshare(batch.inputs))
            likelihood.root(outputs, jnp.zeros(likelihood.probe_shape(outputs.shape)))

    @property
    def keeps_covariance(self) -> bool:
        """Whether a state of full structure keeps its covariance in float64, in place
        of the information: single steps under a memory that moves the parameters."""
        moves = capabilities.RANDOM_WALK in self.memory.needs
        known = not self.estimates_dispersion and self.likelihood.nuisance is None
        return moves and known and self.num_steps == 1 and not self.robust

    @property
    def draws(self) -> bool:
        """Whether an update needs a key."""
        curvature = self.bound(self.estimator.value, self.apply_fn)
        nodes = self.expectation is not None and self.expectation.random
        return curvature.random or nodes

    def _check_expectation(self) -> None:
        checks.whole(self.num_refreshes, "num_refreshes")
        if self.expectation is None:
            return
        if self.num_steps == 1:
            raise ValueError(
                f"expectation={self.expectation} with num_steps=1 would average over "
                "the belief before the batch: for a log link, whose mean exp(v / 2) "
                "grows with its variance, that is information which does not exist "
                "(intervals of nominal 95% covered 11%). Leave num_steps as it is."
            )
        curvature = self.bound(self.estimator.value, self.apply_fn)
        if self.expectation.nodes is None and not curvature.by_root:
            raise ValueError(
                f"expectation={self.expectation} averages the root of the outputs' "
                f"information, and estimators.{curvature.name} is made of scores: take "
                "ff.estimators.exact, or an expectation over the parameters such as "
                "ff.expectations.cubature()."
            )

    def _check_robust(self) -> None:
        if self.weights_are not in _KINDS_OF_WEIGHTS:
            raise ValueError(
                f"weights_are must be one of {', '.join(map(repr, _KINDS_OF_WEIGHTS))};"
                f" got {self.weights_are!r}."
            )
        if self.weights_are == "sampling" and not self.robust:
            raise ValueError(
                'weights_are="sampling" needs robust=True: no standard error but the '
                "sandwich's knows what a sampling weight is."
            )
        layers = self.structure.layers
        if self.robust and layers is not None and layers.batched:
            raise ValueError(
                f"robust=True keeps the square of every example's score, and "
                f"{self.structure.name} with layers of whole batches squares sums of "
                "them with random signs: give ff.structures.diagonal() without layers."
            )
        if self.num_clusters is None:
            return
        checks.whole(self.num_clusters, "num_clusters")
        if not self.robust:
            raise ValueError("num_clusters is for robust=True, the sandwich.")
        if capabilities.ADAPTIVE in self.memory.needs:
            raise ValueError(
                f"memory {self.memory.name} does not go with num_clusters: its test "
                "takes the scores of two windows for independent, and a cluster may "
                "have rows in both."
            )

    def __repr__(self) -> str:
        parts = [
            told(self.apply_fn),
            repr(self.likelihood),
            f"structure={self.structure!r}",
            f"memory={self.memory!r}",
        ]
        if self.estimator.value is not estimators.exact:
            parts.append(f"estimator={self.estimator.value!r}")
        if self.expectation is not None:
            parts.append(f"expectation={self.expectation!r}")
        return f"fisher_flow({', '.join(parts)})"


@dataclasses.dataclass(frozen=True, eq=False)
class Observed:
    """A batch, its key, and a model that Python runs once a shape: functions of the
    parameters alone. Made in a trace.

    `log_prior`: what the search adds to the log-likelihood; `widest`: of outputs over
    which it is averaged, the largest standard deviation, `()`.
    """

    recipe: Recipe
    batch: batches.Batch
    key: jax.Array | None
    log_prior: model.Traced | None = None
    widest: Any = None

    @functools.cached_property
    def apply_fn(self) -> Callable:
        return model.once(self.recipe.apply_fn)

    @functools.cached_property
    def num_observations(self) -> jax.Array:
        return num_observations(self.recipe, self.batch)

    def total(self, function: Callable, params: PyTree) -> jax.Array:
        """`function(outputs, targets)`, summed."""
        return model.weighted_sum(self.apply_fn, function, params, self.batch)

    def log_likelihood(self, params: PyTree) -> jax.Array:
        likelihood = self.recipe.likelihood
        return model.log_likelihood(self.apply_fn, likelihood, params, self.batch)

    def log_density(self, params: PyTree) -> jax.Array:
        """What is searched for the largest value of: with the log-prior."""
        value = self.log_likelihood(params)
        if self.log_prior is None:
            return value
        return value + self.log_prior(params).astype(value.dtype)

    def information(self, params: PyTree) -> Any:
        curvature = self.recipe.bound(self.recipe.estimator.value, self.apply_fn)
        return curvature.compute(params, self.batch, self.key)

    def log_unit_variance(self, params: PyTree) -> jax.Array:
        """Of the targets where the dispersion is one, summed."""
        of_targets: Any = self.recipe.likelihood.log_unit_variance
        batch = self.batch
        by_row = self.recipe.weights_are != "frequency"
        if by_row:
            batch = rows_counted(batch)

        def values(_: tuple, pair: tuple) -> jax.Array:
            targets, weights = pair
            logs = of_targets(targets)
            if not by_row:
                return logs
            weights = weights.astype(logs.dtype)
            weights = weights.reshape(weights.shape + (1,) * (logs.ndim - weights.ndim))
            return logs - jnp.log(weights)  # the variance is V(y) / w

        batch = batch._replace(targets=(batch.targets, self.batch.weights))
        return model.weighted_sum(lambda params, inputs: (), values, params, batch)


def num_observations(recipe: Recipe, batch: batches.Batch) -> jax.Array:
    """How many observations a batch counts for, `()`: by its weights, or its rows."""
    if recipe.weights_are != "frequency":
        batch = rows_counted(batch)
    each_target = recipe.estimates_dispersion
    return batches.num_observations(batch, each_target=each_target)


def rows_counted(batch: batches.Batch) -> batches.Batch:
    """With a weight of one in place of every positive one."""
    return batch._replace(weights=(batch.weights > 0).astype(batch.weights.dtype))


def log_prior_of(log_prior: Callable, like: PyTree) -> model.Traced:
    """The function of parameters like these, its Python run once.

    Raises:
      TypeError: for what is no function.
      ValueError: if it does not return a number.
    """
    rule = "log_prior is a function of the parameters that returns a number, such as "
    rule += "ff.geometry.jeffreys(metric)"
    if not callable(log_prior):
        raise TypeError(f"{rule}; got {checks.described(log_prior)}.")
    found = jax.eval_shape(log_prior, like)
    if getattr(found, "shape", None) != ():
        raise ValueError(f"{rule}; it returned {found}.")
    return model.Traced.of(log_prior, like)


def parameters(tree: PyTree, name: str) -> PyTree:
    """The parameters as real arrays of float32 or wider, all of one type."""
    if not jax.tree.leaves(tree):
        raise ValueError(
            f"{name} must be a pytree with at least one array; got "
            f"{checks.described(tree)}."
        )
    return trees.widen(trees.real_arrays(tree, name))
