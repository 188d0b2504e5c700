"""What a score counts: arrays checked, flattened, and their padding blanked.

Values that cannot be (a label beyond the classes, a NaN) raise where they are at hand.
Under jit their row gets the weight NaN, so that every number made of it is NaN.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fisherflow_jax._ground import checks, trees
from fisherflow_jax._ground.arrays import widen

Mask = jax.Array | None  # True counts; None: all

# How far probabilities may be from summing to one, in float32 and wider.
_SUM_TOLERANCE = 1e-3


class Classified(NamedTuple):
    """Predicted classes, one row a target."""

    probabilities: jax.Array  # (m, C), float32 or wider
    labels: jax.Array  # (m,) int32
    weights: jax.Array  # (m,) 1 counted, 0 padding, NaN impossible (under jit)
    one_probability: bool  # given as the probability of label 1 alone


class Measured(NamedTuple):
    """Arrays of numbers, one row a target."""

    columns: tuple[jax.Array, ...]  # each (..., m), of one type
    weights: jax.Array  # (m,) as above


@jax.jit
def mean(values: jax.Array, weights: jax.Array) -> jax.Array:
    """The mean of the counted rows, `()`."""
    return jnp.sum(values * weights) / jnp.sum(weights)


def used_rows(mask: Any, shape: tuple[int, ...]) -> jax.Array:
    """The mask in full `(*shape)`, bool.

    Raises:
      ValueError: if it is not boolean, does not fit, or counts nothing.
    """
    if math.prod(shape) == 0:
        raise ValueError(
            f"there is nothing to measure: the targets have shape {shape}."
        )
    if mask is None:
        return jnp.ones(shape, bool)
    mask = jnp.asarray(mask)
    if mask.dtype != bool:
        raise ValueError(
            f"mask must be boolean (True counts); got dtype {mask.dtype}: of weights, "
            "say weights > 0."
        )
    if mask.shape not in (shape, shape[:1]):
        raise ValueError(
            f"mask must have the targets' shape {shape}, or {shape[:1]} for whole "
            f"examples; got {mask.shape}."
        )
    some = jnp.any(mask)
    if checks.is_concrete(some) and not bool(some):
        raise ValueError("there is nothing to measure: the mask is False everywhere.")
    mask = mask.reshape(mask.shape + (1,) * (len(shape) - mask.ndim))
    return jnp.broadcast_to(mask, shape)


def classified(probabilities: Any, labels: Any, mask: Any = None) -> Classified:
    """Class probabilities with their labels, checked.

    Args:
      probabilities: `(n, ..., C)`; or like the labels, the probability of label 1.
      labels: `(n, ...)`, whole numbers from 0 to C - 1.
      mask: `(n, ...)` or `(n,)`, True counts.
    """
    probabilities, labels = jnp.asarray(probabilities), jnp.asarray(labels)
    one_probability = _is_one_probability(probabilities.shape, labels.shape)
    used = used_rows(mask, labels.shape).reshape(-1)
    table, possible = _distributions(probabilities, used, one_probability)
    labels, right = classes(labels, used, table.shape[-1])
    weights = weights_of(used, possible & right, table.dtype)
    return Classified(table, labels, weights, one_probability)


def classes(
    labels: jax.Array, used: jax.Array, count: int
) -> tuple[jax.Array, jax.Array]:
    """Labels `(m,)` int32, blanked to 0, and whether each was one of the classes."""
    labels = labels.reshape(-1)
    blanked, right = _blanked_classes(labels, used, count)
    rule = f"labels must be whole numbers from 0 to {count - 1}"
    refuse(used, right, labels, rule)
    return blanked, right


def distributions(probabilities: Any) -> jax.Array:
    """Class probabilities without labels, `(n, ..., C)`, float32 or wider, checked."""
    probabilities = jnp.asarray(probabilities)
    if probabilities.ndim < 2 or probabilities.shape[-1] < 2:
        raise ValueError(
            "probabilities must be (n, ..., C) with at least two classes; got shape "
            f"{probabilities.shape}."
        )
    used = used_rows(None, probabilities.shape[:-1]).reshape(-1)
    table, possible = _distributions(probabilities, used, False)
    weights = weights_of(used, possible, table.dtype)
    return (table * weights[:, None]).reshape(probabilities.shape)


def measured(
    shape: tuple[int, ...],
    mask: Any,
    *,
    infinite: bool = False,
    stacked: str | None = None,
    **arrays: Any,
) -> Measured:
    """Arrays of numbers, named by their keywords: `shape`, `(k, *shape)` if stacked."""
    used = used_rows(mask, shape).reshape(-1)
    parts = {name: widen(array) for name, array in arrays.items()}
    dtype = trees.wide_dtype(*(x.dtype for x in parts.values()))
    columns, possible = [], jnp.ones_like(used)
    for name, array in parts.items():
        leading = int(name == stacked)
        if array.shape[leading:] != shape:
            raise ValueError(
                f"{name} must have the targets' shape {shape}; got {array.shape}."
            )
        flat = array.astype(dtype).reshape((*array.shape[:leading], -1))
        blanked, sound = _blanked_numbers(flat, used, infinite)
        rule = "a number, not NaN" if infinite else "finite"
        refuse(used, sound, jnp.moveaxis(flat, -1, 0), f"{name} must be {rule}")
        possible = possible & sound
        columns.append(blanked)
    return Measured(tuple(columns), weights_of(used, possible, dtype))


def gaussian(mean: Any, std: Any, targets: Any, mask: Any = None) -> Measured:
    """Normal predictions `(mean, std, targets)`, each `(n, ...)`, checked."""
    (mean, std, targets), weights = measured(
        jnp.shape(targets), mask, mean=mean, std=std, targets=targets
    )
    positive = std > 0
    refuse(True, positive, std, "std must be positive")
    weights = jnp.where(positive, weights, jnp.nan)
    std = jnp.where(positive, std, jnp.ones_like(std))
    return Measured((mean, std, targets), weights)


@functools.partial(jax.jit, static_argnums=2)
def weights_of(used: jax.Array, possible: jax.Array, dtype: Any) -> jax.Array:
    """1 for a counted row, 0 for padding, NaN for a counted row that cannot be."""
    one = jnp.where(possible, jnp.ones((), dtype), jnp.nan)
    return jnp.where(used, one, jnp.zeros((), dtype))


def refuse(used: Any, possible: jax.Array, values: jax.Array, rule: str) -> None:
    """Raises for the first used row that cannot be, where the values are at hand."""
    if not checks.is_concrete((used, possible, values)):
        return
    bad = np.asarray(used) & ~np.asarray(possible)
    if not bad.any():
        return
    row = int(np.argmax(bad))
    value = np.asarray(values)[row].astype(float)
    shown = np.array2string(value, precision=6, threshold=8)
    raise ValueError(f"{rule}; row {row} has {shown}.")


def _is_one_probability(shape: tuple[int, ...], of_labels: tuple[int, ...]) -> bool:
    if len(of_labels) == 0:
        raise ValueError("labels must have a leading axis of examples; got a number.")
    if shape == of_labels:
        return True
    if shape[:-1] == of_labels and shape[-1] >= 2:
        return False
    raise ValueError(
        f"probabilities of shape {shape} and labels of shape {of_labels} do not go "
        "together: probabilities are (n, ..., C) with at least two classes for labels "
        "(n, ...), or, of two classes, (n, ...) as well: the probability of label 1."
    )


def _distributions(
    probabilities: jax.Array, used: jax.Array, one_probability: bool
) -> tuple[jax.Array, jax.Array]:
    """Rows `(m, C)`, blanked to uniform, and whether each was a distribution."""
    if not jnp.issubdtype(probabilities.dtype, jnp.floating):
        raise ValueError(
            f"probabilities must be floating point; got dtype {probabilities.dtype}."
        )
    tolerance = max(_SUM_TOLERANCE, 4 * float(jnp.finfo(probabilities.dtype).eps))
    wide = widen(probabilities)
    if one_probability:
        given, rule = wide.reshape(-1), "a probability must be in [0, 1]"
    else:
        given = wide.reshape((-1, wide.shape[-1]))
        rule = (
            "probabilities must be at least 0 and sum to 1 over the last axis (within "
            f"{tolerance:g})"
        )
    blanked, possible = _blanked_table(given, used, tolerance)
    refuse(used, possible, given, rule)
    return blanked, possible


# ---- compiled, so that an eager metric does not pay for every operation


@functools.partial(jax.jit, static_argnums=2)
def _blanked_table(given: jax.Array, used: jax.Array, tolerance: float):
    table = jnp.stack([1 - given, given], -1) if given.ndim == 1 else given
    near = jnp.abs(jnp.sum(table, -1) - 1) <= tolerance
    possible = near & jnp.all(table >= 0, -1)
    uniform = jnp.full_like(table, 1 / table.shape[-1])
    return jnp.where((used & possible)[:, None], table, uniform), possible


@functools.partial(jax.jit, static_argnums=2)
def _blanked_classes(labels: jax.Array, used: jax.Array, count: int):
    if labels.dtype == bool:
        labels = labels.astype(jnp.int32)
    right = (labels >= 0) & (labels < count) & (labels == jnp.floor(labels))
    blanked = jnp.where(used & right, labels, jnp.zeros_like(labels))
    return blanked.astype(jnp.int32), right


@functools.partial(jax.jit, static_argnums=2)
def _blanked_numbers(flat: jax.Array, used: jax.Array, infinite: bool):
    sound = ~jnp.isnan(flat) if infinite else jnp.isfinite(flat)
    sound = jnp.all(sound, axis=tuple(range(flat.ndim - 1)))
    kept = (used & sound).reshape((1,) * (flat.ndim - 1) + used.shape)
    return jnp.where(kept, flat, jnp.ones_like(flat)), sound
