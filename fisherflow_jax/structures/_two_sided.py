"""Two factors for each array seen as a matrix, from shapes alone, and a diagonal."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fisherflow_jax import information as ops
from fisherflow_jax._ground import checks, choices, linalg, placement, trees
from fisherflow_jax.structures._algebra import eigen, linear
from fisherflow_jax.structures._algebra.eigen import Sides
from fisherflow_jax.structures._algebra.outer_products import squares
from fisherflow_jax.structures._kronecker import multiplied
from fisherflow_jax.structures._moving_kronecker import move_layers
from fisherflow_jax.structures._structure import Structure

PyTree = Any


class SideRoots(NamedTuple):
    """What multiplies the matrices `(K, I, O)` of an array from both sides.

    Kept by `ff.structures.two_sided`.
    """

    left: jax.Array  # (K, I, I), or a diagonal (K, I)
    right: jax.Array  # (K, O, O), or a diagonal (K, O)

    def times(self, matrix: jax.Array) -> jax.Array:
        left, right = (x.astype(matrix.dtype) for x in self)
        return multiplied(left, matrix, right)


class SideFactors(NamedTuple):
    """The factors of one array, seen as K matrices `(I, O)`; of a wide side a diagonal.

    Kept by `ff.structures.two_sided`.

    Attributes:
      left: A, `(K, I, I)` or `(K, I)`.
      right: G, `(K, O, O)` or `(K, O)`.
    """

    left: jax.Array
    right: jax.Array

    def matrices(self, leaf: jax.Array) -> jax.Array:
        """An array like the parameter, as `(K, I, O)`."""
        return leaf.reshape((*self.left.shape[:2], self.right.shape[1]))

    def traces(self) -> jax.Array:
        """`tr A = tr G` of each matrix, `(K,)`."""
        entries = self.left if self.left.ndim == 2 else linalg.diagonal(self.left)
        return jnp.sum(entries, axis=1)


# ---- of several arrays at once, so that their sides may be shared out over a mesh


def _by_sides(function: Callable, parts: list[SideFactors], *beside: list) -> list:
    """`function(factor, ...)` of both sides of each array, and pairs of what it gives.

    `beside`: for each array a pair that goes along with its factors.
    """
    columns = zip(parts, *beside, strict=True)
    calls = [call for column in columns for call in zip(*column, strict=True)]
    found = placement.divided(function, calls)
    return list(zip(found[::2], found[1::2], strict=True))


def decomposed(parts: list[SideFactors]) -> list[tuple[tuple, Sides]]:
    """The eigenvalues of both sides, falling, and the eigenvectors.

    Orthogonal iteration keeps that order: its first columns take what is largest.
    """

    def falling(factor: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        values, columns = eigen.decompose(factor)
        if columns is None:
            return values, None
        return values[:, ::-1], columns[:, :, ::-1]

    pairs = _by_sides(falling, parts)
    return [((x, y), Sides(p, q)) for (x, p), (y, q) in pairs]


def iterated(parts: list[SideFactors], bases: list[Sides]) -> list[Sides]:
    """One step of orthogonal iteration from these bases: the Q of `A Q = Q' R`."""

    def columns(factor: jax.Array, old: jax.Array | None) -> jax.Array | None:
        if old is None:
            return None
        old = old.astype(factor.dtype)
        return linalg.orthonormal(linalg.product("kij,kjl->kil", factor, old))

    return [Sides(*pair) for pair in _by_sides(columns, parts, bases)]


class _Moved(NamedTuple):
    bases: Sides
    moments: jax.Array


def moved(
    parts: list[SideFactors], bases: list[Sides], moments: list[jax.Array]
) -> list[_Moved]:
    """The factors' eigenvectors, and second moments `(K, I, O)` as seen from them.

    As EK-FAC's second moments move, when its basis does.
    """
    layers = []
    for part, old, values in zip(parts, bases, moments, strict=True):
        old = jax.tree.map(lambda x, dtype=values.dtype: x.astype(dtype), old)
        layers.append((*part, *old, [values]))
    found = move_layers(layers)
    return [_Moved(Sides(p, q), seen) for p, q, (seen,) in found]


def roots(
    parts: list[SideFactors], exponent: float, damping: jax.typing.ArrayLike
) -> list[SideRoots]:
    r"""`A^-e` and `G^-e`, times a power of their trace that leaves no unit.

    .. math:: (A + \lambda a)^{-e}\, (\operatorname{tr} A)^{2e - 1/2}, \qquad
       (G + \lambda g)^{-e}

    with the mean eigenvalues a and g. What has no eigenvalue nor damping becomes zero,
    as in a pseudo-inverse.
    """

    def power(values: jax.Array, exponent: float) -> jax.Array:
        there = values > 0
        powers = jnp.where(there, values, jnp.ones_like(values)) ** exponent
        return jnp.where(there, powers, jnp.zeros_like(powers))

    def root(factor: jax.Array, share: jax.Array) -> jax.Array:
        values, columns = eigen.decompose(factor)
        mean = jnp.mean(values, axis=1, keepdims=True)
        powers = power(values + share[:, None] * mean, -exponent)
        if columns is None:
            return powers
        return linalg.product("kij,kj,klj->kil", columns, powers, columns)

    shares = [
        (jnp.broadcast_to(jnp.asarray(damping, x.dtype), x.shape[:1]),) * 2
        for x, _ in parts
    ]
    made = []
    for part, (left, right) in zip(parts, _by_sides(root, parts, shares), strict=True):
        scale = power(part.traces(), 2 * exponent - 0.5)
        made.append(
            SideRoots(scale.reshape((-1,) + (1,) * (left.ndim - 1)) * left, right)
        )
    return made


class TwoSided(NamedTuple):
    """Information that is a Kronecker product for each matrix, or diagonal.

    Kept by `ff.structures.two_sided`.

    Each field is a tree like the parameters, with None where an array has none.

    Attributes:
      left: A of each matrix, see `SideFactors`.
      right: G of each.
      entries: the diagonal of the other arrays.
    """

    left: PyTree
    right: PyTree
    entries: PyTree

    @property
    def parts(self) -> PyTree:
        """Like the parameters: `SideFactors`, or the entries of a diagonal."""

        def part(left: Any, right: Any, entries: Any) -> Any:
            return SideFactors(left, right) if entries is None else entries

        return trees.zipped(part, *self)

    def beside_matrices(self, make: Callable[[SideFactors], Any]) -> PyTree:
        """`make(factors)` in the place of each matrix, None in that of other arrays."""
        return jax.tree.map(
            lambda part: make(part) if _is_part(part) else None,
            self.parts,
            is_leaf=_is_part,
        )

    def decomposed(self) -> Sides:
        """The eigenvectors of both sides, trees like the parameters."""
        bases = self._of_matrices(lambda parts: [s for _, s in decomposed(parts)])
        return Sides(*trees.unzipped(Sides, bases))

    def iterated(self, bases: Sides) -> Sides:
        """One step of orthogonal iteration from these bases."""
        found = self._of_matrices(iterated, trees.zipped(Sides, *bases))
        return Sides(*trees.unzipped(Sides, found))

    def moved(self, bases: Sides, moments: PyTree) -> tuple[Sides, PyTree]:
        """The eigenvectors, and second moments as seen from them."""
        found = self._of_matrices(moved, trees.zipped(Sides, *bases), moments)
        bases, moments = trees.unzipped(_Moved, found)
        return Sides(*trees.unzipped(Sides, bases)), moments

    def roots(self, exponent: float, damping: jax.typing.ArrayLike) -> SideRoots:
        """What multiplies each matrix from both sides."""
        found = self._of_matrices(lambda parts: roots(parts, exponent, damping))
        return SideRoots(*trees.unzipped(SideRoots, found))

    def _of_matrices(self, function: Callable, *beside: PyTree) -> PyTree:
        """`function(all their factors, ...)`, each matrix's in its place."""
        rows: list[tuple] = []

        def collect(part: Any, *others: Any) -> int | None:
            if not _is_part(part):
                return None
            rows.append((part, *others))
            return len(rows) - 1

        places = jax.tree.map(collect, self.parts, *beside, is_leaf=_is_part)
        columns = zip(*rows, strict=True) if rows else [[]] * (1 + len(beside))
        found = function(*map(list, columns))
        return jax.tree.map(lambda place: found[place], places)


