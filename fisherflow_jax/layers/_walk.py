"""The abstract walk of a program: which parameter enters which linear operation.

Values are followed only as far as they are still a view of one parameter, or of the
output of one linear operation (where a bias may be added). Everything else is None.
"""

import math
from collections import Counter
from typing import Any

import jax.numpy as jnp

from fisherflow_jax.layers import _compat
from fisherflow_jax.layers import _views as views
from fisherflow_jax.layers._compat import Atom, Equation, Program
from fisherflow_jax.layers._linear import Embedding, NotLinear, match
from fisherflow_jax.layers._uses import (
    Bias,
    Broadcast,
    Output,
    Parameter,
    Path,
    Use,
    Walk,
)
from fisherflow_jax.layers._views import Axis, NotStrided, View


def walk(program: Program, shapes: list[tuple[int, ...]]) -> Walk:
    """Walks a program whose first inputs are parameters of these shapes."""
    empty = (i for i, shape in enumerate(shapes) if math.prod(shape) == 0)
    reasons = dict.fromkeys(empty, "without entries")
    found = Walk([], [], reasons, set(), Counter())
    values: list[Any] = [
        Parameter(i, views.whole(shape), ()) for i, shape in enumerate(shapes)
    ]
    values += [None] * (len(program.inputs) - len(values))
    for output in _body(found, program, values, (), ()):
        found.reject(output, "returned as an output")
    return found


def _body(
    found: Walk, program: Program, values: list, path: Path, scans: tuple[int, ...]
) -> list:
    known = dict(zip(program.inputs, values, strict=True))
    times_used = _times_used(program)

    def value_of(atom: Atom) -> Any:
        value = known.get(atom.variable)
        # an output used twice has a gradient that no single bias has
        shared = isinstance(value, Output) and times_used[atom.variable] > 1
        return None if shared else value

    for i, equation in enumerate(program.equations):
        operands = [value_of(atom) for atom in equation.inputs]
        if any(operand is not None for operand in operands):
            results = _step(found, equation, operands, (*path, i), scans)
            for atom, result in zip(equation.outputs, results, strict=True):
                known[atom.variable] = result
    return [value_of(atom) for atom in program.outputs]


def _times_used(program: Program) -> dict[Any, int]:
    times: dict[Any, int] = {}
    for equation in program.equations:
        for atom in equation.inputs:
            times[atom.variable] = times.get(atom.variable, 0) + 1
    for atom in program.outputs:
        times[atom.variable] = times.get(atom.variable, 0) + 1
    return times


def _step(
    found: Walk, equation: Equation, operands: list, path: Path, scans: tuple[int, ...]
) -> list:
    """What the outputs of an equation are, where an operand is followed."""
    operation = equation.operation
    unknown = [None] * len(equation.outputs)
    if isinstance(operation, _compat.Add | _compat.Elementwise):
        _note_broadcast(found, equation, operands, path, scans)
    match operation:
        case _compat.Reorder():
            return [
                _reordered(found, operation, operand, before, after)
                for operand, before, after in zip(
                    operands, equation.inputs, equation.outputs, strict=True
                )
            ]
        case _compat.Call():
            return _body(found, _compat.read(operation.body), operands, path, scans)
        case _compat.Scan():
            _scan(found, operation, operands, path, scans)
            return unknown
        case _compat.StopGradient():
            found.stopped.update(x.leaf for x in operands if isinstance(x, Parameter))
            return unknown
        case _compat.Add():
            if _merge_bias(found, equation, operands):
                return unknown
            if not any(isinstance(operand, Parameter) for operand in operands):
                return [_summand(equation, operands)]
    parameters = [i for i, x in enumerate(operands) if isinstance(x, Parameter)]
    try:
        if len(parameters) > 1 and equation.name == "dot_general":
            raise NotLinear("multiplied by another parameter")
        if len(parameters) != 1:
            raise NotLinear(f"used in {equation.name}")
        use = _use(equation, parameters[0], operands[parameters[0]], path, scans)
    except NotLinear as reason:
        for operand in operands:
            found.reject(operand, str(reason))
        return unknown
    found.uses.append(use)
    return [Output(len(found.uses) - 1, views.whole(use.output.shape))]


def _reordered(
    found: Walk, operation: _compat.Reorder, value: Any, before: Atom, after: Atom
) -> Any:
    if value is None:
        return None
    if not jnp.issubdtype(after.dtype, jnp.floating):
        found.reject(value, f"converted to {after.dtype}")
        return None
    try:
        return value._replace(view=operation.apply(value.view))
    except NotStrided:
        found.reject(value, f"reshaped to {after.shape} across what it was made of")
        return None


