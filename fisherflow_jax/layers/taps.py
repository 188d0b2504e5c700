"""Evaluating a model while tapping its layers: what enters them, and what returns.

The program is evaluated as it is, but at each layer the operand is handed out and a
zero is added to the derivative's path, so that pulling back stops there.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fisherflow_jax import batch as batches
from fisherflow_jax import vectors
from fisherflow_jax.layers import _compat
from fisherflow_jax.layers._compat import Equation, Program
from fisherflow_jax.layers.finding import trace
from fisherflow_jax.layers.layer import Layer, Layers
from fisherflow_jax.layers.linear import Linear
from fisherflow_jax.layers.walk import Path, Use

PyTree = Any


class Tap(NamedTuple):
    """The layers to tap by the path of their equation, and the zeros added there."""

    linears: dict[Path, Linear]
    zeros: dict[Path, jax.Array]  # (*scans, *output.shape)

    def by_equation(self, depth: int) -> dict[int, "Tap"]:
        """The taps in each equation of a body at this depth of paths."""
        inside: dict[int, Tap] = {}
        for path, linear in self.linears.items():
            part = inside.setdefault(path[depth], Tap({}, {}))
            part.linears[path] = linear
            part.zeros[path] = self.zeros[path]
        return inside


def tap(
    apply_fn: Callable, layers: Layers, params: PyTree, inputs: PyTree
) -> tuple[PyTree, tuple[jax.Array, ...], Callable]:
    r"""One example's outputs, what enters each layer, and how to pull back to them.

    For cotangents `v` of the outputs, `pull(v)` stops at the layers' outputs: no kernel
    gradient is formed. That gradient, and the bias's, are

    .. math::
      \nabla_{W_k} = \sum_t a_{kt} g_{kt}^\top, \qquad \nabla_{b_k} = \sum_t g_{kt}.

    Args:
      apply_fn: `(params, inputs) -> outputs`.
      layers: what `find_layers` found in it.
      params: pytree of arrays.
      inputs: one example, every array with a leading axis of length 1; map over
        examples with `jax.vmap`.

    Returns:
      `(outputs, inputs_of_layers, pull)`: what `apply_fn` returns; for each layer `a`
      of shape (K, T, I), in its own type (for an embedding int32 ids (K, T), where the
      number of rows stands for an id out of bounds); and the linear function
      `pull(cotangent) -> (gradients, rest)` with `g` of shape (K, T, O) for each layer
      and a dict of gradients for the leaves in `layers.fallback`, by index. Cost: one
      forward pass; a backward pass for each call of `pull`, without the products that
      make kernel gradients. Patches of convolutions are copies: the input times the
      size of the window.

    Raises:
      ValueError: where `apply_fn` does not have these layers on these shapes.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> apply_fn = lambda params, x: jnp.tanh(x @ params["w"]) * params["scale"]
      >>> params = {"w": jnp.zeros((2, 1)), "scale": jnp.array([3.0])}
      >>> x = jnp.array([[1.0, 2.0]])
      >>> layers = ff.layers.find_layers(apply_fn, params, x)
      >>> outputs, (a,), pull = ff.layers.tap(apply_fn, layers, params, x)
      >>> (g,), rest = pull(jnp.ones((1, 1)))
      >>> a, g, rest
      (Array([[[1., 2.]]], dtype=float32), Array([[[3.]]], dtype=float32),
       {0: Array([0.], dtype=float32)})

    References:
      Dangel, Kunstner and Hennig, "BackPACK: packing more into backprop", 2020.
    """
    _check_parameters(layers, params)
    traced = trace(apply_fn, params, batches.unshare(inputs))
    _check_same(layers, traced.layers)
    uses = [use for of_layer in traced.uses for use in of_layer]
    linears = {use.path: use.linear for use in uses}
    zeros = {
        use.path: jnp.zeros((*use.scans, *use.output.shape), use.output.dtype)
        for use in uses
    }
    others = {i: traced.arguments[i] for i, _ in layers.fallback}

    def run(zeros: dict[Path, jax.Array], others: dict[int, jax.Array]):
        filled = dict(enumerate(traced.arguments)) | others
        values = [filled[i] for i in range(len(filled))]
        outputs, operands = _evaluate(traced.program, values, Tap(linears, zeros), ())
        return traced.output_tree.unflatten(outputs), operands

    outputs, pull_back, operands = jax.vjp(run, zeros, others, has_aux=True)
    entering = tuple(
        _concatenated([_inputs(use, operands[use.path]) for use in of_layer])
        for of_layer in traced.uses
    )

    def pull(cotangent: PyTree) -> tuple[tuple[jax.Array, ...], dict[int, jax.Array]]:
        returned, rest = pull_back(cotangent)
        gradients = tuple(
            _concatenated([_outputs(use, returned[use.path]) for use in of_layer])
            for of_layer in traced.uses
        )
        return gradients, rest

    return outputs, entering, pull


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
        elif here in inside.linears:
            linear = inside.linears[here]
            operand = entered[here] = operands[linear.operand]
            zero, counts = inside.zeros[here], linear.counts(operand)
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
            return _evaluate(body, operands, Tap(tap.linears, zeros), path)

        return operation.wrap(call)(operands, tap.zeros)

    first, carries = operation.num_constants, operation.num_carries

    def step(carry: list, slices: tuple[list, dict[Path, jax.Array]]):
        values, zeros = slices
        results, entered = _evaluate(
            body, [*operands[:first], *carry, *values], Tap(tap.linears, zeros), path
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


def _inputs(use: Use, operand: jax.Array) -> jax.Array:
    """`(*scans, *operand.shape)` as `(K, T, I)`, or ids as `(K, T)`."""
    return _over_scans(use, use.linear.inputs, operand)


def _outputs(use: Use, values: jax.Array) -> jax.Array:
    """`(*scans, *output.shape)` as `(K, T, O)`."""
    return _over_scans(use, use.linear.outputs, values)


def _over_scans(use: Use, function: Callable, values: jax.Array) -> jax.Array:
    for _ in use.scans:
        function = jax.vmap(function)
    values = function(values)  # (*scans, K, T, ...)
    depth = len(use.scans)
    stacks = [i for i in range(depth) if use.sliced[i]]
    shared = [i for i in range(depth) if not use.sliced[i]]
    rest = range(depth + 2, values.ndim)
    values = values.transpose([*stacks, depth, *shared, depth + 1, *rest])
    stacked = use.kernel.shape[0]
    return values.reshape((stacked, use.num_positions, *values.shape[depth + 2 :]))


def _concatenated(parts: list[jax.Array]) -> jax.Array:
    """Several uses as one, along the positions."""
    if len(parts) == 1:
        return parts[0]
    dtypes = {part.dtype for part in parts}
    if len(dtypes) > 1:
        parts = [part.astype(vectors.wide_dtype(*dtypes)) for part in parts]
    return jnp.concatenate(parts, axis=1)


def _check_parameters(expected: Layers, params: PyTree) -> None:
    """Before a model sees parameters that are not its own."""
    named = jax.tree_util.tree_leaves_with_path(params)
    names = tuple(jax.tree_util.keystr(path) for path, _ in named)
    shapes = tuple(jnp.shape(leaf) for _, leaf in named)
    for what, was, now in (
        ("names", expected.names, names),
        ("shapes", expected.shapes, shapes),
    ):
        if was != now:
            raise ValueError(
                "params are not those that the layers were found for: their "
                f"{what} were {was}, now {now}."
            )


def _check_same(expected: Layers, found: Layers) -> None:
    before, now = _treatments(expected), _treatments(found)
    for name, was, is_now in zip(expected.names, before, now, strict=True):
        if was != is_now:
            raise ValueError(
                f"apply_fn does not trace to the layers found: {name} was {was}, now "
                f"it is {is_now}. Find the layers again for these inputs."
            )


def _treatments(layers: Layers) -> list[str]:
    """For each leaf a text that tells it from other treatments."""
    texts = {leaf: f"no layer ({reason})" for leaf, reason in layers.fallback}
    for layer in layers.layers:
        texts[layer.kernel] = _described(layer)
        if layer.bias is not None:
            texts[layer.bias] = (
                f"a bias of {layers.names[layer.kernel]} ({layer.bias_layout})"
            )
    return [texts[i] for i in range(len(layers.names))]


def _described(layer: Layer) -> str:
    return (
        f"{layer.kind} with K = {layer.num_stacked}, T = {layer.num_positions}, "
        f"I = {layer.num_inputs}, O = {layer.num_outputs} ({layer.kernel_layout})"
    )
