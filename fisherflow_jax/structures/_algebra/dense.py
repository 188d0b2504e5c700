"""Information made of dense blocks: the operations that full and block share.

A structure of dense blocks says, by a `Layout`, how its leaves map to matrices
`(..., k, k)` and a vector's leaves to `(..., k)`; the leading axes batch blocks of one
size. Everything else is written here once.
"""

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fisherflow_jax import information as ops
from fisherflow_jax._ground import linalg, trees
from fisherflow_jax.structures import capabilities
from fisherflow_jax.structures._algebra import columns, linear
from fisherflow_jax.structures._diagonal import Diagonal
from fisherflow_jax.structures._scalar import Scalar
from fisherflow_jax.structures._structure import Structure

PyTree = Any


class Layout(NamedTuple):
    """How an information keeps its matrices: as their rows, cut like the parameters."""

    tree: PyTree  # like the parameters, of arrays (k, *leaf.shape)
    groups: dict[str | None, list[int]]  # leaves that share a matrix; None: all
    of_units: bool  # whether a leaf has a matrix for each entry of its last axis
    build: Callable[[PyTree], Any]  # a tree of rows -> the information


@functools.singledispatch
def layout(information: Any) -> Layout:
    """The layout of an information of dense blocks."""
    raise TypeError(f"{type(information).__name__} is not made of dense blocks.")


def _together(
    kept: Layout, leaves: list, batch_dims: int, ravel: Callable = trees.ravel
) -> list[Any]:
    """Leaves `(*batch, *leaf.shape)` as one array `(units, *batch, k)` a group."""
    arrays = []
    shapes = [x.shape[1:] for x in jax.tree.leaves(kept.tree)]
    for group in kept.groups.values():
        flat = ravel([leaves[i] for i in group], batch_dims)
        if kept.of_units:
            units = shapes[group[0]][-1] if shapes[group[0]] else 1
            size = sum(math.prod(shapes[i][:-1]) for i in group)
            flat = flat.reshape((*flat.shape[:-1], size, units))
            flat = flat.transpose((flat.ndim - 1, *range(flat.ndim - 1)))
        arrays.append(flat)
    return arrays


def _apart(kept: Layout, arrays: Iterable[jax.Array]) -> PyTree:
    """The inverse of `_together`."""
    rows, treedef = jax.tree.flatten(kept.tree)
    leaves: list[Any] = [None] * len(rows)
    for group, array in zip(kept.groups.values(), arrays, strict=True):
        if kept.of_units:
            array = jnp.moveaxis(array, 0, -1)
            array = array.reshape((*array.shape[:-2], math.prod(array.shape[-2:])))
        likes = [jax.ShapeDtypeStruct(rows[i].shape[1:], array.dtype) for i in group]
        for index, leaf in zip(group, trees.unravel(array, likes), strict=True):
            leaves[index] = leaf
    return jax.tree.unflatten(treedef, leaves)


def matrices(information: Any) -> list[jax.Array]:
    """The dense blocks, each `(..., k, k)`."""
    kept = layout(information)
    return _together(kept, jax.tree.leaves(kept.tree), 1)


def with_matrices(information: Any, blocks: Iterable[jax.Array]) -> Any:
    """The information of the same layout with other blocks."""
    kept = layout(information)
    return kept.build(_apart(kept, blocks))


def pack(information: Any, vector: PyTree) -> list[jax.Array]:
    """A vector as one array `(..., k)` for each entry of `matrices`."""
    dtype = trees.float_dtype(information)
    leaves = [
        # whole numbers (places) stay
        x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x
        for x in jax.tree.leaves(vector)
    ]
    return _together(layout(information), leaves, 0)


def unpack(information: Any, parts: Iterable[jax.Array]) -> PyTree:
    """The inverse of `pack`."""
    return _apart(layout(information), parts)


def block_parts(information: Any) -> list[tuple[str, int]]:
    """The name of each leaf's block, and what an inverse of it costs."""
    kept = layout(information)
    if None in kept.groups:
        raise ops.nothing_to_spread(
            f"a {type(information).__name__} information, which has one matrix,"
        )
    rows = jax.tree.leaves(kept.tree)
    found: list[Any] = [None] * len(rows)
    for name, group in kept.groups.items():
        for index in group:
            found[index] = name, rows[index].size * rows[index].shape[0]
    return found


def empty_rows(params: PyTree, sizes: PyTree) -> PyTree:
    """The shapes of matrices with so many rows, as a `Layout` keeps them."""
    dtype = trees.float_dtype(params)
    return jax.tree.map(
        lambda x, size: jax.ShapeDtypeStruct((size, *x.shape), dtype), params, sizes
    )


