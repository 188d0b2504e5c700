"""Bounds of the information of any likelihood, from its root alone."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from fisherflow_jax._ground.arrays import like, widen
from fisherflow_jax.likelihoods._likelihood import (
    Likelihood,
    Root,
    Shape,
    scaled_probes,
)


def _require_rank(k: int, rank: int, shape: Shape) -> None:
    if k > rank:
        raise ValueError(
            f"rank_root: k = {k}, but the information of one target has at most rank "
            f"{rank} here (outputs of shape {tuple(shape)}); k is at most {rank}, where"
            " the bound is exact."
        )


def largest_entries(root: Callable) -> Callable:
    """Of a diagonal root with one target on the last axis: its k largest entries."""

    def low_rank(k: int, num_iterations: int | None) -> Root:
        del num_iterations  # no k columns capture more than these

        def probe_shape(shape: Shape) -> Shape:
            _require_rank(k, shape[-1], shape)
            return (*shape[:-1], k)

        def apply(outputs: ArrayLike, probes: Any, key: Any = None) -> jax.Array:
            probe_shape(jnp.shape(outputs))
            wide = widen(outputs)
            factor = root(wide, jnp.ones_like(wide), key)
            kept = jax.lax.top_k(jnp.abs(factor), k)[1]
            entries = jnp.take_along_axis(factor, kept, -1) * like(probes, factor)
            cotangents = jnp.put_along_axis(
                jnp.zeros_like(factor), kept, entries, axis=-1, inplace=False
            )
            return cotangents.astype(jnp.asarray(outputs).dtype)

        return Root(apply, probe_shape)

    return low_rank


def _column_of(
    likelihood: Likelihood, outputs: jax.Array, key: Any
) -> tuple[int, Callable]:
    """The number of columns of the root, and the function of their index."""
    shape = likelihood.probe_shape(outputs.shape)
    count = math.prod(shape[1:])
    # Linearised, so that a random root draws its targets once and not for each column.
    _, linear = jax.linearize(
        lambda probes: likelihood.root(outputs, probes, key),
        jnp.zeros(shape, outputs.dtype),
    )

    def column(index: jax.Array) -> jax.Array:
        direction = jax.nn.one_hot(index, count, dtype=outputs.dtype)
        return linear(jnp.broadcast_to(direction.reshape(1, *shape[1:]), shape))

    return count, column


def diagonal_of_columns(likelihood: Likelihood) -> Root:
    r"""The root of a diagonal upper bound of the sum of a root's squared columns.

    For every column s, :math:`s s^\top \preceq \operatorname{diag}(|s_i| \sum_j
    |s_j|)`, because the difference is diagonally dominant; the sum over j is over the
    outputs of the example that the column touches. One column is held at a time.
    """

    def apply(outputs: ArrayLike, probes: Any, key: Any = None) -> jax.Array:
        wide = widen(outputs)
        count, column = _column_of(likelihood, wide, key)
        axes = tuple(range(1, wide.ndim))

        def add(index: Any, total: jax.Array) -> jax.Array:
            sizes = jnp.abs(column(index))
            return total + sizes * jnp.sum(sizes, axes, keepdims=True)

        bound = jax.lax.fori_loop(0, count, add, jnp.zeros_like(wide))
        return scaled_probes(outputs, jnp.sqrt(bound), probes)

    return Root(apply, tuple)


def rank_of_columns(likelihood: Likelihood, k: int) -> Root:
    """The root of a lower bound: k pivoted Cholesky columns of a root's squares.

    The last axis of the probes holds the columns of one target; the axes between it and
    the examples are targets, whose informations add, each with k columns of its own.
    All columns are held: as many copies of the outputs as an example has probes.
    """

    def probe_shape(shape: Shape) -> Shape:
        own = likelihood.probe_shape(shape)
        columns = own[-1] if len(own) > 1 else 1
        _require_rank(k, min(columns, math.prod(shape[1:])), shape)
        return (own[0], *own[1:-1], k)

    def apply(outputs: ArrayLike, probes: Any, key: Any = None) -> jax.Array:
        examples, *targets, _ = probe_shape(jnp.shape(outputs))
        num_targets = math.prod(targets)
        wide = widen(outputs)
        count, column = _column_of(likelihood, wide, key)
        columns = jax.lax.map(column, jnp.arange(count))
        # (targets, columns of one, examples, outputs of one)
        columns = columns.reshape(num_targets, count // num_targets, examples, -1)
        probes = like(probes, wide).reshape(examples, num_targets, k)

        def add(j: Any, carry: tuple) -> tuple:
            columns, total = carry
            sizes = jnp.sum(columns**2, 1)
            pivot = jnp.argmax(sizes, -1)[:, None, :, None]
            direction = jnp.take_along_axis(columns, pivot, -1)
            square = jnp.sum(direction**2, 1, keepdims=True)
            vanishes = square <= jnp.finfo(wide.dtype).tiny
            direction = direction / jnp.sqrt(jnp.where(vanishes, 1, square))
            direction = jnp.where(vanishes, 0, direction)
            chosen = jnp.sum(direction * columns, 1)
            columns = columns - direction * chosen[:, None]
            probe = jax.lax.dynamic_index_in_dim(probes, j, 2, keepdims=False)
            return columns, total + jnp.sum(chosen * probe.T[..., None], 0)

        total = jnp.zeros((examples, columns.shape[-1]), wide.dtype)
        _, total = jax.lax.fori_loop(0, k, add, (columns, total))
        return total.reshape(wide.shape).astype(jnp.asarray(outputs).dtype)

    return Root(apply, probe_shape)
