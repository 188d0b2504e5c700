"""What a flow estimates of the likelihood itself, beside the parameters.

The logarithms of a concentration, of degrees of freedom, of a scale: few numbers, whose
Fisher information has nothing in common with that of the mean. They have a Gaussian of
their own, which the flow's memory carries; an update moves it and the parameters by
turns, to their common solution.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fisherflow_jax import information as ops
from fisherflow_jax._ground import batch as batches
from fisherflow_jax._ground import linalg, trees
from fisherflow_jax.flow import _newton as newton
from fisherflow_jax.flow._newton import Solution
from fisherflow_jax.flow._objective import Stationary, objective_of
from fisherflow_jax.flow._quadratics import minimum
from fisherflow_jax.flow._recipe import Observed, Recipe
from fisherflow_jax.memories import Belief, Memory, Prior, Shift, Sum, age, stationary
from fisherflow_jax.model import Traced, weighted_sum
from fisherflow_jax.structures import Diagonal, full
from fisherflow_jax.structures._full import from_matrix

PyTree = Any

_STEPS = 50
# Turns end once the logarithms move by less, squared, in posterior deviations. In
# float64 so little that differences of what is found agree with its derivatives.
_SHORT, _SHORT_64 = 1e-10, 1e-20
# What curves the wrong way in a few rows may take this share of what was known before.
_LEAST = -0.5


class NuisanceState(NamedTuple):
    """The Gaussian of the logarithms: a state, as `ff.confidence_interval` takes it.

    Attributes:
      mean: `{name: ()}`, logarithms.
      information: about them, prior included.
      prior: what is left of it.
      memory: the memory's storage.
    """

    mean: dict[str, jax.Array]
    information: Any
    prior: Prior
    memory: Any


class Known(NamedTuple):
    """What an update says of them."""

    state: NuisanceState
    gain: jax.Array  # () their part of the log-evidence


def memory_of(recipe: Recipe) -> Memory:
    """What asks something of the structure is about the parameters alone."""
    return stationary() if recipe.memory.needs else recipe.memory


def begin(recipe: Recipe, dtype: Any) -> NuisanceState | None:
    asked = recipe.likelihood.nuisance
    if asked is None:
        return None
    rows = zip(asked.names, asked.start, asked.spread, strict=True)
    values = {name: (start, spread**-2) for name, start, spread in rows}
    mean, entries = (
        {name: jnp.asarray(value[k], dtype) for name, value in values.items()}
        for k in (0, 1)
    )
    zeros, precision = no_site(mean), Diagonal(entries)
    information = ops.add(zeros.curvature, precision)
    storage = memory_of(recipe).init(zeros)
    return NuisanceState(mean, information, Prior(mean, precision), storage)


def belief_of(state: NuisanceState, count: jax.Array) -> Belief:
    return Belief(state.mean, Sum(state.information, count, None), state.prior)


def known(observed: Observed, logs: dict[str, jax.Array]) -> Observed:
    """The batch under the likelihood with these values."""
    asked = observed.recipe.likelihood.nuisance
    assert asked is not None
    recipe = dataclasses.replace(
        observed.recipe, apply_fn=observed.apply_fn, likelihood=asked.known(logs)
    )
    return dataclasses.replace(observed, recipe=recipe)


def fit(
    observed: Observed,
    state: NuisanceState,
    count: jax.Array,
    predicted: Belief,
    fit_mean: Callable[[Observed, PyTree], Solution],
    start: PyTree,
    num_steps: int,
) -> tuple[Observed, Solution, Known]:
    """The common solution: `(the batch with known values, the parameters', theirs)`."""
    memory, batch = memory_of(observed.recipe), observed.batch
    believed = belief_of(state, count)
    before = memory.predict(state.memory, believed, batch, believed.mean)
    if num_steps == 1:
        mean = fit_mean(known(observed, before.mean), start)
        own = _solve(observed, before, before.mean, mean.mean, num_steps)
    else:
        own, mean = _by_turns(observed, before, count, fit_mean, start)
        own, mean = _differentiable(observed, predicted, before, own, mean)

    sums, move = before.sums, optax.tree.sub(own.mean, before.mean)
    moved = ops.matvec(ops.plain(sums.curvature), move)
    weight = observed.num_observations.astype(count.dtype)
    site = Sum(own.information, weight, None)
    belief = before._replace(mean=own.mean, sums=sums.plus(site))
    logdets = [ops.logdet(x.curvature, move) for x in (sums, belief.sums)]
    gain = 0.5 * (logdets[0] - logdets[1] - trees.dot(move, moved))
    site = site._replace(linear=Shift(moved))
    storage, belief, _ = memory.remember(state.memory, belief, site)
    after = NuisanceState(belief.mean, belief.sums.curvature, belief.prior, storage)
    return known(observed, own.mean), mean, Known(after, gain)


def waited(
    recipe: Recipe, state: NuisanceState, count: jax.Array, batch: Any
) -> NuisanceState:
    """After an update that observed nothing."""
    memory, believed = memory_of(recipe), belief_of(state, count)
    before = memory.predict(state.memory, believed, batch, believed.mean)
    storage, belief, _ = memory.remember(state.memory, before, no_site(state.mean))
    return NuisanceState(belief.mean, belief.sums.curvature, belief.prior, storage)


def no_site(mean: dict[str, jax.Array]) -> Sum:
    """What a batch adds of which nothing was observed."""
    zero = jnp.zeros((), trees.float_dtype(mean))
    nothing = full().isotropic(mean, 0.0)
    return Sum(nothing, zero, Shift(optax.tree.zeros_like(mean)))


def _by_turns(
    observed: Observed,
    before: Belief,
    count: jax.Array,
    fit_mean: Callable[[Observed, PyTree], Solution],
    start: PyTree,
) -> tuple[Solution, Solution]:
    """The solutions of the logarithms and of the parameters, without derivatives."""

    def turn(at: tuple) -> tuple:
        logs, start, given = at
        solution = fit_mean(known(observed, logs), start)
        # a scale that nobody knows yet is told by the targets' width, not by the start
        at = trees.where(given, solution.mean, start)
        return _solve(observed, before, logs, at, _STEPS), solution._replace(mean=at)

    begin = before.mean, start, count > 0
    traced = Traced.of(turn, begin)
    arrays, begin, information = jax.lax.stop_gradient(
        (traced.arrays, begin, ops.plain(before.sums.curvature))
    )
    traced = traced._replace(arrays=arrays)

    short = _SHORT_64 if count.dtype == jnp.float64 else _SHORT

    def more(carry: tuple) -> jax.Array:
        turns, length, _, mean = carry
        done = (length <= short) & (mean.unfinished == 0)
        return (turns < _STEPS) & ~done

    def step(carry: tuple) -> tuple:
        turns, _, own, mean = carry
        given = begin[2] | (turns > 0)
        found, solution = traced((own.mean, mean.mean, given))
        move = optax.tree.sub(found.mean, own.mean)
        total = ops.add(found.information, information)
        length = jnp.where(given, ops.quadratic_form(total, move), jnp.inf)
        return turns + 1, length, found, solution

    shapes = jax.eval_shape(traced.__call__, begin)
    own, mean = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    begun = own._replace(mean=begin[0]), mean._replace(mean=begin[1])
    length = jnp.full((), jnp.inf, count.dtype)
    *_, own, mean = jax.lax.while_loop(
        more, step, (jnp.zeros((), jnp.int32), length, *begun)
    )
    return own, mean


def _differentiable(
    observed: Observed, predicted: Belief, before: Belief, own: Solution, mean: Solution
) -> tuple[Solution, Solution]:
    """The same, with the derivatives of their common solution."""
    informations = [ops.plain(x.sums.curvature) for x in (predicted, before)]

    def gradient(point: tuple) -> tuple:
        def value(point: tuple) -> jax.Array:
            params, logs = point
            return known(observed, logs).log_density(params)

        offsets = predicted.to(point[0]), optax.tree.sub(point[1], before.mean)
        pulls = tuple(map(ops.matvec, informations, offsets))
        return optax.tree.sub(pulls, jax.grad(value)(point))

    def measured(point: tuple) -> tuple:
        params, logs = point
        each = (
            known(observed, logs).information(params),
            _curvature(_given_outputs(observed, params)[1], before)(logs),
        )
        total = ops.add(each[0], informations[0])
        return each, ops.regularised(total, params).logdet

    def divided(found: tuple, point: tuple, arrays: Any) -> Callable:
        totals = map(ops.add, found[0], arrays[2])
        divides = [ops.regularised(*x).divide for x in zip(totals, point, strict=True)]
        return lambda vector: tuple(f(v) for f, v in zip(divides, vector, strict=True))

    point = mean.mean, own.mean
    traced = [Traced.of(function, point) for function in (gradient, measured)]
    given = Stationary(
        lambda point, arrays: traced[0].run(arrays[0], point),
        lambda point, arrays: traced[1].run(arrays[1], point),
        divided,
    )
    arrays = *(x.arrays for x in traced), informations
    each = mean.information, own.information
    point, each, logdet = given.solved(point, (each, mean.logdet), arrays)
    mean = mean._replace(mean=point[0], at=point[0], information=each[0], logdet=logdet)
    return own._replace(mean=point[1], at=point[1], information=each[1]), mean


def _solve(
    observed: Observed, before: Belief, start: PyTree, params: PyTree, num_steps: int
) -> Solution:
    """Given the parameters, whose outputs are computed once."""
    information = ops.plain(before.sums.curvature)
    value, measure = _given_outputs(observed, params)
    curvature = _curvature(measure, before)
    objective = objective_of(value, curvature, before.mean, information)
    if num_steps == 1:
        return newton.single_step(objective, start)
    return newton.damped_newton(objective, start, _STEPS, once=True)


def _curvature(measure: Callable[[PyTree], jax.Array], before: Belief) -> Callable:
    """The information of a batch about the logarithms, no lower than `_LEAST`."""
    roots = linalg.cholesky(ops.to_dense(ops.plain(before.sums.curvature)))

    def curvature(logs: PyTree) -> Any:
        inner = linalg.solve_lower(roots, measure(logs))
        inner = linalg.solve_lower(roots, inner.T)
        return from_matrix(roots @ _floored(inner) @ roots.T, logs)

    return curvature


@jax.custom_jvp
def _floored(matrix: jax.Array) -> jax.Array:
    """With eigenvalues below `_LEAST` raised to it."""
    values, basis = linalg.eigh(matrix)
    return (basis * jnp.maximum(values, _LEAST)) @ basis.T


@_floored.defjvp
def _(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    """By divided differences, which equal eigenvalues do not divide by zero."""
    values, basis = linalg.eigh(primals[0])
    raised = jnp.maximum(values, _LEAST)
    gaps, rises = (x[:, None] - x[None] for x in (values, raised))
    slopes = jnp.broadcast_to((values > _LEAST).astype(values.dtype), gaps.shape)
    same = jnp.abs(gaps) <= jnp.finfo(values.dtype).eps ** 0.5
    ratios = jnp.where(same, slopes, rises / jnp.where(same, 1.0, gaps))
    turned = ratios * (basis.T @ tangents[0] @ basis)
    return (basis * raised) @ basis.T, basis @ turned @ basis.T


def _given_outputs(
    observed: Observed, params: PyTree
) -> tuple[Callable[[PyTree], jax.Array], Callable[[PyTree], jax.Array]]:
    """The log-likelihood of the logarithms, and minus its second derivatives."""
    asked, batch = observed.recipe.likelihood.nuisance, observed.batch
    assert asked is not None
    outputs = observed.apply_fn(params, batches.unshare(batch.inputs))

    def value(logs: PyTree) -> jax.Array:
        log_prob = asked.known(logs).log_prob
        return weighted_sum(lambda *_: outputs, log_prob, params, batch)

    def measure(logs: PyTree) -> jax.Array:
        if asked.expected is not None:
            count = batches.num_observations(batch, each_target=True)
            each = asked.expected(logs)
            return count.astype(each.dtype) * each
        flat = trees.ravel(logs)
        return -jax.hessian(lambda x: value(trees.unravel(x, logs)))(flat)

    return value, measure


def fuse(start: NuisanceState, count: jax.Array, states: Sequence, steps: Any) -> Any:
    """Of workers that set out from a common state; as `ff.merge`."""
    aged = age(start.memory, belief_of(start, count), steps)
    moves = [aged.to(state.mean) for state in states]
    found = minimum(aged.sums.curvature, [one.information for one in states], moves)
    mean = optax.tree.add(aged.mean, found.step)
    return start._replace(mean=mean, information=found.information, prior=aged.prior)


def slopes(
    recipe: Recipe, batch: batches.Batch, params: PyTree, logs: PyTree
) -> tuple[PyTree, jax.Array]:
    """The score of a batch about the logarithms, and its information `(k, k)`."""
    value, measure = _given_outputs(Observed(recipe, batch, None), params)
    return jax.grad(value)(logs), measure(logs)


def refined(state: NuisanceState, score: PyTree, measured: jax.Array) -> NuisanceState:
    """After a Newton step by sums over all batches, taken at the state's mean."""
    origin, precision = state.prior
    information = ops.add(from_matrix(measured, state.mean), precision)
    pull = ops.matvec(precision, optax.tree.sub(state.mean, origin))
    step = ops.solve(information, optax.tree.sub(score, pull))
    mean = optax.tree.add(state.mean, step)
    return state._replace(mean=mean, information=information)