def structure(name: str, empty: Callable[[PyTree], Any], also: str) -> Structure:
    """A structure of dense blocks; `empty(params)` has the shapes of its information.

    `also` is what it supports beside what all structures of a matrix do.
    """

    def reduce(stack: PyTree) -> Any:
        shapes = empty(jax.eval_shape(lambda: jax.tree.map(lambda x: x[0], stack)))
        return _squares(shapes, stack)

    def isotropic(params: PyTree, value: jax.typing.ArrayLike) -> Any:
        shapes = empty(params)
        number = jnp.asarray(value, trees.float_dtype(params))
        blocks = jax.eval_shape(matrices, shapes)
        return with_matrices(shapes, [number * identity(block) for block in blocks])

    def from_full(full: Any) -> Any:
        shapes = empty(jax.eval_shape(diagonal, full))
        matrix = trees.ravel(full.rows, 1)
        blocks = [matrix[p[..., :, None], p[..., None, :]] for p in places(shapes)]
        return with_matrices(shapes, blocks)

    return Structure(
        name,
        reduce,
        isotropic,
        supports=capabilities.OF_A_MATRIX | {also},
        from_matvec=lambda matvec, params: _of_matvec(empty(params), matvec, params),
        from_full=from_full,
    )


def _of_matvec(shapes: Any, matvec: Callable, params: PyTree) -> Any:
    """What the layout of `shapes` keeps of an operator: the rows of each block.

    d products, but never d x d numbers at once.
    """
    blocks = []
    for place in places(shapes):
        size = place.shape[-1]
        each = jnp.asarray(place.reshape((-1, size)))

        def read(column: jax.Array, position: jax.Array, each=each, size=size):
            return column[each[position // size]]

        rows = linear.map_basis(matvec, params, read, indices=place.reshape(-1))
        blocks.append(symmetric(rows.reshape((*place.shape, size))))
    return with_matrices(shapes, blocks)


def _restrict(information: Any, shown: PyTree, like: PyTree | None = None) -> Any:
    return type(information)(trees.punch(rows_shown(information, shown), shown))


def rows_shown(information: Any, shown: PyTree) -> PyTree:
    """The rows of the entries that are shown, of all leaves."""
    kept = layout(information)
    rows, treedef = jax.tree.flatten(kept.tree)
    flags = trees.shown_leaves(kept.tree, shown)
    for group in () if kept.of_units else kept.groups.values():
        sizes = [math.prod(rows[i].shape[1:]) for i in group]
        of_entries = np.repeat([flags[i] for i in group], sizes)
        positions = np.flatnonzero(of_entries).astype(np.int32)
        for index in group:
            rows[index] = rows[index][positions]
    return jax.tree.unflatten(treedef, rows)


def embedded(information: Any, shapes: Any, entries: PyTree) -> Any:
    """The blocks within larger ones, which are laid out as `shapes`."""
    old = layout(information)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape[1:], x.dtype), old.tree)
    fresh = ops.embed(Diagonal(zeros), entries)  # which names what is gone
    empty = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    kept, cells, room = layout(empty), _cells(old), _cells(layout(empty))
    if parted := [" and ".join(pair) for pair in cells if pair not in room]:
        raise ValueError(
            f"what is known of {', '.join(parted)} is in one block, and the partition "
            "of the new parameters parts them: keep the former blocks together."
        )
    room |= {pair: trees.laid_over(cells[pair], room[pair]) for pair in cells}
    rows = jax.tree.map(lambda x: x[:0], kept.tree)
    leaves, treedef = jax.tree.flatten(rows)
    names = [name for name, _ in trees.named_leaves(rows)]
    for group in kept.groups.values():
        for i in group:
            shape = leaves[i].shape[1:]
            column = [room[names[j], names[i]] for j in group]
            count = [math.prod(x.shape[: x.ndim - len(shape)]) for x in column]
            parts = [x.reshape((n, *shape)) for x, n in zip(column, count, strict=True)]
            leaves[i] = jnp.concatenate(parts)
    built = kept.build(jax.tree.unflatten(treedef, leaves))
    return ops.add(built, fresh)


def _cells(kept: Layout) -> dict[tuple[str, str], jax.Array]:
    """The rows of one leaf and the columns of another, `(*leaf.shape, *other.shape)`.

    Without the leaf's last axis where that has a matrix for each entry.
    """
    leaves, cells = trees.named_leaves(kept.tree), {}
    for group in kept.groups.values():
        for name, rows in (leaves[i] for i in group):
            start, shape = 0, rows.shape[1:]
            for other, beside in (leaves[j] for j in group):
                lead = beside.shape[1:-1] if kept.of_units else beside.shape[1:]
                stop = start + math.prod(lead)
                cells[other, name] = rows[start:stop].reshape((*lead, *shape))
                start = stop
    return cells


