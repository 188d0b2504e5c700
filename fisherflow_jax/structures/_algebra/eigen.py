"""Operators that are diagonal in a Kronecker-factored eigenbasis.

A structure says, by `spectrum`, the eigenvalues and the two bases of a layer;
everything else is written here once.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fisherflow_jax import information as ops
from fisherflow_jax._ground.linalg import eigh, product
from fisherflow_jax.layers import Layers
from fisherflow_jax.structures._algebra import layer_vectors, linear
from fisherflow_jax.structures._algebra.layer_vectors import check_like
from fisherflow_jax.structures._diagonal import Diagonal
from fisherflow_jax.structures._scalar import Scalar

PyTree = Any


class Sides(NamedTuple):
    """Orthonormal columns `(K, D, D)` of a layer's two sides; None: the identity."""

    inputs: jax.Array | None
    outputs: jax.Array | None

    def into(self, matrix: jax.Array) -> jax.Array:
        """A matrix `(K, I, O)` in coordinates of the eigenbasis."""
        if self.inputs is not None:
            matrix = matrix.astype(self.inputs.dtype)
            matrix = product("kij,kio->kjo", self.inputs, matrix)
        if self.outputs is not None:
            matrix = matrix.astype(self.outputs.dtype)
            matrix = product("kio,kop->kip", matrix, self.outputs)
        return matrix

    def out_of(self, matrix: jax.Array) -> jax.Array:
        """The inverse of `into`."""
        if self.inputs is not None:
            matrix = product("kij,kjo->kio", self.inputs, matrix)
        if self.outputs is not None:
            matrix = product("kip,kop->kio", matrix, self.outputs)
        return matrix

    def diagonal_of(self, values: jax.Array) -> jax.Array:
        """The diagonal, in the parameters' own basis, of an operator with `values`."""
        return jax.tree.map(jnp.square, self).out_of(values)


class KernelBases(NamedTuple):
    """The eigenbasis of each layer, and the parameters' own for other leaves.

    Coordinates are matrices `(K, I, O)` by the kernel's name, and the other leaves.
    """

    sides: dict[str, Sides]
    layers: Layers  # static

    def laid_out(self, vector: PyTree) -> dict[str, jax.Array]:
        matrices, others = layer_vectors.split(self.layers, vector)
        return matrices | others

    def into(self, vector: PyTree) -> dict[str, jax.Array]:
        laid_out = self.laid_out(vector)
        for name in self.sides.keys() & laid_out.keys():
            laid_out[name] = self.sides[name].into(laid_out[name])
        return laid_out

    def out_of(self, coordinates: dict[str, jax.Array], like: PyTree) -> PyTree:
        leaves = dict(coordinates)
        for name in self.sides.keys() & leaves.keys():
            leaves[name] = self.sides[name].out_of(leaves[name])
        return layer_vectors.join(self.layers, leaves, like)

    def diagonal(self, values: dict[str, jax.Array], like: PyTree | None) -> PyTree:
        entries = {
            name: self.sides[name].diagonal_of(x) if name in self.sides else x
            for name, x in values.items()
        }
        return layer_vectors.join(self.layers, entries, like)

    def parts(self, values: PyTree) -> list[tuple[str, int]]:
        return parts_by_layer((values, self.sides))


def parts_by_layer(factors: Any) -> list[tuple[str, int]]:
    """The layer of each leaf in dicts of layers, and d^3 of matrices."""
    found = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(factors):
        name = next(key.key for key in path if hasattr(key, "key"))
        square = leaf.ndim == 3 and leaf.shape[1] == leaf.shape[2]
        found.append((name, leaf.size * leaf.shape[-1] if square else 0))
    return found


