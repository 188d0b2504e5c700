"""Null directions and estimability against scipy's generalised eigenvalues."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import linalg

import fisherflow_jax as ff
import structure_cases as cases
from structure_cases import CASES, SIZE

ops = ff.information
DIAGONAL = np.geomspace(0.01, 0.5, SIZE)  # below what each information holds of prior


@pytest.mark.slow_cases
@pytest.mark.parametrize("case", CASES, ids=repr)
def test_shares_and_directions_of_every_structure(case):
    information = cases.information(case, count=4)  # d = 15: the data leave much open
    precision = ff.structures.Diagonal(cases.tree(DIAGONAL))
    found = ops.null_directions(information, precision, cases.PARAMS)
    matrix, prior = cases.matrix(case, count=4), np.diag(DIAGONAL)
    expected = linalg.eigh(prior, matrix, eigvals_only=True)[::-1]
    np.testing.assert_allclose(found.shares, expected, rtol=1e-9, atol=1e-12)
    leaves = jax.tree.leaves(found.vectors)
    rows = np.concatenate([np.reshape(leaf, (SIZE, -1)) for leaf in leaves], 1)
    np.testing.assert_allclose(rows @ matrix @ rows.T, np.eye(SIZE), atol=1e-9)
    np.testing.assert_allclose(rows @ prior @ rows.T, np.diag(expected), atol=1e-9)
    left = SIZE - ops.effective(information, precision, cases.PARAMS)
    np.testing.assert_allclose(found.shares.sum(), left, rtol=1e-9)


def design(dtype):
    """A dummy set that sums to the intercept, a column of cents beside one of euros,
    one of small units, and one of zeros."""
    rng = np.random.default_rng(0)
    group, euros = rng.integers(0, 3, 200), rng.normal(size=200)
    columns = [np.ones(200), group == 0, group == 1, group == 2, euros, 100 * euros]
    x = np.stack([*columns, 1e-3 * rng.normal(size=200), np.zeros(200)], 1)
    return jnp.asarray(x, dtype)


CONTRASTS = [
    ([0, 1, -1, 0, 0, 0, 0, 0], True),  # of two groups
    ([1, 1, 0, 0, 0, 0, 0, 0], True),  # the mean of a group
    ([1, 0, 0, 0, 0, 0, 0, 0], False),
    ([0, 1, 0, 0, 0, 0, 0, 0], False),
    ([0, 0, 0, 0, 1, 100, 0, 0], True),
    ([0, 0, 0, 0, 1, 0, 0, 0], False),
    ([0, 0, 0, 0, 0, 0, 1, 0], True),  # small, but seen
    ([0, 0, 0, 0, 0, 0, 0, 1], False),
    ([0, 0, 0, 0, 0, 0, 1, 1], False),
]


@pytest.mark.slow_cases
@pytest.mark.parametrize("prior", [None, 1e-6], ids=["data alone", "prior 1e-6"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_estimable_contrasts(dtype, prior):
    x = design(dtype)
    information, precision = ff.structures.full().reduce(x), None
    if prior is not None:
        precision = ff.structures.Scalar(jnp.asarray(prior, dtype))
        information = ops.add(information, precision)
    shares = np.asarray(ops.null_directions(information, precision).shares)
    assert np.sum(shares > 0.5) == np.sum(shares > 0.05) == 3  # and no doubtful ones
    contrasts = jnp.asarray([contrast for contrast, _ in CONTRASTS], dtype)
    found = jax.jit(
        jax.vmap(lambda c: ops.is_estimable(information, c, precision))
    )(contrasts)  # fmt: skip
    assert found.tolist() == [estimable for _, estimable in CONTRASTS]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_of_two_equal_columns_their_difference_alone_is_null(dtype):
    """And not a third one of small units, whose eigenvalue is smaller than rounding."""
    first, other = np.random.default_rng(1).normal(size=(2, 500))
    x = np.stack([first, first, 1e-3 * other], 1)
    weights = np.exp(-(first**2))
    information = ff.structures.full().reduce(
        jnp.asarray(x * weights[:, None] ** 0.5, dtype)
    )
    values = np.linalg.eigvalsh(ops.to_dense(information))
    assert dtype == "float64" or values[1] < 1e-5 * values[2]
    found = ops.null_directions(information)
    assert np.asarray(found.shares > 0.5).tolist() == [True, False, False]
    direction = np.asarray(found.vectors[0] / found.vectors[0, 0])
    np.testing.assert_allclose(direction, [1, -1, 0], atol=1e-3)
    zero = ops.efficient(information, jnp.asarray([1.0, 0.0, 0.0], dtype))
    np.testing.assert_array_equal(zero, 0)
    # beside the two, the third one is known as if there were one of them
    alone = np.linalg.inv((x[:, 1:].T * weights) @ x[:, 1:])
    third = ops.efficient(information, jnp.asarray([0.0, 0.0, 1.0], dtype))
    rtol = 1e-4 if dtype == "float32" else 1e-10
    np.testing.assert_allclose(third, 1 / alone[1, 1], rtol=rtol)


@pytest.mark.slow_cases
@pytest.mark.parametrize("case", CASES, ids=repr)
def test_efficient_information_of_every_structure(case):
    """Schur's complement, and the inverse of a block of the inverse."""
    information, matrix = cases.information(case), cases.matrix(case)
    inverse = np.linalg.inv(matrix)
    units = cases.tree(np.eye(SIZE)[4])
    found = jax.jit(ops.efficient)(information, units, cases.PARAMS)
    np.testing.assert_allclose(found, 1 / inverse[4, 4], rtol=1e-10)
    inside = np.arange(SIZE) < 6  # of the leaf "conv"
    found = ops.efficient(information, ["conv"], cases.PARAMS)
    across, rest = matrix[np.ix_(inside, ~inside)], matrix[np.ix_(~inside, ~inside)]
    schur = matrix[np.ix_(inside, inside)] - across @ np.linalg.solve(rest, across.T)
    np.testing.assert_allclose(found, schur, rtol=1e-9, atol=1e-9 * schur.max())
    everything = ops.efficient(information, lambda name: True, cases.PARAMS)
    np.testing.assert_allclose(everything, matrix, rtol=1e-9, atol=1e-9 * matrix.max())