def identity(matrix: jax.Array) -> jax.Array:
    identity = jnp.eye(matrix.shape[-1], dtype=matrix.dtype)
    return jnp.broadcast_to(identity, matrix.shape)


def diagonal_matrix(vector: jax.Array) -> jax.Array:
    """`(..., k)` on the diagonal of `(..., k, k)`."""
    return jnp.vectorize(jnp.diag, signature="(k)->(k,k)")(vector)


def factorise(matrix: jax.Array, damping: Any = 0.0) -> tuple[jax.Array, jax.Array]:
    """Cholesky factor of `D^-1/2 (M + damping) D^-1/2`, and `D^1/2 (..., k)`."""
    if not (isinstance(damping, (int, float)) and damping == 0):
        matrix = matrix + damping * identity(matrix)
    equilibrated, scales = linalg.equilibrated(matrix)
    return linalg.cholesky(equilibrated), scales


@jax.jit
def _vector_solve(
    factorised: tuple[jax.Array, jax.Array], vector: jax.Array
) -> jax.Array:
    factor, scales = factorised
    return linalg.cholesky_solve(factor, (vector / scales)[..., None])[..., 0] / scales


@jax.jit
def inverse_matrix(matrix: jax.Array) -> jax.Array:
    """The inverse of symmetric positive definite `(..., k, k)`, symmetric."""
    factor, scales = factorise(matrix)
    half = linalg.inverse_of_lower(factor)
    inverse = jnp.einsum("...ki,...kj->...ij", half, half)
    return inverse / (scales[..., :, None] * scales[..., None, :])


def symmetric(matrix: jax.Array) -> jax.Array:
    return (matrix + jnp.swapaxes(matrix, -1, -2)) / 2


def _matvec(information: Any, vector: PyTree) -> PyTree:
    times = functools.partial(jnp.einsum, "...ij,...j->...i")
    parts = map(times, matrices(information), pack(information, vector))
    return unpack(information, parts)


def _solver(information: Any, damping: jax.typing.ArrayLike = 0.0):
    factors = [factorise(m, damping) for m in matrices(information)]
    return functools.partial(_divide, information, factors)


def _divide(information: Any, factors: list, vector: PyTree) -> PyTree:
    return unpack(information, map(_vector_solve, factors, pack(information, vector)))


class CholeskyFactors(NamedTuple):
    """Cholesky factors of the equilibrated blocks, and the scales."""

    factors: Any  # laid out as the information
    scales: PyTree  # like the parameters

    def divide(self, vector: PyTree) -> PyTree:
        """`(I + damping 1)^-1 v`."""
        return _divide(self.factors, self.pairs(), vector)

    def pairs(self) -> list[tuple]:
        """Of each block its factor and scales."""
        kept = self.factors
        return list(zip(matrices(kept), pack(kept, self.scales), strict=True))


def _factorise(information: Any, damping: jax.Array) -> CholeskyFactors:
    pairs = [factorise(block, damping) for block in matrices(information)]
    return CholeskyFactors(
        with_matrices(information, [factor for factor, _ in pairs]),
        unpack(information, [scales for _, scales in pairs]),
    )


class BlockColumns(NamedTuple):
    """Eigenvectors of each block; coordinates are like the parameters."""

    columns: Any  # laid out as the information

    def into(self, vector: PyTree) -> PyTree:
        return self._turn("...ij,...i->...j", vector)

    def out_of(self, coordinates: PyTree, like: PyTree) -> PyTree:
        return self._turn("...ij,...j->...i", coordinates)

    def _turn(self, spec: str, vector: PyTree) -> PyTree:
        turn, kept = functools.partial(jnp.einsum, spec), self.columns
        return unpack(kept, map(turn, matrices(kept), pack(kept, vector)))

    def laid_out(self, vector: PyTree) -> PyTree:
        return vector

    def parts(self, values: PyTree) -> list[tuple[str, int]]:
        found = block_parts(self.columns)
        return [*((name, 0) for name, _ in found), *found]

    def raised(self, values: PyTree) -> tuple[PyTree, dict]:
        pairs = [ops.raised_along(x, -1) for x in pack(self.columns, values)]
        flags = zip(layout(self.columns).groups, pairs, strict=True)
        values = unpack(self.columns, [values for values, _ in pairs])
        return values, {name: pair[1] for name, pair in flags}


