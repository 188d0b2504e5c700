"""low_rank: what recompression keeps, and that no stream of updates breaks it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fisherflow_jax as ff
import structure_cases as cases
from structure_cases import SIZE

RANK = 3
STEPS = 1000


def low_rank_and_rest(matrix, rank):
    values, basis = np.linalg.eigh(matrix)
    top = (basis[:, -rank:] * values[-rank:]) @ basis[:, -rank:].T
    return top, np.diag(np.diag(matrix - top))


@functools.cache
def stream(dtype, rank):
    """The sum of STEPS informations of two vectors each, by one scan."""
    structure = ff.structures.low_rank(rank)

    @jax.jit
    def run(vectors):
        def body(information, pair):
            return ff.information.add(information, structure.reduce(pair)), None

        start = structure.isotropic(jax.tree.map(lambda x: x[0, 0], vectors), 1e-3)
        return jax.lax.scan(body, start, vectors)[0]

    return lambda flat: run(cases.tree(jnp.asarray(flat, dtype)))


def full_rank_vectors():
    return np.random.default_rng(1).normal(size=(STEPS, 2, SIZE))


def subspace_vectors():
    rng = np.random.default_rng(2)
    return rng.normal(size=(STEPS, 2, RANK)) @ rng.normal(size=(RANK, SIZE))


PRECISION = {"float64": 1e-11, "float32": 2e-5}
both_types = pytest.mark.parametrize("dtype", PRECISION)


@both_types
def test_the_diagonal_and_trace_stay_exact_after_a_thousand_sums(dtype):
    vectors = full_rank_vectors()
    information = stream(dtype, RANK)(vectors)
    expected = np.sum(vectors**2, (0, 1)) + 1e-3
    diagonal = cases.flat(ff.information.diagonal(information))
    np.testing.assert_allclose(diagonal, expected, rtol=PRECISION[dtype])
    trace = ff.information.trace(information)
    np.testing.assert_allclose(trace, expected.sum(), rtol=PRECISION[dtype])


@both_types
@pytest.mark.parametrize("vectors", [full_rank_vectors, subspace_vectors])
def test_positive_definite_after_a_thousand_sums(dtype, vectors):
    information = stream(dtype, RANK)(vectors())
    base = np.asarray(cases.flat(information.base), np.float64)
    factors = np.concatenate(
        [np.reshape(x, (RANK, -1)) for x in jax.tree.leaves(information.factors)],
        axis=1,
        dtype=np.float64,
    )
    assert np.all(base >= np.float32(1e-3) * (1 - 1e-6))  # never below the prior
    dense = np.diag(base) + factors.T @ factors
    assert np.linalg.eigvalsh(dense).min() > 0.99e-3
    assert np.all(cases.flat(ff.information.inverse_diagonal(information)) > 0)
    assert np.isfinite(ff.information.logdet(information))


@both_types
@pytest.mark.parametrize("rank", [RANK, SIZE + 2])
def test_exact_when_the_rank_suffices(dtype, rank):
    vectors = subspace_vectors()
    information = stream(dtype, rank)(vectors)
    gram = np.einsum("ska,skb->ab", vectors, vectors)
    dense = np.asarray(cases.dense(information), np.float64)
    scale = np.abs(gram).max()
    # what a thousand recompressions round away lies on the diagonal
    tolerance = 10 * PRECISION[dtype] * scale
    np.testing.assert_allclose(dense, gram + 1e-3 * np.eye(SIZE), atol=tolerance)


@pytest.mark.slow
def test_a_sum_keeps_the_leading_directions_and_the_diagonal_of_the_rest():
    structure = ff.structures.low_rank(RANK)
    left, right = cases.rows(4, seed=1)[:4], cases.rows(9, seed=2)[:9]
    parts = [structure.reduce(cases.tree(x)) for x in (left, right)]
    total = jax.jit(ff.information.add)(*parts)
    (top, rest), (other_top, other_rest) = (
        low_rank_and_rest(x.T @ x, RANK) for x in (left, right)
    )
    kept, spread = low_rank_and_rest(top + other_top, RANK)
    expected = kept + spread + rest + other_rest
    np.testing.assert_allclose(cases.dense(total), expected, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(
        cases.flat(total.base), np.diag(spread + rest + other_rest), rtol=1e-10
    )


@pytest.mark.parametrize("rank", [2, 5])
def test_a_confident_float32_information_keeps_its_variances(rank):
    # 1e5 times the prior in every direction: (1 - share) / prior would lose 5 digits
    vectors = np.random.default_rng(3).normal(size=(5, 2))
    vectors *= np.sqrt(1e3 / np.sum(vectors**2, 0))
    structure = ff.structures.low_rank(rank)
    information = ff.information.add(
        structure.reduce(jnp.asarray(vectors, jnp.float32)),
        ff.structures.Scalar(jnp.asarray(1e-2, jnp.float32)),
    )
    dense = np.asarray(ff.information.to_dense(information), np.float64)
    variances = ff.information.inverse_diagonal(information)
    np.testing.assert_allclose(variances, np.diag(np.linalg.inv(dense)), rtol=1e-4)
    solved = ff.information.solve(information, jnp.asarray([1.0, -2.0], jnp.float32))
    np.testing.assert_allclose(solved, np.linalg.solve(dense, [1, -2]), rtol=1e-4)


def test_a_variance_lost_to_rounding_is_never_zero_or_negative():
    # the truth, 1e-8 of 1 / prior, is below float32's resolution of the formula
    direction = np.zeros((1, 4))
    direction[0, 2] = 1e4
    information = ff.information.add(
        ff.structures.low_rank(1).reduce(jnp.asarray(direction, jnp.float32)),
        ff.structures.Scalar(jnp.asarray(1.0, jnp.float32)),
    )
    variances = np.asarray(ff.information.inverse_diagonal(information))
    assert 1e-8 <= variances[2] < 1e-6
    np.testing.assert_allclose(variances[[0, 1, 3]], 1.0)


@pytest.mark.parametrize("rank", [0, -1, 2.0, None])
def test_a_rank_that_is_no_positive_whole_number_is_refused(rank):
    with pytest.raises(ValueError, match=f"rank must be .*got {rank}"):
        ff.structures.low_rank(rank)
