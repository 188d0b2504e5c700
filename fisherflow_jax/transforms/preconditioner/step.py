"""A preconditioner's state and its one step, as functions of the recipe.

A step measures the information of a batch, remembers it and takes the mean of that.
"""

import dataclasses
import functools
import inspect
from typing import Any

import jax
import jax.numpy as jnp
import optax

from fisherflow_jax import estimators, memories
from fisherflow_jax import information as ops
from fisherflow_jax._ground import batch as batches
from fisherflow_jax._ground import choices, keys, placement, sharding, trees
from fisherflow_jax._ground.checks import is_traced
from fisherflow_jax.model import once
from fisherflow_jax.transforms.preconditioner import checks, factorise, renew
from fisherflow_jax.transforms.preconditioner import state as states
from fisherflow_jax.transforms.preconditioner.state import Curvature, Given, Recipe

PyTree = Any
State = states.ScaleByFisherState
_PLACED = "information", "memory", "factorisation"


def init(recipe: Recipe, key: jax.Array | None, params: PyTree) -> State:
    """The state before the first batch; `params` may be shapes."""
    estimator = recipe.estimator
    checks.check_key(f"estimators.{estimator.name}", estimator.random, key)
    checks.check_real(params)
    return choices.run(recipe, _start, key, params)


def _start(recipe: Recipe, key: jax.Array | None, params: PyTree) -> State:
    with placement.holding(recipe.factor_sharding, params):
        kept = placement.made(functools.partial(_kept_at_start, recipe), params)
    count, zero = jnp.zeros((), jnp.int32), jnp.zeros((), trees.float_dtype(params))
    start: Any = recipe.damping(count) if callable(recipe.damping) else recipe.damping
    state = State(
        step=count,
        observations=zero,
        num_batches=count,
        damping=jnp.asarray(start).astype(zero.dtype),
        momentum=recipe.momentum.init(params),
        num_skipped=count,
        rows_skipped=count,
        num_floored=count,
        key=key,
        **kept,
    )
    return states.settled(state)


def _kept_at_start(recipe: Recipe, params: PyTree) -> dict[str, Any]:
    """The parts of a state that have shapes of their own, before the first batch."""
    nothing, bases = _nothing(recipe, params)
    checks.check_rank(recipe.estimator, nothing)
    zero = jnp.zeros((), trees.float_dtype(params))
    mean = states.unpacked(nothing)
    made = jax.eval_shape(lambda: _factorised(recipe, mean, bases, zero, params))
    if recipe.staggered:
        ops.parts(made if bases is None else bases)
    kept: Any = bases
    if bases is None and _renewal_period(recipe, nothing) > 1:
        kept = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), made)
    return {
        "information": states.kept_information(recipe, nothing),
        "memory": recipe.memory.init(memories.Sum(nothing, zero)),
        "factorisation": kept,
    }


def _nothing(recipe: Recipe, like: PyTree) -> tuple[Any, Any]:
    """An information of zeros, and the bases in which eigenvalues are corrected."""
    structure = recipe.estimator.structure
    nothing = structure.empty(like)
    ops.check_like(nothing, like)
    if not recipe.corrected:
        return _packed(recipe, nothing), None
    if structure.correction is None:
        raise ValueError(
            "eigenvalue_correction=True corrects the structure kronecker(layers); the "
            f"estimator's informations are of type {type(nothing).__name__}."
        )
    return structure.correction(nothing)


def _packed(recipe: Recipe, information: Any) -> Any:
    """As it is kept and added to."""
    packing = recipe.estimator.structure.packing if recipe.packed else None
    return information if packing is None else packing(information)


def _factorised(
    recipe: Recipe, mean: Any, bases: Any, damping: jax.Array, like: PyTree
) -> Any:
    if bases is not None:
        mean = bases.corrected(mean)
    wanted = inspect.signature(recipe.factorise).parameters
    known = {"like": like} if "like" in wanted else {}
    return recipe.factorise(mean, damping, recipe.power, recipe.root_damping, **known)


def _renewal_period(recipe: Recipe, information: Any) -> int:
    if recipe.inverse_period is not None:
        return recipe.inverse_period
    return 1 if ops.facts(information).elementwise else recipe.period