def test_efficient_information_of_combinations():
    matrix = np.cov(np.random.default_rng(2).normal(size=(5, 20)))
    information = ff.structures.Full(jnp.asarray(matrix))
    rows = np.random.default_rng(3).normal(size=(2, 5))
    expected = np.linalg.inv(rows @ np.linalg.inv(matrix) @ rows.T)
    found = ops.efficient(information, jnp.asarray(rows))
    np.testing.assert_allclose(found, expected, rtol=1e-10)
    # a larger tolerance: what is nearly nothing is nothing
    small = ff.structures.Full(jnp.asarray([[1.0, 1.0], [1.0, 1.0 + 1e-6]]))
    first = jnp.asarray([1.0, 0.0])
    assert ops.efficient(small, first) > 0
    assert ops.efficient(small, first, tolerance=1e-5) == 0


def test_what_is_refused():
    information = ff.structures.Diagonal({"a": jnp.ones(2)})
    with pytest.raises(ValueError, match="a contrast is a tree like the parameters"):
        ops.is_estimable(information, {"a": jnp.ones(3)})
    with pytest.raises(ValueError, match="null directions of a Diagonal information"):
        ops.null_directions(ff.structures.Diagonal(jnp.ones(5000)))
    with pytest.raises(ValueError, match="contrasts are trees like the parameters"):
        ops.efficient(information, {"a": jnp.ones(3)})
    with pytest.raises(ValueError, match="no parameter has the name 'b'"):
        ops.efficient(information, ["b"])


@pytest.mark.parametrize(
    "contrasts", [[[1.0, 0, 0], [2, 0, 0]], [[0.0, 0, 0]], np.ones((4, 3))]
)
def test_contrasts_are_independent(contrasts):
    information = ff.structures.Full(jnp.eye(3))
    with pytest.raises(ValueError, match="combinations of the others, or zero"):
        ff.information.efficient(information, jnp.asarray(contrasts))
