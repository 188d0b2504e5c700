"""Every operation of every structure against dense linear algebra in numpy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fisherflow_jax as ff
import structure_cases as cases
from structure_cases import CASES, COMPENSATED, SIZE, STRUCTURES
from together import together

VECTOR = np.random.default_rng(7).normal(size=SIZE)
DAMPING = 0.3
EXACT = {"rtol": 1e-10, "atol": 1e-11}

every_case = pytest.mark.parametrize("case", CASES, ids=repr)


def everything(information, vector, like):
    """All operations in one function, compiled once a case."""
    ops = ff.information
    solve = ops.solver(information)
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), vector)
    return {
        "matvec": ops.matvec(information, vector),
        "solve": solve(vector),
        "damped": ops.solve(information, vector, damping=DAMPING),
        "narrow": (ops.matvec(information, narrow), solve(narrow)),
        "logdet": ops.logdet(information, like),
        "trace": ops.trace(information, like),
        "diagonal": ops.diagonal(information, like),
        "inverse_diagonal": ops.inverse_diagonal(information, like),
        "to_dense": ops.to_dense(information, like),
        "quadratic_form": ops.quadratic_form(information, vector),
        "scaled": ops.to_dense(ops.scale(information, 2.0), like),
    }


@functools.cache
def results(case):
    information = cases.information(case)
    return jax.jit(everything)(information, cases.tree(VECTOR), cases.PARAMS)


def check(result, expected):
    np.testing.assert_allclose(cases.flat(result), expected, **EXACT)


@pytest.mark.slow_cases
@every_case
def test_to_dense(case):
    np.testing.assert_allclose(
        results(case)["to_dense"], cases.matrix(case), **EXACT, strict=True
    )


@every_case
def test_matvec(case):
    check(results(case)["matvec"], cases.matrix(case) @ VECTOR)


@every_case
@pytest.mark.parametrize("damping", [0.0, DAMPING])
def test_solve(case, damping):
    result = results(case)["damped" if damping else "solve"]
    damped = cases.matrix(case) + damping * np.eye(SIZE)
    check(result, np.linalg.solve(damped, VECTOR))


@every_case
def test_logdet(case):
    sign, logdet = np.linalg.slogdet(cases.matrix(case))
    np.testing.assert_allclose(results(case)["logdet"], sign * logdet, **EXACT)


@every_case
def test_trace(case):
    check(results(case)["trace"], np.trace(cases.matrix(case)))


@every_case
def test_diagonal(case):
    check(results(case)["diagonal"], np.diag(cases.matrix(case)))


@every_case
def test_inverse_diagonal(case):
    inverse = np.linalg.inv(cases.matrix(case))
    check(results(case)["inverse_diagonal"], np.diag(inverse))


@every_case
def test_quadratic_form(case):
    check(results(case)["quadratic_form"], VECTOR @ cases.matrix(case) @ VECTOR)


@every_case
def test_scale(case):
    expected = 2 * cases.matrix(case)
    np.testing.assert_allclose(results(case)["scaled"], expected, **EXACT)


@every_case
def test_results_are_shaped_like_the_parameters(case):
    result = results(case)
    for name in ("matvec", "solve", "damped", "diagonal", "inverse_diagonal"):
        shapes = jax.tree.map(lambda x: (x.shape, x.dtype), result[name])
        assert shapes == jax.tree.map(lambda x: (x.shape, x.dtype), cases.PARAMS)
    for name in ("logdet", "trace", "quadratic_form"):
        assert result[name].shape == ()


@pytest.mark.parametrize("name", ["full"])
def test_eager_gives_the_numbers_of_jit(name):
    case = cases.NAMED[name]
    eager = everything(cases.information(case), cases.tree(VECTOR), cases.PARAMS)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, **EXACT), eager, results(case)
    )


@pytest.mark.parametrize("case", CASES[1:], ids=repr)
def test_only_scalar_needs_a_template(case):
    without = jax.eval_shape(
        lambda information, vector: everything(information, vector, None),
        cases.information(case),
        cases.tree(VECTOR),
    )
    assert jax.tree.structure(without) == jax.tree.structure(results(case))


@together
@pytest.mark.parametrize("compensated", [False, True])
@pytest.mark.parametrize(
    "operation",
    ["logdet", "trace", "diagonal", "inverse_diagonal", "to_dense", "sample"],
)
def test_scalar_without_a_template_says_what_is_missing(operation, compensated):
    case = COMPENSATED[0] if compensated else STRUCTURES[0]
    arguments = (jax.random.key(0),) if operation == "sample" else ()
    with pytest.raises(ValueError, match=r"stores no shape: give like="):
        getattr(ff.information, operation)(cases.information(case), *arguments)


@together
@pytest.mark.parametrize(
    "operation",
    [
        lambda x: ff.information.matvec(x, x),
        lambda x: ff.information.solve(x, x),
        lambda x: ff.information.sample(x, jax.random.key(0)),
        ff.information.logdet,
        ff.information.trace,
        ff.information.diagonal,
        ff.information.inverse_diagonal,
        ff.information.to_dense,
        lambda x: ff.information.quadratic_form(x, x),
        lambda x: ff.information.add(x, x),
        lambda x: ff.information.scale(x, 2.0),
    ],
)
def test_what_is_no_information_is_named(operation):
    with pytest.raises(TypeError, match=r"information\.\w+ knows no structure of type"):
        operation(jnp.ones(3))


@pytest.mark.slow
@every_case
def test_one_solver_serves_many_vectors_also_narrow_ones(case):
    rounded = np.asarray(jnp.asarray(VECTOR).astype(jnp.bfloat16), np.float64)
    check(results(case)["narrow"][0], cases.matrix(case) @ rounded)
    check(results(case)["narrow"][1], np.linalg.solve(cases.matrix(case), rounded))
