"""The abstract walk of a program: which parameter enters which linear operation.

Values are followed only as far as they are still a view of one parameter, or of the
output of one linear operation (where a bias may be added). Everything else is None.
"""

import math
from collections import Counter
from typing import Any, NamedTuple

import jax.numpy as jnp

from fisherflow_jax.layers import _compat
from fisherflow_jax.layers import _views as views
from fisherflow_jax.layers._compat import Atom, Equation, Path, Program
from fisherflow_jax.layers._linear import Dense, Embedding, NotLinear, match
from fisherflow_jax.layers._views import Axis, NotStrided, View

Scans = tuple[int, ...]  # lengths of the scans around, the outermost first


class Parameter(NamedTuple):
    """A view of a parameter, or of one slice of it within scans."""

    leaf: int
    view: View
    slices: tuple[Axis | None, ...]  # for each scan around: what it slices; None: whole


class Output(NamedTuple):
    """A view of what a linear operation put out, used nowhere else so far.

    Or of its sum with something else: what counts is that its gradient is the output's.
    """

    use: int
    view: View


class Bias(NamedTuple):
    """A parameter that is added to the outputs of one use."""

    leaf: int
    view: View  # (K, O)


class Use(NamedTuple):
    """One linear operation that a parameter enters."""

    path: Path
    linear: Dense
    leaf: int
    kernel: View  # (K, I, O)
    scans: Scans
    sliced: tuple[bool, ...]  # for each of them, whether it slices the kernel
    output: Atom
    num_positions: int
    bias: Bias | None = None
    turned: bool = False  # whether its layer's kernel is this one's transpose


class Broadcast(NamedTuple):
    """A parameter that meets other values entry by entry, repeated along some axes."""

    path: Path
    place: int  # of the parameter, among the operands
    leaf: int
    view: View  # (*scans, *output.shape)
    scans: Scans
    output: Atom


class Walk(NamedTuple):
    """What a walk finds."""

    uses: list[Use]
    broadcasts: list[Broadcast]
    reasons: dict[int, str]  # leaf -> why it is no layer's
    stopped: set[int]  # leaves with a use that has no gradient
    times: Counter[int]  # leaf -> uses that are no layer's kernel

    def reject(self, value: Any, reason: str) -> None:
        if isinstance(value, Parameter):
            self.reasons.setdefault(value.leaf, reason)
            self.times[value.leaf] += 1


def walk(program: Program, shapes: list[tuple[int, ...]]) -> Walk:
    """Walks a program whose first inputs are parameters of these shapes."""
    empty = (i for i, shape in enumerate(shapes) if math.prod(shape) == 0)
    reasons = dict.fromkeys(empty, "without entries")
    found = _nothing()._replace(reasons=reasons)
    values: list[Any] = [
        Parameter(i, views.whole(shape), ()) for i, shape in enumerate(shapes)
    ]
    values += [None] * (len(program.inputs) - len(values))
    for output in _body(found, program, values, (), ()):
        found.reject(output, "returned as an output")
    return found


def _nothing() -> Walk:
    return Walk([], [], {}, set(), Counter())


def _body(
    found: Walk, program: Program, values: list, path: Path, scans: Scans
) -> list:
    known = dict(zip(program.inputs, values, strict=True))
    every = [equation.inputs for equation in program.equations] + [program.outputs]
    times_used = Counter(atom.variable for atoms in every for atom in atoms)

    def value_of(atom: Atom) -> Any:
        value = known.get(atom.variable)
        # an output used twice has a gradient that no single bias has
        shared = isinstance(value, Output) and times_used[atom.variable] > 1
        return None if shared else value

    for i, equation in enumerate(program.equations):
        operands = [value_of(atom) for atom in equation.inputs]
        if any(operand is not None for operand in operands):
            results = _step(found, equation, operands, (*path, i), scans)
            known |= zip((x.variable for x in equation.outputs), results, strict=True)
    return [value_of(atom) for atom in program.outputs]


def _step(
    found: Walk, equation: Equation, operands: list, path: Path, scans: Scans
) -> list:
    """What the outputs of an equation are, where an operand is followed."""
    operation = equation.operation
    unknown = [None] * len(equation.outputs)
    parameters = [i for i, x in enumerate(operands) if isinstance(x, Parameter)]
    match operation:
        case _compat.Reorder():
            every = zip(operands, equation.outputs, strict=True)
            return [_reordered(found, operation, value, x) for value, x in every]
        case _compat.Call():
            return _body(found, _compat.read(operation.body), operands, path, scans)
        case _compat.Scan():
            return _scan(found, operation, operands, path, scans)
        case _compat.StopGradient():
            found.stopped.update(operands[i].leaf for i in parameters)
            return unknown
        case _compat.Add() | _compat.Elementwise():
            output = equation.outputs[0]
            for place in parameters:
                _note_broadcast(found, place, operands[place], path, scans, output)
            if isinstance(operation, _compat.Add):
                if _merge_bias(found, operands, output.shape):
                    return unknown
                if not parameters:
                    # the operand whose gradient is the sum's: a bias may be added next
                    known = (x for x in operands if x and x.view.shape == output.shape)
                    return [next(known, None)]
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


def _reordered(found: Walk, operation: _compat.Reorder, value: Any, after: Atom) -> Any:
    try:
        if value is not None and jnp.issubdtype(after.dtype, jnp.floating):
            return value._replace(view=operation.apply(value.view))
        reason = f"converted to {after.dtype}"
    except NotStrided:
        reason = f"reshaped to {after.shape} across what it was made of"
    found.reject(value, reason)
    return None


