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


columns_of = jax.jit(likelihoods.root_columns, static_argnums=0)


def squares(likelihood, outputs):
    """(n, C, C): L L^T of every example."""
    columns = columns_of(likelihood, outputs)
    if isinstance(columns, jax.core.Tracer):
        return jnp.einsum("rni,rnj->nij", columns, columns)
    columns = np.asarray(columns)
    return np.einsum("rni,rnj->nij", columns, columns)


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
    outputs = logits(10)
    columns = np.asarray(columns_of(CHOLESKY, outputs))
    for i, matrix in enumerate(information(outputs[:2])):
        order = np.argsort(-outputs[i])
        factor = np.linalg.cholesky(matrix[np.ix_(order, order)][:9, :9])
        np.testing.assert_allclose(
            columns[:, i, order[:9]].T, factor, rtol=1e-9, atol=1e-14
        )


def test_columns_do_not_see_a_constant():
    """The information leaves out what adds one number to all logits."""
    columns = np.asarray(columns_of(CHOLESKY, logits(10)))
    np.testing.assert_allclose(columns.sum(-1), 0 * columns[..., 0], atol=1e-15)


def test_roots_follow_a_permutation_of_the_classes():
    outputs = logits(10)
    order = np.random.default_rng(0).permutation(10)
    inverse = np.argsort(order)
    lower = NAMED["iterated"]
    # of tied classes a bound keeps some, of the soft and the peaky row all are distinct
    for likelihood, rows in ((CHOLESKY, 8), (DIAGONAL, 8), (lower, 2)):
        direct = np.asarray(squares(likelihood, outputs[:rows]))
        permuted = squares(likelihood, outputs[:rows, order])
        back = np.asarray(permuted)[:, inverse][:, :, inverse]
        np.testing.assert_allclose(back, direct, rtol=1e-9, atol=1e-15)


def test_targets_of_an_example_have_columns_of_their_own():
    outputs = logits(3).reshape(4, 2, 3)
    assert CHOLESKY.probe_shape(outputs.shape) == (4, 2, 2)
    for likelihood in (CHOLESKY, likelihoods.rank_root(CATEGORICAL, 1)):
        columns = np.asarray(columns_of(likelihood, outputs))
        flat = np.moveaxis(columns, 0, 1).reshape(4, -1, 6)
        together = np.einsum("nri,nrj->nij", flat, flat)
        alone = squares(likelihood, logits(3)).reshape(4, 2, 3, 3)
        np.testing.assert_allclose(together[:, :3, :3], alone[:, 0], atol=1e-15)
        np.testing.assert_allclose(together[:, 3:, 3:], alone[:, 1], atol=1e-15)
        np.testing.assert_array_equal(together[:, :3, 3:], np.zeros((4, 3, 3)))


# ---- bounds


@pytest.mark.parametrize("num_classes", [1, 2, 10])
def test_the_diagonal_bound_exceeds_by_the_square_of_p(num_classes):
    outputs = logits(num_classes)
    p = scipy.special.softmax(outputs, -1)
    gap = squares(DIAGONAL, outputs) - information(outputs)
    np.testing.assert_allclose(gap, p[:, :, None] * p[:, None, :], atol=1e-15)


@functools.cache
def bounds(num_classes, num_iterations):
    """(C - 1, n, C, C): L L^T at every rank."""

    @jax.jit
    def every_rank(outputs):
        return [
            squares(likelihoods.rank_root(CATEGORICAL, k, num_iterations), outputs)
            for k in range(1, num_classes)
        ]

    return np.stack(every_rank(logits(num_classes)))


@pytest.mark.slow_cases
@pytest.mark.parametrize(
    "num_classes, num_iterations", [(2, None), (5, None), (3, 0), (4, 3), (3, 30)]
)
def test_the_rank_bound_is_below_at_every_rank(num_classes, num_iterations):
    found = bounds(num_classes, num_iterations)
    expected = information(logits(num_classes))
    assert smallest_eigenvalues(expected - found).min() >= -1e-15
    assert np.linalg.matrix_rank(found[0], tol=1e-14).max() == 1
    np.testing.assert_allclose(found[-1], expected, rtol=1e-11, atol=1e-15)


