"""What a structure is checked with: random vectors, and informations made of them."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fisherflow_jax import information as ops
from fisherflow_jax._ground import trees
from fisherflow_jax.structures import OuterProducts, Scalar, Structure

PyTree = Any
# (params, key, count) -> a stack of vectors, as `structure.reduce` takes it
Draw = Callable[[PyTree, jax.Array, int], PyTree]


class Dense(NamedTuple):
    """The matrices of the material, by `to_dense`, in float64."""

    parts: list[np.ndarray]  # (d, d) each
    whole: np.ndarray  # (d, d)
    vector: np.ndarray  # (d,)

    @property
    def identity(self) -> np.ndarray:
        return np.eye(len(self.whole))

    @property
    def inverse(self) -> np.ndarray:
        return np.linalg.inv(self.whole)

    @property
    def solution(self) -> np.ndarray:
        return np.linalg.solve(self.whole, self.vector)


class Material:
    """One set for each float type."""

    def __init__(
        self,
        structure: Structure,
        params: PyTree,
        draw: Draw,
        key: jax.Array,
        tolerance: float,
        num_samples: int,
    ):
        self.structure, self.params, self.draw = structure, params, draw
        self.tolerance, self.num_samples = tolerance, num_samples
        *keys, vector_key, self.key = jax.random.split(key, 5)
        # one by one and not in one compiled program: what JAX has compiled for one
        # structure then serves the next, and most of the time goes into compiling
        self.stacks = [draw(params, k, trees.size(params) + 3) for k in keys]
        self.parts = [structure.reduce(stack) for stack in self.stacks]
        # positive definite
        self.whole = ops.add(self.parts[0], structure.isotropic(params, 1.0))
        self.vector = trees.standard_normal(vector_key, params)
        self.dense = Dense(
            [self.matrix(part) for part in self.parts],
            self.matrix(self.whole),
            np.asarray(trees.ravel(self.vector), np.float64),
        )

    def matrix(self, information: Any) -> np.ndarray:
        return np.asarray(ops.to_dense(information, self.params), np.float64)

    def flat(self, vector: PyTree) -> jax.Array:
        """A vector ravelled, having been checked to be like the parameters."""
        rule = "a result is a tree like the parameters"
        trees.check_shapes(vector, self.params, rule)
        return trees.ravel(vector)

    def number(self, value: Any) -> jax.Array:
        return jnp.asarray(value, trees.float_dtype(self.params))

    def scalar(self, value: float) -> Scalar:
        return Scalar(self.number(value))

    @functools.cached_property
    def samples(self) -> np.ndarray:
        """Samples `(num_samples, d)`, each under its own key."""

        def draw(key: jax.Array) -> jax.Array:
            return self.flat(ops.sample(self.whole, key, self.params))

        keys = jax.random.split(self.key, self.num_samples)
        return np.asarray(jax.vmap(draw)(keys))


def random_vectors(params: PyTree, key: jax.Array, count: int) -> PyTree:
    """Normal vectors, of another scale in each leaf."""
    leaves, treedef = jax.tree.flatten(params)
    drawn = []
    for index, leaf in enumerate(leaves):
        unit = jax.random.normal(
            jax.random.fold_in(key, index), (count, *leaf.shape), jnp.float32
        ).astype(leaf.dtype)
        drawn.append(unit * jnp.asarray(0.5 + 0.4 * (index % 4), leaf.dtype))
    return jax.tree.unflatten(treedef, drawn)


def times(stack: PyTree, factor: float) -> PyTree:
    """Every vector times a number."""

    def leaf(x: Any) -> Any:
        if isinstance(x, OuterProducts):
            return dataclasses.replace(x, gradients=leaf(x.gradients))
        return x * jnp.asarray(factor, x.dtype)

    return jax.tree.map(leaf, stack)


def joined(left: PyTree, right: PyTree) -> PyTree:
    """The vectors of both stacks."""

    def leaf(one: Any, other: Any) -> Any:
        if isinstance(one, OuterProducts):
            arrays = ("inputs", "gradients", "weights")
            both = {k: leaf(getattr(one, k), getattr(other, k)) for k in arrays}
            return dataclasses.replace(one, **both)
        return jnp.concatenate([one, other])

    return jax.tree.map(leaf, left, right)
