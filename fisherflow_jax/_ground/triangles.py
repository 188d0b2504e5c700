"""Symmetric matrices as one triangle, in a rectangle without a number to spare.

Of a matrix `(n, n)` with `h = ceil(n / 2)` the rectangle is `(h, n + 1)` for even n and
`(h, n)` for odd n. On and above its diagonal (for even n, above it) are the first h
rows of the upper triangle, below them the lower triangle of what they leave: slices and
a choice, no gather. It is the transpose of LAPACK's rectangular full packed format.
"""

import jax
import jax.numpy as jnp


def packed(matrices: jax.Array) -> jax.Array:
    """Symmetric `(..., n, n)` as their rectangles."""
    n = matrices.shape[-1]
    half, even = (n + 1) // 2, 1 - n % 2
    lead = [(0, 0)] * (matrices.ndim - 2)
    first = jnp.pad(matrices[..., :half, :], [*lead, (0, 0), (even, 0)])
    rest = matrices[..., half:, half:]
    rest = jnp.pad(rest, [*lead, (1 - even, 0), (0, half + even)])
    return jnp.where(_above(first, even), first, rest)


def unpacked(rectangles: jax.Array) -> jax.Array:
    """The symmetric matrices `(..., n, n)` of their rectangles."""
    half, width = rectangles.shape[-2:]
    even = int(width > 2 * half)
    first = rectangles[..., even:]
    rest = rectangles[..., 1 - even :, : width - even - half]
    corner, side = first[..., :half], first[..., half:]
    corner = jnp.where(_above(corner), corner, jnp.swapaxes(corner, -1, -2))
    rest = jnp.where(_above(rest), jnp.swapaxes(rest, -1, -2), rest)
    upper = jnp.concatenate([corner, side], -1)
    lower = jnp.concatenate([jnp.swapaxes(side, -1, -2), rest], -1)
    return jnp.concatenate([upper, lower], -2)


def _above(matrices: jax.Array, start: int = 0) -> jax.Array:
    """What is on and above the diagonal that begins so many columns to the right."""
    rows, columns = (
        jax.lax.broadcasted_iota(jnp.int32, matrices.shape, matrices.ndim - k)
        for k in (2, 1)
    )
    return columns >= rows + start
