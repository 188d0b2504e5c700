"""Before and after the stream: a first batch solved whole, a last global step."""

import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from fisherflow_jax import information as ops
from fisherflow_jax._ground import checks, keys, linalg, trees
from fisherflow_jax._ground.batch import Batch
from fisherflow_jax._ground.choices import compiled
from fisherflow_jax.accumulation import converted
from fisherflow_jax.flow import _belonging as belonging
from fisherflow_jax.flow import _evidence as evidence
from fisherflow_jax.flow import _nuisance as nuisances
from fisherflow_jax.flow._recipe import Observed, Recipe, num_observations
from fisherflow_jax.flow._robust import check_clusters, known_clusters, with_scores
from fisherflow_jax.flow._state import FisherFlow, FlowState
from fisherflow_jax.flow._step import kept
from fisherflow_jax.memories import Prior, Squares, Sum, remembers_all

PyTree = Any

_WARM_START_STEPS = 50
_SHORT = 0.1  # posterior standard deviations


def warm_start(flow: FisherFlow, state: FlowState, batch: Any) -> FlowState:
    r"""Solves a first batch to convergence, before streaming.

    One Newton step from a cold start can land anywhere for a Poisson or gamma model,
    and its information, taken there, stays in the sum. Twenty rows a parameter (or two
    batches, if that is more) are enough.

    Args:
      flow: from `ff.fisher_flow`.
      state: usually `flow.init(params)`.
      batch: the first rows, `(inputs, targets)` or with weights.

    Returns:
      The state after the batch, as `flow.update` with at most 50 damped Newton steps
      gives it. Cost: an information and a gradient a step, about 5 to 10 in practice.

    Warns:
      UserWarning: outside jit, if the steps did not converge.

    Raises:
      ValueError: as `flow.update` does, outside jit also where the solution is not
        finite (under jit: counted in `state.num_skipped`).

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> flow = ff.fisher_flow(
      ...     lambda params, x: x * params,
      ...     ff.likelihoods.poisson(),
      ...     structure=ff.structures.full(),
      ...     memory=ff.memories.stationary(),
      ...     prior_precision=1e-4,
      ... )
      >>> state = flow.init(jnp.array(0.0))
      >>> batch = (jnp.ones(4), jnp.array([2.0, 4.0, 3.0, 3.0]))
      >>> state = ff.warm_start(flow, state, batch)
      >>> print(jnp.exp(state.mean).round(2))  # the mean count
      3.0

    References:
      Luo, Song, "Renewable estimation and incremental inference in generalized linear
      models with streaming data sets", 2020.
    """
    belonging.check_flow(flow)
    after, info = flow.update(state, batch, num_steps=_WARM_START_STEPS)
    members = getattr(info, "members", (info,))
    for member in members:
        length = jnp.sqrt(member.decrement)
        if checks.is_concrete(length) and bool(length > _SHORT):
            warnings.warn(
                f"warm_start did not converge: the last of at most "
                f"{_WARM_START_STEPS} Newton steps was {float(length):.1g} posterior "
                "standard deviations long; start "
                "nearer to the solution, or with a larger prior precision.",
                stacklevel=2,
            )
    return after


