"""Quantiles of the normal and of Student's t against scipy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from fisherflow_jax.posteriors import check_level, two_sided

LEVELS = [0.5, 0.8, 0.9, 0.95, 0.99, 0.999]
# whole and fractional, on both sides of where the expansion takes over (200)
DEGREES = [0.3, 1.0, 1.5, 2.0, 3.0, 4.7, 10.0, 30.25, 99.5, 199.9, 200.0, 200.1, 1e3]
DEGREES = np.array([*DEGREES, 12345.6, 1e5, 1e7])


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype, rtol", [("float64", 1e-12), ("float32", 3e-7)])
def test_normal(level, dtype, rtol):
    result = two_sided(level, None, jnp.dtype(dtype))
    assert result.dtype == dtype
    assert result.shape == ()
    np.testing.assert_allclose(result, stats.norm.ppf((1 + level) / 2), rtol=rtol)


@pytest.fixture(scope="module")
def vectorised():
    return jax.jit(jax.vmap(two_sided, in_axes=(None, 0, None)), static_argnums=2)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(
    "dtype, rtol", [(np.dtype("float64"), 2e-10), (np.dtype("float32"), 2e-4)], ids=str
)
def test_student_t_under_jit_and_vmap(vectorised, level, dtype, rtol):
    result = vectorised(level, jnp.asarray(DEGREES, dtype), dtype)
    assert result.dtype == dtype
    expected = stats.t.ppf((1 + level) / 2, np.asarray(DEGREES, dtype).astype(float))
    np.testing.assert_allclose(result, expected, rtol=rtol)


def test_far_tails_of_few_degrees_of_freedom(vectorised):
    result = vectorised(1 - 1e-6, DEGREES, np.dtype("float64"))
    expected = stats.t.ppf(1 - 5e-7, DEGREES)
    np.testing.assert_allclose(result, expected, rtol=1e-8)


def test_the_expansion_joins_on(vectorised):
    degrees = np.full(DEGREES.shape, 200.0)
    degrees[1] += 1e-9
    below, above = vectorised(0.95, degrees, np.dtype("float64"))[:2]
    assert abs(below - above) < 1e-11
    assert below != above  # two computations


def test_one_number_eager():
    result = two_sided(0.9, jnp.asarray(4.7), jnp.float64)
    assert result.shape == ()
    np.testing.assert_allclose(result, stats.t.ppf(0.95, 4.7), rtol=1e-10)


def test_next_to_no_degrees_of_freedom_leave_it_infinite():
    for dtype in ("float64", "float32"):
        assert two_sided(0.95, jnp.asarray(1e-3, dtype), jnp.dtype(dtype)) == jnp.inf


@pytest.mark.parametrize("dtype", [np.dtype("float64"), np.dtype("float32")], ids=str)
def test_nan_without_degrees_of_freedom(vectorised, dtype):
    degrees = np.full(DEGREES.shape, 5.0)
    degrees[:4] = [0.0, -1.0, -300.0, np.nan]
    result = vectorised(0.95, jnp.asarray(degrees, dtype), dtype)
    assert np.all(np.isnan(result[:4])) and np.all(np.isfinite(result[4:]))


@pytest.mark.parametrize("level", [0, 1, -0.1, 1.5, 95, float("nan"), float("inf")])
def test_level_outside(level):
    with pytest.raises(ValueError, match=rf"level must be in \(0, 1\); got {level}"):
        check_level(level)
    with pytest.raises(ValueError, match="level"):
        two_sided(level, None, jnp.float64)
