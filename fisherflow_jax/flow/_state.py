"""What a flow keeps between batches, what it reports of one, and how it begins."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fisherflow_jax import information as ops
from fisherflow_jax import memories
from fisherflow_jax._ground import linalg, sharding, trees
from fisherflow_jax._ground.choices import Compared, compiled, shared
from fisherflow_jax._ground.keys import key_data
from fisherflow_jax.flow import _nuisance as nuisances
from fisherflow_jax.flow._nuisance import NuisanceState
from fisherflow_jax.flow._recipe import Recipe, parameters
from fisherflow_jax.flow._robust import Clusters, no_clusters
from fisherflow_jax.memories import Belief, Prior, Shift, Squares, Sum
from fisherflow_jax.structures import _inverted as inverted
from fisherflow_jax.structures import _prior as priors
from fisherflow_jax.structures import capabilities
from fisherflow_jax.structures._compensated import compensate

PyTree = Any


class Events(NamedTuple):
    """What a state has been through, counted; each `()` int32.

    Attributes:
      rows_skipped: rows left out, or of which a target was, for a value that is not
        finite or cannot be.
      solves_regularised: solves that were helped to a positive definite information.
      searches_unfinished: updates whose steps ended before they were short.
    """

    rows_skipped: jax.Array
    solves_regularised: jax.Array
    searches_unfinished: jax.Array

    @classmethod
    def none(cls) -> "Events":
        zero = jnp.zeros((), jnp.int32)
        return cls(zero, zero, zero)


class FlowState(NamedTuple):
    """The posterior `N(mean, information^-1)` and what the flow needs to go on.

    Attributes:
      mean: like the parameters.
      rest: what rounding took from the mean, so that the sum of both has twice the
        digits; None: not kept, as in float64 and without compensated sums.
      information: prior included.
      log_determinant: `()`, of the information, which the next update starts from;
        None: not kept, as where the information is kept by its inverse.
      count: `()`, effective observations: examples; where the dispersion is estimated,
        all their targets, each an observation of it.
      log_evidence: `()`, of all batches.
      meat: the sum of squared scores, for `robust=True`; None: not kept.
      clusters: the scores summed over each cluster, for `num_clusters`; None: not kept.
      residual: `()`, the penalised sum of squares; None: the dispersion is known.
      own_residual: `()`, the data's own sum of squares at the mean, without the prior's
        share.
      prior: what is left of the Gaussian before any data.
      memory: the memory's storage.
      step: `()` int32, updates taken in.
      nuisance: a state about the logarithms of what the likelihood leaves unknown, such
        as a concentration; None: nothing.
      num_skipped: `()` int32, batches refused for a result that is not finite.
      events: counts of what else the state has been through: `events.rows_skipped`,
        `events.solves_regularised` and `events.searches_unfinished`.
      key: key data; None: nothing is drawn.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> flow = ff.fisher_flow(lambda params, x: x @ params, ff.likelihoods.gaussian())
      >>> state = flow.init(jnp.zeros(1))
      >>> print(state.mean, state.count, state.step)
      [0.] 0.0 0
    """

    mean: PyTree
    rest: PyTree
    information: Any
    log_determinant: Any
    count: jax.Array  # type: ignore[assignment]
    log_evidence: jax.Array
    meat: Any | None
    clusters: Clusters | None
    residual: jax.Array | None
    own_residual: jax.Array | None
    prior: Prior
    memory: Any
    step: jax.Array
    nuisance: NuisanceState | None
    num_skipped: jax.Array
    events: Events
    key: jax.Array | None

    @property
    def prior_precision(self) -> Any | None:
        """What is left of the prior in the information; None: a drift replaced it."""
        return self.prior.precision if memories.keeps_prior(self.memory) else None

    @property
    def degrees_of_freedom(self) -> jax.Array | None:
        r"""Observations less effective parameters; None: the dispersion is known.

        :math:`n - d + \mathrm{tr}((P I^{-1})^2)`, as of a linear smoother.
        """
        return None if self.own_residual is None else _spare(self)

    @property
    def dispersion(self) -> jax.Array | None:
        r"""The estimated dispersion; None: known. NaN without spare observations.

        :math:`(S - g^\top I^{-1} g) / \nu`, with S the data's own sum of squares at the
        mean, half of whose slope there is :math:`g = P (\theta_0 - \theta)`: Newton's
        step removes what the prior has added to it.
        """
        if self.own_residual is None:
            return None
        return _dispersion(self, self.own_residual)


class FlowInfo(NamedTuple):
    """What an update reports.

    Attributes:
      log_likelihood: `()`, of the batch at the predicted mean: prequential.
      log_evidence: `()`, its increment.
      step_size: `()`, of the last Newton step; 0: none decreased the objective.
      decrement: `()`, its squared length before halving, in posterior standard
        deviations.
      rows_skipped: `()` int32, its bad rows.
      skipped: `()` bool: a result was not finite, nothing moved.
      missing: `()` bool: all weights were zero, only the memory moved on.
      memory: the memory's report.
      output_deviation: `()`, of an expectation at the outputs the widest that it was
        averaged over, which its `order` must resolve; None: there was none.
    """

    log_likelihood: jax.Array
    log_evidence: jax.Array
    step_size: jax.Array
    decrement: jax.Array
    rows_skipped: jax.Array
    skipped: jax.Array
    missing: jax.Array
    memory: Any
    output_deviation: jax.Array | None = None


class FisherFlow(NamedTuple):
    """A flow's functions. Made by `ff.fisher_flow`.

    Attributes:
      init: `(params, prior_mean=params, key=None) -> state`. The first search sets out
        from params; should the first batch be missing, from the prior mean.
      update: `(state, batch) -> (state, info)`, as `lax.scan` calls it.
      advance: `(state, batch=None, steps=1) -> state`: what the memory believes then,
        if nothing is seen until then.
      absorb: `(state, mean, information, num_observations, *, log_likelihood=nan) ->
        state`: takes in a mean that a training loop found.
      evaluate: `(params, batch, key=None, nuisance=None) -> (log-likelihood, score,
        information)`, sums; `nuisance` is `state.nuisance.mean`, where there is one.
      project: a summed information of `evaluate` -> what the state keeps of it.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> flow = ff.fisher_flow(lambda params, x: x @ params, ff.likelihoods.gaussian())
      >>> batch = jnp.ones((3, 1)), jnp.ones(3)
      >>> log_likelihood, score, information = flow.evaluate(jnp.zeros(1), batch)
      >>> print(score, information.rows)
      [3.] [[3.]]
    """

    init: Callable[..., FlowState]
    update: Callable[..., tuple[FlowState, FlowInfo]]
    advance: Callable[..., FlowState]
    absorb: Callable[..., FlowState]
    evaluate: Callable[..., tuple[jax.Array, PyTree, Any]]
    project: Callable[[Any], Any]

    @property
    def recipe(self) -> Recipe:
        """The flow's choices."""
        return self.init.args[0]  # type: ignore[attr-defined]

    def __repr__(self) -> str:
        return repr(getattr(self.init, "args", ("FisherFlow(...)",))[0])


