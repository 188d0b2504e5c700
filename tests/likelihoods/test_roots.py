"""Roots of the information of one of C classes: fewest columns, and its two bounds."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from fisherflow_jax import likelihoods

CATEGORICAL = likelihoods.categorical()
CHOLESKY = likelihoods.cholesky_root(CATEGORICAL)
DIAGONAL = likelihoods.diagonal_root(CATEGORICAL)


@functools.partial(jax.jit, static_argnums=0)
def squares(likelihood, outputs):
    """(n, C, C): L L^T of every example."""
    columns = likelihoods.root_columns(likelihood, outputs)
    return jnp.einsum("rni,rnj->nij", columns, columns)


@functools.cache
def logits(num_classes):
    """Soft, peaky, uniform, tied, saturated, certain, and with impossible classes."""
    rng = np.random.default_rng(num_classes)
    soft, peaky = rng.normal(size=(2, num_classes)) * [[1.0], [4.0]]
    tied = np.where(np.arange(num_classes) % 2 == 0, 0.7, -0.4)
    ahead = np.eye(num_classes)[num_classes // 2]
    masked = np.where(np.arange(num_classes) < 2, soft, -np.inf)
    rows = [soft, peaky, 0 * soft, tied, 30 * ahead, 200 * ahead, 1e4 * ahead, masked]
    return np.stack(rows)


def information(outputs):
    p = scipy.special.softmax(outputs, -1)
    # p (1 - p) on the diagonal as a sum, which does not cancel
    off_diagonal = -p[..., :, None] * p[..., None, :]
    off_diagonal = off_diagonal * (1 - np.eye(p.shape[-1]))
    return off_diagonal - np.eye(p.shape[-1]) * off_diagonal.sum(-1, keepdims=True)


def smallest_eigenvalues(matrices):
    return np.linalg.eigvalsh(matrices)[..., 0]


# ---- the Cholesky factor


@pytest.mark.parametrize("num_classes", [1, 2, 3, 10, 100])
def test_the_cholesky_root_is_exact(num_classes):
    outputs = logits(num_classes)
    shape = CHOLESKY.probe_shape(outputs.shape)
    assert shape == (len(outputs), max(num_classes - 1, 1))
    np.testing.assert_allclose(
        squares(CHOLESKY, outputs), information(outputs), rtol=1e-11, atol=1e-17
    )


def test_the_cholesky_root_is_the_factor_of_the_sorted_matrix():
    """Columns of LAPACK's Cholesky factor, classes by decreasing probability."""
    outputs = logits(10)[:2]
    columns = np.asarray(likelihoods.root_columns(CHOLESKY, outputs))
    for i, matrix in enumerate(information(outputs)):
        order = np.argsort(-outputs[i])
        factor = np.linalg.cholesky(matrix[np.ix_(order, order)][:9, :9])
        np.testing.assert_allclose(
            columns[:, i, order[:9]].T, factor, rtol=1e-9, atol=1e-14
        )


def test_columns_do_not_see_a_constant():
    """The information leaves out what adds one number to all logits."""
    columns = likelihoods.root_columns(CHOLESKY, jnp.asarray(logits(10)))
    np.testing.assert_allclose(jnp.sum(columns, -1), 0 * columns[..., 0], atol=1e-15)


def test_roots_follow_a_permutation_of_the_classes():
    outputs = logits(10)
    order = np.random.default_rng(0).permutation(10)
    inverse = np.argsort(order)
    lower = likelihoods.rank_root(CATEGORICAL, 2, 3)
    # of tied classes a bound keeps some, of the soft and the peaky row all are distinct
    for likelihood, rows in ((CHOLESKY, 8), (DIAGONAL, 8), (lower, 2)):
        direct = np.asarray(squares(likelihood, outputs[:rows]))
        permuted = squares(likelihood, outputs[:rows, order])
        back = np.asarray(permuted)[:, inverse][:, :, inverse]
        np.testing.assert_allclose(back, direct, rtol=1e-9, atol=1e-15)


def test_targets_of_an_example_have_columns_of_their_own():
    outputs = jnp.asarray(logits(3)[:4]).reshape(2, 2, 3)
    assert CHOLESKY.probe_shape(outputs.shape) == (2, 2, 2)
    lower = likelihoods.rank_root(CATEGORICAL, 1, 2)
    for likelihood in (CHOLESKY, lower):
        columns = likelihoods.root_columns(likelihood, outputs)
        flat = jnp.moveaxis(columns, 0, 1).reshape(2, -1, 6)
        together = jnp.einsum("nri,nrj->nij", flat, flat)
        alone = squares(likelihood, outputs.reshape(4, 3)).reshape(2, 2, 3, 3)
        np.testing.assert_allclose(together[:, :3, :3], alone[:, 0], atol=1e-15)
        np.testing.assert_allclose(together[:, 3:, 3:], alone[:, 1], atol=1e-15)
        np.testing.assert_array_equal(together[:, :3, 3:], np.zeros((2, 3, 3)))


