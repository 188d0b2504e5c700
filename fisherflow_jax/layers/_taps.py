"""Tapping one example: what enters the layers of a model, and what returns."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fisherflow_jax._ground import trees
from fisherflow_jax.layers._evaluation import evaluate
from fisherflow_jax.layers._inputs import expecting
from fisherflow_jax.layers._layer import Layers
from fisherflow_jax.layers._table import descriptions
from fisherflow_jax.layers._tracing import Traced, trace
from fisherflow_jax.layers._uses import Use

PyTree = Any


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
    check_parameters(layers, params)
    with expecting(layers, inputs):
        traced = trace(apply_fn, params, inputs)
    check_same(layers, traced.layers)
    return tap_traced(traced)


def find_and_tap(
    apply_fn: Callable, params: PyTree, inputs: PyTree
) -> tuple[Layers, PyTree, tuple[jax.Array, ...], Callable]:
    """The layers of a model, and what `tap` returns for them, from one trace."""
    traced = trace(apply_fn, params, inputs)
    return traced.layers, *tap_traced(traced)


def tap_traced(traced: Traced) -> tuple[PyTree, tuple[jax.Array, ...], Callable]:
    """`tap` of a model that has been traced on one example."""
    others = [leaf for leaf, _ in traced.layers.fallback]
    outputs, operands, pull_back = evaluate(traced, others)
    entering = tuple(
        concatenated([inputs_of(use, operands[use.path]) for use in of_layer])
        for of_layer in traced.uses
    )

    def pull(cotangent: PyTree) -> tuple[tuple[jax.Array, ...], dict[int, jax.Array]]:
        returned, rest = pull_back(cotangent)
        gradients = tuple(
            concatenated([outputs_of(use, returned[use.path]) for use in of_layer])
            for of_layer in traced.uses
        )
        return gradients, rest

    return outputs, entering, pull


def inputs_of(use: Use, operand: jax.Array) -> jax.Array:
    """`(*scans, *operand.shape)` as `(K, T, I)`, or ids as `(K, T)`."""
    return _over_scans(use, use.linear.inputs, operand)


def outputs_of(use: Use, values: jax.Array) -> jax.Array:
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


def concatenated(parts: list[jax.Array], axis: int = 1) -> jax.Array:
    """Several uses as one, along the positions."""
    if len(parts) == 1:
        return parts[0]
    dtypes = {part.dtype for part in parts}
    if len(dtypes) > 1:
        parts = [part.astype(trees.wide_dtype(*dtypes)) for part in parts]
    return jnp.concatenate(parts, axis)


def check_parameters(expected: Layers, params: PyTree) -> None:
    """Before a model sees parameters that are not its own."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    names = tuple(trees.parameter_name(path) for path, _ in leaves)
    shapes = tuple(jnp.shape(leaf) for _, leaf in leaves)
    for what, was, now in (
        ("names", expected.names, names),
        ("shapes", expected.shapes, shapes),
    ):
        if was != now:
            raise ValueError(
                "params are not those that the layers were found for: their "
                f"{what} were {was}, now {now}."
            )


def check_same(expected: Layers, found: Layers) -> None:
    before, now = descriptions(expected), descriptions(found)
    for name, was, is_now in zip(expected.names, before, now, strict=True):
        if was != is_now:
            raise ValueError(
                f"apply_fn does not trace to the layers found: {name} was {was}, now "
                f"it is {is_now}. Find the layers again for these inputs."
            )
