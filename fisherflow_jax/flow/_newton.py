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
# A step is the last where the log-determinant of the information changed by no more
# since the step before: along the tail of a certain outcome steps too short to be seen
# in posterior standard deviations change it by one each, and it is remembered.
_SETTLED = 0.01
# The share of the bound on rounding that rounding usually is.
_USUAL = 0.1
# Further steps by the same factors, while each is this share of the one before: they
# save informations and factorisations.
_CONTRACTION = 0.01
# Parameters from which a search is written out once: factorising takes so long then
# that what the loops cost is hardly seen.
MANY = 128
# Steps of a first update, which sets out from a guess and not from a belief.
FIRST_STEPS = 50
# The slope where a full step may end, as a share of that of its start (Wolfe's rule):
# below zero it went too far. A size that was sought ends more level. Bounds closer than
# these save steps along tails, and cost an evaluation a trial.
_LEVEL, _LEVEL_OF_SOUGHT = (-0.9, 0.9), (-0.5, 0.5)
# Under a vague prior a direction may be too long by a factor of 1e18 (an outcome that
# contradicts a near certain prediction), or too short by one of ten (along a tail that
# falls by e for each unit): another size is then sought between ones that are too short
# and too long, until these are one.
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
    pull: PyTree = None  # the information before, times the way from its mean


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
    seen: Any  # () bool, whether these two are known; None: they are
    step_size: jax.Array  # () of the last step; 0: none was found
    decrement: jax.Array
    information: Any  # of the batch, where its last factors were taken; None: not kept
    logdet: jax.Array  # () there; NaN: nowhere
    last: jax.Array  # () bool, no further step is needed
    left: jax.Array  # () int32, steps; -1: and the solution is measured
    helped: jax.Array


class _Walk(NamedTuple):
    """A point, and the step from it by factors that stay."""

    mean: PyTree
    objective: jax.Array
    gradient: PyTree
    direction: PyTree  # what the step subtracts
    length: jax.Array  # () its squared length
    before: jax.Array  # () that of the step that led here; infinity: none
    size: jax.Array  # () of it, to try next
    short: jax.Array  # () the longest size found too short; 0: none
    long: jax.Array  # () the shortest size found too long; infinity: none
    last: jax.Array  # () bool, the step is the last
    seen: Any = None  # () bool, whether the point is evaluated; None: it is

    @property
    def is_full(self) -> jax.Array:
        """Whether no other size than one has been sought."""
        return (self.short == 0) & (self.long == jnp.inf)

    @property
    def known(self) -> jax.Array:
        """Whether the point has been evaluated."""
        return jnp.ones((), bool) if self.seen is None else self.seen

    @property
    def goes_on(self) -> jax.Array:
        contracts = self.is_full & (jnp.abs(self.length) <= _CONTRACTION * self.before)
        possible = (self.short < self.size) & (self.size < self.long)
        goes = jax.lax.select(self.before < jnp.inf, contracts, possible)
        # rounding may make a squared length negative; one that overflows leads nowhere,
        # and from there to others that do, without end
        sound = (self.length > 0) & (self.length < jnp.inf)
        return ~self.last & (~self.known | (sound & goes))

    def resized(self, too_short: jax.Array) -> "_Walk":
        """After a trial that was too short, or else too long."""
        size, select = self.size, jax.lax.select
        short = select(too_short, size, self.short)
        long = select(too_short, self.long, size)
        # between them by orders of magnitude, as long as there are any
        middle = select(
            long > 4 * short, jnp.sqrt(short) * jnp.sqrt(long), (short + long) / 2
        )
        less = select(short > 0, middle, jax.lax.min(size / 2, size * size))
        more = select(long < jnp.inf, middle, jax.lax.max(size * 2, size * size))
        size = select(too_short, more, less)
        return self._replace(size=size, short=short, long=long)


