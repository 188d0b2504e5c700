"""Vectors like the parameters, as one matrix for each linear layer."""

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
    """`(K, I, O)` for each layer, a merged bias as its last row; and other leaves.

    A leaf that is missing from the tree (a hole that another transformation fills) is
    left out with its layer. Without a dtype a matrix has the common one of its leaves.
    """
    leaves = named(tree)
    _check_known(layers, leaves.keys() - set(layers.names), "vector with leaves")
    matrices = {}
    for layer in layers.layers:
        names = members(layers, layer)
        present = [leaves[name] for name in names if name in leaves]
        if not present:
            continue
        if len(present) < len(names):
            raise ValueError(f"kernel and bias {names} of one layer go together.")
        common = dtype or trees.float_dtype(present)
        matrix = layer.kernel_layout.from_leaf(present[0].astype(common))
        if layer.bias_layout is not None:
            row = layer.bias_layout.from_leaf(present[1].astype(common))
            matrix = jnp.concatenate([matrix, row[:, None]], axis=1)
        matrices[names[0]] = matrix
    names = [layers.names[leaf] for leaf, _ in layers.fallback]
    others = {name: leaves[name] for name in names if name in leaves}
    return matrices, {n: x.astype(dtype or x.dtype) for n, x in others.items()}


def join(layers: Layers, parts: dict[str, jax.Array], like: PyTree | None) -> PyTree:
    """The inverse of `split`, of matrices and other leaves: a tree like `like`.

    None: like the parameters in which the layers were found.
    """
    leaves = dict(parts)
    if like is None:
        like = jax.tree.unflatten(layers.tree, range(len(layers.names)))
    for layer in layers.layers:
        name, *bias = members(layers, layer)
        if name in parts:
            kernel = parts[name][:, : layer.num_inputs]
            leaves[name] = layer.kernel_layout.to_leaf(kernel)
            if layer.bias_layout is not None:
                leaves[bias[0]] = layer.bias_layout.to_leaf(parts[name][:, -1])
    names = named(like)
    _check_known(layers, names.keys() - leaves.keys(), "tree with leaf")
    return jax.tree.unflatten(jax.tree.structure(like), [leaves[n] for n in names])


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
