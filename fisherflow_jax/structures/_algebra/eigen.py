"""Operators that are diagonal in a Kronecker-factored eigenbasis.

A structure says, by `spectrum`, the eigenvalues and the two bases of a layer;
everything else is written here once.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fisherflow_jax import information as ops
from fisherflow_jax._ground import trees
from fisherflow_jax._ground.linalg import eigh, product
from fisherflow_jax.layers import Layers
from fisherflow_jax.structures._algebra import layer_vectors
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


def template(information: Any, like: PyTree | None) -> PyTree:
    """A tree like the parameters: the one that is given, or that of the layers."""
    if like is not None:
        return like
    layers = information.layers
    shapes = [jax.ShapeDtypeStruct(s, _dtype(information)) for s in layers.shapes]
    return jax.tree.unflatten(layers.tree, shapes)


@functools.singledispatch
def spectrum(information: Any, name: str) -> tuple[jax.Array, Sides]:
    """The eigenvalues `(K, I, O)` of a layer, and the bases of its two sides."""
    raise TypeError(f"{type(information).__name__} has no Kronecker eigenbasis.")


# until every room asks `ops.spectral`


class Basis(NamedTuple):
    columns: jax.Array | None


class Spectrum(NamedTuple):
    values: jax.Array
    inputs: Basis
    outputs: Basis

    def into(self, matrix: jax.Array) -> jax.Array:
        return Sides(self.inputs.columns, self.outputs.columns).into(matrix)

    def out_of(self, matrix: jax.Array) -> jax.Array:
        return Sides(self.inputs.columns, self.outputs.columns).out_of(matrix)


def spectra(information: Any) -> dict[str, Spectrum]:
    found = {name: spectrum(information, name) for name in information.shifts}
    return {
        name: Spectrum(values, Basis(sides.inputs), Basis(sides.outputs))
        for name, (values, sides) in found.items()
    }


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


def _matvec(information: Any, vector: PyTree) -> PyTree:
    return _spectral(information).times(vector)


def _solver(information: Any, damping: jax.typing.ArrayLike = 0.0):
    damping = jnp.asarray(damping, _dtype(information))
    return _spectral(information).map(lambda x: x + damping).divide


def _sum(function: Callable, information: Any, like: PyTree | None) -> jax.Array:
    sums = [jnp.sum(function(x)) for x in _spectral(information, like).values.values()]
    return sum(sums, start=jnp.zeros((), _dtype(information)))


def _logdet(information: Any, like: PyTree | None = None) -> jax.Array:
    return _sum(jnp.log, information, like)


def _trace(information: Any, like: PyTree | None = None) -> jax.Array:
    return _sum(lambda x: x, information, like)


def _diagonal_of(found: ops.Spectral, like: PyTree) -> PyTree:
    sides = found.basis.sides
    entries = {
        name: sides[name].diagonal_of(x) if name in sides else x
        for name, x in found.values.items()
    }
    return layer_vectors.join(found.basis.layers, entries, like)


def _diagonal(information: Any, like: PyTree | None = None) -> PyTree:
    like = template(information, like)
    return _diagonal_of(_spectral(information, like), like)


def _inverse_diagonal(information: Any, like: PyTree | None = None) -> PyTree:
    like = template(information, like)
    return _diagonal_of(_spectral(information, like).map(lambda x: 1 / x), like)


def _to_dense(information: Any, like: PyTree | None = None) -> jax.Array:
    like = template(information, like)
    count = trees.size(like)
    rows = trees.unravel(jnp.eye(count, dtype=_dtype(information)), like)
    dense = jax.vmap(lambda row: trees.ravel(ops.matvec(information, row)))(rows)
    return (dense + dense.T) / 2


def _add_to(left: Any, right: Any) -> Any:
    if type(right) is type(left):
        if right.layers != left.layers:
            raise TypeError(
                "two Kronecker informations add only when they are about the same "
                f"layers; got\n{left.layers}\nand\n{right.layers}"
            )
        return sum_of_equals(left, right)
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


@functools.singledispatch
def sum_of_equals(left: Any, right: Any) -> Any:
    """The sum of two informations of one type about the same layers."""
    return jax.tree.map(jnp.add, left, right)


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


def scaled(information: Any, factor: jax.typing.ArrayLike) -> Any:
    """Every array times a number."""
    factor = jnp.asarray(factor, _dtype(information))
    return jax.tree.map(lambda x: x * factor, information)


def _total(stacked: Any, weights: jax.Array) -> Any:
    return jax.tree.map(lambda x: jnp.tensordot(weights, x, 1), stacked)


def _restrict(information: Any, shown: PyTree, like: PyTree | None = None) -> Any:
    return information  # layers by name fit a tree with holes


def _check_like(information: Any, params: PyTree) -> None:
    layer_vectors.check_like(information.layers, params)


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
    ops.matvec.register(kind, _matvec)
    ops.solver.register(kind, _solver)
    ops.facts.register(kind, lambda information: ops.Facts(layers=information.layers))
    ops.spectral.register(kind, _spectral)
    ops.restrict.register(kind, _restrict)
    ops.check_prior.register(kind, _check_prior)
    ops.check_like.register(kind, _check_like)
    ops.logdet.register(kind, _logdet)
    ops.trace.register(kind, _trace)
    ops.diagonal.register(kind, _diagonal)
    ops.inverse_diagonal.register(kind, _inverse_diagonal)
    ops.to_dense.register(kind, _to_dense)
    ops.add_to.register(kind, _add_to)
    ops.scale.register(kind, scaled)
    ops.total.register(kind, _total)
