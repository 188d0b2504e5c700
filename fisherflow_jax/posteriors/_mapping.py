"""Intervals through an increasing map."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from fisherflow_jax._ground import checks
from fisherflow_jax._ground.telling import told


def mapped(
    transform: Callable[[jax.Array], jax.Array],
    middle: jax.Array,
    lower: jax.Array,
    upper: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Estimates and the ends of intervals, mapped, and the map's slope at the first.

    Where values are at hand, the map is tried on the way from end to end.

    Raises:
      ValueError: for a map that is not elementwise, or does not increase there.
    """
    if not callable(transform):
        raise TypeError(f"transform is a map such as jnp.exp; got {transform!r}.")
    value, slope = jax.jvp(transform, (middle,), (jnp.ones_like(middle),))
    if getattr(value, "shape", None) != middle.shape:
        raise _refused(transform)
    found = value, transform(lower), transform(upper), slope
    if not checks.is_traced((middle, found)):
        _check(transform, middle, lower, upper, slope)
    return found


def _check(
    transform: Callable,
    middle: jax.Array,
    lower: jax.Array,
    upper: jax.Array,
    slope: jax.Array,
) -> None:
    # an elementwise map multiplies each entry of any direction by its own slope
    turn = jnp.arange(1.0, middle.size + 1, dtype=middle.dtype)
    turned = jax.jvp(transform, (middle,), (turn,))[1]
    alone = np.isclose(turned, turn * slope, rtol=1e-3)
    points = [*_steps(lower, middle), *_steps(middle, upper), upper]
    values = np.stack([np.asarray(transform(x), float) for x in points])
    rounding = 8 * float(jnp.finfo(middle.dtype).eps) * np.abs(values[1:])
    rises = np.all(values[:-1] <= values[1:] + rounding, axis=0) & (slope >= 0)
    known = ~np.isnan(middle + lower + upper)
    if np.any(known & ~np.asarray(rises & alone)):
        raise _refused(transform)


def _steps(start: jax.Array, end: jax.Array) -> list[jax.Array]:
    """From the start up to before the end: where a map that turns shows it."""
    points = [start + (end - start) * share for share in np.linspace(0, 1, 9)[1:-1]]
    return [start, *(jnp.where(jnp.isfinite(x), x, start) for x in points)]


def _refused(transform: Callable) -> ValueError:
    return ValueError(
        f"transform={told(transform)} is not an increasing map of each parameter: "
        "an interval's ends would not be those of its values. Take jnp.exp, or give "
        "the map as the function of ff.delta_method."
    )
