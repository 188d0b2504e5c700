"""Predictions with their uncertainty, by linearisation."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fisherflow_jax import posteriors
from fisherflow_jax._ground import arrays, trees
from fisherflow_jax.likelihoods import Likelihood
from fisherflow_jax.model import check_choices, once
from fisherflow_jax.posteriors import gaussians
from fisherflow_jax.predictions._checks import (
    believed,
    check_inputs,
    check_link,
    deciding,
    known,
)
from fisherflow_jax.predictions._links import Averaged
from fisherflow_jax.predictions._streaming import Outputs, Wanted, moments, raw

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
    likelihood: Likelihood,
    inputs: PyTree,
    *,
    level: float = 0.95,
    robust: bool | str = False,
    chunk_size: int | None = None,
    link: Callable[[Outputs, Likelihood], Averaged] | None = None,
) -> Prediction:
    r"""Predicts targets, by linearising the model at the mean.

    With `eta` the expected target on an unbounded scale (logit, log or identity) and
    `mu = g(eta)`,

    .. math:: \mathrm{Var}(\eta) = J I^{-1} J^\top, \quad
       \mathrm{std}(\mu) = g'(\eta) \, \mathrm{std}(\eta), \quad
       [g(\eta - q \, \mathrm{std}(\eta)),\; g(\eta + q \, \mathrm{std}(\eta))],

    so that probabilities stay within 0 and 1 and rates above 0. Without a link the mean
    is that of the model at the mean parameters; a link averages it over them. The
    interval is of the expected target, with or without a link. For a bank, mean and std
    are those of the mixture, and the interval is that of its moments on the scale of
    `eta`.

    Args:
      state: anything with `.mean` and `.information`, or a bank's state.
      apply_fn: `(params, inputs) -> outputs`.
      likelihood: the flow's, from `ff.likelihoods`.
      inputs: leading axis n; parts in `ff.Shared` are passed whole.
      level: of the interval of the mean, in (0, 1).
      robust: with the sandwich variance, as in `ff.standard_error`.
      chunk_size: examples at a time; None: as many as keep 16 MiB.
      link: None; or how to average over the outputs' normal: `ff.predictions.probit()`,
        `output_samples(key)`, `laplace_bridge()` for classes, `log_normal()` for rates,
        or your own function of `(Outputs, likelihood)`. For a gaussian nothing changes.

    Returns:
      A `Prediction` of arrays `(n, ...)`; categorical: `(n, ..., classes)`. Cost: one
      factorisation, and a backward pass and a solve for each predicted number; with
      scalar, diagonal and Kronecker structures products with what enters and returns to
      each layer in place of the solve, and no backward pass where the parameters are
      those of the last layer alone. Memory: that of a chunk.

    Raises:
      ValueError: for a level outside (0, 1), a likelihood without a mean or with an
        unknown dispersion that the state does not estimate, a link that does not go
        with the likelihood, outputs that do not fit it, an information or a model of
        other parameters, and as `standard_error` does.
      TypeError: for something that is no state, no likelihood or no link.

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
      >>> prediction = ff.predict(state, apply_fn, likelihood, jnp.array([1.0]))
      >>> print(prediction.mean, prediction.std)  # std(eta) = 1 / 2, slope 1 / 4
      [0.5] [0.125]
      >>> print(prediction.lower.round(3), prediction.upper.round(3))
      [0.273] [0.727]

    References:
      Immer, Korzepa, Bauer, "Improving predictions of Bayesian neural nets via local
      linearization", 2021.
    """
    posteriors.check_level(level)
    check_choices(apply_fn, likelihood)
    check_inputs(state, inputs, chunk_size, robust)
    check_link(link)
    covariance = getattr(link, "covariance", False) and likelihood.mixes_outputs
    wanted = Wanted(
        variance=link is not None,
        covariance=covariance,
        line_of=likelihood,
        robust=robust,
        chunk_size=chunk_size,
    )
    weights, members = gaussians(state)
    each = deciding(_compiled, state, apply_fn, inputs, wanted)
    found = [own for own, _ in each]
    if link is not None:
        found = [
            _averaged(link, outputs, known(likelihood, belief), own)
            for belief, (own, outputs) in zip(members, each, strict=True)
        ]
    dtype = trees.wide_dtype(*(x.dtype for x in jax.tree.leaves(found)))
    found = jax.tree.map(lambda x: x.astype(dtype), found)
    # eta for the interval; the mean on its own scale, where probabilities sum to one
    (line, mean, noise), (spread, variance, _) = posteriors.mixture(
        weights.astype(dtype),
        [(one.line, one.mean, one.noise) for one in found],
        [(one.line_variance, one.mean_variance, one.noise) for one in found],
    )
    reach = posteriors.two_sided(
        level, posteriors.degrees_of_freedom(state), dtype
    ) * arrays.safe_sqrt(spread)
    return Prediction(
        mean=mean,
        std=arrays.safe_sqrt(variance),
        observation_std=arrays.safe_sqrt(variance + noise),
        lower=likelihood.scale.inverse(line - reach),
        upper=likelihood.scale.inverse(line + reach),
    )


class Moments(NamedTuple):
    """Of the prediction, each `(n, ...)`."""

    line: jax.Array  # eta
    line_variance: jax.Array
    mean: jax.Array  # g(eta), or averaged
    mean_variance: jax.Array
    noise: jax.Array  # the target's own variance


def _each(
    state: Any, apply_fn: Callable, inputs: PyTree, wanted: Wanted
) -> list[tuple[Moments, Outputs | None]]:
    """Of each Gaussian of the state; outputs where a link asks for them."""
    model, each = once(apply_fn), []
    for belief in believed(state, wanted.robust)[1]:
        likelihood = known(wanted.line_of, belief)
        found, spread = moments(belief, model, inputs, wanted)
        eta = likelihood.line(found.mean)
        mean, slope = jax.jvp(likelihood.scale.inverse, (eta,), (jnp.ones_like(eta),))
        own = Moments(
            line=eta,
            line_variance=spread,
            mean=mean,
            mean_variance=jnp.square(slope) * spread,
            noise=likelihood.variance(found.mean),
        )
        each.append((own, raw(found) if wanted.variance else None))
    return each


# compiled once a model and shape, so that a second call compiles nothing
_compiled = jax.jit(_each, static_argnums=(1, 3))


def _averaged(
    link: Callable, outputs: Outputs, likelihood: Likelihood, own: Moments
) -> Moments:
    averaged = link(outputs, likelihood)
    if not isinstance(averaged, Averaged):
        raise TypeError(
            "a link returns ff.predictions.Averaged(mean, std, noise); got "
            f"{type(averaged).__name__}."
        )
    for name, value in zip(averaged._fields, averaged, strict=True):
        if value is not None and jnp.shape(value) != own.mean.shape:
            raise ValueError(
                f"the {name} that a link returns has the shape of the expected "
                f"targets, {own.mean.shape}; got {jnp.shape(value)}."
            )
    mean, std, noise = averaged
    variance = own.mean_variance if std is None else jnp.square(std)
    if likelihood.is_classes:
        # a share varies no more than a draw of 0 or 1 with its mean
        most = mean * (1 - mean)
        variance = jnp.minimum(variance, most)
        noise = most - variance
    elif noise is None:
        noise = own.noise
    return own._replace(mean=mean, mean_variance=variance, noise=noise)


def observation_interval(
    prediction: Prediction,
    likelihood: Likelihood,
    level: float = 0.95,
    *,
    state: Any = None,
) -> tuple[jax.Array, jax.Array]:
    r"""Where a new target falls with probability `level`, for normal errors.

    .. math:: m \pm q \sqrt{\mathrm{Var}(m) + \sigma^2}

    `prediction.observation_std` holds both parts: what is not known of the mean, and
    the noise. For `gaussian(scale)` the noise is the scale's; where it is estimated by
    the state, or set afterwards by `likelihood.with_dispersion(value)`, it is that
    value; for `gaussian_location_scale` it is each input's own. For counts and other
    skewed targets use quantiles of draws, or conformal sets
    (`ff.calibration`), which assume no distribution.

    Args:
      prediction: from `ff.predict` with the same likelihood.
      likelihood: gaussian, with known or unknown scale, or gaussian_location_scale.
      level: the probability of covering, in (0, 1).
      state: where it estimates the dispersion, for Student's t in place of the normal.

    Returns:
      `(lower, upper)`, each like `prediction.mean`.

    Raises:
      ValueError: for a level outside (0, 1), or another likelihood.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> information = ff.structures.Scalar(jnp.array(1.0))
      >>> state = ff.posterior(jnp.array(2.0), information, prior_precision=1e-6)
      >>> likelihood = ff.likelihoods.gaussian(scale=1.0)
      >>> x = jnp.ones(1)
      >>> prediction = ff.predict(state, lambda p, x: p * x, likelihood, x)
      >>> lower, upper = ff.predictions.observation_interval(prediction, likelihood)
      >>> print(lower.round(2), upper.round(2))  # 2 -+ 1.96 sqrt(1 + 1)
      [-0.77] [4.77]
    """
    if not likelihood.normal_errors:
        raise ValueError(
            "observation_interval is for normal errors (gaussian, "
            f"gaussian_location_scale); got {likelihood.name}."
        )
    spare = None if state is None else posteriors.degrees_of_freedom(state)
    reach = posteriors.two_sided(level, spare, prediction.mean.dtype)
    reach = reach * prediction.observation_std
    return prediction.mean - reach, prediction.mean + reach
