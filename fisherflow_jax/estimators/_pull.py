"""Pulling cotangents back through the model: by example, by group, by rows of a batch.

Weights enter once, as the square root on each example's (or each target's) vectors.
Squares are taken
example by example, or of the sum over a group: with cotangents that have mean zero and
are independent between examples, the cross terms vanish in the mean.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from fisherflow_jax import information as ops
from fisherflow_jax import layers as layers_of
from fisherflow_jax._ground import batch as batches
from fisherflow_jax._ground import calling, trees
from fisherflow_jax._ground.batch import Batch, num_examples
from fisherflow_jax._ground.chunks import sum_chunks
from fisherflow_jax.estimators import _plan as plans
from fisherflow_jax.estimators._estimator import Estimator
from fisherflow_jax.estimators._plan import Pull, Rule
from fisherflow_jax.estimators._probes import rademacher
from fisherflow_jax.layers import Layers
from fisherflow_jax.model import Model
from fisherflow_jax.structures import Structure
from fisherflow_jax.structures._algebra.outer_products import OneOfMany

PyTree = Any

_WAY_OUT = (
    "chunk_size=1 takes examples one by one, without it; monte_carlo takes whole "
    "batches, with groups=1 or structures.kronecker(find_layers(..., batched=True))"
)
# folding in i gives the i-th key of a split, from which a rule may draw: far from those
_SIGNS = 2**31 - 1


def pulled(
    rule: Rule, apply_fn: Callable, likelihood: Any, structure: Structure
) -> Estimator:
    """The estimator of a rule."""
    if rule.root is not None:
        likelihood = rule.root(likelihood)
    random = likelihood.random_root if rule.random is None else rule.random
    rule = dataclasses.replace(rule, random=random)
    said, layers = rule.batched, structure.layers
    if said is None and layers is not None and (layers.batched or layers.row_by_row):
        said = layers.batched
    pull = Pull(rule, Model(apply_fn, likelihood, said), structure)
    groups = rule.groups
    return Estimator(
        rule.name,
        functools.partial(_compute, pull),
        structure,
        random=random or pull.rows_of is not None,
        check=functools.partial(plans.check, pull),
        describe_paths=functools.partial(plans.table, pull),
        vectors_a_batch=None if groups is None else groups * rule.num_columns,
        of=pull.model,
        by_root=rule.by_root,
    )


def _compute(pull: Pull, params: PyTree, batch: Batch, key: jax.Array | None) -> Any:
    pull = pull.traced_once()
    plans.check(pull, params, batch)
    pull.structure.check_fits(params)
    plan = plans.plan_of(pull, params, batch)
    keys = None
    if key is not None:  # one for each example: no chunk or group changes a draw
        indices = jnp.arange(num_examples(batch), dtype=jnp.uint32)
        keys = jax.vmap(functools.partial(jax.random.fold_in, key))(indices)
    if pull.rows_of is not None:
        with calling.mapping(_WAY_OUT):
            own, layers = pull.model.apply_fn, pull.rows_of
            parts = layers_of.tap_batch(own, layers, params, batch.inputs)
            rows = _of_rows(pull, params, batch, keys, (layers, *parts), True)
        return pull.structure.reduce(rows)
    if plan.together:
        with calling.mapping(_WAY_OUT):
            return _of_whole(pull, plan, params, batch, keys)
    if plan.group_length > 1:
        return _sum_groups(pull, plan, params, batch, keys)
    of_chunk = functools.partial(_of_examples, pull, params, plan.taps)
    with calling.mapping(_WAY_OUT):
        tapped = _tapped_at_once(pull, plan, params, batch)
        if tapped is not None:
            rows = _of_rows(pull, params, batch, keys, tapped, False)
            return pull.structure.reduce(rows)
        return sum_informations(
            pull.structure, of_chunk, params, batch, keys, plan.at_once
        )


def sum_informations(
    structure: Structure,
    of_chunk: Callable[[Batch, Any], Any],
    params: PyTree,
    batch: Batch,
    keys: jax.Array | None,
    size: int,
) -> Any:
    """The informations of chunks, added."""
    zero = functools.partial(structure.isotropic, params, 0.0)
    return sum_chunks(of_chunk, ops.add, zero, batch, keys, size)


# ---- squares of each example


def _of_examples(
    pull: Pull, params: PyTree, taps: bool, batch: Batch, keys: jax.Array | None
) -> PyTree:
    """The information of each example's vectors, `OuterProducts` and stacks."""
    sliced, rebuild = batches.split(batch.inputs)
    dtype = trees.float_dtype(params)
    find = layers_of.find_and_tap if taps else _no_layers

    def one(example: tuple) -> tuple:
        parts, targets, (root, each), key = example
        inputs = rebuild([x[None] for x in parts])
        layers, outputs, entering, pull_back = find(pull.model.apply_fn, params, inputs)
        cotangents = pull.cotangents(outputs, targets, each, key)
        gradients, others = _columns(pull, pull_back, cotangents, layers)
        layers = layers and _grouped(pull, layers)
        entering = _as_one(layers, entering, 0)
        vectors = _as_one(layers, gradients, 1), others
        # after widening: the root of a weight has no exact bfloat16
        weighted = jax.tree.map(lambda x: _weigh(x.astype(dtype), root), vectors)
        # zero times what is not finite in a blanked row would be NaN
        blanked = functools.partial(_blank, root)
        return layers, jax.tree.map(blanked, entering), *weighted

    roots = batches.roots_of_weights(batch)
    layers, entering, gradients, others = _each(
        one, (sliced, batch.targets, roots, keys)
    )
    others = {i: _merge_axes(x) for i, x in others.items()}
    vectors = _tree(pull, params, layers, entering, gradients, batch.weights, others)
    return pull.structure.reduce(vectors)


