"""What each structure keeps of vectors, of a matrix and of an operator."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fisherflow_jax as ff
import structure_cases as cases
from fisherflow_jax.structures.capabilities import OBSERVED
from structure_cases import DENSE_PARTS, NAMED, SIZE, STRUCTURES

EXACT = {"rtol": 1e-12, "atol": 1e-12}
RNG = np.random.default_rng(4)
MATRIX = RNG.normal(size=(SIZE, SIZE))
MATRIX = MATRIX + MATRIX.T  # symmetric and indefinite, as a Hessian may be


def kept(case, matrix):
    return case.kept(matrix)


@pytest.mark.parametrize("case", STRUCTURES, ids=repr)
@pytest.mark.parametrize("count", [1, 18])
def test_reduce_keeps_its_part_of_the_gram_matrix(case, count):
    vectors = cases.rows()[:count]
    information = jax.jit(case.structure.reduce)(cases.tree(vectors))
    expected = case.kept(vectors.T @ vectors)
    np.testing.assert_allclose(cases.dense(information), expected, **EXACT)


@pytest.mark.parametrize("case", DENSE_PARTS, ids=repr)
def test_from_matvec_keeps_its_part_of_an_operator(case):
    @jax.jit
    def build(matrix):
        def matvec(vector):
            return cases.tree(matrix @ jax.flatten_util.ravel_pytree(vector)[0])

        return case.structure.from_matvec(matvec, cases.PARAMS)

    np.testing.assert_allclose(cases.dense(build(MATRIX)), case.kept(MATRIX), **EXACT)


@pytest.mark.parametrize("case", DENSE_PARTS, ids=repr)
def test_from_full_keeps_its_part_of_the_matrix(case):
    full = ff.structures.Full(cases.tree(MATRIX))
    information = jax.jit(case.structure.from_full)(full)
    assert isinstance(information, type(case.structure.isotropic(cases.PARAMS, 1.0)))
    np.testing.assert_allclose(cases.dense(information), case.kept(MATRIX), **EXACT)


@pytest.mark.parametrize("name", ["low_rank-4"])
def test_low_rank_is_a_sum_of_squares_and_holds_no_indefinite_operator(name):
    structure = NAMED[name].structure
    assert structure.from_matvec is None
    assert structure.from_full is None
    with pytest.raises(ValueError, match=r"low_rank\(4\) does not go with .*because"):
        structure.require(OBSERVED, "because")


def test_low_precision_products_are_summed_in_float32():
    # 4096 rows of 1 + 1/128: in bfloat16 the running sum would stop at 256
    stack = jnp.full((4096, 2), 1.0078125, jnp.bfloat16)
    expected = 4096 * 1.0078125**2
    for case in STRUCTURES:
        if case.name.startswith("block-"):
            continue  # their partition names other leaves
        information = case.structure.reduce(stack)
        diagonal = ff.information.diagonal(information, jnp.zeros(2, jnp.float32))
        # a product may add its 4096 terms one by one, as the processor has it
        rounding = 4096 * np.finfo(np.float32).eps / 2
        np.testing.assert_allclose(diagonal, expected, rtol=rounding)
