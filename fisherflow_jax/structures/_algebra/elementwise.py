"""Informations that are numbers by which entries are multiplied."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fisherflow_jax import information as ops
from fisherflow_jax.structures._algebra import linear

PyTree = Any


def register(
    kind: type,
    add_other: Callable[[Any, Any], Any],
    numbers_of: Callable[[Any, Any, str], PyTree],
    basis: Any,
) -> None:
    """Gives a type with one field, the numbers, all operations of `ff.information`.

    `numbers_of(information, operator, name)` are those of a noise or a transition.
    """

    def mapped(function: Callable, information: Any, *rest: PyTree) -> Any:
        return kind(jax.tree.map(function, information[0], *rest))

    def propagate(information: Any, noise: Any, transition: Any | None = None) -> Any:
        variances = numbers_of(information, noise, "process_noise")
        if transition is None:
            return mapped(lambda a, q: a / (1 + q * a), information, variances)
        # a zero transition forgets everything: the predicted variance is the noise
        return mapped(
            lambda a, q, f: a / (jnp.square(f) + q * a),
            information,
            variances,
            numbers_of(information, transition, "transition"),
        )

    linear.register(kind, add_other)
    ops.facts.register(kind, lambda information: ops.Facts(elementwise=True))
    ops.spectral.register(kind, lambda i, like=None: ops.Spectral(i[0], basis))
    ops.inverse.register(kind, lambda i: mapped(lambda a: 1 / a, i))
    ops.sandwich.register(
        kind, lambda i, meat: mapped(lambda a, m: m / jnp.square(a), i, meat[0])
    )
    ops.propagate.register(kind, propagate)
