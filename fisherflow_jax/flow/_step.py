"""The update of a flow: predict, fit, add the site, weigh, remember, settle."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from fisherflow_jax import information as ops
from fisherflow_jax import model
from fisherflow_jax._ground import batch as batches
from fisherflow_jax._ground import checks, choices, keys, linalg, sharding, trees
from fisherflow_jax.flow import _averaging as averaging
from fisherflow_jax.flow import _belonging as belonging
from fisherflow_jax.flow import _evidence as evidence
from fisherflow_jax.flow import _few as few
from fisherflow_jax.flow import _marginal as marginal
from fisherflow_jax.flow import _newton as newton
from fisherflow_jax.flow import _nuisance as nuisances
from fisherflow_jax.flow import _robust as robust
from fisherflow_jax.flow._newton import Solution
from fisherflow_jax.flow._objective import objective_of
from fisherflow_jax.flow._recipe import Observed, Recipe, log_prior_of, parameters
from fisherflow_jax.flow._state import Events, FlowInfo, FlowState, belief_of
from fisherflow_jax.layers import deciding
from fisherflow_jax.memories import Belief, Shift, Squares, Sum

PyTree = Any


@checks.called_as(
    "flow.update(state, batch), and (inputs, targets) is one batch: "
    "flow.update(state, (X, y))"
)
def update(
    recipe: Recipe,
    state: FlowState,
    batch: Any,
    *,
    num_steps: int | None = None,
    log_prior: Callable[[PyTree], jax.Array] | None = None,
) -> tuple[FlowState, FlowInfo]:
    """A batch taken in: `(state, info)`."""
    belonging.check_kind(state)
    given = batches.by_name(batch)
    batch = _checked(recipe, given)
    # compiled once a recipe and shape, so that a plain Python loop over a data loader
    # does not trace its searches anew at each batch
    steps = recipe.num_steps if num_steps is None else num_steps
    run = choices.compiled(recipe, take_in, static_argnums=(2, 3))
    prior = None if log_prior is None else log_prior_of(log_prior, state.mean)
    told = (None, None) if prior is None else prior
    after, info = deciding(
        lambda: sharding.in_auto_mode(
            lambda state, batch, arrays: run(state, batch, steps, told[0], arrays),
            (state, state.step),
            *(state, batch, told[1]),
        ),
        model.plain(recipe.apply_fn),
        lambda: (state.mean, batch.inputs),
    )
    check_taken_in(recipe, state, given, info)
    return after, info


def take_over(
    recipe: Recipe, state: FlowState, batch: batches.Batch
) -> tuple[FlowState, FlowInfo]:
    """`update` in the memory of a state that is not used again; its info tells all."""
    run = choices.compiled(recipe, _take_over, donate_argnums=0)
    return deciding(
        lambda: run(state, batch),
        model.plain(recipe.apply_fn),
        lambda: (state.mean, batch.inputs),
    )


def _take_over(
    recipe: Recipe, state: FlowState, batch: batches.Batch
) -> tuple[FlowState, FlowInfo]:
    return take_in(recipe, state, _checked(recipe, batch), recipe.num_steps)


def _checked(recipe: Recipe, given: batches.Batch) -> batches.Batch:
    if given.targets is None:
        raise ValueError("a flow learns from targets; the batch's are None.")
    batch = batches.as_arrays(given, values=False)
    robust.check_clusters(recipe, batch)
    return batch


def take_in(
    recipe: Recipe,
    state: FlowState,
    batch: batches.Batch,
    num_steps: int,
    log_prior: Callable | None = None,
    arrays: Any = None,
) -> tuple[FlowState, FlowInfo]:
    """A batch taken in; `log_prior`, of arrays and parameters, enters its search."""
    belonging.check_state(recipe, state)
    key = None
    if state.key is not None:
        key = jax.random.fold_in(keys.typed_key(state.key), state.step)
    recipe = recipe.traced_once()
    batch, rows_skipped = recipe.model.screen(state.mean, batch)(batch)
    batch, unknown = robust.known_clusters(recipe, batch)
    rows_skipped = rows_skipped + unknown
    prior = None if log_prior is None else model.Traced(log_prior, arrays)
    observed = Observed(recipe, batch, key, prior)
    believed = belief_of(state)
    predicted = recipe.memory.predict(state.memory, believed, batch, believed.mean)
    start = state.mean  # also where the memory does not move what is believed
    if predicted.mean is not believed.mean:
        start = trees.where(state.step > 0, predicted.mean, state.mean)

    ahead = observed
    if state.nuisance is not None:
        ahead = nuisances.known(observed, state.nuisance.mean)
    observed, solution, nuisance = search(observed, state, predicted, start, num_steps)
    averaged, solution = spread(observed, predicted, solution, num_steps)
    started = state.count > 0
    site, belief, distance = include(observed, averaged, predicted, solution, started)
    # of the beliefs before and with the batch, known where nothing has moved them since
    before, whole = jnp.zeros_like(solution.logdet), solution.logdet
    if solution.pull is None:  # else what is told is by how much it grows
        before = logdet_of(predicted, believed, state.log_determinant)
        whole = logdet_of(belief, None if recipe.marginal else belief, whole)
    gain = log_evidence(observed, predicted, belief, distance, (before, whole))
    if nuisance is not None:
        gain = gain + nuisance.gain
    storage, kept, report = recipe.memory.remember(state.memory, belief, site)
    logdet, belief = logdet_of(kept, belief, whole), kept

    # a curvature that is not finite has no finite determinant
    squared = [ops.diagonal(x, belief.mean) for x in belief.sums.quadratic]
    rest = belief.sums.weight, belief.sums.linear, belief.sums.scores, squared
    own = None if nuisance is None else nuisance.state.mean
    finite = trees.all_finite((belief.mean, gain, logdet, rest, own))
    if state.log_determinant is None:
        finite &= ops.is_finite(belief.sums.curvature)
    sound = jnp.isfinite(jnp.sum(batch.weights)) & finite
    missing, nothing = ~jnp.any(batch.weights > 0), jnp.zeros_like(solution.decrement)
    info = FlowInfo(
        log_likelihood=_foretold(ahead, state, believed, predicted),
        log_evidence=trees.where(sound, gain, jnp.zeros_like(gain)),
        step_size=solution.step_size,
        decrement=trees.where(missing, nothing, solution.decrement),
        rows_skipped=rows_skipped,
        skipped=~sound,
        missing=missing,
        memory=report,
        output_deviation=averaged.widest,
    )
    events = Events(rows_skipped, solution.helped, solution.unfinished)
    after = settle(state, belief, logdet, storage, gain, events, sound)
    if nuisance is not None and state.nuisance is not None:
        kept = trees.where(sound, nuisance.state, state.nuisance)
        after = after._replace(nuisance=kept)
    return after, info


def _foretold(
    ahead: Observed, state: FlowState, believed: Belief, predicted: Belief
) -> jax.Array:
    """The log-likelihood at the predicted mean."""
    still = predicted.mean is believed.mean
    if not still or trees.size(state.mean) < newton.MANY:
        return ahead.log_likelihood(predicted.mean)
    # one pass over one of them, in place of making the mean that is believed of both
    return jax.lax.cond(
        state.step > 0,
        lambda: ahead.log_likelihood(state.mean),
        lambda: ahead.log_likelihood(state.prior.origin),
    )


def logdet_of(
    belief: Belief, other: Belief | None, known: jax.Array | None
) -> jax.Array:
    """The log-determinant of a belief's information: `known`, if that of `other` is."""
    information = belief.sums.curvature
    if known is not None and other is not None and information is other.sums.curvature:
        return known
    return ops.regularised(information, belief.mean).logdet