@jax.jit
def _spare(state: FlowState) -> jax.Array:
    return _spare_of(state, *ops.resolved(state.information, state.mean))


def _spare_of(state: FlowState, information: Any, hidden: PyTree) -> jax.Array:
    precision = state.prior.precision

    def used(more: jax.Array) -> jax.Array:
        total = ops.add(information, ops.scale(precision, more))
        return ops.effective(total, precision, state.mean)

    # of d - tr(P (I + eP)^-1) at zero: a trace of squares from one of inverses
    held = jax.jvp(used, (jnp.zeros_like(state.count),), (jnp.ones_like(state.count),))
    # what rounding hides is not estimated: there the prior holds all
    return state.count - trees.size(state.mean) + held[1] + jnp.sum(trees.ravel(hidden))


@jax.jit
def _dispersion(state: FlowState, squares: jax.Array) -> jax.Array:
    information, hidden = ops.resolved(state.information, state.mean)
    origin, precision = state.prior
    slope = ops.matvec(precision, optax.tree.sub(origin, state.mean))
    squares = squares - trees.dot(slope, ops.solve(information, slope))
    spare = _spare_of(state, information, hidden)
    return jnp.where(spare > linalg.least_spare(state.mean), squares / spare, jnp.nan)


def belief_of(state: FlowState) -> Belief:
    """What a state believes.

    Before any update that is the prior, wherever the first search sets out from.
    """
    squares = None
    if state.residual is not None and state.own_residual is not None:
        squares = Squares(state.residual, state.own_residual)
    sums = Sum(
        curvature=state.information,
        weight=state.count,
        linear=squares,
        quadratic=() if state.meat is None else (state.meat,),
        scores=state.clusters or (),
    )
    mean = trees.where(state.step > 0, state.mean, state.prior.origin)
    return Belief(mean, sums, state.prior, state.rest)


