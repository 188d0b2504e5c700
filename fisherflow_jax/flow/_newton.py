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

    log_likelihood: Callable[[PyTree], jax.Array]
    curvature: Callable[[PyTree], Any]  # x -> the batch's information
    center: PyTree
    information: Any

    def evaluate(self, x: PyTree) -> tuple[jax.Array, PyTree]:
        """The objective and its gradient."""
        value, score = jax.value_and_grad(self.log_likelihood)(x)
        offset = optax.tree.sub(x, self.center)
        pull = ops.matvec(self.information, offset)
        return 0.5 * trees.dot(offset, pull) - value, optax.tree.sub(pull, score)


def single_step(objective: Objective, start: PyTree) -> Solution:
    """One full step, the batch's information at the start: an extended Kalman filter.

    The step minimises the quadratic model at `start`.
    """
    gradient = objective.evaluate(start)[1]
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


class _Trial(NamedTuple):
    """A step tried from where the search is."""

    begun: jax.Array  # () bool: what follows up to the decrement is known
    objective: jax.Array
    direction: PyTree
    decrement: jax.Array
    step_size: jax.Array
    value: jax.Array  # of the objective after the step; NaN: not tried yet
    gradient: PyTree
    rest: PyTree  # the Newton step from there, by the same factors
    remaining: jax.Array  # () its squared length


def damped_newton(objective: Objective, start: PyTree, num_steps: int) -> Solution:
    """The least of the objective.

    Each direction is `(I + F(x))^-1` times the exact gradient, with F in its own
    structure: a descent direction for every structure. Steps are halved until they
    decrease the objective enough (Armijo's rule); the search ends early once a step is
    shorter than 1e-4 posterior standard deviations. A step shorter than 1e-5 is taken
    with the factors of the one before, which saves its information.
    """
    evaluate = _once(objective.evaluate)
    information_at = _once(objective.curvature)

    def unfinished(search: _Search) -> jax.Array:
        return (
            (search.steps < num_steps)
            & (search.decrement > _TOLERANCE)
            & (search.step_size > 0)
        )

    def body(turn: tuple[_Search, Any, jax.Array]) -> tuple[_Search, Any, jax.Array]:
        # the last turn takes the information where the steps have ended
        search = turn[0]
        own = information_at(search.mean)
        go_on = unfinished(search)

        def step() -> _Search:
            solve = ops.solver(ops.add(own, objective.information))
            return _step(search, solve, evaluate)

        return jax.lax.cond(go_on, step, lambda: search), own, ~go_on

    like = jax.eval_shape(evaluate, start)
    zero, zeros = optax.tree.zeros_like(like)
    search = _Search(
        mean=start,
        objective=zero,
        gradient=zeros,
        step_size=zero + 1,
        decrement=zero + jnp.inf,
        steps=jnp.zeros((), jnp.int32),
    )
    nothing = optax.tree.zeros_like(jax.eval_shape(information_at, start))
    search, own, _ = jax.lax.while_loop(
        lambda turn: ~turn[2], body, (search, nothing, jnp.zeros((), bool))
    )
    return Solution(
        mean=search.mean,
        at=search.mean,
        information=own,
        step_size=search.step_size,
        decrement=search.decrement,
        unfinished=(search.decrement > _TOLERANCE).astype(jnp.int32),
    )


def _once(function: Callable[[PyTree], Any]) -> Callable[[PyTree], Any]:
    """`function`, whose Python runs once, however often its shapes are asked for."""
    traced = once(lambda x, _: function(x))
    return lambda x: traced(x, ())


def _step(
    search: _Search,
    solve: Callable[[PyTree], PyTree],
    evaluate: Callable[[PyTree], tuple[jax.Array, PyTree]],
) -> _Search:
    """A step along the Newton direction, and a second by the same factors if short.

    All trials are one loop, that of the start too, where the first step sets out
    knowing neither objective nor direction: the objective is written out once.
    """
    eps = jnp.finfo(search.objective.dtype).eps
    two, nan = (
        jnp.full_like(search.objective, 2),
        jnp.full_like(search.objective, jnp.nan),
    )
    rest = solve(search.gradient)
    untried = _Trial(
        begun=search.steps > 0,
        objective=search.objective,
        direction=optax.tree.scale(-1.0, rest),
        decrement=trees.dot(search.gradient, rest),
        step_size=two,
        value=nan,
        gradient=search.gradient,
        rest=rest,
        remaining=nan,
    )

    def slack(trial: _Trial) -> jax.Array:
        # sums of rounded terms: a step may seem to grow the objective by this much
        return 4 * eps * jnp.abs(trial.objective)

    def too_long(trial: _Trial) -> jax.Array:
        enough = _SUFFICIENT_DECREASE * trial.step_size * trial.decrement
        worse = ~(
            trial.value <= trial.objective - enough + slack(trial)
        )  # NaN is worse
        return ~trial.begun | (worse & (trial.step_size > _SMALLEST_STEP))

    def halve(trial: _Trial) -> _Trial:
        step_size = trial.step_size / 2
        reached = optax.tree.add_scale(search.mean, step_size, trial.direction)
        value, gradient = evaluate(reached)
        rest = solve(gradient)
        tried = trial._replace(
            step_size=step_size,
            value=value,
            gradient=gradient,
            rest=rest,
            remaining=trees.dot(gradient, rest),
        )
        begun = tried._replace(
            begun=jnp.ones_like(trial.begun),
            objective=value,
            direction=optax.tree.scale(-1.0, rest),
            decrement=tried.remaining,
            step_size=two,
            value=nan,
        )
        return trees.where(trial.begun, tried, begun)

    trial = jax.lax.while_loop(too_long, halve, untried)
    moved = trial.value <= trial.objective + slack(trial)
    reached = optax.tree.add_scale(search.mean, trial.step_size, trial.direction)
    # the step from there by the same factors: if short enough, it is the last
    short = moved & (trial.remaining <= _CHORD_TOLERANCE)
    last = optax.tree.sub(reached, trial.rest)
    one = jnp.ones_like(two)
    return _Search(
        mean=trees.where(short, last, trees.where(moved, reached, search.mean)),
        objective=trial.value,
        gradient=trial.gradient,
        step_size=trees.where(short, one, trees.where(moved, trial.step_size, 0 * one)),
        decrement=trees.where(short, trial.remaining, trial.decrement),
        steps=search.steps + 1,
    )
