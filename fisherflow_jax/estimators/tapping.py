"""Per-example vectors without weight gradients, by taps on the linear layers.

The vector that example `n` adds to a kernel is a sum of outer products of the layer's
inputs and of what was pulled back to its outputs. Structures that take `OuterProducts`
square it from these factors, so that per-example squares cost what a gradient costs.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fisherflow_jax import batch as batches
from fisherflow_jax import layers as layers_of
from fisherflow_jax import vectors
from fisherflow_jax.batch import Batch
from fisherflow_jax.likelihoods import Likelihood
from fisherflow_jax.structures import OuterProducts

PyTree = Any


class Pulled(NamedTuple):
    """What is pulled back for n examples, in the order of the layers found."""

    inputs: tuple  # of each layer (n, K, T, I), or ids (n, K, T)
    gradients: tuple  # of each layer (n, R, K, T, O)
    weights: jax.Array  # (n,)
    others: dict  # leaf index -> (n * R, *leaf.shape)


class TapPuller:
    """Pulls back chunks of examples; `vectors` is what a structure reduces."""

    def __init__(
        self,
        apply_fn: Callable,
        likelihood: Likelihood,
        rule: Callable,
        params: PyTree,
        batch: Batch,
    ):
        self.apply_fn, self.likelihood, self.rule = apply_fn, likelihood, rule
        self.params = params
        self.layers = layers_of.find_layers(apply_fn, params, batch.inputs)

    def vectors(self, batch: Batch, keys: jax.Array | None) -> PyTree:
        """A tree like the parameters, of `OuterProducts` and stacks of vectors."""
        return self._tree(self._pull(batch, keys))

    def entries(self, batch: Batch, keys: jax.Array | None) -> int:
        """The numbers that are held at once for this batch."""
        pulled = jax.eval_shape(self._pull, batch, keys)
        return sum(
            leaf.entries if isinstance(leaf, OuterProducts) else leaf.size
            for leaf in jax.tree.leaves(self._tree(pulled))
        )

    def _pull(self, batch: Batch, keys: jax.Array | None) -> Pulled:
        sliced, rebuild = batches.split(batch.inputs)
        dtype = vectors.float_dtype(self.params)

        def one(parts: list, targets: Any, weight: jax.Array, key: Any):
            inputs = batches.unshare(rebuild([x[None] for x in parts]))
            outputs, layer_inputs, pull = layers_of.tap(
                self.apply_fn, self.layers, self.params, inputs
            )
            targets = jax.tree.map(lambda y: y[None], targets)
            cotangents = self.rule(
                self.likelihood, jax.lax.stop_gradient(outputs), targets, key
            )
            gradients, others = jax.tree.map(
                lambda x: weigh(x.astype(dtype), weight), jax.vmap(pull)(cotangents)
            )
            # zero times what is not finite in a blanked row would be NaN
            layer_inputs = jax.tree.map(
                lambda x: jnp.where(weight == 0, jnp.zeros_like(x), x), layer_inputs
            )
            return layer_inputs, gradients, others

        inputs, gradients, others = jax.vmap(one)(
            sliced, batch.targets, batch.weights, keys
        )
        for layer, gradient in zip(self.layers.layers, gradients, strict=True):
            if layer.bias is not None and layer.bias_layout is not None:
                summed = jnp.sum(gradient, axis=3)
                to_leaf = layer.bias_layout.to_leaf
                others[layer.bias] = jax.vmap(jax.vmap(to_leaf))(summed)
        stacks = {i: merge_axes(x) for i, x in others.items()}
        return Pulled(inputs, gradients, batch.weights, stacks)

    def _tree(self, pulled: Pulled) -> PyTree:
        leaves = dict(pulled.others)
        found = zip(self.layers.layers, pulled.inputs, pulled.gradients, strict=True)
        for layer, inputs, gradients in found:
            leaves[layer.kernel] = OuterProducts(
                inputs,
                gradients,
                pulled.weights,
                layer.num_inputs,
                layer.bias is not None,
                layer.kernel_layout,
            )
        return jax.tree.unflatten(
            jax.tree.structure(self.params), [leaves[i] for i in range(len(leaves))]
        )


def weigh(values: jax.Array, weight: jax.Array) -> jax.Array:
    """One example's vectors times the root of its weight, zero for a blanked row."""
    weighted = values * jnp.sqrt(weight).astype(values.dtype)
    # no blanked row is finite for every model
    return jnp.where(weight == 0, jnp.zeros_like(values), weighted)


def merge_axes(values: jax.Array) -> jax.Array:
    """`(n, R, ...)` as `(n * R, ...)`, also of leaves without entries."""
    return values.reshape((values.shape[0] * values.shape[1], *values.shape[2:]))


def table(apply_fn: Callable, params: PyTree, batch: Batch) -> str:
    """How each parameter's per-example squares are made."""
    layers = layers_of.find_layers(apply_fn, params, batch.inputs)
    paths = {}
    for layer in layers.layers:
        shared = layer.num_positions
        if shared == 1:
            path = "squares of inputs times squares of gradients"
        elif layer.kind == "embedding":
            path = f"gradients summed by id over {shared} positions"
        else:
            path = (
                "a gradient for each example, from inputs and gradients at "
                f"{shared} positions"
            )
        paths[layer.kernel] = path
        if layer.bias is not None:
            paths[layer.bias] = "squares of gradients"
    for leaf, reason in layers.fallback:
        paths[leaf] = f"a gradient for each example ({reason})"
    return _format(params, [paths[i] for i in range(len(paths))])


def table_of_one_path(params: PyTree, path: str) -> str:
    return _format(params, [path] * len(jax.tree.leaves(params)))


def _format(params: PyTree, paths: list[str]) -> str:
    rows = [("parameter", "shape", "path")]
    for (name, leaf), path in zip(
        jax.tree_util.tree_leaves_with_path(params), paths, strict=True
    ):
        rows.append((jax.tree_util.keystr(name) or "params", str(leaf.shape), path))
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    return "\n".join(
        f"{name:<{widths[0]}}  {shape:<{widths[1]}}  {path}"
        for name, shape, path in rows
    )