def _spectral(information: Any, like: PyTree | None = None) -> ops.Spectral:
    pairs = [linalg.eigh(block) for block in matrices(information)]
    # rounding brings the smallest eigenvalues of a singular matrix below zero
    values = unpack(information, [jnp.maximum(values, 0) for values, _ in pairs])
    columns = with_matrices(information, [columns for _, columns in pairs])
    return ops.Spectral(values, BlockColumns(columns))


def _eigenvalues(information: Any, like: PyTree | None = None) -> list[jax.Array]:
    return [linalg.eigh(block)[0] for block in matrices(information)]


def _whitener(
    information: Any, damping: jax.typing.ArrayLike = 0.0, like: PyTree | None = None
) -> ops.Whitener:
    """The inverse Cholesky factor of each block; coordinates are packed."""
    factors: Any
    if isinstance(information, CholeskyFactors):
        factors, information = information.pairs(), information.factors
    else:
        factors = [factorise(m, damping) for m in matrices(information)]

    def rows(stack: PyTree) -> list[jax.Array]:
        halves = []
        packed = jax.vmap(lambda v: pack(information, v))(stack)
        for (factor, scales), part in zip(factors, packed, strict=True):
            # the vectors as columns of one right-hand side: (..., k, R)
            columns = jnp.moveaxis(part, 0, -1) / scales[..., None]
            half = linalg.solve_lower(factor, columns)
            halves.append(jnp.moveaxis(half, -1, 0))
        return halves

    def color(draws: list[jax.Array]) -> PyTree:
        parts = []
        for (factor, scales), draw in zip(factors, draws, strict=True):
            root = linalg.solve_lower_transposed(factor, draw[..., None])
            parts.append(root[..., 0] / scales)
        return unpack(information, parts)

    return ops.Whitener(rows, color, functools.partial(pack, information))


ops.whitener.register(CholeskyFactors, _whitener)


def _logdet(information: Any, like: PyTree | None = None) -> jax.Array:
    logs = []
    for matrix in matrices(information):
        logs.append(_log_volume(*factorise(matrix)))
    return sum(logs, start=jnp.zeros((), trees.float_dtype(information)))


def _regularised(information: Any, like: PyTree | None = None) -> ops.Regularised:
    factors, jitters, logs = [], [], []
    for matrix in matrices(information):
        equilibrated, scales = linalg.equilibrated(matrix)
        factor, jitter = linalg.steady_cholesky(equilibrated)
        factors.append((factor, scales))
        jitters.append(jnp.any(jitter > 0))
        logs.append(_log_volume(factor, scales))

    divide = functools.partial(_divide, information, factors)
    none = jnp.zeros((), trees.float_dtype(information))
    logdet = functools.reduce(jnp.add, logs or [none])
    helped = functools.reduce(jnp.logical_or, jitters or [jnp.array(False)])
    return ops.Regularised(divide, logdet, helped.astype(jnp.int32))


def _resolved(information: Any, like: PyTree | None = None) -> tuple[Any, PyTree]:
    found = [_filled(matrix) for matrix in matrices(information)]
    filled = with_matrices(information, [matrix for matrix, _ in found])
    return filled, unpack(information, [hidden for _, hidden in found])


