"""Where the examples are in every value of a program that takes a whole batch.

The examples' axis is followed through shape operations, products, reductions and loops
as a `View` of the numbers 0 ... n - 1: the pieces of stride zero are positions within
an example, the others run over the examples. What combines several examples is noted
on the values that depend on it, so that a model says of itself whether its examples
interact.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax

from fisherflow_jax.layers import _compat
from fisherflow_jax.layers._compat import Equation, Path, Program
from fisherflow_jax.layers._linear import match, others
from fisherflow_jax.layers._views import Axis, NotStrided, View, is_repeated, length


class Value(NamedTuple):
    """What is known of the examples in a value."""

    view: View | None  # whose entry is whose; None: not known
    together: str | None = None  # what made it depend on several examples at once


class Examples(NamedTuple):
    """The examples in the operands and in the outputs of an equation."""

    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]


def no_example(count: int, shape: Sequence[int]) -> Value:
    """Of what all examples share."""
    return Value(View((count,), ()).broadcast(shape, ()))


def every_example(count: int, shape: Sequence[int]) -> Value:
    """Of an input whose leading axis is that of the examples."""
    positions = (((size, 0),) for size in shape[1:])
    return Value(View((count,), ()).with_axes([((count, 1),), *positions]))


def has_examples(value: Value) -> bool:
    """Whether the entries are those of single examples, and it is known of which."""
    view = value.view
    return view is not None and (view.leaf_shape == (1,) or _runs(view))


def _runs(view: View) -> bool:
    """Whether other examples are met along the axes of a view."""
    return not is_repeated(view.pieces)


def examples_first(view: View, depth: int, values: jax.Array) -> jax.Array:
    """`(*scans, *shape)` as `(n, *scans, *shape of one example)`, `depth` scans."""
    scans = (((size, 0),) for size in values.shape[:depth])
    view = view.with_axes([*scans, *view.axes])
    # Pieces over the examples have strides of 1 or more and come first, in the order of
    # their numbers; positions have stride 0 and follow in the order of their axes.
    values = view.in_order(values)
    shape = [math.prod(n for n, stride in axis if stride == 0) for axis in view.axes]
    return values.reshape((*view.leaf_shape, *shape))


def follow(
    program: Program, values: Sequence[Value], count: int, path: Path = ()
) -> tuple[list[Value], dict[Path, Examples]]:
    """The examples in the program's outputs, and in each of its equations."""
    known = dict(zip(program.inputs, values, strict=True))
    rows: dict[Path, Examples] = {}

    def values_of(atoms: Iterable[_compat.Atom]) -> tuple[Value, ...]:
        return tuple(
            known.get(atom.variable) or no_example(count, atom.shape) for atom in atoms
        )

    for i, equation in enumerate(program.equations):
        here, operands = (*path, i), values_of(equation.inputs)
        results, below = _step(equation, operands, count, here)
        together = next((x.together for x in operands if x.together), None)
        for atom, result in zip(equation.outputs, results, strict=True):
            view = _whole(result.view, atom.shape)
            known[atom.variable] = Value(view, result.together or together)
        rows |= below
        rows[here] = Examples(operands, values_of(equation.outputs))
    return list(values_of(program.outputs)), rows


def _whole(view: View | None, shape: tuple[int, ...]) -> View | None:
    """The view, if it shows every example once at each position, or none of them."""
    if view is None or view.shape != shape:
        return None
    count = math.prod(size for size, stride in view.pieces if stride != 0)
    return view if not _runs(view) or (count,) == view.leaf_shape else None


def _step(
    equation: Equation, operands: Sequence[Value], count: int, path: Path
) -> tuple[Sequence[Value], dict[Path, Examples]]:
    operation = equation.operation
    match operation:
        case _compat.Call() | _compat.Opaque():
            return follow(_compat.read(operation.body), operands, count, path)
        case _compat.Scan():
            return _scan(operation, operands, count, path)
        case _compat.Reorder():
            return [_reordered(operation, value) for value in operands], {}
        case _compat.StopGradient():
            return operands, {}
        case _compat.Random() if not has_examples(operands[0]):
            # of one key, numbers for each example: one by one they would have the same
            shape = equation.outputs[0].shape
            drawn = count > 1 and count in shape
            together = "random numbers drawn for the batch" if drawn else None
            return [no_example(count, shape)._replace(together=together)], {}
    return [_placed(equation, x.shape, operands, count) for x in equation.outputs], {}


def _reordered(operation: _compat.Reorder, value: Value) -> Value:
    try:
        return value._replace(view=value.view and operation.apply(value.view))
    except NotStrided:
        return value._replace(view=None)


