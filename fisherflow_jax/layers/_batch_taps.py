"""Tapping a whole batch, whose examples may interact: rows of the layers."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from fisherflow_jax._ground import batch as batches
from fisherflow_jax.layers._evaluation import evaluate
from fisherflow_jax.layers._examples import Value, examples_first
from fisherflow_jax.layers._inputs import expecting
from fisherflow_jax.layers._layer import Layers
from fisherflow_jax.layers._taps import (
    check_parameters,
    check_same,
    concatenated,
    inputs_of,
    outputs_of,
)
from fisherflow_jax.layers._tracing import trace
from fisherflow_jax.layers._uses import Path, Use
from fisherflow_jax.layers._views import View, is_repeated

PyTree = Any


class Returned(NamedTuple):
    """What one cotangent of a batch's outputs brings back."""

    gradients: tuple[jax.Array, ...]  # of each layer (n, K, T, O)
    rows: dict[int, jax.Array]  # leaf -> (n, *leaf.shape)
    sums: dict[int, jax.Array]  # leaf -> leaf.shape, summed over the batch


def tap_batch(
    apply_fn: Callable, layers: Layers, params: PyTree, inputs: PyTree
) -> tuple[PyTree, tuple[jax.Array, ...], Callable[[PyTree], Returned]]:
    r"""A batch's outputs, what enters each layer, and how to pull back to its rows.

    The model is evaluated once, on the whole batch, so that its examples may interact.
    For cotangents `v` of all outputs, the gradient of a kernel is a sum over the rows,

    .. math::
      \nabla_{W_k} = \sum_{nt} a_{nkt} g_{nkt}^\top, \qquad
      \nabla_{b_k} = \sum_{nt} g_{nkt},

    with `g` the gradient of `v` times the outputs with respect to row n of the layer.

    Args:
      apply_fn: `(params, inputs) -> outputs`.
      layers: what `find_layers(..., batched=True)` found in it.
      params: pytree of arrays.
      inputs: a batch, leading axis = examples, save for parts in `ff.Shared`.

    Returns:
      `(outputs, inputs_of_layers, pull)`: for each layer `a` of shape (n, K, T, I), or
      ids (n, K, T); and the linear function `pull(cotangent) -> Returned`. Leaves that
      are no layer's come back row by row where the model multiplies or adds them entry
      by entry, and summed over the batch where they are in `layers.summed`. Cost: one
      forward pass; a backward pass for each call of `pull`, without the products that
      make kernel gradients.

    Raises:
      ValueError: where `apply_fn` does not have these layers on these shapes.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> apply_fn = lambda params, x: (x - jnp.mean(x, 0)) @ params
      >>> x = jnp.array([[1.0, 2.0], [3.0, 2.0]])
      >>> layers = ff.layers.find_layers(apply_fn, jnp.zeros((2, 1)), x)
      >>> layers.together
      'reduce_sum over the examples'
      >>> tapped = ff.layers.tap_batch(apply_fn, layers, jnp.zeros((2, 1)), x)
      >>> outputs, (a,), pull = tapped
      >>> a[:, 0, 0]
      Array([[-1.,  0.],
             [ 1.,  0.]], dtype=float32)
      >>> pull(jnp.ones((2, 1))).gradients[0].ravel()
      Array([1., 1.], dtype=float32)

    References:
      Martens, Grosse, "Optimizing neural networks with Kronecker-factored approximate
      curvature", 2015.
    """
    check_parameters(layers, params)
    count = batches.split(inputs)[0][0].shape[0]
    with expecting(layers, inputs):
        traced = trace(apply_fn, params, inputs, count=count)
    check_same(layers, traced.layers)
    outputs, operands, pull_back = evaluate(traced, layers.summed)

    def view_of(value: Value) -> View:
        assert value.view is not None  # layers without it are in the fallback
        return value.view

    def of_rows(move: Callable, use: Use, view: View, values: jax.Array) -> jax.Array:
        values = examples_first(view, len(use.scans), values)
        return jax.vmap(functools.partial(move, use))(values)

    def joined(parts: list[jax.Array]) -> jax.Array:
        return concatenated(parts, axis=2)

    entering = tuple(
        joined(
            [
                of_rows(
                    inputs_of,
                    use,
                    view_of(traced.rows[use.path].inputs[use.linear.operand]),
                    operands[use.path],
                )
                for use in of_layer
            ]
        )
        for of_layer in traced.uses
    )

    def pull(cotangent: PyTree) -> Returned:
        returned, sums = pull_back(cotangent)

        def view_at(path: Path) -> View:
            return view_of(traced.rows[path].outputs[0])

        gradients = tuple(
            joined(
                [
                    of_rows(outputs_of, use, view_at(use.path), returned[use.path])
                    for use in of_layer
                ]
            )
            for of_layer in traced.uses
        )
        rows: dict[int, jax.Array] = {}
        for spread in traced.spreads:
            depth = len(spread.scans)
            values = returned[spread.path]
            values = examples_first(view_at(spread.path), depth, values)
            repeated = _of_one(spread.view, view_at(spread.path), depth)
            part = jax.vmap(repeated.sum_to_leaf)(values)
            rows[spread.leaf] = (
                rows[spread.leaf] + part if spread.leaf in rows else part
            )
        return Returned(gradients, rows, sums)

    return outputs, entering, pull


def _of_one(parameter: View, examples: View, depth: int) -> View:
    """A parameter repeated over a batch, as it is repeated over one example."""
    axes = list(parameter.axes)
    for i, axis in enumerate(examples.axes, start=depth):
        if not is_repeated(axis):
            axes[i] = tuple(piece for piece in axis if piece[1] == 0)
    return View(parameter.leaf_shape, tuple(axes), parameter.offset)
