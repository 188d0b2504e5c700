"""The abstract walk of a program: which parameter enters which linear operation.

Values are followed only as far as they are still a view of one parameter, or of the
output of one linear operation (where a bias may be added). Everything else is None.
"""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from fisherflow_jax.layers import _compat
from fisherflow_jax.layers import _terms as of
from fisherflow_jax.layers import _views as views
from fisherflow_jax.layers._compat import Atom, Equation, Path, Program
from fisherflow_jax.layers._linear import Dense, Embedding, Experts, NotLinear, match
from fisherflow_jax.layers._parts import Part
from fisherflow_jax.layers._terms import (
    Factor,
    Fixed,
    Parameter,
    Product,
    Scans,
    terms,
)
from fisherflow_jax.layers._views import NotStrided, View


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
    scale: float = 1.0  # of the kernel
    # of a kernel that is a product: the other factor, which what enters (or what
    # returns) has passed on the way
    before: Factor | None = None
    behind: Factor | None = None
    part: Part | None = None  # of the kernel, or of the operation
    entering: Any = None  # the variable of the other operand
    beside: bool = False  # whether it goes with the use before, of another part
    mixed: bool = False  # of a whole batch: whether its rows are of no one example


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
    products: list[Product]

    def leaves(self, term: Parameter) -> list[int]:
        own = term.leaf
        return [own] if own >= 0 else [x.leaf for x in self.products[~own]]

    def reject(self, value: Any, reason: str) -> None:
        for term in terms(value):
            for leaf in self.leaves(term):
                self.reasons.setdefault(leaf, term.after or reason)
                self.times[leaf] += 1


def walk(
    program: Program, shapes: list[tuple[int, ...]], shared: Sequence[bool]
) -> Walk:
    """Walks a program whose first inputs are parameters of these shapes.

    Of the others it is told which are shared by all examples.
    """
    empty = (i for i, shape in enumerate(shapes) if math.prod(shape) == 0)
    reasons = dict.fromkeys(empty, "without entries")
    found = _nothing()._replace(reasons=reasons)
    values: list[Any] = [
        Parameter(i, views.whole(shape), ()) for i, shape in enumerate(shapes)
    ]
    values += [Fixed() if each else None for each in shared]
    for output in _body(found, program, values, (), ()):
        found.reject(output, "returned as an output")
    return found


def _nothing() -> Walk:
    return Walk([], [], {}, set(), Counter(), [])


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
                _note_broadcast(found, place, operands[place], path, scans, output)
            if isinstance(operation, _compat.Add):
                if _merge_bias(found, operands, output.shape):
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
        uses = _uses(found, equation, operands, path, scans)
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
        trial = _nothing()._replace(products=list(found.products))
        results = _body(trial, body, inside, path, scans)
        other = [i for i in carried if results[i - carries.start] != inside[i]]
        if not other:
            return changed
        changed += other
        inside = [None if i in changed else x for i, x in enumerate(inside)]


def _uses(
    found: Walk, equation: Equation, operands: list, path: Path, scans: Scans
) -> list[Use]:
    """Of each parameter in the one operand that has any; the last has its outputs."""
    place = next(i for i, x in enumerate(operands) if terms(x))
    linear, output, uses = match(equation, place), equation.outputs[0], []
    rows = linear.outputs(views.whole(output.shape)).shape[1]
    for term in terms(operands[place]):
        plain = term.leaf >= 0 and term.scale == 1 and term.box is None
        if isinstance(linear, Embedding) and not plain:
            raise NotLinear(f"used in {equation.name}")  # it enters as ids, not rows
        try:
            kernel, part = of.placed(term, linear.kernel(term.view))
        except NotStrided:
            raise NotLinear(f"reshaped before {equation.name}") from None
        if not kernel.is_bijection:
            raise NotLinear(f"broadcast before {equation.name}")
        # T: the positions of one output, for each step of a scan that shares the kernel
        shared = [n for n, own in zip(scans, term.sliced, strict=True) if not own]
        use = Use(
            path=path,
            linear=linear,
            leaf=term.leaf,
            kernel=kernel,
            scans=scans,
            sliced=term.sliced,
            output=output,
            num_positions=math.prod([*shared, rows]),
            scale=term.scale,
            part=part,
            entering=equation.inputs[linear.operand].variable,
        )
        if term.leaf >= 0:
            uses.append(use)
            continue
        try:
            first, last = of.factors(found.products[~term.leaf], kernel)
        except NotStrided:
            raise NotLinear(f"reshaped before {equation.name}") from None
        uses.append(use._replace(leaf=first.leaf, kernel=first.view, behind=last))
        uses.append(use._replace(leaf=last.leaf, kernel=last.view, before=first))
    return uses


def _note_broadcast(
    found: Walk, place: int, value: Parameter, path: Path, scans: Scans, output: Atom
) -> None:
    known = isinstance(value, Parameter) and value.leaf >= 0 and value.box is None
    if not known or value.scale != 1:
        return
    dimensions = range(len(value.view.shape))
    if len(dimensions) not in (0, len(output.shape)):
        return
    view = value.view.broadcast(output.shape, dimensions)
    around = zip(value.slices, scans, strict=True)
    sliced = [axis or ((size, 0),) for axis, size in around]
    view = view.with_axes([*sliced, *view.axes])
    found.broadcasts.append(Broadcast(path, place, value.leaf, view, scans, output))


def _merge_bias(found: Walk, operands: list, shape: tuple[int, ...]) -> bool:
    """Whether an addition adds biases to the output of uses; if so, notes them."""
    match operands:
        case [Output() as output, added] | [added, Output() as output] if terms(added):
            pass
        case _:
            return False
    if not output.view.is_bijection or output.view.shape != shape:
        return False
    owned = [_owned(found, output, term, shape) for term in terms(added)]
    owners = {owner for owner, _ in owned}
    if None in owners or len(owners) < len(owned):
        return False
    for owner, bias in owned:
        found.uses[owner] = found.uses[owner]._replace(bias=bias)
        found.times[bias.leaf] += 1
    return True


def _owned(
    found: Walk, output: Output, term: Parameter, shape: tuple[int, ...]
) -> tuple[Any, Any]:
    """The use whose bias a term is; `(None, None)`: there is none."""
    none, path = (None, None), found.uses[output.use].path
    if term.leaf < 0 or term.scale != 1 or len(term.view.shape) != len(shape):
        return none
    # axes of length 1 may be left for the addition to broadcast
    added = term.view.broadcast(shape, range(len(shape)))
    for owner, use in enumerate(found.uses):
        if use.path != path or not _may_own(use, term):
            continue
        try:
            # what is added at each place of the operation's own output, as (K, T, O)
            by_feature = use.linear.outputs(views.reordered(added, output.view))
            stacks, _, features = by_feature.axes
            bias, part = of.placed(term, by_feature.with_axes([stacks, features]))
        except NotStrided:
            return none
        # one that differs between positions has more entries than the features
        same = use.part == (part and part._replace(axis=2 * part.axis))
        if same and bias.is_bijection:
            return owner, Bias(term.leaf, bias)
    return none


def _may_own(use: Use, bias: Parameter) -> bool:
    # ids out of bounds have outputs that depend on the bias alone, and so have rows
    # of no expert
    partial = isinstance(use.linear, Experts)
    if isinstance(use.linear, Embedding):
        partial = not use.linear.gather.clips
    return not partial and use.behind is None and use.sliced == bias.sliced
