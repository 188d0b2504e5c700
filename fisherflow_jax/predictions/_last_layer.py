"""Whether a model's outputs are those of its only layer: read from its program."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fisherflow_jax._ground import batch as batches
from fisherflow_jax.layers import _compat
from fisherflow_jax.layers import _finding as finding
from fisherflow_jax.layers import _views as views
from fisherflow_jax.layers._compat import Program
from fisherflow_jax.layers._layer import Layers
from fisherflow_jax.layers._views import NotStrided, View
from fisherflow_jax.layers._walk import Use

PyTree = Any


def is_last_layer(
    apply_fn: Callable, params: PyTree, inputs: PyTree, layers: Layers
) -> bool:
    """Whether the outputs are those of the only layer, plus what does not depend on it.

    Read from the model's program: static, no computation.
    """
    if len(layers.layers) != 1 or layers.fallback:
        return False
    layer = layers.layers[0]
    if layer.num_stacked != 1 or layer.kind == "embedding":
        return False
    sliced, rebuild = batches.split(inputs)
    example = batches.unshare(rebuild([x[:1] for x in sliced]))
    traced = finding.trace(apply_fn, params, example)
    (uses,) = traced.uses
    if len(uses) != 1 or uses[0].scans:
        return False
    states: list = [None] * len(traced.program.inputs)
    found = _follow(traced.program, states, uses[0], 0)
    if len(found) != 1 or not isinstance(found[0], View):
        return False
    shape = found[0].shape
    if layer.num_outputs != (shape[-1] if len(shape) > 1 else 1):
        return False
    # where each of the model's outputs is among the layer's (K, T, O), in its order
    entries = np.arange(math.prod(uses[0].output.shape), dtype=np.int32)
    whole = entries.reshape(uses[0].output.shape)
    of_model = np.asarray(_numbers(found[0], entries)).ravel()
    of_layer = np.asarray(uses[0].linear.outputs(whole)).ravel()
    return of_model.shape == of_layer.shape and bool(np.all(of_model == of_layer))


_UNKNOWN = "depends on the layer in some other way"


def _follow(
    program: Program, states: Sequence[Any], use: Use, depth: int
) -> list[View | str | None]:
    """Of each output: a view of the layer's, unknown, or None: independent of it."""
    known: dict[Any, Any] = dict(zip(program.inputs, states, strict=True))
    for i, equation in enumerate(program.equations):
        before = [known.get(atom.variable) for atom in equation.inputs]
        here = use.path[depth] == i if depth < len(use.path) else False
        after: list = [None] * len(equation.outputs)
        operation = equation.operation
        if here and depth == len(use.path) - 1:
            after = [views.whole(use.output.shape)]
        elif isinstance(operation, _compat.Call) and (here or any(before)):
            # a path that leads elsewhere is followed no further
            inside = depth + 1 if here else len(use.path)
            after = _follow(_compat.read(operation.body), before, use, inside)
        elif here:
            after = [_UNKNOWN] * len(equation.outputs)
        elif any(state is not None for state in before):
            after = [_after(operation, before)] * len(equation.outputs)
        for atom, state in zip(equation.outputs, after, strict=True):
            known[atom.variable] = state
    return [known.get(atom.variable) for atom in program.outputs]


def _after(operation: Any, before: list) -> View | str:
    direct = [state for state in before if isinstance(state, View)]
    if len(direct) != 1 or any(state is _UNKNOWN for state in before):
        return _UNKNOWN
    if isinstance(operation, _compat.Add):
        return direct[0]
    if isinstance(operation, _compat.Reorder):
        try:
            moved = operation.apply(direct[0])
        except NotStrided:
            return _UNKNOWN
        return moved if moved.is_bijection else _UNKNOWN
    return _UNKNOWN


def _numbers(view: View, entries: np.ndarray) -> np.ndarray:
    with jax.ensure_compile_time_eval():
        leaf = jnp.asarray(entries.reshape(view.leaf_shape))
        return np.asarray(view.from_leaf(leaf))
