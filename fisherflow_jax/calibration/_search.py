"""The smallest value of a function of one number, wherever it lies in a range."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Minimum(NamedTuple):
    """Where a function is smallest, and what it is there and elsewhere; each `()`."""

    point: jax.Array
    value: jax.Array
    at_low: jax.Array
    at_high: jax.Array
    elsewhere: jax.Array  # (k,), at the points asked for


def minimise(
    objective: Callable[[jax.Array], jax.Array],
    low: jax.Array,
    high: jax.Array,
    elsewhere: jax.Array,
    *,
    num_points: int = 81,
    num_halvings: int = 27,
) -> Minimum:
    """The best point of a grid, moved by half a step to the better side, and so on.

    The grid finds the valley where there are several, or a plateau; values that are NaN
    lose against all others. Never worse than the grid and its two ends. The objective
    is also evaluated at `elsewhere` `(k,)`, which costs no further copy of it in the
    compiled program: there are two, however many evaluations.
    """
    dtype = low.dtype

    def evaluate(points: jax.Array) -> jax.Array:
        values = jax.lax.map(objective, points)
        return jnp.where(jnp.isnan(values), jnp.inf, values)

    places = jnp.linspace(0, 1, num_points, dtype=dtype)
    grid = low + (high - low) * places
    values = evaluate(jnp.concatenate([grid, elsewhere.astype(dtype)]))
    on_grid = values[:num_points]
    best = jnp.argmin(on_grid)
    step = (high - low) / jnp.asarray(num_points - 1, dtype)

    def halve(carry: tuple, _: None) -> tuple[tuple, None]:
        point, value, step = carry
        step = step / 2
        sides = jnp.clip(jnp.stack([point - step, point + step]), low, high)
        points = jnp.append(sides, point)
        values = jnp.append(evaluate(sides), value)
        chosen = jnp.argmin(values)
        # where all are equal, as on a plateau, it stays
        stays = values[chosen] >= value
        point = jnp.where(stays, point, points[chosen])
        return (point, jnp.minimum(value, values[chosen]), step), None

    start = (grid[best], on_grid[best], step)
    (point, value, _), _ = jax.lax.scan(halve, start, length=num_halvings)
    return Minimum(point, value, on_grid[0], on_grid[-1], values[num_points:])