def _of_parts(parts: PyTree) -> TwoSided:
    left, right = trees.unzipped(SideFactors, parts)
    entries = jax.tree.map(
        lambda part: None if _is_part(part) else part, parts, is_leaf=_is_part
    )
    return TwoSided(left, right, entries)


@choices.choice
def two_sided(*, widest: int = 4096, stacked: Any = None) -> Structure:
    r"""Keeps two factors of every array, seen as a matrix: those of Shampoo and SOAP.

    .. math:: F \approx \frac{A \otimes G}{\operatorname{tr} A}, \qquad
       A = \sum_k V_k V_k^\top, \quad G = \sum_k V_k^\top V_k

    with the vectors that are reduced as matrices V. From shapes alone: no layers are
    found and no model is asked, so that it goes with ready gradients
    (`ff.estimators.squared_gradient`). The trace is exact. Informations add by their
    factors, which is not the sum of the operators. Where `ff.layers` finds the layers,
    `kronecker` knows more: what enters a layer and what returns to it, apart.

    All axes but the last are the rows: `(I, O)` is itself, and a kernel `(height,
    width, inputs, outputs)` is a matrix of `height width inputs` rows, as in K-FAC of
    convolutions. Arrays of fewer than two axes, or without entries, keep the diagonal.

    Args:
      widest: sides of more than so many units keep the diagonal of their factor; an
        array whose sides both do keeps its own diagonal.
      stacked: which arrays hold separate matrices along their first axis, as scanned
        layers and experts do: a predicate of a parameter's name, a list of names, or
        booleans like the parameters (or a prefix); None: none.

    Returns:
      A `Structure` whose information is a `TwoSided`: for preconditioners, since a
      prior is not added to it. Memory: I^2 + O^2 a matrix. A vector costs I O (I + O)
      to take in; a power I^3 + O^3 once, and I O (I + O) a vector.

    Raises:
      ValueError: for a `widest` that is no whole number; with parameters, for a
        `stacked` that does not fit them, or an array of fewer than three axes in it.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> structure = ff.structures.two_sided()
      >>> estimator = ff.estimators.squared_gradient(structure=structure)
      >>> gradient = {"w": jnp.array([[1.0, 2.0]]), "b": jnp.array([3.0])}
      >>> parts = estimator.from_gradient(gradient).parts
      >>> parts["w"].left.shape, parts["b"]
      ((1, 1, 1), Array([9.], dtype=float32))
      >>> parts["w"].right[0]
      Array([[1., 2.],
             [2., 4.]], dtype=float32)

    References:
      Gupta, Koren, Singer, "Shampoo: preconditioned stochastic tensor optimization",
      2018.
      Morwani, Shapira, Vyas, Malach, Kakade, Janson, "A new perspective on Shampoo's
      preconditioner", 2024.
    """
    checks.whole(widest, "widest", least=0, of="units")

    def views(tree: PyTree) -> PyTree:
        """Beside each leaf `(K, I, O)`, a tuple; () where it keeps its diagonal."""
        apart = jax.tree.map(lambda x: False, tree)
        if stacked is not None and jax.tree.leaves(tree):
            apart = trees.chosen(tree, stacked)
            _check_stacks(tree, apart)
        return jax.tree.map(lambda x, of: _view(x.shape, of, widest), tree, apart)

    def gram(matrices: jax.Array, spec: str, size: int) -> jax.Array:
        diagonal, full = spec.split()
        spec = diagonal if size > widest else full
        return linalg.product(spec, matrices, matrices)

    def reduce(stack: PyTree) -> TwoSided:
        dtype = trees.float_dtype(stack)

        def part(x: jax.Array, view: tuple[int, ...]) -> Any:
            if not view:
                return squares(x, dtype)
            x = x.astype(dtype).reshape((x.shape[0], *view))
            left = gram(x, "nkio,nkio->ki nkio,nkjo->kij", view[1])
            return SideFactors(left, gram(x, "nkio,nkio->ko nkio,nkip->kop", view[2]))

        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], dtype), stack)
        return _of_parts(jax.tree.map(part, stack, views(shapes)))

    def isotropic(params: PyTree, value: jax.typing.ArrayLike) -> TwoSided:
        dtype = trees.float_dtype(params)
        value = jnp.asarray(value, dtype)

        def side(stack: int, size: int, other: int) -> jax.Array:
            # A (x) G / tr A = value for A = value O and G = value I
            if size > widest:
                return jnp.full((stack, size), other * value, dtype)
            identity = jnp.eye(size, dtype=dtype)
            return jnp.tile(other * value * identity[None], (stack, 1, 1))

        def part(x: Any, view: tuple[int, ...]) -> Any:
            if not view:
                return jnp.full_like(x, value, dtype)
            stack, rows, columns = view
            return SideFactors(side(stack, rows, columns), side(stack, columns, rows))

        return _of_parts(jax.tree.map(part, params, views(params)))

    return Structure("two_sided()", reduce, isotropic)