def refine(
    flow: FisherFlow,
    state: FlowState,
    batches: Any,
    *,
    to_batch: Callable[[Any], Any] | None = None,
) -> FlowState:
    r"""One more global Newton step over stored data.

    .. math:: \theta \leftarrow \theta + \Big(I_0 + \sum_t F_t(\theta)\Big)^{-1}
       \Big(\sum_t s_t(\theta) - I_0 (\theta - \theta_0)\Big)

    A one-pass estimate is within a fraction of a standard error of the batch fit; one
    step with every score taken at the same point removes nearly all of that.

    Args:
      flow: the flow that made the state.
      state: the state after the stream; stationary memory. The step is not damped: far
        from the solution it may overshoot.
      batches: all the data, once: a stacked batch (a tuple of arrays with leaves
        `(num_batches, n, ...)`, as `lax.scan` takes it) or any other iterable of
        batches (a list, a data loader; sizes may differ).
      to_batch: makes a batch of what a loader gives, if it is none: of dicts, `lambda
        item: (item["x"], item["y"])`.

    Returns:
      The state with mean, information, count and log-evidence of the step. The
      information is that of the point from which the step was taken, the sums of
      squares of an unknown dispersion follow the step from there, and what else the
      likelihood leaves unknown takes a step of its own. The scores for `robust=True`
      are taken anew, at the refined mean. Cost: one pass, with `robust=True` two.

    Raises:
      ValueError: for a memory other than stationary, and for no batches at all; with
        `robust=True` for an iterator, which gives its batches only once.
      TypeError: for a bank's state.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> flow = ff.fisher_flow(
      ...     lambda params, x: x * params,
      ...     ff.likelihoods.poisson(),
      ...     structure=ff.structures.full(),
      ...     memory=ff.memories.stationary(),
      ...     prior_precision=1e-4,
      ...     num_steps=1,
      ... )
      >>> data = [(jnp.ones(2), jnp.array([2.0, 4.0]))]
      >>> state, _ = flow.update(flow.init(jnp.array(1.0)), data[0])
      >>> print(jnp.exp(state.mean).round(3))  # one step falls short of the mean, 3
      3.015
      >>> print(jnp.exp(ff.refine(flow, state, data).mean).round(3))
      3.0

    References:
      Le Cam, "On the asymptotic theory of estimation and testing hypotheses", 1956.
    """
    belonging.check_flow(flow)
    recipe, batches = flow.recipe, converted(batches, to_batch)
    _check_refined(recipe, state, batches)
    logs = None if state.nuisance is None else state.nuisance.mean

    def add_batch(sums: Any, batch: Any, index: jax.Array) -> Any:
        key = None
        if state.key is not None:
            key = jax.random.fold_in(keys.typed_key(state.key), state.step + index)
        batch = _read(recipe, state.mean, batch)
        count = num_observations(recipe, batch).astype(state.count.dtype)
        own: Any = ()
        if logs is not None or state.residual is not None:
            own = compiled(recipe, _of_likelihood)(batch, state.mean, logs)
        measured = flow.evaluate(state.mean, batch, key, logs)
        *numbers, information = (own, count, *measured)
        if sums is None:
            return numbers, information
        return optax.tree.add(sums[0], numbers), ops.add(sums[1], information)

    (own, count, value, score), measured = _sum_over(add_batch, batches)
    prior = state.prior
    information = ops.add(measured, prior.precision)
    _check_finite((score, information))  # a solve would say less of the reason
    offset = optax.tree.sub(state.mean, prior.origin)
    pull = ops.matvec(prior.precision, offset)
    gradient = optax.tree.sub(score, pull)
    step = ops.solve(information, gradient)
    log_evidence, logdet = state.log_evidence, ops.logdet(information, offset)
    if state.residual is None:  # Laplace's integral over all data at once
        log_evidence = evidence.known_dispersion(
            value + 0.5 * trees.dot(gradient, step),
            trees.dot(offset, pull),
            ops.logdet(prior.precision, offset),
            logdet,
        ).astype(log_evidence.dtype)
    none = None if state.rest is None else optax.tree.zeros_like(state.rest)
    mean, rest = linalg.moved(state.mean, none, step)
    sums = Sum(information, count)
    squares = nuisance = None
    if state.residual is not None:
        squares = _squares(prior, mean, measured, score, own[0], step)
        before = jnp.zeros_like(count), ops.logdet(prior.precision, offset)
        log_evidence = evidence.unknown_dispersion(
            evidence.Fitted(before[0], *before),
            evidence.Fitted(squares.penalised, count, logdet),
            own[1],
        ).astype(log_evidence.dtype)
    if state.nuisance is not None:
        nuisance = nuisances.refined(state.nuisance, *own)
    if recipe.robust:
        sums = _with_scores(recipe, sums, mean, batches)
    sums = kept(recipe, sums)
    if sums.curvature is not information:
        logdet = ops.logdet(sums.curvature, offset)
    refined = state._replace(
        mean=mean,
        rest=rest,
        information=ops.conform(state.information, sums.curvature),
        log_determinant=logdet.astype(state.log_determinant.dtype),
        count=count,
        meat=_meat_like(state, sums),
        clusters=sums.scores or None,
        log_evidence=log_evidence,
        residual=None if squares is None else squares.penalised,
        own_residual=None if squares is None else squares.own,
        nuisance=nuisance,
        # the belief is no longer the prior, even if no stream came before
        step=jnp.maximum(state.step, 1),
    )
    finite = trees.all_finite((refined.mean, refined.information))
    _check_finite((refined.mean, refined.information))
    skipped = state._replace(num_skipped=state.num_skipped + 1)
    return optax.tree.where(finite, refined, skipped)