# ---- bounds


@pytest.mark.parametrize("num_classes", [1, 2, 3, 10, 100])
def test_the_diagonal_bound_exceeds_by_the_square_of_p(num_classes):
    outputs = logits(num_classes)
    p = scipy.special.softmax(outputs, -1)
    gap = squares(DIAGONAL, outputs) - information(outputs)
    np.testing.assert_allclose(gap, p[:, :, None] * p[:, None, :], atol=1e-15)


@functools.cache
def bounds(num_classes, num_iterations):
    """(C - 1, n, C, C): L L^T at every rank."""
    return np.stack(
        [
            squares(
                likelihoods.rank_root(CATEGORICAL, k, num_iterations),
                logits(num_classes),
            )
            for k in range(1, num_classes)
        ]
    )


@pytest.mark.parametrize("num_iterations", [None, 0, 3, 30])
@pytest.mark.parametrize("num_classes", [2, 5])
def test_the_rank_bound_is_below_at_every_rank(num_classes, num_iterations):
    found = bounds(num_classes, num_iterations)
    expected = information(logits(num_classes))
    assert smallest_eigenvalues(expected - found).min() >= -1e-15
    assert np.linalg.matrix_rank(found[0], tol=1e-14).max() == 1
    np.testing.assert_allclose(found[-1], expected, rtol=1e-11, atol=1e-15)


def test_the_closed_form_grows_with_its_rank_and_is_that_of_no_iterations():
    found = bounds(5, None)
    assert smallest_eigenvalues(found[1:] - found[:-1]).min() >= -1e-15
    np.testing.assert_allclose(found, bounds(5, 0), rtol=1e-12, atol=1e-17)


def test_the_closed_form_captures_most_of_what_its_rank_can():
    outputs = np.random.default_rng(1).normal(size=(100, 10)) * 2
    outputs = outputs * np.linspace(0.1, 2, 100)[:, None]
    eigenvalues = np.linalg.eigvalsh(information(outputs))
    for k in (1, 2):
        found = squares(likelihoods.rank_root(CATEGORICAL, k), outputs)
        captured = np.trace(found, axis1=1, axis2=2)
        optimal = eigenvalues[:, -k:].sum(-1)
        assert np.all(captured <= optimal + 1e-12)
        assert np.min(captured / optimal) >= 0.85


@pytest.mark.parametrize("k", [1, 3])
def test_iterations_reach_the_largest_eigenvalues(k):
    """Power-iteration error: (next eigenvalue / last kept)^(2 * 30)."""
    outputs = np.log(np.array([[0.4, 0.25, 0.15, 0.1, 0.04, 0.03, 0.03]]))
    expected = information(outputs)[0]
    values, vectors = np.linalg.eigh(expected)
    kept = vectors[:, -k:] * np.sqrt(values[-k:])
    found = squares(likelihoods.rank_root(CATEGORICAL, k, 30), outputs)[0]
    np.testing.assert_allclose(found, kept @ kept.T, atol=1e-4)
    few = squares(likelihoods.rank_root(CATEGORICAL, k, 1), outputs)[0]
    closed = squares(likelihoods.rank_root(CATEGORICAL, k), outputs)[0]
    assert np.trace(closed) < np.trace(few) < np.trace(found) <= values[-k:].sum()


# ---- numbers


WIDE = 10 * 2.0 ** -np.arange(6)


def near_certain(gap):
    """One class ahead by `gap`, the others unequal."""
    return np.concatenate([[gap], -0.2 * WIDE])[None]


LOWER = likelihoods.rank_root(CATEGORICAL, 2, 3)
NAMED = {
    "cholesky": CHOLESKY,
    "diagonal": DIAGONAL,
    "rank": likelihoods.rank_root(CATEGORICAL, 2),
    "iterated": LOWER,
}


