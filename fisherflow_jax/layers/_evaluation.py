"""Evaluating a program while tapping it: what enters its layers, and what returns.

The program is evaluated as it is, but at each layer the operand is handed out and a
zero is added to the derivative's path, so that pulling back stops there.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from fisherflow_jax.layers import _compat
from fisherflow_jax.layers._compat import Equation, Path, Program
from fisherflow_jax.layers._found import Broadcast, Use
from fisherflow_jax.layers._tracing import Traced

PyTree = Any
# What is tapped: at a linear layer the output; at a parameter that meets others entry
# by entry the operand. A zero (*scans, *output.shape) is added there.
Taps = dict[Path, Use | Broadcast]
Arrays = dict[Path, jax.Array]


def evaluate(
    traced: Traced, others: Sequence[int]
) -> tuple[PyTree, Arrays, Callable[[PyTree], tuple[Arrays, dict[int, jax.Array]]]]:
    """Outputs, the operands of tapped layers, and how to pull back to all taps.

    `others` are leaves to which whole gradients are pulled back.
    """
    tapped: list[Use | Broadcast] = [*traced.broadcasts, *sum(traced.uses, ())]
    taps = {tap.path: tap for tap in tapped}
    zeros = {
        path: jnp.zeros((*tap.scans, *tap.output.shape), tap.output.dtype)
        for path, tap in taps.items()
    }
    kept = {i: traced.arguments[i] for i in others}

    def run(zeros: Arrays, others: dict[int, jax.Array]):
        values = [others.get(i, x) for i, x in enumerate(traced.arguments)]
        outputs, operands = _evaluate(traced.program, values, taps, zeros, ())
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
    program: Program, values: Sequence[Any], taps: Taps, zeros: Arrays, path: Path
) -> tuple[list, Arrays]:
    """The outputs, and what entered each tapped layer; zeros are those in this body."""
    known = {**program.constants, **dict(zip(program.inputs, values, strict=True))}
    entered: Arrays = {}
    inside: dict[int, Arrays] = {}  # the zeros in each equation
    for tapped, zero in zeros.items():
        inside.setdefault(tapped[len(path)], {})[tapped] = zero

    def values_of(atoms: Sequence[_compat.Atom]) -> list:
        return [x.value if x.variable is None else known[x.variable] for x in atoms]

    for i, equation in enumerate(program.equations):
        here, operands = (*path, i), values_of(equation.inputs)
        match taps.get(here):
            case Broadcast(place=place):
                repeated = jnp.broadcast_to(operands[place], zeros[here].shape)
                operands[place] = _tapped(repeated, zeros[here])
                results = equation.evaluate(operands)
            case Use(linear=linear):
                entered[here] = linear.enters(operands)
                zero = linear.returns(zeros[here], operands)
                results = [_tapped(equation.evaluate(operands)[0], zero)]
            case _ if i in inside:
                results, below = _evaluate_body(
                    equation, operands, taps, inside[i], here
                )
                entered |= below
            case _:
                results = equation.evaluate(operands)
        variables = (atom.variable for atom in equation.outputs)
        known |= zip(variables, results, strict=True)
    return values_of(program.outputs), entered


def _evaluate_body(
    equation: Equation, operands: list, taps: Taps, zeros: Arrays, path: Path
) -> tuple[list, Arrays]:
    operation = equation.operation
    body = _compat.read(operation.body)

    def call(operands: list, zeros: Arrays) -> tuple[list, Arrays]:
        return _evaluate(body, operands, taps, zeros, path)

    if isinstance(operation, _compat.Call):
        return operation.wrap(call)(operands, zeros)

    first, carries = operation.num_constants, operation.num_carries

    def step(carry: list, slices: tuple[list, Arrays]):
        values, zeros = slices
        results, entered = call([*operands[:first], *carry, *values], zeros)
        return results[:carries], (results[carries:], entered)

    last, (stacked, entered) = jax.lax.scan(
        step,
        operands[first : first + carries],
        (operands[first + carries :], zeros),
        length=operation.length,
        reverse=operation.reverse,
        unroll=operation.unroll,
    )
    return [*last, *stacked], entered
