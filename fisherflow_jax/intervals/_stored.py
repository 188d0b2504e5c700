"""Rows that are stored, and the functions of the parameters that they make."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fisherflow_jax import accumulation, estimators, geometry, structures
from fisherflow_jax import information as ops
from fisherflow_jax._ground import batch as batches
from fisherflow_jax._ground import checks, screening, trees
from fisherflow_jax._ground.batch import Batch
from fisherflow_jax._ground.directional import derivative
from fisherflow_jax.flow import Solution, damped_newton, objective_of
from fisherflow_jax.likelihoods import Likelihood
from fisherflow_jax.model import Model, Traced
from fisherflow_jax.posteriors import Gaussian, gaussian

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Asked:
    """A model and the static part of what is asked of it; programs are its own."""

    model: Model
    log_prior: Callable | None = None  # of arrays and parameters
    num_points: int = 0


def believed(state: Any, likelihood: Likelihood) -> Gaussian:
    """The state's Gaussian, its mean in float32 or wider.

    Raises:
      ValueError: for a likelihood that leaves something unknown.
      TypeError: for a mixture.
    """
    unknown = likelihood.with_dispersion is not None
    if unknown or likelihood.nuisance is not None:
        what = "the dispersion" if unknown else " and ".join(likelihood.nuisance.names)
        raise ValueError(
            f"{what} of {likelihood!r} is unknown, and these intervals are of a "
            "likelihood that is known but for its parameters: give it a number, such "
            "as ff.likelihoods.gaussian(scale=2.0), or take ff.confidence_interval, "
            "which is Student's t where a dispersion is estimated."
        )
    one = gaussian(state)
    if one.dispersion is not None:
        raise ValueError(
            "the state estimates a dispersion that the likelihood takes as known: give "
            "the state of a flow with this likelihood."
        )
    return one._replace(mean=trees.widen(one.mean))


def rows_of(
    model: Model, params: PyTree, data: Any, bad_rows: str, to_batch: Any
) -> list[Batch]:
    """The batches, checked, without padding.

    Raises:
      ValueError: without targets, for bad rows (unless they are dropped), for shapes
        that do not fit, and for a model without tangents.
    """
    screening.check_option(bad_rows)
    alone = isinstance(data, tuple) and not isinstance(data, accumulation.Stacked)
    found = []
    for number, (batch, count) in enumerate(accumulation.counted(data, to_batch)):
        if batch.targets is None:
            raise ValueError("an interval needs targets; the batch's are None.")
        batch = batches.map_examples(lambda x, count=count: x[:count], batch)
        where = "the batch" if alone else f"batch {number}"
        batch, _ = model.admitted(params, batch, bad_rows, where)
        model.check(params, batch)
        found.append(batch)
    once: Any = model.traced_once().apply_fn
    if not once.has_tangents(params, batches.unshare(found[0].inputs)):
        raise ValueError(
            "third derivatives are taken by tangents, and the model holds a "
            "jax.custom_vjp, which has none: give it a jax.custom_jvp."
        )
    return found


def together(parts: list[Batch]) -> Batch:
    """All rows in one batch."""
    if len(parts) == 1:
        return parts[0]
    shared = [jax.tree.leaves(batches.map_inputs(_nothing, x.inputs)) for x in parts]
    for other in shared[1:]:
        pairs = zip(shared[0], other, strict=True)
        if not all(x is y or checks.holds(jnp.array_equal(x, y)) for x, y in pairs):
            raise ValueError("parts in ff.Shared must be the same in all batches.")
    rebuild = batches.unpack(parts[0])[1]
    given = [batches.unpack(part)[0] for part in parts]
    return rebuild(*jax.tree.map(lambda *x: jnp.concatenate(x), *given))


def _nothing(_: Any) -> None:
    return None


@dataclasses.dataclass(frozen=True, eq=False)
class Stored:
    """Functions of the ravelled parameters, of all rows. Made in a trace."""

    model: Model
    like: PyTree  # shapes of the parameters
    batch: Batch
    log_prior: Traced | None = None

    @classmethod
    def of(cls, own: Asked, mean: PyTree, batch: Batch, arrays: Any = None) -> "Stored":
        like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), mean)
        prior = None if own.log_prior is None else Traced(own.log_prior, arrays)
        return cls(own.model.traced_once(), like, batch, prior)

    def log_likelihood(self, vector: jax.Array) -> jax.Array:
        params = trees.unravel(vector, self.like)
        return self.model.log_likelihood(params, self.batch).astype(vector.dtype)

    def log_density(self, vector: jax.Array) -> jax.Array:
        """With the log-prior."""
        value = self.log_likelihood(vector)
        if self.log_prior is None:
            return value
        prior = self.log_prior(trees.unravel(vector, self.like))
        return value + prior.astype(value.dtype)

    @functools.cached_property
    def information(self) -> Callable[[jax.Array], Any]:
        """Expected, whole."""

        def apply_fn(vector: jax.Array, inputs: PyTree) -> Any:
            return self.model.apply_fn(trees.unravel(vector, self.like), inputs)

        exact = estimators.exact(apply_fn, self.model.likelihood, structures.full())
        return lambda vector: exact.compute(vector, self.batch, None)

    def penalised(self, vector: jax.Array) -> jax.Array:
        """Jeffreys' prior in place of another: Firth's, in canonical parameters."""
        jeffreys = geometry.jeffreys(
            lambda vector: ops.to_dense(self.information(vector), vector)
        )
        return self.log_likelihood(vector) + jeffreys(vector)

    def is_canonical(self, at: jax.Array, along: jax.Array) -> jax.Array:
        """Whether the targets leave the Hessian alone along a direction, `()` bool."""
        bend = -derivative(self.log_likelihood, at, along, along)
        expected = ops.quadratic_form(self.information(at), along)
        return jnp.abs(bend - expected) <= jnp.finfo(at.dtype).eps ** 0.5 * expected


def determines_all(information: Any, like: jax.Array) -> jax.Array:
    """Whether it hides no direction from rounding, `()` bool."""
    return jnp.sum(ops.resolved(information, like)[1]) <= 0


def highest(
    log_density: Callable, information: Callable, start: jax.Array, num_steps: int
) -> Solution:
    """Where a function of a vector is largest.

    Where it has no maximum a step brings it nearer to its limit by a factor of e.
    """
    nothing = structures.full().empty(start)
    objective = objective_of(log_density, information, start, nothing)
    return damped_newton(objective, start, num_steps, once=True)
