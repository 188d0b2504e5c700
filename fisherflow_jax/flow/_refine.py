"""Before and after the stream: a first batch solved whole, a last global step."""

import warnings
from collections.abc import Callable
from operator import itemgetter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fisherflow_jax import information as ops
from fisherflow_jax._ground import checks, keys, linalg, trees
from fisherflow_jax._ground.batch import Batch
from fisherflow_jax._ground.choices import compiled
from fisherflow_jax.accumulation import converted
from fisherflow_jax.flow import _belonging as belonging
from fisherflow_jax.flow import _evidence as evidence
from fisherflow_jax.flow import _nuisance as nuisances
from fisherflow_jax.flow._recipe import Observed, Recipe, log_prior_of
from fisherflow_jax.flow._robust import check_clusters, known_clusters, with_scores
from fisherflow_jax.flow._state import FisherFlow, FlowState
from fisherflow_jax.flow._step import evaluate, kept
from fisherflow_jax.memories import Prior, Squares, Sum, remembers_all

PyTree = Any

_WARM_START_STEPS = 50
_SHORT = 0.1  # posterior standard deviations


def warm_start(
    flow: FisherFlow,
    state: FlowState,
    batch: Any,
    *,
    log_prior: Callable[[PyTree], jax.Array] | None = None,
) -> FlowState:
    r"""Solves a first batch to convergence, before streaming.

    One Newton step from a cold start can land anywhere for a Poisson or gamma model,
    and its information, taken there, stays in the sum. Twenty rows a parameter (or two
    batches, if that is more) are enough.

    Args:
      flow: from `ff.fisher_flow`.
      state: usually `flow.init(params)`.
      batch: the first rows, `(inputs, targets)` or with weights.
      log_prior: a function of the parameters that returns a number, a log-density up to
        a constant, beside the flow's Gaussian prior: its gradient enters the score, its
        value the line search; the information and the log-evidence are without it, and
        no later update knows of it. With `ff.geometry.jeffreys(metric)` that is Firth's
        estimate: where the first classes are separated it stays finite. It is compiled
        anew for each function. With an unknown dispersion it is on the scale of a
        dispersion of one.

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
    options = {} if log_prior is None else {"log_prior": log_prior}
    after, info = flow.update(state, batch, num_steps=_WARM_START_STEPS, **options)
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


@checks.called_as(
    "refine(flow, state, batches), and batches are a list of (inputs, targets): "
    "[(X, y)]"
)
def refine(
    flow: FisherFlow,
    state: FlowState,
    batches: Any,
    *,
    log_prior: Callable[[PyTree], jax.Array] | None = None,
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
      log_prior: as of `ff.warm_start`; its gradient is taken where the scores are. With
        `ff.geometry.jeffreys(metric)` of all the data the step goes to Firth's
        estimate, without the bias of order 1 / n.
      to_batch: makes a batch of what a loader gives, if it is none: of dicts, `lambda
        item: (item["x"], item["y"])`.

    Returns:
      The state with mean, information, count, log-evidence and `events.rows_skipped`
      of the step. The information is that of the point from which the step was taken,
      the sums of squares of an unknown dispersion follow the step from there, and what
      else the likelihood leaves unknown takes a step of its own. The scores for
      `robust=True` are taken anew, at the refined mean. With the flow's `expectation`
      scores and informations are averages over the state, and repeated steps go to the
      variational posterior of all data. Cost: one pass, with `robust=True` two.

    Raises:
      ValueError: for a memory other than stationary, for no batches at all, and, where
        values are at hand, for bad rows of any batch, unless they are dropped; with
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
    around = None if recipe.expectation is None else state.information

    def add_batch(sums: Any, batch: Any, index: jax.Array) -> Any:
        key = None
        if state.key is not None:
            key = jax.random.fold_in(keys.typed_key(state.key), state.step + index)
        batch, skipped = _read(recipe, state.mean, batch, index)
        own, count = compiled(recipe, _counted)(batch, state)
        measured = evaluate(recipe, state.mean, batch, key, logs, around=around)
        found = (skipped, own, count, *measured[:2]), measured[2:]
        return found if sums is None else _added(sums, found)

    numbers, (measured,) = _sum_over(add_batch, batches)
    _check_all_read(recipe, state.mean, batches, numbers)
    slope = None
    if log_prior is not None:
        prior = log_prior_of(log_prior, state.mean)
        slope = jax.jit(jax.grad(prior.run, 1))(prior.arrays, state.mean)
    point = _solved(state, numbers[-1], measured, slope)
    _check_finite(point.finite)
    scores = _scores_of(recipe, point.mean, batches) if recipe.robust else None
    settle = compiled(recipe, _refined)
    refined, finite = settle(state, numbers, measured, point, scores)
    _check_finite(finite)
    return refined


class _Point(NamedTuple):
    """Where the step ends."""

    mean: PyTree
    rest: PyTree
    step: PyTree
    gain: jax.Array  # () of the log-likelihood less half the distance by the step
    information: Any
    logdet: jax.Array
    helped: jax.Array
    finite: jax.Array  # of what is solved: a solve would say less of the reason


@jax.jit
def _added(one: tuple, other: tuple) -> tuple:
    return optax.tree.add(one[0], other[0]), tuple(map(ops.add, other[1], one[1]))


@jax.jit
def _solved(
    state: FlowState, score: PyTree, measured: Any, slope: PyTree | None
) -> _Point:
    """The step along the score, and the slope of a log-prior."""
    prior = state.prior
    information = ops.add(measured, prior.precision)
    offset = optax.tree.sub(state.mean, prior.origin)
    pull = ops.matvec(prior.precision, offset)
    own = optax.tree.sub(score, pull)
    gradient = own if slope is None else optax.tree.add(own, slope)
    factors = ops.regularised(information, offset)
    step = factors.divide(gradient)
    none = None if state.rest is None else optax.tree.zeros_like(state.rest)
    mean, rest = linalg.moved(state.mean, none, step)
    return _Point(
        mean=mean,
        rest=rest,
        step=step,
        gain=trees.dot(own, step) - 0.5 * trees.dot(gradient, step),
        information=information,
        logdet=factors.logdet,
        helped=factors.helped,
        finite=trees.all_finite((score, slope, information)),
    )


def _refined(
    recipe: Recipe,
    state: FlowState,
    numbers: tuple,
    measured: Any,
    point: _Point,
    scores: tuple | None,
) -> tuple[FlowState, jax.Array]:
    """The state at the point, or before and a batch skipped; whether it is finite."""
    rows_skipped, own, count, value, score = numbers
    sums, logdet = Sum(point.information, count), point.logdet
    squares = nuisance = None
    if state.residual is not None:
        squares = _squares(state.prior, measured, score, own[0], point)
    value = value + point.gain
    if recipe.expectation is not None and squares is None:
        precision = state.prior.precision
        value = value + 0.5 * ops.effective(point.information, precision, point.mean)
    log_evidence = _log_evidence(state, value, logdet, count, squares, own)
    if state.nuisance is not None:
        nuisance = nuisances.refined(state.nuisance, *own)
    if scores is not None:
        sums = sums._replace(quadratic=scores[0], scores=scores[1])
    sums = kept(recipe, sums)
    if sums.curvature is not point.information:
        logdet = ops.regularised(sums.curvature, point.mean).logdet
    events = state.events._replace(
        rows_skipped=rows_skipped,
        solves_regularised=state.events.solves_regularised + point.helped,
    )
    refined = state._replace(
        mean=point.mean,
        rest=point.rest,
        information=ops.conform(state.information, sums.curvature),
        log_determinant=None
        if state.log_determinant is None
        else logdet.astype(state.log_determinant.dtype),
        count=count,
        meat=_meat_like(state, sums),
        clusters=sums.scores or None,
        log_evidence=log_evidence,
        residual=None if squares is None else squares.penalised,
        own_residual=None if squares is None else squares.own,
        nuisance=nuisance,
        events=events,
        # the belief is no longer the prior, even if no stream came before
        step=jnp.maximum(state.step, 1),
    )
    finite = trees.all_finite((refined.mean, refined.information))
    skipped = state._replace(num_skipped=state.num_skipped + 1)
    return optax.tree.where(finite, refined, skipped), finite


def _log_evidence(
    state: FlowState,
    value: jax.Array,
    logdet: jax.Array,
    count: jax.Array,
    squares: Squares | None,
    own: Any,
) -> jax.Array:
    """Of all data at once: Laplace's integral, or that over a dispersion too."""
    offset, precision = optax.tree.sub(state.mean, state.prior.origin), state.prior[1]
    before = ops.logdet(precision, offset)
    if squares is None:
        distance = ops.quadratic_form(precision, offset)
        found = evidence.known_dispersion(value, distance, before, logdet)
    else:
        zero = jnp.zeros_like(count)
        found = evidence.unknown_dispersion(
            evidence.Fitted(zero, zero, before),
            evidence.Fitted(squares.penalised, count, logdet),
            own[1],
        )
    return found.astype(state.log_evidence.dtype)


