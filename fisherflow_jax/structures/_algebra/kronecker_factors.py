"""The two factors of a layer's information, from its inputs and output gradients.

The vector of example n is `sum_t a_nt g_nt^T`. Kronecker factors treat what enters a
layer and what returns to it as independent, and need a convention for the T positions
that share the kernel.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fisherflow_jax._ground import linalg, trees
from fisherflow_jax.layers import Layer, Layers
from fisherflow_jax.structures._algebra.layer_vectors import named
from fisherflow_jax.structures._algebra.outer_products import (
    OneOfMany,
    OuterProducts,
    side_by_side,
    squares,
)
from fisherflow_jax.structures._structure import Structure
from fisherflow_jax.structures.sharing import Sharing

PyTree = Any


def _gram(rows: jax.Array, widest: int) -> jax.Array:
    """`(..., K, S, D)` -> `(K, D, D)`, or its diagonal `(K, D)` for a wide side."""
    if rows.shape[-1] > widest:
        axes = (*range(rows.ndim - 3), rows.ndim - 2)
        return jnp.sum(jnp.square(rows), axis=axes)
    rows = flat(rows)
    return linalg.product("kni,knj->kij", rows, rows)


def flat(rows: jax.Array) -> jax.Array:
    """`(..., K, S, D)` -> `(K, N, D)`: XLA copies what it sums over several axes."""
    return jnp.moveaxis(rows, -3, 0).reshape((rows.shape[-3], -1, rows.shape[-1]))


def with_bias(inputs: jax.Array) -> jax.Array:
    """A one beside the inputs: the bias is a kernel's row that sees only ones."""
    return jnp.concatenate([inputs, jnp.ones_like(inputs[..., :1])], axis=-1)


def factors(
    products: OuterProducts, sharing: Sharing, widest: int, same_inputs: np.ndarray
) -> tuple[jax.Array, jax.Array]:
    """A `(K, I, I)` and G `(K, O, O)`, sums over examples; diagonals where wide.

    `same_inputs`, of each of K the first with the same inputs: their A is made once.
    """
    left, right, positions = _as_it_is(products, sharing, widest, same_inputs)
    if products.turned is None:
        return left, right
    other_left, other_right, others = _turned(products.turned, sharing, widest)
    if other_left.ndim > left.ndim:  # ids have a diagonal, gradients have none
        identity = jnp.eye(left.shape[1], dtype=left.dtype)
        left = left[:, :, None] * identity[None]
    # each is a mean over its own positions
    share = positions / (positions + others)
    right = share * right + (1 - share) * other_right
    return left + other_left, right


def _turned(
    products: OuterProducts, sharing: Sharing, widest: int
) -> tuple[jax.Array, jax.Array, int]:
    """Of a transposed kernel, for the kernel: what returns to it is at its inputs."""
    returned, entered = products.gradients, products.inputs.astype(products.dtype)
    rows = returned.reshape((-1, *returned.shape[2:]))
    rows, entered = sharing(rows, entered[:, None])
    weights = _of_positions(products.weights, entered.shape[3])
    roots = jnp.sqrt(weights).astype(products.dtype)[:, None, None, :, None]
    return _gram(rows, widest), _gram(entered * roots, widest), entered.shape[3]


def _as_it_is(
    products: OuterProducts, sharing: Sharing, widest: int, same_inputs: np.ndarray
) -> tuple[jax.Array, jax.Array, int]:
    """The two factors, and the number of positions that are kept."""
    dtype = products.gradients.dtype
    if products.one_hot:
        inputs, gradients = _one_hot(products, sharing)
        return inputs, _gram(gradients, widest), gradients.shape[3]
    inputs = products.inputs.astype(dtype)
    if products.has_bias:
        inputs = with_bias(inputs)
    inputs, gradients = sharing(inputs, products.gradients)
    roots = jnp.sqrt(_of_positions(products.weights, inputs.shape[2])).astype(dtype)
    first, places = np.unique(same_inputs, return_inverse=True)
    weighted = rows_of(inputs, first, 1) * roots[:, None, :, None]
    left = rows_of(_gram(weighted, widest + products.has_bias), places, 0)
    return left, _gram(gradients, widest), gradients.shape[3]


def rows_of(stack: jax.Array, rows: np.ndarray, axis: int) -> jax.Array:
    """These along an axis, which may be all in their order."""
    if len(rows) == stack.shape[axis] and (rows == np.arange(len(rows))).all():
        return stack
    return jnp.take(stack, rows, axis, mode="clip")


def _of_positions(weights: jax.Array, positions: int) -> jax.Array:
    """What a layer's inputs weigh, `(n, 1)` or `(n, positions)`.

    With weights of targets n counts these, and so each input as many times: by its
    position's own weight where a layer has as many positions as there are targets.
    """
    if weights.ndim == 1:
        return weights[:, None]
    count = weights.shape[1]
    return weights * count if count == positions else jnp.sum(weights, 1, keepdims=True)


