"""The flow: sequential inference, (mean, information) -> (mean, information)."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fisherflow_jax import estimators
from fisherflow_jax import information as ops
from fisherflow_jax._ground import batch as batches
from fisherflow_jax._ground import trees
from fisherflow_jax._ground.batch import Batch
from fisherflow_jax._ground.keys import key_data, typed_key
from fisherflow_jax.flow import _evidence as evidence
from fisherflow_jax.flow import _newton as newton
from fisherflow_jax.flow._checks import (
    check_options,
    check_taken_in,
    check_values,
    parameters,
)
from fisherflow_jax.flow._marginal import project as project_marginal
from fisherflow_jax.likelihoods import Likelihood
from fisherflow_jax.memories._memory import Belief, Memory, Prior, Site, include
from fisherflow_jax.model import log_likelihood, weighted_sum
from fisherflow_jax.structures import Structure, full
from fisherflow_jax.structures import _prior as priors
from fisherflow_jax.structures._compensated import compensate

PyTree = Any


class FlowState(NamedTuple):
    """The posterior `N(mean, information^-1)` and what the flow needs to go on."""

    mean: PyTree  # like the parameters
    information: Any  # prior included
    count: jax.Array  # type: ignore[assignment]  # () effective observations, see below
    log_evidence: jax.Array  # ()
    meat: Any | None  # sum of squared scores, for robust=True
    residual: jax.Array | None  # () penalised sum of squares, unknown dispersion
    prior: Prior
    memory: Any  # the memory's storage
    step: jax.Array  # () int32, updates taken in
    num_skipped: jax.Array  # () int32, batches refused for a non-finite value
    key: jax.Array | None  # key data, None if nothing is drawn
    # count is of examples; where the dispersion is estimated, of all their targets,
    # each an observation of it

    @property
    def degrees_of_freedom(self) -> jax.Array | None:
        """Observations less effective parameters; None: the dispersion is known."""
        if self.residual is None:
            return None
        used = priors.effective_parameters(
            self.information, self.prior.precision, self.mean
        )
        return self.count - used

    @property
    def dispersion(self) -> jax.Array | None:
        """The estimated dispersion; None: known. NaN without spare observations."""
        spare = self.degrees_of_freedom
        if self.residual is None or spare is None:
            return None
        return jnp.where(spare > 0, self.residual / spare, jnp.nan)


class FlowInfo(NamedTuple):
    """What an update reports."""

    log_likelihood: jax.Array  # () of the batch at the predicted mean: prequential
    log_evidence: jax.Array  # () increment
    step_size: jax.Array  # () of the last Newton step; 0: none decreased the objective
    decrement: jax.Array  # () its squared length before halving, in posterior sd
    skipped: jax.Array  # () bool: the batch had a non-finite value, nothing moved
    missing: jax.Array  # () bool: all weights were zero, only the memory moved on
    memory: Any  # the memory's report


class FisherFlow(NamedTuple):
    """A flow's functions. Made by `ff.fisher_flow`."""

    init: Callable[..., FlowState]
    """`(params, prior_mean=params, key=None) -> state`. The first search sets out from
    params; should the first batch be missing, from the prior mean."""
    update: Callable[..., tuple[FlowState, FlowInfo]]
    """`(state, batch) -> (state, info)`, as `lax.scan` calls it."""
    evaluate: Callable[..., tuple[jax.Array, PyTree, Any]]
    """`(params, batch, key=None) -> (log-likelihood, score, information)`, sums."""
    project: Callable[[Any], Any]
    """A summed information of `evaluate` -> what the state keeps of it."""


