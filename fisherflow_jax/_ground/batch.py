"""Batches: inputs, targets and multiplicities, checked and sliced."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fisherflow_jax._ground import checks, sharding, trees
from fisherflow_jax._ground.given import check_numbers

PyTree = Any


class Shared(NamedTuple):
    """A part of the inputs that all examples share, passed whole to `apply_fn`.

    Batch statistics, frozen weights, a dropout key: never sliced, never vmapped.
    `apply_fn` receives the tree itself, without this wrapper. `lax.scan` knows nothing
    of it and slices a stack of batches, shared parts too: inside a scan, wrap what its
    body closes over, `lambda s, b: flow.update(s, ((b[0], ff.Shared(frozen)), b[1]))`.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> def apply_fn(params, inputs):
      ...     return (inputs["x"] - inputs["center"]) @ params
      >>> inputs = {"x": jnp.ones((4, 2)), "center": ff.Shared(jnp.array([0.5, 0.5]))}
      >>> estimator = ff.estimators.exact(
      ...     apply_fn, ff.likelihoods.gaussian(), ff.structures.diagonal()
      ... )
      >>> estimator(jnp.zeros(2), (inputs, jnp.zeros(4)))
      Diagonal(entries=Array([1., 1.], dtype=float32))
    """

    tree: PyTree


class Batch(NamedTuple):
    """Examples with their multiplicities."""

    inputs: PyTree  # leaves (n, ...), parts in Shared excepted
    targets: PyTree  # leaves (n, ...), or None
    weights: jax.Array  # (n,) float32 or wider, 0 = padding


def is_shared(node: Any) -> bool:
    return isinstance(node, Shared)


def unshare(inputs: PyTree) -> PyTree:
    """The inputs as `apply_fn` receives them."""
    return map_inputs(lambda x: x, inputs, lambda node: node.tree)


def map_inputs(
    function: Callable, inputs: PyTree, shared: Callable = lambda node: node
) -> PyTree:
    """`function` of the leaves with an example axis, `shared` of parts in `Shared`."""
    return jax.tree.map(
        lambda x: shared(x) if is_shared(x) else function(x), inputs, is_leaf=is_shared
    )


def by_axis(batch: Batch, rows: Any, whole: Any) -> Batch:
    """A prefix of the batch: `rows` where there is an example axis, else `whole`."""
    return Batch(map_inputs(lambda _: rows, batch.inputs, lambda _: whole), rows, rows)


def split(inputs: PyTree) -> tuple[list[jax.Array], Callable[[list], PyTree]]:
    """The leaves with an example axis, and how to rebuild inputs around others."""
    leaves, treedef = jax.tree.flatten(inputs, is_leaf=is_shared)
    sliced = [leaf for leaf in leaves if not is_shared(leaf)]

    def rebuild(parts: list) -> PyTree:
        rest = iter(parts)
        filled = [leaf if is_shared(leaf) else next(rest) for leaf in leaves]
        return jax.tree.unflatten(treedef, filled)

    return sliced, rebuild


def unpack(batch: Batch) -> tuple[tuple, Callable[..., Batch]]:
    """What has an example axis: inputs' leaves, targets, weights; and how to rebuild.

    `rebuild(*others)` is the batch of others, with the same parts in `Shared`.
    """
    sliced, rebuild = split(batch.inputs)
    return (sliced, *batch[1:]), lambda parts, *rest: Batch(rebuild(parts), *rest)


def as_batch(batch: Any) -> Batch:
    """`(inputs, targets)` or `(inputs, targets, weights)`, checked, as a `Batch`.

    Rows of weight zero are replaced by the first row of positive weight (by ones, if
    there is none) before any model sees them, so that padding may hold anything: zero
    times NaN is NaN in a vjp.

    Raises:
      ValueError: for an empty batch, leading axes that differ, or (when the values are
        concrete) weights that are negative or not finite.
    """
    if not isinstance(batch, (tuple, list)) or len(batch) not in (2, 3):
        raise ValueError(
            "a batch is (inputs, targets) or (inputs, targets, weights); got "
            f"{type(batch).__name__}"
            + (f" of length {len(batch)}." if hasattr(batch, "__len__") else ".")
        )
    for name, part in zip(("inputs", "targets"), batch, strict=False):
        check_numbers(part, name, keep=is_shared)
    inputs = map_inputs(trees.as_array, batch[0])
    targets = jax.tree.map(trees.as_array, batch[1])
    count, dtype = _num_examples(inputs, targets), jnp.result_type(float)
    if len(batch) == 2:
        return Batch(inputs, targets, trees.as_array(np.ones((count,), dtype)))
    weights = trees.as_array(batch[2], dtype)
    if weights.shape != (count,):
        raise ValueError(
            f"weights must have shape (n,) = ({count},), one multiplicity an example; "
            f"got {weights.shape}."
        )
    if checks.is_concrete(batch[2]):
        known = np.asarray(batch[2]).astype(dtype)
        checks.not_negative(known, "weights")
        if np.all(known > 0):
            return Batch(inputs, targets, weights)
    else:
        # traced values cannot raise: NaN reaches every sum over the batch
        weights = jnp.where(weights >= 0, weights, jnp.nan)
    return _blank(Batch(inputs, targets, weights))


def _num_examples(inputs: PyTree, targets: PyTree) -> int:
    leaves = split(inputs)[0] + jax.tree.leaves(targets)
    shapes = [leaf.shape for leaf in leaves]
    if not shapes:
        raise ValueError("a batch needs at least one array with an example axis.")
    if any(len(shape) == 0 for shape in shapes):
        raise ValueError(
            "every array of a batch has a leading example axis (wrap what all "
            f"examples share in ff.Shared); got shapes {shapes}."
        )
    counts = {shape[0] for shape in shapes}
    if len(counts) != 1:
        raise ValueError(
            f"inputs and targets must agree in their leading axis; got shapes {shapes}."
        )
    count = counts.pop()
    if count == 0:
        raise ValueError(f"a batch must not be empty (n = 0); got shapes {shapes}.")
    return count


def map_examples(function: Callable, batch: Batch) -> Batch:
    """Applies `function` to every array with an example axis."""
    parts, rebuild = unpack(batch)
    return rebuild(*jax.tree.map(function, parts))


def _blank(batch: Batch) -> Batch:
    (*given, weights), rebuild = unpack(batch)
    # one program where the values are at hand, and not one an operation
    blank = jax.jit(_blanked) if checks.is_concrete(batch) else _blanked
    return rebuild(*blank(given, weights), weights)


def _blanked(given: list, weights: jax.Array) -> list:
    return sharding.in_auto_mode(_fill, given, given, weights)


def _fill(given: list, weights: jax.Array) -> list:
    used = weights > 0
    first = jnp.argmax(used)

    def fill(x: jax.Array) -> jax.Array:
        row = jax.lax.dynamic_index_in_dim(x, first, 0)
        # one is a possible target of every likelihood, zero is not
        row = jnp.where(jnp.any(used), row, jnp.ones_like(row))
        keep = used.reshape((-1,) + (1,) * (x.ndim - 1))
        return jnp.where(keep, x, jnp.broadcast_to(row, x.shape))

    return jax.tree.map(fill, given)


def num_observations(batch: Batch, *, each_target: bool) -> jax.Array:
    """The weighted number of examples, or of all their targets, `()`."""
    targets = jax.tree.leaves(batch.targets)
    per_example = math.prod(targets[0].shape[1:]) if each_target else 1
    return jnp.sum(batch.weights) * per_example


def num_examples(batch: Batch) -> int:
    """The static number of rows, padding included."""
    return batch.weights.shape[0]


def is_finite(batch: Batch) -> jax.Array:
    """Whether all floating values are finite and no weight is negative, `()` bool."""
    weights = jnp.where(batch.weights >= 0, batch.weights, jnp.nan)
    return trees.all_finite((split(batch.inputs)[0], batch.targets, weights))


def zero_if_missing(batch: Batch, tree: PyTree) -> PyTree:
    """`tree`, or zeros for a batch whose weights are all zero.

    Rows of weight zero are blanked, but no blanked row is finite for every model.
    """
    missing = jnp.all(batch.weights == 0)
    return jax.tree.map(lambda x: jnp.where(missing, jnp.zeros_like(x), x), tree)
