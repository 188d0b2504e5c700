"""Vectors like the parameters, as one stack of matrices for layers that are alike."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from fisherflow_jax._ground import trees
from fisherflow_jax.layers import Layer, Layers

PyTree = Any


def named(tree: PyTree) -> dict[str, Any]:
    """Leaves by their name, as in `layers.names`."""
    return dict(trees.named_leaves(tree))


def members(layers: Layers, layer: Layer) -> list[str]:
    """The names of a layer's kernel and of its merged bias, if it has one."""
    leaves = [layer.kernel] if layer.bias is None else [layer.kernel, layer.bias]
    return [layers.names[leaf] for leaf in leaves]


def _check_known(layers: Layers, unknown: set[str], what: str) -> None:
    if unknown:
        raise ValueError(
            f"a {what} {', '.join(sorted(unknown))} is not like the "
            f"parameters in which the layers were found: {list(layers.names)}."
        )


def split(
    layers: Layers, tree: PyTree, dtype: Any = None
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """`(K, I, O)` for the layers that are alike, by the first, and other leaves.

    A merged bias is the last row. Leaves that are missing from the tree (holes that
    another transformation fills) are zeros, or left out where all that are alike are
    missing. Without a dtype matrices have the common one of their leaves.
    """
    leaves = named(tree)
    _check_known(layers, leaves.keys() - set(layers.names), "vector with leaves")
    matrices = {}
    for first, group in layers.alike.items():
        of_group = [members(layers, layer) for layer in group]
        for own in of_group:
            if 0 < len(leaves.keys() & set(own)) < len(own):
                raise ValueError(f"kernel and bias {own} of one layer go together.")
        kernels, *biases = zip(*of_group, strict=True)
        present = [leaves[name] for name in kernels if name in leaves]
        if not present:
            continue
        present += [leaves[n] for names in biases for n in names if n in leaves]
        common, layer = dtype or trees.float_dtype(present), group[0]
        matrix = _stacked(leaves, kernels, layer.kernel_layout, common)
        for names in biases:
            rows = _stacked(leaves, names, layer.bias_layout, common)
            matrix = jnp.concatenate([matrix, rows[:, None]], axis=1)
        matrices[first] = matrix
    fallback = [layers.names[leaf] for leaf, _ in layers.fallback]
    others = {name: leaves[name] for name in fallback if name in leaves}
    return matrices, {n: x.astype(dtype or x.dtype) for n, x in others.items()}


def _stacked(leaves: dict, names: Sequence[str], layout: Any, dtype: Any) -> jax.Array:
    """Leaves as their layout shows them, one after the other; zeros for holes."""
    found = [
        leaves[n].astype(dtype) if n in leaves else jnp.zeros(layout.leaf_shape, dtype)
        for n in names
    ]
    stack = trees.concatenated([x.reshape((1, *x.shape)) for x in found], 0)
    shown = jax.vmap(layout.from_leaf)(stack)
    return shown.reshape((-1, *shown.shape[2:]))


def join(
    layers: Layers,
    parts: dict[str, jax.Array],
    like: PyTree | None,
    sound: jax.Array | None = None,
) -> PyTree:
    """The inverse of `split`, of matrices and other leaves: a tree like `like`.

    None: like the parameters in which the layers were found. With a `()` bool layers
    that are alike change places unless it holds, and the program is compiled sooner.
    """
    leaves = {k: x for k, x in parts.items() if k not in layers.alike}
    if like is None:
        like = jax.tree.unflatten(layers.tree, range(len(layers.names)))
    for first, group in layers.alike.items():
        if first not in parts:
            continue
        layer, matrix = group[0], parts[first]
        shape = len(group), layer.num_stacked
        kernels, *biases = zip(*(members(layers, x) for x in group), strict=True)
        kernel = matrix[:, : layer.num_inputs]
        leaves |= _unstacked(kernel, shape, layer.kernel_layout, kernels, sound)
        for names in biases:
            rows = matrix[:, -1]
            leaves |= _unstacked(rows, shape, layer.bias_layout, names, sound)
    wanted = named(like)
    _check_known(layers, wanted.keys() - leaves.keys(), "tree with leaf")
    return jax.tree.unflatten(jax.tree.structure(like), [leaves[n] for n in wanted])


def _unstacked(
    values: jax.Array,
    shape: tuple[int, int],
    layout: Any,
    names: Sequence[str],
    sound: jax.Array | None,
) -> dict[str, jax.Array]:
    values = values.reshape((*shape, *values.shape[1:]))
    leaves = jax.vmap(layout.to_leaf)(values)
    return dict(zip(names, trees.cut(leaves, sound), strict=True))


def check_like(layers: Layers, tree: PyTree) -> None:
    """Raises where a leaf is not, by name and shape, one in which layers were found.

    Leaves may be missing.
    """
    shapes, leaves = dict(zip(layers.names, layers.shapes, strict=True)), named(tree)
    _check_known(layers, leaves.keys() - shapes.keys(), "tree with leaf")
    for name, leaf in leaves.items():
        # a leaf may be a shape, or a number
        shape = tuple(getattr(leaf, "shape", ()))
        if shape != shapes[name]:
            raise ValueError(
                f"leaf {name} has shape {shape}, and the layers were found "
                f"in parameters where it has {shapes[name]}."
            )
