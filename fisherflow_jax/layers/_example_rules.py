"""Where the examples of a batch are after one operation, by the kind of it."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from fisherflow_jax.layers import _compat
from fisherflow_jax.layers._compat import Atom, Equation
from fisherflow_jax.layers._views import Axis, NotStrided, View, length, merged


class Value(NamedTuple):
    """What is known of the examples in a value."""

    view: View | None  # whose entry is whose; None: not known
    together: str | None = None  # what made it depend on several examples at once


def no_example(count: int, shape: Sequence[int]) -> Value:
    """Of what all examples share."""
    return Value(View((count,), repeated(shape)))


def has_examples(value: Value) -> bool:
    """Whether the entries are those of single examples, and it is known of which."""
    if value.view is None:
        return False
    return value.view.leaf_shape == (1,) or any(map(runs, value.view.axes))


def outputs(equation: Equation, operands: list[Value], count: int) -> list[Value]:
    """The examples in each output of an equation without a body."""
    operation = equation.operation
    match operation:
        case _compat.Reorder():
            results = [_reordered(operation, value) for value in operands]
        case _compat.StopGradient():
            results = operands
        case _compat.Along():
            sorted_by = next(filter(has_examples, operands), operands[0])
            results = [_along(equation, operation, sorted_by, count)]
            results *= len(equation.outputs)
        case _compat.Dot():
            results = [_dot(operation, operands, count)]
        case _compat.Convolution():
            results = [_convolution(operation, equation, operands, count)]
        case _compat.Gather():
            results = [_gather(operation, equation, operands, count)]
        case _compat.Stack():
            results = [_stack(operation, equation, operands, count)]
        case _compat.Random():
            results = [_random(equation, operands[0], count)]
        case _:
            results = [
                _in_place(equation, atom, operands, count) for atom in equation.outputs
            ]
    return results


def repeated(shape: Sequence[int]) -> tuple[Axis, ...]:
    return tuple(merged([(size, 0)]) for size in shape)


def runs(axis: Axis) -> bool:
    """Whether other examples are met along an axis."""
    return any(stride != 0 for _, stride in axis)


def whole(view: View | None, shape: tuple[int, ...]) -> View | None:
    """The view, if it shows every example once at each position, or none of them."""
    if view is None or view.shape != shape:
        return None
    sizes = [size for axis in view.axes for size, stride in axis if stride != 0]
    return view if not sizes or math.prod(sizes) == view.leaf_shape[0] else None


def _reordered(operation: _compat.Reorder, value: Value) -> Value:
    try:
        return value._replace(view=value.view and operation.apply(value.view))
    except NotStrided:
        return value._replace(view=None)


def _along(equation: Equation, along: _compat.Along, value: Value, count: int) -> Value:
    if value.view is None:
        return value
    meet = any(runs(value.view.axes[i]) for i in along.axes)
    together = f"{equation.name} over the examples" if meet else value.together
    if along.keeps:
        moved = meet and equation.name == "sort"
        return Value(None if moved else value.view, together)
    kept = [axis for i, axis in enumerate(value.view.axes) if i not in along.axes]
    if not any(map(runs, kept)):
        return Value(no_example(count, [length(axis) for axis in kept]).view, together)
    return Value(View((count,), tuple(kept), value.view.offset), together)


def _dot(dot: _compat.Dot, operands: list[Value], count: int) -> Value:
    left, right = (value.view for value in operands)
    if left is None or right is None:
        return Value(None)
    views = (left, right)
    contracted = [
        view.axes[i]
        for view, axes in zip(views, dot.contracting, strict=True)
        for i in axes
    ]
    batch = [
        left.axes[i] if runs(left.axes[i]) else right.axes[j]
        for i, j in zip(*dot.batch, strict=True)
    ]
    free = [
        [
            axis
            for i, axis in enumerate(view.axes)
            if i not in (*dot.contracting[side], *dot.batch[side])
        ]
        for side, view in enumerate(views)
    ]
    if any(map(runs, contracted)) or all(any(map(runs, axes)) for axes in free):
        together = "dot_general over the examples"
    else:
        together = None
    offset = left.offset or right.offset
    return Value(View((count,), (*batch, *free[0], *free[1]), offset), together)


def _convolution(
    convolution: _compat.Convolution,
    equation: Equation,
    operands: list[Value],
    count: int,
) -> Value:
    images, kernels = (value.view for value in operands)
    if images is None or kernels is None or any(map(runs, kernels.axes)):
        return Value(None)
    batch, *others = convolution.input_spec
    if any(runs(images.axes[i]) for i in others) or convolution.batch_groups > 1:
        return Value(None)
    axes = list(repeated(equation.outputs[0].shape))
    axes[convolution.output_spec[0]] = images.axes[batch]
    return Value(View((count,), tuple(axes), images.offset))


def _gather(
    gather: _compat.Gather, equation: Equation, operands: list[Value], count: int
) -> Value:
    table, ids = (value.view for value in operands[:2])
    if table is None or ids is None:
        return Value(None)
    shape = equation.outputs[0].shape
    axes = list(repeated(shape))
    looked_up = [i for i in range(len(shape)) if i not in gather.offset_dims]
    for place, axis in zip(looked_up, ids.axes[:-1], strict=True):
        axes[place] = axis
    taken = (*gather.collapsed_dims, *gather.batch_dims)
    kept = [i for i in range(len(table.axes)) if i not in taken]
    places = dict(zip(kept, gather.offset_dims, strict=True))
    for i, j in zip(gather.batch_dims, gather.index_batch_dims, strict=True):
        places[i] = looked_up[j]
    for i, axis in enumerate(table.axes):
        if not runs(axis):
            continue
        if i not in places or shape[places[i]] != length(axis):
            return Value(None)  # some of the examples, by their numbers
        axes[places[i]] = axis
    return Value(View((count,), tuple(axes), table.offset or ids.offset))


def _stack(
    stack: _compat.Stack, equation: Equation, operands: list[Value], count: int
) -> Value:
    one = _in_place(equation, equation.inputs[0], operands, count).view
    if one is None:
        return Value(None)
    shape = equation.outputs[0].shape
    kept = [i for i in range(len(shape)) if i != stack.axis % len(shape)]
    return Value(one.broadcast(shape, kept))


def _random(equation: Equation, keys: Value, count: int) -> Value:
    """Of one key, numbers for each example: one by one they would have the same."""
    shape = equation.outputs[0].shape
    if keys.view is not None and any(map(runs, keys.view.axes)):
        axes = (*keys.view.axes, *repeated(shape))[: len(shape)]
        return Value(View((count,), axes, keys.view.offset))
    drawn = count > 1 and count in shape
    together = "random numbers drawn for the batch" if drawn else None
    return Value(no_example(count, shape).view, together)


def _in_place(
    equation: Equation, output: Atom, operands: list[Value], count: int
) -> Value:
    """Of any operation: an axis of the same length at its place is the same axis."""
    found: set[View] = set()
    for value, atom in zip(operands, equation.inputs, strict=True):
        if value.view is None:
            return Value(None)
        if not any(map(runs, value.view.axes)):
            continue
        axes = list(repeated(output.shape))
        if len(output.shape) != len(atom.shape):
            return Value(None)
        for i, axis in enumerate(value.view.axes):
            if runs(axis):
                if output.shape[i] != atom.shape[i]:
                    return Value(None)
                axes[i] = axis
        found.add(View((count,), tuple(axes), value.view.offset))
    if len(found) > 1:
        return Value(None)
    return Value(found.pop()) if found else no_example(count, output.shape)