def _check_finite(finite: jax.Array) -> None:
    if not checks.holds(finite):
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


def _counted(recipe: Recipe, batch: Batch, state: FlowState) -> tuple[tuple, Any]:
    """What a dispersion or nuisance parameters ask of a batch, sums; and its count."""
    own: tuple = ()
    observed = Observed(recipe, batch, None)
    if state.nuisance is not None:
        own = nuisances.slopes(recipe, batch, state.mean, state.nuisance.mean)
    elif state.residual is not None:
        assert recipe.likelihood.pearson is not None
        squares = observed.total(recipe.likelihood.pearson, state.mean)
        own = squares, observed.log_unit_variance(state.mean)
    return own, observed.num_observations.astype(state.count.dtype)


def _squares(
    prior: Prior, measured: Any, score: PyTree, squares: jax.Array, point: _Point
) -> Squares:
    """At the point, from those a step before: a quadratic of slope -2 score there."""
    bend = optax.tree.add_scale(ops.matvec(measured, point.step), -2.0, score)
    own = squares + trees.dot(point.step, bend)
    offset = optax.tree.sub(point.mean, prior.origin)
    return Squares(own + ops.quadratic_form(prior.precision, offset), own)


def _scores_of(recipe: Recipe, mean: PyTree, batches: Any) -> tuple[tuple, PyTree]:
    """The squared scores and the scores of all batches at a mean."""

    def add_batch(total: Any, batch: Any, index: jax.Array) -> Any:
        batch, _ = _read(recipe, mean, batch, index)
        site = compiled(recipe, _scores)(batch, mean)
        return site if total is None else _added(total, site)

    scores, quadratic = _sum_over(add_batch, batches)
    return quadratic, scores