def _columns(
    pull: Pull, pull_back: Callable, cotangents: jax.Array, layers: Layers | None = None
) -> PyTree:
    """What all cotangents of an example bring back."""
    # one example at a time is for operations that cannot be mapped
    if pull.rule.chunk_size == 1 or (layers is not None and layers.one_by_one):
        return _each(pull_back, cotangents, 1)
    return jax.vmap(pull_back)(cotangents)


def _no_layers(apply_fn: Callable, params: PyTree, inputs: PyTree) -> tuple:
    """As `find_and_tap` of a model without layers: all gradients are whole."""
    inputs = batches.unshare(inputs)
    outputs, vjp = jax.vjp(lambda p: apply_fn(p, inputs), params)

    def pull_back(cotangents: jax.Array) -> tuple:
        return (), dict(enumerate(jax.tree.leaves(vjp(cotangents)[0])))

    return None, outputs, (), pull_back


def _grouped(pull: Pull, layers: Layers) -> Layers:
    """The table, its layers one by one where the structure wants them so."""
    own = pull.structure.layers
    as_one = pull.structure.takes_many_as_one and own is not None and not own.apart
    return dataclasses.replace(layers, apart=not as_one)


def _as_one(layers: Layers | None, parts: tuple, axis: int) -> dict[str, Any]:
    """What each layer has, along the axis of stacked kernels of those alike."""
    if layers is None:
        return {}
    found: dict[str, list] = {}
    for layer, part in zip(layers.layers, parts, strict=True):
        first, _ = layers.places[layers.names[layer.kernel]]
        found.setdefault(first, []).append(part)
    return {
        first: jax.tree.map(lambda *each: trees.beside(each, axis), *own)
        for first, own in found.items()
    }


def _tree(
    pull: Pull,
    params: PyTree,
    layers: Layers | None,
    entering: dict,  # of layers that are alike (n, K, T, I), or ids (n, K, T)
    gradients: dict,  # of layers that are alike (n, R, K, T, O)
    weights: jax.Array,
    others: dict,  # leaf index -> (n * R, *leaf.shape)
) -> PyTree:
    """Vectors like the parameters, of `OuterProducts` and stacks `(n * R, ...)`."""
    leaves: dict[int, Any] = dict(others)
    as_one = pull.structure.takes_many_as_one
    for first, group in layers.alike.items() if layers is not None else ():
        own, size = weights, group[0].num_stacked
        if group[0].mixed:  # no row has a weight of its own
            count = weights.shape[:1]
            own = jnp.broadcast_to(jnp.sum(weights) / count[0], count)
        many = plans.products(group[0], entering[first], gradients[first], own)
        for index, layer in enumerate(group):
            rows = slice(index * size, (index + 1) * size)
            vectors: Any = OneOfMany(many, rows) if as_one else many
            leaves[layer.kernel] = vectors
            if layer.bias is not None and layer.bias_layout is not None:
                if not as_one:
                    summed = _merge_axes(jnp.sum(gradients[first], axis=3))
                    vectors = jax.vmap(layer.bias_layout.to_leaf)(summed)
                leaves[layer.bias] = vectors
    treedef: Any = jax.tree.structure(params)
    return treedef.unflatten([leaves[i] for i in range(treedef.num_leaves)])


