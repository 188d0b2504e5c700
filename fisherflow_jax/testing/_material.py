"""What a structure is checked with: random vectors, and informations made of them."""

import copy
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
from fisherflow_jax.testing._laws import QUICKLY

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


ARRAYS = ("inputs", "gradients", "weights", "turned")  # of outer products


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["arrays"], meta_fields=["others"]
)
@dataclasses.dataclass
class Packed:
    """`OuterProducts`, which are leaves, as a tree: a result of compiled functions."""

    arrays: dict[str, Any]
    others: tuple[tuple[str, Any], ...]


def _packed(stack: PyTree) -> PyTree:
    def leaf(x: Any) -> Any:
        if not isinstance(x, OuterProducts):
            return x
        arrays = {name: leaf(getattr(x, name)) for name in ARRAYS}
        others = ("num_inputs", "has_bias", "layout")
        return Packed(arrays, tuple((name, getattr(x, name)) for name in others))

    return jax.tree.map(leaf, stack)


def _unpacked(stack: PyTree) -> PyTree:
    def leaf(x: Any) -> Any:
        if not isinstance(x, Packed):
            return x
        arrays = {name: leaf(value) for name, value in x.arrays.items()}
        return OuterProducts(**arrays, **dict(x.others))

    return jax.tree.map(leaf, stack, is_leaf=lambda x: isinstance(x, Packed))


class Arrays(NamedTuple):
    """What is computed with: arguments of compiled functions."""

    params: PyTree
    key: jax.Array
    packed: list[PyTree]  # stacks of vectors
    parts: list[Any]  # informations
    whole: Any  # positive definite
    vector: PyTree


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
        self.structure, self.draw = structure, draw
        self.tolerance, self.num_samples = tolerance, num_samples
        self.strangers: list[str] = []  # leaves of an information that are no arrays
        # two programs: what is drawn serves many structures, and is rounded before
        # anything is made of it
        make = jax.jit(self._make, compiler_options=QUICKLY)
        self.arrays, dense = make(params, *_drawn(params, key, draw))
        self.dense = Dense(*jax.tree.map(lambda x: np.asarray(x, np.float64), dense))

    def _make(
        self, params: PyTree, key: jax.Array, packed: list[PyTree], vector: PyTree
    ) -> tuple[Arrays, tuple]:
        parts = [self.structure.reduce(_unpacked(stack)) for stack in packed]
        whole = ops.add(parts[0], self.structure.isotropic(params, 1.0))
        self.strangers = [
            f"{name} is no array but {type(leaf).__name__}"
            for name, leaf in trees.named_leaves(whole)
            if not isinstance(leaf, (jax.Array, np.ndarray))
        ]
        arrays = Arrays(
            params=params,
            key=key,
            packed=packed,
            parts=parts,
            whole=whole,
            vector=vector,
        )
        of = self.of(arrays)
        matrices = [of.matrix(part) for part in parts]
        return arrays, (matrices, of.matrix(whole), trees.ravel(vector))

    def of(self, arrays: Arrays) -> "Material":
        """The same with other arrays: those of a program that is traced."""
        other = copy.copy(self)
        other.arrays = arrays
        return other

    def __getattr__(self, name: str) -> Any:
        if name in Arrays._fields:
            return getattr(self.arrays, name)
        raise AttributeError(name)

    @property
    def stacks(self) -> list[PyTree]:
        return [_unpacked(stack) for stack in self.packed]

    def matrix(self, information: Any) -> jax.Array:
        return ops.to_dense(information, self.params)

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
    def samples(self) -> jax.Array:
        """Samples `(num_samples, d)`, each under its own key."""

        def draw(key: jax.Array) -> jax.Array:
            return self.flat(ops.sample(self.whole, key, self.params))

        keys = jax.random.split(self.key, self.num_samples)
        return jax.vmap(draw)(keys)


@functools.partial(jax.jit, static_argnames="draw", compiler_options=QUICKLY)
def _drawn(params: PyTree, key: jax.Array, draw: Draw) -> tuple:
    *keys, vector_key, key = jax.random.split(key, 5)
    packed = [_packed(draw(params, k, trees.size(params) + 3)) for k in keys]
    return key, packed, trees.standard_normal(vector_key, params)


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
            both = {k: leaf(getattr(x, k)) for k in ("gradients", "turned")}
            return dataclasses.replace(x, **both)
        if x is None:
            return None
        return x * jnp.asarray(factor, x.dtype)

    return jax.tree.map(leaf, stack)


def joined(left: PyTree, right: PyTree) -> PyTree:
    """The vectors of both stacks."""

    def leaf(one: Any, other: Any) -> Any:
        if isinstance(one, OuterProducts):
            both = {k: leaf(getattr(one, k), getattr(other, k)) for k in ARRAYS}
            return dataclasses.replace(one, **both)
        if one is None:
            return None
        return jnp.concatenate([one, other])

    return jax.tree.map(leaf, left, right)
