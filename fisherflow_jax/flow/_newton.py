"""The implicit update: damped Newton steps on a batch and a Gaussian before it."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fisherflow_jax import information as ops
from fisherflow_jax._ground import trees
from fisherflow_jax.flow._objective import Objective, differentiable

PyTree = Any

# A step whose squared length in posterior standard deviations is below this is the
# last: Newton's next one would be of the order of its square.
_TOLERANCE = 1e-8
# Scoring, whose steps shrink by a constant rate where the information is not the
# Hessian, goes on to this in float64. In float32 a step has no more digits.
_TOLERANCE_64 = 1e-11
# Steps by the factors of a point before them shrink by a constant rate. One is the last
# if the next would be shorter than this, squared: its length times the rate.
_CHORD_TOLERANCE = 1e-14
# Further steps by the same factors, while each is this share of the one before: they
# save informations and factorisations.
_CONTRACTION = 0.01
# Steps of a first update, which sets out from a guess and not from a belief.
FIRST_STEPS = 50
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
    information: Any  # of the batch
    logdet: jax.Array  # () of that and the information before
    step_size: jax.Array  # () of the last Newton step; 0: none decreased the objective
    decrement: jax.Array  # () squared length of its direction, in posterior sd
    unfinished: jax.Array  # () int32, 1: the steps ended before they were short
    helped: jax.Array  # () int32, factorisations that rounding would have stopped


def single_step(objective: Objective, start: PyTree) -> Solution:
    """One full step, the batch's information at the start: an extended Kalman filter.

    The step minimises the quadratic model at `start`.
    """
    _, gradient = objective.evaluate(start)
    own, factors = objective.factorised(start)
    direction = factors.divide(gradient)
    decrement = trees.dot(gradient, direction)
    return Solution(
        mean=optax.tree.sub(start, direction),
        at=start,
        information=own,
        logdet=factors.logdet,
        step_size=jnp.ones_like(decrement),
        decrement=decrement,
        unfinished=jnp.zeros((), jnp.int32),
        helped=factors.helped,
    )


class _Search(NamedTuple):
    mean: PyTree
    objective: jax.Array
    gradient: PyTree
    step_size: jax.Array  # () of the last step that was taken; 0: none yet
    trial: jax.Array  # () the size to try next
    decrement: jax.Array
    steps: jax.Array
    helped: jax.Array


def damped_newton(
    objective: Objective, start: PyTree, num_steps: jax.typing.ArrayLike
) -> Solution:
    """The least of the objective.

    Each direction is `(I + F(x))^-1` times the exact gradient, with F in its own
    structure: a descent direction for every structure. Steps are halved until they
    decrease the objective enough (Armijo's rule); the search ends early once a step is
    shorter than 1e-4 posterior standard deviations. The first step is followed by
    others by its own factors while they shrink tenfold, which saves informations.
    """
    live, objective = objective, objective.held()
    value, gradient = objective.evaluate(start)
    search = _Search(
        mean=start,
        objective=value,
        gradient=gradient,
        step_size=jnp.zeros_like(value),
        trial=jnp.ones_like(value),
        decrement=jnp.full_like(value, jnp.inf),
        steps=jnp.zeros((), jnp.int32),
        helped=jnp.zeros((), jnp.int32),
    )
    # the first step stands outside the loop: most updates need no other, and a loop's
    # turn costs as much as a small model's gradient
    search = _step(search, objective, further=True)

    tolerance = _TOLERANCE_64 if value.dtype == jnp.float64 else _TOLERANCE

    def unfinished(search: _Search) -> jax.Array:
        return (
            (search.steps < num_steps)
            & (search.decrement > tolerance)
            & (search.trial > _SMALLEST_STEP)
        )

    search = jax.lax.while_loop(unfinished, lambda s: _step(s, objective), search)
    own, factors = objective.factorised(search.mean)
    # what is believed after is a function of the solution, however it was found
    mean, own, logdet = differentiable(live, search.mean, own, factors.logdet)
    stuck = search.trial <= _SMALLEST_STEP
    return Solution(
        mean=mean,
        at=mean,
        information=own,
        logdet=logdet,
        step_size=trees.where(stuck, jnp.zeros_like(value), search.step_size),
        decrement=search.decrement,
        unfinished=(search.decrement > _TOLERANCE).astype(jnp.int32),
        helped=search.helped + factors.helped,
    )


def _step(search: _Search, objective: Objective, further: bool = False) -> _Search:
    """A step along the Newton direction, or half the size to try from the same point.

    `further`: and more by the same factors, while they contract.
    """
    _, factors = objective.factorised(search.mean)
    direction = factors.divide(search.gradient)
    decrement = trees.dot(search.gradient, direction)
    reached = optax.tree.add_scale(search.mean, -search.trial, direction)
    value, gradient = objective.evaluate(reached)
    # sums of rounded terms: a step may seem to grow the objective by this much
    slack = 4 * jnp.finfo(value.dtype).eps * jnp.abs(search.objective)
    enough = _SUFFICIENT_DECREASE * search.trial * decrement
    taken = value <= search.objective - enough + slack  # NaN is not
    chord = _chord(reached, value, gradient, decrement, factors)
    if further:
        chord = _further(chord, objective, factors, taken)
    # the step from there by the same factors: if short enough, it is the last
    short = chord.is_short()
    last = optax.tree.sub(chord.mean, chord.rest)
    after = search._replace(
        mean=trees.where(short, last, chord.mean),
        objective=chord.objective,
        gradient=chord.gradient,
        step_size=search.trial,
        trial=jnp.ones_like(search.trial),
        decrement=jnp.where(short, chord.remaining, chord.before),
        steps=search.steps + 1,
    )
    found = trees.where(
        taken, after, search._replace(decrement=decrement, trial=search.trial / 2)
    )
    return found._replace(helped=search.helped + factors.helped)


class _Chord(NamedTuple):
    """A point, and the step from it by the factors of one before it."""

    mean: PyTree
    objective: jax.Array
    gradient: PyTree
    rest: PyTree  # what that step subtracts
    remaining: jax.Array  # () its squared length
    before: jax.Array  # () that of the step that led here

    def is_short(self) -> jax.Array:
        return jnp.square(self.remaining) <= _CHORD_TOLERANCE * self.before


def _chord(
    mean: PyTree,
    objective: jax.Array,
    gradient: PyTree,
    before: jax.Array,
    factors: ops.Regularised,
) -> _Chord:
    rest = factors.divide(gradient)
    return _Chord(
        mean=mean,
        objective=objective,
        gradient=gradient,
        rest=rest,
        remaining=trees.dot(gradient, rest),
        before=before,
    )


def _further(
    chord: _Chord, objective: Objective, factors: ops.Regularised, taken: jax.Array
) -> _Chord:
    """Steps by the same factors while they contract and are not yet short."""

    def contracts(chord: _Chord) -> jax.Array:
        # rounding may make a squared length negative, which ends the steps as well
        shrinks = jnp.abs(chord.remaining) < _CONTRACTION * chord.before
        return taken & shrinks & ~chord.is_short()

    def move(chord: _Chord) -> _Chord:
        mean = optax.tree.sub(chord.mean, chord.rest)
        value, gradient = objective.evaluate(mean)
        return _chord(mean, value, gradient, chord.remaining, factors)

    return jax.lax.while_loop(contracts, move, chord)