@pytest.mark.parametrize("name", NAMED)
def test_float32_keeps_its_digits_near_certainty(name):
    """1 - p would be 0: relative errors of each entry, against float64."""
    outputs = np.concatenate([near_certain(gap) for gap in (0.0, 5.0, 12.0, 20.0)])
    outputs = outputs.astype(np.float32)
    found = squares(NAMED[name], outputs)
    assert found.dtype == jnp.float32
    expected = np.asarray(squares(NAMED[name], outputs.astype(float)))
    # entries between small classes are differences: of the scale of their diagonals
    scale = np.sqrt(np.einsum("nii,njj->nij", expected, expected))
    assert np.max(np.abs(found - expected) / scale) <= 2e-5


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("name", NAMED)
def test_saturated_logits_stay_finite(name, dtype):
    likelihood = NAMED[name]
    rows = [near_certain(gap) for gap in (0.0, 80.0, 87.0, 95.0, 110.0, 200.0, 1e4)]
    rows.append(np.where(np.arange(7) == 3, 0.0, -np.inf)[None])
    rows.append(np.zeros((1, 7)))
    outputs = jnp.asarray(np.concatenate(rows), dtype)
    probes = jnp.ones(likelihood.probe_shape(outputs.shape))

    @jax.jit
    def evaluate(outputs):
        def total(outputs):
            cotangents = likelihood.root(outputs, probes)
            return jnp.sum(cotangents.astype(jnp.float32))

        return likelihoods.root_columns(likelihood, outputs), jax.grad(total)(outputs)

    columns, slopes = evaluate(outputs)
    assert columns.dtype == dtype
    for values in (columns, slopes):
        assert np.all(np.isfinite(np.asarray(values).astype(float)))
    exact = squares(likelihood, outputs.astype(jnp.float64))
    columns = np.asarray(columns).astype(float)
    np.testing.assert_allclose(
        np.einsum("rni,rnj->nij", columns, columns),
        exact,
        atol=2 * float(jnp.finfo(dtype).eps),
    )
    assert np.all(columns[:, 5:8].sum(0).max(-1) <= 1)  # certain: only diag(p) is left


@pytest.mark.parametrize("name", NAMED)
def test_half_precision_is_computed_in_float32(name):
    likelihood = NAMED[name]
    narrow = jnp.asarray(logits(10)[:4], jnp.bfloat16)
    probes = np.random.default_rng(0).normal(size=likelihood.probe_shape(narrow.shape))
    root = jax.jit(likelihood.root)
    np.testing.assert_array_equal(
        root(narrow, probes),
        root(narrow.astype(jnp.float32), probes).astype(jnp.bfloat16),
    )


@pytest.mark.parametrize("name", NAMED)
def test_a_logit_that_is_not_a_number_is_not_hidden(name):
    outputs = jnp.array([[0.0, jnp.nan, 1.0], [0.0, 2.0, 1.0]])
    columns = likelihoods.root_columns(NAMED[name], outputs)
    assert np.all(np.isnan(columns[:, 0]).any(-1))
    assert np.all(np.isfinite(columns[:, 1]))


@pytest.mark.parametrize("name", NAMED)
def test_roots_are_linear_under_jit_and_vmap(name):
    root = NAMED[name].root
    outputs = jnp.asarray(logits(3)[:4])
    shape = NAMED[name].probe_shape(outputs.shape)
    first, second = np.random.default_rng(1).normal(size=(2, *shape))
    expected = 2.0 * root(outputs, first) - root(outputs, second)
    combined = 2.0 * first - second
    for transform in (lambda function: function, jax.vmap):
        found = jax.jit(transform(root))(outputs, combined)
        np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("name", NAMED)
def test_many_classes_take_memory_of_the_order_of_the_outputs(name):
    likelihood = NAMED[name]
    outputs = jax.ShapeDtypeStruct((4, 50_000), jnp.float32)
    probes = jax.ShapeDtypeStruct(likelihood.probe_shape(outputs.shape), jnp.float32)
    compiled = jax.jit(likelihood.root).lower(outputs, probes).compile()
    of_the_outputs = 4 * 50_000 * 4
    assert compiled.memory_analysis().temp_size_in_bytes <= 25 * of_the_outputs


# ---- one class


def test_one_class_is_certain():
    outputs = jnp.array([[3.0], [-1e4]])
    np.testing.assert_array_equal(
        CATEGORICAL.log_prob(outputs, np.array([0, 0])), np.zeros(2)
    )
    assert np.isnan(CATEGORICAL.log_prob(outputs, np.array([0, 1]))[1])
    np.testing.assert_array_equal(CATEGORICAL.mean(outputs), np.ones((2, 1)))
    np.testing.assert_array_equal(CATEGORICAL.variance(outputs), np.zeros((2, 1)))
    line = CATEGORICAL.line(outputs)
    np.testing.assert_array_equal(CATEGORICAL.from_line(line), np.ones((2, 1)))
    slope = jax.grad(lambda outputs: jnp.sum(CATEGORICAL.line(outputs)))(outputs)
    np.testing.assert_array_equal(slope, np.zeros((2, 1)))
    sample = CATEGORICAL.sample(jax.random.key(0), outputs)
    np.testing.assert_array_equal(sample, np.zeros(2))
    for likelihood in (CATEGORICAL, CHOLESKY):
        np.testing.assert_array_equal(squares(likelihood, outputs), np.zeros((2, 1, 1)))
    np.testing.assert_array_equal(squares(DIAGONAL, outputs), np.ones((2, 1, 1)))
    with pytest.raises(ValueError, match="k = 1 for C = 1"):
        likelihoods.rank_root(CATEGORICAL, 1).probe_shape((2, 1))
