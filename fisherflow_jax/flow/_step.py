"""The update of a flow: predict, fit, add the site, weigh, remember, settle."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from fisherflow_jax import information as ops
from fisherflow_jax._ground import batch as batches
from fisherflow_jax._ground import trees
from fisherflow_jax._ground.batch import Batch
from fisherflow_jax._ground.choices import compiled
from fisherflow_jax._ground.keys import typed_key
from fisherflow_jax.flow import _evidence as evidence
from fisherflow_jax.flow import _marginal as marginal
from fisherflow_jax.flow._checks import Sound, check_sound, parameters
from fisherflow_jax.flow._newton import Solution, damped_newton, single_step
from fisherflow_jax.flow._observed import Observed
from fisherflow_jax.flow._recipe import Recipe
from fisherflow_jax.flow._state import FlowInfo, FlowState, belief_of
from fisherflow_jax.memories import Belief, Shift, Sum

PyTree = Any


def update(
    recipe: Recipe, state: FlowState, batch: Any, *, num_steps: int | None = None
) -> tuple[FlowState, FlowInfo]:
    """A batch taken in: `(state, info)`."""
    batch = batches.as_batch(batch)
    if batch.targets is None:
        raise ValueError("a flow learns from targets; the batch's are None.")
    # compiled once a recipe and shape, so that a plain Python loop over a data loader
    # does not trace its searches anew at each batch
    run = compiled(recipe, advance, static_argnums=2)
    after, info, sound = run(state, batch, num_steps or recipe.num_steps)
    check_sound(sound, recipe.likelihood)
    return after, info


def advance(
    recipe: Recipe, state: FlowState, batch: Batch, num_steps: int
) -> tuple[FlowState, FlowInfo, Sound]:
    key = None
    if state.key is not None:
        key = jax.random.fold_in(typed_key(state.key), state.step)
    observed = Observed(recipe, batch, key)
    believed = belief_of(state)
    predicted = recipe.memory.predict(state.memory, believed, batch, believed.mean)
    start = optax.tree.where(state.step > 0, predicted.mean, state.mean)

    solution = fit(observed, predicted, start, num_steps)
    site, belief = absorb(observed, predicted, solution, state.count > 0)
    gain = log_evidence(observed, predicted, belief)
    storage, belief, report = recipe.memory.remember(state.memory, belief, site)

    sound = Sound(
        finite=batches.is_finite(batch),
        possible=jnp.all(
            recipe.likelihood.support(batch.targets).reshape(len(batch.weights), -1)
            | ~(batch.weights > 0)[:, None]
        ),
        taken_in=trees.all_finite((belief, gain)),
    )
    after = settle(state, belief, storage, gain, solution, sound)
    missing = ~jnp.any(batch.weights > 0)
    moved = after.num_skipped == state.num_skipped
    info = FlowInfo(
        log_likelihood=observed.log_likelihood(predicted.mean),
        log_evidence=jnp.where(moved, gain, jnp.zeros_like(gain)),
        step_size=solution.step_size,
        decrement=jnp.where(missing, 0, solution.decrement),
        skipped=~moved,
        missing=missing,
        memory=report,
    )
    return after, info, sound


def fit(
    observed: Observed, predicted: Belief, start: PyTree, num_steps: int
) -> Solution:
    """The least of the batch's loss and the distance to the belief before it."""
    before = ops.plain(predicted.sums.curvature)
    functions = observed.log_likelihood, observed.information
    if num_steps == 1:
        return single_step(*functions, predicted.mean, before, start)
    return damped_newton(*functions, predicted.mean, before, start, num_steps)