def _one_hot(products: OuterProducts, sharing: Sharing) -> tuple[jax.Array, jax.Array]:
    """The diagonal of A `(K, I)`, and the gradients as shared."""
    ids, dtype = products.inputs, products.gradients.dtype
    ones, gradients = sharing(jnp.ones((*ids.shape, 1), dtype), products.gradients)
    weights = _of_positions(products.weights, ones.shape[2]).astype(dtype)[:, None]
    if ones.shape[2] == ids.shape[2]:
        shares = jnp.square(ones[..., 0])
    elif ones.shape[2] != 1:
        raise ValueError(
            "an embedding's positions are kept or pooled into one by sharing; got "
            f"{ones.shape[2]} of {ids.shape[2]} positions."
        )
    else:
        # the pooled input of an id is the share of the positions that hold it
        same = ids[:, :, :, None] == ids[:, :, None, :]
        shares = jnp.sum(same.astype(dtype), -1) / ids.shape[2] ** 2
    stacked = jnp.arange(ids.shape[1], dtype=jnp.int32)[None, :, None]
    zeros = jnp.zeros((ids.shape[1], products.num_inputs), dtype)
    places = jnp.broadcast_to(stacked, ids.shape), ids
    inputs = zeros.at[places].add(shares * weights, mode="drop")
    if products.has_bias:
        of_bias = jnp.sum(jnp.square(ones[..., 0]) * weights, axis=(0, 2))
        inputs = jnp.concatenate([inputs, of_bias[:, None]], axis=1)
    return inputs, gradients


# ---- what an estimator gives of each layer, checked against the layers' table


def checked(stack: PyTree, layers: Layers) -> dict[str, Any]:
    """The leaves by name: those of the layers that were given, and no others."""
    leaves = named(stack)
    if set(leaves) != set(layers.names):
        raise ValueError(
            "kronecker(layers) was given the layers of other parameters: it lacks "
            f"{sorted(set(leaves) - set(layers.names))}, and the model lacks "
            f"{sorted(set(layers.names) - set(leaves))}."
        )
    kernels = {layers.names[layer.kernel]: layer for layer in layers.layers}
    merged = {layers.names[x.bias] for x in layers.layers if x.bias is not None}
    for name in (*kernels, *(leaves.keys() - kernels.keys() - merged)):
        leaf = leaves[name]
        layer, found = kernels.get(name), isinstance(leaf, (OuterProducts, OneOfMany))
        if layer is not None and not found:
            raise ValueError(
                "kronecker needs the inputs and gradients of each example, and the "
                f"estimator gave whole vectors of {name}: give it groups=None and "
                "fast_squares=True, or find the layers of this apply_fn."
            )
        if found and (layer is None or not _is_of(leaf, layer)):
            raise ValueError(
                f"the model's layer with kernel {name} is not the one that "
                "kronecker(layers) was given: find the layers of this apply_fn and of "
                "these inputs."
            )
    return leaves


def as_one(leaves: Sequence[OuterProducts | OneOfMany]) -> OuterProducts:
    """Layers that are alike as one, with the stacked kernels of all."""
    first, last = leaves[0], leaves[-1]
    if isinstance(first, OneOfMany) and isinstance(last, OneOfMany):
        ends = first.rows.start, last.rows.stop
        if first.many is last.many and ends == (0, first.many.inputs.shape[1]):
            return first.many
    products = [x.alone() if isinstance(x, OneOfMany) else x for x in leaves]
    return side_by_side(products)


def _is_of(leaf: OuterProducts | OneOfMany, layer: Layer) -> bool:
    products = leaf.many if isinstance(leaf, OneOfMany) else leaf
    return (
        products.layout == layer.kernel_layout
        and products.num_inputs == layer.num_inputs
        and products.has_bias == (layer.bias is not None)
    )


def structure(
    name: str,
    layers: Layers,
    reduce_layer: Callable[[str, OuterProducts], Any],
    empty_layer: Callable[[Layer, int, Any], Any],
    build: Callable[..., Any],
) -> Structure:
    """A structure of what `reduce_layer(kernel, products)` makes of layers.

    Those that are alike are one, with as many stacked kernels as they have together.
    `empty_layer(layer, rows, dtype)` is the same of no vectors; `build(parts, ...)` the
    information, whose other fields it is given by name.
    """
    alike = {
        first: dataclasses.replace(
            group[0], num_stacked=len(group) * group[0].num_stacked
        )
        for first, group in layers.alike.items()
    }
    others = {layers.names[leaf]: layers.shapes[leaf] for leaf, _ in layers.fallback}

    def whole(parts: dict, shift: jax.Array, entries: dict, count: jax.Array) -> Any:
        return build(
            parts,
            shifts={
                first: jnp.full((layer.num_stacked,), shift)
                for first, layer in alike.items()
            },
            other_entries=entries,
            num_observations=count,
            layers=layers,
        )

    def reduce(stack: PyTree) -> Any:
        leaves = checked(stack, layers)
        zero = count = jnp.zeros((), trees.float_dtype(stack))
        vectors = {
            first: as_one([leaves[layers.names[layer.kernel]] for layer in group])
            for first, group in layers.alike.items()
        }
        parts = {first: reduce_layer(first, x) for first, x in vectors.items()}
        entries = {name: squares(leaves[name], zero.dtype) for name in others}
        if vectors:
            count = jnp.sum(next(iter(vectors.values())).weights).astype(zero.dtype)
        return whole(parts, zero, entries, count)

    def isotropic(params: PyTree, value: jax.typing.ArrayLike) -> Any:
        # from the table alone: wrappers of Optax build states on trees with holes
        value = jnp.asarray(value, trees.float_dtype(params))
        parts = {
            name: empty_layer(
                layer, layer.num_inputs + (layer.bias is not None), value.dtype
            )
            for name, layer in alike.items()
        }
        entries = {name: jnp.full(shape, value) for name, shape in others.items()}
        return whole(parts, value, entries, jnp.zeros_like(value))

    return Structure(
        name,
        reduce,
        isotropic,
        takes_outer_products=True,
        takes_many_as_one=True,
        layers=layers,
    )
