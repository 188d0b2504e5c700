"""Informations under vmap and eval_shape, inside Optax states, and without leaves."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fisherflow_jax as ff
import structure_cases as cases
from fisherflow_jax.structures._compensated import compensate
from structure_cases import CASES, NAMED, SIZE, STRUCTURES
from together import together

every_structure = pytest.mark.parametrize("case", STRUCTURES, ids=repr)
every_case = pytest.mark.parametrize("case", CASES, ids=repr)


def update(information, vector):
    """One step of a stream: shrink, add, solve, measure."""
    ops = ff.information
    total = ops.add(ops.scale(information, 0.9), information)
    like = jax.tree.map(jnp.zeros_like, vector)
    return total, ops.solve(total, vector), ops.logdet(total, like)


@pytest.mark.slow_cases
@every_case
def test_vmap_is_the_loop(case):
    parts = [cases.information(case, count) for count in (1, 18)]
    stacked = jax.tree.map(lambda *x: np.stack(x), *parts)
    vectors = np.random.default_rng(2).normal(size=(2, SIZE))
    _, solved, logdets = jax.jit(jax.vmap(update))(stacked, cases.tree(vectors))
    for index, count in enumerate((1, 18)):
        if case.name == "low_rank-4" and count == 18:
            continue  # recompression: test_low_rank.py has its reference
        total = 1.9 * cases.matrix(case, count)
        one = jax.tree.map(lambda x, index=index: x[index], solved)
        expected = np.linalg.solve(total, vectors[index])
        np.testing.assert_allclose(cases.flat(one), expected, rtol=1e-9, atol=1e-11)
        np.testing.assert_allclose(logdets[index], np.linalg.slogdet(total)[1])


@every_case
def test_eval_shape_agrees_and_a_stream_keeps_its_shapes(case):
    information = cases.information(case)
    total, solved, logdet = jax.eval_shape(update, information, cases.PARAMS)
    layout = jax.tree.map(lambda x: (x.shape, x.dtype), information)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), total) == layout
    assert jax.tree.map(jnp.shape, solved) == jax.tree.map(jnp.shape, cases.PARAMS)
    assert logdet.shape == ()


@every_structure
def test_isotropic_needs_shapes_alone(case):
    shapes = jax.eval_shape(lambda: cases.PARAMS)
    information = case.structure.isotropic(shapes, 2.5)
    np.testing.assert_allclose(cases.dense(information), 2.5 * np.eye(SIZE))
    concrete = case.structure.isotropic(cases.PARAMS, jnp.asarray(2.5))
    assert jax.tree.structure(information) == jax.tree.structure(concrete)
    assert jax.tree.map(jnp.shape, information) == jax.tree.map(jnp.shape, concrete)


class State(NamedTuple):
    count: Any
    information: Any


@together
@every_structure
@pytest.mark.parametrize("compensated", [False, True])
def test_a_state_passes_through_optaxs_tree_functions(case, compensated):
    def init(params):
        information = case.structure.isotropic(params, 1.0)
        information = compensate(information) if compensated else information
        return State(jnp.zeros((), jnp.int32), information)

    state = jax.tree.map(np.asarray, init(cases.PARAMS))
    # map_params calls init on a placeholder that has no leaves
    mapped = optax.tree.map_params(init, lambda x: x * 2.0, state)
    assert jax.tree.structure(mapped) == jax.tree.structure(state)
    chained = (optax.EmptyState(), {"inner": state})
    found = optax.tree.get(chained, "information")
    assert jax.tree.structure(found) == jax.tree.structure(state.information)
    zeros = jax.tree.map(np.zeros_like, found)
    changed = optax.tree.get(optax.tree.set(chained, information=zeros), "information")
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(changed))


def test_map_params_finds_the_leaves_that_are_shaped_like_parameters():
    diagonal, low_rank = NAMED["diagonal"].structure, NAMED["low_rank-4"].structure
    for structure, field in ((diagonal, "entries"), (low_rank, "base")):
        state = structure.isotropic(cases.PARAMS, 1.0)
        mapped = optax.tree.map_params(
            lambda params, s=structure: s.isotropic(params, 1.0), lambda x: 2 * x, state
        )
        for leaf in jax.tree.leaves(getattr(mapped, field)):
            np.testing.assert_array_equal(leaf, 2.0)


@together
@every_structure
@pytest.mark.parametrize("empty", [{}, optax.MaskedNode(), {"a": (), "b": None}])
def test_a_tree_without_leaves_is_a_model_without_parameters(case, empty):
    information = case.structure.isotropic(empty, 3.0)
    assert jax.tree.leaves(information) == [] or case.name != "diagonal"
    doubled = ff.information.scale(ff.information.add(information, information), 0.5)
    assert jax.tree.structure(doubled) == jax.tree.structure(information)


@pytest.mark.parametrize("case", STRUCTURES, ids=repr)
def test_masked_parameters_leave_their_place_out(case):
    params = {**cases.PARAMS, "conv": optax.MaskedNode()}
    information = case.structure.isotropic(params, 2.0)
    dense = ff.information.to_dense(information, params)
    np.testing.assert_array_equal(dense, 2.0 * np.eye(9))
    assert jax.tree.structure(ff.information.diagonal(information, params)) == (
        jax.tree.structure(params)
    )


@pytest.mark.slow
@together
@every_structure
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_information_of_narrow_vectors_is_float32(case, dtype):
    narrow, stack = jax.tree.map(
        lambda x: np.asarray(x).astype(dtype), (cases.PARAMS, cases.tree(cases.rows()))
    )
    for made in (
        jax.eval_shape(case.structure.reduce, stack),
        jax.eval_shape(lambda: case.structure.isotropic(narrow, 1.0)),
    ):
        assert {leaf.dtype for leaf in jax.tree.leaves(made)} == {jnp.dtype("float32")}


def test_mixed_types_meet_in_the_widest():
    stack = cases.tree(cases.rows())
    stack["conv"] = stack["conv"].astype(jnp.float16)
    stack["kernel"] = stack["kernel"].astype(jnp.float32)
    for case in STRUCTURES:
        made = jax.eval_shape(case.structure.reduce, stack)
        assert {leaf.dtype for leaf in jax.tree.leaves(made)} == {jnp.dtype("float64")}
