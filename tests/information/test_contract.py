"""Spectra, roots, restrictions, factors: every structure against numpy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fisherflow_jax as ff
import structure_cases as cases
from fisherflow_jax.structures import Diagonal, Scalar
from structure_cases import CASES, SIZE

ops = ff.information
VECTOR = np.random.default_rng(7).normal(size=SIZE)
EXACT = {"rtol": 1e-10, "atol": 1e-11}
HOLED = {
    "conv": optax.MaskedNode(),
    "deep": (np.zeros(()), optax.MaskedNode()),
    "kernel": np.zeros((3, 2)),
}
SHOWN = [6, *range(9, 15)]

every_case = pytest.mark.parametrize("case", CASES, ids=repr)


def everything(information, vector, like):
    found, white = ops.spectral(information, like), ops.whitener(information, like=like)
    stack = jax.tree.map(lambda x: jnp.stack([x, 2 * x, x * x]), vector)
    rows = white.matrix(stack)
    damped = ops.whitener(information, 0.3, like)
    return {
        "times": found.times(vector),
        "divide": found.divide(vector),
        "root": found.map(lambda x: x**-0.5).times(vector),
        "eigenvalues": jnp.concatenate(
            [x.ravel() for x in ops.eigenvalues(information, like)]
        ),
        "expanded": jnp.concatenate([x.ravel() for x in found.expanded(like)]),
        "colored": ops.color(information, ops.whiten(information, vector, like), like),
        "damped": damped.color(jax.tree.map(lambda x: x[0], damped.rows(stack))),
        "products": rows @ rows.T,
        "factors": ops.factorise(information, jnp.asarray(0.3)).divide(vector),
        "effective": [
            ops.effective(information, Scalar(jnp.asarray(0.5)), like),
            ops.effective(
                information, Diagonal(jax.tree.map(jnp.ones_like, like)), like
            ),
        ],
        "determinants": [
            ops.determinant(information, prior, like)(prior, jnp.asarray(0.7))
            for prior in (
                Scalar(jnp.asarray(0.4)),
                Diagonal(cases.tree(jnp.arange(1.0, SIZE + 1))),
            )
        ],
        "restricted": ops.to_dense(ops.restrict(information, HOLED, like), HOLED),
    }


@functools.cache
def results(case):
    information = cases.information(case)
    return jax.jit(everything)(information, cases.tree(VECTOR), cases.PARAMS)


def check(result, expected):
    np.testing.assert_allclose(cases.flat(result), expected, **EXACT)


@pytest.mark.slow_cases
@every_case
def test_the_spectrum_rebuilds_the_operator_and_its_functions(case):
    matrix, found = cases.matrix(case), results(case)
    values, basis = np.linalg.eigh(matrix)
    check(found["times"], matrix @ VECTOR)
    check(found["divide"], np.linalg.solve(matrix, VECTOR))
    check(found["root"], basis @ (values**-0.5 * (basis.T @ VECTOR)))
    check(np.sort(found["eigenvalues"]), values)
    check(np.sort(found["expanded"]), values)


@every_case
def test_a_root_of_the_inverse(case):
    matrix, found = cases.matrix(case), results(case)
    check(found["colored"], np.linalg.solve(matrix, VECTOR))
    check(found["damped"], np.linalg.solve(matrix + 0.3 * np.eye(SIZE), VECTOR))
    stack = np.stack([VECTOR, 2 * VECTOR, VECTOR * VECTOR])
    check(found["products"], (stack @ np.linalg.solve(matrix, stack.T)).ravel())


@every_case
def test_factors_solve(case):
    damped = cases.matrix(case) + 0.3 * np.eye(SIZE)
    check(results(case)["factors"], np.linalg.solve(damped, VECTOR))


@every_case
def test_effective_parameters(case):
    inverse = np.linalg.inv(cases.matrix(case))
    held = 0.5 * np.trace(inverse), np.trace(inverse)
    expected = [SIZE - min(x, SIZE) for x in held]
    np.testing.assert_allclose(results(case)["effective"], expected, **EXACT)


@every_case
def test_determinants_beside_a_prior(case):
    matrix = 0.7 * cases.matrix(case)
    priors = 0.4 * np.eye(SIZE), np.diag(np.arange(1.0, SIZE + 1))
    expected = [np.linalg.slogdet(matrix + prior)[1] for prior in priors]
    np.testing.assert_allclose(results(case)["determinants"], expected, **EXACT)


@every_case
def test_a_restriction_has_the_rows_and_columns_that_are_shown(case):
    expected = cases.matrix(case)[np.ix_(SHOWN, SHOWN)]
    np.testing.assert_allclose(results(case)["restricted"], expected, **EXACT)


@pytest.mark.slow
def test_a_dense_default_says_how_many_bytes_it_wants():
    large = ff.structures.low_rank(2).isotropic({"w": np.zeros(5000)}, 1.0)
    message = "5000 parameters .* 200,000,000 bytes, and is refused above 4096"
    for operation in (ops.spectral, lambda x: ops.eigenvalues.dispatch(object)(x)):
        with pytest.raises(ValueError, match=message):
            operation(large)
    # a constant diagonal has its eigenvalues without the matrix
    (values,) = ops.eigenvalues(large)
    assert values.shape == (5000,)
    assert ops.logdet(large) == 0
    assert ops.whiten(large, {"w": np.ones(5000)}).shape == (5000,)
