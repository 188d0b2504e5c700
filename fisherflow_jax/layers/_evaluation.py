"""Evaluating a program while tapping it: what enters its layers, and what returns.

The program is evaluated as it is, but at each layer the operand is handed out and a
zero is added to the derivative's path, so that pulling back stops there.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fisherflow_jax.layers import _compat
from fisherflow_jax.layers._compat import Equation, Program
from fisherflow_jax.layers._linear import Linear
from fisherflow_jax.layers._tracing import Traced
from fisherflow_jax.layers._uses import Broadcast, Path, Use

PyTree = Any


class Tap(NamedTuple):
    """What to tap by the path of its equation, and the zeros added there.

    At a linear layer the output; at a parameter that meets others entry by entry the
    operand, by its place.
    """

    places: dict[Path, Linear | int]
    zeros: dict[Path, jax.Array]  # (*scans, *output.shape)

    def by_equation(self, depth: int) -> dict[int, "Tap"]:
        """The taps in each equation of a body at this depth of paths."""
        inside: dict[int, Tap] = {}
        for path, place in self.places.items():
            part = inside.setdefault(path[depth], Tap({}, {}))
            part.places[path] = place
            part.zeros[path] = self.zeros[path]
        return inside


def evaluate(
    traced: Traced, others: Sequence[int]
) -> tuple[PyTree, dict[Path, jax.Array], Callable]:
    """Outputs, the operands of tapped layers, and how to pull back to all taps.

    `others` are leaves to which whole gradients are pulled back.
    """
    uses = [use for of_layer in traced.uses for use in of_layer]
    places: dict[Path, Linear | int] = {s.path: s.place for s in traced.broadcasts}
    places |= {use.path: use.linear for use in uses}
    every: list[Use | Broadcast] = [*uses, *traced.broadcasts]
    zeros = {
        tapped.path: jnp.zeros(
            (*tapped.scans, *tapped.output.shape), tapped.output.dtype
        )
        for tapped in every
    }
    kept = {i: traced.arguments[i] for i in others}

    def run(zeros: dict[Path, jax.Array], others: dict[int, jax.Array]):
        filled = dict(enumerate(traced.arguments)) | others
        values = [filled[i] for i in range(len(filled))]
        outputs, operands = _evaluate(traced.program, values, Tap(places, zeros), ())
        return traced.output_tree.unflatten(outputs), operands

    outputs, pull_back, operands = jax.vjp(run, zeros, kept, has_aux=True)
    return outputs, operands, pull_back


@jax.custom_jvp
def _tapped(output: jax.Array, zero: jax.Array) -> jax.Array:
    """`output` itself, with the derivative of `output + zero`."""
    return output


@_tapped.defjvp
def _(primals, tangents):
    return primals[0], tangents[0] + tangents[1]


def _evaluate(
    program: Program, values: Sequence[Any], tap: Tap, path: Path
) -> tuple[list, dict[Path, jax.Array]]:
    """The outputs, and what entered each tapped layer."""
    known = {**program.constants, **dict(zip(program.inputs, values, strict=True))}
    entered: dict[Path, jax.Array] = {}

    def value_of(atom: _compat.Atom) -> Any:
        return atom.value if atom.variable is None else known[atom.variable]

    taps = tap.by_equation(len(path))
    for i, equation in enumerate(program.equations):
        here, inside = (*path, i), taps.get(i)
        operands = [value_of(atom) for atom in equation.inputs]
        if inside is None:
            results = equation.evaluate(operands)
        elif here in inside.places:
            zero, place = inside.zeros[here], inside.places[here]
            if isinstance(place, int):
                repeated = jnp.broadcast_to(operands[place], zero.shape)
                operands[place] = _tapped(repeated, zero)
                results = equation.evaluate(operands)
            else:
                operand = entered[here] = operands[place.operand]
                counts = place.counts(operand)
                if counts is not None:
                    zero = jnp.where(counts, zero, jnp.zeros_like(zero))
                results = [_tapped(equation.evaluate(operands)[0], zero)]
        else:
            results, below = _evaluate_body(equation, operands, inside, here)
            entered |= below
        for atom, result in zip(equation.outputs, results, strict=True):
            known[atom.variable] = result
    return [value_of(atom) for atom in program.outputs], entered


def _evaluate_body(
    equation: Equation, operands: list, tap: Tap, path: Path
) -> tuple[list, dict[Path, jax.Array]]:
    operation = equation.operation
    body = _compat.read(operation.body)
    if isinstance(operation, _compat.Call):

        def call(operands: list, zeros: dict[Path, jax.Array]):
            return _evaluate(body, operands, Tap(tap.places, zeros), path)

        return operation.wrap(call)(operands, tap.zeros)

    first, carries = operation.num_constants, operation.num_carries

    def step(carry: list, slices: tuple[list, dict[Path, jax.Array]]):
        values, zeros = slices
        results, entered = _evaluate(
            body, [*operands[:first], *carry, *values], Tap(tap.places, zeros), path
        )
        return results[:carries], (results[carries:], entered)

    last, (stacked, entered) = jax.lax.scan(
        step,
        operands[first : first + carries],
        (operands[first + carries :], tap.zeros),
        length=operation.length,
        reverse=operation.reverse,
        unroll=operation.unroll,
    )
    return [*last, *stacked], entered
