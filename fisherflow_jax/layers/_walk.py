"""The abstract walk of a program: which parameter enters which linear operation.

Values are followed only as far as they are still a view of one parameter, or of the
output of one linear operation (where a bias may be added). Everything else is None.
"""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from fisherflow_jax.layers import _compat
from fisherflow_jax.layers import _terms as of
from fisherflow_jax.layers import _views as views
from fisherflow_jax.layers._compat import Atom, Equation, Path, Program
from fisherflow_jax.layers._found import (
    Output,
    Walk,
    merge_bias,
    note_broadcast,
    nothing,
    uses_of,
)
from fisherflow_jax.layers._linear import NotLinear
from fisherflow_jax.layers._terms import Fixed, Parameter, Scans, terms
from fisherflow_jax.layers._views import NotStrided


def walk(
    program: Program, shapes: list[tuple[int, ...]], shared: Sequence[bool]
) -> Walk:
    """Walks a program whose first inputs are parameters of these shapes.

    Of the others it is told which are shared by all examples.
    """
    empty = (i for i, shape in enumerate(shapes) if math.prod(shape) == 0)
    reasons = dict.fromkeys(empty, "without entries")
    found = nothing()._replace(reasons=reasons)
    values: list[Any] = [
        Parameter(i, views.whole(shape), ()) for i, shape in enumerate(shapes)
    ]
    values += [Fixed() if each else None for each in shared]
    for output in _body(found, program, values, (), ()):
        found.reject(output, "returned as an output")
    return found


def _body(
    found: Walk, program: Program, values: list, path: Path, scans: Scans
) -> list:
    known = {variable: of.fixed(x) for variable, x in program.constants.items()}
    known |= zip(program.inputs, values, strict=True)
    every = [equation.inputs for equation in program.equations] + [program.outputs]
    times_used = Counter(atom.variable for atoms in every for atom in atoms)

    def value_of(atom: Atom) -> Any:
        if atom.variable is None:
            return of.fixed(atom.value)
        value = known.get(atom.variable)
        # an output used twice has a gradient that no single bias has
        shared = isinstance(value, Output) and times_used[atom.variable] > 1
        return None if shared else value

    for i, equation in enumerate(program.equations):
        operands = [value_of(atom) for atom in equation.inputs]
        if all(isinstance(operand, Fixed) for operand in operands):
            results = [Fixed()] * len(equation.outputs)
            if isinstance(equation.operation, _compat.Reorder):
                results = operands
        elif all(operand is None or isinstance(operand, Fixed) for operand in operands):
            continue
        else:
            results = _step(found, equation, operands, (*path, i), scans)
        known |= zip((x.variable for x in equation.outputs), results, strict=True)
    return [value_of(atom) for atom in program.outputs]


def _step(
    found: Walk, equation: Equation, operands: list, path: Path, scans: Scans
) -> list:
    """What the outputs of an equation are, where an operand is followed."""
    operation = equation.operation
    unknown = [None] * len(equation.outputs)
    parameters = [i for i, x in enumerate(operands) if terms(x)]
    match operation:
        case _compat.Reorder():
            every = zip(operands, equation.outputs, strict=True)
            return [_reordered(found, operation, value, x) for value, x in every]
        case _compat.Call():
            return _body(found, _compat.read(operation.body), operands, path, scans)
        case _compat.Scan():
            return _scan(found, operation, operands, path, scans)
        case _compat.StopGradient():
            stopped = [found.leaves(x) for i in parameters for x in terms(operands[i])]
            found.stopped.update(*stopped)
            return [Fixed()] if parameters else unknown
        case _compat.Cut() if parameters:
            made = of.cut(operation, operands[0])
            if made is not None:
                return made
        case _compat.Join() | _compat.Stack():
            whole = of.concatenated(equation, operands, scans)
            if whole is not None:
                return [whole]
        case _compat.Add() | _compat.Elementwise():
            combined = of.combined(equation, operands)
            if combined is not None:
                return [combined]
            output = equation.outputs[0]
            for place in parameters:
                note_broadcast(found, place, operands[place], path, scans, output)
            if isinstance(operation, _compat.Add):
                if merge_bias(found, operands, output.shape):
                    return unknown
                if not parameters:
                    # the operand whose gradient is the sum's: a bias may be added next
                    outputs = (x for x in operands if isinstance(x, Output))
                    known = (x for x in outputs if x.view.shape == output.shape)
                    return [next(known, None)]
    try:
        if len(parameters) > 1 and equation.name == "dot_general":
            factors, value = of.product(equation, operands, scans)
            found.products.append(factors)
            return [value._replace(leaf=~(len(found.products) - 1))]
        if len(parameters) != 1:
            raise NotLinear(f"used in {equation.name}")
        uses = uses_of(found, equation, operands, path, scans)
    except NotLinear as reason:
        for operand in operands:
            found.reject(operand, str(reason))
        return unknown
    found.uses.extend(uses)
    return [Output(len(found.uses) - 1, views.whole(equation.outputs[0].shape))]


def _reordered(found: Walk, operation: _compat.Reorder, value: Any, after: Atom) -> Any:
    def moved(value: Any) -> Any:
        return value._replace(view=operation.apply(value.view))

    if isinstance(value, Fixed):
        return value
    try:
        if value is not None and jnp.issubdtype(after.dtype, jnp.floating):
            return of.each(moved, value) if terms(value) else moved(value)
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

    def whole(term: Parameter) -> Parameter:
        return term._replace(slices=(*term.slices, None))

    def of_step(term: Parameter) -> Parameter:
        axis, *rest = term.view.axes
        sliced = None if views.is_repeated(axis) else axis
        view = term.view.with_axes(rest)
        return term._replace(view=view, slices=(*term.slices, sliced))

    def of_all_steps(term: Parameter) -> Parameter:
        *slices, own = term.slices
        axes = own or ((scan.length, 0),), *term.view.axes
        return term._replace(view=term.view.with_axes(axes), slices=tuple(slices))

    inside: list[Any] = [None] * len(operands)
    for i, value in enumerate(operands):
        if terms(value):
            inside[i] = of.each(whole if i < end else of_step, value)
        elif isinstance(value, Fixed) and not constants <= i < end:
            inside[i] = Fixed()
    for i in _changed(found, body, inside, range(constants, end), path, around):
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
        elif terms(result):
            value = of.each(of_all_steps, result)
        after.append(value)
    return after


def _changed(
    found: Walk, body: Program, inside: list, carries: range, path: Path, scans: Scans
) -> list[int]:
    """The carried parameters that a scan's body does not hand back as they were."""
    changed: list[int] = []
    while True:
        carried = [i for i in carries if terms(inside[i])]
        if not carried:
            return changed
        trial = nothing()._replace(products=list(found.products))
        results = _body(trial, body, inside, path, scans)
        other = [i for i in carried if results[i - carries.start] != inside[i]]
        if not other:
            return changed
        changed += other
        inside = [None if i in changed else x for i, x in enumerate(inside)]
