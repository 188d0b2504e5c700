r"""Fisher-Rao distances in closed form: of two outputs, of one observation.

In forms that keep their digits where the two are near: arcsinh of a difference, and
never arccosh of one plus its square. Outputs are wide, and of one shape.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from fisherflow_jax._ground.arrays import safe_sqrt

Distance = Callable[[jax.Array, jax.Array], jax.Array]


def flat(root: jax.Array, outputs: jax.Array, other: jax.Array) -> jax.Array:
    """Of a family whose output information is constant: `root` is its square root."""
    return root * jnp.abs(outputs - other)


def location_scale(a: float, b: float, shear: float = 0.0) -> Distance:
    r"""Of outputs (location m, log scale) on the last axis, a hyperbolic plane.

    .. math:: g = \frac{a (dm - c\, ds)^2 + b\, ds^2}{s^2}

    with c the `shear`: (1, 2) the normal, (1, 1) the Laplace distribution.
    """

    def distance(outputs: jax.Array, other: jax.Array) -> jax.Array:
        location, log_scale = outputs[..., 0], outputs[..., 1]
        moved, turned = other[..., 0] - location, other[..., 1] - log_scale
        middle = (log_scale + other[..., 1]) / 2
        half = jnp.sinh(turned / 2)  # (s' - s) / (2 sqrt(s s'))
        across = moved * jnp.exp(-middle) / 2 - shear * half
        square = (a / b) * jnp.square(across) + jnp.square(half)
        return 2 * math.sqrt(b) * jnp.arcsinh(safe_sqrt(square))

    return distance


def categorical(outputs: jax.Array, other: jax.Array) -> jax.Array:
    """Of logits on the last axis: on a sphere of radius 2."""
    log_p, log_q = jax.nn.log_softmax(outputs), jax.nn.log_softmax(other)
    root = jnp.exp(jnp.maximum(log_p, log_q) / 2)
    chord = root * jnp.expm1(-jnp.abs(log_p - log_q) / 2)
    return 4 * jnp.arcsin(safe_sqrt(jnp.sum(jnp.square(chord), -1)) / 2)


def bernoulli(outputs: jax.Array, other: jax.Array) -> jax.Array:
    r"""`2 |arcsin sqrt p - arcsin sqrt q|` of logits.

    That is :math:`2 \arctan(\sinh(|z - z'| / 4) / \cosh((z + z') / 4))`.
    """
    apart, together = jnp.abs(outputs - other) / 4, jnp.abs(outputs + other) / 4
    ratio = apart - together
    up = -jnp.expm1(-2 * apart) * jnp.exp(jnp.minimum(ratio, 0))
    down = (1 + jnp.exp(-2 * together)) * jnp.exp(-jnp.maximum(ratio, 0))
    return 2 * jnp.arctan2(up, down)


def poisson(outputs: jax.Array, other: jax.Array) -> jax.Array:
    """`2 |sqrt l - sqrt l'|` of log rates."""
    largest, gap = jnp.maximum(outputs, other), jnp.abs(outputs - other)
    return -2 * jnp.exp(largest / 2) * jnp.expm1(-gap / 2)


def negative_binomial(
    concentration: jax.Array, outputs: jax.Array, other: jax.Array
) -> jax.Array:
    """`2 sqrt r |arcsinh sqrt(m / r) - arcsinh sqrt(m' / r)|` of log means."""
    largest, gap = jnp.maximum(outputs, other), jnp.abs(outputs - other)
    far = jnp.sqrt(jnp.exp(largest) / concentration)
    share = jnp.exp(-gap / 2)
    near = far * share
    down = jnp.hypot(jnp.ones_like(near), near) + share * jnp.hypot(
        jnp.ones_like(far), far
    )
    return 2 * jnp.sqrt(concentration) * jnp.arcsinh(-far * jnp.expm1(-gap) / down)
