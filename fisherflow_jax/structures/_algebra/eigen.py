"""Operators that are diagonal in a Kronecker-factored eigenbasis.

A structure says, by `spectra`, the eigenvalues and the two bases of each layer;
everything else is written here once.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.lax import Precision

from fisherflow_jax import information as ops
from fisherflow_jax._ground import trees
from fisherflow_jax.structures._algebra import layer_vectors
from fisherflow_jax.structures._diagonal import Diagonal
from fisherflow_jax.structures._scalar import Scalar

PyTree = Any


class Basis(NamedTuple):
    """Orthonormal columns `(K, D, D)`; None: the identity."""

    columns: jax.Array | None


class Spectrum(NamedTuple):
    """Eigenvalues of one layer, and the bases of its two sides."""

    values: jax.Array  # (K, I, O)
    inputs: Basis
    outputs: Basis

    def into(self, matrix: jax.Array) -> jax.Array:
        """A matrix `(K, I, O)` in coordinates of the eigenbasis."""
        if self.inputs.columns is not None:
            matrix = jnp.einsum(
                "kij,kio->kjo", self.inputs.columns, matrix, precision=Precision.HIGHEST
            )
        if self.outputs.columns is not None:
            matrix = jnp.einsum(
                "kio,kop->kip",
                matrix,
                self.outputs.columns,
                precision=Precision.HIGHEST,
            )
        return matrix

    def out_of(self, matrix: jax.Array) -> jax.Array:
        """The inverse of `into`."""
        return _turn(matrix, self.inputs.columns, self.outputs.columns)

    def diagonal_of(self, values: jax.Array) -> jax.Array:
        """The diagonal, in the parameters' own basis, of an operator with `values`."""
        squares = [
            None if basis.columns is None else jnp.square(basis.columns)
            for basis in (self.inputs, self.outputs)
        ]
        return _turn(values, *squares)


def _turn(
    matrix: jax.Array, inputs: jax.Array | None, outputs: jax.Array | None
) -> jax.Array:
    if inputs is not None:
        matrix = jnp.einsum("kij,kjo->kio", inputs, matrix, precision=Precision.HIGHEST)
    if outputs is not None:
        matrix = jnp.einsum(
            "kip,kop->kio", matrix, outputs, precision=Precision.HIGHEST
        )
    return matrix


def decompose(factor: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """Eigenvalues `(K, D)` and columns `(K, D, D)` of a factor, or of a diagonal."""
    if factor.ndim == 2:
        return factor, None

    def one_by_one(stack: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jax.lax.map(lambda m: tuple(jnp.linalg.eigh(m)), stack)

    # jaxlib 0.10 may wait for ever when several stacks are decomposed at once on CPU
    values, columns = jax.lax.platform_dependent(
        factor, cpu=one_by_one, default=lambda stack: tuple(jnp.linalg.eigh(stack))
    )
    # rounding brings the smallest eigenvalues of a singular factor below zero
    return jnp.maximum(values, 0), columns


@functools.singledispatch
def spectra(information: Any) -> dict[str, Spectrum]:
    """The spectrum of each layer."""
    raise TypeError(f"{type(information).__name__} has no Kronecker eigenbasis.")


def _dtype(information: Any) -> Any:
    return information.num_observations.dtype


def template(information: Any, like: PyTree | None) -> PyTree:
    """A tree like the parameters: the one that is given, or that of the layers."""
    if like is not None:
        return like
    layers = information.layers
    shapes = [jax.ShapeDtypeStruct(s, _dtype(information)) for s in layers.shapes]
    return jax.tree.unflatten(layers.tree, shapes)


def _from_values(
    information: Any, like: PyTree | None, of_spectrum: Any, of_entries: Any
) -> PyTree:
    """A tree from functions of each spectrum and of each other leaf's entries."""
    like = template(information, like)
    found, entries = _shown(information, like)
    matrices = {name: of_spectrum(name, spectrum) for name, spectrum in found.items()}
    others = {name: of_entries(name, x) for name, x in entries.items()}
    return layer_vectors.join(information.layers, matrices, others, like)


def _matvec(information: Any, vector: PyTree) -> PyTree:
    layers = information.layers
    matrices, others = layer_vectors.split(layers, vector, _dtype(information))
    found = spectra(information)
    products = {
        name: found[name].out_of(found[name].values * found[name].into(matrix))
        for name, matrix in matrices.items()
    }
    entries = information.other_entries
    scaled = {name: entries[name] * value for name, value in others.items()}
    return layer_vectors.join(layers, products, scaled, vector)


def _solver(information: Any, damping: jax.typing.ArrayLike = 0.0):
    found, layers = spectra(information), information.layers
    damping = jnp.asarray(damping, _dtype(information))

    def solve(vector: PyTree) -> PyTree:
        matrices, others = layer_vectors.split(layers, vector, _dtype(information))
        solved = {
            name: found[name].out_of(
                found[name].into(matrix) / (found[name].values + damping)
            )
            for name, matrix in matrices.items()
        }
        entries = information.other_entries
        rest = {name: x / (entries[name] + damping) for name, x in others.items()}
        return layer_vectors.join(layers, solved, rest, vector)

    return solve


def _sample(information: Any, key: jax.Array, like: PyTree | None = None) -> PyTree:
    like = template(information, like)
    dtype = _dtype(information)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), like)
    draw = trees.standard_normal(key, shapes)
    matrices, others = layer_vectors.split(
        information.layers, draw, _dtype(information)
    )
    return _from_values(
        information,
        like,
        lambda name, spectrum: spectrum.out_of(
            matrices[name] / jnp.sqrt(spectrum.values)
        ),
        lambda name, entries: others[name] / jnp.sqrt(entries),
    )