def fisher_flow(
    apply_fn: Callable,
    likelihood: Likelihood,
    *,
    structure: Structure,
    memory: Memory,
    estimator: Callable[..., Any] = estimators.exact,
    prior_precision: Any = 1.0,
    num_steps: int = 4,
    robust: bool = False,
    marginal: bool = False,
    compensated: bool = False,
    chunk_size: int | None = None,
) -> FisherFlow:
    r"""Sequential inference with a Gaussian belief, one batch at a time.

    Before a batch the memory predicts the belief `(theta^-, I^-)`. The update is
    implicit,

    .. math:: \theta_t = \arg\min_\theta \; -\log p(y_t | \theta)
       + \tfrac12 (\theta - \theta^-)^\top I^- (\theta - \theta^-), \quad
       I_t = I^- + F_t(\theta_t),

    by damped Newton steps with the batch's information `F_t`. Linear-Gaussian with the
    full structure it is the Kalman filter; for a generalised linear model, renewable
    estimation; with one step, the extended Kalman filter.

    Args:
      apply_fn: `(params, inputs) -> outputs`, leading axis = examples.
      likelihood: from `ff.likelihoods`; with an unknown dispersion the information and
        the prior precision are in units of `1 / dispersion`.
      structure: from `ff.structures`: what is kept of the information.
      memory: from `ff.memories`: what is believed before a batch and kept of it.
      estimator: a factory of `ff.estimators` (`functools.partial` for options); it is
        bound to apply_fn, likelihood and structure.
      prior_precision: positive: a number, a pytree prefix of the parameters, or an
        information; one richer than the structure makes the belief as rich, and as
        costly, as itself.
      num_steps: Newton steps at most; 1 takes one step without a line search and keeps
        the information of the predicted mean.
      robust: keep the sum of squared scores too, for sandwich variances.
      marginal: solve each batch in full and keep `1 / diag(F^-1)` instead of `diag(F)`
        (blocks likewise): valid intervals under correlation. Needs batches of a few
        times d rows, memory d^2; for scalar, diagonal and block.
      compensated: keep the information as a pair that loses nothing to rounding, for
        long streams in float32; twice the memory.
      chunk_size: examples whose pulled-back vectors are held at once.

    Returns:
      A `FisherFlow(init, update, evaluate, project)` of pure functions; `update` takes
      `(state, batch)` to `(state, info)`, as `jax.lax.scan` calls it. Cost of an
      update: up to `num_steps + 1` informations and gradients, a gradient more for each
      halving of a step, and the structure's solves.

    Raises:
      ValueError: for options that do not go together, naming them; at `init`, for
        integer or complex parameters, or a drawing estimator without a key; at
        `update`, for shapes that do not fit and, outside jit, for impossible values.
        Under jit a batch with a non-finite value moves nothing and is counted in
        `num_skipped`.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> flow = ff.fisher_flow(
      ...     lambda params, x: x @ params,
      ...     ff.likelihoods.gaussian(scale=1.0),
      ...     structure=ff.structures.full(),
      ...     memory=ff.memories.stationary(),
      ...     prior_precision=1e-4,
      ... )
      >>> state = flow.init(jnp.zeros(2))
      >>> x = jnp.array([[1.0, 0.0], [1.0, 1.0], [1.0, 2.0]])
      >>> state, info = flow.update(state, (x, jnp.array([1.0, 3.0, 5.0])))
      >>> print(state.mean.round(2))  # y = 1 + 2 x
      [1. 2.]

    References:
      Ollivier, "Online natural gradient as a Kalman filter", 2018.
      Luo, Song, "Renewable estimation and incremental inference in generalized linear
      models with streaming data sets", 2020.
    """
    check_options(structure, memory, num_steps, robust, marginal, compensated)
    inner = full() if marginal else structure
    options: dict[str, Any] = {} if chunk_size is None else {"chunk_size": chunk_size}
    curvature = estimator(apply_fn, likelihood, inner, **options)
    if curvature.not_a_curvature:
        raise ValueError(
            f"estimators.{curvature.name} cannot be a flow's curvature: "
            f"{curvature.not_a_curvature}."
        )
    scores = estimators.empirical(apply_fn, likelihood, inner, **options)
    estimates_dispersion = likelihood.with_dispersion is not None

    def init(params: PyTree, prior_mean: PyTree = None, key: Any = None) -> FlowState:
        mean = parameters(params, "params")
        origin = mean if prior_mean is None else parameters(prior_mean, "prior_mean")
        shapes = jax.tree.map(jnp.shape, (origin, mean))
        if shapes[0] != shapes[1]:
            raise ValueError(
                "prior_mean must have the tree and shapes of params; got "
                f"{shapes[0]} for {shapes[1]}."
            )
        origin = jax.tree.map(lambda x, like: x.astype(like.dtype), origin, mean)
        if curvature.random and key is None:
            raise ValueError(
                f"estimators.{curvature.name} draws at random: give flow.init a key."
            )
        zero = jnp.zeros((), trees.float_dtype(mean))
        nothing = structure.isotropic(mean, 0.0)
        prior = Prior(origin, priors.as_precision(prior_precision, mean))
        information = priors.starting_information(nothing, prior.precision)
        if marginal and type(information) is not type(nothing):
            raise ValueError(
                "marginal=True keeps one structure: give prior_precision as a number, "
                "a pytree prefix, or an information in that structure."
            )
        residual = zero if estimates_dispersion else None
        zeros = Site(
            nothing,
            optax.tree.zeros_like(mean),
            nothing if robust else None,
            zero,
            residual,
            residual,
        )
        meat = None
        if robust:
            # as rich as the information, which a richer prior may have made richer
            # than the structure
            meat = ops.add(nothing, ops.scale(prior.precision, 0.0))
        state = FlowState(
            mean=mean,
            information=compensate(information) if compensated else information,
            count=zero,
            log_evidence=zero,
            meat=compensate(meat) if robust and compensated else meat,
            residual=residual,
            prior=prior,
            memory=memory.init(zeros),
            step=jnp.zeros((), jnp.int32),
            num_skipped=jnp.zeros((), jnp.int32),
            key=key_data(key) if curvature.random else None,
        )
        # no two leaves share a buffer, with each other or with params: a state may be
        # donated to a compiled update
        return jax.tree.map(jnp.copy, state)

    def evaluate(params: PyTree, batch: Any, key: Any = None):
        batch, params = batches.as_batch(batch), parameters(params, "params")
        return sums(params, batch, None if key is None else typed_key(key))

    @jax.jit  # as for `advance`
    def sums(params: PyTree, batch: Batch, key: jax.Array | None):
        value, score = jax.value_and_grad(
            lambda p: log_likelihood(apply_fn, likelihood, p, batch)
        )(params)
        typed = None if key is None else typed_key(key)
        return value, score, curvature.compute(params, batch, typed)

    def project(information: Any) -> Any:
        if not marginal:
            return information
        assert structure.from_full is not None
        return ops.inverse(structure.from_full(ops.inverse(information)))

    def update(
        state: FlowState, batch: Any, *, num_steps: int = num_steps
    ) -> tuple[FlowState, FlowInfo]:
        batch = batches.as_batch(batch)
        check_values(likelihood, batch)
        after, info = advance(state, batch, num_steps)
        check_taken_in(~info.skipped)
        return after, info

    # compiled once a flow and shape, so that a plain Python loop over a data loader
    # does not trace its searches anew at each batch; inside jit or scan it is inlined
    @functools.partial(jax.jit, static_argnums=2)
    def advance(
        state: FlowState, batch: Batch, num_steps: int
    ) -> tuple[FlowState, FlowInfo]:
        key = None
        if state.key is not None:
            key = jax.random.fold_in(typed_key(state.key), state.step)

        predicted = memory.predict(state.memory, belief_of(state), state.prior)
        start = _where(state.step > 0, predicted.mean, state.mean)

        solution, site, belief = _absorb(
            state.prior, predicted, start, state.count > 0, batch, key, num_steps
        )
        gain = _log_evidence(predicted, belief, batch)
        storage, belief, report = memory.remember(
            state.memory, belief, site, state.prior
        )
        after = FlowState(
            belief.mean,
            belief.information,
            belief.count,
            state.log_evidence + gain,
            belief.meat,
            belief.residual,
            state.prior,
            storage,
            state.step + 1,
            state.num_skipped,
            state.key,
        )
        sound = batches.is_finite(batch) & _all_finite((belief, gain))
        skipped = state._replace(num_skipped=state.num_skipped + 1)
        after = _where(sound, after, skipped)
        missing = ~jnp.any(batch.weights > 0)
        info = FlowInfo(
            log_likelihood(apply_fn, likelihood, predicted.mean, batch),
            jnp.where(sound, gain, jnp.zeros_like(gain)),
            solution.step_size,
            jnp.where(missing, jnp.zeros_like(solution.decrement), solution.decrement),
            ~sound,
            missing,
            report,
        )
        return after, info

    def _absorb(prior, predicted, start, started, batch, key, num_steps):
        """The batch's site and the belief that includes it."""

        def fit(x: PyTree) -> jax.Array:
            return log_likelihood(apply_fn, likelihood, x, batch)

        def information_at(x: PyTree) -> Any:
            return curvature.compute(x, batch, key)

        before = ops.plain(predicted.information)
        gaussian = predicted.mean, before, start
        if num_steps == 1:
            solution = newton.single_step(fit, information_at, *gaussian)
            at, information = start, solution.information
        else:
            solution = newton.damped_newton(fit, information_at, *gaussian, num_steps)
            at, information = solution.mean, information_at(solution.mean)
        mean = solution.mean
        number = batches.num_observations(batch, each_target=estimates_dispersion)
        weight = number.astype(predicted.count.dtype)
        # the first batch's scores are taken at its solution: the start says nothing
        meat = (
            scores.compute(_where(started, predicted.mean, mean), batch, None)
            if robust
            else None
        )
        if marginal:
            information, own, meat = project_marginal(
                structure, information, jax.grad(fit)(at), at, meat, weight
            )
            pull = ops.matvec(information, optax.tree.sub(own, predicted.mean))
            total = ops.add(information, before)
            mean = optax.tree.add(predicted.mean, ops.solve(total, pull))
        move = optax.tree.sub(mean, predicted.mean)
        moved = ops.matvec(before, move)
        offset = optax.tree.sub(mean, prior.origin)
        # by difference, so that I theta = I^- theta^- + shift holds for every structure
        # and any number of steps
        shift = optax.tree.add(ops.matvec(information, offset), moved)
        residual = at_origin = None
        if likelihood.pearson is not None:
            squares = weighted_sum(apply_fn, likelihood.pearson, mean, batch)
            residual = squares + trees.dot(move, moved)
            at_origin = squares + 2 * trees.dot(offset, shift)
            at_origin = at_origin - ops.quadratic_form(information, offset)
        site = Site(information, shift, meat, weight, residual, at_origin)
        return solution, site, include(predicted, site, mean)

    def _log_unit_variance(outputs: jax.Array, targets: Any) -> jax.Array:
        del outputs
        assert likelihood.log_unit_variance is not None
        return likelihood.log_unit_variance(targets)

    def _log_evidence(predicted, belief, batch) -> jax.Array:
        mean = belief.mean
        before = ops.logdet(predicted.information, mean)
        after = ops.logdet(belief.information, mean)
        if estimates_dispersion:
            log_variance = weighted_sum(apply_fn, _log_unit_variance, mean, batch)
            return evidence.unknown_dispersion(
                predicted.residual,
                belief.residual,
                predicted.count,
                belief.count,
                log_variance,
                before,
                after,
            )
        move = optax.tree.sub(mean, predicted.mean)
        distance = ops.quadratic_form(predicted.information, move)
        value = log_likelihood(apply_fn, likelihood, mean, batch).astype(distance.dtype)
        return evidence.known_dispersion(value, distance, before, after)

    return FisherFlow(init, update, evaluate, project)


def belief_of(state: FlowState) -> Belief:
    """What a state believes.

    Before any update that is the prior, wherever the first search sets out from.
    """
    mean = _where(state.step > 0, state.mean, state.prior.origin)
    return Belief(mean, state.information, state.meat, state.count, state.residual)


def _where(condition: jax.Array, yes: PyTree, no: PyTree) -> PyTree:
    return jax.tree.map(lambda x, y: jnp.where(condition, x, y), yes, no)


def _all_finite(tree: PyTree) -> jax.Array:
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree)]))