def update(
    recipe: Recipe,
    updates: PyTree,
    state: State,
    params: PyTree | None = None,
    *,
    batch: Any = None,
    key: Any = None,
    model_params: PyTree | None = None,
    screened: jax.Array | None = None,
    curvature: Any = None,
    adapts_damping: Any = None,
    **extra: Any,
) -> tuple[PyTree, State]:
    """What is given is checked, and the step made.

    `screened`: of a batch without its bad rows, how many there were; then the trees
    have been checked, too. `curvature`: an information, of a penalty that the loss has
    beside its mean. `adapts_damping`: given by `adapt_damping`.
    """
    estimator, model = recipe.estimator, None
    if adapts_damping is not None:
        checks.check_adapted(recipe, curvature)
    if screened is None:
        check_trees(recipe, updates, state, params)
    if estimator.from_gradient is None:
        model = params if model_params is None else model_params
        model, key = checks.needs_of_model(estimator, model, batch, key, state.key)
    else:
        batch = key = curvature = None  # squares of gradients see no penalty
    given = Given(
        updates=updates,
        params=params,
        model=model,
        batch=batch,
        key=key,
        step=state.step,
        screened=screened,
        curvature=curvature,
    )

    def run(state: State, given: Given) -> Any:
        if given.batch is None:  # compiled, Adam's last bits would not be Optax's
            return _advance(recipe, state, given, extra)
        if given.screened is None:
            rows = batches.as_batch(given.batch, values=False)
            given = given._replace(batch=rows)
        return recipe.estimator.deciding(
            lambda: choices.run(recipe, _advance, state, given, extra),
            lambda: (given.model, given.batch.inputs),
        )

    result, after = sharding.in_auto_mode(run, (updates, state), state, given)
    refuse_bad_rows(recipe, (state, after), given.model, given.batch)
    return result, after


def check_trees(
    recipe: Recipe, updates: PyTree, state: State, params: PyTree | None
) -> None:
    """Raises for updates, parameters and a state that are not of one tree."""
    if params is not None:
        checks.check_same(updates, params, "updates and params must be one tree")
    expected = jax.eval_shape(lambda: _nothing(recipe, updates)[0])
    kept = states.curvature_of(recipe, state).information
    checks.check_same(
        expected, kept, "the state was initialised with another tree than params"
    )


def refuse_bad_rows(
    recipe: Recipe, states: tuple[State, State], model: PyTree, given: Any
) -> None:
    """Raises for what an update left out, or was refused for, if it is at hand."""
    if recipe.bad_rows != "raise" or given is None:
        return
    counts = [(state.rows_skipped, state.num_skipped) for state in states]
    if not is_traced((counts, given)) and counts[0] != counts[1]:
        batch = batches.as_batch(given, values=False)
        recipe.estimator.screen(model, batch).refuse(given)


def _advance(
    recipe: Recipe, state: State, given: Given, extra: dict[str, Any]
) -> tuple[PyTree, State]:
    with placement.holding(recipe.factor_sharding, (state, given)):
        result, after = _advanced(recipe, state, given, extra)
        kept = {name: placement.placed(getattr(after, name)) for name in _PLACED}
    return result, after._replace(**kept)


def _advanced(
    recipe: Recipe, state: State, given: Given, extra: dict[str, Any]
) -> tuple[PyTree, State]:
    rows_skipped = state.rows_skipped
    if given.batch is not None:
        recipe = traced_once(recipe)
        count = given.screened
        if count is None:
            screen = recipe.estimator.screen(given.model, given.batch)
            batch, count = screen(given.batch)
            given = given._replace(batch=batch)
        rows_skipped = rows_skipped + count
    updates, damping = given.updates, states.damping_at_present(recipe, state)
    # stacks, as the result is checked in: one kernel for both
    stacks = getattr(state.factorisation, "stacks", lambda updates: updates)
    sound = trees.all_finite(stacks(updates)) & (damping >= 0)
    before = states.curvature_of(recipe, state)
    curvature, sound = _refreshed(recipe, before, given, sound)

    def make() -> Any:
        # of each step without a factorisation the mean would be a waste
        mean = _mean_information(recipe, curvature)
        if given.curvature is not None:
            mean = _with_curvature(recipe, mean, given)
        return _factorised(recipe, mean, curvature.bases, damping, updates)

    kept = state.factorisation
    if kept is None or curvature.bases is not None:
        factorisation, kept = make(), curvature.bases
    else:
        period, turns = _renewal_period(recipe, curvature.information), recipe.staggered
        kept, finite = renew.renew(kept, make, sound, given.step, period, turns)
        factorisation, sound = kept, sound & finite
    momentum = optax.with_extra_args_support(recipe.momentum)
    moved, moments = momentum.update(updates, state.momentum, given.params, **extra)
    scaled, sound = factorise.applied(factorisation, moved, sound)
    result = optax.tree.cast_like(scaled, updates)
    after = state._replace(
        step=state.step + sound.astype(jnp.int32),
        information=states.kept_information(recipe, curvature.information),
        observations=curvature.observations,
        num_batches=curvature.num_batches,
        damping=jnp.where(damping >= 0, damping, state.damping),
        memory=curvature.memory,
        factorisation=kept,
        momentum=optax.tree.where(sound, moments, state.momentum),
        num_skipped=state.num_skipped + (~sound).astype(jnp.int32),
        rows_skipped=rows_skipped,
    )
    floored = factorise.was_floored(factorisation)
    if floored is not None:
        count = state.num_floored + (floored & sound).astype(jnp.int32)
        after = after._replace(num_floored=count)
    return result, after


