"""A Kronecker product for each linear layer, and a diagonal for all else."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.lax import Precision

from fisherflow_jax import information as ops
from fisherflow_jax import vectors
from fisherflow_jax.layers import Layer, Layers
from fisherflow_jax.structures import eigenbasis
from fisherflow_jax.structures.eigenbasis import Basis, Spectrum
from fisherflow_jax.structures.kronecker_factors import (
    Sharing,
    expand,
    factors,
    with_bias,
)
from fisherflow_jax.structures.layer_vectors import named
from fisherflow_jax.structures.outer_products import OuterProducts, squares
from fisherflow_jax.structures.structure import Structure

PyTree = Any


class Kronecker(NamedTuple):
    r"""Information :math:`A_k \otimes G_k / n + \delta` of each layer's kernels."""

    input_factors: dict[str, jax.Array]  # A of each layer: (K, I, I) or (K, I)
    output_factors: dict[str, jax.Array]  # G of each layer: (K, O, O) or (K, O)
    shifts: dict[str, jax.Array]  # delta of each layer, ()
    other_entries: dict[str, jax.Array]  # the diagonal of the other leaves
    num_observations: jax.Array  # n, ()
    layers: Layers  # static


def kronecker(
    layers: Layers,
    *,
    sharing: Sharing | Mapping[str, Sharing] = expand,
    widest: int = 4096,
    eigenvalue_correction: Kronecker | None = None,
) -> Structure:
    r"""Keeps two factors for each linear layer: K-FAC.

    .. math:: F_k \approx \tfrac1n A_k \otimes G_k, \qquad
       A_k = \sum_{nt} a_{nkt} a_{nkt}^\top, \quad
       G_k = \tfrac1T \sum_{nt} g_{nkt} g_{nkt}^\top

    with the inputs `a` of a layer and the vectors `g` pulled back to its outputs. A
    merged bias is a row of the kernel that sees ones. Parameters that belong to no
    layer keep the exact diagonal. Informations add by their factors and by n, which
    is not the sum of the operators: K-FAC of two batches is that of both together.
    A prior (one number a layer) is added exactly, in the eigenbasis.

    Args:
      layers: from `ff.layers.find_layers`.
      sharing: `ff.structures.expand` (default) or `ff.structures.reduce`, how positions
        that share a kernel are treated; or a mapping from the kernel's path (as in
        `layers.names`) to one, the others being expanded.
      widest: sides of more than so many units, and the rows of embeddings, keep the
        diagonal of their factor.
      eigenvalue_correction: an information of this structure (of a first pass, or of
        the past). Its eigenbasis is kept, and in it the exact diagonal of the
        information is summed: EK-FAC, whose error in the Frobenius norm is never
        larger.

    Returns:
      A `Structure` whose information is a `Kronecker`, or an `EigenKronecker` with
      `eigenvalue_correction`. Memory: I^2 + O^2 a kernel. A
      batch costs N T (I^2 + O^2); a solve I^3 + O^3 once (two eigendecompositions) and
      I O (I + O) a vector.

    Raises:
      ValueError: for a path in `sharing` that is no kernel; when an estimator finds
        other layers.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> apply_fn = lambda params, x: x @ params["w"] + params["b"]
      >>> params = {"w": jnp.zeros((2, 2)), "b": jnp.zeros(2)}
      >>> batch = jnp.array([[1.0, 2.0]]), None
      >>> layers = ff.layers.find_layers(apply_fn, params, batch[0])
      >>> estimator = ff.estimators.exact(
      ...     apply_fn, ff.likelihoods.gaussian(), ff.structures.kronecker(layers)
      ... )
      >>> information = estimator(params, batch)
      >>> information.input_factors["['w']"][0]  # of the inputs (1, 2), and 1
      Array([[1., 2., 1.],
             [2., 4., 2.],
             [1., 2., 1.]], dtype=float32)
      >>> information.output_factors["['w']"][0]
      Array([[1., 0.],
             [0., 1.]], dtype=float32)

    References:
      Martens, Grosse, "Optimizing neural networks with Kronecker-factored approximate
      curvature", 2015.
      George, Laurent, Bouthillier, Ballas, Vincent, "Fast approximate natural gradient
      descent in a Kronecker-factored eigenbasis", 2018.
    """
    if eigenvalue_correction is not None:
        return _corrected(layers, eigenvalue_correction)
    kernels = [layers.names[layer.kernel] for layer in layers.layers]
    by_name = {}
    if isinstance(sharing, Mapping):
        by_name, sharing = dict(sharing), expand
        unknown = sorted(set(by_name) - set(kernels))
        if unknown:
            raise ValueError(
                f"sharing names {unknown}, which are no kernels; the kernels are "
                f"{kernels}."
            )

    def reduce(stack: PyTree) -> Kronecker:
        leaves, dtype = _checked(stack, layers), vectors.float_dtype(stack)
        inputs, outputs, count = {}, {}, jnp.zeros((), dtype)
        for name in kernels:
            products = leaves[name]
            inputs[name], outputs[name] = factors(
                products, by_name.get(name, sharing), widest
            )
            count = jnp.sum(products.weights).astype(dtype)
        others = _other_squares(layers, leaves, dtype)
        shifts = {name: jnp.zeros((), dtype) for name in kernels}
        return Kronecker(inputs, outputs, shifts, others, count, layers)

    def isotropic(params: PyTree, value: jax.typing.ArrayLike) -> Kronecker:
        # from the table alone: wrappers of Optax build states on trees with holes
        dtype = vectors.float_dtype(params)
        value = jnp.asarray(value, dtype)

        def zeros(stacked: int, size: int, diagonal: bool) -> jax.Array:
            return jnp.zeros(
                (stacked, size) if diagonal else (stacked, size, size), dtype
            )

        inputs, outputs = {}, {}
        for layer, name in zip(layers.layers, kernels, strict=True):
            rows = layer.num_inputs + (layer.bias is not None)
            narrow = layer.kind != "embedding" and rows <= widest
            inputs[name] = zeros(layer.num_stacked, rows, not narrow)
            outputs[name] = zeros(
                layer.num_stacked, layer.num_outputs, layer.num_outputs > widest
            )
        others = _other_constants(layers, value)
        shifts = dict.fromkeys(kernels, value)
        return Kronecker(inputs, outputs, shifts, others, jnp.zeros((), dtype), layers)

    return Structure("kronecker(layers)", reduce, isotropic, takes_outer_products=True)


