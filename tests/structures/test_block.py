"""Partitions of block: by output unit, by name, by prefix, by path."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fisherflow_jax as ff
import structure_cases as cases
from program_size import stacks_in_lapack
from structure_cases import SIZE

VECTORS = cases.rows()
TOP_LEVEL = [[0, 1, 2, 3, 4, 5], [6, 7, 8], [9, 10, 11, 12, 13, 14]]


def reduce(partition):
    structure = ff.structures.block(partition)
    return cases.dense(jax.jit(structure.reduce)(cases.tree(VECTORS)))


def test_a_prefix_names_whole_subtrees():
    result = reduce({"conv": "a", "deep": "b", "kernel": "c"})
    expected = cases.only(TOP_LEVEL)(VECTORS.T @ VECTORS)
    np.testing.assert_allclose(result, expected, rtol=1e-12)


@pytest.mark.parametrize("partition", ["all", lambda path: "all"])
def test_one_name_for_all_is_the_full_structure(partition):
    result = reduce(partition)
    full = jax.jit(ff.structures.full().reduce)(cases.tree(VECTORS))
    np.testing.assert_allclose(result, cases.dense(full), rtol=1e-14, atol=0)


def test_a_function_of_the_path_may_share_names_across_subtrees():
    def partition(path):
        return "last" if path == "deep.1" or "kernel" in path else "first"

    groups = [[0, 1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 11, 12, 13, 14]]
    expected = cases.only(groups)(VECTORS.T @ VECTORS)
    np.testing.assert_allclose(reduce(partition), expected, rtol=1e-12)


def test_a_function_sees_the_names_of_parameters():
    paths = []
    structure = ff.structures.block(lambda path: paths.append(path) or path)
    structure.isotropic(cases.PARAMS, 1.0)
    assert paths == ["conv", "deep.0", "deep.1", "kernel"]


def test_groups_in_any_order_of_the_leaves():
    names = {"conv": "z", "deep": ("a", "z"), "kernel": "a"}
    expected = cases.only([[0, 1, 2, 3, 4, 5, 7, 8], [6, 9, 10, 11, 12, 13, 14]])
    np.testing.assert_allclose(reduce(names), expected(VECTORS.T @ VECTORS), rtol=1e-12)


def test_a_bare_array_is_a_tree_of_one_leaf():
    vectors = np.random.default_rng(0).normal(size=(5, 4, 2))
    units = ff.structures.block().reduce(jnp.asarray(vectors))
    named = ff.structures.block("kernel").reduce(jnp.asarray(vectors))
    gram = np.einsum("kau,kbv->aubv", vectors, vectors)
    whole = ff.information.to_dense(named).reshape((4, 2, 4, 2))
    np.testing.assert_allclose(whole, gram, rtol=1e-12)
    expected = gram * np.eye(2)[None, :, None, :]
    kept = ff.information.to_dense(units).reshape((4, 2, 4, 2))
    np.testing.assert_allclose(kept, expected, rtol=1e-12)


def test_memory_is_the_sum_of_the_squared_blocks():
    def numbers(partition):
        structure = ff.structures.block(partition)
        information = jax.eval_shape(lambda: structure.isotropic(cases.PARAMS, 1.0))
        return sum(leaf.size for leaf in jax.tree.leaves(information))

    assert numbers(None) == 3 * 2**2 + 3 * 1 + 2 * 3**2
    assert numbers({"conv": "a", "deep": "b", "kernel": "c"}) == 6**2 + 3**2 + 6**2
    assert numbers("all") == SIZE**2


def test_blocks_of_different_partitions_do_not_add():
    one, other = (
        ff.structures.block(p).isotropic(cases.PARAMS, 1.0)
        for p in ("all", lambda path: path)
    )
    with pytest.raises(TypeError, match="add only when their partitions agree"):
        ff.information.add(one, other)


@pytest.mark.parametrize(
    "partition",
    [
        {"conv": "a", "deep": "b"},
        {"conv": "a", "deep": ("a", "b", "c"), "kernel": "b"},
        {"conv": "a", "deep": "b", "kernel": {"inner": "b"}},
    ],
)
def test_a_partition_that_does_not_fit_is_explained(partition):
    structure = ff.structures.block(partition)
    with pytest.raises(ValueError, match="partition must be a pytree of group names"):
        structure.isotropic(cases.PARAMS, 1.0)
    with pytest.raises(ValueError, match="partition must be a pytree of group names"):
        structure.reduce(cases.tree(VECTORS))


@pytest.mark.parametrize(
    ("partition", "named"),
    [
        ({"conv": "a", "deep": "b", "kernel": 3}, r"got 3 for parameter kernel\."),
        (lambda path: None, r"got None for parameter conv\."),
    ],
)
def test_a_name_that_is_no_string_is_named(partition, named):
    with pytest.raises(ValueError, match=named):
        ff.structures.block(partition).isotropic(cases.PARAMS, 1.0)


@pytest.mark.slow_cases
@pytest.mark.parametrize("operation", ["solve", "sample", "whiten", "propagate"])
def test_no_stack_of_blocks_is_handed_to_lapack(operation):
    """Neither by itself nor of several flows: two of them at once would never end."""
    vector = {"first": jnp.ones((5, 3)), "second": jnp.ones((4, 6))}
    information = ff.structures.block().isotropic(vector, 2.0)

    def apply(information):
        if operation == "sample":
            return ff.information.sample(information, jax.random.key(0))
        if operation == "propagate":
            return ff.information.propagate(information, 0.1 * jnp.eye(39))
        return getattr(ff.information, operation)(information, vector)

    several = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), information)
    for function, argument in ((apply, information), (jax.vmap(apply), several)):
        program = jax.jit(function).lower(argument).compile()
        assert not stacks_in_lapack(program)
