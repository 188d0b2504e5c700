"""The exact diagonal in a given Kronecker-factored eigenbasis: EK-FAC."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fisherflow_jax import information as ops
from fisherflow_jax._ground.linalg import product
from fisherflow_jax.layers import Layer, Layers
from fisherflow_jax.structures._algebra import eigen as eigenbasis
from fisherflow_jax.structures._algebra import kronecker_factors, linear
from fisherflow_jax.structures._algebra.eigen import Sides
from fisherflow_jax.structures._algebra.kronecker_factors import flat, with_bias
from fisherflow_jax.structures._algebra.outer_products import OuterProducts
from fisherflow_jax.structures._structure import Structure

# of layers that are alike (K, D, D); None: the identity
Columns = dict[str, jax.Array | None]


class EigenKronecker(NamedTuple):
    r"""Information :math:`(U_A \otimes U_G)(S + \delta)(U_A \otimes U_G)^\top`.

    Kept by `ff.structures.kronecker`.
    """

    eigenvalues: dict[str, jax.Array]  # S of layers that are alike: (K, I, O)
    input_bases: Columns  # U_A
    output_bases: Columns  # U_G
    shifts: dict[str, jax.Array]  # delta, (K,)
    other_entries: dict[str, jax.Array]  # the diagonal of the other leaves
    num_observations: jax.Array  # n, ()
    layers: Layers  # static


def in_bases(layers: Layers, input_bases: Columns, output_bases: Columns) -> Structure:
    """Keeps the diagonal of the information in the bases that are given."""

    def reduce_layer(name: str, products: OuterProducts) -> jax.Array:
        return _squares_in(input_bases[name], output_bases[name], products)

    def empty_layer(layer: Layer, rows: int, dtype: Any) -> jax.Array:
        return jnp.zeros((layer.num_stacked, rows, layer.num_outputs), dtype)

    def build(eigenvalues: dict, *, num_observations: jax.Array, **rest: Any) -> Any:
        # one type throughout: the bases may come from a wider past
        dtype = num_observations.dtype
        inputs, outputs = jax.tree.map(
            lambda x: x.astype(dtype), (input_bases, output_bases)
        )
        return EigenKronecker(
            eigenvalues=eigenvalues,
            input_bases=inputs,
            output_bases=outputs,
            num_observations=num_observations,
            **rest,
        )

    name = "kronecker(layers, eigenvalue_correction)"
    return kronecker_factors.structure(name, layers, reduce_layer, empty_layer, build)


class _Matrix:
    """The layout of a kernel that is an array `(K, I, O)` itself."""

    @staticmethod
    def to_leaf(values: jax.Array) -> jax.Array:
        return values


def _turned(rows: jax.Array, columns: jax.Array | None) -> jax.Array:
    """Rows `(..., K, S, D)` in the bases with these columns, `(K, D, D)`."""
    if columns is None:
        return rows
    turned = product("kni,kij->knj", flat(rows), columns.astype(rows.dtype))
    stacked_first = jnp.moveaxis(rows, -3, 0).shape
    return jnp.moveaxis(turned.reshape(stacked_first), 0, -3)


def _rows_of(columns: jax.Array, ids: jax.Array) -> jax.Array:
    """One-hot rows of ids `(n, K, T)`, turned; of an id out of bounds zeros."""

    def take(columns: jax.Array, ids: jax.Array) -> jax.Array:
        return jnp.take(columns, ids, axis=0, mode="fill", fill_value=0)

    return jax.vmap(take, (0, 1), 1)(columns, ids)


def _squares_in(
    input_columns: jax.Array | None,
    output_columns: jax.Array | None,
    products: OuterProducts,
) -> jax.Array:
    """The diagonal `(K, I, O)` of the vectors' outer products in the eigenbasis."""
    inputs, turned, dtype = products.inputs, products.turned, products.dtype
    gradients = _turned(products.gradients, output_columns)
    if products.one_hot and input_columns is not None:  # of a tied table
        inputs = _rows_of(input_columns.astype(dtype), inputs)
    elif not products.one_hot:
        inputs = inputs.astype(dtype)
        inputs = with_bias(inputs) if products.has_bias else inputs
        inputs = _turned(inputs, input_columns)
    if turned is not None:
        turned = dataclasses.replace(
            turned,
            inputs=_turned(turned.inputs.astype(dtype), output_columns),
            gradients=_turned(turned.gradients, input_columns),
        )
    values = dataclasses.replace(
        products,
        inputs=inputs,
        gradients=gradients,
        num_inputs=products.num_inputs if inputs.ndim == 3 else inputs.shape[-1],
        layout=_Matrix,
        turned=turned,
    ).squares()
    if products.one_hot and products.has_bias:
        summed = jnp.sum(gradients, axis=3)
        row = jnp.sum(jnp.square(summed), axis=(0, 1))
        values = jnp.concatenate([values, row[:, None]], axis=1)
    return values


