"""The implicit update: damped Newton steps on a batch and a Gaussian before it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fisherflow_jax import information as ops
from fisherflow_jax._ground import trees
from fisherflow_jax.model import once

PyTree = Any

# A step whose squared length in posterior standard deviations is below this is the
# last: Newton's next one would be of the order of its square.
_TOLERANCE = 1e-8
# A step this short may also use the information of the step before: it leaves a share
# of its length as small as the change of the information.
_CHORD_TOLERANCE = 1e-10
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
    at: PyTree  # where the information of the batch was taken
    information: Any
    step_size: jax.Array  # () of the last step; 0: no step decreased the objective
    decrement: jax.Array  # () squared length of its direction, in posterior sd
    unfinished: jax.Array  # () int32, 1: the steps ended before they were short


class Objective(NamedTuple):
    """`-log_likelihood(x) + |x - center|^2 / 2`, the norm by the information."""

    evaluate: Callable[[PyTree], tuple[jax.Array, PyTree]]  # x -> it and its gradient
    curvature: Callable[[PyTree], Any]  # x -> the batch's information
    information: Any


def objective_of(
    log_likelihood: Callable[[PyTree], jax.Array],
    curvature: Callable[[PyTree], Any],
    center: PyTree,
    information: Any,
) -> Objective:
    """The objective, its Python run once however often it is written out."""

    def evaluate(x: PyTree) -> tuple[jax.Array, PyTree]:
        value, score = jax.value_and_grad(log_likelihood)(x)
        offset = optax.tree.sub(x, center)
        pull = ops.matvec(information, offset)
        return 0.5 * trees.dot(offset, pull) - value, optax.tree.sub(pull, score)

    def traced_once(function: Callable[[PyTree], Any]) -> Callable[[PyTree], Any]:
        traced = once(lambda x, _: function(x))
        return lambda x: traced(x, ())

    return Objective(
        evaluate=traced_once(evaluate),
        curvature=traced_once(curvature),
        information=information,
    )


def single_step(objective: Objective, start: PyTree) -> Solution:
    """One full step, the batch's information at the start: an extended Kalman filter.

    The step minimises the quadratic model at `start`.
    """
    _, gradient = objective.evaluate(start)
    own = objective.curvature(start)
    direction = ops.solve(ops.add(own, objective.information), gradient)
    decrement = trees.dot(gradient, direction)
    return Solution(
        mean=optax.tree.sub(start, direction),
        at=start,
        information=own,
        step_size=jnp.ones_like(decrement),
        decrement=decrement,
        unfinished=jnp.zeros((), jnp.int32),
    )


class _Search(NamedTuple):
    mean: PyTree
    objective: jax.Array
    gradient: PyTree
    step_size: jax.Array
    decrement: jax.Array
    steps: jax.Array


def damped_newton(objective: Objective, start: PyTree, num_steps: int) -> Solution:
    """The least of the objective.

    Each direction is `(I + F(x))^-1` times the exact gradient, with F in its own
    structure: a descent direction for every structure. Steps are halved until they
    decrease the objective enough (Armijo's rule); the search ends early once a step is
    shorter than 1e-4 posterior standard deviations. A step shorter than 1e-5 is taken
    with the factors of the one before, which saves its information.
    """

    def unfinished(search: _Search) -> jax.Array:
        return (
            (search.steps < num_steps)
            & (search.decrement > _TOLERANCE)
            & (search.step_size > 0)
        )

    def step(search: _Search) -> _Search:
        own = objective.curvature(search.mean)
        return _step(search, ops.add(own, objective.information), objective)

    value, gradient = objective.evaluate(start)
    search = _Search(
        mean=start,
        objective=value,
        gradient=gradient,
        step_size=jnp.ones_like(value),
        decrement=jnp.full_like(value, jnp.inf),
        steps=jnp.zeros((), jnp.int32),
    )
    search = jax.lax.while_loop(unfinished, step, search)
    return Solution(
        mean=search.mean,
        at=search.mean,
        information=objective.curvature(search.mean),
        step_size=search.step_size,
        decrement=search.decrement,
        unfinished=(search.decrement > _TOLERANCE).astype(jnp.int32),
    )


def _step(search: _Search, information: Any, objective: Objective) -> _Search:
    """A step along the Newton direction, and a second by the same factors if short."""
    solve = ops.solver(information)
    direction = optax.tree.scale(-1.0, solve(search.gradient))
    decrement = -trees.dot(search.gradient, direction)
    one = jnp.ones_like(decrement)
    # sums of rounded terms: a step may seem to grow the objective by this much
    slack = 4 * jnp.finfo(one.dtype).eps * jnp.abs(search.objective)

    def too_long(trial: tuple) -> jax.Array:
        step_size, value, _ = trial
        enough = _SUFFICIENT_DECREASE * step_size * decrement
        worse = ~(value <= search.objective - enough + slack)  # NaN is worse
        return worse & (step_size > _SMALLEST_STEP)

    def halve(trial: tuple) -> tuple:
        step_size = trial[0] / 2
        reached = optax.tree.add_scale(search.mean, step_size, direction)
        return step_size, *objective.evaluate(reached)

    # the objective is written out once: the whole step is a trial like the others
    untried = 2 * one, jnp.full_like(one, jnp.nan), search.gradient
    step_size, value, gradient = jax.lax.while_loop(too_long, halve, untried)
    moved = value <= search.objective + slack
    reached = optax.tree.add_scale(search.mean, step_size, direction)
    # the step from there by the same factors: if short enough, it is the last
    rest = solve(gradient)
    remaining = trees.dot(gradient, rest)
    last = _Search(
        mean=optax.tree.sub(reached, rest),
        objective=value,
        gradient=gradient,
        step_size=one,
        decrement=remaining,
        steps=search.steps,
    )
    found = last._replace(mean=reached, step_size=step_size, decrement=decrement)
    stuck = search._replace(step_size=jnp.zeros_like(one), decrement=decrement)
    found = trees.where(remaining <= _CHORD_TOLERANCE, last, found)
    return trees.where(moved, found, stuck)._replace(steps=search.steps + 1)
