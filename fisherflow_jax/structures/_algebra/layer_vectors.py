"""Vectors like the parameters, as one matrix for each linear layer."""

from typing import Any

import jax
import jax.numpy as jnp

from fisherflow_jax._ground import trees
from fisherflow_jax.layers import Layers

PyTree = Any


def named(tree: PyTree) -> dict[str, Any]:
    """Leaves by their name, as in `layers.names`."""
    return dict(trees.named_leaves(tree))


def split(
    layers: Layers, tree: PyTree, dtype: Any = None
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """`(K, I, O)` for each layer, a merged bias as its last row; and other leaves.

    A leaf that is missing from the tree (a hole that another transformation fills) is
    left out with its layer. Without a dtype a matrix has the common one of its leaves.
    """
    leaves = named(tree)
    unknown = sorted(set(leaves) - set(layers.names))
    if unknown:
        raise ValueError(
            f"a vector with leaves {unknown} is not like the parameters in which the "
            f"layers were found: {list(layers.names)}."
        )
    matrices = {}
    for layer in layers.layers:
        name = layers.names[layer.kernel]
        parts = [name] if layer.bias is None else [name, layers.names[layer.bias]]
        present = [part in leaves for part in parts]
        if not any(present):
            continue
        if not all(present):
            raise ValueError(f"kernel and bias {parts} of one layer go together.")
        common = dtype or trees.float_dtype([leaves[part] for part in parts])
        matrix = layer.kernel_layout.from_leaf(leaves[name].astype(common))
        if layer.bias_layout is not None:
            row = layer.bias_layout.from_leaf(leaves[parts[1]].astype(common))
            matrix = jnp.concatenate([matrix, row[:, None]], axis=1)
        matrices[name] = matrix
    others = {
        layers.names[leaf]: leaves[layers.names[leaf]].astype(
            dtype or leaves[layers.names[leaf]].dtype
        )
        for leaf, _ in layers.fallback
        if layers.names[leaf] in leaves
    }
    return matrices, others


def join(layers: Layers, parts: dict[str, jax.Array], like: PyTree | None) -> PyTree:
    """The inverse of `split`, of matrices and other leaves: a tree like `like`.

    None: like the parameters in which the layers were found.
    """
    leaves = dict(parts)
    if like is None:
        like = jax.tree.unflatten(layers.tree, range(len(layers.names)))
    for layer in layers.layers:
        name = layers.names[layer.kernel]
        if name in parts:
            kernel = parts[name][:, : layer.num_inputs]
            leaves[name] = layer.kernel_layout.to_leaf(kernel)
            if layer.bias is not None and layer.bias_layout is not None:
                row = layer.bias_layout.to_leaf(parts[name][:, -1])
                leaves[layers.names[layer.bias]] = row
    unknown = sorted(set(named(like)) - set(leaves))
    if unknown:
        raise ValueError(
            f"a tree with leaves {unknown} is not like the parameters in which the "
            f"layers were found: {list(layers.names)}."
        )
    return jax.tree_util.tree_map_with_path(
        lambda path, _: leaves[trees.parameter_name(path)], like
    )


def check_like(layers: Layers, tree: PyTree) -> None:
    """Raises where a leaf is not, by name and shape, one in which layers were found.

    Leaves may be missing.
    """
    shapes = dict(zip(layers.names, layers.shapes, strict=True))
    for name, leaf in named(tree).items():
        if name not in shapes:
            raise ValueError(
                f"a tree with leaf {name} is not like the parameters in which the "
                f"layers were found: {list(layers.names)}."
            )
        # a leaf may be a shape, or a number
        shape = tuple(getattr(leaf, "shape", ()))
        if shape != shapes[name]:
            raise ValueError(
                f"leaf {name} has shape {shape}, and the layers were found "
                f"in parameters where it has {shapes[name]}."
            )
