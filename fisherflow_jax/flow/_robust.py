"""What `robust=True` keeps of a batch: the middle of its sandwich."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fisherflow_jax import estimators
from fisherflow_jax._ground import checks, processes, sharding, trees
from fisherflow_jax._ground.batch import Batch
from fisherflow_jax._ground.chunks import sum_chunks
from fisherflow_jax.flow._recipe import Observed, Recipe
from fisherflow_jax.memories import Sum
from fisherflow_jax.model import Model, check_rows, row_scores

PyTree = Any

_HELD = 2**24  # entries of scores at once


class Clusters(NamedTuple):
    """Scores summed over each of G clusters.

    Attributes:
      scores: like the parameters, leaves `(G, *leaf.shape)`.
      weights: `(G,)`, of the rows seen of each.
    """

    scores: PyTree
    weights: jax.Array


def with_scores(observed: Observed, site: Sum, params: PyTree) -> Sum:
    """The site with its scores at `params`: their squares, or their sums by cluster."""
    recipe, batch = observed.recipe, observed.batch
    if recipe.num_clusters is not None:
        return site._replace(scores=_by_cluster(observed, params))
    # unless a row is as many as its weight, its score is as large: its targets' sum
    if recipe.weights_are != "frequency" or batch.weights.ndim > 1:
        batch = batch._replace(weights=jnp.square(batch.weights))
    scores = estimators.empirical(batched=recipe.batched)
    scores = recipe.bound(scores, observed.apply_fn)
    return site._replace(quadratic=(scores.compute(params, batch, None),))


def _by_cluster(observed: Observed, params: PyTree) -> Clusters:
    recipe, number = observed.recipe, observed.recipe.num_clusters
    model = Model(observed.apply_fn, recipe.likelihood, recipe.batched)
    size = recipe.chunk_size or max(_HELD // max(trees.size(params), 1), 1)

    def of_chunk(params: PyTree, chunk: Batch) -> Clusters:
        weights = jnp.sum(chunk.weights.reshape(len(chunk.weights), -1), axis=1)
        weights = weights.astype(trees.float_dtype(params))
        rows = Clusters(row_scores(model, params, chunk), weights)
        return jax.tree.map(
            lambda x: jax.ops.segment_sum(x, chunk.clusters, number), rows
        )

    def all_chunks(params: PyTree, batch: Batch) -> Clusters:
        check_rows(model, params, batch)

        def zero() -> Clusters:
            return optax.tree.zeros_like(jax.eval_shape(of_chunk, params, batch))

        def part(chunk: Batch, keys: Any) -> Clusters:
            return of_chunk(params, chunk)

        return sum_chunks(part, optax.tree.add, zero, batch, None, size)

    return sharding.replicated(all_chunks, params, observed.batch)


def no_clusters(number: int, params: PyTree) -> Clusters:
    """Of which nothing has been seen."""
    return jax.tree.map(
        lambda x: jnp.zeros((number, *x.shape), trees.float_dtype(params)),
        Clusters(params, jnp.zeros(())),
    )


def check_clusters(recipe: Recipe, batch: Batch) -> None:
    """Raises where a batch has not the clusters that the flow was built for."""
    number, ids = recipe.num_clusters, batch.clusters
    if number is None:
        if recipe.robust and ids is not None:
            raise ValueError(
                "the batch has clusters, which robust=True does not use without their "
                "number: ff.fisher_flow(..., robust=True, num_clusters=G)."
            )
        return
    if ids is None:
        raise ValueError(
            f"the flow sums scores over num_clusters={number} clusters: give each row "
            "its own in ff.Batch(inputs, targets, weights, clusters=ids)."
        )
    given = ids, batch.weights
    if recipe.bad_rows != "raise" or checks.is_traced(given):
        return
    if not checks.holds(~_unknown(number, *map(checks.readable, given))):
        ids, weights = map(np.asarray, processes.fetched(given))
        row = int(np.argmax(_unknown(number, ids, weights)))
        raise ValueError(
            f"clusters are numbered 0 to {number - 1} (num_clusters={number}); got "
            f"{int(ids[row])} in row {row}. Of any names: numpy.unique(names, "
            "return_inverse=True)[1]."
        )


def known_clusters(recipe: Recipe, batch: Batch) -> tuple[Batch, jax.Array]:
    """The batch without rows of no known cluster, and how many these are."""
    if recipe.num_clusters is None:
        return batch, jnp.zeros((), jnp.int32)
    unknown = _unknown(recipe.num_clusters, batch.clusters, batch.weights)
    out = unknown.reshape(unknown.shape + (1,) * (batch.weights.ndim - 1))
    weights = jnp.where(out, jnp.zeros_like(batch.weights), batch.weights)
    return batch._replace(weights=weights), jnp.sum(unknown, dtype=jnp.int32)


def _unknown(number: int, ids: Any, weights: Any) -> Any:
    """Of arrays of jax or of numpy."""
    used = (weights != 0).any(axis=tuple(range(1, weights.ndim)))
    return used & ((ids < 0) | (ids >= number))
