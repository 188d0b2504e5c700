"""The implicit update: damped Newton steps on a batch and a Gaussian before it."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fisherflow_jax import information as ops
from fisherflow_jax._ground import linalg, trees
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
# Under a vague prior a direction may be too long by a factor of 1e18 (an outcome that
# contradicts a near certain prediction), or too short by one of ten (along a tail that
# falls by e for each unit): another size is then sought between ones that are too short
# and too long. Where none is found, the batch's score is lost.
_MOST_SIZES = 64
# The slope where a full step may end, as a share of that of its start (Wolfe's rule):
# below zero it went too far. A size that was sought ends more level. Bounds closer than
# these save steps along tails, and cost an evaluation and a factorisation a trial.
_LEVEL, _LEVEL_OF_SOUGHT = (-0.9, 0.9), (-0.5, 0.5)
# Sizes too short and too long, closer than this, are one.
_CLOSE = 1.001
# The share of the decrease promised by its slope that a step must bring. Any decrease
# would not do: from far below the mean of a gamma model, Fisher scoring leaps onto the
# plateau above it, a little lower than where it was, and needs dozens of steps back.
_SUFFICIENT_DECREASE = 0.1


class Solution(NamedTuple):
    """Where the steps ended."""

    mean: PyTree
    rest: PyTree  # what rounding took from it; None: not kept
    at: PyTree  # where the information of the batch was taken
    information: Any  # of the batch
    logdet: jax.Array  # () of that and the information before
    step_size: jax.Array  # () of the last Newton step; 0: none decreased the objective
    decrement: jax.Array  # () squared length of its direction, in posterior sd
    unfinished: jax.Array  # () int32, 1: the steps ended before they were short
    helped: jax.Array  # () int32, factorisations that rounding would have stopped


def single_step(objective: Objective, start: PyTree, rest: PyTree = None) -> Solution:
    """One full step, the batch's information at the start: an extended Kalman filter.

    The step minimises the quadratic model at `start`.
    """
    _, gradient = objective.evaluate(start)
    own, factors = objective.factorised(start)
    direction = factors.divide(gradient)
    decrement = trees.dot(gradient, direction)
    back = optax.tree.scale(-1, direction)
    # the gradient is that of the start without its rest
    rest = None if rest is None else optax.tree.zeros_like(rest)
    mean, rest = linalg.moved(start, rest, back)
    return Solution(
        mean=mean,
        rest=rest,
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
    rest: PyTree  # what rounding took from it; None: not kept
    objective: jax.Array
    gradient: PyTree
    step_size: jax.Array  # () of the last step that was taken; 0: none yet
    sizes: "_Sizes"
    decrement: jax.Array
    last: jax.Array  # () bool, no further step is needed
    steps: jax.Array
    helped: jax.Array


class _Sizes(NamedTuple):
    """Sizes of the step from a point, each `()`."""

    trial: jax.Array  # the one to try next
    short: jax.Array  # the longest found too short; 0: none
    long: jax.Array  # the shortest found too long; infinity: none
    tried: jax.Array  # int32, sizes that were refused

    @classmethod
    def full(cls, like: jax.Array) -> "_Sizes":
        one, zero = jnp.ones_like(like), jnp.zeros_like(like)
        return cls(one, zero, one * jnp.inf, jnp.zeros((), jnp.int32))

    def next(self, too_short: jax.Array) -> "_Sizes":
        """After a trial that was too short, or else too long."""
        trial, select = self.trial, jax.lax.select
        short = select(too_short, trial, self.short)
        long = select(too_short, self.long, trial)
        # between them by orders of magnitude, as long as there are any
        middle = select(
            long > 4 * short, jnp.sqrt(short) * jnp.sqrt(long), (short + long) / 2
        )
        less = select(short > 0, middle, jax.lax.min(trial / 2, trial * trial))
        more = select(long < jnp.inf, middle, jax.lax.max(trial * 2, trial * trial))
        return _Sizes(select(too_short, more, less), short, long, self.tried + 1)


def damped_newton(
    objective: Objective,
    start: PyTree,
    num_steps: jax.typing.ArrayLike,
    rest: PyTree = None,
) -> Solution:
    """The least of the objective.

    Each direction is `(I + F(x))^-1` times the exact gradient, with F in its own
    structure: a descent direction for every structure. A step must decrease the
    objective enough (Armijo's rule) and end where the slope is level; where the full
    one does not, its size is sought by bisection. The search ends early once a step is
    shorter than 1e-4 posterior standard deviations, or than rounding in float32. The
    first step is followed by others by its own factors while they shrink tenfold, which
    saves informations.

    References:
      Hager, Zhang, "A new conjugate gradient method with guaranteed descent and an
      efficient line search", 2005: slopes in place of values that rounding hides.
    """
    live, objective = objective, objective.held()
    value, gradient = objective.evaluate(start)
    search = _Search(
        mean=start,
        rest=None if rest is None else optax.tree.zeros_like(rest),
        objective=value,
        gradient=gradient,
        step_size=jnp.zeros_like(value),
        sizes=_Sizes.full(value),
        decrement=jnp.full_like(value, jnp.inf),
        last=jnp.zeros((), bool),
        steps=jnp.zeros((), jnp.int32),
        helped=jnp.zeros((), jnp.int32),
    )
    # the first step stands outside the loop: most updates need no other, and a loop's
    # turn costs as much as a small model's gradient
    tolerance = _TOLERANCE_64 if value.dtype == jnp.float64 else _TOLERANCE
    step = functools.partial(
        _step, objective=objective, start=start, tolerance=tolerance
    )
    search = step(search, further=True)

    def unfinished(search: _Search) -> jax.Array:
        return (
            (search.steps < num_steps)
            & (search.decrement > tolerance)
            & (search.sizes.tried < _MOST_SIZES)
            & ~search.last
        )

    search = jax.lax.while_loop(unfinished, step, search)
    own, factors = objective.factorised(search.mean)
    # what is believed after is a function of the solution, however it was found
    mean, own, logdet = differentiable(live, search.mean, own, factors.logdet)
    stuck = search.sizes.tried >= _MOST_SIZES
    return Solution(
        mean=mean,
        rest=search.rest,
        at=mean,
        information=own,
        logdet=logdet,
        step_size=trees.where(stuck, jnp.zeros_like(value), search.step_size),
        decrement=search.decrement,
        unfinished=(~search.last & (search.decrement > _TOLERANCE)).astype(jnp.int32),
        helped=search.helped + factors.helped,
    )


def _step(
    search: _Search,
    objective: Objective,
    start: PyTree,
    tolerance: float,
    further: bool = False,
) -> _Search:
    """A step along the Newton direction, or another size to try from the same point.

    `further`: and more by the same factors, while they contract.
    """
    own, factors = objective.factorised(search.mean)
    direction, sizes = factors.divide(search.gradient), search.sizes
    decrement = trees.dot(search.gradient, direction)
    reached = optax.tree.add_scale(search.mean, -sizes.trial, direction)
    value, gradient = objective.evaluate(reached)
    noise = _rounding(objective, own, start, reached)
    change = value - search.objective, trees.dot(gradient, direction)
    within = noise(direction), jnp.sqrt(jnp.finfo(value.dtype).eps) * jnp.abs(value)
    taken, too_short = _judge(sizes, decrement, change, within, tolerance)
    length = jnp.square(sizes.trial) * decrement
    chord = _chord(reached, value, gradient, length, factors)
    if further:
        chord = _further(chord, objective, factors, taken)
    # the step from there by the same factors: if short enough, it is the last
    short = chord.is_short()
    if value.dtype == jnp.float64:
        # after a step longer than the factors' the information has fallen, and what is
        # short by them may be long by it; in float32 rounding is longer than that
        short = short & (sizes.trial <= 1)
    last = short | (jnp.abs(chord.remaining) < noise(chord.rest))
    none = None if search.rest is None else optax.tree.zeros_like(search.rest)
    there = linalg.moved(chord.mean, none, optax.tree.scale(-1, chord.rest))
    if none is not None:
        # what is lost to the mean's rounding cannot be found from another point
        last = last | (2 * noise(there[1]) > noise(chord.rest))
    mean, rest = trees.where(last, there, (chord.mean, none))
    after = search._replace(
        mean=mean,
        rest=rest,
        objective=chord.objective,
        gradient=chord.gradient,
        step_size=sizes.trial,
        sizes=_Sizes.full(value),
        decrement=jnp.where(
            last, chord.remaining, chord.before if further else decrement
        ),
        last=last,
        steps=search.steps + 1,
    )
    again = search._replace(decrement=decrement, sizes=sizes.next(too_short))
    found = trees.where(taken, after, again)
    return found._replace(helped=search.helped + factors.helped)


def _judge(
    sizes: _Sizes,
    decrement: jax.Array,
    change: tuple[jax.Array, jax.Array],
    within: tuple[jax.Array, jax.Array],
    tolerance: float,
) -> tuple[jax.Array, jax.Array]:
    """Whether a size is taken, and whether it is too short.

    `change`: of the objective, and how steeply it falls on where the step ends;
    `within`: the rounding of the slopes, and of values.
    """
    grown, slope = change
    slack, hidden = within
    share = jax.lax.min(sizes.trial, jnp.ones_like(slope)) * decrement
    # where rounding hides what a step brings, its slopes tell
    lower = jax.lax.select(
        share <= hidden + slack,
        slope + slack >= (2 * _SUFFICIENT_DECREASE - 1) * share,
        grown <= -_SUFFICIENT_DECREASE * share,  # NaN is not
    )
    bounds = [
        jax.lax.select(sizes.tried == 0, full * share, sought * share)
        for full, sought in zip(_LEVEL, _LEVEL_OF_SOUGHT, strict=True)
    ]
    too_short = lower & (slope - slack > bounds[1])
    level = ~too_short & (slope + slack >= bounds[0])
    done = (decrement <= tolerance) | (sizes.long <= _CLOSE * sizes.short)
    return lower & (level | done), too_short


def _rounding(
    objective: Objective, own: Any, start: PyTree, x: PyTree
) -> Callable[[PyTree], jax.Array]:
    r"""How large a slope along a direction at x may be from rounding alone, in float32.

    .. math:: \epsilon \sum_j \sqrt{(I + F)_{jj}} |v_j|
       \sum_k \big(\sqrt{I_{kk}} |x_k - s_k| + \sqrt{F_{kk}} |x_k|\big)

    The pull of the belief is a product of I with the way from the start s, the score
    one of F's root with the rounding of the outputs.
    """
    dtype = trees.float_dtype(x)
    if dtype != jnp.float32:
        return lambda vector: jnp.zeros((), dtype)
    roots = [
        jnp.sqrt(trees.ravel(ops.diagonal(each, x)))
        for each in (objective.information, own)
    ]

    def sizes(*vectors: PyTree) -> jax.Array:
        one, other = (
            jnp.sum(root * jnp.abs(trees.ravel(vector)))
            for root, vector in zip(roots, vectors, strict=True)
        )
        return one + other

    lost = sizes(optax.tree.sub(x, start), x) * jnp.finfo(dtype).eps
    return lambda vector: lost * sizes(vector, vector)


class _Chord(NamedTuple):
    """A point, and the step from it by the factors of one before it."""

    mean: PyTree
    objective: jax.Array
    gradient: PyTree
    rest: PyTree  # what that step subtracts
    remaining: jax.Array  # () its squared length
    before: jax.Array  # () that of the step that led here

    def is_short(self) -> jax.Array:
        near = jnp.square(self.remaining) <= _CHORD_TOLERANCE * self.before
        return near & (jnp.abs(self.remaining) <= _CONTRACTION * self.before)


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
