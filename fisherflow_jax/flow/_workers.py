"""Workers of a flow that set out from one state, fused."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fisherflow_jax import information as ops
from fisherflow_jax._ground import checks, linalg, trees
from fisherflow_jax.flow import _belonging as belonging
from fisherflow_jax.flow import _evidence as evidence
from fisherflow_jax.flow import _nuisance as nuisances
from fisherflow_jax.flow._quadratics import UNFINISHED, Minimum, minimum
from fisherflow_jax.flow._state import FlowState, belief_of
from fisherflow_jax.flow._step import believing
from fisherflow_jax.memories import Belief, Squares, age, remembers_all

PyTree = Any


class _Seen(NamedTuple):
    """What is refused where the values are at hand; each `()` or `(workers,)` bool."""

    same_time: jax.Array
    before_start: jax.Array
    beside_start: jax.Array
    same_prior: jax.Array
    finite: jax.Array


def fuse(states: Sequence[FlowState], start: FlowState) -> tuple:
    """The fused state, which workers were taken in, and the relative residual."""
    _check_kinds(states, start)
    *fused, seen = _fuse(states, start)
    if checks.is_concrete(seen):
        _check_values(states, start, seen)
        if not seen.finite:
            # which says where it is indefinite
            ops.solve(ops.plain(fused[0].information), start.mean)
    return tuple(fused)


@jax.jit
def _fuse(states: Sequence[FlowState], start: FlowState) -> tuple:
    steps = [state.step - start.step for state in states]
    same_time = jnp.all(jnp.stack(steps) == steps[0]) | remembers_all(start.memory)
    aged = age(start.memory, belief_of(start), steps[0])
    logdet = ops.regularised(aged.sums.curvature, aged.mean).logdet
    begun = believing(start, aged, logdet)
    # in place of a worker that is not finite
    lost = begun._replace(num_skipped=begun.num_skipped + 1)
    taken = [trees.all_finite(s._replace(log_evidence=s.count)) for s in states]
    pairs = zip(taken, states, strict=True)
    states = [trees.where(sound, state, lost) for sound, state in pairs]
    # a worker without an update may still hold the search's start
    beliefs = list(map(belief_of, states))
    moves = [aged.to(one.mean, one.rest) for one in beliefs]
    found = minimum(aged.sums.curvature, [one.sums.curvature for one in beliefs], moves)
    believed = _believed(aged, beliefs, found)
    fused = believing(start, believed, found.logdet)
    counted = [(s.num_skipped, s.events) for s in (start, *states)]
    num_skipped, events = _fused(counted[0], counted[1:])
    unfinished = (found.residual > UNFINISHED).astype(found.helped.dtype)
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

    seen = _Seen(
        same_time=same_time,
        before_start=jnp.stack([_is_before(state, start) for state in states]),
        beside_start=jnp.stack(
            [s & _is_beside(x, start) for s, x in zip(taken, states, strict=True)]
        ),
        same_prior=jnp.stack([_is_close(state.prior, aged.prior) for state in states]),
        finite=trees.all_finite(found.step),
    )
    return jax.tree.map(refuse, fused), taken, found.residual, seen


def _believed(aged: Belief, beliefs: Sequence[Belief], found: Minimum) -> Belief:
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
    if start is None:
        raise TypeError(
            "a flow's states merge with the state that they set out from, and none was "
            "given: ff.merge([a, b], flow.init(params)), or the later state that all "
            "of them began with."
        )
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


def _is_before(state: FlowState, start: FlowState) -> jax.Array:
    """Whether a worker has seen less than what it set out from."""
    fewer = remembers_all(start.memory) & (state.count < start.count)
    return (state.step < start.step) | fewer


def _is_beside(state: FlowState, start: FlowState) -> jax.Array:
    """Whether a worker is another state than the start, of no update since."""
    pairs = zip(*map(jax.tree.leaves, (state.mean, start.mean)), strict=True)
    same = jnp.all(jnp.stack([jnp.array_equal(x, y) for x, y in pairs]))
    return (start.step > 0) & (state.step == start.step) & ~same


def _is_close(one: PyTree, other: PyTree) -> jax.Array:
    pairs = zip(*map(jax.tree.leaves, (one, other)), strict=True)
    return jnp.all(jnp.stack([jnp.allclose(x, y, 1e-3, 1e-6) for x, y in pairs]))


def _check_values(states: Sequence[FlowState], start: FlowState, seen: _Seen) -> None:
    """Raises where a worker is seen not to have set out from the start."""
    if not seen.same_time:
        steps = [int(state.step - start.step) for state in states]
        raise ValueError(
            "workers with exponential memory run in parallel time and merge after "
            f"the same number of updates; theirs are {steps}."
        )
    for number, state in enumerate(states):
        if seen.before_start[number]:
            raise ValueError(
                f"start has seen {start.count:g} observations in {start.step} updates,"
                f" and worker {number} {state.count:g} in {state.step}: it did not set "
                "out from this start. Give the state that all workers began with."
            )
        if seen.beside_start[number]:
            raise ValueError(
                f"start has made {start.step} updates, and so has worker {number}, "
                "with another mean: it did not set out from this start, whose data "
                "would be lost. Give the state that all workers began with, such as "
                "flow.init(params)."
            )
        if not seen.same_prior[number]:
            raise ValueError(
                f"worker {number} has another prior than start, which would be counted "
                "as data. Give the state that all workers began with."
            )


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
