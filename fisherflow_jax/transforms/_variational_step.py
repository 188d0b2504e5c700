"""A step of variational training, given the gradients at the draws."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fisherflow_jax import information as ops
from fisherflow_jax import structures
from fisherflow_jax._ground import batch as batches
from fisherflow_jax._ground import checks, choices, keys, sharding, trees
from fisherflow_jax.transforms._variational_state import (
    Recipe,
    VariationalState,
    shown,
)
from fisherflow_jax.transforms.preconditioner import checks as rules

PyTree = Any


class _Given(NamedTuple):
    """What an update is given, beside the state."""

    gradients: PyTree  # at the draws
    params: PyTree
    drawn: PyTree  # as the gradients are
    model: PyTree | None  # the whole trees drawn
    batch: Any
    key: jax.Array | None


def update(
    recipe: Recipe,
    updates: PyTree,
    state: VariationalState,
    params: PyTree | None = None,
    *,
    drawn: PyTree | None = None,
    batch: Any = None,
    key: Any = None,
    **extra: Any,
) -> tuple[PyTree, VariationalState]:
    del extra
    if params is None or drawn is None:
        raise ValueError(
            "ff.transforms.variational needs the parameters and where the gradients "
            "were taken: drawn = ff.sample(ff.transforms.get_posterior(state, params), "
            "key), and update(gradients, state, params, drawn=drawn)."
        )
    rules.check_same(
        params,
        state.momentum,
        "the state was initialised with another tree than params",
    )
    seen = shown(drawn, params)
    many = () if recipe.num_samples == 1 else (recipe.num_samples,)
    expected = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((*many, *x.shape), x.dtype), params
    )
    axis = f", with a leading axis of num_samples={many[0]}" if many else ""
    rules.check_same(seen, expected, f"drawn must be like params{axis}")
    rules.check_same(updates, seen, "gradients are taken at the draws, one tree")
    model, rows = None, None
    if recipe.estimator is not None:
        model, key = rules.needs_of_model(
            recipe.estimator, drawn, batch, key, state.key
        )
        rows = batches.as_batch(batch, values=False)
    given = _Given(updates, params, seen, model, rows, key)

    def run(state: VariationalState, given: _Given) -> Any:
        if given.batch is None:
            return choices.run(recipe, _advance, state, given)
        assert recipe.estimator is not None
        return recipe.estimator.deciding(
            lambda: choices.run(recipe, _advance, state, given),
            lambda: (_first(recipe, given.model), given.batch.inputs),
        )

    result, after = sharding.in_auto_mode(run, (params, state), state, given)
    counts = after.rows_skipped, state.rows_skipped
    if recipe.bad_rows == "raise" and recipe.estimator is not None and rows is not None:
        refused = after.num_skipped != state.num_skipped
        if not checks.is_traced((counts, rows)) and (counts[0] != counts[1] or refused):
            model = _first(recipe, model)
            recipe.estimator.screen(model, rows).refuse(batch)
    return result, after


def _first(recipe: Recipe, drawn: PyTree) -> PyTree:
    if recipe.num_samples == 1:
        return drawn
    return jax.tree.map(lambda x: x[0], drawn)


def _advance(
    recipe: Recipe, state: VariationalState, given: _Given
) -> tuple[PyTree, VariationalState]:
    dtype = trees.float_dtype(state.momentum)
    count = jnp.asarray(recipe.num_observations, dtype)
    b1, b2 = jnp.asarray(recipe.b1, dtype), jnp.asarray(recipe.b2, dtype)
    skipped, seen = state.rows_skipped, jnp.array(True)
    if recipe.estimator is None:
        measured = _stein(recipe, state, given, count)
    else:
        screen = recipe.estimator.screen(_first(recipe, given.model), given.batch)
        batch, bad = screen(given.batch)
        skipped = skipped + bad
        weight = batches.num_observations(batch, each_target=False).astype(dtype)
        seen = weight > 0  # a batch without an observation says nothing
        factor = count / jnp.where(seen, weight, 1)
        measured = _measured(recipe, given._replace(batch=batch), state.step, factor)
    information = _moved(recipe, state, measured, 1 - b2)
    information = trees.where(seen, information, state.information)
    gradient = trees.widen(given.gradients)
    if recipe.num_samples > 1:
        gradient = jax.tree.map(lambda x: jnp.mean(x, 0), gradient)
    momentum = jax.tree.map(
        lambda old, new: b1 * old + (1 - b1) * new.astype(dtype),
        state.momentum,
        gradient,
    )
    debiased = count / (1 - b1 ** (state.step + 1).astype(dtype))
    away = trees.widen(given.params)
    if state.prior_mean is not None:
        away = jax.tree.map(jnp.subtract, away, state.prior_mean)
    pull = jax.tree.map(
        lambda g, p: debiased * g + p,
        momentum,
        ops.matvec(state.prior_precision, away),
    )
    step = optax.tree.cast_like(ops.solve(information, pull), given.params)
    sound = trees.all_finite((given.gradients, given.drawn, step, information))
    after = state._replace(information=information, momentum=momentum)
    after = trees.where(sound, after, state)._replace(
        step=state.step + sound.astype(jnp.int32),
        num_skipped=state.num_skipped + (~sound).astype(jnp.int32),
        rows_skipped=skipped,
    )
    return trees.zero_unless(sound, step), after


def _stein(
    recipe: Recipe, state: VariationalState, given: _Given, count: jax.Array
) -> structures.Diagonal:
    """The Hessian's diagonal by parts: the draws' offsets times their gradients."""
    precision = ops.diagonal(state.information, given.params)

    def leaf(entry: jax.Array, g: jax.Array, x: jax.Array, m: jax.Array) -> jax.Array:
        product = g.astype(entry.dtype) * (
            x.astype(entry.dtype) - m.astype(entry.dtype)
        )
        if recipe.num_samples > 1:
            product = jnp.mean(product, 0)
        return count * entry * product

    entries = jax.tree.map(leaf, precision, given.gradients, given.drawn, given.params)
    return structures.Diagonal(entries)


def _measured(recipe: Recipe, given: _Given, step: jax.Array, factor: jax.Array) -> Any:
    """A factor times the estimator's information of the batch, averaged over draws."""
    estimator = recipe.estimator
    assert estimator is not None
    key = given.key
    if key is not None:
        key = jax.random.fold_in(keys.typed_key(key), step)

    def at(model: PyTree, key: jax.Array | None) -> Any:
        found = estimator.compute(model, given.batch, key)
        if not trees.has_holes(given.params):
            return found
        return estimator.structure.restrict(found, given.params, model)

    if recipe.num_samples == 1:
        return ops.scale(at(given.model, key), factor)
    many = None if key is None else jax.random.split(key, recipe.num_samples)
    each = jax.lax.map(lambda drawn: at(*drawn), (given.model, many))
    weights = jnp.full((recipe.num_samples,), factor / recipe.num_samples)
    return ops.total(each, weights)


def _moved(
    recipe: Recipe, state: VariationalState, measured: Any, rate: jax.Array
) -> Any:
    """The precision after a step of a rate towards what was measured, and the prior."""
    old = state.information
    target = ops.add(measured, state.prior_precision)
    moved = ops.add(ops.scale(target, rate), ops.scale(old, 1 - rate))
    if not recipe.indefinite:
        return ops.conform(old, moved)
    if ops.facts(old).elementwise:
        return jax.tree.map(lambda i, m: 0.5 * (i + m * (m / i)), old, moved)
    # of full and block: the columns of a root of I^-1, times I + rate D, and squared
    white, like = ops.whitener(old), jax.eval_shape(ops.diagonal, old)
    units = trees.unravel(jnp.eye(trees.size(like), dtype=rate.dtype), like)
    units = jax.vmap(white.laid_out)(units)
    columns = jax.vmap(lambda unit: ops.matvec(moved, white.color(unit)))(units)
    return ops.scale(ops.add(old, recipe.structure.reduce(columns)), 0.5)
