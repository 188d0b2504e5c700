"""The information of a batch, what is remembered of it, and the mean of that."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from fisherflow_jax import estimators, memories, model
from fisherflow_jax import information as ops
from fisherflow_jax._ground import batch as batches
from fisherflow_jax._ground import holes, keys, trees
from fisherflow_jax.transforms.preconditioner import renew
from fisherflow_jax.transforms.preconditioner.state import Curvature, Given, Recipe

PyTree = Any


def refreshed(
    recipe: Recipe, before: Curvature, given: Given, sound: jax.Array
) -> tuple[Curvature, jax.Array]:
    """The curvature after a step, and whether all was finite: then it changes."""

    def take() -> tuple[Curvature, jax.Array]:
        after = _take_batch(recipe, before, given)
        finite = sound & trees.all_finite((after.information, after.bases))
        return optax.tree.where(finite, after, before), finite

    if recipe.period == 1:
        return take()
    due = sound & (given.step % recipe.period == 0)
    return jax.lax.cond(due, take, lambda: (before, sound))


def _take_batch(recipe: Recipe, before: Curvature, given: Given) -> Curvature:
    estimator = _traced_once(recipe.estimator)
    information = measure(estimator, given)
    bases = before.bases
    if bases is None:
        return take_in(recipe.memory, before, information, given)
    # The squares need the basis, and the basis the factors: a batch is measured twice.
    ahead = take_in(recipe.memory, before, bases.site(information), given).information
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
    moments = bases.site(information, measure(in_bases, given))
    return take_in(recipe.memory, before, moments, given)


def _traced_once(estimator: estimators.Estimator) -> estimators.Estimator:
    """The estimator of a model that is traced once a shape, however often it is run."""
    if estimator.bound is None:  # built by hand
        return estimator
    choice, apply_fn, likelihood, structure = estimator.bound
    return choice.bind(apply_fn and model.once(apply_fn), likelihood, structure)


def measure(estimator: estimators.Estimator, given: Given) -> Any:
    """A sum over the batch, about the parameters that the updates show."""
    if estimator.from_gradient is not None:
        return estimator.from_gradient(given.updates)
    key = None
    if given.key is not None:
        # folded, so that one key may be given to all updates
        key = jax.random.fold_in(keys.typed_key(given.key), given.step)
    information = estimator.compute(given.model, given.batch, key)
    if holes.has_holes(given.updates):
        shown, whole = given.updates, given.model
        return estimator.structure.restrict(information, shown, whole)
    return information


def take_in(
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
    return optax.tree.where(weight > 0, after, before)


def mean_information(recipe: Recipe, curvature: Curvature) -> Any:
    """The mean information of an observation; not finite before the first."""
    information, average = curvature.information, recipe.memory.average
    if average is not None and ops.facts(information).elementwise:
        return average.debias(information, curvature.num_batches)
    return ops.scale(information, 1 / curvature.observations)
