"""Static facts about outputs, targets and parameters that raise while tracing."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from fisherflow_jax._ground.checks import positive
from fisherflow_jax.likelihoods._likelihood import Shape


def shape_and_dtype(value: Any) -> tuple[Shape, Any]:
    """Of an array, a tracer, a ShapeDtypeStruct or a Python number."""
    if not (hasattr(value, "shape") and hasattr(value, "dtype")):
        value = np.asarray(value)
    return tuple(value.shape), value.dtype


def check_outputs(name: str, outputs: Any) -> Shape:
    """Raises unless the outputs are floating point; returns their shape."""
    shape, dtype = shape_and_dtype(outputs)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(
            f"{name}: outputs must be floating point, got dtype {dtype} "
            f"(shape {shape})."
        )
    return shape


def check_targets(
    name: str, shape: Shape, expected: Shape, targets: Any, rule: str
) -> None:
    """Raises unless the targets are real and have the expected shape."""
    target_shape, dtype = shape_and_dtype(targets)
    if jnp.issubdtype(dtype, jnp.complexfloating):
        raise ValueError(f"{name}: targets must be real, got dtype {dtype}.")
    if target_shape == expected:
        return
    hint = ""
    if expected == (*target_shape, 1):
        hint = (
            " The outputs have a trailing axis of 1: drop it (outputs[..., 0]), or give"
            " the targets one (targets[..., None])."
        )
    elif target_shape == (*expected, 1):
        hint = " The targets have a trailing axis of 1: drop it (targets[..., 0])."
    raise ValueError(
        f"{name}: outputs have shape {shape} and targets have shape {target_shape}; "
        f"{rule}, here {expected}.{hint}"
    )


def require_positive(name: str, parameter: str, value: Any) -> None:
    """Raises unless the parameter is one number, positive when its value is known."""
    shape, _ = shape_and_dtype(value)
    if shape != ():
        raise ValueError(
            f"{name}: {parameter} must be one number, got an array of shape {shape}."
        )
    positive(value, f"{name}: {parameter}")
