"""What a structure is checked with: random vectors, and informations made of them."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fisherflow_jax import information as ops
from fisherflow_jax._ground import trees
from fisherflow_jax.structures import OuterProducts, Structure

PyTree = Any
# (params, key, count) -> a stack of vectors, as `structure.reduce` takes it
Draw = Callable[[PyTree, jax.Array, int], PyTree]


class Material(NamedTuple):
    """One set for each float type."""

    structure: Structure
    params: PyTree
    stacks: list  # three stacks of vectors
    parts: list  # the information of each
    whole: Any  # the first part and the identity: positive definite
    vector: PyTree
    key: jax.Array


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


def make(
    structure: Structure, params: PyTree, key: jax.Array, count: int, draw: Draw
) -> Material:
    keys = jax.random.split(key, 5)
    stacks = [draw(params, k, count) for k in keys[:3]]
    parts = [structure.reduce(stack) for stack in stacks]
    whole = ops.add(parts[0], structure.isotropic(params, 1.0))
    return Material(
        structure=structure,
        params=params,
        stacks=stacks,
        parts=parts,
        whole=whole,
        vector=trees.standard_normal(keys[3], params),
        key=keys[4],
    )


def _map_stack(function: Callable, products: Callable, *stacks: PyTree) -> PyTree:
    def leaf(*leaves: Any) -> Any:
        if isinstance(leaves[0], OuterProducts):
            return products(*leaves)
        return function(*leaves)

    return jax.tree.map(leaf, *stacks)


def times(stack: PyTree, factor: float) -> PyTree:
    """Every vector times a number."""
    return _map_stack(
        lambda x: x * jnp.asarray(factor, x.dtype),
        lambda p: dataclasses.replace(
            p, gradients=p.gradients * jnp.asarray(factor, p.gradients.dtype)
        ),
        stack,
    )


def joined(left: PyTree, right: PyTree) -> PyTree:
    """The vectors of both stacks."""

    def products(one: OuterProducts, other: OuterProducts) -> OuterProducts:
        return dataclasses.replace(
            one,
            inputs=jnp.concatenate([one.inputs, other.inputs]),
            gradients=jnp.concatenate([one.gradients, other.gradients]),
            weights=jnp.concatenate([one.weights, other.weights]),
        )

    return _map_stack(lambda x, y: jnp.concatenate([x, y]), products, left, right)


def flat(tree: PyTree, params: PyTree, what: str) -> jax.Array:
    """A vector ravelled, having been checked to be like the parameters."""
    assert trees.same_structure(tree, params), (
        f"{what} must be a tree like the parameters; it is {jax.tree.structure(tree)}, "
        f"not {jax.tree.structure(params)}"
    )
    shapes = jax.tree.map(jnp.shape, tree), jax.tree.map(jnp.shape, params)
    assert shapes[0] == shapes[1], (
        f"{what} must have the parameters' shapes {shapes[1]}; it has {shapes[0]}"
    )
    return trees.ravel(tree)
