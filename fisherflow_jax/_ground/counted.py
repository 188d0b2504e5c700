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

from fisherflow_jax._ground import checks, processes, trees
from fisherflow_jax._ground.arrays import widen

Weights = jax.Array | None  # numbers at least 0, or booleans; None: all count

# How far probabilities may be from summing to one, in float32 and wider.
_SUM_TOLERANCE = 1e-3


class Classified(NamedTuple):
    """Predicted classes, one row a target."""

    probabilities: jax.Array  # (m, C), float32 or wider
    labels: jax.Array  # (m,) int32
    weights: jax.Array  # (m,) 0: padding; NaN: impossible (under jit)
    one_probability: bool  # given as the probability of label 1 alone


class Measured(NamedTuple):
    """Arrays of numbers, one row a target."""

    columns: tuple[jax.Array, ...]  # each (..., m), of one type
    weights: jax.Array  # (m,) as above


@jax.jit
def mean(values: jax.Array, weights: jax.Array) -> jax.Array:
    """The weighted mean of the rows, `()`."""
    return jnp.sum(values * weights) / jnp.sum(weights)


def weights_in_full(weights: Any, shape: tuple[int, ...]) -> jax.Array:
    """The weights `(*shape)`, of their own type; booleans if none are given.

    Raises:
      ValueError: if they do not fit, count nothing, or one is no weight.
    """
    if math.prod(shape) == 0:
        raise ValueError(
            f"there is nothing to measure: the targets have shape {shape}."
        )
    if weights is None:
        return jnp.ones(shape, bool)
    weights = jnp.asarray(weights)
    if jnp.issubdtype(weights.dtype, jnp.complexfloating):
        raise ValueError(f"weights must be real; got dtype {weights.dtype}.")
    if weights.shape not in (shape, shape[:1]):
        raise ValueError(
            f"weights must have the targets' shape {shape}, or {shape[:1]} for whole "
            f"examples; got {weights.shape}."
        )
    flat = weights.reshape(-1)
    refuse(True, _possible(flat), flat, "weights must be finite and at least 0")
    some = jnp.any(used(weights))
    if checks.is_concrete(some) and not bool(some):
        raise ValueError("there is nothing to measure: the weights are 0 everywhere.")
    weights = weights.reshape(weights.shape + (1,) * (len(shape) - weights.ndim))
    return jnp.broadcast_to(weights, shape)


def classified(probabilities: Any, labels: Any, weights: Any = None) -> Classified:
    """Class probabilities with their labels, checked.

    Args:
      probabilities: `(n, ..., C)`; or like the labels, the probability of label 1.
      labels: `(n, ...)`, whole numbers from 0 to C - 1.
      weights: `(n, ...)` or `(n,)`, at least 0, or booleans.
    """
    probabilities, labels = jnp.asarray(probabilities), jnp.asarray(labels)
    one_probability = _is_one_probability(probabilities.shape, labels.shape)
    given = weights_in_full(weights, labels.shape).reshape(-1)
    table, possible = _distributions(probabilities, used(given), one_probability)
    labels, right = classes(labels, used(given), table.shape[-1])
    weights = weights_of(given, possible & right, table.dtype)
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
    every = weights_in_full(None, probabilities.shape[:-1]).reshape(-1)
    table, possible = _distributions(probabilities, every, False)
    weights = weights_of(every, possible, table.dtype)
    return (table * weights[:, None]).reshape(probabilities.shape)


def measured(
    shape: tuple[int, ...],
    weights: Any,
    *,
    infinite: bool = False,
    stacked: str | None = None,
    **arrays: Any,
) -> Measured:
    """Arrays of numbers, named by their keywords: `shape`, `(k, *shape)` if stacked."""
    given = weights_in_full(weights, shape).reshape(-1)
    parts = {name: widen(array) for name, array in arrays.items()}
    dtype = trees.wide_dtype(*(x.dtype for x in parts.values()))
    columns, possible = [], jnp.ones_like(given, bool)
    for name, array in parts.items():
        leading = int(name == stacked)
        if array.shape[leading:] != shape:
            raise ValueError(
                f"{name} must have the targets' shape {shape}; got {array.shape}."
            )
        flat = array.astype(dtype).reshape((*array.shape[:leading], -1))
        blanked, sound = _blanked_numbers(flat, used(given), infinite)
        rule = "a number, not NaN" if infinite else "finite"
        refuse(used(given), sound, jnp.moveaxis(flat, -1, 0), f"{name} must be {rule}")
        possible = possible & sound
        columns.append(blanked)
    return Measured(tuple(columns), weights_of(given, possible, dtype))


def gaussian(mean: Any, std: Any, targets: Any, weights: Any = None) -> Measured:
    """Normal predictions `(mean, std, targets)`, each `(n, ...)`, checked."""
    (mean, std, targets), known = measured(
        jnp.shape(targets), weights, mean=mean, std=std, targets=targets
    )
    positive = std > 0
    refuse(True, positive, std, "std must be positive")
    known = jnp.where(positive, known, jnp.nan)
    std = jnp.where(positive, std, jnp.ones_like(std))
    return Measured((mean, std, targets), known)


@functools.partial(jax.jit, static_argnums=2)
def weights_of(given: jax.Array, possible: jax.Array, dtype: Any) -> jax.Array:
    """As given in this type, NaN where a row that counts, or its weight, cannot be."""
    weights = jnp.where(possible & _possible(given), given.astype(dtype), jnp.nan)
    return jnp.where(used(given), weights, jnp.zeros((), dtype))


def refuse(used: Any, possible: jax.Array, values: jax.Array, rule: str) -> None:
    """Raises for the first used row that cannot be, where the values are at hand."""
    given = used, possible, values
    if checks.is_traced(given):
        return
    used, possible = map(checks.readable, given[:2])
    if checks.holds(~(used & ~possible)):
        return
    used, possible, known = processes.on_host(given)
    row = int(np.argmax(used & ~possible))
    value = known[row].astype(float)
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


@functools.partial(jax.jit, static_argnums=2)
def weight_below(values: jax.Array, weights: jax.Array, side: str) -> jax.Array:
    """Of the values below each one: that of weight (side="right": and equal to it)."""
    order = jnp.argsort(values)
    zero = jnp.zeros((1,), weights.dtype)
    running = jnp.concatenate([zero, jnp.cumsum(weights[order])])
    return running[jnp.searchsorted(values[order], values, side=side)]


def used(weights: jax.Array) -> jax.Array:
    """Which are not padding."""
    return weights.astype(bool)  # NaN is True: it is to be found


def _possible(weights: jax.Array) -> jax.Array:
    if weights.dtype == bool:
        return jnp.ones_like(weights)
    return (weights >= 0) & jnp.isfinite(weights)


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
