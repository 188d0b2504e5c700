"""What diffrax solves, imported where it is used."""

from typing import Any

import jax
import jax.numpy as jnp

from fisherflow_jax._ground import checks


def library(what: str) -> Any:
    """The module diffrax.

    Raises:
      ImportError: where it is not installed, with what needs it and the command.
    """
    try:
        import diffrax
    except ImportError as error:
        raise ImportError(
            f"ff.geometry.{what} solves differential equations with diffrax, which is "
            "not installed: pip install 'fisherflow-jax[geometry]'."
        ) from error
    return diffrax


def tolerance_of(tolerance: float | None, dtype: Any, least: float = 1e-8) -> float:
    """The relative tolerance of a solution; None: what the type allows."""
    if tolerance is not None:
        checks.positive(tolerance, "a relative tolerance")
        return tolerance
    return max(least, 100 * float(jnp.finfo(dtype).eps))


def times_of(times: Any, dtype: Any) -> jax.Array:
    """Times to be solved for, as an array `(k,)`.

    Raises:
      ValueError: for none, and where they fall or are negative.
    """
    times = jnp.asarray(times, dtype)
    if times.ndim != 1 or not len(times) or not checks.holds(_rise(times)):
        raise ValueError(
            f"times are an array (k,), increasing, from 0 or later; got {times}."
        )
    return times


def _rise(times: jax.Array) -> jax.Array:
    return (times[0] >= 0) & jnp.all(jnp.diff(times) >= 0) & (times[-1] < jnp.inf)
