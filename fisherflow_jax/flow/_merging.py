"""Fusing the states of workers that set out from a common one."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fisherflow_jax import information as ops
from fisherflow_jax._ground import checks, linalg, trees
from fisherflow_jax.flow import _belonging as belonging
from fisherflow_jax.flow import _evidence as evidence
from fisherflow_jax.flow import _nuisance as nuisances
from fisherflow_jax.flow._state import FlowState, belief_of
from fisherflow_jax.memories import Belief, age, remembers_all


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

    Low-rank states are fused without loss and recompressed; what recompression moved
    between the diagonal and the directions can make a difference of states indefinite,
    so the sum's diagonal part is not let below that of `start`.

    Args:
      states: the workers' states; at least one.
      start: the state that all of them set out from.

    Returns:
      The fused state: mean, information, count, log-evidence, scores, dispersion and
      counters. Compensated pairs stay compensated. Cost: a solve and a factorisation
      for each worker.

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
    for number, state in enumerate((*states, start)):
        if not isinstance(state, FlowState):
            raise TypeError(
                "merge takes flows' states; merge the members of banks one by one. Got "
                f"{type(state).__name__}."
            )
        differs = belonging.differences(state, start)
        if differs:
            raise ValueError(
                "the workers' states and the start must come from one flow; worker "
                f"{number}'s is another than the start's: {'; '.join(differs)}."
            )
    steps = [state.step - start.step for state in states]
    same_time = _check_same_time(start.memory, steps)
    aged = age(start.memory, belief_of(start), steps[0])
    _check_start(states, start, aged)
    sums = aged.sums

    information = ops.fuse(sums.curvature, [s.information for s in states])
    # of the beliefs: a worker without an update may still hold the search's start
    beliefs = [belief_of(state) for state in states]
    moves = [aged.to(one.mean, one.rest) for one in beliefs]
    pulls = [
        ops.matvec(s.information, move) for s, move in zip(states, moves, strict=True)
    ]
    shift = functools.reduce(optax.tree.add, pulls)
    factors = ops.regularised(information, shift)
    step = factors.divide(shift)
    if not checks.holds(trees.all_finite(step)):
        ops.solve(information, shift)  # which says along what it is indefinite
    # of the summed quadratics at their common minimum, relative to the aged start
    squares = [trees.dot(m, p) for m, p in zip(moves, pulls, strict=True)]
    distance = sum(squares[1:], start=squares[0]) - trees.dot(step, shift)

    moved, rest = linalg.moved(aged.mean, aged.rest, step)
    residual = own_residual = None
    if start.residual is not None:
        residual = _fused(sums.linear.penalised, [s.residual for s in states])
        residual = residual + distance
        own = [one.own_squares(moved, rest) for one in beliefs]
        own_residual = _fused(aged.own_squares(moved, rest), own)
    meat = None
    if start.meat is not None:
        meat = ops.fuse(sums.quadratic[0], [s.meat for s in states])
    clusters = None
    if start.clusters is not None:
        clusters = _fused(sums.scores, [s.clusters for s in states])
    nuisance = None
    if start.nuisance is not None:
        learned: list[Any] = [state.nuisance for state in states]
        nuisance = nuisances.fuse(start.nuisance, start.count, learned, steps[0])
    steps_taken = jnp.max(jnp.stack(steps))
    # without any update the state may still hold the search's start: it keeps it
    mean = trees.where(start.step + steps_taken > 0, moved, start.mean)
    events = _fused(start.events, [s.events for s in states])
    helped = events.solves_regularised + factors.helped
    fused = start._replace(
        mean=mean,
        rest=rest,
        information=ops.conform(start.information, information),
        count=_fused(sums.weight, [s.count for s in states]),
        meat=meat,
        clusters=clusters,
        residual=residual,
        own_residual=own_residual,
        nuisance=nuisance,
        prior=aged.prior,
        step=start.step + steps_taken,
        num_skipped=_fused(start.num_skipped, [s.num_skipped for s in states]),
        events=events._replace(solves_regularised=helped),
        log_determinant=factors.logdet,
    )
    gain = _log_evidence(fused, distance, aged, start, states)
    fused = fused._replace(log_evidence=gain)

    def refuse(x: jax.Array) -> jax.Array:
        floating = jnp.issubdtype(x.dtype, jnp.floating)
        return jnp.where(same_time, x, jnp.nan).astype(x.dtype) if floating else x

    return jax.tree.map(refuse, fused)


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
                "out from this start, whose data would be counted wrongly. Give the "
                "state that all workers began with."
            )
        pairs = zip(*map(jax.tree.leaves, (state.prior, aged.prior)), strict=True)
        if not all(np.allclose(x, y, 1e-3, 1e-6) for x, y in pairs):
            raise ValueError(
                f"worker {number} has another prior than start: it did not set out "
                "from it, and its prior would be counted as data. Give the state that "
                "all workers began with."
            )


def _fused(start: Any, values: Sequence[Any]) -> Any:
    """What all have gathered since the start, on top of it; leaf by leaf."""

    def fuse(start: jax.Array, *values: jax.Array) -> jax.Array:
        deltas = [value - start for value in values]
        return start + sum(deltas[1:], start=deltas[0])

    return jax.tree.map(fuse, start, *values)


def _check_same_time(memory: Any, steps: Sequence[jax.Array]) -> jax.Array:
    """Whether the workers may be merged; raises where the values are at hand."""
    same = jnp.all(jnp.stack(steps) == steps[0])
    if remembers_all(memory):
        return jnp.ones_like(same)
    if checks.is_concrete(steps):
        counts = [int(step) for step in steps]
        if len(set(counts)) > 1:
            raise ValueError(
                "workers with exponential memory run in parallel time and merge after "
                f"the same number of updates; theirs are {counts}."
            )
    return same


def _log_evidence(
    fused: FlowState,
    distance: jax.Array,
    aged: Belief,
    start: FlowState,
    states: Sequence[FlowState],
) -> jax.Array:
    mean, sums = start.mean, aged.sums
    before = ops.regularised(sums.curvature, mean).logdet
    after = fused.log_determinant
    total = start.log_evidence
    if start.residual is None:
        gain = 0.5 * (before - after - distance)
        for state in states:
            own = state.log_determinant
            gain = gain + (state.log_evidence - start.log_evidence)
            gain = gain + 0.5 * (own - before)
        return total + gain
    Fitted, zero = evidence.Fitted, jnp.zeros_like(before)
    origin = Fitted(sums.linear.penalised, sums.weight, before)

    def gain_of(state: FlowState, logdet: jax.Array) -> jax.Array:
        own = Fitted(state.residual, state.count, logdet)
        return evidence.unknown_dispersion(origin, own, zero)

    total = total + gain_of(fused, after)
    for state in states:
        # what is left of a worker's gain is its targets' unit variances
        own = state.log_determinant
        gain = state.log_evidence - start.log_evidence
        total = total + gain - gain_of(state, own)
    return total
