"""Predictions with their uncertainty, by linearisation."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fisherflow_jax import batch as batches
from fisherflow_jax import information as ops
from fisherflow_jax import vectors
from fisherflow_jax.bank import BankState
from fisherflow_jax.likelihoods import Likelihood
from fisherflow_jax.posteriors.intervals import (
    degrees_of_freedom_of,
    dispersion_of,
    meat_of,
)
from fisherflow_jax.posteriors.quantiles import check_level, two_sided

PyTree = Any


class Prediction(NamedTuple):
    """The expected target and how sure it is, each `(n, ...)`."""

    mean: jax.Array  # of the target: class probabilities, rate, location
    std: jax.Array  # of that mean, from the parameters' uncertainty
    observation_std: jax.Array  # of a new target: the mean's and its own variance
    lower: jax.Array  # of the mean, on the target's scale
    upper: jax.Array


def predict(
    state: Any,
    apply_fn: Callable,
    inputs: PyTree,
    likelihood: Likelihood,
    *,
    level: float = 0.95,
    robust: bool = False,
    chunk_size: int = 32,
) -> Prediction:
    r"""Predicts targets, by linearising the model at the mean.

    With `eta` the expected target on an unbounded scale (logit, log or identity) and
    `mu = g(eta)`,

    .. math:: \mathrm{Var}(\eta) = J I^{-1} J^\top, \quad
       \mathrm{std}(\mu) = g'(\eta) \, \mathrm{std}(\eta), \quad
       [g(\eta - q \, \mathrm{std}(\eta)),\; g(\eta + q \, \mathrm{std}(\eta))],

    so that probabilities stay within 0 and 1 and rates above 0. The mean is that of the
    model at the mean parameters, not averaged over them. For a bank, mean and std are
    those of the mixture, and the interval is that of its moments on the scale of `eta`.

    Args:
      state: anything with `.mean` and `.information`, or a bank's state.
      apply_fn: `(params, inputs) -> outputs`.
      inputs: leading axis n; parts in `ff.Shared` are passed whole.
      likelihood: the flow's, from `ff.likelihoods`.
      level: of the interval of the mean, in (0, 1).
      robust: with the sandwich variance.
      chunk_size: examples at a time. Memory: chunk_size * (targets an example) * d.

    Returns:
      A `Prediction` of arrays `(n, ...)`; categorical: `(n, ..., classes)`. Cost: one
      factorisation, and a backward pass and a solve for each predicted number.

    Raises:
      ValueError: for a level outside (0, 1), a likelihood without a mean or with an
        unknown dispersion that the state does not estimate, and as `standard_error`
        does.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> apply_fn = lambda params, x: x * params
      >>> likelihood = ff.likelihoods.bernoulli()
      >>> flow = ff.fisher_flow(
      ...     apply_fn,
      ...     likelihood,
      ...     structure=ff.structures.full(),
      ...     memory=ff.memories.stationary(),
      ...     prior_precision=4.0,
      ... )
      >>> state = flow.init(jnp.array(0.0))
      >>> prediction = ff.predict(state, apply_fn, jnp.array([1.0]), likelihood)
      >>> print(prediction.mean, prediction.std)  # std(eta) = 1 / 2, slope 1 / 4
      [0.5] [0.125]
      >>> print(prediction.lower.round(3), prediction.upper.round(3))
      [0.273] [0.727]

    References:
      Immer, Korzepa, Bauer, "Improving predictions of Bayesian neural nets via local
      linearization", 2021.
    """
    check_level(level)
    if not isinstance(chunk_size, int) or chunk_size < 1:
        raise ValueError(
            f"chunk_size is a positive whole number of examples; got {chunk_size!r}."
        )
    batches.as_batch((inputs, None))  # a leading axis shared by all, n > 0
    for member in getattr(state, "members", (state,)):
        dispersion_of(member)  # raises here, where the values are at hand
    moments = _compiled_moments(state, apply_fn, inputs, likelihood, robust, chunk_size)
    dtype = vectors.wide_dtype(*(x.dtype for x in jax.tree.leaves(moments)))
    moments = jax.tree.map(lambda x: x.astype(dtype), moments)
    reach = two_sided(level, degrees_of_freedom_of(state), dtype)
    reach = reach * jnp.sqrt(moments.line_variance)
    return Prediction(
        moments.mean,
        jnp.sqrt(moments.mean_variance),
        jnp.sqrt(moments.mean_variance + moments.noise),
        likelihood.from_line(moments.line - reach),
        likelihood.from_line(moments.line + reach),
    )


class _Moments(NamedTuple):
    """Of the prediction, each `(n, ...)`."""

    line: jax.Array  # eta
    line_variance: jax.Array
    mean: jax.Array  # g(eta)
    mean_variance: jax.Array
    noise: jax.Array  # the target's own variance


@functools.singledispatch
def _moments(
    state: Any,
    apply_fn: Callable,
    inputs: PyTree,
    likelihood: Likelihood,
    robust: bool,
    chunk_size: int,
) -> _Moments:
    dispersion = dispersion_of(state)
    variance = _line_variance(state, robust, dispersion)
    sliced, rebuild = batches.split(inputs)
    if likelihood.with_dispersion is not None:
        if dispersion is None:
            raise ValueError(
                f"the dispersion of {likelihood.name} is unknown and this state does "
                "not estimate it: give the likelihood it was made with, or "
                "likelihood.with_dispersion(value)."
            )
        likelihood = likelihood.with_dispersion(dispersion)

    def one(parts: list) -> tuple[jax.Array, jax.Array, jax.Array]:
        example = batches.unshare(rebuild([x[None] for x in parts]))

        def line(params: PyTree) -> tuple[jax.Array, jax.Array]:
            outputs = apply_fn(params, example)
            return likelihood.line(outputs)[0], outputs

        eta, vjp, outputs = jax.vjp(line, state.mean, has_aux=True)
        count = math.prod(eta.shape)
        basis = jnp.eye(count, dtype=eta.dtype).reshape((count, *eta.shape))
        spread = jax.vmap(lambda e: variance(vjp(e)[0]))(basis)
        return eta, spread.reshape(eta.shape), likelihood.variance(outputs)[0]

    eta, spread, noise = jax.lax.map(one, sliced, batch_size=chunk_size)
    mean, slope = jax.jvp(likelihood.from_line, (eta,), (jnp.ones_like(eta),))
    return _Moments(eta, spread, mean, jnp.square(slope) * spread, noise)


@_moments.register
def _(state: BankState, *arguments: Any) -> _Moments:
    members = [_moments(member, *arguments) for member in state.members]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *members)
    weights = state.weights.astype(stacked.line.dtype)

    def mix(values: jax.Array) -> jax.Array:
        return jnp.tensordot(weights, values, 1)

    def mixture(means: jax.Array, variances: jax.Array) -> tuple[jax.Array, jax.Array]:
        center = mix(means)
        between = jnp.square(means - jnp.broadcast_to(center, means.shape))
        return center, mix(variances + between)

    # eta for the interval; the mean on its own scale, where probabilities sum to one
    line = mixture(stacked.line, stacked.line_variance)
    return _Moments(
        *line, *mixture(stacked.mean, stacked.mean_variance), mix(stacked.noise)
    )


# compiled once a model and shape, so that a second call compiles nothing
_compiled_moments = jax.jit(_moments, static_argnums=(1, 3, 4, 5))


def _line_variance(
    state: Any, robust: bool, dispersion: jax.Array | None
) -> Callable[[PyTree], jax.Array]:
    """`g -> g^T Cov g`, factorised once."""
    solve = ops.solver(state.information)
    if robust:
        meat = meat_of(state)
        return lambda g: ops.quadratic_form(meat, solve(g))
    if dispersion is None:
        return lambda g: vectors.dot(vectors.widen(g), solve(g))
    return lambda g: dispersion * vectors.dot(vectors.widen(g), solve(g))
