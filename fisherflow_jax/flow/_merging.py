"""Fusing the states of workers that set out from a common one."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.scipy.sparse.linalg import cg

from fisherflow_jax import information as ops
from fisherflow_jax._ground import checks, linalg, trees
from fisherflow_jax._ground.warning import warn_once
from fisherflow_jax.flow import _belonging as belonging
from fisherflow_jax.flow import _evidence as evidence
from fisherflow_jax.flow import _nuisance as nuisances
from fisherflow_jax.flow._state import FlowState, belief_of
from fisherflow_jax.flow._step import believing
from fisherflow_jax.memories import Belief, Squares, age, remembers_all

# A relative residual above is not that of rounding, but of too few iterations.
_UNFINISHED = 1e-4


class _Minimum(NamedTuple):
    """Where a sum of quadratics is least.

    Attributes:
      step: from the common origin.
      information: the sum, in the structure.
      logdet: `()`, its log-determinant.
      helped: `()` int32, as `Regularised` has it.
      value: `()`, twice the sum at its minimum.
      residual: `()`, relative, of the equation; 0 where it is factorised.
    """

    step: Any
    information: Any
    logdet: jax.Array
    helped: jax.Array
    value: jax.Array
    residual: jax.Array


def merge(states: Sequence[FlowState], start: FlowState) -> FlowState:
    r"""Fuses workers that set out from the common state `start`, each on its own data.

    .. math:: I = I_s + \sum_k (I_k - I_s), \quad
       I \theta = I_s \theta_s + \sum_k (I_k \theta_k - I_s \theta_s)

    The prior, and all else that the workers share, counts once. Exact for a
    linear-Gaussian model: the state of one machine that saw all the data, in any order.
    Elsewhere each worker linearises along its own path; `ff.refine` removes what that
    costs. With exponential memory
    the workers run in parallel time, and the deltas are taken from the common state as
    it has aged since; they must have made the same number of updates (skipped batches
    are none; under jit, NaN if not). Its log-evidence is then the workers' own sum with
    the correction that is exact for stationary memory: approximate, and not a
    sequence's.

    A Kronecker structure keeps added factors; the mean is solved for with the sum of
    the operators, by at most 100 conjugate gradients which the added factors
    precondition, to a relative residual of 1e-6. Low-rank states are fused without loss
    and recompressed; what recompression moved between the diagonal and the directions
    can make a difference of states indefinite, so the sum's diagonal part is not let
    below that of `start`.

    Args:
      states: the workers' states; at least one.
      start: the state that all of them set out from.

    Returns:
      The fused state: mean, information, count, log-evidence, scores, dispersion and
      counters. Compensated pairs stay compensated. A worker that is not finite is left
      out, and counted in `num_skipped`; a residual above 1e-4 in
      `events.searches_unfinished`. Cost: a factorisation, a few products with each
      information, and as many for each conjugate gradient.

    Warns:
      ff.DataWarning: outside jit, where workers are left out.

    Raises:
      TypeError: for windowed, adaptive and random_walk memories, which do not merge.
      ValueError: without states; for states of another flow; for exponential memory
        where the workers did not make the same number of updates; where values are at
        hand, for a worker with fewer observations or updates than the start, or with
        another prior. A start that is older than the one the workers shared cannot be
        told from it: what they share beyond it counts once for each of them.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> flow = ff.fisher_flow(
      ...     lambda params, x: x * params,
      ...     ff.likelihoods.gaussian(),
      ...     structure=ff.structures.full(),
      ...     memory=ff.memories.stationary(),
      ...     prior_precision=1e-6,
      ... )
      >>> start = flow.init(jnp.array(0.0))
      >>> one, _ = flow.update(start, (jnp.ones(2), jnp.array([1.0, 3.0])))
      >>> two, _ = flow.update(start, (jnp.ones(2), jnp.array([5.0, 7.0])))
      >>> merged = ff.merge([one, two], start)
      >>> print(merged.mean.round(3), merged.count)
      4.0 4.0

    References:
      Smola, Vishwanathan, Eskin, "Laplace propagation", 2003.
    """
    states = list(states)
    if not states:
        raise ValueError("merge needs at least one worker's state; got none.")
    _check_kinds(states, start)
    steps = [state.step - start.step for state in states]
    same_time = _check_same_time(start.memory, steps)
    aged = age(start.memory, belief_of(start), steps[0])
    before = ops.regularised(aged.sums.curvature, aged.mean)
    begun = believing(start, aged, before.logdet)
    # in place of a worker that is not finite
    lost = begun._replace(num_skipped=begun.num_skipped + 1)
    taken = [trees.all_finite(s._replace(log_evidence=s.count)) for s in states]
    pairs = zip(taken, states, strict=True)
    states = [trees.where(sound, state, lost) for sound, state in pairs]
    if not checks.holds(jnp.stack(taken)):
        warn_once(
            start,
            f"workers left out, as not finite: {np.flatnonzero(~jnp.stack(taken))}.",
        )
    _check_start(states, start, aged)
    # a worker without an update may still hold the search's start
    beliefs = list(map(belief_of, states))
    moves = [aged.to(one.mean, one.rest) for one in beliefs]
    found = _minimum(
        aged.sums.curvature, [one.sums.curvature for one in beliefs], moves
    )
    if not checks.holds(trees.all_finite(found.step)):
        ops.solve(found.information, moves[0])  # which says where it is indefinite
    fused = believing(start, _believed(aged, beliefs, found), found.logdet)
    counted = [(s.num_skipped, s.events) for s in (start, *states)]
    num_skipped, events = _fused(counted[0], counted[1:])
    unfinished = (found.residual > _UNFINISHED).astype(found.helped.dtype)
    fused = fused._replace(
        information=ops.conform(start.information, fused.information),
        step=start.step + jnp.max(jnp.stack(steps)),
        num_skipped=num_skipped,
        events=events._replace(
            solves_regularised=events.solves_regularised + found.helped,
            searches_unfinished=events.searches_unfinished + unfinished,
        ),
        log_evidence=_log_evidence(fused, found.value, begun, states),
    )
    if start.nuisance is not None:
        own: Any = [state.nuisance for state in states]
        nuisance = nuisances.fuse(start.nuisance, start.count, own, steps[0])
        fused = fused._replace(nuisance=nuisance)
    # without any update the state may still hold the search's start: it keeps it
    fused = fused._replace(mean=trees.where(fused.step > 0, fused.mean, start.mean))

    def refuse(x: jax.Array) -> jax.Array:
        floating = jnp.issubdtype(x.dtype, jnp.floating)
        return jnp.where(same_time, x, jnp.nan).astype(x.dtype) if floating else x

    return jax.tree.map(refuse, fused)


def _believed(aged: Belief, beliefs: Sequence[Belief], found: _Minimum) -> Belief:
    """What the workers have gathered on top of the start, at the common minimum."""
    mean, rest = linalg.moved(aged.mean, aged.rest, found.step)
    plain = [one.sums._replace(curvature=(), quadratic=()) for one in (aged, *beliefs)]
    sums = _fused(plain[0], plain[1:])
    if sums.linear is not None:
        own = [one.own_squares(mean, rest) for one in (aged, *beliefs)]
        squares = sums.linear.penalised + found.value, _fused(own[0], own[1:])
        sums = sums._replace(linear=Squares(*squares))
    meats = zip(*(one.sums.quadratic for one in (aged, *beliefs)), strict=True)
    quadratic = tuple(ops.fuse(meat[0], meat[1:]) for meat in meats)
    sums = sums._replace(curvature=found.information, quadratic=quadratic)
    return Belief(mean, sums, aged.prior, rest)


def _fused(start: Any, values: Sequence[Any]) -> Any:
    """What all have gathered since the start, on top of it; leaf by leaf."""
    return jax.tree.map(lambda x, *y: x + sum(z - x for z in y), start, *values)


def _check_kinds(states: Sequence[FlowState], start: FlowState) -> None:
    for number, state in enumerate((start, *states)):
        if not isinstance(state, FlowState):
            raise TypeError(
                "a flow's states merge with the state that they set out from, members "
                f"of banks one by one; got {checks.described(state)} among them."
            )
        if differs := belonging.differences(state, start):
            raise ValueError(
                "the workers' states and the start must come from one flow; worker "
                f"{number - 1}'s is another than the start's: {'; '.join(differs)}."
            )


def _check_start(states: Sequence[FlowState], start: FlowState, aged: Belief) -> None:
    """Raises where a worker is seen not to have set out from the start."""
    for number, state in enumerate(states):
        if not checks.is_concrete((state, start)):
            return
        if state.step < start.step or (
            remembers_all(start.memory) and state.count < start.count
        ):
            raise ValueError(
                f"start has seen {start.count:g} observations in {start.step} updates,"
                f" and worker {number} {state.count:g} in {state.step}: it did not set "
                "out from this start. Give the state that all workers began with."
            )
        pairs = zip(*map(jax.tree.leaves, (state.prior, aged.prior)), strict=True)
        if not all(np.allclose(x, y, 1e-3, 1e-6) for x, y in pairs):
            raise ValueError(
                f"worker {number} has another prior than start, which would be counted "
                "as data. Give the state that all workers began with."
            )


def _check_same_time(memory: Any, steps: Sequence[jax.Array]) -> jax.Array:
    """Whether the workers may be merged; raises where the values are at hand."""
    same = jnp.all(jnp.stack(steps) == steps[0]) | remembers_all(memory)
    if not checks.holds(same):
        raise ValueError(
            "workers with exponential memory run in parallel time and merge after "
            f"the same number of updates; theirs are {[int(x) for x in steps]}."
        )
    return same


def _log_evidence(fused: FlowState, value: Any, begun: FlowState, states: Any) -> Any:
    """The workers' own sum with the correction of what they share."""
    before, after = begun.log_determinant, fused.log_determinant
    total = begun.log_evidence
    total = total + sum(state.log_evidence - total for state in states)
    if begun.residual is None:
        own = sum(state.log_determinant - before for state in states)
        return total + 0.5 * (before - after - value + own)
    Fitted, zero = evidence.Fitted, jnp.zeros_like(before)
    origin = Fitted(begun.residual, begun.count, before)

    def gain_of(state: FlowState) -> jax.Array:
        own = Fitted(state.residual, state.count, state.log_determinant)
        return evidence.unknown_dispersion(origin, own, zero)

    # what is left of a worker's gain is its targets' unit variances
    return total + gain_of(fused) - sum(map(gain_of, states))


