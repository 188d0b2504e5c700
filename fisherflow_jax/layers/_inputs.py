"""The inputs that layers were found for, named where a model refuses others."""

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from fisherflow_jax._ground import batch as batches
from fisherflow_jax._ground import trees

if TYPE_CHECKING:
    from fisherflow_jax.layers._layer import Layers

PyTree = Any
Shapes = tuple[tuple[str, tuple[int, ...]], ...]  # of each array: its name and shape


def shapes_of_one(inputs: PyTree) -> Shapes:
    """Of one example; parts in `ff.Shared` have none."""
    leaves = jax.tree_util.tree_leaves_with_path(inputs, is_leaf=is_shared)
    return tuple(
        (trees.parameter_name(path) if path else "", tuple(jnp.shape(leaf)[1:]))
        for path, leaf in leaves
        if not is_shared(leaf)
    )


@contextlib.contextmanager
def expecting(layers: "Layers | None", inputs: PyTree) -> Iterator[None]:
    """An error of the model, with other inputs than those of the layers, names both."""
    try:
        yield
    except Exception as error:  # flax has its own for shapes
        if layers is None or shapes_of_one(inputs) == layers.input_shapes:
            raise
        raise ValueError(
            f"apply_fn fails on inputs of shape {_listed(shapes_of_one(inputs))} an "
            "example, and the layers were found for inputs of shape "
            f"{_listed(layers.input_shapes)}{_first(layers)}. It says: {error}"
        ) from error


def is_shared(node: Any) -> bool:
    return isinstance(node, batches.Shared)


def _listed(shapes: Shapes) -> str:
    if len(shapes) == 1 and not shapes[0][0]:
        return str(shapes[0][1])
    return ", ".join(f"{shape} ({name})" for name, shape in shapes)


def _first(layers: "Layers") -> str:
    if not layers.layers:
        return ""
    first = min(layers.layers, key=lambda layer: layer.uses)
    return (
        f"; the first layer is {layers.names[first.kernel]}, "
        f"{first.kind}, of {first.num_inputs} inputs and kernel shape "
        f"{layers.shapes[first.kernel]}"
    )