def init(
    recipe: Recipe, params: PyTree, prior_mean: PyTree = None, key: Any = None
) -> FlowState:
    """The state that believes the prior, its search starting at `params`."""
    mean = parameters(params, "params")
    origin = mean if prior_mean is None else parameters(prior_mean, "prior_mean")
    shapes = jax.tree.map(jnp.shape, (origin, mean))
    if shapes[0] != shapes[1]:
        raise ValueError(
            "prior_mean must have the tree and shapes of params; got "
            f"{shapes[0]} for {shapes[1]}."
        )
    if not recipe.draws:
        key = None
    elif key is None:
        curvature = recipe.bound(recipe.estimator.value, recipe.apply_fn)
        who = f"estimators.{curvature.name}"
        if not curvature.random:
            who = f"expectation={recipe.expectation}"
        raise ValueError(f"{who} draws at random: give flow.init a key.")
    precision = priors.as_precision(recipe.prior_precision.value, mean)
    # compiled once for all models
    recipe = dataclasses.replace(
        recipe,
        apply_fn=begin,
        estimator=Compared(None),
        prior_precision=Compared(None),
        num_steps=1 if recipe.keeps_covariance else 2,
        expectation=None,
        num_refreshes=1,
        chunk_size=None,
        bad_rows="drop",
    )
    return compiled(shared(recipe), begin)(mean, origin, precision, key_data(key))


def begin(
    recipe: Recipe, mean: PyTree, origin: PyTree, precision: Any, key: Any
) -> FlowState:
    """The same from arrays that fit. No two leaves share a buffer, with each other or
    with the arguments: a state may be donated to a compiled update."""
    origin = jax.tree.map(lambda x, like: x.astype(like.dtype), origin, mean)
    nothing = recipe.structure.empty(mean)
    information = priors.starting_information(nothing, precision)
    if recipe.marginal and type(information) is not type(nothing):
        raise ValueError(
            "marginal=True keeps one structure: give prior_precision as a number, "
            "a pytree prefix, or an information in that structure."
        )
    zero, none = jnp.zeros((), trees.float_dtype(mean)), jnp.zeros((), jnp.int32)
    if recipe.num_clusters is not None and not ops.provides(ops.squares, nothing):
        raise ValueError(
            f"num_clusters needs ff.information.squares, which structure "
            f"{recipe.structure.name} has not registered."
        )
    zeros = no_site(recipe, mean)
    residual, meat = zeros.linear.squares, None
    if zeros.quadratic:
        # as rich as the information, which a richer prior may have made richer than
        # the structure
        meat = ops.add(nothing, ops.scale(precision, 0.0))
    compensated = recipe.compensated
    if compensated is None:
        # float32 stops counting at 2^24 rows, and loses digits of all columns to the
        # largest of them long before
        matrix = capabilities.COMPENSATED in recipe.structure.supports and bool(
            ops.facts(nothing).dense
        )
        compensated = matrix and zero.dtype == jnp.float32
    keep = compensate if compensated else (lambda x: x)
    by_covariance = (
        recipe.keeps_covariance
        and inverted.may_be(information)
        and not compensated
        and zero.dtype == jnp.float64
    )
    if by_covariance:
        keep = inverted.inverted
    state = FlowState(
        mean=mean,
        rest=optax.tree.zeros_like(mean) if compensated else None,
        information=keep(information),
        log_determinant=None
        if by_covariance
        else sharding.replicated(ops.logdet, information, mean),
        count=zero,
        log_evidence=zero,
        meat=None if meat is None else keep(meat),
        clusters=zeros.scores or None,
        residual=residual,
        own_residual=residual,
        prior=Prior(origin, precision),
        memory=recipe.memory.init(zeros),
        step=none,
        nuisance=nuisances.begin(recipe, trees.float_dtype(mean)),
        num_skipped=none,
        events=Events.none(),
        key=key,
    )
    return jax.tree.map(jnp.copy, state)


def no_site(recipe: Recipe, mean: PyTree) -> Sum:
    """What a batch adds of which nothing was observed."""
    zero, nothing = jnp.zeros((), trees.float_dtype(mean)), recipe.structure.empty(mean)
    clusters = recipe.num_clusters
    squares = zero if recipe.estimates_dispersion else None
    return Sum(
        curvature=nothing,
        weight=zero,
        linear=Shift(optax.tree.zeros_like(mean), squares),
        quadratic=(nothing,) if recipe.robust and clusters is None else (),
        scores=() if clusters is None else no_clusters(clusters, mean),
    )
