"""A damped information to a power: factorised once, applied to many vectors.

A factorisation is a pytree of arrays, so that a state can keep it. Its type decides how
it is applied. A way of damping of one's own is a function `(information, damping) ->
factorisation` whose type is registered with `apply`.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.linalg import cho_solve

from fisherflow_jax import information as ops
from fisherflow_jax._ground import trees
from fisherflow_jax.layers import Layers
from fisherflow_jax.structures import (
    Block,
    Diagonal,
    EigenKronecker,
    Full,
    Kronecker,
    Scalar,
    UnitBlock,
)
from fisherflow_jax.structures._algebra import dense, layer_vectors
from fisherflow_jax.structures._algebra import eigen as eigenbasis

PyTree = Any


@functools.singledispatch
def factorise(
    information: Any, damping: jax.Array, power: float = -1, root_damping: float = 0.0
) -> Any:
    r"""Prepares :math:`((F + \lambda)^{-p} + \epsilon)^{-1}` for `apply`.

    Args:
      information: the mean information of an observation.
      damping: `lambda`, on the information's scale.
      power: p; -1 is the inverse, -1/2 the inverse root.
      root_damping: `epsilon`, added after the root, as Adam's eps.

    Returns:
      A pytree of arrays. Full and blocks: a Cholesky factor for the power -1, an
      eigendecomposition for others; kronecker: its eigenbasis; scalar and diagonal: the
      divisors.

    Raises:
      ValueError: for a power other than -1 with the low_rank structure.
    """
    if power != -1:
        raise ValueError(
            "the structure of a "
            f"{type(information).__name__} information has its inverse at hand and no "
            f"other power; power must be -1, got {power}."
        )
    return Unfactorised(information, damping + root_damping)


@functools.singledispatch
def apply(factorisation: Any, vector: PyTree) -> PyTree:
    """The prepared power times a vector, like the vector."""
    raise TypeError(
        f"{type(factorisation).__name__} is no factorisation: register how it is "
        "applied with preconditioning.apply.register."
    )


def is_elementwise(factorisation: Any) -> bool:
    """Whether it takes no more to make than to apply."""
    return isinstance(factorisation, (Divisor, Divisors))


def relative_to_mean_eigenvalue(
    information: Any, damping: jax.Array, power: float = -1, root_damping: float = 0.0
) -> Any:
    """As `factorise`, the damping being in units of the mean eigenvalue."""
    if isinstance(information, Scalar):
        unit = information.value
    else:
        count = trees.size(jax.eval_shape(ops.diagonal, information))
        unit = ops.trace(information) / max(count, 1)
    return factorise(information, damping * unit, power, root_damping)


def _divisor(
    values: jax.Array, damping: jax.Array, power: float, root_damping: float
) -> jax.Array:
    damped = values + damping.astype(values.dtype)
    if power == -1:
        root = damped
    elif power == -0.5:
        root = jnp.sqrt(damped)  # of a power the last bit is another
    else:
        root = damped ** (-power)
    return root + root_damping


def _over(vector: PyTree, divisors: PyTree) -> PyTree:
    return jax.tree.map(lambda x, a: x.astype(a.dtype) / a, vector, divisors)


class Unfactorised(NamedTuple):
    """Solved anew for each vector: it costs little more than keeping factors."""

    solved: Any  # information
    solved_damping: jax.Array  # ()


@apply.register
def _(factorisation: Unfactorised, vector: PyTree) -> PyTree:
    return ops.solve(factorisation.solved, vector, factorisation.solved_damping)


# ---- scalar and diagonal


class Divisor(NamedTuple):
    """One number that every entry is divided by."""

    divisor: jax.Array  # ()


class Divisors(NamedTuple):
    """A number for each entry."""

    divisors: PyTree  # like the parameters


@factorise.register
def _(
    information: Scalar,
    damping: jax.Array,
    power: float = -1,
    root_damping: float = 0.0,
) -> Divisor:
    return Divisor(_divisor(information.value, damping, power, root_damping))


@factorise.register
def _(
    information: Diagonal,
    damping: jax.Array,
    power: float = -1,
    root_damping: float = 0.0,
) -> Divisors:
    return Divisors(
        jax.tree.map(
            lambda a: _divisor(a, damping, power, root_damping), information.entries
        )
    )


@apply.register
def _(factorisation: Divisor, vector: PyTree) -> PyTree:
    divisor = factorisation.divisor
    return jax.tree.map(lambda x: x.astype(divisor.dtype) / divisor, vector)


@apply.register
def _(factorisation: Divisors, vector: PyTree) -> PyTree:
    return _over(vector, factorisation.divisors)


# ---- full and blocks


class CholeskyFactors(NamedTuple):
    """Cholesky factors of the equilibrated blocks, and the scales."""

    factors: Any  # laid out as the information
    scales: PyTree  # like the parameters


class Eigenbasis(NamedTuple):
    """Eigenvectors of the blocks, and what their coordinates are divided by."""

    columns: Any  # laid out as the information
    coordinate_divisors: PyTree  # like the parameters


def _factorise_dense(
    information: Any, damping: jax.Array, power: float = -1, root_damping: float = 0.0
) -> CholeskyFactors | Eigenbasis:
    blocks = dense.matrices(information)
    if not jax.tree.leaves(information):
        # optax.tree.map_params builds states on a tree without leaves
        kind = CholeskyFactors if power == -1 else Eigenbasis
        return kind(information, dense.unpack(information, blocks))
    if power == -1:
        pairs = [dense.factorise(block, damping + root_damping) for block in blocks]
        return CholeskyFactors(
            dense.with_matrices(information, [factor for factor, _ in pairs]),
            dense.unpack(information, [scales for _, scales in pairs]),
        )
    columns, divisors = [], []
    for block in blocks:
        stack = block.reshape((-1, *block.shape[-2:]))
        values, basis = eigenbasis.decompose(stack)
        assert basis is not None  # a stack of matrices has one
        columns.append(basis.reshape(block.shape))
        divisor = _divisor(values, damping, power, root_damping)
        divisors.append(divisor.reshape(block.shape[:-1]))
    return Eigenbasis(
        dense.with_matrices(information, columns), dense.unpack(information, divisors)
    )


factorise.register(Full, _factorise_dense)
factorise.register(Block, _factorise_dense)
factorise.register(UnitBlock, _factorise_dense)


def _map_blocks(
    function: Callable, layout: Any, diagonal: PyTree, vector: PyTree
) -> PyTree:
    parts = zip(
        dense.matrices(layout),
        dense.pack(layout, diagonal),
        dense.pack(layout, vector),
        strict=True,
    )
    return dense.unpack(layout, [function(*part) for part in parts])


@apply.register
def _(factorisation: CholeskyFactors, vector: PyTree) -> PyTree:
    def solve(factor: jax.Array, scales: jax.Array, part: jax.Array) -> jax.Array:
        return cho_solve((factor, True), (part / scales)[..., None])[..., 0] / scales

    return _map_blocks(solve, factorisation.factors, factorisation.scales, vector)


@apply.register
def _(factorisation: Eigenbasis, vector: PyTree) -> PyTree:
    def multiply(basis: jax.Array, divisor: jax.Array, part: jax.Array) -> jax.Array:
        coordinates = jnp.einsum("...ij,...i->...j", basis, part) / divisor
        return jnp.einsum("...ij,...j->...i", basis, coordinates)

    return _map_blocks(
        multiply, factorisation.columns, factorisation.coordinate_divisors, vector
    )


# ---- kronecker: damping is exact in its eigenbasis


class LayerEigenbases(NamedTuple):
    """The eigenbasis of each layer, and what coordinates in it are divided by."""

    layer_spectra: dict[str, eigenbasis.Spectrum]  # divisors as their values
    other_divisors: dict[str, jax.Array]
    factorised_layers: Layers  # static


def _factorise_layers(
    information: Any, damping: jax.Array, power: float = -1, root_damping: float = 0.0
) -> LayerEigenbases:
    def divisor(values: jax.Array) -> jax.Array:
        return _divisor(values, damping, power, root_damping)

    found = eigenbasis.spectra(information)
    return LayerEigenbases(
        {name: s._replace(values=divisor(s.values)) for name, s in found.items()},
        {name: divisor(entries) for name, entries in information.other_entries.items()},
        information.layers,
    )


factorise.register(Kronecker, _factorise_layers)
factorise.register(EigenKronecker, _factorise_layers)


@apply.register
def _(factorisation: LayerEigenbases, vector: PyTree) -> PyTree:
    found, layers = factorisation.layer_spectra, factorisation.factorised_layers
    dtype = trees.float_dtype(factorisation.other_divisors or found)
    matrices, others = layer_vectors.split(layers, vector, dtype)
    solved = {
        name: found[name].out_of(found[name].into(matrix) / found[name].values)
        for name, matrix in matrices.items()
    }
    rest = {name: x / factorisation.other_divisors[name] for name, x in others.items()}
    return layer_vectors.join(layers, solved | rest, vector)
