"""Where the axes of an operation's operands are in its output, and which of them meet.

What nothing is said of here has no places: an axis of examples is lost on it.
"""

from collections.abc import Sequence
from typing import Any

from fisherflow_jax.layers import _compat
from fisherflow_jax.layers._compat import Equation
from fisherflow_jax.layers._linear import match, others

# of one operand: places of its axes in the output, and those taken together
Places = tuple[dict[int, int], Sequence[int]]


def places(equation: Equation, shape: Sequence[int]) -> list[Places]:
    """Of each operand, for an output of this shape."""
    operation = equation.operation
    ndims = [len(atom.shape) for atom in equation.inputs]
    match operation:
        case _compat.Dot():
            return _of_dot(equation)
        case _compat.Convolution(batch_groups=1):
            return [({operation.input_spec[0]: operation.output_spec[0]}, ()), ({}, ())]
        case _compat.Gather():
            return _of_gather(operation, ndims[0], len(shape))
        case _compat.Scatter():
            return _of_scatter(operation, *ndims)
        case _compat.Stack():
            after = others(len(shape), [operation.axis % len(shape)])
            return [(dict(enumerate(after)), ())] * len(ndims)
        case _compat.Along():
            kept = others(ndims[0], () if operation.keeps else operation.axes)
            along = {axis: place for place, axis in enumerate(kept)}
            return [(along, operation.axes)] * len(ndims)
        case _compat.Random():  # a key's axes lead
            return [(dict(enumerate(range(ndim))), ()) for ndim in ndims]
        case (
            _compat.Same()
            | _compat.Add()
            | _compat.Elementwise()
            | _compat.Cut()
            | _compat.Join()
        ):
            mixed = getattr(operation, "mixed", ())
            return [(_at_their_places(n, len(shape), mixed), ()) for n in ndims]
        case _compat.Update():
            whole, part = (atom.shape for atom in equation.inputs[:2])
            same = {i: i for i in range(len(shape)) if whole[i] == part[i]}
            return [(same if i < 2 else {}, ()) for i in range(len(ndims))]
    return [({}, ())] * len(ndims)


def _at_their_places(ndim: int, after: int, mixed: Sequence[int]) -> dict[int, int]:
    mixed = [axis % ndim for axis in mixed if ndim]
    return {i: i for i in range(min(ndim, after)) if i not in mixed}


def _of_dot(equation: Equation) -> list[Places]:
    # out[s, l, r] = sum_c left[s, l, c] right[s, c, r], as a layer of `right`
    dot: Any = match(equation, 1)
    stacks, positions, features = dot.output_axes
    left = dict(zip(sum(dot.input_axes[:2], ()), stacks + positions, strict=True))
    kernel = dot.kernel_axes[0] + dot.kernel_axes[2]
    right = dict(zip(kernel, stacks + features, strict=True))
    return [(left, dot.input_axes[2]), (right, dot.kernel_axes[1])]


def _of_gather(gather: _compat.Gather, ndim: int, after: int) -> list[Places]:
    # out[ids' axes but the last, offsets] = table[rows that they name, offsets]
    looked_up = others(after, gather.offset_dims)
    rows = gather.batch_dims, gather.collapsed_dims
    table = dict(zip(others(ndim, *rows), gather.offset_dims, strict=True))
    for i, j in zip(gather.batch_dims, gather.index_batch_dims, strict=True):
        table[i] = looked_up[j]
    return [(table, ()), (dict(enumerate(looked_up)), ())]


def _of_scatter(
    scatter: _compat.Scatter, ndim: int, of_ids: int, of_updates: int
) -> list[Places]:
    # table[rows that they name, window] (+)= updates[ids' axes but the last, window]
    table = {i: i for i in range(ndim) if i not in scatter.scattered_dims}
    ids: dict[int, int] = {}
    axes = others(of_updates, scatter.window_dims)  # of the ids, in the updates
    windows = others(ndim, scatter.inserted_dims, scatter.batch_dims)
    pairs = zip(scatter.window_dims, windows, strict=True)
    updates = {i: j for i, j in pairs if j not in scatter.scattered_dims}
    for i, j in zip(scatter.batch_dims, scatter.index_batch_dims, strict=True):
        ids[j] = i
        # an axis of index vectors does not count among the updates'
        updates[axes[j]] = i
    return [(table, ()), (ids, ()), (updates, ())]
