"""Tapping a model: what enters its layers, and what returns to them.

Of one example, or of a whole batch, whose examples may interact: rows of the layers.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fisherflow_jax._ground import batch as batches
from fisherflow_jax._ground import trees
from fisherflow_jax.layers._evaluation import evaluate
from fisherflow_jax.layers._found import Broadcast, Use
from fisherflow_jax.layers._layer import Layers, expecting, without_examples
from fisherflow_jax.layers._linear import grouped
from fisherflow_jax.layers._tracing import Traced, trace
from fisherflow_jax.layers._values import examples_first
from fisherflow_jax.layers._views import is_repeated

PyTree = Any


class BothWays(NamedTuple):
    """Of a tied layer: what its kernel and what the kernel's transpose has."""

    forward: jax.Array  # inputs ([n,] K, T, I), or ids; gradients ([n,] K, T, O)
    turned: jax.Array  # inputs ([n,] K, T', O); gradients ([n,] K, T', I)


OfLayer = Any  # an array, or `BothWays` where the layer is tied


class Returned(NamedTuple):
    """What one cotangent of the outputs brings back, by rows of a tapped batch."""

    gradients: tuple[OfLayer, ...]  # of each layer ([n,] K, T, O)
    rows: dict[int, jax.Array]  # leaf -> (n, *leaf.shape)
    sums: dict[int, jax.Array]  # leaf -> leaf.shape, summed over the batch


