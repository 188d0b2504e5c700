"""A state moved on without a search: by time alone, or by a mean found elsewhere."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from fisherflow_jax import information as ops
from fisherflow_jax._ground import batch as batches
from fisherflow_jax._ground import checks, choices, sharding, trees
from fisherflow_jax.accumulation import gathered
from fisherflow_jax.flow import _belonging as belonging
from fisherflow_jax.flow import _evidence as evidence
from fisherflow_jax.flow import _nuisance as nuisances
from fisherflow_jax.flow import _step as step
from fisherflow_jax.flow._recipe import Recipe
from fisherflow_jax.flow._state import Events, FlowState, belief_of, no_site
from fisherflow_jax.memories import Belief, Shift, Sum

PyTree = Any


def advance(
    recipe: Recipe,
    state: FlowState,
    batch: Any = None,
    steps: jax.typing.ArrayLike = 1,
) -> FlowState:
    """What the memory believes some updates later, if nothing is seen until then.

    Of each it is the state after an update whose batch is missing. Its mean and
    information are the anchor of the next task (`ff.continual`), and its predictions
    and intervals a forecast; `update` and `absorb` go on from the state before, since
    they advance it themselves.

    Args:
      state: of this flow.
      batch: for a memory whose noise or transition is a function of the batch.
      steps: how many updates, at least 0; may be traced.

    Returns:
      A state. Cost: that of the memory's own step, and a factorisation where it moves
      the information.

    Raises:
      ValueError: for negative steps; where values are at hand, for a prediction that
        is not finite.
    """
    belonging.check_kind(state)
    checks.not_negative(steps, "steps")
    if batch is not None:
        batch = batches.as_batch(batches.by_name(batch), values=False)
    arguments: tuple = (state, batch)
    if isinstance(steps, int) and steps == 1:  # no loop, so that it runs backwards too
        run = choices.compiled(recipe, _next)
    else:
        run = choices.compiled(recipe, _waited)
        arguments = *arguments, jnp.asarray(steps, jnp.int32)
    after = sharding.in_auto_mode(run, state, *arguments)
    if not checks.holds(after.num_skipped == state.num_skipped):
        raise ValueError(
            "what the memory predicts is not finite: its noise or transition is not, "
            "or is no variance, as of a time that goes backwards."
        )
    return after


def _waited(
    recipe: Recipe, state: FlowState, batch: Any, steps: jax.Array
) -> FlowState:
    belonging.check_state(recipe, state)

    def wait(_: Any, state: FlowState) -> FlowState:
        return _next(recipe, state, batch)

    return jax.lax.fori_loop(0, steps, wait, state)


def _next(recipe: Recipe, state: FlowState, batch: Any) -> FlowState:
    belonging.check_state(recipe, state)
    believed = belief_of(state)
    ahead = recipe.memory.predict(state.memory, believed, batch, believed.mean)
    logdet = step.logdet_of(ahead, believed, state.log_determinant)
    site = no_site(recipe, state.mean)
    if state.nuisance is not None:
        nuisance = nuisances.waited(recipe, state.nuisance, state.count, batch)
        state = state._replace(nuisance=nuisance)
    return _kept(recipe, state, ahead, logdet, site, jnp.zeros_like(state.count))


def _kept(
    recipe: Recipe,
    state: FlowState,
    belief: Belief,
    logdet: jax.Array,
    site: Sum,
    gain: jax.Array,
) -> FlowState:
    """The state that remembers a belief, with the site in it; without one that is not
    finite."""
    storage, kept, _ = recipe.memory.remember(state.memory, belief, site)
    logdet = step.logdet_of(kept, belief, logdet)
    sound = trees.all_finite((kept.mean, kept.sums.weight, logdet))
    return step.settle(state, kept, logdet, storage, gain, Events.none(), sound)


def absorb(
    recipe: Recipe,
    state: FlowState,
    mean: PyTree,
    information: Any,
    num_observations: jax.typing.ArrayLike,
    *,
    log_likelihood: jax.typing.ArrayLike = jnp.nan,
) -> FlowState:
    """An update whose mean a training loop has found, as `update` finds its own.

    The loop minimises the loss of the new data and the distance to what the memory
    believes next, `ff.continual.elastic_penalty(flow.advance(state), ...)`.

    Args:
      state: of this flow, before the data.
      mean: where training ended.
      information: of the data, a sum at that mean in the flow's structure, as
        `flow.evaluate` and `ff.accumulate` give it.
      num_observations: of the data.
      log_likelihood: of the data at that mean, for the evidence, which is otherwise NaN
        from here on.

    Returns:
      A state; under jit the one before, and a batch more skipped, where a value is not
      finite. Cost: two products with an information and a factorisation.

    Raises:
      ValueError: for a flow that keeps sums which the mean and information do not tell
        (an unknown dispersion, concentration or scale, `robust=True`); for a mean or an
        information that is not like the state's; and for values that are not finite,
        where they are at hand.
    """
    belonging.check_kind(state)
    _check_tells_all(recipe)
    mean = trees.widen(trees.real_arrays(mean, "mean"))
    trees.check_shapes(mean, state.mean, "the mean must be like the state's")
    information = gathered(information)
    checks.not_negative(num_observations, "num_observations")
    numbers = num_observations, log_likelihood
    dtype = state.count.dtype
    run = choices.compiled(recipe, _absorbed)
    given = state, mean, information, *(jnp.asarray(x, dtype) for x in numbers)
    after = sharding.in_auto_mode(run, state, *given)
    if not checks.is_traced(after) and after.num_skipped > state.num_skipped:
        raise ValueError(
            "the mean, the information, or the belief with them is not finite."
        )
    return after


def _check_tells_all(recipe: Recipe) -> None:
    unknown = recipe.likelihood.nuisance
    for asked, what in (
        (recipe.robust, "the squared scores of robust=True"),
        (recipe.estimates_dispersion, "the sums of squares of an unknown dispersion"),
        (unknown is not None, "what is known of the likelihood's other unknowns"),
    ):
        if asked:
            raise ValueError(
                f"this flow keeps {what}, which a mean and an information do not tell: "
                "take the data in by flow.update, or build the flow without."
            )


def _absorbed(
    recipe: Recipe,
    state: FlowState,
    mean: PyTree,
    information: Any,
    weight: jax.Array,
    log_likelihood: jax.Array,
) -> FlowState:
    belonging.check_state(recipe, state)
    site = step.kept(recipe, Sum(information, weight))
    own = jax.eval_shape(lambda: no_site(recipe, state.mean).curvature)
    if type(ops.plain(site.curvature)) is not type(own):
        raise ValueError(
            f"the flow keeps information as a {type(own).__name__}; got a "
            f"{type(site.curvature).__name__}."
        )
    rule = "the information is about other parameters than the mean"
    trees.check_shapes(ops.diagonal(site.curvature, mean), mean, rule)
    believed = belief_of(state)
    before = recipe.memory.predict(state.memory, believed, None, believed.mean)
    curvature = ops.plain(before.sums.curvature)
    mean = optax.tree.cast_like(mean, state.mean)
    rest = None if state.rest is None else optax.tree.zeros_like(mean)
    move = before.to(mean, rest)
    moved = ops.matvec(curvature, move)
    site = site._replace(linear=None)
    belief = before._replace(mean=mean, rest=rest, sums=before.sums.plus(site))
    whole = ops.regularised(belief.sums.curvature, mean).logdet
    logdets = step.logdet_of(before, believed, state.log_determinant), whole
    gain = evidence.known_dispersion(log_likelihood, trees.dot(move, moved), *logdets)
    site = site._replace(linear=Shift(moved))
    return _kept(recipe, state, belief, whole, site, gain)
