"""Per-example vectors without weight gradients, by taps on the linear layers.

The vector that example `n` adds to a kernel is a sum of outer products of the layer's
inputs and of what was pulled back to its outputs. Structures that take `OuterProducts`
square it from these factors, so that per-example squares cost what a gradient costs.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fisherflow_jax import layers as layers_of
from fisherflow_jax._ground import batch as batches
from fisherflow_jax._ground import trees
from fisherflow_jax._ground.batch import Batch
from fisherflow_jax.estimators._probes import rademacher
from fisherflow_jax.layers import Layers
from fisherflow_jax.likelihoods import Likelihood
from fisherflow_jax.structures import OuterProducts, Structure

PyTree = Any


# folding in i gives the i-th key of a split, from which a rule may draw: far from those
_SIGNS = 2**31 - 1


class Pulled(NamedTuple):
    """What is pulled back for n examples, in the order of the layers found."""

    layers: Layers  # static
    inputs: tuple  # of each layer (n, K, T, I), or ids (n, K, T)
    gradients: tuple  # of each layer (n, R, K, T, O)
    weights: jax.Array  # (n,)
    others: dict  # leaf index -> (n * R, *leaf.shape)


class TapPuller:
    """Pulls back chunks of examples; `vectors` is what a structure reduces."""

    def __init__(
        self, apply_fn: Callable, likelihood: Likelihood, rule: Callable, params: PyTree
    ):
        self.apply_fn, self.likelihood, self.rule = apply_fn, likelihood, rule
        self.params = params

    def vectors(self, batch: Batch, keys: jax.Array | None) -> PyTree:
        """A tree like the parameters, of `OuterProducts` and stacks of vectors."""
        return _tree(self._pull(batch, keys), self.params)

    def entries(self, batch: Batch, keys: jax.Array | None) -> int:
        """The numbers that are held at once for this batch."""
        sizes: list[int] = []

        def measure(batch: Batch, keys: jax.Array | None) -> None:
            for leaf in jax.tree.leaves(self.vectors(batch, keys)):
                is_product = isinstance(leaf, OuterProducts)
                sizes.append(leaf.entries if is_product else leaf.size)

        # of shapes alone, and outer products are no arrays that it could return
        jax.eval_shape(measure, batch, keys)
        return sum(sizes)

    def entries_of_products(
        self, structure: Structure, one: Batch, key: jax.Array | None
    ) -> int | None:
        """The same, for one example, where the structure gains by outer products."""
        held = structure.held_by_outer_products
        if held is None:
            return None
        found: list[int | None] = []
        jax.eval_shape(lambda *one: found.append(held(self.vectors(*one))), one, key)
        return found[0]

    def _pull(self, batch: Batch, keys: jax.Array | None) -> Pulled:
        sliced, rebuild = batches.split(batch.inputs)
        dtype = trees.float_dtype(self.params)

        def one(parts: list, targets: Any, weight: jax.Array, key: Any):
            inputs = rebuild([x[None] for x in parts])
            layers, outputs, layer_inputs, pull = layers_of.find_and_tap(
                self.apply_fn, self.params, inputs
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
            return layers, layer_inputs, gradients, others

        layers, inputs, gradients, others = jax.vmap(one)(
            sliced, batch.targets, batch.weights, keys
        )
        others = {i: merge_axes(x) for i, x in others.items()}
        return Pulled(layers, inputs, gradients, batch.weights, others)


def batched_layers(
    structure: Structure, groups: int | None, chunk_size: int | None, fast_squares: bool
) -> Layers | None:
    """The layers by which whole batches are pulled back, if they are."""
    layers = structure.layers
    if layers is None or not layers.batched:
        return None
    for name, value, allowed in (
        ("groups", groups, (None, 1)),
        ("chunk_size", chunk_size, (None,)),
        ("fast_squares", fast_squares, (True,)),
    ):
        if value not in allowed:
            raise ValueError(
                f"{structure.name} was given layers of a model that is run on whole "
                f"batches ({layers.together or 'batched=True'}), where a part of a "
                "batch would be a batch of its own, and single examples have no "
                f"vectors: {name} must be {allowed[0]}; got {value!r}."
            )
    return layers if groups is None else None


def batch_vectors(
    apply_fn: Callable,
    likelihood: Likelihood,
    rule: Callable,
    params: PyTree,
    batch: Batch,
    keys: jax.Array,
    layers: Layers,
) -> PyTree:
    """As `TapPuller.vectors`, from one pass of the whole batch through the model.

    The vectors of a layer are those of its rows. A random sign for each example makes
    the squares of what several examples bring to one row right in the mean.
    """
    outputs, inputs, pull = layers_of.tap_batch(apply_fn, layers, params, batch.inputs)
    dtype = trees.float_dtype(params)

    def cotangent(outputs: jax.Array, targets: Any, weight: jax.Array, key: jax.Array):
        targets = jax.tree.map(lambda y: y[None], targets)
        vector = rule(likelihood, outputs[None], targets, key)[:, 0]
        sign = rademacher(jax.random.fold_in(key, _SIGNS), (), dtype)
        signed = weigh(trees.widen(vector).astype(dtype), weight) * sign
        return signed.astype(outputs.dtype)

    cotangents = jax.vmap(cotangent, out_axes=1)(
        jax.lax.stop_gradient(outputs), batch.targets, batch.weights, keys
    )
    returned = _pull_columns(pull, cotangents)
    blank = batch.weights == 0

    def rows(values: jax.Array) -> jax.Array:
        # (R, n, ...) -> (n, R, ...), without what returns to rows of padding
        return _without(blank, jnp.moveaxis(values, 1, 0).astype(dtype))

    others = {i: merge_axes(rows(x)) for i, x in returned.rows.items()}
    others |= {i: x.astype(dtype) for i, x in returned.sums.items()}
    pulled = Pulled(
        layers,
        jax.tree.map(lambda x: _without(blank, x), inputs),
        jax.tree.map(rows, returned.gradients),
        batch.weights,
        others,
    )
    return _tree(pulled, params)


def _pull_columns(pull: Callable, cotangents: jax.Array) -> Any:
    if cotangents.shape[0] == 1:  # plain products, not batched ones
        return jax.tree.map(lambda x: x[None], pull(cotangents[0]))
    return jax.vmap(pull)(cotangents)


def _without(blank: jax.Array, values: jax.Array) -> jax.Array:
    blank = blank.reshape((-1,) + (1,) * (values.ndim - 1))
    return jnp.where(blank, jnp.zeros_like(values), values)


def _tree(pulled: Pulled, params: PyTree) -> PyTree:
    """A tree like the parameters, of `OuterProducts` and stacks of vectors."""
    leaves = dict(pulled.others)
    found = zip(pulled.layers.layers, pulled.inputs, pulled.gradients, strict=True)
    for layer, inputs, gradients in found:
        leaves[layer.kernel] = OuterProducts(
            inputs,
            gradients,
            pulled.weights,
            layer.num_inputs,
            layer.bias is not None,
            layer.kernel_layout,
        )
        if layer.bias is not None and layer.bias_layout is not None:
            summed = merge_axes(jnp.sum(gradients, axis=3))
            leaves[layer.bias] = jax.vmap(layer.bias_layout.to_leaf)(summed)
    return jax.tree.unflatten(
        jax.tree.structure(params), [leaves[i] for i in range(len(leaves))]
    )


def weigh(values: jax.Array, weight: jax.Array) -> jax.Array:
    """One example's vectors times the root of its weight, zero for a blanked row."""
    weighted = values * jnp.sqrt(weight).astype(values.dtype)
    # no blanked row is finite for every model
    return jnp.where(weight == 0, jnp.zeros_like(values), weighted)


def merge_axes(values: jax.Array) -> jax.Array:
    """`(n, R, ...)` as `(n * R, ...)`, also of leaves without entries."""
    return values.reshape((values.shape[0] * values.shape[1], *values.shape[2:]))


def table(
    apply_fn: Callable, params: PyTree, batch: Batch, layers: Layers | None
) -> str:
    """How each parameter's per-example squares are made; `layers` of whole batches."""
    if layers is None:
        layers = layers_of.find_layers(apply_fn, params, batch.inputs, batched=False)
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
        each = "the batch" if leaf in layers.summed else "each example"
        paths[leaf] = f"a gradient for {each} ({reason})"
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
