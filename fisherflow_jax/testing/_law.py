"""One law of a structure: what is measured, and how it is judged."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fisherflow_jax import information as ops
from fisherflow_jax.testing._laws import equal
from fisherflow_jax.testing._material import Material, flat


class Dense(NamedTuple):
    """The matrices of the material, by `to_dense`, in float64."""

    parts: list[np.ndarray]  # (d, d) each
    whole: np.ndarray  # (d, d)
    vector: np.ndarray  # (d,)


class Law(NamedTuple):
    """A law: measured by JAX, judged in numpy."""

    name: str
    rule: str
    measure: Callable[[Material], Any]
    judge: Callable[[Any, Dense, float], None]
    applies: Callable[[Material], str | None] = lambda material: None
    """Why it does not apply to this material's structure; None: it does."""


def law(
    form: Callable[[Any, Material, str], Any],
    name: str,
    rule: str,
    operation: Callable[[Material], Any],
    expected: Callable[[Dense], Any] | None = None,
    applies: Callable[[Material], str | None] = lambda material: None,
) -> Law:
    """A law whose operation has, in some form, the value that is expected.

    A list of results has it in each; without an expected value all are equal.
    """

    def measure(material: Material) -> list:
        results = operation(material)
        results = results if isinstance(results, list) else [results]
        return [form(result, material, name) for result in results]

    def judge(found: list, dense: Dense, tolerance: float) -> None:
        value = found[0] if expected is None else expected(dense)
        for result in found:
            equal(result, value, tolerance, name)

    return Law(name, rule, measure, judge, applies)


def vector(result: Any, material: Material, name: str) -> jax.Array:
    return flat(result, material.params, f"what {name} returns")


def number(result: Any, material: Material, name: str) -> jax.Array:
    assert jnp.shape(result) == (), f"{name} is a number; got {jnp.shape(result)}"
    return result


def matrix(result: Any, material: Material, name: str) -> jax.Array:
    return ops.to_dense(result, material.params)