def tap(
    apply_fn: Callable, layers: Layers, params: PyTree, inputs: PyTree
) -> tuple[PyTree, tuple[OfLayer, ...], Callable]:
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
      and a dict of gradients for the leaves in `layers.fallback`, by index. A tied
      layer has a pair `(forward, turned)` in place of `a`, and of `g`. Cost: one
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
      Dangel, Kunstner, Hennig, "BackPACK: packing more into backprop", 2020.
    """
    return _tap_one(_traced_as(layers, apply_fn, params, inputs))


def tap_batch(
    apply_fn: Callable, layers: Layers, params: PyTree, inputs: PyTree
) -> tuple[PyTree, tuple[OfLayer, ...], Callable[[PyTree], Returned]]:
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
    count = batches.split(inputs)[0][0].shape[0]
    return _tap(_traced_as(layers, apply_fn, params, inputs, count))


def find_and_tap(
    apply_fn: Callable, params: PyTree, inputs: PyTree
) -> tuple[Layers, PyTree, tuple[OfLayer, ...], Callable]:
    """The layers of a model, and what `tap` returns for them, from one trace.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> params, x = {"w": jnp.ones((2, 1))}, jnp.ones((1, 2))
      >>> layers, outputs, entering, pull = ff.layers.find_and_tap(
      ...     lambda p, x: x @ p["w"], params, x
      ... )
      >>> print(len(layers.layers), outputs)
      1 [[2.]]
    """
    traced = trace(apply_fn, params, inputs)
    return traced.layers, *_tap_one(traced)


def find_and_tap_batch(
    apply_fn: Callable, params: PyTree, inputs: PyTree
) -> tuple[Layers, PyTree, tuple[OfLayer, ...], Callable[[PyTree], Returned]] | None:
    """As `tap_batch`, of a model whose examples do not interact, from one trace.

    None: where they do, or it does not show, or a leaf has no row for each example.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> params, x = {"w": jnp.ones((2, 1))}, jnp.ones((3, 2))
      >>> found = ff.layers.find_and_tap_batch(lambda p, x: x @ p["w"], params, x)
      >>> print(found[1].shape)
      (3, 1)
    """
    count = batches.split(inputs)[0][0].shape[0]
    traced = trace(apply_fn, params, inputs, count=count)
    layers = traced.layers
    if layers.together is not None or traced.lost is not None or layers.summed:
        return None
    if any(layer.mixed for layer in layers.layers):
        return None
    return layers, *_tap(traced)


def _tap_one(traced: Traced) -> tuple[PyTree, tuple[OfLayer, ...], Callable]:
    outputs, entering, pull = _tap(traced)

    def pull_one(cotangent: PyTree) -> tuple[tuple[OfLayer, ...], dict]:
        gradients, _, sums = pull(cotangent)
        return gradients, sums

    return outputs, entering, pull_one


def _tap(
    traced: Traced,
) -> tuple[PyTree, tuple[OfLayer, ...], Callable[[PyTree], Returned]]:
    layers = traced.layers
    whole = layers.summed if layers.batched else [leaf for leaf, _ in layers.fallback]
    outputs, operands, pull_back = evaluate(traced, whole)

    def pull(cotangent: PyTree) -> Returned:
        returned, sums = pull_back(cotangent)
        rows: dict[int, jax.Array] = {}
        for broadcast in traced.broadcasts:
            examples = traced.examples[broadcast.path].outputs[0].view
            part = _rows_of(broadcast, examples, returned[broadcast.path])
            leaf = broadcast.leaf
            rows[leaf] = rows[leaf] + part if leaf in rows else part
        return Returned(_of_layers(traced, returned, enters=False), rows, sums)

    return outputs, _of_layers(traced, operands, enters=True), pull


def _of_layers(traced: Traced, values: dict, *, enters: bool) -> tuple[OfLayer, ...]:
    """For each layer its uses as one, along the positions."""
    axis = 2 if traced.layers.batched else 1
    layers: list[OfLayer] = []
    for uses in traced.uses:
        parts: tuple[list[jax.Array], ...] = ([], [])
        for use in uses:
            value = _arranged(traced, use, values[use.path], enters)
            own = parts[use.turned]
            if not use.beside:
                own.append(value)
            elif use.part and (use.part.axis == 0 or not enters):
                own[-1] = own[-1] + value
        ways = [trees.concatenated(part, axis) for part in parts if part]
        layers.append(BothWays(*ways) if len(ways) > 1 else ways[0])
    return tuple(layers)


def _arranged(traced: Traced, use: Use, values: jax.Array, enters: bool) -> jax.Array:
    """What enters the kernel of a use, or returns to it, as `([n,] K, T, ...)`."""
    values = _of_operation(traced, use, values, enters)
    other = use.before if enters else use.behind
    if other is not None:
        matrices = other.view.from_leaf(traced.arguments[other.leaf])
        if not enters:
            matrices = jnp.swapaxes(matrices, 1, 2)
        values, matrices = trees.widen((values, matrices))
        values = jnp.einsum("...kti,kio->...kto", values, matrices)
    if use.part and use.part.axis in (0, 1 if enters else 2):
        values = use.part.moved(values, -3 if use.part.axis == 0 else -1)
    return use.scale * values if enters and use.scale != 1 else values


def _of_operation(
    traced: Traced, use: Use, values: jax.Array, enters: bool
) -> jax.Array:
    """`(*scans, *shape)` as `([n,] K, T, ...)`."""
    depth = len(use.scans)

    def arrange(values: jax.Array) -> jax.Array:
        move = use.linear.inputs if enters else use.linear.outputs
        for _ in use.scans:
            move = jax.vmap(move)
        values = move(values)  # (*scans, K, T, ...)
        # scans that slice the kernel are stacks, the others are positions
        stacks = [i for i in range(depth) if use.sliced[i]]
        shared = [i for i in range(depth) if not use.sliced[i]]
        features = [(i,) for i in range(depth + 2, values.ndim)]
        return grouped(values, (*stacks, depth), (*shared, depth + 1), *features)

    if not traced.layers.batched:
        return arrange(values)
    if use.mixed:
        values = arrange(values)  # (K, n T, ...)
        shape = values.shape[0], -1, use.num_positions, *values.shape[2:]
        return jnp.moveaxis(values.reshape(shape), 1, 0)
    of = traced.examples[use.path]
    view: Any = (of.inputs[use.linear.operand] if enters else of.outputs[0]).view
    view = use.linear.entered(view) if enters else view
    return jax.vmap(arrange)(examples_first(view, depth, values))


def _rows_of(broadcast: Broadcast, examples: Any, values: jax.Array) -> jax.Array:
    """What returns to each example's copy of a parameter, `(n, *leaf.shape)`."""
    depth, axes = len(broadcast.scans), list(broadcast.view.axes)
    # a parameter repeated over a batch, as it is repeated over one example
    for i, axis in enumerate(examples.axes, start=depth):
        if not is_repeated(axis):
            axes[i] = tuple(piece for piece in axis if piece[1] == 0)
    copies = broadcast.view.with_axes(axes)
    return jax.vmap(copies.sum_to_leaf)(examples_first(examples, depth, values))


def _traced_as(
    expected: Layers,
    apply_fn: Callable,
    params: PyTree,
    inputs: PyTree,
    count: int | None = None,
) -> Traced:
    """The model as a program, checked to have the layers that are expected."""
    named = trees.named_leaves(params)
    names = tuple(name for name, _ in named)
    shapes = tuple(jnp.shape(leaf) for _, leaf in named)
    for what, before, now in (
        ("names", str(expected.names), str(names)),
        ("shapes", str(expected.shapes), str(shapes)),
    ):
        if before != now:
            raise ValueError(
                "params are not those that the layers were found for: their "
                f"{what} were {before}, now {now}."
            )
    with expecting(expected, inputs):
        traced = trace(apply_fn, params, inputs, count=count)
    found = expected.descriptions(), traced.layers.descriptions()
    for name, before, now in zip(names, *found, strict=True):
        if before != now:
            raise ValueError(
                f"apply_fn does not trace to the layers found: {name} was {before}, "
                f"now it is {now}. Find the layers again for these inputs."
                f"{without_examples(expected, inputs)}"
            )
    return traced
