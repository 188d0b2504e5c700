"""A Kronecker product for each linear layer, and a diagonal for all else."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fisherflow_jax import information as ops
from fisherflow_jax._ground import checks, trees
from fisherflow_jax._ground.choices import choice
from fisherflow_jax._ground.linalg import diagonal, product
from fisherflow_jax._ground.placement import divided
from fisherflow_jax.layers import Layer, Layers
from fisherflow_jax.structures import _eigen_kronecker as eigen_kronecker
from fisherflow_jax.structures import _moving_kronecker as moving_kronecker
from fisherflow_jax.structures import _packed_kronecker as packed_kronecker
from fisherflow_jax.structures._algebra import (
    dense,
    kronecker_factors,
    larger_layers,
    layer_vectors,
)
from fisherflow_jax.structures._algebra import eigen as eigenbasis
from fisherflow_jax.structures._algebra.columns import uncoupled
from fisherflow_jax.structures._algebra.eigen import Sides
from fisherflow_jax.structures._algebra.kronecker_factors import factors
from fisherflow_jax.structures._algebra.outer_products import entering_and_returning
from fisherflow_jax.structures._structure import Structure
from fisherflow_jax.structures.sharing import Sharing, expand

PyTree = Any


class Kronecker(NamedTuple):
    r"""Information :math:`A_k \otimes G_k / n + \delta` of each layer's kernels.

    Kept by `ff.structures.kronecker`.

    Layers that are alike (`layers.alike`) are stacked under the name of the first one's
    kernel; `layers.places` says where a layer is.
    """

    input_factors: dict[str, jax.Array]  # A: (K, I, I) or (K, I)
    output_factors: dict[str, jax.Array]  # G: (K, O, O) or (K, O)
    shifts: dict[str, jax.Array]  # delta, (K,)
    other_entries: dict[str, jax.Array]  # the diagonal of the other leaves
    num_observations: jax.Array  # n, ()
    layers: Layers  # static


@choice
def kronecker(
    layers: Layers,
    *,
    sharing: Sharing | Mapping[str, Sharing] = expand,
    widest: int = 2048,
    eigenvalue_correction: Kronecker | None = None,
) -> Structure:
    r"""Keeps two factors for each linear layer: K-FAC.

    .. math:: F_k \approx \tfrac1n A_k \otimes G_k, \qquad
       A_k = \sum_{nt} a_{nkt} a_{nkt}^\top, \quad
       G_k = \tfrac1T \sum_{nt} g_{nkt} g_{nkt}^\top

    with the inputs `a` of a layer and the vectors `g` pulled back to its outputs. A
    merged bias is a row of the kernel that sees ones. Where a kernel is tied, and its
    transpose takes h to outputs with gradients d, as a table of embeddings does at the
    end of a language model, both uses are positions that share it: A has the sum of
    :math:`d d^\top` added, and G is the mean of :math:`g g^\top` and
    :math:`h h^\top` over T + T' positions. A change of the kernel's basis on one side
    changes that side's factor alone. Parameters that belong to no
    layer keep the exact diagonal. Informations add by their factors and by n, which
    is not the sum of the operators: K-FAC of two batches is that of both together.
    A prior (one number a layer) is added exactly, in the eigenbasis.

    Args:
      layers: from `ff.layers.find_layers`.
      sharing: `ff.structures.sharing.expand` (default) or `sharing.pool`, how positions
        that share a kernel are treated; or a mapping from the kernel's path (as in
        `layers.names`) to one, the others being expanded.
      widest: sides of more than so many units keep the diagonal of their factor, and
        so do the rows of a table that is only looked up. Those of a tied one have a
        whole factor, which its outputs' gradients ask for, up to `widest` of them. The
        row of a merged bias is not counted.
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
      ValueError: for layers that are none, a path in `sharing` that is no kernel, a
        `widest` that is no whole number, and positions to be pooled of rows that are
        mixed; when an estimator finds other layers.

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
      >>> information.input_factors["w"][0]  # of the inputs (1, 2), and 1
      Array([[1., 2., 1.],
             [2., 4., 2.],
             [1., 2., 1.]], dtype=float32)
      >>> information.output_factors["w"][0]
      Array([[1., 0.],
             [0., 1.]], dtype=float32)

    References:
      Martens, Grosse, "Optimizing neural networks with Kronecker-factored approximate
      curvature", 2015.
      George, Laurent, Bouthillier, Ballas, Vincent, "Fast approximate natural gradient
      descent in a Kronecker-factored eigenbasis", 2018.
    """
    if not isinstance(layers, Layers):
        raise ValueError(
            "layers is what ff.layers.find_layers(apply_fn, params, inputs) returns; "
            f"got {layers!r}."
        )
    checks.whole(widest, "widest", least=0, of="units")
    if eigenvalue_correction is not None:
        past = eigenvalue_correction
        if not isinstance(past, Kronecker) or past.layers != layers:
            raise ValueError(
                "eigenvalue_correction must be an information of kronecker(layers) "
                f"with these layers; got {type(past).__name__}."
            )
        sides = past.input_factors, past.output_factors
        return eigen_kronecker.in_bases(layers, *map(eigenbasis.columns_of, sides))
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
    conventions = {name: by_name.get(name, sharing) for name in kernels}
    for layer, name in zip(layers.layers, kernels, strict=True):
        shared = layer.num_positions + layer.num_turned
        if layer.mixed and shared > 1 and conventions[name] is not expand:
            raise ValueError(
                f"sharing of {name} must be ff.structures.sharing.expand: its rows are "
                "those of no single example, whose positions could be pooled; got "
                f"{conventions[name]!r}."
            )
    mixed = {(first, conventions[name]) for name, (first, _) in layers.places.items()}
    if len(mixed) > len(layers.alike):
        layers = dataclasses.replace(layers, apart=True)

    def reduce_layer(first: str, products: Any) -> tuple[jax.Array, jax.Array]:
        same = layers.same_inputs[first]
        return factors(products, conventions[first], widest, same)

    def empty_layer(layer: Layer, rows: int, dtype: Any) -> tuple[jax.Array, jax.Array]:
        stacked, columns = layer.num_stacked, layer.num_outputs
        only_ids = layer.kind == "embedding" and not layer.num_turned
        diagonal = only_ids or layer.num_inputs > widest
        inputs = (rows,) if diagonal else (rows, rows)
        outputs = (columns,) if columns > widest else (columns, columns)
        left = jnp.zeros((stacked, *inputs), dtype)
        return left, jnp.zeros((stacked, *outputs), dtype)

    def build(parts: dict[str, tuple[jax.Array, jax.Array]], **rest: Any) -> Kronecker:
        return Kronecker(
            input_factors={name: inputs for name, (inputs, _) in parts.items()},
            output_factors={name: outputs for name, (_, outputs) in parts.items()},
            **rest,
        )

    def apart() -> Structure:
        table = dataclasses.replace(layers, apart=True)
        return kronecker(table, sharing=conventions, widest=widest)

    return kronecker_factors.structure(
        "kronecker(layers)", layers, reduce_layer, empty_layer, build
    )._replace(
        held_by_outer_products=entering_and_returning,
        correction=moving_kronecker.begin,
        packing=packed_kronecker.pack,
        apart=apart,
    )


def _share(information: Kronecker) -> jax.Array:
    """The number `1 / n`; without observations the factors are zero, and so is it."""
    count = information.num_observations
    return jnp.where(count > 0, 1 / jnp.where(count > 0, count, 1), 0)


@eigenbasis.spectrum.register
def _(information: Kronecker, name: str) -> tuple[jax.Array, Sides]:
    sides = information.input_factors[name], information.output_factors[name]
    (inputs, input_basis), (outputs, output_basis) = eigenbasis.decomposed(sides)
    values = _share(information) * inputs[:, :, None] * outputs[:, None, :]
    values = values + information.shifts[name][:, None, None]
    return values, Sides(input_basis, output_basis)


eigenbasis.register(Kronecker)


@ops.embed.register
def _(
    information: Kronecker,
    entries: PyTree,
    like: PyTree | None = None,
    template: Any | None = None,
) -> Kronecker:
    return larger_layers.embedded(information, entries, template)


# ---- what needs no eigenbasis: products and traces of the factors


def _times(factor: jax.Array, matrix: jax.Array) -> jax.Array:
    """`(K, D, D)`, or a diagonal `(K, D)`, times `(K, D, M)`."""
    if factor.ndim == 2:
        return factor[:, :, None] * matrix
    return product("kij,kjo->kio", factor, matrix)


def multiplied(left: jax.Array, matrix: jax.Array, right: jax.Array) -> jax.Array:
    """Matrices `(K, I, O)` times symmetric ones, or diagonals, on both sides."""
    turned = _times(right, jnp.swapaxes(_times(left, matrix), 1, 2))
    return jnp.swapaxes(turned, 1, 2)


@ops.matvec.register
def _(information: Kronecker, vector: PyTree) -> PyTree:
    layers, share = information.layers, _share(information)
    matrices, others = layer_vectors.split(layers, vector, share.dtype)
    products = {}
    for name, matrix in matrices.items():
        left, right = information.input_factors[name], information.output_factors[name]
        product = multiplied(left, matrix, right)
        shift = information.shifts[name][:, None, None]
        products[name] = share * product + shift * matrix
    entries = information.other_entries
    scaled = {name: entries[name] * value for name, value in others.items()}
    return layer_vectors.join(layers, products | scaled, vector)


def _entries(factor: jax.Array) -> jax.Array:
    """The diagonal `(K, D)` of a factor."""
    return factor if factor.ndim == 2 else diagonal(factor)


def _diagonals(information: Kronecker) -> dict[str, jax.Array]:
    """The diagonal of each layer, `(K, I, O)`."""

    share, found = _share(information), {}
    for name, factor in information.input_factors.items():
        outputs = _entries(information.output_factors[name])
        product = share * _entries(factor)[:, :, None] * outputs[:, None, :]
        found[name] = product + information.shifts[name][:, None, None]
    return found


@ops.trace.register
def _(information: Kronecker, like: PyTree | None = None) -> jax.Array:
    information = eigenbasis.shown(information, like)
    parts = {**_diagonals(information), **information.other_entries}
    zero = jnp.zeros((), information.num_observations.dtype)
    return sum(map(jnp.sum, parts.values()), start=zero)


@ops.diagonal.register
def _(information: Kronecker, like: PyTree | None = None) -> PyTree:
    parts = _diagonals(information) | information.other_entries
    return layer_vectors.join(information.layers, parts, like)


@ops.is_finite.register
def _(information: Kronecker) -> jax.Array:
    sides = information.input_factors, information.output_factors
    inputs, outputs = jax.tree.map(_entries, sides)
    kept = information._replace(input_factors=inputs, output_factors=outputs)
    return trees.all_finite(kept)


@ops.by_columns.register
def _(information: Kronecker, like: PyTree | None = None) -> ops.ByColumns:
    information = eigenbasis.shown(information, like)
    layers, share = information.layers, _share(information)
    others, groups = information.other_entries, {}
    for name, factor in information.input_factors.items():
        weights = share * _entries(information.output_factors[name])
        groups[name] = ops.ColumnBlocks(factor, weights, information.shifts[name])
    groups |= {name: uncoupled(x.reshape(-1)) for name, x in others.items()}

    def split(vector: PyTree) -> list[jax.Array]:
        matrices, rest = layer_vectors.split(layers, vector, share.dtype)
        parts = matrices | {name: x.reshape((1, -1, 1)) for name, x in rest.items()}
        return [parts[name] for name in groups]

    def join(parts: list[jax.Array]) -> PyTree:
        named = dict(zip(groups, parts, strict=True))
        flat = {name: named[name].reshape(x.shape) for name, x in others.items()}
        return layer_vectors.join(layers, named | flat, like)

    return ops.ByColumns([*groups.values()], split, join)


# ---- factors damped one by one: two small inverses in place of eigenvectors


class LayerInverses(NamedTuple):
    """The damped inverse of each factor, and what other parameters are divided by.

    Kept by `ff.structures.kronecker`.
    """

    input_inverses: dict[str, jax.Array]  # (K, I, I), or (K, I) for a diagonal
    output_inverses: dict[str, jax.Array]  # (K, O, O), or (K, O) for a diagonal
    plain_divisors: dict[str, jax.Array]
    inverted_layers: Layers  # static

    @property
    def telling(self) -> "LayerInverses":
        """Diagonals: finite where the inverses are, which are Gram matrices."""
        sides = self.input_inverses, self.output_inverses
        left, right = jax.tree.map(_entries, sides)
        return self._replace(input_inverses=left, output_inverses=right)

    def stacks(self, vector: PyTree) -> dict[str, jax.Array]:
        """Leaves of a vector, layers that are alike as one array."""
        left, layers = self.input_inverses, self.inverted_layers
        dtype = next(x.dtype for x in jax.tree.leaves((left, self.plain_divisors)))
        leaves, others = layer_vectors.split(layers, vector, dtype)
        return leaves | others

    def divide(self, vector: PyTree) -> PyTree:
        """The inverses on both sides of each layer's matrix."""
        return self.apart(self.divide_stacks(vector), vector)

    def apart(
        self,
        stacks: dict[str, jax.Array],
        like: PyTree,
        sound: jax.Array | None = None,
    ) -> PyTree:
        """What `divide_stacks` gives, as a tree like `like`; `sound` as in `join`."""
        return layer_vectors.join(self.inverted_layers, stacks, like, sound)

    def divide_stacks(self, vector: PyTree) -> dict[str, jax.Array]:
        """`divide`, of layers that are alike as one array."""
        found = self.stacks(vector)
        for name, part in found.items():
            if name in self.plain_divisors:
                found[name] = part / self.plain_divisors[name]
                continue
            right = self.output_inverses[name]
            found[name] = multiplied(self.input_inverses[name], part, right)
        return found


