r"""The log-determinant `log |F + P|` as a function of a diagonal prior precision P.

What does not depend on the prior is computed once, so that a search over priors costs
little more than one evaluation where the structure allows it.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fisherflow_jax import information as ops
from fisherflow_jax._ground import trees
from fisherflow_jax.structures import (
    Block,
    Compensated,
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
Determinant = Callable[[PyTree, jax.Array], jax.Array]


@functools.singledispatch
def determinant(information: Any, like: PyTree) -> Determinant:
    """`(entries, factor) -> log |factor F + diag(entries)|`, entries like params."""

    def value(entries: PyTree, factor: jax.Array) -> jax.Array:
        scaled = ops.scale(information, factor)
        return ops.logdet(ops.add(scaled, Diagonal(entries)), like)

    return value


@determinant.register
def _(information: Scalar, like: PyTree) -> Determinant:
    del like

    def value(entries: PyTree, factor: jax.Array) -> jax.Array:
        return jnp.sum(jnp.log(factor * information.value + trees.ravel(entries)))

    return value


@determinant.register
def _(information: Compensated, like: PyTree) -> Determinant:
    return determinant(information.value, like)


@determinant.register(Kronecker)
@determinant.register(EigenKronecker)
def _of_layers(information: Any, like: PyTree) -> Determinant:
    del like
    layers = information.layers
    found = {
        name: spectrum.values
        for name, spectrum in eigenbasis.spectra(information).items()
    }
    dtype = information.num_observations.dtype

    def value(entries: PyTree, factor: jax.Array) -> jax.Array:
        matrices, others = layer_vectors.split(layers, entries, dtype)
        logs = [
            # one number a layer (see `check_layers`), which every basis leaves alone
            jnp.sum(jnp.log(factor * values + matrices[name].ravel()[0]))
            for name, values in found.items()
        ]
        logs += [
            jnp.sum(jnp.log(factor * information.other_entries[name] + values))
            for name, values in others.items()
        ]
        return sum(logs[1:], start=logs[0])

    return value


def isotropic_determinant(information: Any, like: PyTree) -> Determinant:
    """The same for entries that are all equal: of dense blocks from eigenvalues."""
    information = ops.plain(information)
    if not isinstance(information, (Full, Block, UnitBlock)):
        return determinant(information, like)
    spectra = [
        eigenbasis.decompose(m.reshape((-1, *m.shape[-2:])))[0]
        for m in dense.matrices(information)
    ]

    def value(entries: PyTree, factor: jax.Array) -> jax.Array:
        number = jax.tree.leaves(entries)[0].ravel()[0]
        logs = [jnp.sum(jnp.log(factor * values + number)) for values in spectra]
        return sum(logs[1:], start=logs[0])

    return value


def check_layers(information: Any, prior_precision: PyTree, like: PyTree) -> None:
    """Raises unless the prior has one number a layer of a Kronecker information.

    By the numbers where they are at hand, else by where they stand in the tree.
    """
    information = ops.plain(information)
    if not isinstance(information, (Kronecker, EigenKronecker)):
        return
    layers = information.layers
    leaves, treedef = jax.tree.flatten(prior_precision)
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
