"""Cotangents of one example pulled back: products are covariances of outputs."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fisherflow_jax import information as ops
from fisherflow_jax._ground import linalg, trees
from fisherflow_jax.posteriors import Gaussian

PyTree = Any


class Pulled(NamedTuple):
    """R pulled-back vectors, so that `left_r . right_s` is the covariance of r and s.

    Where a root of the information is at hand both are its solution, so that variances
    are sums of squares and never negative.
    """

    left: jax.Array  # (R, q)
    right: jax.Array  # (R, q)

    def mixed(self, matrix: jax.Array) -> "Pulled":
        """The combinations `matrix (S, R)` of the vectors."""
        matrix = matrix.astype(self.left.dtype)
        left = linalg.product("sr,rq->sq", matrix, self.left)
        if self.right is self.left:
            return Pulled(left, left)
        return Pulled(left, linalg.product("sr,rq->sq", matrix, self.right))

    def variance(self) -> jax.Array:
        """`(R,)`."""
        return jnp.sum(self.left * self.right, -1)

    def covariance(self) -> jax.Array:
        """`(R, R)`."""
        return linalg.product("rq,sq->rs", self.left, self.right)


Pull = Callable[[jax.Array], Pulled]  # of cotangents (R, 1, ...)
Puller = Callable[[PyTree], tuple[jax.Array, Pull]]  # an example -> outputs (1, ...)


def by_gradients(belief: Gaussian, apply_fn: Callable, robust: bool | str) -> Puller:
    """By gradients of all parameters, for any structure; factorised once."""
    white = _whitened(belief, robust)

    def at(example: PyTree) -> tuple[jax.Array, Pull]:
        outputs, vjp = jax.vjp(lambda params: apply_fn(params, example), belief.mean)

        def pull(cotangents: jax.Array) -> Pulled:
            pulled = jax.vmap(lambda cotangent: vjp(cotangent)[0])(cotangents)
            return white(trees.widen(pulled))

        return outputs, pull

    return at


def _whitened(belief: Gaussian, robust: bool | str) -> Callable[[PyTree], Pulled]:
    """Leaves `(R, *leaf.shape)` -> `Pulled`, by a root where the structure has one."""
    information, meat = belief.information, belief.meat
    if not robust and ops.provides(ops.whitener, information):
        root = ops.whitener(information)

        def halved(stack: PyTree) -> Pulled:
            half = root.matrix(stack)
            return Pulled(half, half)

        return halved
    solve = ops.solver(information)

    def solved(stack: PyTree) -> Pulled:
        pair = stack, jax.vmap(solve)(stack)
        if robust:
            pair = pair[1], jax.vmap(lambda v: ops.matvec(meat, v))(pair[1])
        return Pulled(*(trees.ravel(x, 1) for x in pair))

    return solved


def units(like: jax.Array, places: jax.Array | None = None) -> jax.Array:
    """Unit cotangents `(R, *like.shape)` of these entries; None: of all."""
    places = jnp.arange(like.size, dtype=jnp.int32) if places is None else places
    unit = jax.nn.one_hot(places, like.size, dtype=like.dtype)
    return unit.reshape((places.shape[0], *like.shape))


def root(covariance: jax.Array) -> jax.Array:
    """A Cholesky factor of `(..., k, k)`, also where it is singular."""
    count, eps = covariance.shape[-1], jnp.finfo(covariance.dtype)
    largest = jnp.max(jnp.diagonal(covariance, axis1=-2, axis2=-1), -1)
    # singular where there are more outputs than directions: a share of its rounding
    share = 10 * count * eps.eps * largest + math.sqrt(eps.tiny)
    identity = jnp.broadcast_to(jnp.eye(count, dtype=eps.dtype), covariance.shape)
    return linalg.cholesky(covariance + share[..., None, None] * identity)
