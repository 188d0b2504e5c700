"""Operators that are diagonal in a Kronecker-factored eigenbasis.

A structure says, by `spectrum`, the eigenvalues and the two bases of a layer;
everything else is written here once.
"""

import functools
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fisherflow_jax import information as ops
from fisherflow_jax._ground import checks
from fisherflow_jax._ground.linalg import eigh, product
from fisherflow_jax._ground.placement import divided
from fisherflow_jax.layers import Layers
from fisherflow_jax.structures._algebra import layer_vectors, linear
from fisherflow_jax.structures._diagonal import Diagonal
from fisherflow_jax.structures._scalar import Scalar

PyTree = Any


class Sides(NamedTuple):
    """Orthonormal columns `(K, D, D)` of a layer's two sides; None: the identity.

    Kept by `ff.structures.two_sided`.
    """

    inputs: jax.Array | None
    outputs: jax.Array | None

    def into(self, matrix: jax.Array) -> jax.Array:
        """A matrix `(..., K, I, O)` in coordinates of the eigenbasis."""
        return self._turn(matrix, "...ij,...io->...jo", "...op,...io->...ip")

    def out_of(self, matrix: jax.Array) -> jax.Array:
        """The inverse of `into`."""
        return self._turn(matrix, "...ij,...jo->...io", "...op,...ip->...io")

    def _turn(self, matrix: jax.Array, *specs: str) -> jax.Array:
        for columns, spec in zip(self, specs, strict=True):
            if columns is not None:
                matrix = product(spec, columns, matrix.astype(columns.dtype))
        return matrix

    def diagonal_of(self, values: jax.Array) -> jax.Array:
        """The diagonal, in the parameters' own basis, of an operator with `values`."""
        return jax.tree.map(jnp.square, self).out_of(values)


class KernelBases(NamedTuple):
    """The eigenbases of layers, and the parameters' own for other leaves.

    Coordinates are matrices `(K, I, O)` of the layers that are alike, by the first
    one's kernel, and the other leaves.
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

    def raised(self, values: dict[str, jax.Array]) -> tuple[dict, dict]:
        turned = [name for name, sides in self.sides.items() if jax.tree.leaves(sides)]
        pairs = {n: ops.raised_along(values[n], -2, -1) for n in turned}
        values = values | {name: pair[0] for name, pair in pairs.items()}
        return values, {name: pair[1] for name, pair in pairs.items()}


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


def decomposed(factors: Iterable[jax.Array]) -> list:
    """`decompose` of each factor."""
    return divided(decompose, [(factor,) for factor in factors])


def columns_of(factors: dict[str, jax.Array]) -> dict[str, jax.Array | None]:
    """The eigenvectors of each factor."""
    pairs = zip(factors, decomposed(factors.values()), strict=True)
    return {name: columns for name, (_, columns) in pairs}


@functools.singledispatch
def spectrum(information: Any, name: str) -> tuple[jax.Array, Sides]:
    """The eigenvalues `(K, I, O)` of layers, and the bases of their two sides."""
    raise TypeError(f"{type(information).__name__} has no Kronecker eigenbasis.")


def _spectral(information: Any, like: PyTree | None = None) -> ops.Spectral:
    information = shown(information, like)
    values, sides = {}, {}
    for name in information.shifts:
        values[name], sides[name] = spectrum(information, name)
    values |= information.other_entries
    return ops.Spectral(values, KernelBases(sides, information.layers))


def shown(information: Any, like: PyTree | None) -> Any:
    """About the leaves of `like`; what Optax's masks hide from it is left out."""
    whole = information.layers
    part = whole if like is None else whole.only(layer_vectors.named(like))
    if part is whole:
        return information
    rows: dict[str, tuple[str, np.ndarray]] = {}
    for first, group in part.alike.items():
        places = [whole.places[whole.names[layer.kernel]] for layer in group]
        numbers = [np.arange(place.start, place.stop) for _, place in places]
        rows[first] = places[0][0], np.concatenate(numbers)
    kept = {whole.names[leaf] for leaf, _ in part.fallback}
    entries = {name: x for name, x in information.other_entries.items() if name in kept}

    def taken(stacks: dict[str, Any]) -> dict[str, Any]:
        return {
            first: None if stacks[stack] is None else stacks[stack][places]
            for first, (stack, places) in rows.items()
        }

    stacks = {
        field: taken(value)
        for field, value in information._asdict().items()
        if isinstance(value, dict) and field != "other_entries"
    }
    return information._replace(**stacks, other_entries=entries, layers=part)


def add_other(left: Any, right: Any) -> Any:
    """The sum with a number, or with a prior of one number a layer."""
    shifts, entries = left.shifts, left.other_entries
    dtype = left.num_observations.dtype
    if isinstance(right, Scalar):
        value = right.value.astype(dtype)
        shifts, entries = jax.tree.map(lambda x: x + value, (shifts, entries))
        return left._replace(shifts=shifts, other_entries=entries)
    if not isinstance(right, Diagonal):
        return NotImplemented
    matrices, others = layer_vectors.split(left.layers, right.entries, dtype)
    zero = jnp.zeros((), dtype)
    numbers = {name: matrix[:, 0, 0] for name, matrix in matrices.items()}
    for name, (first, rows) in left.layers.places.items():
        if first not in matrices:
            continue
        matrix = matrices[first][rows]
        if checks.is_traced(matrix) or bool(jnp.any(matrix != matrix[0, 0, 0])):
            raise ValueError(
                f"informations {type(left).__name__} and Diagonal do not add, but for "
                "a prior: one number a layer (the same for kernel and bias), known "
                f"before tracing; layer {name} got {checks.shown(matrix)}. Measure "
                "both with one structure, kronecker(layers) or diagonal()."
            )
    return left._replace(
        shifts={name: x + numbers.get(name, zero) for name, x in shifts.items()},
        other_entries={name: x + others[name] for name, x in entries.items()},
    )


def _check_prior(information: Any, prior: PyTree, like: PyTree) -> None:
    numbers = layer_vectors.named(jax.tree.broadcast(prior, like))
    for layer in information.layers.layers:
        names = layer_vectors.members(information.layers, layer)
        values = [numbers[name] for name in names]
        if any(isinstance(value, jax.core.Tracer) for value in values):
            same = values[0] is values[-1] and jnp.ndim(values[0]) == 0
        else:
            entries = [checks.readable(value).ravel() for value in values]
            same = all(checks.holds(x == entries[0][0]) for x in entries)
        if not same:
            raise ValueError(
                "on a Kronecker information the prior has one number a layer, the same "
                f"for kernel and bias; {' and '.join(names)} got "
                f"{' and '.join(map(checks.shown, values))}."
            )


def register(kind: type) -> None:
    """Gives a type with `spectrum` all operations of `ff.information`."""
    linear.register(kind, add_other)
    ops.facts.register(kind, lambda i: ops.Facts(layers=i.layers, additive=False))
    ops.spectral.register(kind, _spectral)
    # layers by name fit a tree with holes
    ops.restrict.register(kind, lambda information, shown, like=None: information)
    ops.check_prior.register(kind, _check_prior)
    ops.check_like.register(
        kind, lambda i, params: layer_vectors.check_like(i.layers, params)
    )