@ops.factored.register
def _(information: Kronecker, damping: jax.Array) -> LayerInverses:
    names, damped = [*information.input_factors], []
    for name, factor in information.input_factors.items():
        # a mean over observations holds n of them: A / n, and G as it is
        left = factor / information.num_observations
        right = information.output_factors[name]
        root = jnp.sqrt(damping + information.shifts[name])  # (K,)
        balance = jnp.sqrt(_mean_eigenvalue(left) / _mean_eigenvalue(right))
        damped += [(left, balance * root), (right, root / balance)]
    inverses = divided(_inverse, damped)
    entries = information.other_entries
    divisors = {name: x + damping for name, x in entries.items()}
    return LayerInverses(
        input_inverses=dict(zip(names, inverses[::2], strict=True)),
        output_inverses=dict(zip(names, inverses[1::2], strict=True)),
        plain_divisors=divisors,
        inverted_layers=information.layers,
    )


def _mean_eigenvalue(factor: jax.Array) -> jax.Array:
    """`(K,)`, kept from zero, which a layer without any gradient has."""
    mean = jnp.mean(_entries(factor), axis=1)
    return jnp.where(mean > 0, mean, jnp.ones_like(mean))


def _inverse(factor: jax.Array, damping: jax.Array) -> jax.Array:
    if factor.ndim == 2:
        return 1 / (factor + damping[:, None])
    identity = jnp.eye(factor.shape[-1], dtype=factor.dtype)
    return dense.inverse_matrix(factor + damping[:, None, None] * identity[None])


@ops.parts.register
def _(factors: LayerInverses) -> list[tuple[str, int]]:
    return eigenbasis.parts_by_layer(factors)
