"""What an estimator gives of each layer, checked against the layers' table."""

from typing import Any

import jax
import jax.numpy as jnp

from fisherflow_jax.layers import Layer, Layers
from fisherflow_jax.structures._algebra.layer_vectors import named
from fisherflow_jax.structures._algebra.outer_products import OuterProducts, squares

PyTree = Any


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
    for name, leaf in leaves.items():
        layer, found = kernels.get(name), isinstance(leaf, OuterProducts)
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


def _is_of(products: OuterProducts, layer: Layer) -> bool:
    return (
        products.layout == layer.kernel_layout
        and products.num_inputs == layer.num_inputs
        and products.has_bias == (layer.bias is not None)
    )


def other_squares(
    layers: Layers, leaves: dict[str, Any], dtype: Any
) -> dict[str, jax.Array]:
    """The diagonal of the leaves that belong to no layer."""
    names = [layers.names[leaf] for leaf, _ in layers.fallback]
    return {name: squares(leaves[name], dtype) for name in names}


def other_constants(layers: Layers, value: jax.Array) -> dict[str, jax.Array]:
    """The same for a multiple of the identity."""
    return {
        layers.names[leaf]: jnp.full(layers.shapes[leaf], value)
        for leaf, _ in layers.fallback
    }


def num_observations(layers: Layers, leaves: dict[str, Any], dtype: Any) -> jax.Array:
    """The examples' summed weights, `()`; zero where there is no layer."""
    if not layers.layers:
        return jnp.zeros((), dtype)
    products = leaves[layers.names[layers.layers[0].kernel]]
    return jnp.sum(products.weights).astype(dtype)