def _check_finite(values: PyTree) -> None:
    if not checks.holds(trees.all_finite(values)):
        raise ValueError(
            "refine met a value that is not finite in the data or at the solution."
        )


def _check_refined(recipe: Recipe, state: Any, batches: Any) -> None:
    if not isinstance(state, FlowState):
        raise TypeError(
            "refine takes a flow's state; refine the members of a bank one by one. Got "
            f"{type(state).__name__}."
        )
    belonging.check_state(recipe, state)
    if not remembers_all(state.memory):
        raise ValueError(
            "refine gives every batch full weight, which is what stationary memory "
            f"remembers; this state's memory is {type(state.memory).__name__}."
        )
    if recipe.robust and iter(batches) is batches:
        raise ValueError(
            "with robust=True refine passes over the data twice: give a list, a loader "
            f"or a stacked batch, and not a {type(batches).__name__}."
        )


def _of_likelihood(recipe: Recipe, batch: Batch, params: PyTree, logs: PyTree) -> tuple:
    """What a dispersion or nuisance parameters ask of a batch, sums."""
    observed, likelihood = Observed(recipe, batch, None), recipe.likelihood
    if likelihood.nuisance is not None:
        return nuisances.slopes(recipe, batch, params, logs)
    assert likelihood.pearson is not None
    squares = observed.total(likelihood.pearson, params)
    return squares, observed.log_unit_variance(params)


def _squares(
    prior: Prior,
    mean: PyTree,
    measured: Any,
    score: PyTree,
    squares: jax.Array,
    step: PyTree,
) -> Squares:
    """At the mean, from those a step before: a quadratic of slope -2 score there."""
    bend = optax.tree.add_scale(ops.matvec(measured, step), -2.0, score)
    own = squares + trees.dot(step, bend)
    offset = optax.tree.sub(mean, prior.origin)
    return Squares(own + ops.quadratic_form(prior.precision, offset), own)


def _with_scores(recipe: Recipe, sums: Sum, mean: PyTree, batches: Any) -> Sum:
    """The sums with the scores of all batches at a mean."""

    def add_batch(total: Any, batch: Any, index: jax.Array) -> Any:
        del index
        site = compiled(recipe, _scores)(_read(recipe, mean, batch), mean)
        if total is None:
            return site
        return tuple(map(ops.add, site[0], total[0])), optax.tree.add(site[1], total[1])

    quadratic, scores = _sum_over(add_batch, batches)
    return sums._replace(quadratic=quadratic, scores=scores)


def _scores(recipe: Recipe, batch: Batch, mean: PyTree) -> tuple[tuple, PyTree]:
    site = with_scores(Observed(recipe, batch, None), Sum(None, jnp.zeros(())), mean)
    return site.quadratic, site.scores


def _read(recipe: Recipe, params: PyTree, batch: Any) -> Batch:
    batch = recipe.model.admitted(params, batch, recipe.bad_rows)
    check_clusters(recipe, batch)
    return known_clusters(recipe, batch)[0]


def _meat_like(state: FlowState, sums: Sum) -> Any:
    if not sums.quadratic:
        return None
    # as rich as the information, where the prior is richer than the structure
    zero = ops.scale(state.prior.precision, 0.0)
    return ops.conform(state.meat, ops.add(sums.quadratic[0], zero))


def _sum_over(add_batch: Callable[..., Any], stored: Any) -> Any:
    """`add_batch(sums or None, batch, index)` over a stack or an iterable."""
    if isinstance(stored, tuple):
        count = len(jax.tree.leaves(stored)[0])
        if count == 0:
            raise ValueError("refine needs at least one batch; got none.")
        head, tail = (
            jax.tree.map(lambda x, s=s: x[s], stored) for s in (0, slice(1, None))
        )

        def body(sums: Any, part: Any) -> tuple[Any, None]:
            return add_batch(sums, *part), None

        indices = jnp.arange(1, count, dtype=jnp.int32)
        first = add_batch(None, head, jnp.zeros((), jnp.int32))
        return jax.lax.scan(body, first, (tail, indices))[0]
    sums = None
    for index, batch in enumerate(stored):
        sums = add_batch(sums, batch, jnp.asarray(index, jnp.int32))
    if sums is None:
        raise ValueError("refine needs at least one batch; got none.")
    return sums