def _scan(
    found: Walk, scan: _compat.Scan, operands: list, path: Path, scans: tuple[int, ...]
) -> None:
    first_slice = scan.num_constants + scan.num_carries
    inside: list[Any] = []
    for i, value in enumerate(operands):
        entering = None
        if isinstance(value, Parameter):
            if i < scan.num_constants:
                entering = value._replace(slices=(*value.slices, None))
            elif i < first_slice:
                found.reject(value, "carried through scan")
            else:
                entering = _slice(value)
        inside.append(entering)
    body = _compat.read(scan.body)
    for result in _body(found, body, inside, path, (*scans, scan.length)):
        found.reject(result, "returned from scan")


def _slice(value: Parameter) -> Parameter:
    axis, *rest = value.view.axes
    view = View(value.view.leaf_shape, tuple(rest), value.view.offset)
    sliced = None if views.is_repeated(axis) else axis
    return Parameter(value.leaf, view, (*value.slices, sliced))


def _use(
    equation: Equation,
    place: int,
    value: Parameter,
    path: Path,
    scans: tuple[int, ...],
) -> Use:
    linear = match(equation, place)
    output = equation.outputs[0]
    try:
        kernel = _stacked(linear.kernel(value.view), value.slices)
    except NotStrided:
        raise NotLinear(f"reshaped before {equation.name}") from None
    if not kernel.is_bijection:
        raise NotLinear(f"broadcast before {equation.name}")
    positions = linear.outputs(views.whole(output.shape)).shape[1]
    sliced = tuple(axis is not None for axis in value.slices)
    shared = (n for n, is_sliced in zip(scans, sliced, strict=True) if not is_sliced)
    positions *= math.prod(shared)
    return Use(path, linear, value.leaf, kernel, scans, sliced, output, positions)


def _stacked(view: View, slices: tuple[Axis | None, ...]) -> View:
    """The view whose first axis also runs over what scans slice."""
    pieces = [piece for axis in slices if axis is not None for piece in axis]
    first, *rest = view.axes
    axes = (views.merged((*pieces, *first)), *rest)
    return View(view.leaf_shape, axes, view.offset)


def _note_broadcast(
    found: Walk, equation: Equation, operands: list, path: Path, scans: tuple[int, ...]
) -> None:
    output = equation.outputs[0]
    for place, value in enumerate(operands):
        if isinstance(value, Parameter):
            dimensions = range(len(value.view.shape))
            if value.view.shape and len(value.view.shape) != len(output.shape):
                continue
            view = value.view.broadcast(output.shape, dimensions)
            sliced = [
                axis or views.merged([(size, 0)])
                for axis, size in zip(value.slices, scans, strict=True)
            ]
            view = View(view.leaf_shape, (*sliced, *view.axes), view.offset)
            broadcast = Broadcast(path, place, value.leaf, view, scans, output)
            found.broadcasts.append(broadcast)


def _summand(equation: Equation, operands: list) -> Output | None:
    """The operand whose gradient is that of the sum, for a bias that is added next."""
    for operand in operands:
        if operand is not None and operand.view.shape == equation.outputs[0].shape:
            return operand
    return None


def _merge_bias(found: Walk, equation: Equation, operands: list) -> bool:
    """Whether this addition adds a bias to the output of a use; if so, notes it."""
    match operands:
        case [Output() as output, Parameter() as parameter]:
            pass
        case [Parameter() as parameter, Output() as output]:
            pass
        case _:
            return False
    use = found.uses[output.use]
    if isinstance(use.linear, Embedding) and not use.linear.gather.clips:
        # ids out of bounds have outputs that depend on the bias alone
        return False
    sliced = tuple(axis is not None for axis in parameter.slices)
    shape = equation.outputs[0].shape
    if (
        sliced != use.sliced
        or not output.view.is_bijection
        or output.view.shape != shape
        or len(parameter.view.shape) != len(shape)
    ):
        return False
    # axes of length 1 may be left for the addition to broadcast
    added = parameter.view.broadcast(shape, range(len(shape)))
    try:
        by_output = views.reordered(added, output.view)
        by_feature = use.linear.outputs(by_output)
    except NotStrided:
        return False
    stacks, _, features = by_feature.axes
    bias = View(by_feature.leaf_shape, (stacks, features), by_feature.offset)
    bias = _stacked(bias, parameter.slices)
    # one that differs between positions has more entries than the features
    if not bias.is_bijection:
        return False
    found.uses[output.use] = use._replace(bias=Bias(parameter.leaf, bias))
    found.times[parameter.leaf] += 1
    return True
