r"""Cotangents of one example pulled back, so that products are covariances of outputs.

With one variance a parameter, or a parameter of a Kronecker eigenbasis, the layers are
tapped: what enters them and what returns to their outputs is enough, and no gradient of
a kernel is formed where it is used once an example.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fisherflow_jax import information as ops
from fisherflow_jax import layers as layers_of
from fisherflow_jax._ground import linalg, trees
from fisherflow_jax.layers import Layer, Layers
from fisherflow_jax.posteriors import Gaussian
from fisherflow_jax.structures._algebra import layer_vectors
from fisherflow_jax.structures._algebra.kronecker_factors import with_bias

PyTree = Any


class Pulled(NamedTuple):
    """R pulled-back vectors, so that `left_r . right_s` is the covariance of r and s.

    Where a root of the information is at hand both are its solution, so that variances
    are sums of squares and never negative.
    """

    left: jax.Array  # (R, q)
    right: jax.Array  # (R, q)

    def mixed(self, matrix: jax.Array) -> "Pulled":
        """The combinations `matrix (S, R)` of the vectors."""
        matrix = matrix.astype(self.left.dtype)
        left = linalg.product("sr,rq->sq", matrix, self.left)
        if self.right is self.left:
            return Pulled(left, left)
        return Pulled(left, linalg.product("sr,rq->sq", matrix, self.right))

    def variance(self) -> jax.Array:
        """`(R,)`."""
        return jnp.sum(self.left * self.right, -1)

    def covariance(self) -> jax.Array:
        """`(R, R)`."""
        return linalg.product("rq,sq->rs", self.left, self.right)


Pull = Callable[[jax.Array], Pulled]  # of cotangents (R, 1, ...)
Puller = Callable[[PyTree], tuple[jax.Array, Pull]]  # an example -> outputs (1, ...)


def by_gradients(belief: Gaussian, apply_fn: Callable, robust: bool | str) -> Puller:
    """By gradients of all parameters, for any structure; factorised once."""
    white = _whitened(belief, robust)

    def at(example: PyTree) -> tuple[jax.Array, Pull]:
        outputs, vjp = jax.vjp(lambda params: apply_fn(params, example), belief.mean)

        def pull(cotangents: jax.Array) -> Pulled:
            pulled = jax.vmap(lambda cotangent: vjp(cotangent)[0])(cotangents)
            return white(trees.widen(pulled))

        return outputs, pull

    return at


def _whitened(belief: Gaussian, robust: bool | str) -> Callable[[PyTree], Pulled]:
    """Leaves `(R, *leaf.shape)` -> `Pulled`, by a root where the structure has one."""
    information, meat = belief.information, belief.meat
    if not robust and ops.provides(ops.whitener, information):
        root = ops.whitener(information)

        def halved(stack: PyTree) -> Pulled:
            half = root.matrix(stack)
            return Pulled(half, half)

        return halved
    solve = ops.solver(information)

    def solved(stack: PyTree) -> Pulled:
        pair = stack, jax.vmap(solve)(stack)
        if robust:
            pair = pair[1], jax.vmap(lambda v: ops.matvec(meat, v))(pair[1])
        return Pulled(*(trees.ravel(x, 1) for x in pair))

    return solved


class LayerCovariance(NamedTuple):
    """The covariance of one layer: diagonal in a basis of each of its two sides."""

    layer: Layer
    variances: jax.Array  # (K, I, O)
    # columns (K, I, I) and (K, O, O); None: the identity
    sides: tuple[jax.Array | None, jax.Array | None]

    def entered(self, inputs: jax.Array, dtype: Any) -> jax.Array:
        """A dense layer's inputs `(K, T, I)`, its bias's ones with them, turned."""
        inputs = inputs.astype(dtype)
        if self.layer.bias is not None:
            inputs = with_bias(inputs)
        return _turned("kti,kij->ktj", inputs, self.sides[0])

    def returned(self, gradients: jax.Array) -> jax.Array:
        """Gradients `(..., K, T, O)` with respect to the layer's outputs, turned."""
        return _turned("...kto,kop->...ktp", gradients, self.sides[1])

    def weights(self, entered: jax.Array) -> jax.Array:
        """`sum_i a_i^2 V_io` at each position, `(K, T, O)`."""
        return linalg.product("kti,kio->kto", jnp.square(entered), self.variances)

    def pulled(self, inputs: jax.Array, gradients: jax.Array) -> Pulled:
        """Of inputs `(K, T, I)` (or ids) and gradients `(R, K, T, O)`.

        No root is taken: its derivative is infinite where all inputs are zero.
        """
        right = self.returned(gradients)
        if self.layer.kind == "embedding":
            pair = self.looked_up(inputs, right)
        else:
            entered = self.entered(inputs, right.dtype)
            if self.layer.num_positions == 1:
                right = right[:, :, 0]
                pair = Pulled(right * self.weights(entered)[None, :, 0], right)
            else:
                right = linalg.product("kti,rkto->rkio", entered, right)
                pair = Pulled(right * self.variances[None], right)
        return Pulled(*(x.reshape((gradients.shape[0], -1)) for x in pair))

    def looked_up(self, ids: jax.Array, returned: jax.Array) -> Pulled:
        """The rows of the table that one example looks up, each counted once."""
        same = ids[:, :, None] == ids[:, None, :]
        summed = linalg.product("kts,rkso->rkto", same.astype(returned.dtype), returned)
        positions = jnp.arange(ids.shape[1], dtype=jnp.int32)
        first = jnp.argmax(same, axis=-1).astype(jnp.int32) == positions[None]
        copies = jnp.arange(ids.shape[0], dtype=jnp.int32)[:, None]
        # the number of rows stands for an id out of bounds
        counts = first & (ids < self.layer.num_inputs)
        variances = self.variances[jnp.broadcast_to(copies, ids.shape), ids]
        variances = jnp.where(counts[..., None], variances, jnp.zeros_like(variances))
        left = summed * variances[None]
        if self.layer.bias is None:
            return Pulled(left, summed)
        of_bias = jnp.sum(returned, axis=2, keepdims=True)
        return Pulled(
            jnp.concatenate([left, of_bias * self.variances[None, :, -1:]], axis=2),
            jnp.concatenate([summed, of_bias], axis=2),
        )


