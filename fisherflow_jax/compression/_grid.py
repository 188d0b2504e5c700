"""Points of a grid for whole columns, by the least rise of what was tried."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fisherflow_jax import information as ops
from fisherflow_jax._ground import linalg, trees
from fisherflow_jax.compression._state import Quadratic

PyTree = Any

# Scales that are tried, in parts of the one that reaches the largest entry.
CLIPPED = np.linspace(0.3, 1.1, 33)


def laid_over(like: PyTree, named: Mapping[str, Any], none: float) -> PyTree:
    """Arrays by name broadcast over a tree like the parameters, a number elsewhere."""
    leaves = [
        jnp.broadcast_to(jnp.asarray(named.get(name, none), x.dtype), x.shape)
        for name, x in trees.named_leaves(like)
    ]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


@functools.partial(jax.jit, static_argnames=("axes", "compensate"))
def best(
    around: Quadratic,
    kept: PyTree,
    levels: dict[str, jax.Array],
    axes: tuple[tuple[str, tuple[int, ...]], ...],
    compensate: bool,
) -> tuple[jax.Array, dict, dict, jax.Array]:
    """The least rise, its parameters and scales by name, and the rise of the nearest.

    Args:
      around: what is rounded.
      kept: a mask like the parameters.
      levels: of what is rounded, the largest of its whole numbers.
      axes: of each the axes along which a channel lies.
      compensate: whether errors are pushed on, too.
    """
    means = trees.widen(around.mean)
    columns = ops.by_columns(around.information, means)
    held = jax.tree.map(lambda x, k: k.astype(x.dtype), means, kept)
    # free where there are no levels
    steps = laid_over(means, levels, 0.0)
    parts = [columns.split(tree) for tree in (means, held, steps)]
    used = _used(columns, means, levels)
    here = jax.tree.map(jnp.multiply, means, held)
    named = dict(trees.named_leaves(here))
    reach = {n: _reach(named[n], levels[n], along) for n, along in axes}
    clipped = _clipped(around, here, reach, levels, axes)

    # scales belong to one column only where columns are a layer's
    apart = ops.facts(around.information).layers is not None

    def run(scales: dict[str, jax.Array], pushed: bool) -> tuple[list, list, list]:
        split, found = columns.split(laid_over(means, scales, 1.0)), []
        for group, use, *own in zip(columns.groups, used, *parts, split, strict=True):
            dense = group.matrix.ndim == 3
            push = _pushed if pushed and dense and use else _nearest
            found.append(push(group, *own))
        step = jax.tree.map(jnp.subtract, columns.join(found), means)
        forces = columns.split(ops.matvec(around.information, step))
        pairs = zip(columns.split(step), forces, strict=True)
        rises = [around.factor * jnp.sum(x * y, axis=(1, 2)) / 2 for x, y in pairs]
        if not apart:
            rises = [jnp.full_like(x, jnp.mean(x)) for x in rises]
        return rises, found, split

    least = nearest = run(reach, False)
    ways = [(clipped, False), (reach, True), (clipped, True)]
    for scales, pushed in ways if compensate else ways[:1]:
        least = _better(run(scales, pushed), least)
    rises, found, split = least
    params = dict(trees.named_leaves(columns.join(found)))
    wide = dict(trees.named_leaves(columns.join(split)))
    # one scale a channel again
    scales = {n: wide[n][tuple(map(slice, x.shape))] for n, x in reach.items()}
    total, plain = (jnp.sum(jnp.concatenate(x)) for x in (rises, nearest[0]))
    return total, params, scales, plain


def _better(one: tuple, other: tuple) -> tuple:
    """Of each matrix the one of less rise; what is no number is not passed over."""
    picks = [~(x >= y) for x, y in zip(one[0], other[0], strict=True)]

    def choose(news: list, olds: list) -> list:
        three = zip(picks, news, olds, strict=True)
        return [
            jnp.where(pick.reshape((-1,) + (1,) * (new.ndim - 1)), new, old)
            for pick, new, old in three
        ]

    return tuple(map(choose, one, other))


def _used(columns: ops.ByColumns, like: PyTree, names: Any) -> list[bool]:
    """Which groups have anything to be rounded."""
    with jax.ensure_compile_time_eval():
        zeros = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), like)
        flags = columns.split(laid_over(zeros, dict.fromkeys(names, 1.0), 0.0))
        return [bool(np.any(part)) for part in flags]


def _reach(x: jax.Array, levels: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """The scale by which the last level is the largest entry of a channel."""
    largest = jnp.max(jnp.abs(x), axes, keepdims=True, initial=0)
    return jnp.where(largest > 0, largest / levels, 1)


def _clipped(
    around: Quadratic, held: PyTree, reach: dict, levels: dict, axes: tuple
) -> dict[str, jax.Array]:
    """The scales of least error at nearest rounding, as the information measures.

    A channel's share of the error, with all channels clipped alike.
    """
    named = dict(trees.named_leaves(held))

    def errors(share: jax.Array) -> dict[str, jax.Array]:
        off = {}
        for name, scale in reach.items():
            x, own = named[name], share.astype(scale.dtype) * scale
            off[name] = _points(x, levels[name], own) - x
        step = laid_over(held, off, 0.0)
        forces = dict(trees.named_leaves(ops.matvec(around.information, step)))
        return {n: jnp.sum(off[n] * forces[n], a, keepdims=True) for n, a in axes}

    shares = jnp.asarray(CLIPPED)
    best = jax.tree.map(lambda x: jnp.argmin(x, axis=0), jax.lax.map(errors, shares))
    return {n: shares[best[n]].astype(x.dtype) * x for n, x in reach.items()}


def _points(x: jax.Array, levels: jax.Array, scales: jax.Array) -> jax.Array:
    return jnp.clip(jnp.round(x / scales), -levels, levels) * scales


def _nearest(_: Any, w: jax.Array, kept: Any, levels: Any, scales: Any) -> jax.Array:
    """Nearest points of the grid, where there are levels."""
    return kept * jnp.where(levels > 0, _points(w, levels, scales), w)


def _pushed(group: ops.ColumnBlocks, *parts: jax.Array) -> jax.Array:
    """Inputs rounded one by one, with their errors pushed onto the rest."""
    weight = jnp.mean(group.weights, axis=1)
    damping = group.shifts / jnp.where(weight > 0, weight, jnp.ones_like(weight))
    return jax.lax.map(_push, (group.matrix, damping, *parts))


def _push(
    layer: tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array, jax.Array],
) -> jax.Array:
    matrix, damping, w, kept, levels, scales = layer
    entries = linalg.diagonal(matrix)
    # what is free comes last, and takes what all others leave
    order = jnp.argsort(jnp.where(jnp.any(levels > 0, axis=1), -entries, jnp.inf))
    root = _upper(matrix[order][:, order], damping)
    kept, levels, scales = (x[order] for x in (kept, levels, scales))

    def step(i: jax.Array, w: jax.Array) -> jax.Array:
        row = w[i]
        target = _nearest(None, row, kept[i], levels[i], scales[i])
        w = w - root[i][:, None] * ((row - target) / root[i, i])[None]
        return w.at[i].set(target)

    moved = jax.lax.fori_loop(0, len(order), step, w[order])
    return moved[jnp.argsort(order)]


def _upper(matrix: jax.Array, damping: jax.Array) -> jax.Array:
    """U, upper, with `U^T U` the inverse: that of a Cholesky factor from the end."""
    reversed_ = jnp.flip(matrix + damping * jnp.eye(len(matrix), dtype=matrix.dtype))
    equilibrated, scales = linalg.equilibrated(reversed_)
    lower = jnp.tril(linalg.steady_cholesky(equilibrated)[0]) * scales[:, None]
    return jnp.triu(jnp.flip(linalg.inverse_of_lower(lower)))
