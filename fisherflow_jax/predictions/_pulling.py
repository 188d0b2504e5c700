"""Pulling cotangents of one example back to rows whose products are covariances.

With one variance a parameter, or a parameter of a Kronecker eigenbasis, the layers are
tapped: what enters them and what returns to their outputs is enough, and no gradient of
a kernel is formed where it is used once an example.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.lax import Precision

from fisherflow_jax import information as ops
from fisherflow_jax import layers as layers_of
from fisherflow_jax._ground import trees
from fisherflow_jax.layers import Layer, Layers
from fisherflow_jax.posteriors._intervals import meat_of
from fisherflow_jax.predictions._whitening import Rows, whitener
from fisherflow_jax.structures import Diagonal, EigenKronecker, Kronecker, Scalar
from fisherflow_jax.structures._algebra import eigen as eigenbasis
from fisherflow_jax.structures._algebra import layer_vectors
from fisherflow_jax.structures._algebra.eigen import Basis
from fisherflow_jax.structures._algebra.kronecker_factors import with_bias

PyTree = Any

# an example, leading axis 1 -> its outputs (1, ...), and cotangents (R, 1, ...) -> Rows
Puller = Callable[[PyTree], tuple[jax.Array, Callable[[jax.Array], Rows]]]


class Spread(NamedTuple):
    """The covariance of one layer: variances `(K, I, O)` in two bases."""

    variances: jax.Array
    inputs: Basis
    outputs: Basis


class Spreads(NamedTuple):
    """A covariance that is diagonal, parameter by parameter or in an eigenbasis."""

    layers: Layers
    by_layer: list[Spread]  # in the order of the layers
    others: dict[int, jax.Array]  # leaf index -> variances like the leaf


def whole(state: Any, apply_fn: Callable, robust: bool) -> Puller:
    """By gradients of all parameters, for any structure; factorised once."""
    white = whitener(state, robust)

    def at(example: PyTree):
        outputs, vjp = jax.vjp(lambda params: apply_fn(params, example), state.mean)

        def rows(cotangents: jax.Array) -> Rows:
            pulled = jax.vmap(lambda cotangent: vjp(cotangent)[0])(cotangents)
            return white(trees.widen(pulled))

        return outputs, rows

    return at


def spreads_of(
    state: Any, apply_fn: Callable, inputs: PyTree, robust: bool
) -> Spreads | None:
    """The covariance layer by layer; None where it has no such form."""
    information = ops.plain(state.information)
    if robust and isinstance(information, (Scalar, Diagonal)):
        sandwich = ops.sandwich(information, ops.plain(meat_of(state)))
        variances = ops.diagonal(sandwich, state.mean)
    elif robust:
        return None
    elif isinstance(information, (Scalar, Diagonal)):
        variances = ops.inverse_diagonal(information, state.mean)
    elif not isinstance(information, (Kronecker, EigenKronecker)):
        return None
    layers = layers_of.find_layers(apply_fn, state.mean, inputs)
    places = {name: i for i, name in enumerate(layers.names)}
    if isinstance(information, (Kronecker, EigenKronecker)):
        if _treatment(layers) != _treatment(information.layers):
            return None
        found = eigenbasis.spectra(information)
        by_name = {
            name: Spread(1 / spectrum.values, spectrum.inputs, spectrum.outputs)
            for name, spectrum in found.items()
        }
        others = {name: 1 / x for name, x in information.other_entries.items()}
    else:
        dtype = trees.float_dtype(state.mean)
        matrices, others = layer_vectors.split(layers, variances, dtype)
        by_name = {
            name: Spread(matrix, Basis(None), Basis(None))
            for name, matrix in matrices.items()
        }
    return Spreads(
        layers,
        [by_name[layers.names[layer.kernel]] for layer in layers.layers],
        {places[name]: x for name, x in others.items()},
    )


def _treatment(layers: Layers) -> Any:
    """What a prediction's layers share with those of the data, of another length."""
    each = [dataclasses.replace(layer, num_positions=0) for layer in layers.layers]
    return each, {leaf for leaf, _ in layers.fallback}, layers.names, layers.shapes


