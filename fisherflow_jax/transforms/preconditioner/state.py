"""What is chosen of a preconditioner, and what it keeps from step to step."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fisherflow_jax import estimators, memories
from fisherflow_jax import information as ops
from fisherflow_jax._ground import checks, placement, sharding

PyTree = Any
Damping = jax.typing.ArrayLike | Callable[[jax.Array], jax.typing.ArrayLike]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The choices of `ff.scale_by_fisher`; recipes of equal choices are equal.

    Attributes:
      staggered: whether parts of a factorisation are renewed by turns.
      corrected: whether eigenvalues are corrected.
      packed: whether symmetric factors are kept as triangles.
      factor_sharding: as users give it; afterwards a rule of `_ground.placement`.
    """

    estimator: estimators.Estimator
    memory: memories.Memory
    damping: Damping
    period: int
    inverse_period: int | None
    staggered: bool
    corrected: bool
    packed: bool
    momentum: optax.GradientTransformation
    power: float
    root_damping: jax.typing.ArrayLike
    factorise: Callable[..., Any]
    bad_rows: str
    factor_sharding: Any

    def __post_init__(self) -> None:
        rule = placement.rule_of(self.factor_sharding)
        object.__setattr__(self, "factor_sharding", rule)
        # what takes turns is not stacked; other estimators are refused by their checks
        own: Any = self.estimator
        apart = getattr(getattr(own, "structure", None), "apart", None)
        if self.staggered is True and apart is not None and own.rebuild is not None:
            object.__setattr__(self, "estimator", own.with_structure(apart()))

    @property
    def renewals(self) -> tuple[int, int]:
        """Steps between two renewals of everything, and between two turns."""
        stride = self.period if self.corrected else 1
        return self.inverse_period or self.period, stride


class ScaleByFisherState(NamedTuple):
    """The information that a training run accumulates. Made by `ff.scale_by_fisher`.

    Attributes:
      step: `()` int32, updates that were not skipped.
      information: a sum, or Optax's moving average; or a `SecondMoment`.
      observations: `()`, the weights summed in it: their quotient is a mean.
      num_batches: `()` int32, batches in it.
      damping: `()`, what a wrapper may change.
      memory: the memory's storage.
      factorisation: None: made anew at each step; or the bases of corrected
        eigenvalues.
      momentum: state of the inner transformation.
      num_skipped: `()` int32, updates refused for a non-finite value.
      rows_skipped: `()` int32, bad rows of batches, left out.
      num_floored: `()` int32, updates that were not skipped whose damping was less than
        what rounding knows of a layer's eigenvalues, which was taken in its place.
      key: key data; None if nothing is drawn from it.
    """

    step: jax.Array
    information: Any
    observations: jax.Array
    num_batches: jax.Array
    damping: jax.Array
    memory: Any
    factorisation: Any | None
    momentum: Any
    num_skipped: jax.Array
    rows_skipped: jax.Array
    num_floored: jax.Array
    key: jax.Array | None


class SecondMoment(NamedTuple):
    """What is kept of squares that are no Fisher information.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> kept = ff.transforms.SecondMoment(ff.structures.Diagonal(jnp.array([4.0])))
      >>> kept.squares.entries
      Array([4.], dtype=float32)
    """

    squares: Any  # in an information's structure


class Given(NamedTuple):
    """What an update is given, beside the state."""

    updates: PyTree  # gradients; with holes, as wrappers of Optax make them
    params: PyTree | None
    model: PyTree | None  # the whole tree of parameters
    batch: Any  # None where no pass of a model is made
    key: jax.Array | None  # key data
    step: jax.Array
    screened: jax.Array | None  # bad rows that the batch had, where they are left out
    curvature: Any | None = None  # of what the loss is beside the batch's mean, added


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
    if not sharding.has_explicit_axes():
        return state
    return jax.tree.map(lambda x: jax.sharding.reshard(x, sharding.own(x)), state)


def fisher_state(opt_state: Any) -> ScaleByFisherState:
    """The one state of `ff.scale_by_fisher` in an optimiser's state."""
    nodes = jax.tree.leaves(opt_state, is_leaf=_is_second_moment)
    if any(map(_is_second_moment, nodes)) and not any(
        map(is_fisher_state, jax.tree.leaves(opt_state, is_leaf=is_fisher_state))
    ):
        raise _no_fisher()
    state = only_state(opt_state, ScaleByFisherState, "ff.scale_by_fisher")
    if _is_second_moment(state.information):
        raise _no_fisher()
    return state