def search(
    observed: Observed,
    state: FlowState,
    predicted: Belief,
    start: PyTree,
    num_steps: int,
) -> tuple[Observed, Solution, nuisances.Known | None]:
    """The solution, and what it knows of the likelihood."""
    started = state.count > 0
    if state.nuisance is None:
        return observed, fit(observed, predicted, start, num_steps, started), None

    def fit_mean(given: Observed, start: PyTree) -> Solution:
        return fit(given, predicted, start, num_steps, started, once=True)

    return nuisances.fit(
        observed, state.nuisance, state.count, predicted, fit_mean, start, num_steps
    )


def fit(
    observed: Observed,
    predicted: Belief,
    start: PyTree,
    num_steps: int,
    started: jax.Array,
    *,
    once: bool = False,
) -> Solution:
    """The least of the batch's loss and the distance to the belief before it."""
    if num_steps == 1 and few.are_seen(observed, predicted):
        return few.single_step(observed, predicted, start)
    objective = objective_of(
        observed.log_density,
        observed.information,
        predicted.mean,
        ops.plain(predicted.sums.curvature),
        predicted.rest,
    )
    if num_steps == 1:
        return newton.single_step(objective, start, predicted.rest)
    # a first search sets out from a guess: it goes on until it is done
    first = max(num_steps, newton.FIRST_STEPS)
    start = jax.lax.stop_gradient(start)
    steps = jnp.where(started, num_steps, first)
    once = once or trees.size(start) >= newton.MANY
    return newton.damped_newton(objective, start, steps, predicted.rest, once=once)


