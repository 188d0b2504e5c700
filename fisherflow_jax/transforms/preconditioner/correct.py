"""Eigenvalue correction within an optimiser, where the eigenbasis moves.

The factors are remembered as ever. Beside them the memory keeps second moments: the
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

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.lax import Precision

from fisherflow_jax import information as ops
from fisherflow_jax.estimators import Estimator
from fisherflow_jax.memories import Memory
from fisherflow_jax.structures import EigenKronecker, Kronecker
from fisherflow_jax.structures import _eigen_kronecker as eigen_kronecker
from fisherflow_jax.structures._algebra import eigen as eigenbasis
from fisherflow_jax.transforms.preconditioner.remember import Remembered, take_in
from fisherflow_jax.transforms.preconditioner.restrict import restrict

PyTree = Any


class MovingKronecker(NamedTuple):
    """Kronecker factors, and second moments in an eigenbasis that is kept elsewhere."""

    factors: Kronecker
    second_moments: dict[str, jax.Array]  # of each layer (K, I, O)


class LayerBases(NamedTuple):
    """The eigenbasis of each layer, until it is next decomposed."""

    input_bases: eigen_kronecker.Columns
    output_bases: eigen_kronecker.Columns


@ops.add_to.register
def _(left: MovingKronecker, right: Any) -> Any:
    if not isinstance(right, MovingKronecker):
        return NotImplemented
    return jax.tree.map(jnp.add, left, right)


@ops.scale.register
def _(information: MovingKronecker, factor: jax.typing.ArrayLike) -> MovingKronecker:
    factor = jnp.asarray(factor, information.factors.num_observations.dtype)
    return jax.tree.map(lambda x: x * factor, information)


@ops.total.register
def _(stacked: MovingKronecker, weights: jax.Array) -> MovingKronecker:
    return jax.tree.map(lambda x: jnp.tensordot(weights.astype(x.dtype), x, 1), stacked)


@restrict.register
def _(information: MovingKronecker, holed: PyTree) -> MovingKronecker:
    del holed
    return information


def begin(factors: Any) -> tuple[MovingKronecker, LayerBases]:
    """Nothing remembered, and bases of zeros, which the first update replaces."""
    if not isinstance(factors, Kronecker):
        raise ValueError(
            "eigenvalue_correction=True corrects the structure kronecker(layers); the "
            f"estimator's informations are of type {type(factors).__name__}."
        )

    def zeros(factors: dict[str, jax.Array]) -> eigen_kronecker.Columns:
        return {
            name: jnp.zeros_like(x) if x.ndim == 3 else None
            for name, x in factors.items()
        }

    outputs = factors.output_factors
    moments = {
        name: jnp.zeros((*x.shape[:2], outputs[name].shape[1]), x.dtype)
        for name, x in factors.input_factors.items()
    }
    bases = LayerBases(zeros(factors.input_factors), zeros(outputs))
    return MovingKronecker(factors, moments), bases


def corrected(information: MovingKronecker, bases: LayerBases) -> EigenKronecker:
    """The information that factors, second moments and bases make."""
    factors = information.factors
    return EigenKronecker(
        information.second_moments,
        bases.input_bases,
        bases.output_bases,
        factors.shifts,
        factors.other_entries,
        factors.num_observations,
        factors.layers,
    )


def uncorrected(information: Any) -> Any:
    """What the estimator's structure keeps of it."""
    return information.factors if _is_moving(information) else information


Groups = list[tuple[jax.Array, list[str]]]  # (whether it is due, names of its layers)


def refresh(
    memory: Memory,
    before: Remembered,
    bases: LayerBases,
    estimator: Estimator,
    measure: Callable[[Estimator], Any],
    weight: jax.Array,
    like: PyTree,
    groups: Groups,
) -> tuple[Remembered, LayerBases]:
    """What is remembered after a batch, and the bases that are due decomposed anew.

    The squares need the basis, and the basis the factors: the batch is measured twice.
    """
    factors = measure(estimator)
    nothing = jax.tree.map(jnp.zeros_like, before.information.second_moments)
    site = MovingKronecker(factors, nothing)
    ahead = take_in(memory, before, site, weight, like).information.factors
    # without an observation nothing is decomposed, and all stays to the last bit
    groups = [(due & (weight > 0), names) for due, names in groups]
    before, bases = _move(before, bases, ahead, groups)
    structure = eigen_kronecker.in_bases(factors.layers, *bases)
    squares = measure(estimator.with_structure(structure)).eigenvalues
    site = MovingKronecker(factors, squares)
    return take_in(memory, before, site, weight, like), bases