def only_state(opt_state: Any, kind: type, of: str) -> Any:
    """The one state of a kind in an optimiser's state."""
    paths = jax.tree_util.tree_leaves_with_path(
        opt_state, is_leaf=lambda node: isinstance(node, kind)
    )
    found = [(path, node) for path, node in paths if isinstance(node, kind)]
    if not found:
        raise ValueError(
            f"there is no state of {of} in this optimiser's state, a "
            f"{type(opt_state).__name__}."
        )
    if len(found) > 1:
        names = [jax.tree_util.keystr(path) or "itself" for path, _ in found]
        raise ValueError(
            f"there are {len(found)} states of {of} in this optimiser's state; pass "
            f"the one that is meant: {', '.join(names)}."
        )
    return found[0][1]


def _is_second_moment(node: Any) -> bool:
    return isinstance(node, SecondMoment)


def _no_fisher() -> ValueError:
    return ValueError(
        "this optimiser keeps squares of mean gradients, which are no Fisher "
        "information; give ff.scale_by_fisher another estimator."
    )


def believed(state: ScaleByFisherState) -> Any:
    """What is remembered as an information with all operations."""
    corrected = getattr(state.factorisation, "corrected", lambda kept: kept)
    return corrected(unpacked(state.information))


def unpacked(information: Any) -> Any:
    """An information with whole matrices."""
    whole = getattr(information, "unpacked", None)
    return information if whole is None else whole()


def is_fisher_state(node: Any) -> bool:
    return isinstance(node, ScaleByFisherState)


def get_information(opt_state: Any, num_observations: float | jax.Array) -> Any:
    r"""The information of `num_observations`, out of an optimiser's state.

    .. math:: I = N \bar F = N \frac{\sum_t c_t F_t}{\sum_t c_t n_t}

    A moving average holds about `1 / (1 - decay)` batches and a stationary memory every
    row once an epoch, taken at the parameters of their time: what they say is the mean
    of an observation, and how many there are is for the caller to say. No prior is
    included.

    Args:
      opt_state: the state of any chain, `masked`, `partition`, `inject_hyperparams`,
        `MultiSteps` or `apply_if_finite` that holds one `ff.scale_by_fisher`; or a part
        of it, where there are two.
      num_observations: N, the number of distinct examples trained on; positive.

    Returns:
      An information in the estimator's structure; an `EigenKronecker` where eigenvalues
      are corrected. Within `masked` or `partition`, it is
      about the parameters that were shown, the others being held.

    Raises:
      ValueError: where there is no `ff.scale_by_fisher`, or more than one (their paths
        are listed); where it keeps squares of mean gradients, as `ff.adam` does; before
        the first batch; for a number that is not positive.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> estimator = ff.estimators.exact(
      ...     lambda params, x: x @ params,
      ...     ff.likelihoods.gaussian(),
      ...     ff.structures.diagonal(),
      ... )
      >>> optimizer = ff.natural_gradient(0.1, estimator)
      >>> params, batch = jnp.zeros(2), (jnp.array([[1.0, 2.0]]), None)
      >>> state = optimizer.init(params)
      >>> _, state = optimizer.update(jnp.ones(2), state, params, batch=batch)
      >>> print(ff.get_information(state, 100).entries.round(1))
      [100. 400.]
    """
    if checks.is_concrete(num_observations) and not float(num_observations) > 0:
        raise ValueError(f"num_observations must be positive; got {num_observations}.")
    state = fisher_state(opt_state)
    weight = state.observations
    if not isinstance(weight, (jax.Array, np.ndarray)):
        raise ValueError(
            f"the state's arrays are wrapped in {type(weight).__name__}; of flax's "
            "nnx.Optimizer, give nnx.as_pure(optimizer.opt_state)."
        )
    if checks.is_concrete(weight) and not weight > 0:
        raise ValueError("no batch has been taken in yet, so there is no information.")
    factor = jnp.asarray(num_observations).astype(weight.dtype) / weight
    return ops.scale(believed(state), factor)