def damped_newton(
    objective: Objective,
    start: PyTree,
    num_steps: jax.typing.ArrayLike,
    rest: PyTree = None,
    *,
    once: bool = False,
) -> Solution:
    """The least of the objective.

    Each direction is `(I + F(x))^-1` times the exact gradient, with F in its own
    structure: a descent direction for every structure. A step must decrease the
    objective enough (Armijo's rule) and end where the slope is level; where the full
    one does not, its size is sought by bisection. A full step is followed by others by
    its own factors while they shrink tenfold, which saves informations. The search ends
    with a step that is shorter than 1e-4 posterior standard deviations, or than
    rounding in float32, and is taken unseen.

    `once`: the model and the factorisation stand once in the program, within the loops,
    and not also before and after them. The numbers are the same; it compiles sooner,
    and takes a few microseconds longer.

    References:
      Hager, Zhang, "A new conjugate gradient method with guaranteed descent and an
      efficient line search", 2005: slopes in place of values that rounding hides.
    """
    live, objective = objective, objective.held()
    seen = own = None
    if once:
        parts = objective.evaluate, objective.curvature
        shapes = [jax.eval_shape(part.__call__, start) for part in parts]
        (value, gradient), own = optax.tree.zeros_like(shapes)
        seen = jnp.zeros((), bool)
    else:
        value, gradient = objective.evaluate(start)
    zero = jnp.zeros_like(value)
    search = _Search(
        mean=start,
        rest=None if rest is None else optax.tree.zeros_like(rest),
        objective=value,
        gradient=gradient,
        seen=seen,
        step_size=zero,
        decrement=zero,
        information=own,
        logdet=jnp.full_like(value, jnp.nan),
        last=jnp.zeros((), bool),
        left=jnp.asarray(num_steps, jnp.int32),
        helped=jnp.zeros((), jnp.int32),
    )
    turn = functools.partial(_turn, objective=objective, start=start)
    end = -1 if once else 0
    search = jax.lax.while_loop(lambda search: search.left > end, turn, search)
    if not once:
        search = _measured(search, *objective.factorised(search.mean))
    # what is believed after is a function of the solution, however it was found
    found = search.mean, search.information, search.logdet
    mean, own, logdet = differentiable(live, *found)
    return Solution(
        mean=mean,
        rest=search.rest,
        at=mean,
        information=own,
        logdet=logdet,
        step_size=search.step_size,
        decrement=search.decrement,
        unfinished=(~search.last & (search.decrement > _TOLERANCE)).astype(jnp.int32),
        helped=search.helped,
    )


def _turn(search: _Search, objective: Objective, start: PyTree) -> _Search:
    """The information of a point, and the steps by its factors, if any are left."""
    own, factors = objective.factorised(search.mean)
    step = functools.partial(_stepped, search, objective, start, own, factors)
    if search.information is None:
        return step()
    # the information need not pass through the branches
    measured = _measured(search, None, factors)._replace(left=search.left - 1)
    after = jax.lax.cond(search.left > 0, step, lambda: measured)
    return after._replace(information=own)


def _measured(search: _Search, own: Any, factors: ops.Regularised) -> _Search:
    """With the information of the batch at its point, and the determinant there."""
    helped = search.helped + factors.helped
    return search._replace(information=own, logdet=factors.logdet, helped=helped)


def _stepped(
    search: _Search, objective: Objective, start: PyTree, own: Any, factors: Any
) -> _Search:
    walk = _walk(search, objective, start, own, factors)
    none = None if search.rest is None else optax.tree.zeros_like(search.rest)
    there = linalg.moved(walk.mean, none, optax.tree.scale(-1, walk.direction))
    mean, rest = trees.where(walk.last, there, (walk.mean, none))
    # a walk without a step has not found any, unless its first is the last
    still = jnp.isinf(walk.before)
    stuck = still & ~walk.last
    return _Search(
        mean=mean,
        rest=rest,
        objective=walk.objective,
        gradient=walk.gradient,
        seen=walk.seen,
        step_size=jnp.where(stuck, jnp.zeros_like(walk.size), walk.size),
        decrement=jnp.where(walk.last | still, walk.length, walk.before),
        information=None,
        logdet=factors.logdet,
        last=walk.last,
        left=jnp.where(walk.last | stuck, 0, search.left - 1),
        helped=search.helped + factors.helped,
    )