@eigenbasis.spectrum.register
def _(information: EigenKronecker, name: str) -> tuple[jax.Array, Sides]:
    sides = Sides(information.input_bases[name], information.output_bases[name])
    shift = information.shifts[name][:, None, None]
    return information.eigenvalues[name] + shift, sides


eigenbasis.register(EigenKronecker)


@ops.embed.register
def _(
    information: EigenKronecker, entries: Any, like: Any = None, template: Any = None
) -> EigenKronecker:
    if template is not None and template.layers == information.layers:
        return information
    raise ValueError(
        "corrected eigenvalues are kept in bases of layers of one size: layers that "
        "grow, or are new, need the structure kronecker(layers) without correction."
    )


# ---- sums: in the basis on the left, what is diagonal there


def overlap(ours: jax.Array | None, theirs: jax.Array | None) -> jax.Array | None:
    """Squared cosines `(..., K, ours, theirs)`; None where both are the identity.

    `Sides(*overlaps).out_of(values)` is the diagonal, in our bases, of an operator with
    these eigenvalues in theirs. Its trace stays.
    """
    if ours is None:
        return None if theirs is None else jnp.square(theirs)
    if theirs is None:
        return jnp.square(jnp.swapaxes(ours, -1, -2))
    return jnp.square(product("...ij,...il->...jl", ours, theirs))


def _same(left: Columns, right: Columns) -> jax.Array | bool:
    """Whether two sets of bases are equal: `True` where that is known beforehand."""
    same: jax.Array | bool = True
    for name, ours in left.items():
        theirs = right[name]
        if ours is theirs:
            continue
        if ours is None or theirs is None:
            return False
        same = jnp.all(ours == jnp.broadcast_to(theirs, ours.shape)) & same
    return same


def _seen_from(ours: EigenKronecker, theirs: EigenKronecker) -> dict[str, jax.Array]:
    """The eigenvalues of `theirs` (also a stack of them) in the bases of `ours`."""

    def turn(values: dict[str, jax.Array]) -> dict[str, jax.Array]:
        seen = {}
        for name, x in values.items():
            inputs = overlap(ours.input_bases[name], theirs.input_bases[name])
            outputs = overlap(ours.output_bases[name], theirs.output_bases[name])
            seen[name] = Sides(inputs, outputs).out_of(x)
        return seen

    inputs = _same(theirs.input_bases, ours.input_bases)
    outputs = _same(theirs.output_bases, ours.output_bases)
    if inputs is False or outputs is False:
        return turn(theirs.eigenvalues)
    if inputs is True and outputs is True:
        return theirs.eigenvalues
    # comparing costs far less than turning, and bases are most often equal
    same = jnp.asarray(inputs) & jnp.asarray(outputs)
    return jax.lax.cond(same, lambda x: x, turn, theirs.eigenvalues)


@ops.add_to.register
def _(left: EigenKronecker, right: Any) -> Any:
    if not isinstance(right, EigenKronecker):
        return eigenbasis.add_other(left, right)
    linear.check_same(left.layers, right.layers, EigenKronecker)
    return left._replace(
        eigenvalues=jax.tree.map(jnp.add, left.eigenvalues, _seen_from(left, right)),
        shifts=jax.tree.map(jnp.add, left.shifts, right.shifts),
        other_entries=jax.tree.map(jnp.add, left.other_entries, right.other_entries),
        num_observations=left.num_observations + right.num_observations,
    )


@ops.scale.register
def _(information: EigenKronecker, factor: jax.typing.ArrayLike) -> EigenKronecker:
    return _with_bases_of(information, linear.scaled(information, factor))


@ops.total.register
def _(stacked: EigenKronecker, weights: jax.Array) -> EigenKronecker:
    first = jax.tree.map(lambda x: x[0], stacked)
    seen = stacked._replace(eigenvalues=_seen_from(first, stacked))
    return _with_bases_of(first, linear.total(seen, weights))


def _with_bases_of(one: EigenKronecker, other: EigenKronecker) -> EigenKronecker:
    return other._replace(input_bases=one.input_bases, output_bases=one.output_bases)