def _check_stacks(tree: PyTree, apart: PyTree) -> None:
    pairs = zip(trees.named_leaves(tree), jax.tree.leaves(apart), strict=True)
    for (name, leaf), is_stack in pairs:
        if is_stack and len(leaf.shape) < 3:
            raise ValueError(
                "stacked names arrays of separate matrices, of three axes or more; "
                f"{name} has shape {tuple(leaf.shape)}."
            )


def _view(shape: tuple[int, ...], is_stack: bool, widest: int) -> tuple[int, ...]:
    """An array's shape as K matrices, `(K, I, O)`; () where it keeps its diagonal."""
    if len(shape) < 2 or not math.prod(shape):
        return ()
    count, rest = (shape[0], shape[1:]) if is_stack else (1, shape)
    view = count, math.prod(rest[:-1]), rest[-1]
    return view if min(view[1:]) <= widest else ()


# ---- operations


linear.register(TwoSided)


def _is_part(node: Any) -> bool:
    return isinstance(node, SideFactors)


class MatrixBases(NamedTuple):
    """The eigenbasis of each array's matrices; the parameters' own for other arrays.

    Coordinates are a tree like the parameters, of matrices `(K, I, O)` and arrays.
    """

    inputs: PyTree  # like the parameters: columns of the rows' side, or None
    outputs: PyTree  # of the columns' side

    @property
    def sides(self) -> PyTree:
        return trees.zipped(Sides, *self)

    def laid_out(self, vector: PyTree) -> PyTree:
        def leaf(x: jax.Array, sides: Sides | None) -> jax.Array:
            if sides is None:
                return x
            rows, columns = (() if s is None else s.shape[:2] for s in sides)
            stack = (*rows[:1], *columns[:1])[0]
            return x.reshape((stack, *(rows[1:] or (-1,)), *(columns[1:] or (-1,))))

        return jax.tree.map(leaf, vector, self.sides)

    def into(self, vector: PyTree) -> PyTree:
        def leaf(x: jax.Array, sides: Sides | None) -> jax.Array:
            return x if sides is None else sides.into(x)

        return jax.tree.map(leaf, self.laid_out(vector), self.sides)

    def out_of(self, coordinates: PyTree, like: PyTree) -> PyTree:
        def leaf(like: Any, x: jax.Array, sides: Sides | None) -> jax.Array:
            return x if sides is None else sides.out_of(x).reshape(like.shape)

        return jax.tree.map(leaf, like, coordinates, self.sides)

    def diagonal(self, values: PyTree, like: PyTree | None) -> PyTree:
        def leaf(like: Any, x: jax.Array, sides: Sides | None) -> jax.Array:
            return x if sides is None else sides.diagonal_of(x).reshape(like.shape)

        if like is None:
            raise ValueError(
                "a TwoSided information keeps no shapes: give it like=, a tree of the "
                "parameters' shapes."
            )
        return jax.tree.map(leaf, like, values, self.sides)

    def parts(self, values: PyTree) -> ops.Parts:
        raise ops.nothing_to_spread("two_sided")


@ops.spectral.register
def _(information: TwoSided, like: PyTree | None = None) -> ops.Spectral:
    parts, treedef = jax.tree.flatten(information.parts, is_leaf=_is_part)
    pairs: list[Any] = [(part, None) for part in parts]
    matrices = [k for k, part in enumerate(parts) if _is_part(part)]
    found = decomposed([parts[k] for k in matrices])
    for k, ((left, right), sides) in zip(matrices, found, strict=True):
        trace = parts[k].traces()[:, None, None]
        trace = jnp.where(trace > 0, trace, jnp.ones_like(trace))
        pairs[k] = left[:, :, None] * right[:, None, :] / trace, sides
    values, sides = (jax.tree.unflatten(treedef, [p[k] for p in pairs]) for k in (0, 1))
    return ops.Spectral(values, MatrixBases(*trees.unzipped(Sides, sides)))
