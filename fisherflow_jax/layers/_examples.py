"""Where the examples are in every value of a program that takes a whole batch.

The examples' axis is followed through shape operations, products, reductions and loops
as a `View` of the numbers 0 ... n - 1: the pieces of stride zero are positions within
an example, the others run over the examples. What combines several examples is noted
on the values that depend on it, so that a model says of itself whether its examples
interact.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fisherflow_jax.layers import _compat
from fisherflow_jax.layers import _example_rules as example_rules
from fisherflow_jax.layers._compat import Atom, Equation, Program
from fisherflow_jax.layers._example_rules import Value as Value
from fisherflow_jax.layers._example_rules import has_examples as has_examples
from fisherflow_jax.layers._example_rules import no_example as no_example
from fisherflow_jax.layers._example_rules import repeated, runs
from fisherflow_jax.layers._uses import Path
from fisherflow_jax.layers._views import View, merged


class Examples(NamedTuple):
    """The examples in the operands and in the outputs of an equation."""

    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]


def every_example(count: int, shape: Sequence[int]) -> Value:
    """Of an input whose leading axis is that of the examples."""
    return Value(View((count,), (merged([(count, 1)]), *repeated(shape[1:]))))


def examples_first(view: View, depth: int, values: jax.Array) -> jax.Array:
    """`(*scans, *shape)` as `(n, *scans, *shape of one example)`, `depth` scans."""
    axes = (*(((size, 0),) for size in values.shape[:depth]), *view.axes)
    pieces = [(i, *piece) for i, axis in enumerate(axes) for piece in axis]
    values = values.reshape([size for _, size, _ in pieces])
    flipped = [i for i, (_, _, stride) in enumerate(pieces) if stride < 0]
    values = jnp.flip(values, flipped)
    running = [i for i, (_, _, stride) in enumerate(pieces) if stride != 0]
    running.sort(key=lambda i: -abs(pieces[i][2]))
    within = [i for i, (_, _, stride) in enumerate(pieces) if stride == 0]
    shape = [math.prod(size for size, stride in axis if stride == 0) for axis in axes]
    values = values.transpose([*running, *within])
    return values.reshape((view.leaf_shape[0], *shape))


def follow(
    program: Program, values: Sequence[Value], count: int, path: Path = ()
) -> tuple[list[Value], dict[Path, Examples]]:
    """The examples in the program's outputs, and in each of its equations."""
    known = dict(zip(program.inputs, values, strict=True))
    rows: dict[Path, Examples] = {}

    def value_of(atom: Atom) -> Value:
        found = known.get(atom.variable)
        return no_example(count, atom.shape) if found is None else found

    for i, equation in enumerate(program.equations):
        here = (*path, i)
        operands = [value_of(atom) for atom in equation.inputs]
        results, below = _step(equation, operands, count, here)
        together = next((x.together for x in operands if x.together), None)
        outputs = []
        for atom, result in zip(equation.outputs, results, strict=True):
            outputs.append(
                Value(
                    example_rules.whole(result.view, atom.shape),
                    result.together or together,
                )
            )
            known[atom.variable] = outputs[-1]
        rows |= below
        rows[here] = Examples(tuple(operands), tuple(outputs))
    return [value_of(atom) for atom in program.outputs], rows


def _step(
    equation: Equation, operands: list[Value], count: int, path: Path
) -> tuple[list[Value], dict[Path, Examples]]:
    operation = equation.operation
    if isinstance(operation, _compat.Call | _compat.Opaque):
        return follow(_compat.read(operation.body), operands, count, path)
    if isinstance(operation, _compat.Scan):
        return _scan(operation, operands, count, path)
    return example_rules.outputs(equation, operands, count), {}


def _scan(
    scan: _compat.Scan, operands: list[Value], count: int, path: Path
) -> tuple[list[Value], dict[Path, Examples]]:
    body = _compat.read(scan.body)
    first, end = scan.num_constants, scan.num_constants + scan.num_carries
    slices = [_sliced(value) for value in operands[end:]]
    carries = operands[first:end]
    while True:  # what is carried starts as zeros, and holds examples after a step
        results, rows = follow(
            body, [*operands[:first], *carries, *slices], count, path
        )
        after = [
            _joined(*pair)
            for pair in zip(carries, results[: len(carries)], strict=True)
        ]
        if after == carries:
            break
        carries = after
    stacked = [
        value._replace(
            view=value.view
            and View(
                (count,),
                (merged([(scan.length, 0)]), *value.view.axes),
                value.view.offset,
            )
        )
        for value in results[scan.num_carries :]
    ]
    return [*carries, *stacked], rows


def _sliced(value: Value) -> Value:
    if value.view is None or runs(value.view.axes[0]):
        return value._replace(view=None)
    view = value.view
    return value._replace(view=View(view.leaf_shape, view.axes[1:], view.offset))


def _joined(before: Value, after: Value) -> Value:
    together = before.together or after.together
    if before.view is None or after.view is None:
        return Value(None, together)
    if before.view == after.view or not any(map(runs, before.view.axes)):
        return Value(after.view, together)
    if not any(map(runs, after.view.axes)):
        return Value(before.view, together)
    return Value(None, together)