def tapped(mean: PyTree, apply_fn: Callable, spreads: Spreads) -> Puller:
    """By what enters and returns to each layer."""
    layers = spreads.layers

    def at(example: PyTree):
        outputs, entering, pull = layers_of.tap(apply_fn, layers, mean, example)
        dtype = trees.float_dtype(mean)

        def rows(cotangents: jax.Array) -> Rows:
            gradients, others = jax.vmap(pull)(cotangents)
            pairs = [
                layer_rows(layer, spread, inputs, gradient.astype(dtype))
                for layer, spread, inputs, gradient in zip(
                    layers.layers, spreads.by_layer, entering, gradients, strict=True
                )
            ]
            for leaf, values in others.items():
                flat = values.astype(dtype).reshape((values.shape[0], -1))
                pairs.append(Rows(flat * spreads.others[leaf].reshape((1, -1)), flat))
            parts = zip(*pairs, strict=True)
            return Rows(*(jnp.concatenate(part, -1) for part in parts))

        return outputs, rows

    return at


def layer_rows(
    layer: Layer, spread: Spread, inputs: jax.Array, gradients: jax.Array
) -> Rows:
    """The rows of one layer, from its inputs `(K, T, I)` and gradients `(R, K, T, O)`.

    No root is taken: its derivative is infinite where all inputs are zero.
    """
    count = gradients.shape[0]
    gradients = turned("rkto,kop->rktp", gradients, spread.outputs)
    if layer.kind == "embedding":
        pair = embedding_rows(layer, spread.variances, inputs, gradients)
    else:
        entered = rotated_inputs(layer, spread, inputs, gradients.dtype)
        if layer.num_positions == 1:
            weights = weights_of_outputs(entered, spread.variances)
            right = gradients[:, :, 0]
            pair = Rows(right * weights[None, :, 0], right)
        else:
            right = jnp.einsum(
                "kti,rkto->rkio", entered, gradients, precision=Precision.HIGHEST
            )
            pair = Rows(right * spread.variances[None], right)
    return Rows(*(x.reshape((count, -1)) for x in pair))


def turned(spec: str, values: jax.Array, basis: Basis) -> jax.Array:
    """The values in coordinates of a basis."""
    if basis.columns is None:
        return values
    return jnp.einsum(spec, values, basis.columns, precision=Precision.HIGHEST)


def rotated_inputs(
    layer: Layer, spread: Spread, inputs: jax.Array, dtype: Any
) -> jax.Array:
    """A dense layer's inputs `(K, T, I)`, its bias's ones with them, in their basis."""
    inputs = inputs.astype(dtype)
    if layer.bias is not None:
        inputs = with_bias(inputs)
    return turned("kti,kij->ktj", inputs, spread.inputs)


def weights_of_outputs(inputs: jax.Array, variances: jax.Array) -> jax.Array:
    """`sum_i a_i^2 V_io` at each position, `(K, T, O)`."""
    return jnp.einsum(
        "kti,kio->kto", jnp.square(inputs), variances, precision=Precision.HIGHEST
    )


def embedding_rows(
    layer: Layer, variances: jax.Array, ids: jax.Array, gradients: jax.Array
) -> Rows:
    """The rows of the table that one example looks up, each counted once."""
    same = ids[:, :, None] == ids[:, None, :]
    summed = jnp.einsum(
        "kts,rkso->rkto",
        same.astype(gradients.dtype),
        gradients,
        precision=Precision.HIGHEST,
    )
    positions = jnp.arange(ids.shape[1], dtype=jnp.int32)
    first = jnp.argmax(same, axis=-1).astype(jnp.int32) == positions[None]
    copies = jnp.arange(ids.shape[0], dtype=jnp.int32)[:, None]
    # the number of rows stands for an id out of bounds
    counts = first & (ids < layer.num_inputs)
    looked_up = variances[jnp.broadcast_to(copies, ids.shape), ids]
    looked_up = jnp.where(counts[..., None], looked_up, jnp.zeros_like(looked_up))
    left = summed * looked_up[None]
    if layer.bias is None:
        return Rows(left, summed)
    of_bias = jnp.sum(gradients, axis=2, keepdims=True)
    return Rows(
        jnp.concatenate([left, of_bias * variances[None, :, -1:]], axis=2),
        jnp.concatenate([summed, of_bias], axis=2),
    )