def absorb(
    observed: Observed, predicted: Belief, solution: Solution, started: jax.Array
) -> tuple[Sum, Belief]:
    """The batch's site, and the belief that includes it."""
    recipe, sums = observed.recipe, predicted.sums
    before = ops.plain(sums.curvature)
    information, mean = solution.information, solution.mean
    weight = observed.num_observations.astype(sums.weight.dtype)
    meat = None
    if recipe.robust:
        # the first batch's scores are taken at its solution: the start says nothing
        at = optax.tree.where(started, predicted.mean, mean)
        meat = observed.squared_scores(at)
    if recipe.marginal:
        score = jax.grad(observed.log_likelihood)(solution.at)
        information, own, meat = marginal.project(
            recipe.structure, information, score, solution.at, meat, weight
        )
        pull = ops.matvec(information, optax.tree.sub(own, predicted.mean))
        total = ops.add(information, before)
        mean = optax.tree.add(predicted.mean, ops.solve(total, pull))
    move = optax.tree.sub(mean, predicted.mean)
    moved = ops.matvec(before, move)
    offset = optax.tree.sub(mean, predicted.prior.origin)
    # by difference, so that I theta = I^- theta^- + shift holds for every structure
    # and any number of steps
    shift = optax.tree.add(ops.matvec(information, offset), moved)
    growth = at_origin = None
    if recipe.likelihood.pearson is not None:
        squares = observed.total(recipe.likelihood.pearson, mean)
        growth = squares + trees.dot(move, moved)
        at_origin = squares + 2 * trees.dot(offset, shift)
        at_origin = at_origin - ops.quadratic_form(information, offset)
    site = Sum(
        curvature=information,
        weight=weight,
        linear=Shift(shift, at_origin),
        quadratic=() if meat is None else (meat,),
    )
    sums = sums.plus(site._replace(linear=growth))
    return site, predicted._replace(mean=mean, sums=sums)


def log_evidence(observed: Observed, predicted: Belief, belief: Belief) -> jax.Array:
    """What the batch adds to the log-evidence, `()`."""
    mean, before, after = belief.mean, predicted.sums, belief.sums
    logdets = (
        ops.logdet(before.curvature, mean),
        ops.logdet(after.curvature, mean),
    )
    if observed.recipe.estimates_dispersion:
        of_targets = observed.recipe.likelihood.log_unit_variance
        assert of_targets is not None
        return evidence.unknown_dispersion(
            before.linear,
            after.linear,
            before.weight,
            after.weight,
            observed.total(lambda outputs, targets: of_targets(targets), mean),
            *logdets,
        )
    move = optax.tree.sub(mean, predicted.mean)
    distance = ops.quadratic_form(before.curvature, move)
    value = observed.log_likelihood(mean).astype(distance.dtype)
    return evidence.known_dispersion(value, distance, *logdets)


def settle(
    state: FlowState,
    belief: Belief,
    storage: Any,
    gain: jax.Array,
    solution: Solution,
    sound: Sound,
) -> FlowState:
    """The state after the batch, or before it and a batch skipped."""
    unfinished = state.events.searches_unfinished + solution.unfinished
    after = state._replace(
        mean=belief.mean,
        information=belief.sums.curvature,
        count=belief.sums.weight,
        log_evidence=state.log_evidence + gain,
        meat=belief.sums.quadratic[0] if belief.sums.quadratic else None,
        residual=belief.sums.linear,
        memory=storage,
        step=state.step + 1,
        events=state.events._replace(searches_unfinished=unfinished),
    )
    skipped = state._replace(num_skipped=state.num_skipped + 1)
    return optax.tree.where(sound.finite & sound.taken_in, after, skipped)


def evaluate(
    recipe: Recipe, params: PyTree, batch: Any, key: Any = None
) -> tuple[jax.Array, PyTree, Any]:
    """`(log-likelihood, score, information)` of a batch at `params`, sums."""
    batch, params = batches.as_batch(batch), parameters(params, "params")
    typed = None if key is None else typed_key(key)
    return compiled(recipe, measure)(params, batch, typed)


def measure(
    recipe: Recipe, params: PyTree, batch: Batch, key: jax.Array | None
) -> tuple[jax.Array, PyTree, Any]:
    observed = Observed(recipe, batch, key)
    value, score = jax.value_and_grad(observed.log_likelihood)(params)
    return value, score, observed.information(params)


def project(recipe: Recipe, information: Any) -> Any:
    """What a state keeps of a summed information."""
    from_full = recipe.structure.from_full
    if not recipe.marginal or from_full is None:
        return information
    return ops.inverse(from_full(ops.inverse(information)))
