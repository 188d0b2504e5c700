"""A preconditioner's state and its one step, as functions of the recipe."""

import inspect
from typing import Any

import jax
import jax.numpy as jnp
import optax

from fisherflow_jax import information as ops
from fisherflow_jax._ground import batch as batches
from fisherflow_jax._ground import choices, sharding, trees
from fisherflow_jax.memories import Sum
from fisherflow_jax.transforms.preconditioner import checks, measure, renew
from fisherflow_jax.transforms.preconditioner import state as states
from fisherflow_jax.transforms.preconditioner.factorise import apply
from fisherflow_jax.transforms.preconditioner.state import Given, Recipe

PyTree = Any
State = states.ScaleByFisherState


def init(recipe: Recipe, key: jax.Array | None, params: PyTree) -> State:
    """The state before the first batch; `params` may be shapes."""
    checks.check_real(params)
    return choices.run(recipe, _start, key, params)


def _start(recipe: Recipe, key: jax.Array | None, params: PyTree) -> State:
    nothing, bases = _nothing(recipe, params)
    checks.check_rank(recipe.estimator, nothing)
    zero = jnp.zeros((), trees.float_dtype(params))
    count = jnp.zeros((), jnp.int32)
    made = jax.eval_shape(lambda: _factorised(recipe, nothing, bases, zero, params))
    if recipe.staggered:
        ops.parts(made if bases is None else bases)
    start: Any = recipe.damping(count) if callable(recipe.damping) else recipe.damping
    kept: Any = bases
    if bases is None and _renewal_period(recipe, nothing) > 1:
        kept = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), made)
    state = State(
        step=count,
        information=states.kept_information(recipe, nothing),
        observations=zero,
        num_batches=count,
        damping=jnp.asarray(start).astype(zero.dtype),
        memory=recipe.memory.init(Sum(nothing, zero)),
        factorisation=kept,
        momentum=recipe.momentum.init(params),
        num_skipped=count,
        key=key,
    )
    return states.settled(state)


def _nothing(recipe: Recipe, like: PyTree) -> tuple[Any, Any]:
    """An information of zeros, and the bases in which eigenvalues are corrected."""
    structure = recipe.estimator.structure
    nothing = structure.isotropic(like, 0.0)
    ops.check_like(nothing, like)
    if not recipe.corrected:
        return nothing, None
    if structure.correction is None:
        raise ValueError(
            "eigenvalue_correction=True corrects the structure kronecker(layers); the "
            f"estimator's informations are of type {type(nothing).__name__}."
        )
    return structure.correction(nothing)


def _factorised(
    recipe: Recipe, mean: Any, bases: Any, damping: jax.Array, like: PyTree
) -> Any:
    if bases is not None:
        mean = bases.corrected(mean)
    known = {}
    if "like" in inspect.signature(recipe.factorise).parameters:
        known["like"] = like
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
    **extra: Any,
) -> tuple[PyTree, State]:
    """What is given is checked, and the step made."""
    estimator, model = recipe.estimator, None
    if params is not None:
        checks.check_same(updates, params, "updates and params must be one tree")
    expected = jax.eval_shape(lambda: _nothing(recipe, updates)[0])
    kept = states.curvature_of(recipe, state).information
    checks.check_same(
        expected, kept, "the state was initialised with another tree than params"
    )
    if estimator.from_gradient is None:
        model = params if model_params is None else model_params
        model, key = checks.needs_of_model(estimator, model, batch, key, state.key)
    else:
        batch = key = None
    given = Given(
        updates=updates,
        params=params,
        model=model,
        batch=batch,
        key=key,
        step=state.step,
    )

    def run(state: State, given: Given) -> Any:
        if given.batch is None:  # compiled, Adam's last bits would not be Optax's
            return _advance(recipe, state, given, extra)
        given = given._replace(batch=batches.as_batch(given.batch))
        return choices.run(recipe, _advance, state, given, extra)

    return sharding.in_auto_mode(run, (updates, state), state, given)


def _advance(
    recipe: Recipe, state: State, given: Given, extra: dict[str, Any]
) -> tuple[PyTree, State]:
    updates, damping = given.updates, states.damping_at_present(recipe, state)
    sound = trees.all_finite(updates) & (damping >= 0)
    before = states.curvature_of(recipe, state)
    curvature, sound = measure.refreshed(recipe, before, given, sound)

    def make() -> Any:
        # of each step without a factorisation the mean would be a waste
        mean = measure.mean_information(recipe, curvature)
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
    scaled = apply(factorisation, moved)
    sound = sound & trees.all_finite(scaled)
    result = jax.tree.map(
        lambda x, g: jnp.where(sound, x.astype(g.dtype), jnp.zeros_like(g)),
        scaled,
        updates,
    )
    after = State(
        step=state.step + sound.astype(jnp.int32),
        information=states.kept_information(recipe, curvature.information),
        observations=curvature.observations,
        num_batches=curvature.num_batches,
        damping=jnp.where(damping >= 0, damping, state.damping),
        memory=curvature.memory,
        factorisation=kept,
        momentum=optax.tree.where(sound, moments, state.momentum),
        num_skipped=state.num_skipped + (~sound).astype(jnp.int32),
        key=state.key,
    )
    return result, after
