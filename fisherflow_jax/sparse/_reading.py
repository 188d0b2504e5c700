"""Predictions and draws of rows, from what is believed of their features."""

from typing import Any

import jax
import jax.numpy as jnp

from fisherflow_jax._ground import checks, keys
from fisherflow_jax.posteriors import Gaussian
from fisherflow_jax.predictions import Prediction
from fisherflow_jax.predictions import predict as predicted
from fisherflow_jax.sparse import _rows
from fisherflow_jax.sparse._recipe import Recipe, check_state
from fisherflow_jax.sparse._rows import Rows
from fisherflow_jax.sparse._state import SparseState, check_expected
from fisherflow_jax.structures import Diagonal


def _line(recipe: Recipe, state: Any, rows: Any) -> tuple[Rows, Any, Any]:
    """The rows, their features' means, and their features' variances."""
    check_state(recipe, state)
    indices, values = _rows.checked(rows)
    if not checks.is_traced(indices):
        told = _rows.told(Rows(indices, values), recipe.num_features)
        if told is not None:
            raise ValueError(f"{told}.")
    padding = indices == recipe.num_features
    wrong = (indices < 0) | (indices > recipe.num_features)
    values = jnp.where(wrong, jnp.nan, jnp.where(padding, 0, values))
    found = state.at(indices)
    return Rows(indices, values.astype(found.mean.dtype)), found.mean, found.information


def predict(
    recipe: Recipe,
    state: SparseState,
    rows: Rows,
    *,
    level: float = 0.95,
    link: Any = None,
) -> Prediction:
    """The expected target of each row, as `ff.predict`; fields `(n,)`."""
    rows, mean, information = _line(recipe, state, rows)
    check_expected(state)
    line = jnp.sum(mean * rows.values, 1)
    variance = jnp.sum(jnp.square(rows.values) / information, 1)

    def one(line: jax.Array, variance: jax.Array) -> Prediction:
        # of a model with one parameter: the row's linear predictor
        belief = Gaussian(line, Diagonal(1 / variance))
        whole = predicted(
            belief, _itself, recipe.likelihood, jnp.ones(1), level=level, link=link
        )
        return jax.tree.map(lambda x: x[0], whole)

    return jax.vmap(one)(line, variance)


def _itself(params: jax.Array, inputs: jax.Array) -> jax.Array:
    return params * inputs


def sample(recipe: Recipe, state: SparseState, rows: Rows, key: Any) -> jax.Array:
    """Linear predictors `(n,)` under one draw, the same for a feature in all rows."""
    rows, mean, information = _line(recipe, state, rows)
    check_expected(state)
    key = keys.typed_key(key)

    def noise(index: jax.Array) -> jax.Array:
        return jax.random.normal(jax.random.fold_in(key, index), (), mean.dtype)

    each = jax.vmap(jax.vmap(noise))(rows.indices.astype(jnp.uint32))
    return jnp.sum((mean + each / jnp.sqrt(information)) * rows.values, 1)