def _is_moving(node: Any) -> bool:
    return isinstance(node, MovingKronecker)


def _move(
    before: Remembered, bases: LayerBases, factors: Kronecker, groups: Groups
) -> tuple[Remembered, LayerBases]:
    """Bases that are due, and all second moments (of a window too) as seen from them.

    A memory's storage may hold stacks of informations: second moments of any rank.
    """
    kept = before.information, before.memory
    nodes, treedef = jax.tree.flatten(kept, is_leaf=_is_moving)
    inputs, outputs = dict(bases.input_bases), dict(bases.output_bases)
    moments = {
        name: [node.second_moments[name] for node in nodes if _is_moving(node)]
        for name in factors.input_factors
    }
    for due, names in groups:
        old = {name: (inputs[name], outputs[name], moments[name]) for name in names}

        def move(old=old):
            return {
                name: _moved(
                    factors.input_factors[name], factors.output_factors[name], *layer
                )
                for name, layer in old.items()
            }

        moved = jax.lax.cond(due, move, lambda old=old: old)
        for name, (left, right, seen) in moved.items():
            inputs[name], outputs[name], moments[name] = left, right, seen
    index = -1
    for place, node in enumerate(nodes):
        if _is_moving(node):
            index += 1
            seen = {name: moments[name][index] for name in node.second_moments}
            nodes[place] = node._replace(second_moments=seen)
    information, storage = jax.tree.unflatten(treedef, nodes)
    after = before._replace(information=information, memory=storage)
    return after, LayerBases(inputs, outputs)


def _moved(
    input_factor: jax.Array,
    output_factor: jax.Array,
    old_inputs: jax.Array | None,
    old_outputs: jax.Array | None,
    moments: list[jax.Array],
) -> tuple[jax.Array | None, jax.Array | None, list[jax.Array]]:
    """One layer's new bases, and its second moments as seen from them."""
    inputs, input_overlap, input_ratio = _side(input_factor, old_inputs)
    outputs, output_overlap, output_ratio = _side(output_factor, old_outputs)
    ratio = input_ratio[:, :, None] * output_ratio[:, None, :]

    def see(values: jax.Array) -> jax.Array:
        seen = eigen_kronecker.turned(values, input_overlap, output_overlap)
        seen = seen * ratio.reshape((1,) * (seen.ndim - 3) + ratio.shape)
        total, now = (jnp.sum(x, axis=(-2, -1), keepdims=True) for x in (values, seen))
        return seen * _quotient(total, now)

    return inputs, outputs, [see(values) for values in moments]


def _side(
    factor: jax.Array, old: jax.Array | None
) -> tuple[jax.Array | None, jax.Array | None, jax.Array]:
    """A factor's new basis, its overlap with the old, and how turning errs on it.

    `(K, D)`: the factor's eigenvalues over what is found of them by taking its diagonal
    in the old basis and turning that, which spreads large values over small ones.
    """
    values, columns = eigenbasis.decompose(factor)
    if columns is None:
        return None, None, jnp.ones_like(values)
    assert old is not None
    overlap = eigen_kronecker.overlap(columns, old)
    assert overlap is not None
    along = jnp.einsum("kij,kjl->kil", factor, old, precision=Precision.HIGHEST)
    spread = jnp.einsum(
        "kjl,kl->kj", overlap, jnp.sum(old * along, axis=1), precision=Precision.HIGHEST
    )
    return columns, overlap, _quotient(values, spread)


def _quotient(numerator: jax.Array, denominator: jax.Array) -> jax.Array:
    """One where there is nothing to divide by."""
    there = denominator > 0
    one = jnp.ones_like(denominator)
    return jnp.where(there, numerator / jnp.where(there, denominator, one), one)
