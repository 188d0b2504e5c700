r"""Roots of the information of one of C classes: of its own, and of two bounds of it.

With q the square roots of the probabilities p,

.. math::
  A = \operatorname{diag}(p) - p p^\top
    = \operatorname{diag}(q) (I - q q^\top) \operatorname{diag}(q),

so :math:`L = \operatorname{diag}(q)\, Y` is a root of A for every orthonormal basis Y
of the complement of q, and of a lower bound of A for every part of one. The pivoted
Cholesky factor is one of these, in closed form. No C x C matrix is formed.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from fisherflow_jax._ground.arrays import like, widen
from fisherflow_jax.likelihoods._likelihood import Root, Shape, scaled_probes


class _Pivots(NamedTuple):
    """The k likeliest classes in order, and a Cholesky factor that eliminates them."""

    p: jax.Array  # (..., C)
    root_p: jax.Array  # (..., C), finite where p underflows
    position: jax.Array  # (..., C): place of a class among the pivots, k for no pivot
    log_p: jax.Array  # (..., k), of the pivots
    share: jax.Array  # (..., k): L_jj / sqrt(p_j)
    below: jax.Array  # (..., k): L_ij = -p_i below_j for the classes after pivot j


def _pivots(outputs: ArrayLike, k: int) -> _Pivots:
    log_p = jax.nn.log_softmax(widen(outputs))
    p, root_p = jnp.exp(log_p), jnp.exp(0.5 * log_p)
    of_pivots, classes = jax.lax.top_k(log_p, k)
    largest = jnp.exp(of_pivots)
    places = jnp.broadcast_to(jnp.arange(k, dtype=jnp.int32), classes.shape)
    none = jnp.full(p.shape, k, jnp.int32)
    position = jnp.put_along_axis(none, classes, places, axis=-1, inplace=False)
    others = jnp.sum(jnp.where(position == k, p, 0), -1, keepdims=True)
    # Sums from the smallest up: 1 minus the larger ones would lose all digits.
    parts = jnp.concatenate([largest, others], -1)
    tails = jax.lax.cumsum(parts, axis=p.ndim - 1, reverse=True)
    alive = tails[..., 1:] > jnp.finfo(p.dtype).tiny
    # Logarithms: squares of small tails, also those in derivatives, would underflow.
    pivot, here, after = (
        jnp.log(jnp.where(alive, values, 1))
        for values in (largest, tails[..., :-1], tails[..., 1:])
    )
    share = jnp.where(alive, jnp.exp(0.5 * (after - here)), 0)
    below = jnp.where(alive, jnp.exp(0.5 * (pivot - here - after)), 0)
    return _Pivots(
        p=p,
        root_p=root_p,
        position=position,
        log_p=of_pivots,
        share=share,
        below=below,
    )


def _apply_cholesky(k: int, outputs: ArrayLike, probes: Any) -> jax.Array:
    """The first k columns of the pivoted Cholesky factor, times the probes."""
    pivots = _pivots(outputs, k)
    probes = like(probes, pivots.p)
    sums = jnp.cumsum(pivots.below * probes, -1)
    # Shifted, not the sum less its last term: terms may grow by many powers of ten.
    earlier = jnp.concatenate([jnp.zeros_like(sums[..., :1]), sums[..., :-1]], -1)
    p, root_p = jnp.exp(pivots.log_p), jnp.exp(0.5 * pivots.log_p)
    at_pivots = root_p * pivots.share * probes - p * earlier
    elsewhere = -pivots.p * sums[..., -1:]
    index = jnp.minimum(pivots.position, k - 1)
    own = jnp.take_along_axis(at_pivots, index, -1)
    cotangents = jnp.where(pivots.position < k, own, elsewhere)
    return cotangents.astype(jnp.asarray(outputs).dtype)


def _fewest_columns(shape: Shape) -> int:
    return max(shape[-1] - 1, 1)


def _diagonal(outputs: ArrayLike, probes: Any, key: Any = None) -> jax.Array:
    root_p = jnp.exp(0.5 * jax.nn.log_softmax(widen(outputs)))
    return scaled_probes(outputs, root_p, probes)


CHOLESKY = Root(
    lambda outputs, probes, key=None: _apply_cholesky(
        _fewest_columns(jnp.shape(outputs)), outputs, probes
    ),
    lambda shape: (*shape[:-1], _fewest_columns(shape)),
)
DIAGONAL_BOUND = Root(_diagonal, tuple)


def low_rank(k: int, num_iterations: int | None) -> Root:
    """k columns: of the Cholesky factor, or after that many subspace iterations."""

    def probe_shape(shape: Shape) -> Shape:
        if k >= shape[-1]:
            raise ValueError(
                f"rank_root: k = {k} for C = {shape[-1]} classes (outputs of shape "
                f"{tuple(shape)}); k is at most C - 1, the rank of the information of "
                "C classes, where the bound is exact."
            )
        return (*shape[:-1], k)

    def apply(outputs: ArrayLike, probes: Any, key: Any = None) -> jax.Array:
        probe_shape(jnp.shape(outputs))
        if num_iterations is None:
            return _apply_cholesky(k, outputs, probes)
        root_p, basis = _subspace(outputs, k, num_iterations)
        probes = jnp.moveaxis(like(probes, root_p), -1, 0)[..., None]
        return scaled_probes(outputs, root_p, jnp.sum(basis * probes, 0))

    return Root(apply, probe_shape)


def _subspace(
    outputs: ArrayLike, k: int, num_iterations: int
) -> tuple[jax.Array, jax.Array]:
    r"""sqrt(p), and k orthonormal vectors orthogonal to it, `(k, ..., C)`.

    Those of the pivoted Cholesky factor, and then that many steps of subspace iteration
    with :math:`(I - q q^\top) \operatorname{diag}(p) (I - q q^\top)`, which has the
    eigenvalues of A. However far the iteration has come, `diag(q) Y` is the Nystrom
    factor of its subspace, and so the root of a lower bound.
    """
    pivots = _pivots(outputs, k)
    p, root_p = pivots.p, pivots.root_p
    likeliest = pivots.position == 0
    root_of_largest = jnp.sum(jnp.where(likeliest, root_p, 0), -1, keepdims=True)

    def column(j: jax.Array, share: jax.Array, below: jax.Array) -> jax.Array:
        after = jnp.where(pivots.position > j, -root_p * below[..., None], 0)
        return jnp.where(pivots.position == j, share[..., None], after)

    places = jnp.arange(k, dtype=jnp.int32)
    basis = jax.vmap(column, (0, -1, -1))(places, pivots.share, pivots.below)

    def orthogonal_to_root_p(vector: jax.Array) -> jax.Array:
        # The likeliest class follows from the others. Subtracting the projection would
        # leave rounding errors where they are small, on a prediction almost certain.
        others = jnp.where(likeliest, 0, vector)
        balance = -jnp.sum(root_p * others, -1, keepdims=True) / root_of_largest
        return jnp.where(likeliest, balance, others)

    def multiply(vector: jax.Array) -> jax.Array:
        projection = jnp.sum(root_p * p * vector, -1, keepdims=True)
        return p * vector - root_p * projection

    def step(_: Any, basis: jax.Array) -> jax.Array:
        # between iterations the span is all that matters: one pass keeps it
        return _orthonormal(jax.vmap(multiply)(basis), orthogonal_to_root_p, passes=1)

    basis = jax.lax.fori_loop(0, num_iterations, step, basis)
    return root_p, _orthonormal(basis, orthogonal_to_root_p, passes=2)


# a loop in a loop costs more than so few steps
_WRITTEN_OUT = 8


def _orthonormal(vectors: jax.Array, constrain: Callable, passes: int) -> jax.Array:
    """Gram-Schmidt over the first axis; vectors that vanish become zero.

    Sums of products, not matrix products: accelerators round the factors of those, and
    vectors that are not orthonormal would break the bound.
    """

    def add(j: Any, basis: jax.Array) -> jax.Array:
        vector = _unit(constrain(vectors[j]))
        for _ in range(passes):
            overlaps = jnp.sum(basis * vector[None], -1, keepdims=True)
            vector = vector - jnp.sum(overlaps * basis, 0)
            vector = _unit(constrain(vector))
        return basis.at[j].set(vector)

    count, basis = vectors.shape[0], jnp.zeros_like(vectors)
    return jax.lax.fori_loop(0, count, add, basis, unroll=count <= _WRITTEN_OUT)


def _unit(vector: jax.Array) -> jax.Array:
    # Scaled first: the squares of tiny entries would underflow. A constant, since the
    # unit vector does not depend on the scale.
    size = jax.lax.stop_gradient(jnp.max(jnp.abs(vector), -1, keepdims=True))
    vanishes = size <= jnp.finfo(vector.dtype).tiny
    scaled = jnp.where(vanishes, 0, vector / jnp.where(vanishes, 1, size))
    norm = jnp.sqrt(jnp.sum(jnp.where(vanishes, 1, scaled**2), -1, keepdims=True))
    return scaled / norm