@jax.jit
def _filled(matrix: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`(..., k, k)` with ones for eigenvalues that rounding hides, and `(..., k)`."""
    eps = float(jnp.finfo(matrix.dtype).eps)
    equilibrated, scales = linalg.equilibrated(matrix)
    # which directions these are is no function to be differentiated
    held = jax.lax.stop_gradient(equilibrated)

    def search(held: jax.Array) -> jax.Array:
        values, basis = linalg.eigh(held)
        found = (values <= held.shape[-1] * eps)[..., None, :]
        columns = jnp.where(found, basis, jnp.zeros_like(basis))
        return linalg.product("...ik,...jk->...ij", columns, columns)

    pivots = jnp.square(linalg.diagonal(linalg.cholesky(held)))
    near = jnp.any(~(pivots > eps**0.5))
    filling = jax.lax.cond(near, search, jnp.zeros_like, held)
    unit = scales[..., :, None] * scales[..., None, :]
    return matrix + filling * unit, linalg.diagonal(filling)


@jax.jit
def _log_volume(factor: jax.Array, scales: jax.Array) -> jax.Array:
    """The log-determinant of what `factorise` factorised."""
    pivots = linalg.diagonal(jnp.swapaxes(factor, -1, -2))
    return 2 * jnp.sum(jnp.log(pivots) + jnp.log(scales))


def _trace(information: Any, like: PyTree | None = None) -> jax.Array:
    return jnp.sum(trees.ravel(diagonal(information)))


def diagonal(information: Any, like: PyTree | None = None) -> PyTree:
    return unpack(information, map(linalg.diagonal, matrices(information)))


def _inverse_diagonal(information: Any, like: PyTree | None = None) -> PyTree:
    return diagonal(_inverse(information), like)


def places(information: Any) -> list[np.ndarray]:
    """For each block, the ravelled indices `(..., k)` of its parameters."""
    # numpy, so that the indices stay constants and nothing is compiled for them
    kept = layout(information)
    shapes = [x.shape[1:] for x in jax.tree.leaves(kept.tree)]
    ends = np.cumsum([math.prod(shape) for shape in shapes], dtype=np.int32)
    numbers = [
        np.arange(end - math.prod(shape), end, dtype=np.int32).reshape(shape)
        for shape, end in zip(shapes, ends, strict=True)
    ]
    nothing = np.zeros(0, np.int32)

    def ravel(leaves: list[np.ndarray], batch_dims: int) -> np.ndarray:
        return np.concatenate([nothing, *(x.ravel() for x in leaves)])

    return _together(kept, numbers, 0, ravel)


def _to_dense(information: Any, like: PyTree | None = None) -> jax.Array:
    all_places, blocks = places(information), matrices(information)
    count = sum(p.size for p in all_places)
    dense = jnp.zeros((count, count), trees.float_dtype(information))
    for place, block in zip(all_places, blocks, strict=True):
        dense = dense.at[place[..., :, None], place[..., None, :]].set(block)
    return dense


def _add_other(left: Any, right: Any) -> Any:
    """The sum with a number, or with a diagonal."""
    if isinstance(right, Scalar):
        value = right.value.astype(trees.float_dtype(left))
        return with_matrices(left, [m + value * identity(m) for m in matrices(left)])
    if isinstance(right, Diagonal):
        diagonals = map(diagonal_matrix, pack(left, right.entries))
        return with_matrices(left, map(jnp.add, matrices(left), diagonals))
    return NotImplemented


def _inverse(information: Any) -> Any:
    return with_matrices(information, map(inverse_matrix, matrices(information)))


def _squares(information: Any, stack: PyTree) -> Any:
    leaves = jax.tree.leaves(trees.widen(stack))
    vectors = _together(layout(information), leaves, 1)
    blocks = [jnp.swapaxes(flat, -1, -2) @ flat for flat in vectors]
    return with_matrices(information, blocks)


def _sandwich(information: Any, meat: Any) -> Any:
    def block(bread: jax.Array, filling: jax.Array) -> jax.Array:
        inverse = inverse_matrix(bread)
        return symmetric(inverse @ filling @ inverse)

    return with_matrices(information, map(block, matrices(information), matrices(meat)))


def _by_columns(information: Any, like: PyTree | None = None) -> ops.ByColumns:
    ways = (functools.partial(way, information) for way in (pack, unpack))
    return columns.of_matrices(matrices(information), *ways)


def _facts(information: Any) -> ops.Facts:
    """Whole where one block has all parameters."""
    shapes = [x.shape for x in jax.tree.leaves(layout(information).tree)]
    count = sum(math.prod(shape[1:]) for shape in shapes)
    whole = all(shape[0] == count for shape in shapes)
    return ops.Facts(dense=True, whole=whole)


@ops.parts.register
def _(factors: CholeskyFactors) -> list[tuple[str, int]]:
    found = block_parts(factors.factors)
    return [*found, *((name, 0) for name, _ in found)]


def register(kind: type) -> None:
    """Gives a type of dense blocks all operations of `ff.information`."""
    linear.register(kind, _add_other)
    ops.restrict.register(kind, _restrict)
    ops.matvec.register(kind, _matvec)
    ops.solver.register(kind, _solver)
    ops.facts.register(kind, _facts)
    ops.by_columns.register(kind, _by_columns)
    ops.spectral.register(kind, _spectral)
    ops.eigenvalues.register(kind, _eigenvalues)
    ops.whitener.register(kind, _whitener)
    ops.factorise.register(kind, _factorise)
    ops.logdet.register(kind, _logdet)
    ops.regularised.register(kind, _regularised)
    ops.resolved.register(kind, _resolved)
    ops.trace.register(kind, _trace)
    ops.diagonal.register(kind, diagonal)
    ops.inverse_diagonal.register(kind, _inverse_diagonal)
    ops.to_dense.register(kind, _to_dense)
    ops.inverse.register(kind, _inverse)
    ops.sandwich.register(kind, _sandwich)
    ops.squares.register(kind, _squares)
