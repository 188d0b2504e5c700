"""What is chosen of a preconditioner, and what it keeps from step to step."""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fisherflow_jax._ground.sharding import has_explicit_axes
from fisherflow_jax.estimators import Estimator
from fisherflow_jax.memories import Memory

PyTree = Any
Damping = jax.typing.ArrayLike | Callable[[jax.Array], jax.typing.ArrayLike]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The choices of `ff.scale_by_fisher`; recipes of equal choices are equal."""

    estimator: Estimator
    memory: Memory
    damping: Damping
    period: int
    inverse_period: int | None
    staggered: bool
    """Whether parts of a factorisation are renewed by turns."""
    corrected: bool
    """Whether eigenvalues are corrected."""
    momentum: optax.GradientTransformation
    power: float
    root_damping: jax.typing.ArrayLike
    factorise: Callable[..., Any]

    @property
    def takes_like(self) -> bool:
        """Whether `factorise` may be told the parameters' shapes."""
        return "like" in inspect.signature(self.factorise).parameters

    @property
    def renewals(self) -> tuple[int, int]:
        """Steps between two renewals of everything, and between two turns."""
        stride = self.period if self.corrected else 1
        return self.inverse_period or self.period, stride


class ScaleByFisherState(NamedTuple):
    """The information that a training run accumulates."""

    step: jax.Array
    """`()` int32, updates that were not skipped."""
    information: Any
    """A sum, or Optax's moving average; or a `SecondMoment`."""
    observations: jax.Array
    """`()`, the weights summed in it: their quotient is a mean."""
    num_batches: jax.Array
    """`()` int32, batches in it."""
    damping: jax.Array
    """`()`, what a wrapper may change."""
    memory: Any
    """The memory's storage."""
    factorisation: Any | None
    """None: made anew at each step; or the bases of corrected eigenvalues."""
    momentum: Any
    """State of the inner transformation."""
    num_skipped: jax.Array
    """`()` int32, updates refused for a non-finite value."""
    key: jax.Array | None
    """Key data; None if nothing is drawn from it."""


class SecondMoment(NamedTuple):
    """What is kept of squares that are no Fisher information."""

    squares: Any  # in an information's structure


class Given(NamedTuple):
    """What an update is given, beside the state."""

    updates: PyTree  # gradients; with holes, as wrappers of Optax make them
    params: PyTree | None
    model: PyTree | None  # the whole tree of parameters
    batch: Any  # None where no pass of a model is made
    key: jax.Array | None  # key data
    step: jax.Array


class Curvature(NamedTuple):
    """The part of a state that batches change."""

    information: Any  # a sum, or a moving average that starts at zero
    observations: jax.Array  # () summed weights in it
    num_batches: jax.Array  # () int32
    memory: Any  # the memory's storage
    bases: Any | None  # in which corrected eigenvalues are kept


def curvature_of(recipe: Recipe, state: ScaleByFisherState) -> Curvature:
    kept = state.information
    return Curvature(
        information=kept.squares if isinstance(kept, SecondMoment) else kept,
        observations=state.observations,
        num_batches=state.num_batches,
        memory=state.memory,
        bases=state.factorisation if recipe.corrected else None,
    )


def kept_information(recipe: Recipe, information: Any) -> Any:
    """An information, or what must not be taken for one."""
    if recipe.estimator.not_a_curvature:
        return SecondMoment(information)
    return information


def damping_at_present(recipe: Recipe, state: ScaleByFisherState) -> jax.Array:
    """A number is where the state started; schedules and arrays are asked again."""
    value: Any = state.damping
    if callable(recipe.damping):
        value = recipe.damping(state.step)
    elif not isinstance(recipe.damping, (int, float)):
        value = recipe.damping
    # a wrapper may have put a Python number into the state
    return jnp.asarray(value).astype(state.observations.dtype)


def settled(state: Any) -> Any:
    """Copies of the arrays, laid out as an update will return them.

    No two share a buffer, so that a state may be donated to a compiled update; and what
    was made outside of the mesh, as a key, compiles no second update.
    """
    state = jax.tree.map(jnp.copy, state)
    if not has_explicit_axes():
        return state
    return jax.tree.map(
        lambda x: jax.sharding.reshard(x, jax.typeof(x).sharding), state
    )


def fisher_state(opt_state: Any) -> ScaleByFisherState:
    """The one state of `ff.scale_by_fisher` in an optimiser's state."""
    paths = jax.tree_util.tree_leaves_with_path(opt_state, is_leaf=is_fisher_state)
    found = [(path, node) for path, node in paths if is_fisher_state(node)]
    if not found:
        raise ValueError(
            "there is no state of ff.scale_by_fisher in this optimiser's state, a "
            f"{type(opt_state).__name__}."
        )
    if len(found) > 1:
        names = [jax.tree_util.keystr(path) or "itself" for path, _ in found]
        raise ValueError(
            f"there are {len(found)} states of ff.scale_by_fisher in this optimiser's "
            f"state; pass the one that is meant: {', '.join(names)}."
        )
    state = found[0][1]
    if isinstance(state.information, SecondMoment):
        raise ValueError(
            "this optimiser keeps squares of mean gradients, which are no Fisher "
            "information; give ff.scale_by_fisher another estimator."
        )
    return state


def believed(state: ScaleByFisherState) -> Any:
    """What is remembered as an information with all operations."""
    corrected = getattr(state.factorisation, "corrected", lambda kept: kept)
    return corrected(state.information)


def is_fisher_state(node: Any) -> bool:
    return isinstance(node, ScaleByFisherState)