def _refreshed(
    recipe: Recipe, before: Curvature, given: Given, sound: jax.Array
) -> tuple[Curvature, jax.Array]:
    """The curvature after a step, and whether all was finite: then it changes."""

    def take() -> tuple[Curvature, jax.Array]:
        after = _take_batch(recipe, before, given)
        finite = sound & ops.is_finite(after.information)
        if after.bases is not None:
            finite = finite & trees.all_finite(after.bases)
        return trees.where(finite, after, before), finite

    if recipe.period == 1:
        return take()
    due = sound & (given.step % recipe.period == 0)
    return jax.lax.cond(due, take, lambda: (before, sound))


def _take_batch(recipe: Recipe, before: Curvature, given: Given) -> Curvature:
    estimator = recipe.estimator
    information = _packed(recipe, _measure(estimator, given))
    bases = before.bases
    if bases is None:
        return _take_in(recipe.memory, before, information, given)
    # The squares need the basis, and the basis the factors: a batch is measured twice.
    ahead = _take_in(recipe.memory, before, bases.site(information), given).information
    groups = renew.turns(
        ops.parts(bases), given.step, *recipe.renewals, recipe.staggered
    )
    # without an observation nothing is decomposed, and all stays to the last bit
    seen = batches.num_observations(given.batch, each_target=False) > 0
    groups = [(due & seen, names) for due, names in groups]
    kept = before.information, before.memory
    (past, storage), bases = bases.moved(kept, ahead, groups)
    before = before._replace(information=past, memory=storage, bases=bases)
    in_bases = estimator.with_structure(bases.structure(information))
    moments = bases.site(information, _measure(in_bases, given))
    return _take_in(recipe.memory, before, moments, given)


def traced_once(recipe: Recipe, apply_fn: Any = None) -> Recipe:
    """The recipe of a model that is traced once a shape, however often it is run.

    `apply_fn` is that of the model where it is `once(...)` already, and shared.
    """
    bound = recipe.estimator.bound
    if bound is None:  # built by hand
        return recipe
    choice, own, likelihood, structure = bound
    own = apply_fn or (own and once(own))
    estimator = choice.bind(own, likelihood, structure)
    return dataclasses.replace(recipe, estimator=estimator)


def _measure(estimator: estimators.Estimator, given: Given) -> Any:
    """A sum over the batch, about the parameters that the updates show."""
    if estimator.from_gradient is not None:
        return estimator.from_gradient(given.updates)
    key = None
    if given.key is not None:
        # folded, so that one key may be given to all updates
        key = jax.random.fold_in(keys.typed_key(given.key), given.step)
    return _shown(estimator, estimator.compute(given.model, given.batch, key), given)


def _shown(estimator: estimators.Estimator, information: Any, given: Given) -> Any:
    """About the parameters that the updates show."""
    if not trees.has_holes(given.updates):
        return information
    return estimator.structure.restrict(information, given.updates, given.model)


def _take_in(
    memory: memories.Memory, before: Curvature, information: Any, given: Given
) -> Curvature:
    """What is remembered after a batch's information.

    Without a batch it is of one observation, known to be there.
    """
    one, average, weight = jnp.ones_like(before.observations), memory.average, None
    if given.batch is not None:
        weight = batches.num_observations(given.batch, each_target=False)
        weight = weight.astype(one.dtype)
    believed = memories.Sum(before.information, before.observations)
    believed = memory.predict(before.memory, believed, given.batch, given.updates)
    if average is None:
        site_weight = one if weight is None else weight
    else:
        site_weight = one * average.gain
        share: Any = average.gain
        if weight is not None:
            share = share / jnp.where(weight > 0, weight, one)
        information = ops.scale(information, share)
    site = memories.Sum(information, site_weight)
    storage, believed, _ = memory.remember(before.memory, believed.plus(site), site)
    after = before._replace(
        information=believed.curvature,
        observations=believed.weight,
        num_batches=before.num_batches + 1,
        memory=storage,
    )
    if average is None or weight is None:
        return after
    # a mean stays what it is when a batch has no observation
    return trees.where(weight > 0, after, before)


def _with_curvature(recipe: Recipe, mean: Any, given: Given) -> Any:
    """A penalty's curvature beside the mean information, in its structure."""
    more = _shown(recipe.estimator, given.curvature, given)
    try:
        total = ops.add(mean, more)
        if type(total) is type(mean):
            return total
        error = None
    except (TypeError, ValueError) as wrong:
        error = wrong
    raise ValueError(
        f"the penalty's curvature is a {type(more).__name__}, which cannot be added to "
        f"the {type(mean).__name__} by which gradients are divided: keep the anchor in "
        "the optimiser's structure, of the same layers (without spread_inverses and "
        "eigenvalue_correction), or chain the penalty before it."
    ) from error


def _mean_information(recipe: Recipe, curvature: Curvature) -> Any:
    """The mean information of an observation; not finite before the first."""
    information, average = curvature.information, recipe.memory.average
    if average is not None and ops.facts(information).elementwise:
        return average.debias(information, curvature.num_batches)
    return ops.scale(states.unpacked(information), 1 / curvature.observations)