def _checked(stack: PyTree, layers: Layers) -> dict[str, Any]:
    """The leaves by name: those of the layers that were given, and no others."""
    leaves = named(stack)
    if set(leaves) != set(layers.names):
        raise ValueError(
            "kronecker(layers) was given the layers of other parameters: it lacks "
            f"{sorted(set(leaves) - set(layers.names))}, and the model lacks "
            f"{sorted(set(layers.names) - set(leaves))}."
        )
    kernels = {layers.names[layer.kernel]: layer for layer in layers.layers}
    for name, leaf in leaves.items():
        layer, found = kernels.get(name), isinstance(leaf, OuterProducts)
        if layer is not None and not found:
            raise ValueError(
                "kronecker needs the inputs and gradients of each example, and the "
                f"estimator gave whole vectors of {name}: give it groups=None and "
                "fast_squares=True, or find the layers of this apply_fn."
            )
        if found and (layer is None or not _is_of(leaf, layer)):
            raise ValueError(
                f"the model's layer with kernel {name} is not the one that "
                "kronecker(layers) was given: find the layers of this apply_fn and of "
                "these inputs."
            )
    return leaves


def _other_squares(layers: Layers, leaves: dict[str, Any], dtype: Any) -> dict:
    """The diagonal of the leaves that belong to no layer."""
    names = [layers.names[leaf] for leaf, _ in layers.fallback]
    return {name: squares(leaves[name], dtype) for name in names}


def _other_constants(layers: Layers, value: jax.Array) -> dict[str, jax.Array]:
    return {
        layers.names[leaf]: jnp.full(layers.shapes[leaf], value)
        for leaf, _ in layers.fallback
    }


def _is_of(products: OuterProducts, layer: Layer) -> bool:
    return (
        products.layout == layer.kernel_layout
        and products.num_inputs == layer.num_inputs
        and products.has_bias == (layer.bias is not None)
    )


@eigenbasis.spectra.register
def _(information: Kronecker) -> dict[str, Spectrum]:
    count = information.num_observations
    # no observations: the factors are zero, and so is their product
    share = jnp.where(count > 0, 1 / jnp.where(count > 0, count, 1), 0)
    found = {}
    for name, factor in information.input_factors.items():
        inputs, input_basis = eigenbasis.decompose(factor)
        outputs, output_basis = eigenbasis.decompose(information.output_factors[name])
        values = share * inputs[:, :, None] * outputs[:, None, :]
        shift = information.shifts[name]
        found[name] = Spectrum(values + shift, Basis(input_basis), Basis(output_basis))
    return found


eigenbasis.register(Kronecker)


# ---- the exact diagonal in a given eigenbasis


class EigenKronecker(NamedTuple):
    r"""Information :math:`(U_A \otimes U_G)(S + \delta)(U_A \otimes U_G)^\top`."""

    eigenvalues: dict[str, jax.Array]  # S of each layer: (K, I, O)
    input_bases: dict[str, jax.Array | None]  # U_A: (K, I, I); None: the identity
    output_bases: dict[str, jax.Array | None]  # U_G: (K, O, O); None: the identity
    shifts: dict[str, jax.Array]  # delta of each layer, ()
    other_entries: dict[str, jax.Array]  # the diagonal of the other leaves
    num_observations: jax.Array  # n, ()
    layers: Layers  # static