def spread(
    observed: Observed, predicted: Belief, solution: Solution, num_steps: int
) -> tuple[Observed, Solution]:
    """The batch averaged over the belief with it, and the solution of that.

    From the solution at the mean: a search for the mean of an average over a spread
    that stays, and the spread anew, by turns. Without an expectation as it is.
    """
    recipe, before = observed.recipe, ops.plain(predicted.sums.curvature)
    if recipe.expectation is None:
        return observed, solution

    def around(solution: Solution) -> Observed:
        total = ops.add(solution.information, before)
        return averaging.around(observed, total, solution.mean)

    def refresh(found: Solution, _: None) -> tuple[Solution, None]:
        yes = jnp.ones((), bool)
        after = fit(around(found), predicted, found.mean, num_steps, yes)
        return after._replace(helped=found.helped + after.helped), None

    # what no refresh changes has one type from the start
    solution, _ = jax.lax.scan(refresh, solution, length=recipe.num_refreshes)
    return around(solution), solution


def include(
    observed: Observed,
    averaged: Observed,
    predicted: Belief,
    solution: Solution,
    started: jax.Array,
) -> tuple[Sum, Belief, jax.Array]:
    """The batch's site, the belief that includes it, and how far its mean moved.

    That is the squared length by the information before. `averaged` is what was solved.
    """
    recipe, sums, mean = observed.recipe, predicted.sums, solution.mean
    rest = solution.rest
    weight = observed.num_observations.astype(sums.weight.dtype)
    site = Sum(curvature=solution.information, weight=weight)
    if recipe.robust:
        # the first batch's scores are taken at its solution: the start says nothing
        at = trees.where(started, predicted.mean, mean)
        site = robust.with_scores(observed, site, at)
    if recipe.marginal:
        score = jax.grad(averaged.log_density)(solution.at)
        site, own = marginal.project(recipe.structure, site, score, solution.at)
        pull = ops.matvec(site.curvature, optax.tree.sub(own, predicted.mean))
        total = ops.add(site.curvature, ops.plain(sums.curvature))
        step = ops.solve(total, pull)
        mean, rest = linalg.moved(predicted.mean, predicted.rest, step)
    move, moved = predicted.to(mean, rest), solution.pull
    if moved is None:
        moved = ops.matvec(ops.plain(sums.curvature), move)
    distance = trees.dot(move, moved)
    squares = growth = None
    if recipe.likelihood.pearson is not None:
        squares = observed.total(recipe.likelihood.pearson, mean)
        own = squares + predicted.own_squares(mean, rest) - sums.linear.own
        growth = Squares(squares + distance, own)
    site = site._replace(linear=growth)
    belief = predicted._replace(mean=mean, rest=rest, sums=sums.plus(site))
    # by difference, so that I theta = I^- theta^- + F theta + shift holds for every
    # structure and any number of steps
    return site._replace(linear=Shift(moved, squares)), belief, distance


def log_evidence(
    observed: Observed,
    predicted: Belief,
    belief: Belief,
    distance: jax.Array,
    logdets: tuple[jax.Array, jax.Array],
) -> jax.Array:
    """What the batch adds to the log-evidence, `()`; `logdets`: before and after."""
    recipe, mean = observed.recipe, belief.mean
    before, after = predicted.sums, belief.sums
    if recipe.likelihood.log_unit_variance is None:
        averaged = averaging.around(observed, after.curvature, mean)
        value = averaged.log_likelihood(mean).astype(distance.dtype)
        if recipe.expectation is None:
            return evidence.known_dispersion(value, distance, *logdets)
        whole = ops.plain(after.curvature)
        effective = ops.effective(whole, ops.plain(before.curvature), mean)
        return evidence.bound(value, distance, *logdets, effective)
    return evidence.unknown_dispersion(
        evidence.Fitted(before.linear.penalised, before.weight, logdets[0]),
        evidence.Fitted(after.linear.penalised, after.weight, logdets[1]),
        observed.log_unit_variance(mean),
    )


def settle(
    state: FlowState,
    belief: Belief,
    logdet: jax.Array,
    storage: Any,
    gain: jax.Array,
    events: Events,
    sound: jax.Array,
) -> FlowState:
    """The state after the batch, or before it and a batch skipped."""
    after = believing(state, belief, logdet)._replace(
        log_evidence=state.log_evidence + gain,
        memory=storage,
        step=state.step + 1,
        events=optax.tree.add(state.events, events),
    )
    skipped = state._replace(num_skipped=state.num_skipped + 1)
    # in the state's types, whatever those of the data
    after = jax.tree.map(lambda x, like: x.astype(like.dtype), after, state)
    return trees.where(sound, after, skipped)


