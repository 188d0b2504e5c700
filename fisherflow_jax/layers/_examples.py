"""Where the examples are in every value of a program that takes a whole batch.

The examples' axis is followed through shape operations, products, reductions and loops.
What combines several examples is noted on the values that depend on it, and so is what
the axis was lost in, so that a model says of itself whether its examples interact, or
that it cannot be told.
"""

from collections.abc import Iterable, Sequence

from fisherflow_jax.layers import _compat
from fisherflow_jax.layers import _loops as loops
from fisherflow_jax.layers._compat import Equation, Path, Program
from fisherflow_jax.layers._places import places
from fisherflow_jax.layers._values import (
    Examples,
    Value,
    agreed,
    checked,
    differing,
    met,
    no_example,
    runs,
    shown_by_all,
)
from fisherflow_jax.layers._views import Axis, NotStrided, View, is_repeated, length


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
        for atom, result in zip(equation.outputs, results, strict=True):
            known[atom.variable] = checked(result, atom.shape, equation.name)
        rows |= below
        rows[here] = Examples(operands, values_of(equation.outputs))
    return list(values_of(program.outputs)), rows


def _step(
    equation: Equation, operands: Sequence[Value], count: int, path: Path
) -> tuple[Sequence[Value], dict[Path, Examples]]:
    operation = equation.operation
    match operation:
        case _compat.Call() | _compat.Opaque():
            return follow(_compat.read(operation.body), operands, count, path)
        case _compat.Scan():
            return loops.scan(follow, operation, operands, count, path)
        case _compat.While():
            return loops.while_loop(follow, operation, operands, count), {}
        case _compat.Cond():
            return loops.cond(follow, operation, operands, count), {}
        case _compat.Solve():
            given = [operands[i] for i in operation.operands]
            return follow(_compat.read(operation.body), given, count)[0], {}
        case _compat.Reorder():
            return [_reordered(operation, value) for value in operands], {}
        case _compat.StopGradient():
            return operands, {}
    results = [_placed(equation, x.shape, operands, count) for x in equation.outputs]
    return [result.after(operands) for result in results], {}


def _reordered(operation: _compat.Reorder, value: Value) -> Value:
    view, differs = value.view, value.differs
    try:
        view = view and operation.apply(view)
    except NotStrided:
        return value._replace(view=None)  # which is noted by who checks it
    try:
        differs = differs and operation.apply(differs)
    except NotStrided:
        differs = view and differing(view.shape, [])
    return value._replace(view=view, differs=differs)


def _placed(
    equation: Equation, shape: tuple[int, ...], operands: Sequence[Value], count: int
) -> Value:
    """Of an output of this shape: operands' axes of examples, at their places in it."""
    name, moved = equation.name, places(equation, shape)
    views: list[View] = []
    meets = False
    for value, (place_of, meeting) in zip(operands, moved, strict=True):
        if value.view is None:
            return Value(None)
        axes: list[Axis] = [((size, 0),) for size in shape]
        for i, axis in enumerate(value.view.axes):
            if is_repeated(axis):
                continue
            meets |= i in meeting
            place = place_of.get(i)
            if place is not None and shape[place] == length(axis):
                axes[place] = axis
            elif i not in meeting:
                return Value(None, lost=name)  # some of the examples, or another order
        views.append(value.view.with_axes(axes))
    view = agreed(views) if views else shown_by_all(count, shape)
    if isinstance(equation.operation, _compat.Dot):
        meets |= view is None  # each example of one side with each of the other
    together = f"{name} over the examples" if meets else None
    if view is None or (meets and name == "sort"):
        return Value(None, together, lost=None if meets else name)
    shared = [
        (value, _moved(value.differs, place_of, shape))
        for value, (place_of, _) in zip(operands, moved, strict=True)
        if value.differs is not None
    ]
    if runs(view):
        found = [met(view, axes, value, name) for value, axes in shared]
        return Value(view, together).after(found)
    if meets or len(shared) < len(operands):  # reduced over the examples
        return Value(view, together, differs=differing(shape, []))
    return _of_no_example(equation, view, shape, [axes for _, axes in shared])


def _of_no_example(
    equation: Equation, view: View, shape: tuple[int, ...], parts: list[list]
) -> Value:
    operation = equation.operation
    if isinstance(operation, _compat.Iota):
        parts = [[((n, 1 if i == operation.axis else 0),) for i, n in enumerate(shape)]]
    drawn = isinstance(operation, _compat.Random)
    return Value(view, differs=differing(shape, parts), drawn=drawn)


def _moved(
    differs: View, place_of: dict[int, int], shape: tuple[int, ...]
) -> list[Axis | None]:
    """How an operand differs along the output's axes; None: it is not said."""
    axes: list[Axis | None] = [None] * len(shape)
    for i, axis in enumerate(differs.axes):
        place = place_of.get(i)
        if place is not None:
            part = length(axis) != shape[place]
            axes[place] = (
                ((shape[place], 0 if is_repeated(axis) else 1),) if part else axis
            )
    return axes