def names_shown(information: Any, like: PyTree | None) -> set[str]:
    """The leaves of `like`; what Optax's masks hide from it is held, and left out."""
    if like is None:
        return set(information.layers.names)
    return set(layer_vectors.named(like))


def _shown(
    information: Any, like: PyTree | None
) -> tuple[dict[str, Spectrum], dict[str, jax.Array]]:
    """The spectra and the other entries of the leaves of `like`."""
    names = names_shown(information, like)
    found = {name: x for name, x in spectra(information).items() if name in names}
    entries = information.other_entries
    return found, {name: x for name, x in entries.items() if name in names}


def _all_values(information: Any, like: PyTree | None) -> list[jax.Array]:
    found, entries = _shown(information, like)
    return [spectrum.values for spectrum in found.values()] + list(entries.values())


def _logdet(information: Any, like: PyTree | None = None) -> jax.Array:
    logs = [jnp.sum(jnp.log(values)) for values in _all_values(information, like)]
    return sum(logs, start=jnp.zeros((), _dtype(information)))


def _trace(information: Any, like: PyTree | None = None) -> jax.Array:
    sums = [jnp.sum(values) for values in _all_values(information, like)]
    return sum(sums, start=jnp.zeros((), _dtype(information)))


def _diagonal(information: Any, like: PyTree | None = None) -> PyTree:
    return _from_values(
        information,
        like,
        lambda name, spectrum: spectrum.diagonal_of(spectrum.values),
        lambda name, entries: entries,
    )


def _inverse_diagonal(information: Any, like: PyTree | None = None) -> PyTree:
    return _from_values(
        information,
        like,
        lambda name, spectrum: spectrum.diagonal_of(1 / spectrum.values),
        lambda name, entries: 1 / entries,
    )


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


def register(kind: type) -> None:
    """Gives a type with `spectra` all operations of `ff.information`."""
    ops.matvec.register(kind, _matvec)
    ops.solver.register(kind, _solver)
    ops.sample.register(kind, _sample)
    ops.logdet.register(kind, _logdet)
    ops.trace.register(kind, _trace)
    ops.diagonal.register(kind, _diagonal)
    ops.inverse_diagonal.register(kind, _inverse_diagonal)
    ops.to_dense.register(kind, _to_dense)
    ops.add_to.register(kind, _add_to)
    ops.scale.register(kind, scaled)
    ops.total.register(kind, _total)
