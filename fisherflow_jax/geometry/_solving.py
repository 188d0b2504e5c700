"""What diffrax solves, imported where it is used."""

from typing import Any

import jax.numpy as jnp


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
        return tolerance
    return max(least, 100 * float(jnp.finfo(dtype).eps))
