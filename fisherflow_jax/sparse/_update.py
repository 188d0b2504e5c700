"""A batch taken in: what its rows add to the two sums."""

from typing import Any

import jax
import jax.numpy as jnp

from fisherflow_jax._ground import batch as batches
from fisherflow_jax._ground import checks, choices, screening
from fisherflow_jax.sparse import _rows
from fisherflow_jax.sparse._recipe import Recipe, check_state, faded
from fisherflow_jax.sparse._rows import Rows
from fisherflow_jax.sparse._state import SparseInfo, SparseState

# Beyond which what is stored is multiplied by its scale: exp(-40), of numbers that
# reach from 1e-38 to 1e38.
_FAINTEST = -40.0


def update(
    recipe: Recipe, state: SparseState, batch: Any
) -> tuple[SparseState, SparseInfo]:
    check_state(recipe, state)
    given = batches.by_name(batch)
    if given.targets is None:
        raise ValueError("a flow learns from targets; the batch's are None.")
    given = given._replace(inputs=_rows.checked(given.inputs))
    batch = batches.as_batch(given, values=False)
    _check_batch(recipe, batch)
    after, info = choices.compiled(recipe, _take_in)(state, batch)
    if not checks.is_traced((info, given)):
        _check_taken_in(recipe, given, info)
    return after, info


def _check_batch(recipe: Recipe, batch: batches.Batch) -> None:
    count = batch.inputs.indices.shape[0]
    recipe.likelihood.check(jnp.zeros(count), batch.targets)
    if batch.weights.shape != (count,):
        raise ValueError(
            f"weights are one a row, shape ({count},); got {batch.weights.shape}."
        )
    if batch.clusters is not None:
        raise ValueError("a sparse flow keeps no scores of clusters.")


def _screen(recipe: Recipe, count: int) -> screening.Screen:
    likelihood = recipe.likelihood
    return screening.Screen(
        likelihood.name, likelihood.support, None, (count,), together=False
    )


def _admitted(recipe: Recipe, batch: batches.Batch) -> tuple[batches.Batch, jax.Array]:
    """The batch without its bad rows, padding holding zeros."""
    indices, values = batch.inputs
    padding = indices == recipe.num_features
    values = jnp.where(padding, jnp.zeros_like(values), values)
    wrong = (indices < 0) | (indices > recipe.num_features)
    rows = Rows(indices, jnp.where(wrong, jnp.nan, values))
    return _screen(recipe, len(indices))(batch._replace(inputs=rows))


def _check_taken_in(recipe: Recipe, given: batches.Batch, info: SparseInfo) -> None:
    """Raises where an update is seen to have failed, saying why."""
    refused = recipe.bad_rows == "raise" and info.rows_skipped > 0
    if not refused and not info.skipped:
        return
    told = _rows.told(given.inputs, recipe.num_features)
    if told is not None:
        raise ValueError(
            f'{told}. Mend the row; under jit, and with bad_rows="drop", such rows are '
            "left out and counted."
        )
    padding = given.inputs.indices == recipe.num_features
    values = jnp.where(padding, 0, given.inputs.values)
    clean = given._replace(inputs=given.inputs._replace(values=values))
    _screen(recipe, len(values)).refuse(clean)
    if info.skipped:
        raise ValueError(
            "what the batch adds is not finite, for an overflow (under jit it would be "
            "skipped and counted)."
        )