def test_the_closed_form_grows_with_its_rank():
    found = bounds(5, None)
    assert smallest_eigenvalues(found[1:] - found[:-1]).min() >= -1e-15


def test_no_iterations_are_the_closed_form():
    np.testing.assert_allclose(bounds(3, 0), bounds(3, None), rtol=1e-12, atol=1e-17)


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


def test_iterations_reach_the_largest_eigenvalues():
    """From below, and more with every one."""
    k = 2
    outputs = np.log(np.array([[0.4, 0.25, 0.15, 0.1, 0.04, 0.03, 0.03]]))
    expected = information(outputs)[0]
    values, vectors = np.linalg.eigh(expected)
    kept = vectors[:, -k:] * np.sqrt(values[-k:])
    closed, few, found = (
        squares(likelihoods.rank_root(CATEGORICAL, k, num_iterations), outputs)[0]
        for num_iterations in (None, 1, 30)
    )
    np.testing.assert_allclose(found, kept @ kept.T, atol=1e-6)
    assert np.trace(closed) < np.trace(few) < np.trace(found) <= values[-k:].sum()


# ---- numbers

NAMED = {
    "cholesky": CHOLESKY,
    "diagonal": DIAGONAL,
    "iterated": likelihoods.rank_root(CATEGORICAL, 2, 3),
}
WITH_RANK = NAMED | {"rank": likelihoods.rank_root(CATEGORICAL, 2)}
# One class ahead, by ever more, of others that are unequal; the last rows: one class
# possible, all the same.
GAPS = np.array([0.0, 5.0, 12.0, 20.0, 40.0, 80.0, 87.0, 95.0, 110.0, 200.0, 1e4])
OTHERS = np.broadcast_to(-(2.0 ** np.arange(1, -4, -1)), (len(GAPS), 5))
EXTREME = np.concatenate(
    [
        np.concatenate([OTHERS[:, :2], GAPS[:, None], OTHERS[:, 2:]], 1),
        np.where(np.arange(6) == 3, 0.0, -np.inf)[None],
        np.zeros((1, 6)),
    ]
)


@pytest.mark.slow_cases
@pytest.mark.parametrize("name", WITH_RANK)
def test_float32_is_finite_and_keeps_its_digits_near_certainty(name):
    """1 - p would be 0 there. Against float64, in units of the diagonal."""
    narrow = np.asarray(EXTREME, np.float32)
    columns = columns_of(WITH_RANK[name], narrow)
    assert columns.dtype == jnp.float32 and np.all(np.isfinite(columns))
    columns = np.asarray(columns).astype(float)
    found = np.einsum("rni,rnj->nij", columns, columns)
    expected = np.asarray(squares(WITH_RANK[name], narrow.astype(float)))
    scale = np.sqrt(np.einsum("nii,njj->nij", expected, expected))
    error = np.abs(found - expected)
    assert np.max(error[:5] / scale[:5]) <= 5e-6
    assert np.max(error) <= 3e-7


@pytest.mark.slow_cases
@pytest.mark.parametrize("name", NAMED)
def test_derivatives_stay_finite_at_saturation(name):
    likelihood = NAMED[name]
    outputs = np.asarray(EXTREME, np.float32)
    rng = np.random.default_rng(0)
    probes = rng.normal(size=likelihood.probe_shape(outputs.shape))
    weights = jnp.asarray(rng.normal(size=outputs.shape), jnp.float32)

    @jax.jit
    @jax.grad
    def slopes(outputs):
        return jnp.sum(weights * likelihood.root(outputs, probes))

    assert np.all(np.isfinite(slopes(outputs)))


@pytest.mark.slow_cases
@pytest.mark.parametrize("name", NAMED)
def test_half_precision_is_computed_in_float32(name):
    likelihood = NAMED[name]
    probes = np.random.default_rng(0).normal(size=likelihood.probe_shape(EXTREME.shape))

    root = jax.jit(likelihood.root)
    for dtype in (jnp.bfloat16, jnp.float16):
        outputs = EXTREME.astype(dtype)
        wide = np.asarray(root(outputs.astype(np.float32), probes))
        found = root(outputs, probes)
        assert found.dtype == dtype and np.all(np.isfinite(wide))
        np.testing.assert_array_equal(found, wide.astype(dtype))