def _placed(
    equation: Equation, shape: tuple[int, ...], operands: Sequence[Value], count: int
) -> Value:
    """Of an output of this shape: operands' axes of examples, at their places in it."""
    shared = no_example(count, shape).view
    views: list[View | None] = []
    met = False
    for value, (places, meeting) in zip(operands, _axes(equation, shape), strict=True):
        if value.view is None:
            return Value(None)
        axes: list[Axis] = [((size, 0),) for size in shape]
        for i, axis in enumerate(value.view.axes):
            if is_repeated(axis):
                continue
            met |= i in meeting
            if i in places and shape[places[i]] == length(axis):
                axes[places[i]] = axis
            elif i not in meeting:
                return Value(None)  # some of the examples, or in another order
        views.append(value.view.with_axes(axes))
    view = _agreed(views, shared)
    if isinstance(equation.operation, _compat.Dot):
        met |= view is None  # each example of one side with each of the other
    moved = met and equation.name == "sort"
    together = f"{equation.name} over the examples" if met else None
    return Value(None if moved else view, together)


def _agreed(views: Iterable[View | None], shared: View | None) -> View | None:
    """What views agree on, save those that all examples share; None: nothing known."""
    running = {view for view in views if view is None or _runs(view)}
    if not running:
        return shared
    return running.pop() if len(running) == 1 else None


def _axes(
    equation: Equation, shape: Sequence[int]
) -> list[tuple[dict[int, int], Sequence[int]]]:
    """For each operand, places of its axes in the output, and those taken together."""
    operation = equation.operation
    ndims = [len(atom.shape) for atom in equation.inputs]
    match operation:
        case _compat.Dot():
            # out[s, l, r] = sum_c left[s, l, c] right[s, c, r], as a layer of `right`
            dot: Any = match(equation, 1)
            stacks, positions, features = dot.output_axes
            left = dict(
                zip(sum(dot.input_axes[:2], ()), stacks + positions, strict=True)
            )
            kernel = dot.kernel_axes[0] + dot.kernel_axes[2]
            right = dict(zip(kernel, stacks + features, strict=True))
            return [(left, dot.input_axes[2]), (right, dot.kernel_axes[1])]
        case _compat.Convolution():
            return [({operation.input_spec[0]: operation.output_spec[0]}, ()), ({}, ())]
        case _compat.Gather():
            # out[ids' axes but the last, offsets] = table[rows that they name, offsets]
            looked_up = others(len(shape), operation.offset_dims)
            rows = operation.batch_dims, operation.collapsed_dims
            table = dict(
                zip(others(ndims[0], *rows), operation.offset_dims, strict=True)
            )
            for i, j in zip(
                operation.batch_dims, operation.index_batch_dims, strict=True
            ):
                table[i] = looked_up[j]
            return [(table, ()), (dict(enumerate(looked_up)), ())]
        case _compat.Stack():
            after = others(len(shape), [operation.axis % len(shape)])
            return [(dict(enumerate(after)), ())] * len(ndims)
        case _compat.Along():
            kept = others(ndims[0], () if operation.keeps else operation.axes)
            places = {axis: place for place, axis in enumerate(kept)}
            return [(places, operation.axes)] * len(ndims)
        case _compat.Random():  # a key's axes lead
            return [(dict(enumerate(range(ndims[0]))), ())]
    # of any operation: an axis of the same length at its place is the same axis
    same = dict(enumerate(range(len(shape))))
    return [(same if ndim == len(shape) else {}, ()) for ndim in ndims]


def _scan(
    scan: _compat.Scan, operands: Sequence[Value], count: int, path: Path
) -> tuple[list[Value], dict[Path, Examples]]:
    body = _compat.read(scan.body)
    first, end = scan.num_constants, scan.num_constants + scan.num_carries
    constants, carries = operands[:first], list(operands[first:end])
    slices = [_sliced(value) for value in operands[end:]]
    while True:  # what is carried starts as zeros, and holds examples after a step
        results, rows = follow(body, [*constants, *carries, *slices], count, path)
        after = list(map(_joined, carries, results))
        if after == carries:
            break
        carries = after
    stacked = [
        Value(view and view.with_axes([((scan.length, 0),), *view.axes]), together)
        for view, together in results[scan.num_carries :]
    ]
    return [*carries, *stacked], rows


def _sliced(value: Value) -> Value:
    view = value.view
    if view is None or not is_repeated(view.axes[0]):
        return value._replace(view=None)
    return value._replace(view=view.with_axes(view.axes[1:]))


def _joined(before: Value, after: Value) -> Value:
    together = before.together or after.together
    return Value(_agreed([before.view, after.view], after.view), together)