def _take_in(
    recipe: Recipe, state: SparseState, batch: batches.Batch
) -> tuple[SparseState, SparseInfo]:
    batch, rows_skipped = _admitted(recipe, batch)
    (indices, values), weights = batch.inputs, batch.weights
    dtype = state.shift.dtype
    values, weights = values.astype(dtype), weights.astype(dtype)
    factor = faded(recipe.memory, state.memory)[1].astype(dtype)
    state = _rescaled(state._replace(log_scale=state.log_scale + jnp.log(factor)))
    before = state.at(indices)
    output = jnp.sum(before.mean * values, 1)
    variance = jnp.sum(jnp.square(values) / before.information, 1)

    def each(outputs: jax.Array) -> jax.Array:
        return recipe.likelihood.log_prob(outputs, batch.targets)

    found, pull = jax.vjp(each, output)
    (slope,) = pull(jnp.ones_like(found))
    root = recipe.likelihood.root(output, jnp.ones_like(output))
    fisher = jnp.square(root)
    curvature = (fisher * weights)[:, None] * jnp.square(values)
    if recipe.normalise:
        slope = slope / (1 + fisher * variance)
    score = (slope * weights)[:, None] * values

    scale = jnp.exp(state.log_scale)
    adds = curvature
    if state.rate is not None:  # a weight is how often a row came
        adds = (jnp.square(slope) * weights)[:, None] * jnp.square(values)
    total = jnp.sum(jnp.where(weights > 0, found * weights, 0))
    sound = jnp.isfinite(jnp.sum(adds) + jnp.sum(score) + total)
    # decided before anything is added: nothing is chosen between two states
    adds = jnp.where(sound, adds / scale, 0)
    sums = state.curvature.at[indices].add(adds, mode="drop")
    if state.rate is not None:
        curvature = _risen(state, sums, indices, before.curvature, adds * scale)
    shift = (curvature * (before.mean - before.origin) + score) / scale
    shift = jnp.where(sound, shift, 0)
    shifts = state.shift.at[indices].add(shift, mode="drop")
    weight = jnp.where(sound, jnp.sum(weights), 0)
    after = state._replace(
        curvature=sums,
        shift=shifts,
        count=state.count * factor + weight,
        step=state.step + sound.astype(jnp.int32),
        num_skipped=state.num_skipped + (~sound).astype(jnp.int32),
        rows_skipped=state.rows_skipped + rows_skipped,
    )
    info = SparseInfo(
        log_likelihood=total,
        output=output,
        variance=variance,
        rows_skipped=rows_skipped,
        skipped=~sound,
        missing=~jnp.any(weights > 0),
    )
    return after, info


@jax.custom_jvp
def _rescaled(state: SparseState) -> SparseState:
    """The state, its sums multiplied by their scale where that has become faint.

    A loop of one turn or none, and no branch, which would copy what it hands through.
    """
    faint = state.log_scale < _FAINTEST
    scale = jnp.exp(state.log_scale)

    def turn(carry: tuple) -> tuple:
        _, *sums = carry
        return (jnp.zeros_like(faint), *(x * scale for x in sums))

    _, *sums = jax.lax.while_loop(
        lambda carry: carry[0], turn, (faint, state.curvature, state.shift)
    )
    log_scale = jnp.where(faint, 0, state.log_scale)
    return state._replace(curvature=sums[0], shift=sums[1], log_scale=log_scale)


@_rescaled.defjvp
def _(primals: tuple, tangents: tuple) -> tuple[SparseState, SparseState]:
    # a loop cannot be run backwards; a choice can, at the cost of all features
    (state,), (moved,) = primals, tangents
    faint = state.log_scale < _FAINTEST
    after, scale = _rescaled(state), jnp.exp(state.log_scale)

    def scaled(x: jax.Array, by: jax.Array) -> jax.Array:
        return jnp.where(faint, scale * (by + x * moved.log_scale), by)

    return after, moved._replace(
        curvature=scaled(state.curvature, moved.curvature),
        shift=scaled(state.shift, moved.shift),
        log_scale=jnp.where(faint, 0, moved.log_scale),
    )


def _risen(
    state: SparseState, sums: jax.Array, indices: jax.Array, before: Any, adds: Any
) -> jax.Array:
    """What each entry adds to a root of sums: its share of what its feature gains."""
    after = sums.at[indices].get(mode="fill", fill_value=0) * jnp.exp(state.log_scale)
    whole = jnp.where(after > before, after - before, 1)
    return adds / whole * (jnp.sqrt(after) - jnp.sqrt(before)) / state.rate