# ---- a sum of quadratics


@functools.partial(jax.jit, static_argnames="most")
def _minimum(
    common: Any, parts: Sequence, moves: Sequence, most: int = 100
) -> _Minimum:
    r"""The minimum of what parts have beyond a common belief, and of that belief.

    .. math:: \tfrac12 |x|^2_{I_s} + \sum_k
       \tfrac12 \big( |x - d_k|^2_{I_k} - |x|^2_{I_s} \big)

    It is found as a step from the mean of the moves d_k, so that moves that agree lose
    no digits. A structure whose sums are not the operators' sums (Kronecker) gives the
    preconditioner of conjugate gradients on these, the belief's and what the parts add.

    Args:
      common: I_s, an information.
      parts: I_k, with the common belief in each.
      moves: d_k, from the mean of the common belief.
      most: conjugate gradients, at most.
    """
    information = ops.fuse(common, parts)
    factors = ops.regularised(information, moves[0])
    separate = not ops.facts(common).additive
    if separate:
        parts = [ops.add(part, ops.scale(common, -1.0)) for part in parts]
    centre = optax.tree.scale(1 / len(moves), _sum(moves))
    often = len(parts) - 1
    apart = [optax.tree.sub(move, centre) for move in moves]
    pull = _sum(list(map(ops.matvec, parts, apart)))
    shift = optax.tree.add_scale(pull, often, ops.matvec(common, centre))
    step, residual = factors.divide(shift), jnp.zeros_like(factors.logdet)
    if separate:

        def times(vector: Any) -> Any:
            return _sum([ops.matvec(each, vector) for each in (common, *parts)])

        step, _ = cg(times, shift, step, tol=1e-6, maxiter=most, M=factors.divide)
        left, whole = optax.tree.sub(shift, times(step)), trees.dot(shift, shift)
        residual = jnp.sqrt(trees.dot(left, left) / jnp.where(whole > 0, whole, 1.0))
    step = optax.tree.add(centre, step)
    left = [optax.tree.sub(step, move) for move in moves]
    value = -often * ops.quadratic_form(common, step)
    value = sum(map(ops.quadratic_form, parts, left), start=value)
    if separate:
        value = sum([ops.quadratic_form(common, x) for x in left], start=value)
    return _Minimum(step, information, factors.logdet, factors.helped, value, residual)


def _sum(vectors: Sequence[Any]) -> Any:
    return functools.reduce(optax.tree.add, vectors)