def _scan(
    found: Walk, scan: _compat.Scan, operands: list, path: Path, scans: Scans
) -> list:
    """What comes out: a parameter, or slices of it, may be handed back as they were."""
    constants, end = scan.num_constants, scan.num_constants + scan.num_carries
    body, around = _compat.read(scan.body), (*scans, scan.length)
    inside: list[Any] = [None] * len(operands)
    for i, value in enumerate(operands):
        if isinstance(value, Parameter) and i < end:
            inside[i] = value._replace(slices=(*value.slices, None))
        elif isinstance(value, Parameter):
            axis, *rest = value.view.axes
            sliced = None if views.is_repeated(axis) else axis
            view = value.view.with_axes(rest)
            inside[i] = Parameter(value.leaf, view, (*value.slices, sliced))
    for i in _changed(body, inside, range(constants, end), path, around):
        found.reject(operands[i], "carried through scan")
        operands = [*operands[:i], None, *operands[i + 1 :]]
        inside[i] = None
    after: list[Any] = []
    for i, result in enumerate(_body(found, body, inside, path, around)):
        value = None
        if i < scan.num_carries and inside[constants + i] is not None:
            value = operands[constants + i]
        elif i < scan.num_carries:
            found.reject(result, "carried through scan")
        elif isinstance(result, Parameter):
            *slices, own = result.slices
            axes = own or ((scan.length, 0),), *result.view.axes
            view = result.view.with_axes(axes)
            value = Parameter(result.leaf, view, tuple(slices))
        after.append(value)
    return after


def _changed(
    body: Program, inside: list, carries: range, path: Path, scans: Scans
) -> list[int]:
    """The carried parameters that a scan's body does not hand back as they were."""
    changed: list[int] = []
    while True:
        carried = [i for i in carries if isinstance(inside[i], Parameter)]
        if not carried:
            return changed
        results = _body(_nothing(), body, inside, path, scans)
        other = [i for i in carried if results[i - carries.start] != inside[i]]
        if not other:
            return changed
        changed += other
        inside = [None if i in changed else x for i, x in enumerate(inside)]


def _use(
    equation: Equation, place: int, value: Parameter, path: Path, scans: Scans
) -> Use:
    linear, output = match(equation, place), equation.outputs[0]
    try:
        kernel = _stacked(linear.kernel(value.view), value.slices)
    except NotStrided:
        raise NotLinear(f"reshaped before {equation.name}") from None
    if not kernel.is_bijection:
        raise NotLinear(f"broadcast before {equation.name}")
    # T: the positions of one output, for each step of a scan that shares the kernel
    sliced = tuple(axis is not None for axis in value.slices)
    shared = [n for n, is_sliced in zip(scans, sliced, strict=True) if not is_sliced]
    positions = math.prod([*shared, linear.outputs(views.whole(output.shape)).shape[1]])
    return Use(
        path=path,
        linear=linear,
        leaf=value.leaf,
        kernel=kernel,
        scans=scans,
        sliced=sliced,
        output=output,
        num_positions=positions,
    )


def _stacked(view: View, slices: tuple[Axis | None, ...]) -> View:
    """The view whose first axis also runs over what scans slice."""
    # a scan's slice [s] of leaf[s, k, i, o] is kernel s K + k: scans are the slower
    pieces = [piece for axis in slices if axis is not None for piece in axis]
    return view.with_axes([(*pieces, *view.axes[0]), *view.axes[1:]])


def _note_broadcast(
    found: Walk, place: int, value: Parameter, path: Path, scans: Scans, output: Atom
) -> None:
    dimensions = range(len(value.view.shape))
    if len(dimensions) not in (0, len(output.shape)):
        return
    view = value.view.broadcast(output.shape, dimensions)
    around = zip(value.slices, scans, strict=True)
    sliced = [axis or ((size, 0),) for axis, size in around]
    view = view.with_axes([*sliced, *view.axes])
    found.broadcasts.append(Broadcast(path, place, value.leaf, view, scans, output))


def _merge_bias(found: Walk, operands: list, shape: tuple[int, ...]) -> bool:
    """Whether an addition adds a bias to the output of a use; if so, notes it."""
    match operands:
        case [Output() as output, Parameter() as parameter]:
            pass
        case [Parameter() as parameter, Output() as output]:
            pass
        case _:
            return False
    use = found.uses[output.use]
    if (
        # ids out of bounds have outputs that depend on the bias alone
        (isinstance(use.linear, Embedding) and not use.linear.gather.clips)
        or tuple(axis is not None for axis in parameter.slices) != use.sliced
        or not output.view.is_bijection
        or output.view.shape != shape
        or len(parameter.view.shape) != len(shape)
    ):
        return False
    # axes of length 1 may be left for the addition to broadcast
    added = parameter.view.broadcast(shape, range(len(shape)))
    try:
        # what is added at each place of the operation's own output, as (K, T, O)
        by_feature = use.linear.outputs(views.reordered(added, output.view))
    except NotStrided:
        return False
    stacks, _, features = by_feature.axes
    bias = _stacked(by_feature.with_axes([stacks, features]), parameter.slices)
    # one that differs between positions has more entries than the features
    if not bias.is_bijection:
        return False
    found.uses[output.use] = use._replace(bias=Bias(parameter.leaf, bias))
    found.times[parameter.leaf] += 1
    return True
