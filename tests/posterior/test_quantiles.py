"""Quantiles of the normal and of Student's t against scipy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from fisherflow_jax.posterior.quantiles import check_level, two_sided

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
    return jax.jit(jax.vmap(two_sided, in_axes=(None, 0, None)), static_argnums=(0, 2))


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
    degrees = np.array([0.5, 1.0, 2.0, 5.0])
    result = vectorised(1 - 1e-6, degrees, np.dtype("float64"))
    np.testing.assert_allclose(result, stats.t.ppf(1 - 5e-7, degrees), rtol=1e-8)


def test_the_expansion_joins_on():
    below, above = (
        two_sided(0.95, jnp.asarray(df), jnp.float64) for df in (200.0, 200.0 + 1e-9)
    )
    assert abs(below - above) < 1e-11
    assert below != above  # two computations


def test_one_number_eager_equals_many_compiled(vectorised):
    eager = [two_sided(0.9, jnp.asarray(df), jnp.float64) for df in DEGREES[3:5]]
    compiled = vectorised(0.9, DEGREES, np.dtype("float64"))[3:5]
    np.testing.assert_allclose(eager, compiled, rtol=1e-14)


def test_traced_level():
    quantile = jax.jit(lambda level, df: two_sided(level, df, jnp.float64))
    assert abs(quantile(0.95, 7.0) - stats.t.ppf(0.975, 7)) < 1e-10


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_nan_without_degrees_of_freedom(vectorised, dtype):
    degrees = jnp.array([0.0, -1.0, -300.0, jnp.nan, 5.0], dtype)
    result = vectorised(0.95, degrees, np.dtype(dtype))
    np.testing.assert_array_equal(np.isnan(result), [True, True, True, True, False])


@pytest.mark.parametrize("level", [0, 1, -0.1, 1.5, 95, float("nan"), float("inf")])
def test_level_outside(level):
    with pytest.raises(ValueError, match=rf"level must be in \(0, 1\); got {level}"):
        check_level(level)
    with pytest.raises(ValueError, match="level"):
        two_sided(level, None, jnp.float64)
