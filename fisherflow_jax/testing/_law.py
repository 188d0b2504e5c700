"""One law of a structure: what is measured, and how it is judged."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from fisherflow_jax.structures import Structure
from fisherflow_jax.testing._material import Material


class Dense(NamedTuple):
    """The matrices of the material, by `to_dense`, in float64."""

    parts: list[np.ndarray]  # (d, d) each
    whole: np.ndarray  # (d, d)
    vector: np.ndarray  # (d,)


def always(structure: Structure, kind: type) -> str | None:
    """Applies to every structure."""
    return None


class Law(NamedTuple):
    """A law: measured by JAX, judged in numpy."""

    name: str
    rule: str
    measure: Callable[[Structure, Material], Any]
    judge: Callable[[Any, Dense, float], None]
    applies: Callable[[Structure, type], str | None] = always
    """Why it does not apply to this structure and type; None: it does."""