def believing(state: FlowState, belief: Belief, logdet: jax.Array) -> FlowState:
    """The state with what it believes replaced."""
    squares = belief.sums.linear
    return state._replace(
        mean=belief.mean,
        rest=belief.rest,
        information=belief.sums.curvature,
        log_determinant=None if state.log_determinant is None else logdet,
        count=belief.sums.weight,
        meat=belief.sums.quadratic[0] if belief.sums.quadratic else None,
        clusters=belief.sums.scores or None,
        residual=None if squares is None else squares.penalised,
        own_residual=None if squares is None else squares.own,
        prior=belief.prior,
    )


def evaluate(
    recipe: Recipe,
    params: PyTree,
    batch: Any,
    key: Any = None,
    nuisance: Any = None,
    *,
    around: Any = None,
) -> tuple[jax.Array, PyTree, Any]:
    """`(log-likelihood, score, information)` of a batch at `params`, sums.

    `around`: an information, for the averages of the flow's expectation over
    `N(params, around^-1)`; None: at the parameters themselves.

    `nuisance`: `state.nuisance.mean`, where the likelihood leaves something unknown.
    """
    given, params = batches.by_name(batch), parameters(params, "params")
    batch = batches.as_batch(given, values=False)
    typed = None if key is None else keys.typed_key(key)
    run = choices.compiled(recipe, measure)
    number = jnp.zeros(())
    like = (number, params, number), number  # the information is whole on each device
    found, rows_skipped = deciding(
        lambda: sharding.in_auto_mode(
            run, like, params, batch, typed, nuisance, around
        ),
        model.plain(recipe.apply_fn),
        lambda: (params, batch.inputs),
    )
    told = recipe.bad_rows == "raise" and not checks.is_traced((rows_skipped, given))
    if told and (rows_skipped or not checks.holds(jnp.isfinite(found[0]))):
        recipe.model.screen(params, batch).refuse(given)
    return found


def measure(
    recipe: Recipe,
    params: PyTree,
    batch: batches.Batch,
    key: jax.Array | None,
    nuisance: Any,
    around: Any,
) -> tuple[tuple[jax.Array, PyTree, Any], jax.Array]:
    """What `evaluate` gives, and how many rows were left out."""
    recipe = recipe.traced_once()
    batch, rows_skipped = recipe.model.screen(params, batch)(batch)
    observed = Observed(recipe, batch, key)
    if nuisance is not None:
        observed = nuisances.known(observed, nuisance)
    if around is not None:
        observed = averaging.around(observed, around, params)
    value, score = jax.value_and_grad(observed.log_likelihood)(params)
    return (value, score, observed.information(params)), rows_skipped


def project(recipe: Recipe, information: Any) -> Any:
    """What a state keeps of a summed information."""
    return kept(recipe, Sum(information, jnp.zeros(()))).curvature


def kept(recipe: Recipe, sums: Sum) -> Sum:
    """What a state keeps of sums as batches were measured."""
    return marginal.kept(recipe.structure, sums) if recipe.marginal else sums


def check_taken_in(
    recipe: Recipe,
    state: FlowState,
    given: batches.Batch,
    info: FlowInfo,
    where: str = "the batch",
) -> None:
    """Raises where an update is seen to have failed (not under jit), saying why."""
    if checks.is_traced((info, given)):
        return
    refused = recipe.bad_rows == "raise" and bool(info.rows_skipped)
    if not refused and not info.skipped:
        return
    batch = batches.as_batch(given, values=False)
    screen = recipe.model.screen(state.mean, batch)
    screen.refuse(given, where)
    if info.skipped:
        # a memory's functions of the batch say here what is wrong with their values
        recipe.memory.predict(state.memory, belief_of(state), batch, state.mean)
        recipe.model.check(state.mean, batch)
        recipe.check_root(state.mean, batch)
        outputs = recipe.apply_fn(state.mean, batches.unshare(batch.inputs))
        made = outputs, recipe.likelihood.at_start.log_prob(outputs, batch.targets)
        screen.refuse_made(batch, made, where)
        raise ValueError(
            f"{where} has a log-likelihood, an information or an updated belief that "
            "is not finite, for an overflow or an information that is not positive "
            "definite in this precision (under jit it would be skipped and counted)."
        )