# ---- squares of each example's vectors, where examples interact


def _of_whole(
    pull: Pull,
    plan: plans.Plan,
    params: PyTree,
    batch: Batch,
    keys: jax.Array | None,
) -> PyTree:
    """The information of each example's vectors, each from a pass of the batch."""
    inputs, dtype = batches.unshare(batch.inputs), trees.float_dtype(params)
    outputs, vjp = jax.vjp(lambda p: pull.model.apply_fn(p, inputs), params)

    def one(given: tuple) -> PyTree:
        row, targets, (root, each), key = given
        own = jax.lax.dynamic_index_in_dim(outputs, row)

        def pull_back(cotangent: jax.Array) -> PyTree:
            nothing = jnp.zeros_like(outputs)
            of_batch = jax.lax.dynamic_update_index_in_dim(nothing, cotangent, row, 0)
            return vjp(of_batch.astype(outputs.dtype))[0]

        cotangents = pull.cotangents(own, targets, each, key)
        vectors = _columns(pull, pull_back, cotangents)
        return jax.tree.map(lambda x: _weigh(x.astype(dtype), root), vectors)

    def of_rows(rows: Batch, keys: jax.Array | None) -> PyTree:
        roots = batches.roots_of_weights(rows)
        stack = _each(one, (rows.inputs, rows.targets, roots, keys))
        return pull.structure.reduce(jax.tree.map(_merge_axes, stack))

    numbers = jnp.arange(num_examples(batch), dtype=jnp.int32)
    rows = batch._replace(inputs=numbers)
    return sum_informations(pull.structure, of_rows, params, rows, keys, plan.at_once)


# ---- squares of rows of a batch


def _tapped_at_once(
    pull: Pull, plan: plans.Plan, params: PyTree, batch: Batch
) -> tuple | None:
    """The whole batch, tapped, where each row is an example's own; or None.

    Then it is the pass that the batch's gradient makes, which the compiler shares.
    """
    count, alone = num_examples(batch), pull.model.batched is False
    if not plan.taps or alone or pull.rule.chunk_size or not 1 < count <= plan.at_once:
        return None
    outputs = pull.model.outputs(params, batch.inputs)
    if outputs.dtype != trees.float_dtype(params):  # roots of weights come after it
        return None
    return layers_of.find_and_tap_batch(pull.model.apply_fn, params, batch.inputs)


def _of_rows(
    pull: Pull,
    params: PyTree,
    batch: Batch,
    keys: jax.Array | None,
    tapped: tuple,
    signed: bool,
) -> PyTree:
    """As `_of_examples`, from one pass of the whole batch through the model.

    The vectors of a layer are those of its rows. A random sign for each example makes
    the squares of what several examples bring to one row right in the mean.
    """
    layers, outputs, entering, pull_back = tapped
    cotangents = _weighted_cotangents(pull, outputs, batch, keys, signed)
    returned = _each(pull_back, cotangents, 1 if layers.one_by_one else None)
    dtype, (roots, _) = trees.float_dtype(params), batches.roots_of_weights(batch)
    blanked = functools.partial(_blank, roots)

    def rows(values: jax.Array) -> jax.Array:  # (R, n, ...) -> (n, R, ...)
        return jnp.moveaxis(values, 1, 0).astype(dtype)

    def of_layers(parts: dict) -> dict:
        return {
            first: x if layers.alike[first][0].mixed else jax.tree.map(blanked, x)
            for first, x in parts.items()
        }

    others = {i: _merge_axes(blanked(rows(x))) for i, x in returned.rows.items()}
    others |= {i: x.astype(dtype) for i, x in returned.sums.items()}
    layers = _grouped(pull, layers)
    inputs = of_layers(_as_one(layers, entering, 1))
    returning = _as_one(layers, returned.gradients, 2)
    gradients = of_layers(jax.tree.map(rows, returning))
    return _tree(pull, params, layers, inputs, gradients, batch.weights, others)