def test_the_derivative_is_that_of_the_information():
    outputs = EXTREME[:4]
    tangent = np.random.default_rng(1).normal(size=outputs.shape)

    @jax.jit
    def slope(outputs, tangent):
        function = functools.partial(squares, CHOLESKY)
        return jax.jvp(function, (outputs,), (tangent,))[1]

    p = scipy.special.softmax(outputs, -1)
    rate = p * (tangent - np.sum(p * tangent, -1, keepdims=True))
    outer = p[:, :, None] * rate[:, None, :]
    expected = rate[:, :, None] * np.eye(6)[None] - outer - np.swapaxes(outer, 1, 2)
    np.testing.assert_allclose(slope(outputs, tangent), expected, atol=1e-13)


@pytest.mark.parametrize("name", NAMED)
def test_a_logit_that_is_not_a_number_is_not_hidden(name):
    outputs = EXTREME.copy()
    outputs[0, 1] = np.nan
    columns = np.asarray(columns_of(NAMED[name], outputs))
    assert np.all(np.isnan(columns[:, 0]).any(-1))
    assert np.all(np.isfinite(columns[:, 1:]))


@pytest.mark.parametrize("name", NAMED)
def test_roots_are_linear_and_the_same_under_vmap(name):
    root = NAMED[name].root
    outputs = EXTREME
    shape = NAMED[name].probe_shape(outputs.shape)
    probes = np.random.default_rng(1).normal(size=shape)
    columns = columns_of(NAMED[name], outputs)
    found = jax.jit(jax.vmap(root))(outputs, probes)
    expected = np.einsum("rnc,nr->nc", columns, probes)
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("name", WITH_RANK)
def test_many_classes_take_memory_of_the_order_of_the_outputs(name):
    likelihood = WITH_RANK[name]
    outputs = jax.ShapeDtypeStruct((4, 50_000), jnp.float32)
    probes = jax.ShapeDtypeStruct(likelihood.probe_shape(outputs.shape), jnp.float32)
    compiled = jax.jit(likelihood.root).lower(outputs, probes).compile()
    of_the_outputs = 4 * 50_000 * 4
    assert compiled.memory_analysis().temp_size_in_bytes <= 25 * of_the_outputs


# ---- one class


def test_one_class_is_certain():
    outputs = np.array([[3.0], [-1e4]])

    @jax.jit
    def of_one_class(outputs):
        line = CATEGORICAL.line(outputs)
        return {
            "certain": CATEGORICAL.log_prob(outputs, np.array([0, 0])),
            "impossible": CATEGORICAL.log_prob(outputs, np.array([0, 1])),
            "mean": CATEGORICAL.mean(outputs),
            "variance": CATEGORICAL.variance(outputs),
            "share": CATEGORICAL.scale.inverse(line),
            "slope": jax.grad(lambda z: jnp.sum(CATEGORICAL.line(z)))(outputs),
            "sample": CATEGORICAL.sample(jax.random.key(0), outputs),
        }

    found = of_one_class(outputs)
    np.testing.assert_array_equal(found["certain"], np.zeros(2))
    assert np.isnan(found["impossible"][1])
    for name, value in {
        "mean": 1.0,
        "variance": 0.0,
        "share": 1.0,
        "slope": 0.0,
    }.items():
        np.testing.assert_array_equal(found[name], np.full((2, 1), value))
    np.testing.assert_array_equal(found["sample"], np.zeros(2))
    for likelihood in (CATEGORICAL, CHOLESKY):
        np.testing.assert_array_equal(squares(likelihood, outputs), np.zeros((2, 1, 1)))
    np.testing.assert_array_equal(squares(DIAGONAL, outputs), np.ones((2, 1, 1)))
    with pytest.raises(ValueError, match="k = 1 for C = 1"):
        likelihoods.rank_root(CATEGORICAL, 1).probe_shape((2, 1))
