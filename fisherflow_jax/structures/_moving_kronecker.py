"""Eigenvalue correction where the eigenbasis moves, as within an optimiser.

The factors are remembered as ever. Beside them a memory keeps second moments: the
squares of examples' vectors in the eigenbasis that the factors had when they were last
decomposed.

When the basis moves, what is remembered is re-expressed in the new one. The diagonal
there of the remembered operator would be too large where eigenvalues are small, since
what the old basis left out off its diagonal is what cancels there. The same is done to
the factors' product, whose eigenvalues are known in both bases, and the ratio of what
should be found to what is found corrects the second moments, scaled to their old trace.
Where a layer is Kronecker-factored that is exact, and positive everywhere. To start
again from the factors' eigenvalues would forget the correction at each move.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fisherflow_jax import information as ops
from fisherflow_jax._ground import trees
from fisherflow_jax._ground.linalg import product
from fisherflow_jax._ground.placement import divided
from fisherflow_jax.structures import _eigen_kronecker as eigen_kronecker
from fisherflow_jax.structures._algebra import eigen as eigenbasis
from fisherflow_jax.structures._algebra import linear
from fisherflow_jax.structures._algebra.eigen import Sides
from fisherflow_jax.structures._eigen_kronecker import Columns, EigenKronecker
from fisherflow_jax.structures._structure import Structure

PyTree = Any
Groups = list[tuple[jax.Array, list[str]]]  # (whether it is due, names of its layers)
Basis = jax.Array | None  # (K, D, D); None: the identity


class MovingKronecker(NamedTuple):
    """Kronecker factors, and second moments in an eigenbasis that is kept elsewhere.

    Kept by `ff.structures.kronecker`.
    """

    factors: Any  # a Kronecker
    second_moments: dict[str, jax.Array]  # of layers that are alike (K, I, O)


class LayerBases(NamedTuple):
    """The eigenbases of layers, until they are next decomposed.

    Kept by `ff.structures.kronecker`.
    """

    input_bases: Columns
    output_bases: Columns

    def site(self, factors: Any, squares: Any = None) -> MovingKronecker:
        """What a batch adds: its factors, and its squares in these bases (or none)."""
        if squares is not None:
            return MovingKronecker(factors, squares.eigenvalues)
        return _without_moments(factors)

    def structure(self, factors: Any) -> Structure:
        """That of the squares in these bases."""
        return eigen_kronecker.in_bases(factors.layers, *self)

    def corrected(self, information: MovingKronecker) -> EigenKronecker:
        """The information that factors, second moments and bases make."""
        factors = information.factors
        return EigenKronecker(
            eigenvalues=information.second_moments,
            input_bases=self.input_bases,
            output_bases=self.output_bases,
            shifts=factors.shifts,
            other_entries=factors.other_entries,
            num_observations=factors.num_observations,
            layers=factors.layers,
        )

    def moved(
        self, kept: PyTree, ahead: MovingKronecker, groups: Groups
    ) -> tuple[PyTree, "LayerBases"]:
        """The bases of `ahead`'s factors where due, and what is kept as seen from them.

        `kept` may hold stacks of informations, as a memory's window does: second
        moments of any rank.
        """
        nodes, treedef = jax.tree.flatten(kept, is_leaf=_is_moving)
        places = [place for place, node in enumerate(nodes) if _is_moving(node)]
        factors, layers = ahead.factors, dict[str, Any]()
        for name, columns in self.input_bases.items():
            stacks = [nodes[place].second_moments[name] for place in places]
            layers[name] = columns, self.output_bases[name], stacks

        def move(old: dict[str, Any]) -> dict[str, Any]:
            left, right = factors.input_factors, factors.output_factors
            moved = move_layers([(left[n], right[n], *old[n]) for n in old])
            return dict(zip(old, moved, strict=True))

        for due, names in groups:
            old = {name: layers[name] for name in names}
            layers |= jax.lax.cond(due, move, lambda old: old, old)
        inputs, outputs, seen = (
            {name: layer[k] for name, layer in layers.items()} for k in range(3)
        )
        for index, place in enumerate(places):
            moments = {name: stack[index] for name, stack in seen.items()}
            nodes[place] = nodes[place]._replace(second_moments=moments)
        return jax.tree.unflatten(treedef, nodes), LayerBases(inputs, outputs)


def begin(factors: Any) -> tuple[MovingKronecker, LayerBases]:
    """Nothing remembered, and bases of zeros, which the first update replaces."""

    sides = (
        {name: jnp.zeros_like(x) if x.ndim == 3 else None for name, x in side.items()}
        for side in (factors.input_factors, factors.output_factors)
    )
    return _without_moments(factors), LayerBases(*sides)


@ops.is_finite.register
def _(information: MovingKronecker) -> jax.Array:
    moments = trees.all_finite(information.second_moments)
    return ops.is_finite(information.factors) & moments


@ops.parts.register
def _(factors: LayerBases) -> list[tuple[str, int]]:
    return eigenbasis.parts_by_layer(factors)


def _without_moments(factors: Any) -> MovingKronecker:
    outputs = factors.output_factors
    moments = {
        name: jnp.zeros((*x.shape[:2], outputs[name].shape[1]), x.dtype)
        for name, x in factors.input_factors.items()
    }
    return MovingKronecker(factors, moments)


def _is_moving(node: Any) -> bool:
    return isinstance(node, MovingKronecker)


linear.register(MovingKronecker)


def move_layers(
    layers: list[tuple[jax.Array, jax.Array, Basis, Basis, list[jax.Array]]],
) -> list[tuple[Basis, Basis, list[jax.Array]]]:
    """Of layers `(A, G, two old bases, second moments)`, these after the move."""
    pairs = [((a, p), (g, q)) for a, g, p, q, _ in layers]
    sides = divided(_side, [side for pair in pairs for side in pair])
    moved = []
    for left, right, (*_, moments) in zip(sides[::2], sides[1::2], layers, strict=True):
        inputs, input_overlap, input_ratio = left
        outputs, output_overlap, output_ratio = right
        ratio = input_ratio[:, :, None] * output_ratio[:, None, :]
        see = functools.partial(_seen, Sides(input_overlap, output_overlap), ratio)
        moved.append((inputs, outputs, [see(values) for values in moments]))
    return moved


def _seen(overlaps: Sides, ratio: jax.Array, values: jax.Array) -> jax.Array:
    seen = overlaps.out_of(values)
    seen = seen * ratio.reshape((1,) * (seen.ndim - 3) + ratio.shape)
    total, now = (jnp.sum(x, axis=(-2, -1), keepdims=True) for x in (values, seen))
    return seen * _quotient(total, now)


def _side(
    factor: jax.Array, old: Any
) -> tuple[jax.Array | None, jax.Array | None, jax.Array]:
    """A factor's new basis, its overlap with the old, and how turning errs on it.

    `(K, D)`: the factor's eigenvalues over what is found of them by taking its diagonal
    in the old basis and turning that, which spreads large values over small ones.
    """
    values, columns = eigenbasis.decompose(factor)
    if columns is None:
        return None, None, jnp.ones_like(values)
    overlap = jnp.square(product("kij,kil->kjl", columns, old))
    along = product("kij,kjl->kil", factor, old)
    turned_diagonal = product("kjl,kl->kj", overlap, jnp.sum(old * along, axis=1))
    return columns, overlap, _quotient(values, turned_diagonal)


def _quotient(numerator: jax.Array, denominator: jax.Array) -> jax.Array:
    """One where there is nothing to divide by."""
    there = denominator > 0
    one = jnp.ones_like(denominator)
    return jnp.where(there, numerator / jnp.where(there, denominator, one), one)
