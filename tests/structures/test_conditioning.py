"""Parameters of very different scale cost no digits: matrices are equilibrated."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fisherflow_jax as ff
import structure_cases as cases
from structure_cases import NAMED, SIZE

# Units of the parameters from 1e-3 to 1e3: the matrix has condition 1e12, which is
# beyond float32 altogether, but its equilibrated form is harmless.
SCALES = np.random.default_rng(8).permutation(np.geomspace(1e-3, 1e3, SIZE))
VECTOR = np.random.default_rng(6).normal(size=SIZE)
PRECISION = {"float64": 1e-12, "float32": 1e-4}

every_case = pytest.mark.parametrize("name", ["units", "full"])
both_types = pytest.mark.parametrize("dtype", PRECISION)


@functools.cache
def well_conditioned(name):
    vectors = np.random.default_rng(3).normal(size=(200, SIZE))
    return NAMED[name].kept(vectors.T @ vectors / 200)


@functools.cache
def results(name, dtype):
    @jax.jit
    def run(full, vector):
        information = NAMED[name].structure.from_full(full)
        keys = jax.random.split(jax.random.key(0), 500)
        return {
            "solve": ff.information.solve(information, vector),
            "inverse_diagonal": ff.information.inverse_diagonal(information),
            "logdet": ff.information.logdet(information),
            "inverse": ff.information.to_dense(ff.information.inverse(information)),
            "draws": jax.vmap(lambda k: ff.information.sample(information, k))(keys),
        }

    matrix = well_conditioned(name) * np.outer(SCALES, SCALES)
    full = ff.structures.Full(cases.tree(jnp.asarray(matrix, dtype)))
    return run(full, cases.tree(jnp.asarray(VECTOR * SCALES, dtype)))


@pytest.mark.slow_cases
@every_case
@both_types
def test_solve(name, dtype):
    expected = np.linalg.solve(well_conditioned(name), VECTOR)
    found = cases.flat(results(name, dtype)["solve"]) * SCALES
    np.testing.assert_allclose(found, expected, atol=PRECISION[dtype])


@every_case
@both_types
def test_inverse(name, dtype):
    expected = np.linalg.inv(well_conditioned(name))
    found = np.asarray(results(name, dtype)["inverse"]) * np.outer(SCALES, SCALES)
    np.testing.assert_allclose(found, expected, atol=PRECISION[dtype])
    variances = cases.flat(results(name, dtype)["inverse_diagonal"]) * SCALES**2
    np.testing.assert_allclose(variances, np.diag(expected), rtol=PRECISION[dtype])


@every_case
@both_types
def test_logdet(name, dtype):
    logdet = np.linalg.slogdet(well_conditioned(name))[1] + 2 * np.log(SCALES).sum()
    found = results(name, dtype)["logdet"]
    np.testing.assert_allclose(found, logdet, atol=PRECISION[dtype])


@every_case
@both_types
def test_draws_are_those_of_the_well_conditioned_problem(name, dtype):
    drawn = np.concatenate(
        [
            np.reshape(x, (500, -1))
            for x in jax.tree.leaves(results(name, dtype)["draws"])
        ],
        axis=1,
    )
    whitened = (drawn * SCALES) @ np.linalg.cholesky(well_conditioned(name))
    # a chi-square with 500 d degrees of freedom, within 4 standard deviations
    assert abs(np.mean(whitened**2) - 1) < 4 * np.sqrt(2 / whitened.size)


@pytest.mark.parametrize("name", ["units", "full"])
def test_what_is_not_positive_definite_gives_nan_and_not_a_number(name):
    matrix = np.diag(np.where(np.arange(SIZE) == 9, -1.0, 1.0))
    full = ff.structures.Full(cases.tree(matrix))

    @jax.jit
    def run(full, vector):
        information = NAMED[name].structure.from_full(full)
        solved = ff.information.solve(information, vector)
        return solved, ff.information.logdet(information)

    solved, logdet = run(full, cases.tree(np.ones(SIZE)))
    assert np.isnan(cases.flat(solved)[9])
    assert np.isnan(logdet)
