"""Inverse, sandwich, conform and the Kalman prediction against dense algebra."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fisherflow_jax as ff
import structure_cases as cases
from fisherflow_jax.structures import Compensated, Diagonal, Scalar
from structure_cases import DENSE_PARTS, NAMED, SIZE

EXACT = {"rtol": 1e-10, "atol": 1e-11}
RNG = np.random.default_rng(5)
NOISES = RNG.uniform(0.0, 0.4, SIZE)
STEPS = RNG.uniform(-1.1, 1.1, SIZE)

every_case = pytest.mark.parametrize(
    "case", [*DENSE_PARTS, NAMED["compensated-full"]], ids=repr
)


def on_groups(groups, seed):
    """A random matrix that couples only parameters of the same group."""
    matrix = np.random.default_rng(seed).normal(size=(SIZE, SIZE))
    return cases.only(groups)(matrix)


def predicted(matrix, noise, transition=None):
    transition = np.eye(SIZE) if transition is None else transition
    covariance = transition @ np.linalg.inv(matrix) @ transition.T + noise
    return np.linalg.inv(covariance)


def noise_and_step(case):
    """A number for each parameter, where the structure can keep that."""
    if case.structure.name == "scalar()":
        return Scalar(jnp.asarray(0.2)), Scalar(jnp.asarray(0.9))
    return Diagonal(cases.tree(NOISES)), Diagonal(cases.tree(STEPS))


@functools.cache
def results(case):
    @jax.jit
    def run(information, meat):
        noise, step = noise_and_step(case)
        return {
            "inverse": ff.information.inverse(information),
            "sandwich": ff.information.sandwich(information, meat),
            "noise": ff.information.propagate(information, noise),
            "transition": ff.information.propagate(information, noise, step),
        }

    return run(cases.information(case), cases.information(case, 6, seed=9))


@pytest.mark.slow_cases
@every_case
def test_inverse(case):
    expected = np.linalg.inv(cases.matrix(case))
    np.testing.assert_allclose(cases.dense(results(case)["inverse"]), expected, **EXACT)


@every_case
def test_sandwich(case):
    inverse = np.linalg.inv(cases.matrix(case))
    expected = inverse @ cases.matrix(case, 6, seed=9) @ inverse
    np.testing.assert_allclose(
        cases.dense(results(case)["sandwich"]), expected, **EXACT
    )


@every_case
def test_prediction(case):
    noise, step = (cases.dense(operator) for operator in noise_and_step(case))
    result, matrix = results(case), cases.matrix(case)
    np.testing.assert_allclose(
        cases.dense(result["noise"]), predicted(matrix, noise), **EXACT
    )
    np.testing.assert_allclose(
        cases.dense(result["transition"]), predicted(matrix, noise, step), **EXACT
    )
    assert isinstance(result["noise"], Compensated) == case.compensated


def test_prediction_with_one_number_for_all_parameters():
    one, tenth = Scalar(jnp.asarray(0.9)), Scalar(jnp.asarray(0.1))
    information = cases.information(NAMED["full"])
    matrix = cases.matrix(NAMED["full"])
    moved = jax.jit(ff.information.propagate)(information, tenth, one)
    expected = predicted(matrix, 0.1 * np.eye(SIZE), 0.9 * np.eye(SIZE))
    np.testing.assert_allclose(cases.dense(moved), expected, **EXACT)


@pytest.mark.parametrize(
    ("name", "groups"),
    [
        ("full", [list(range(SIZE))]),
        ("units", cases.UNITS),
        ("block-names", cases.SHARED_NAMES),
    ],
)
def test_prediction_with_matrices_that_keep_the_structure(name, groups):
    case = NAMED[name]
    root = on_groups(groups, 1)
    noise, step = 0.1 * root @ root.T, 0.5 * on_groups(groups, 2)
    result = jax.jit(lambda i: ff.information.propagate(i, noise, step))(
        cases.information(case)
    )
    expected = predicted(cases.matrix(case), noise, step)
    np.testing.assert_allclose(cases.dense(result), expected, **EXACT)


def test_a_matrix_that_couples_blocks_is_refused():
    information, identity = cases.information(NAMED["units"]), np.eye(SIZE)
    coupling = identity.copy()
    coupling[0, 1] = 0.1
    with pytest.raises(ValueError, match="process_noise couples parameters of differ"):
        ff.information.propagate(information, coupling)
    with pytest.raises(ValueError, match="transition couples parameters of different"):
        ff.information.propagate(information, identity, coupling)


@pytest.mark.parametrize("name", ["scalar", "diagonal"])
def test_a_matrix_is_refused_where_it_cannot_be_kept(name):
    information = cases.information(NAMED[name])
    one = Scalar(jnp.asarray(1.0))
    with pytest.raises(ValueError, match="process_noise must be"):
        ff.information.propagate(information, np.eye(SIZE))
    with pytest.raises(ValueError, match="transition must be"):
        ff.information.propagate(information, one, np.eye(SIZE))


@pytest.mark.parametrize("name", ["diagonal", "units", "full"])
def test_prediction_without_a_transition_inverts_nothing(name):
    structure = NAMED[name].structure
    direction = np.zeros(SIZE)
    direction[[0, 3, 9]] = 1.0, 2.0, -1.0
    singular = jax.jit(structure.reduce)(cases.tree(direction[None]))
    matrix = NAMED[name].kept(np.outer(direction, direction))
    noise = np.diag(np.where(np.arange(SIZE) % 2, 0.3, 0.0))
    moved = jax.jit(ff.information.propagate)(
        singular, Diagonal(cases.tree(np.diag(noise)))
    )
    expected = np.linalg.solve(np.eye(SIZE) + matrix @ noise, matrix)
    np.testing.assert_allclose(cases.dense(moved), expected, **EXACT)


@pytest.mark.parametrize("name", ["scalar", "diagonal", "units", "full"])
def test_conform_takes_the_templates_representation(name):
    plain = cases.information(NAMED[name])
    pair = cases.information(NAMED[f"compensated-{name}"])
    for template, information in ((plain, plain), (pair, plain), (pair, pair)):
        result = ff.information.conform(template, information)
        assert jax.tree.structure(result) == jax.tree.structure(template)
        np.testing.assert_allclose(cases.dense(result), cases.dense(plain), rtol=1e-12)


def test_conform_brings_a_low_rank_total_back_to_its_rank():
    case = NAMED["low_rank-4"]
    part = cases.information(case, 3)
    stacked = jax.tree.map(lambda x: jnp.stack([x, x]), part)
    total = ff.information.total(stacked, jnp.array([1.0, 2.0]))
    result = jax.jit(ff.information.conform)(part, total)
    assert jax.tree.map(jnp.shape, result) == jax.tree.map(jnp.shape, part)
    # three directions, twice: the rank suffices
    np.testing.assert_allclose(cases.dense(result), 3 * cases.matrix(case, 3), **EXACT)
