r"""Rows and their products by layers, where a covariance is diagonal in each.

With one variance a parameter, or a parameter of a Kronecker eigenbasis, the layers are
tapped: what enters them and what returns to their outputs is enough. With a kernel that
is used once an example, rows r of example x and s of y have the product

.. math:: \sum_o g_{xro} \, g_{yso} \sum_i a_{xi} a_{yi} V_{io},

so that I + r O numbers of an example are kept, and no gradient of a kernel is formed.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fisherflow_jax import information as ops
from fisherflow_jax import layers as layers_of
from fisherflow_jax._ground import linalg, trees
from fisherflow_jax.layers import Layer, Layers
from fisherflow_jax.posteriors import Gaussian
from fisherflow_jax.products._pulled import Pull, Pulled, Puller
from fisherflow_jax.structures._algebra import layer_vectors
from fisherflow_jax.structures._algebra.kronecker_factors import with_bias

PyTree = Any
Kept = tuple[jax.Array, ...]  # of one layer


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

    def kept(self, inputs: jax.Array, gradients: jax.Array) -> Kept:
        """What products need of inputs `(K, T, I)` (or ids), gradients `(R, K, T, O)`.

        Both, where the kernel is used once; else the coordinates `(R, K, I, O)`.
        """
        returned = self.returned(gradients)
        if self.layer.kind == "embedding":
            return inputs, returned
        entered = self.entered(inputs, returned.dtype)
        if self.layer.num_positions == 1:
            return entered, returned
        return (linalg.product("kti,rkto->rkio", entered, returned),)

    def pulled(self, kept: Kept) -> Pulled:
        """No root is taken: its derivative is infinite where all inputs are zero."""
        if self.layer.kind == "embedding":
            pair = self.looked_up(*kept)
        elif len(kept) == 2:
            entered, right = kept
            pair = Pulled(right * self.weights(entered)[None], right)
        else:
            pair = Pulled(kept[0] * self.variances[None], kept[0])
        return Pulled(*(x.reshape((x.shape[0], -1)) for x in pair))

    def between(self, many: Kept, several: Kept) -> jax.Array:
        """Products `(n, R, m, S)` of what is kept of n examples and of m."""
        if 1 in (len(many), len(several)):  # one of them may be of a single position
            left = _coordinates(several) * self.variances[None, None]
            return linalg.product("nrkio,mskio->nrms", _coordinates(many), left)
        of_one = self._met if self.layer.kind == "embedding" else self._crossed
        # one of the m at a time; a loop of one is none
        found = jax.lax.map(lambda one: of_one(many, one), several)
        return jnp.moveaxis(found, 0, 2)

    def _crossed(self, many: Kept, one: Kept) -> jax.Array:
        """With one example `(n, R, S)`, at a kernel that each uses once."""
        (inputs, returned), (own, rows) = many, one
        products = jnp.swapaxes(inputs * own[None], 0, 2)[0]  # (K, n, I)
        weights = linalg.product("kni,kio->nko", products, self.variances)
        left = returned * weights[:, None, :, None]
        return linalg.product("nrkto,skto->nrs", left, rows)

    def _met(self, many: Kept, one: Kept) -> jax.Array:
        """With one example, at the rows of a table that both look up."""
        (ids, returned), (own, rows) = many, one
        left = self.looked_up(own, rows).left
        same = (own[None, :, :, None] == ids[:, :, None, :]).astype(left.dtype)
        met = linalg.product("nktu,nrkuo->nrkto", same, returned)
        if self.layer.bias is not None:
            of_bias = jnp.sum(returned, axis=3, keepdims=True)
            met = jnp.concatenate([met, of_bias], axis=3)
        return linalg.product("nrkto,skto->nrs", met, left)

    def along(self, many: Kept, matrices: jax.Array) -> jax.Array:
        """Products `(n, R, S)` with vectors, the matrices `(S, K, I, O)` of each."""
        turned = _turned("skio,kij->skjo", matrices, self.sides[0])
        turned = _turned("skio,kop->skip", turned, self.sides[1])
        if len(many) == 1:
            return linalg.product("nrkio,skio->nrs", many[0], turned)
        inputs, returned = many
        if self.layer.kind != "embedding":
            passed = linalg.product("nkti,skio->nskto", inputs, turned)
            return linalg.product("nskto,nrkto->nrs", passed, returned)
        known = inputs < self.layer.num_inputs
        copies = jnp.arange(inputs.shape[1], dtype=jnp.int32)[None, :, None]
        passed = turned[:, copies, jnp.where(known, inputs, 0)]  # (S, n, K, T, O)
        passed = passed * known[None, ..., None].astype(passed.dtype)
        if self.layer.bias is not None:
            passed = passed + turned[:, None, :, -1:]
        return linalg.product("snkto,nrkto->nrs", passed, returned)

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


def _turned(spec: str, values: jax.Array, columns: jax.Array | None) -> jax.Array:
    return values if columns is None else linalg.product(spec, values, columns)


def _coordinates(kept: Kept) -> jax.Array:
    """`(n, R, K, I, O)`, of a dense layer."""
    return kept[0] if len(kept) == 1 else linalg.product("nkti,nrkto->nrkio", *kept)


class LayerCovariances(NamedTuple):
    """A covariance that is diagonal, parameter by parameter or in an eigenbasis.

    What is kept of an example with R cotangents is a pair: of each layer, and the
    gradients `(R, size)` of leaves that are no layer's. Of n examples all have a
    leading axis n.
    """

    layers: Layers
    each: list[LayerCovariance]  # in the order of the layers
    others: dict[int, jax.Array]  # leaf index -> variances like the leaf

    def of_leaf(self, leaf: int, gradients: jax.Array) -> Pulled:
        """Of a leaf that is no layer's, gradients `(R, ...)`."""
        flat = gradients.reshape((gradients.shape[0], -1))
        return Pulled(flat * self.others[leaf].reshape((1, -1)), flat)

    def tap(
        self, apply_fn: Callable, mean: PyTree, example: PyTree
    ) -> tuple[jax.Array, Callable]:
        """The outputs `(1, ...)`, and cotangents `(R, 1, ...)` -> what is kept."""
        dtype = trees.float_dtype(mean)
        outputs, entering, back = layers_of.tap(apply_fn, self.layers, mean, example)

        def keep(cotangents: jax.Array) -> tuple[list[Kept], dict[int, jax.Array]]:
            gradients, others = jax.vmap(back)(cotangents)
            each = [
                one.kept(inputs, gradient.astype(dtype))
                for one, inputs, gradient in zip(
                    self.each, entering, gradients, strict=True
                )
            ]
            flat = {
                i: x.astype(dtype).reshape((x.shape[0], -1)) for i, x in others.items()
            }
            return each, flat

        return outputs, keep

    def pulled(self, kept: tuple) -> Pulled:
        """Of one example."""
        each, others = kept
        pairs = [one.pulled(own) for one, own in zip(self.each, each, strict=True)]
        pairs += [self.of_leaf(leaf, x) for leaf, x in others.items()]
        return Pulled(*(jnp.concatenate(part, -1) for part in zip(*pairs, strict=True)))

    def between(self, many: tuple, several: tuple) -> jax.Array:
        """Products `(n, R, m, S)` of n examples and m."""
        found = [
            one.between(left, right)
            for one, left, right in zip(self.each, many[0], several[0], strict=True)
        ]
        for leaf, flat in many[1].items():
            right = several[1][leaf] * self.others[leaf].reshape((1, 1, -1))
            found.append(linalg.product("nrq,msq->nrms", flat, right))
        return functools.reduce(jnp.add, found)

    def along(self, many: tuple, vectors: PyTree) -> jax.Array:
        """Products `(n, R, S)` with vectors, leaves `(S, *leaf.shape)`."""
        layers = self.layers
        stacks, rest = jax.vmap(lambda v: layer_vectors.split(layers, v))(vectors)
        found = []
        for one, own in zip(self.each, many[0], strict=True):
            stack, rows = layers.places[layers.names[one.layer.kernel]]
            found.append(one.along(own, stacks[stack][:, rows]))
        for leaf, flat in many[1].items():
            vector = trees.ravel(rest[layers.names[leaf]], 1)
            found.append(linalg.product("nrq,sq->nrs", flat, vector))
        return functools.reduce(jnp.add, found)


def layer_covariances(
    belief: Gaussian,
    apply_fn: Callable,
    inputs: PyTree,
    robust: bool | str,
    spectrum: ops.Spectral | None = None,
) -> LayerCovariances | None:
    """The covariance layer by layer; None where it has no such form.

    From the spectrum of a Kronecker information, where that is known already.
    """
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
        found = spectrum or ops.spectral(information, mean)
        found = found.map(lambda value: 1 / value)
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

    def at(example: PyTree) -> tuple[jax.Array, Pull]:
        outputs, keep = found.tap(apply_fn, mean, example)
        return outputs, lambda cotangents: found.pulled(keep(cotangents))

    return at