def units(like: jax.Array, places: jax.Array | None = None) -> jax.Array:
    """Unit cotangents `(R, *like.shape)` of these entries; None: of all."""
    places = jnp.arange(like.size, dtype=jnp.int32) if places is None else places
    unit = jax.nn.one_hot(places, like.size, dtype=like.dtype)
    return unit.reshape((places.shape[0], *like.shape))


def root(covariance: jax.Array) -> jax.Array:
    """A Cholesky factor of `(..., k, k)`, also where it is singular."""
    count, eps = covariance.shape[-1], jnp.finfo(covariance.dtype)
    largest = jnp.max(jnp.diagonal(covariance, axis1=-2, axis2=-1), -1)
    # singular where there are more outputs than directions: a share of its rounding
    share = 10 * count * eps.eps * largest + math.sqrt(eps.tiny)
    identity = jnp.broadcast_to(jnp.eye(count, dtype=eps.dtype), covariance.shape)
    return linalg.cholesky(covariance + share[..., None, None] * identity)


def _turned(spec: str, values: jax.Array, columns: jax.Array | None) -> jax.Array:
    return values if columns is None else linalg.product(spec, values, columns)


class LayerCovariances(NamedTuple):
    """A covariance that is diagonal, parameter by parameter or in an eigenbasis."""

    layers: Layers
    each: list[LayerCovariance]  # in the order of the layers
    others: dict[int, jax.Array]  # leaf index -> variances like the leaf

    def of_leaf(self, leaf: int, gradients: jax.Array) -> Pulled:
        """Of a leaf that is no layer's, gradients `(R, ...)`."""
        flat = gradients.reshape((gradients.shape[0], -1))
        return Pulled(flat * self.others[leaf].reshape((1, -1)), flat)


def layer_covariances(
    belief: Gaussian, apply_fn: Callable, inputs: PyTree, robust: bool | str
) -> LayerCovariances | None:
    """The covariance layer by layer; None where it has no such form."""
    information, mean, meat = belief.information, belief.mean, belief.meat
    known = ops.facts(information)
    if not known.elementwise and (robust or known.layers is None):
        return None
    layers = layers_of.find_layers(apply_fn, mean, inputs, batched=False)
    if any(layer.num_turned for layer in layers.layers):
        return None  # gradients of a tied kernel are sums of two products
    sides, table = {}, layers
    if known.elementwise:
        if robust:
            entries = ops.diagonal(ops.sandwich(information, meat), mean)
        else:
            entries = ops.inverse_diagonal(information, mean)
        matrices, others = layer_vectors.split(layers, entries, trees.float_dtype(mean))
        values = matrices | others
    elif _treatment(layers) != _treatment(known.layers):
        return None
    else:
        found = ops.spectral(information, mean).map(lambda value: 1 / value)
        values, sides, table = found.values, found.basis.sides, known.layers
    names, each = layers.names, []
    for layer in layers.layers:
        stack, rows = table.places[names[layer.kernel]]
        both = jax.tree.map(lambda x, rows=rows: x[rows], sides.get(stack))
        own = values[stack][rows]
        each.append(LayerCovariance(layer, own, both or (None, None)))
    rest = {leaf: values[names[leaf]] for leaf, _ in layers.fallback}
    return LayerCovariances(layers, each, rest)


def _treatment(layers: Layers) -> Any:
    """What a prediction's layers share with those of the data, of another length."""
    each = [dataclasses.replace(layer, num_positions=0) for layer in layers.layers]
    return each, {leaf for leaf, _ in layers.fallback}, layers.names, layers.shapes


def by_layers(mean: PyTree, apply_fn: Callable, found: LayerCovariances) -> Puller:
    """By what enters and returns to each layer."""
    dtype = trees.float_dtype(mean)

    def at(example: PyTree) -> tuple[jax.Array, Pull]:
        outputs, entering, back = layers_of.tap(apply_fn, found.layers, mean, example)

        def pull(cotangents: jax.Array) -> Pulled:
            gradients, others = jax.vmap(back)(cotangents)
            pairs = [
                one.pulled(inputs, gradient.astype(dtype))
                for one, inputs, gradient in zip(
                    found.each, entering, gradients, strict=True
                )
            ]
            pairs += [found.of_leaf(i, x.astype(dtype)) for i, x in others.items()]
            parts = zip(*pairs, strict=True)
            return Pulled(*(jnp.concatenate(part, -1) for part in parts))

        return outputs, pull

    return at
