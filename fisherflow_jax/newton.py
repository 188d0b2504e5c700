"""The implicit update: damped Newton steps on a batch and a Gaussian before it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fisherflow_jax import information as ops
from fisherflow_jax import vectors

PyTree = Any

# A step whose squared length in posterior standard deviations is below this is the
# last: Newton's next one would be of the order of its square.
_TOLERANCE = 1e-8
# Under a vague prior a direction may be longer than the model bears by a factor of
# thousands (a count of five where the rate was tiny); where no step is short enough the
# batch's score is lost.
_SMALLEST_STEP = 2.0**-20
# The share of the decrease promised by its slope that a step must bring. Any decrease
# would not do: from far below the mean of a gamma model, Fisher scoring leaps onto the
# plateau above it, a little lower than where it was, and needs dozens of steps back.
_SUFFICIENT_DECREASE = 0.1


class Solution(NamedTuple):
    """Where the steps ended."""

    mean: PyTree
    step_size: jax.Array  # () of the last step; 0: no step decreased the objective
    decrement: jax.Array  # () squared length of its direction, in posterior sd
    information: Any  # of the batch at the start; None after several steps


def add_scaled(x: PyTree, step_size: jax.Array, direction: PyTree) -> PyTree:
    return jax.tree.map(lambda a, b: a + step_size.astype(a.dtype) * b, x, direction)


def single_step(
    log_likelihood: Callable[[PyTree], jax.Array],
    curvature: Callable[[PyTree], Any],
    center: PyTree,
    information: Any,
    start: PyTree,
) -> Solution:
    """One full step, the batch's information at the start: an extended Kalman filter.

    The step minimises the quadratic model of `-log_likelihood` at `start` plus
    `|x - center|^2 / 2` in the metric of `information`.
    """
    score = jax.grad(log_likelihood)(start)
    batch_information = curvature(start)
    pull = ops.matvec(information, optax.tree.sub(start, center))
    total = ops.add(batch_information, information)
    gradient = optax.tree.sub(score, pull)
    direction = ops.solve(total, gradient)
    mean = optax.tree.add(start, direction)
    decrement = vectors.dot(gradient, direction)
    return Solution(mean, jnp.ones_like(decrement), decrement, batch_information)


class _Search(NamedTuple):
    mean: PyTree
    objective: jax.Array
    step_size: jax.Array
    decrement: jax.Array
    steps: jax.Array


def damped_newton(
    log_likelihood: Callable[[PyTree], jax.Array],
    curvature: Callable[[PyTree], Any],
    center: PyTree,
    information: Any,
    start: PyTree,
    num_steps: int,
) -> Solution:
    """Minimises `-log_likelihood(x) + |x - center|^2 / 2`, the norm by `information`.

    Each direction is `(I + F(x))^-1` times the exact gradient, with F in its own
    structure: a descent direction for every structure. Steps are halved until they
    decrease the objective enough (Armijo's rule); the search ends early once a step is
    shorter than 1e-4 posterior standard deviations.
    """

    def objective(x: PyTree) -> jax.Array:
        distance = ops.quadratic_form(information, optax.tree.sub(x, center))
        return -log_likelihood(x) + 0.5 * distance

    def body(search: _Search) -> _Search:
        x = search.mean
        gradient = jax.grad(objective)(x)
        total = ops.add(curvature(x), information)
        direction = optax.tree.scale(-1.0, ops.solve(total, gradient))
        decrement = -vectors.dot(gradient, direction)
        # sums of rounded terms: a step may seem to grow the objective by this much
        slack = 4 * jnp.finfo(search.objective.dtype).eps * jnp.abs(search.objective)

        def too_long(trial: tuple) -> jax.Array:
            step_size, value = trial
            enough = _SUFFICIENT_DECREASE * step_size * decrement
            worse = ~(value <= search.objective - enough + slack)  # NaN is worse
            return worse & (step_size > _SMALLEST_STEP)

        def halve(trial: tuple) -> tuple:
            step_size = trial[0] / 2
            return step_size, objective(add_scaled(x, step_size, direction))

        one = jnp.ones_like(search.step_size)
        first = (one, objective(add_scaled(x, one, direction)))
        step_size, value = jax.lax.while_loop(too_long, halve, first)
        moved = value <= search.objective + slack
        step_size = jnp.where(moved, step_size, jnp.zeros_like(step_size))
        mean = jax.tree.map(
            lambda a, b: jnp.where(moved, a, b), add_scaled(x, step_size, direction), x
        )
        value = jnp.where(moved, value, search.objective)
        return _Search(mean, value, step_size, decrement, search.steps + 1)

    def unfinished(search: _Search) -> jax.Array:
        return (
            (search.steps < num_steps)
            & (search.decrement > _TOLERANCE)
            & (search.step_size > 0)
        )

    value = objective(start)
    dtype = vectors.float_dtype(center)
    one = jnp.ones((), dtype)
    infinity = jnp.full((), jnp.inf, dtype)
    search = _Search(start, value, one, infinity, jnp.zeros((), jnp.int32))
    search = jax.lax.while_loop(unfinished, body, search)
    return Solution(search.mean, search.step_size, search.decrement, None)