def _weighted_cotangents(
    pull: Pull,
    outputs: jax.Array,
    batch: Batch,
    keys: jax.Array | None,
    signed: bool = False,
) -> jax.Array:
    """Of all examples, in one array `(R, n, ...)`, in the type of the outputs."""

    def one(outputs: jax.Array, targets: Any, roots: tuple, key: Any) -> jax.Array:
        root, each = roots
        vectors = pull.cotangents(outputs[None], targets, each, key)[:, 0]
        weighted = _weigh(trees.widen(vectors), root)
        if signed:
            sign_key = jax.random.fold_in(key, _SIGNS)
            weighted = weighted * rademacher(sign_key, (), weighted.dtype)
        return weighted.astype(outputs.dtype)

    roots = batches.roots_of_weights(batch)
    return jax.vmap(one, out_axes=1)(outputs, batch.targets, roots, keys)


# ---- squares of sums over groups


def _of_group(
    pull: Pull, params: PyTree, group: Batch, keys: jax.Array | None
) -> PyTree:
    """Vectors summed over the group, leaves `(R, *leaf.shape)`."""
    inputs = batches.unshare(group.inputs)
    outputs, vjp = jax.vjp(lambda p: pull.model.apply_fn(p, inputs), params)
    cotangents = _weighted_cotangents(pull, outputs, group, keys)
    at_once = plans.fitting(trees.size(params), plans.GROUP_ENTRIES)
    summed = _each(lambda c: vjp(c)[0], cotangents, at_once)
    return batches.zero_if_missing(group, trees.widen(summed))


def _each(function: Callable, stack: PyTree, at_once: int | None = None) -> PyTree:
    """`jax.vmap(function)(stack)`, `at_once` of the leading axis at a time."""
    count = jax.tree.leaves(stack)[0].shape[0]
    if count == 1:  # plain products, not batched ones
        result = function(jax.tree.map(lambda x: x[0], stack))
        return jax.tree.map(lambda x: x[None], result)
    if at_once is None or count <= at_once:
        return jax.vmap(function)(stack)
    return jax.lax.map(function, stack, batch_size=at_once if at_once > 1 else None)


def _sum_groups(
    pull: Pull,
    plan: plans.Plan,
    params: PyTree,
    batch: Batch,
    keys: jax.Array | None,
) -> Any:
    length = plan.group_length
    size = pull.rule.chunk_size or length
    part = functools.partial(_of_group, pull, params)

    def vectors(group: Batch, keys: jax.Array | None) -> PyTree:
        def zeros() -> PyTree:
            return optax.tree.zeros_like(jax.eval_shape(part, group, keys))

        return sum_chunks(part, optax.tree.add, zeros, group, keys, size)

    def cut(x: jax.Array) -> jax.Array:
        return x.reshape((x.shape[0] // length, length, *x.shape[1:]))

    def of_groups(part: Batch, keys: jax.Array | None) -> PyTree:
        parts, rebuild = batches.unpack(part)

        def one(group: tuple) -> PyTree:
            *examples, group_keys = group
            return vectors(rebuild(*examples), group_keys)

        stack = _each(one, (*parts, keys))
        return pull.structure.reduce(jax.tree.map(_merge_axes, stack))

    if length == num_examples(batch):
        return pull.structure.reduce(vectors(batch, keys))
    grouped, keys = batches.map_examples(cut, batch), jax.tree.map(cut, keys)
    return sum_informations(
        pull.structure, of_groups, params, grouped, keys, plan.at_once
    )


def _weigh(values: jax.Array, root: jax.Array) -> jax.Array:
    """One example's vectors times the root of its weight, zero for a blanked row."""
    return _blank(root, values * root.astype(values.dtype))


def _blank(roots: jax.Array, values: jax.Array) -> jax.Array:
    """Zero in rows of weight zero: no blanked row is finite for every model."""
    missing = jax.lax.broadcast_in_dim(roots == 0, values.shape, range(roots.ndim))
    return jax.lax.select(missing, jnp.zeros_like(values), values)


def _merge_axes(values: jax.Array) -> jax.Array:
    """`(n, R, ...)` as `(n * R, ...)`, also of leaves without entries."""
    return values.reshape((values.shape[0] * values.shape[1], *values.shape[2:]))