def decompose(factor: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """Eigenvalues `(K, D)` and columns `(K, D, D)` of a factor, or of a diagonal."""
    if factor.ndim == 2:
        return factor, None
    values, columns = eigh(factor)
    # rounding brings the smallest eigenvalues of a singular factor below zero
    return jnp.maximum(values, 0), columns


def _dtype(information: Any) -> Any:
    return information.num_observations.dtype


@functools.singledispatch
def spectrum(information: Any, name: str) -> tuple[jax.Array, Sides]:
    """The eigenvalues `(K, I, O)` of a layer, and the bases of its two sides."""
    raise TypeError(f"{type(information).__name__} has no Kronecker eigenbasis.")


def _spectral(information: Any, like: PyTree | None = None) -> ops.Spectral:
    names = names_shown(information, like)
    values, sides = {}, {}
    for name in information.shifts:
        if name in names:
            values[name], sides[name] = spectrum(information, name)
    entries = information.other_entries
    values |= {name: x for name, x in entries.items() if name in names}
    return ops.Spectral(values, KernelBases(sides, information.layers))


def names_shown(information: Any, like: PyTree | None) -> set[str]:
    """The leaves of `like`; what Optax's masks hide from it is held, and left out."""
    if like is None:
        return set(information.layers.names)
    return set(layer_vectors.named(like))


def add_other(left: Any, right: Any) -> Any:
    """The sum with a number, or with a prior of one number a layer."""
    if isinstance(right, Scalar):
        value = right.value.astype(_dtype(left))
        return left._replace(
            shifts={name: shift + value for name, shift in left.shifts.items()},
            other_entries={
                name: entries + value for name, entries in left.other_entries.items()
            },
        )
    if isinstance(right, Diagonal):
        return _add_diagonal(left, right)
    return NotImplemented


def _add_diagonal(left: Any, right: Diagonal) -> Any:
    """A prior with one number a layer, which every basis leaves as it is."""
    matrices, others = layer_vectors.split(left.layers, right.entries, _dtype(left))
    shifts = dict(left.shifts)
    for name, matrix in matrices.items():
        first = matrix.ravel()[0]
        if isinstance(first, jax.core.Tracer) or bool(jnp.any(matrix != first)):
            raise ValueError(
                "to a Kronecker information one number a layer can be added (the same "
                f"for kernel and bias), known before tracing; layer {name} got "
                f"{'a traced value' if isinstance(first, jax.core.Tracer) else matrix}."
            )
        shifts[name] = shifts[name] + first
    entries = {
        name: values + others[name] for name, values in left.other_entries.items()
    }
    return left._replace(shifts=shifts, other_entries=entries)


def _check_prior(information: Any, prior: PyTree, like: PyTree) -> None:
    layers = information.layers
    leaves, treedef = jax.tree.flatten(prior)
    numbers = jax.tree.unflatten(treedef, list(range(len(leaves))))
    groups = layer_vectors.named(
        jax.tree.map(
            lambda number, part: jax.tree.map(lambda _: number, part), numbers, like
        )
    )
    for layer in layers.layers:
        kernel = layers.names[layer.kernel]
        bias = None if layer.bias is None else layers.names[layer.bias]
        ends = [groups[kernel]] + ([] if bias is None else [groups[bias]])
        values = [leaves[end] for end in ends]
        if any(isinstance(value, jax.core.Tracer) for value in values):
            same = len(set(ends)) == 1 and jnp.ndim(values[0]) == 0
        else:
            entries = np.concatenate([np.ravel(value) for value in values])
            same = bool(np.all(entries == entries[0]))
        if not same:
            raise ValueError(
                "on a Kronecker information the prior has one number a layer, the same "
                f"for kernel and bias; {kernel}"
                + ("" if bias is None else f" and {bias}")
                + f" got {values}."
            )


def register(kind: type) -> None:
    """Gives a type with `spectrum` all operations of `ff.information`."""
    linear.register(kind, add_other)
    ops.facts.register(kind, lambda information: ops.Facts(layers=information.layers))
    ops.spectral.register(kind, _spectral)
    # layers by name fit a tree with holes
    ops.restrict.register(kind, lambda information, shown, like=None: information)
    ops.check_prior.register(kind, _check_prior)
    ops.check_like.register(
        kind, lambda information, params: check_like(information.layers, params)
    )