def _scores(recipe: Recipe, batch: Batch, mean: PyTree) -> tuple[PyTree, tuple]:
    site = with_scores(Observed(recipe, batch, None), Sum(None, jnp.zeros(())), mean)
    return site.scores, site.quadratic


def _read(
    recipe: Recipe, params: PyTree, batch: Any, index: Any
) -> tuple[Batch, jax.Array]:
    """The batch without its bad rows, and how many these are."""
    where = f"batch {index}"
    batch, skipped = recipe.model.admitted(params, batch, recipe.bad_rows, where)
    check_clusters(recipe, batch)
    batch, unknown = known_clusters(recipe, batch)
    return batch, skipped + unknown


def _check_all_read(recipe: Recipe, params: PyTree, stored: Any, sums: Any) -> None:
    """Raises for the first bad row of a stack that is at hand, as of a list.

    A scan reads all but its first batch, and what is traced does not raise.
    """
    if not isinstance(stored, tuple) or checks.is_traced(stored):
        return
    if not checks.is_traced(sums) and not sums[0] and bool(trees.all_finite(sums)):
        return
    for index in range(len(jax.tree.leaves(stored)[0])):
        _read(recipe, params, jax.tree.map(itemgetter(index), stored), index)


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
        first = add_batch(None, head, np.int32(0))
        return jax.lax.scan(body, first, (tail, indices))[0]
    sums = None
    for index, batch in enumerate(stored):
        sums = add_batch(sums, batch, np.int32(index))
    if sums is None:
        raise ValueError("refine needs at least one batch; got none.")
    return sums