def _corrected(layers: Layers, past: Kronecker) -> Structure:
    if not isinstance(past, Kronecker) or past.layers != layers:
        raise ValueError(
            "eigenvalue_correction must be an information of kronecker(layers) with "
            f"these layers; got {type(past).__name__}."
        )
    found = eigenbasis.spectra(past)

    def build(eigenvalues: dict, shifts: dict, others: dict, count: jax.Array):
        return EigenKronecker(
            eigenvalues,
            {name: spectrum.inputs.columns for name, spectrum in found.items()},
            {name: spectrum.outputs.columns for name, spectrum in found.items()},
            shifts,
            others,
            count,
            layers,
        )

    def reduce(stack: PyTree) -> EigenKronecker:
        leaves, dtype = _checked(stack, layers), vectors.float_dtype(stack)
        eigenvalues, count = {}, jnp.zeros((), dtype)
        for layer in layers.layers:
            name = layers.names[layer.kernel]
            products = leaves[name]
            eigenvalues[name] = _squares_in(found[name], products)
            count = jnp.sum(products.weights).astype(dtype)
        others = _other_squares(layers, leaves, dtype)
        shifts = {name: jnp.zeros((), dtype) for name in found}
        return build(eigenvalues, shifts, others, count)

    def isotropic(params: PyTree, value: jax.typing.ArrayLike) -> EigenKronecker:
        dtype = vectors.float_dtype(params)
        value = jnp.asarray(value, dtype)
        eigenvalues = {
            name: jnp.zeros(spectrum.values.shape, dtype)
            for name, spectrum in found.items()
        }
        others = _other_constants(layers, value)
        shifts = dict.fromkeys(found, value)
        return build(eigenvalues, shifts, others, jnp.zeros((), dtype))

    return Structure(
        "kronecker(layers, eigenvalue_correction)",
        reduce,
        isotropic,
        takes_outer_products=True,
    )


class _Matrix:
    """The layout of a kernel that is an array `(K, I, O)` itself."""

    @staticmethod
    def to_leaf(values: jax.Array) -> jax.Array:
        return values


def _squares_in(spectrum: Spectrum, products: OuterProducts) -> jax.Array:
    """The diagonal `(K, I, O)` of the vectors' outer products in the eigenbasis."""
    inputs, gradients = products.inputs, products.gradients
    columns = spectrum.outputs.columns
    if columns is not None:
        gradients = jnp.einsum(
            "nrkto,kop->nrktp", gradients, columns, precision=Precision.HIGHEST
        )
    if not products.one_hot:
        inputs = inputs.astype(gradients.dtype)
        inputs = with_bias(inputs) if products.has_bias else inputs
        columns = spectrum.inputs.columns
        if columns is not None:
            inputs = jnp.einsum(
                "nkti,kij->nktj", inputs, columns, precision=Precision.HIGHEST
            )
    values = dataclasses.replace(
        products,
        inputs=inputs,
        gradients=gradients,
        num_inputs=products.num_inputs if products.one_hot else inputs.shape[-1],
        layout=_Matrix,
    ).squares()
    if products.one_hot and products.has_bias:
        summed = jnp.sum(gradients, axis=3)
        row = jnp.sum(jnp.square(summed), axis=(0, 1))
        values = jnp.concatenate([values, row[:, None]], axis=1)
    return values


@eigenbasis.spectra.register
def _(information: EigenKronecker) -> dict[str, Spectrum]:
    return {
        name: Spectrum(
            values + information.shifts[name],
            Basis(information.input_bases[name]),
            Basis(information.output_bases[name]),
        )
        for name, values in information.eigenvalues.items()
    }


eigenbasis.register(EigenKronecker)


@eigenbasis.sum_of_equals.register
def _(left: EigenKronecker, right: EigenKronecker) -> EigenKronecker:
    # of the operator on the right what is diagonal in the basis on the left: all of it
    # where the bases are the same
    def turned(name: str, values: jax.Array) -> jax.Array:
        for axis, bases in enumerate(("input_bases", "output_bases"), start=1):
            ours, theirs = getattr(left, bases)[name], getattr(right, bases)[name]
            if ours is not None and ours is not theirs:
                overlap = jnp.square(
                    jnp.einsum(
                        "kij,kil->kjl", ours, theirs, precision=Precision.HIGHEST
                    )
                )
                spec = "kjl,klo->kjo" if axis == 1 else "kjl,kil->kij"
                values = jnp.einsum(spec, overlap, values, precision=Precision.HIGHEST)
        return values

    return left._replace(
        eigenvalues={
            name: values + turned(name, right.eigenvalues[name])
            for name, values in left.eigenvalues.items()
        },
        shifts=jax.tree.map(jnp.add, left.shifts, right.shifts),
        other_entries=jax.tree.map(jnp.add, left.other_entries, right.other_entries),
        num_observations=left.num_observations + right.num_observations,
    )


@ops.scale.register
def _(information: EigenKronecker, factor: jax.typing.ArrayLike) -> EigenKronecker:
    scaled = eigenbasis.scaled(information, factor)
    return scaled._replace(
        input_bases=information.input_bases, output_bases=information.output_bases
    )


@ops.total.register
def _(stacked: EigenKronecker, weights: jax.Array) -> EigenKronecker:
    parts = [
        ops.scale(jax.tree.map(lambda x, i=i: x[i], stacked), weights[i])
        for i in range(weights.shape[0])
    ]
    return functools.reduce(ops.add, parts)