def _walk(
    search: _Search, objective: Objective, start: PyTree, own: Any, factors: Any
) -> _Walk:
    """Steps by the factors of a point, from there on."""
    dtype = search.objective.dtype
    tolerance = _TOLERANCE_64 if dtype == jnp.float64 else _TOLERANCE
    rounding = _rounding(objective, own, start)
    zero, infinity = jnp.zeros((), dtype), jnp.full((), jnp.inf, dtype)

    def turn(walk: _Walk) -> _Walk:
        reached = optax.tree.add_scale(walk.mean, -walk.size, walk.direction)
        if walk.seen is not None:
            reached = trees.where(walk.seen, reached, walk.mean)
        value, gradient = objective.evaluate(reached)
        noise = rounding(reached)
        change = value - walk.objective, trees.dot(gradient, walk.direction)
        hidden = jnp.sqrt(jnp.finfo(dtype).eps) * jnp.abs(value)
        taken, too_short = _judge(
            walk, change, (noise.of(walk.direction), hidden, 0.5 * jnp.abs(value))
        )

        def after() -> _Walk:
            ahead = factors.divide(gradient)
            length = trees.dot(gradient, ahead)
            # a step by the factors of a point before is of the order of its own length
            # times the rate
            near = jnp.square(length) <= _CHORD_TOLERANCE * walk.length
            contracts = jnp.abs(length) <= _CONTRACTION * walk.length
            short = near | noise.hides(length, ahead)
            return walk._replace(
                mean=reached,
                objective=value,
                gradient=gradient,
                seen=None if walk.seen is None else jnp.ones((), bool),
                direction=ahead,
                length=length,
                before=jax.lax.select(walk.known, walk.length, infinity),
                last=walk.known & walk.is_full & contracts & short,
            )

        # a good step is followed by more, however they end
        taken = taken | (walk.before < jnp.inf) | ~walk.known
        return jax.lax.cond(taken, after, lambda: walk.resized(too_short))

    direction = factors.divide(search.gradient)
    length = trees.dot(search.gradient, direction)
    # Newton's next step would be of the order of the square of this one
    near = jnp.abs(length) <= tolerance
    begun = _Walk(
        mean=search.mean,
        objective=search.objective,
        gradient=search.gradient,
        seen=search.seen,
        direction=direction,
        length=length,
        before=infinity,
        size=jnp.ones_like(zero),
        short=zero,
        long=infinity,
        last=(near | rounding(search.mean).hides(length, direction))
        & (jnp.abs(factors.logdet - search.logdet) <= _SETTLED),
    )
    return jax.lax.while_loop(lambda walk: walk.goes_on, turn, begun)


def _judge(
    walk: _Walk,
    change: tuple[jax.Array, jax.Array],
    within: tuple[jax.Array, jax.Array, jax.Array],
) -> tuple[jax.Array, jax.Array]:
    """Whether a size is taken, and whether it is too short.

    `change`: of the objective, and how steeply it falls on where the step ends;
    `within`: the rounding of the slopes, that of values, and half the value.
    """
    grown, slope = change
    slack, hidden, doubled = within
    share = jax.lax.min(walk.size, jnp.ones_like(slope)) * walk.length
    # where rounding hides what a step brings, its slopes tell, unless it doubles the
    # objective: by factors of a matrix nearly singular from rounding it is far too long
    falls = slope + slack >= (2 * _SUFFICIENT_DECREASE - 1) * share
    lower = jax.lax.select(
        share <= hidden + slack,
        falls & (grown <= doubled),
        grown <= -_SUFFICIENT_DECREASE * share,  # NaN is not
    )
    bounds = [
        jax.lax.select(walk.is_full, full * share, sought * share)
        for full, sought in zip(_LEVEL, _LEVEL_OF_SOUGHT, strict=True)
    ]
    too_short = lower & (slope - slack > bounds[1])
    level = ~too_short & (slope + slack >= bounds[0])
    return lower & (level | (walk.long <= _CLOSE * walk.short)), too_short


class _Noise(NamedTuple):
    """What rounding alone may make of slopes and lengths at a point, in float32."""

    lost: Any  # () of a slope along a step of one
    coarse: Any  # () the length of the mean's own rounding
    of_length: Callable[[PyTree], Any]

    def of(self, vector: PyTree) -> Any:
        return self.lost * self.of_length(vector)

    def hides(self, length: jax.Array, vector: PyTree) -> jax.Array:
        """Whether a step, of that squared length, is rounding alone."""
        size = self.of_length(vector)
        hidden = jnp.abs(length) < _USUAL * self.lost * size
        return hidden | (size < self.coarse)


def _rounding(
    objective: Objective, own: Any, start: PyTree
) -> Callable[[PyTree], _Noise]:
    r"""How large a slope along a direction at x may be from rounding alone, in float32.

    .. math:: \epsilon \sum_j (\sqrt{I_{jj}} + \sqrt{F_{jj}}) |v_j|
       \sum_k \big(\sqrt{I_{kk}} |x_k - s_k| + \sqrt{F_{kk}} |x_k|\big)

    The pull of the belief is a product of I with the way from the start s, the score
    one of F's root with the rounding of the outputs.
    """
    dtype = trees.float_dtype(start)
    if dtype != jnp.float32:
        zero = jnp.zeros((), dtype)
        return lambda x: _Noise(zero, zero, lambda vector: zero)
    eps = jnp.finfo(dtype).eps
    before, batch = (
        jax.tree.map(jnp.sqrt, ops.diagonal(each, start))
        for each in (objective.information, own)
    )
    both = optax.tree.add(before, batch)

    def sizes(roots: PyTree, vector: PyTree) -> jax.Array:
        return trees.dot(roots, jax.tree.map(jnp.abs, vector))

    def at(x: PyTree) -> _Noise:
        lost = sizes(before, optax.tree.sub(x, start)) + sizes(batch, x)
        return _Noise(eps * lost, eps * sizes(both, x), functools.partial(sizes, both))

    return at
