"""Quantiles of the normal and of Student's t, also under jit."""

import jax
import jax.numpy as jnp
from jax.scipy.special import betainc, ndtri
from jax.scipy.stats import t as student_t

from fisherflow_jax._ground.checks import fraction

# Beyond this many degrees of freedom the expansion below is exact to float64's rounding
# of the quantities it is used for, and betainc loses float32 digits.
_MANY = 200.0


def check_level(level: float) -> None:
    fraction(level, "level")


def two_sided(level: float, degrees_of_freedom: jax.Array | None, dtype) -> jax.Array:
    """The q with `P(|T| < q) = level`; normal if the degrees of freedom are None.

    Student's t by Newton's method on its distribution function, which is concave above
    zero and so approaches the quantile from the normal one without overshooting; by the
    Cornish-Fisher expansion for many degrees of freedom. NaN without any.
    """
    check_level(level)
    tail = jnp.asarray((1 - level) / 2, dtype)
    normal = -ndtri(tail)
    if degrees_of_freedom is None:
        return normal
    nu = degrees_of_freedom.astype(dtype)
    few = jnp.clip(jnp.where(nu > 0, nu, 1.0), None, _MANY)

    exact = _newton(normal, few, tail)
    # beyond the largest number, for a small fraction of a degree of freedom
    exact = jnp.where(jnp.isfinite(exact), exact, jnp.inf)
    quantile = jnp.where(nu <= _MANY, exact, _expansion(normal, nu))
    return jnp.where(nu > 0, quantile, jnp.nan)


@jax.jit
def _newton(start: jax.Array, nu: jax.Array, tail: jax.Array) -> jax.Array:
    def step(_, x: jax.Array) -> jax.Array:
        half = jnp.asarray(0.5, x.dtype)
        above = half * betainc(nu / 2, half, nu / (nu + x * x))
        return x + (above - tail) / student_t.pdf(x, nu)

    shape = jnp.broadcast_shapes(start.shape, nu.shape, tail.shape)
    return jax.lax.fori_loop(0, 60, step, jnp.broadcast_to(start, shape))


def _expansion(z: jax.Array, nu: jax.Array) -> jax.Array:
    """Fisher and Cornish, "The percentile points of distributions...", 1960."""
    y = jnp.maximum(nu, 1.0)
    z2 = z * z
    first = (z2 + 1) * z / 4
    second = ((5 * z2 + 16) * z2 + 3) * z / 96
    third = (((3 * z2 + 19) * z2 + 17) * z2 - 15) * z / 384
    fourth = ((((79 * z2 + 776) * z2 + 1482) * z2 - 1920) * z2 - 945) * z / 92160
    return z + (first + (second + (third + fourth / y) / y) / y) / y
