"""Searches: where a function of a few numbers is smallest, largest, or zero."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fisherflow_jax._ground import linalg

Function = Callable[[jax.Array], jax.Array]

_MAX_STEPS = 100
# A step of `maximise` changes no logarithm by more than 2, and none leaves +-30.
_LONGEST_STEP = 2.0
_FARTHEST = 30.0


class Minimum(NamedTuple):
    """Where a function is smallest, and what it is there and elsewhere; each `()`."""

    point: jax.Array
    value: jax.Array
    at_low: jax.Array
    at_high: jax.Array
    elsewhere: jax.Array  # (k,), at the points asked for


def minimise(
    objective: Function,
    low: jax.Array,
    high: jax.Array,
    elsewhere: jax.Array,
    *,
    num_points: int = 81,
    num_halvings: int | None = None,
) -> Minimum:
    """The best point of a grid, moved by half a step to the better side, and so on.

    The grid finds the valley where there are several, or a plateau; values that are NaN
    lose against all others. Never worse than the grid and its two ends. The objective
    is also evaluated at `elsewhere` `(k,)`, which costs no further copy of it in the
    compiled program: there is one, however many evaluations. Halves (None) to the
    precision in which values tell points apart: half of the digits.
    """
    dtype = low.dtype
    if num_halvings is None:
        num_halvings = jnp.finfo(dtype).nmant // 2 + 1

    grid = low + (high - low) * jnp.linspace(0, 1, num_points, dtype=dtype)
    points = jnp.concatenate([grid, elsewhere.astype(dtype)])
    # two at a time, like the sides of a point; what follows the pairs are halvings
    pairs = jnp.pad(points, (0, points.size % 2), mode="edge").reshape((-1, 2))
    chosen = jnp.arange(pairs.size, dtype=jnp.int32).reshape((-1, 2)) < num_points
    given = jnp.arange(len(pairs) + num_halvings, dtype=jnp.int32) < len(pairs)
    rest = ((0, num_halvings), (0, 0))
    rounds = given, jnp.pad(pairs, rest), jnp.pad(chosen, rest, constant_values=True)

    def better(carry: tuple, this: tuple) -> tuple[tuple, jax.Array]:
        (point, value, step), (given, pair, counts) = carry, this
        step = jnp.where(given, step, step / 2)
        sides = jnp.clip(jnp.stack([point - step, point + step]), low, high)
        sides = jnp.where(given, pair, sides)
        values = jax.lax.map(objective, sides)
        values = jnp.where(jnp.isnan(values), jnp.inf, values)
        candidates = jnp.where(counts, values, jnp.inf)
        best = jnp.argmin(candidates)
        # where all are equal, as on a plateau, it stays
        moves = candidates[best] < value
        point = jnp.where(moves, sides[best], point)
        return (point, jnp.minimum(value, candidates[best]), step), values

    dtype_of_values = jax.eval_shape(objective, low).dtype
    nothing = jnp.full((), jnp.inf, dtype_of_values)
    step = (high - low) / jnp.asarray(num_points - 1, dtype)
    (point, value, _), values = jax.lax.scan(better, (low, nothing, step), rounds)
    values = values.ravel()[: points.size]
    return Minimum(point, value, values[0], values[num_points - 1], values[num_points:])


def bisect(
    function: Function, low: jax.Array, high: jax.Array, *, num_halvings: int = 30
) -> jax.Array:
    """Where an elementwise function falls through zero between two points."""

    def halve(_: int, ends: tuple) -> tuple:
        low, high = ends
        middle = (low + high) / 2
        above = function(middle) > 0
        return jnp.where(above, middle, low), jnp.where(above, high, middle)

    low, high = jax.lax.fori_loop(0, num_halvings, halve, (low, high))
    return (low + high) / 2


def rising_zero(
    function: Function, low: jax.Array, high: jax.Array, start: jax.Array
) -> jax.Array:
    """Where a function `() -> ()` rises through zero between two points, `()`.

    By Newton's method, and by halves where that leaves the bracket.
    """
    slope_of = jax.value_and_grad(function)
    # Newton's last step squares what is left to go
    tolerance = float(jnp.finfo(low.dtype).eps) ** 0.5

    def narrow(carry: tuple) -> tuple:
        low, high, point, _, step = carry
        value, slope = slope_of(point)
        low = jnp.where(value < 0, point, low)
        high = jnp.where(value < 0, high, point)
        newton = point - value / slope
        inside = (newton > low) & (newton < high)
        following = jnp.where(inside, newton, (low + high) / 2)
        return low, high, following, jnp.abs(following - point), step + 1

    carry = (low, high, start, high - low, jnp.zeros((), jnp.int32))
    return jax.lax.while_loop(
        lambda carry: (carry[4] < _MAX_STEPS) & (carry[3] > tolerance), narrow, carry
    )[2]


class Crossing(NamedTuple):
    """Where a function rises through zero, going outwards; each `()`."""

    point: jax.Array  # infinite, with the sign of the direction: it does not
    last: jax.Array  # the last value seen


def crossing(
    evaluate: Callable[[jax.Array], tuple[jax.Array, jax.Array]],
    inside: jax.Array,
    center: jax.Array,
    reach: jax.Array,
    *,
    growth: float = 4.0,
    num_reaches: int = 6,
) -> Crossing:
    """Where `x -> (value, slope)` rises through zero beyond a point where it is below.

    Outwards from the center by a signed reach that grows, so many times at most, until
    the value is above zero; then by Newton's method, and by halves where that leaves
    the bracket. The slope need only be about right.
    """
    tolerance = float(jnp.finfo(reach.dtype).eps) ** 0.5 * jnp.abs(reach)
    nowhere = jnp.where(reach > 0, jnp.inf, -jnp.inf).astype(reach.dtype)

    def narrow(carry: tuple) -> tuple:
        low, high, point, _, step, reach, _ = carry
        value, slope = evaluate(point)
        low = jnp.where(value > 0, low, point)
        high = jnp.where(value > 0, point, high)
        found, newton = jnp.isfinite(high), point - value / slope
        between = (newton - low) * (newton - high) < 0
        within = jnp.where(between, newton, (low + high) / 2)
        following = jnp.where(found, within, center + growth * reach)
        reach = jnp.where(found, reach, growth * reach)
        moved = jnp.abs(following - point)
        return low, high, following, moved, step + 1, reach, value

    def goes_on(carry: tuple) -> jax.Array:
        _, high, _, moved, step, _, _ = carry
        most = jnp.where(jnp.isfinite(high), _MAX_STEPS, num_reaches)
        return (step < most) & (moved > tolerance)

    begun = inside, nowhere, center + reach, jnp.abs(reach) + 2 * tolerance
    zero = jnp.zeros_like(reach)
    carry = (*begun, jnp.zeros((), jnp.int32), reach, zero)
    _, high, point, _, _, _, value = jax.lax.while_loop(goes_on, narrow, carry)
    return Crossing(jnp.where(jnp.isfinite(high), point, nowhere), value)


def maximise(
    function: Function, start: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Where a function of a few logarithms `(k,)` is largest, its value, and whether.

    By Newton's method with halved steps; curvature of the wrong sign is turned.
    """
    eps = float(jnp.finfo(start.dtype).eps)
    slope, curvature = jax.grad(function), jax.hessian(function)

    def direction(point: jax.Array) -> tuple[jax.Array, jax.Array]:
        gradient = slope(point)
        values, basis = linalg.eigh(curvature(point))
        sizes = jnp.maximum(jnp.abs(values), math.sqrt(eps))
        step = basis @ ((basis.T @ gradient) / sizes)
        longest = jnp.maximum(jnp.max(jnp.abs(step)) / _LONGEST_STEP, 1.0)
        return step / longest, jnp.sum(step * gradient)

    def halve(carry: tuple) -> tuple:
        point, step, _, number = carry
        step = step / 2
        return point, step, function(bounded(point + step)), number + 1

    def bounded(point: jax.Array) -> jax.Array:
        return jnp.clip(point, -_FARTHEST, _FARTHEST)

    def advance(carry: tuple) -> tuple:
        point, value, _, number = carry
        step, gain = direction(point)
        tried = function(bounded(point + step))

        first = (point, step, tried, jnp.zeros((), jnp.int32))
        _, step, tried, _ = jax.lax.while_loop(
            lambda inner: ~(inner[2] >= value) & (inner[3] < 30), halve, first
        )
        better = tried >= value
        moved = jnp.where(better, bounded(point + step), point)
        # the gain that a quadratic promises, against what rounding can show
        done = (gain <= 4 * eps * (1 + jnp.abs(value))) | ~better
        return moved, jnp.where(better, tried, value), done, number + 1

    first = (start, function(start), jnp.zeros((), bool), jnp.zeros((), jnp.int32))
    point, value, done, _ = jax.lax.while_loop(
        lambda carry: ~carry[2] & (carry[3] < _MAX_STEPS), advance, first
    )
    return point, value, done
