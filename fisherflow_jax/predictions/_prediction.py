"""Predictions with their uncertainty, by linearisation."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fisherflow_jax import posteriors
from fisherflow_jax._ground import arrays, checks, processes, trees
from fisherflow_jax._ground.warning import warn_once
from fisherflow_jax.likelihoods import LOG, Likelihood, Scale
from fisherflow_jax.model import check_choices, once
from fisherflow_jax.posteriors import gaussians
from fisherflow_jax.predictions._links import Averaged, Link, check_link, plug_in
from fisherflow_jax.predictions._quadrature import quadrature
from fisherflow_jax.predictions._streaming import Outputs, Wanted, moments, raw
from fisherflow_jax.products import believed, check_inputs, deciding, known

PyTree = Any


class Prediction(NamedTuple):
    """The expected target and how sure it is, each `(n, ...)`.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> state = ff.posterior(
      ...     jnp.array([2.0]),
      ...     ff.structures.Full(jnp.array([[99.0]])),
      ...     prior_precision=1.0,
      ... )
      >>> found = ff.predict(
      ...     state, lambda p, x: x @ p, ff.likelihoods.gaussian(), jnp.ones((1, 1))
      ... )
      >>> print(found.mean.round(3), found.std.round(3), found.observation_std.round(3))
      [2.] [0.1] [1.005]
    """

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

    so that probabilities stay within 0 and 1 and rates above 0. A link says what the
    mean is. **Class probabilities are averaged over the parameters**, and std is that
    of the probability under them (`ff.predictions.quadrature()`); the network's own are
    had by `link=ff.predictions.plug_in()`. Rates and locations are the model's at the
    mean parameters, as in software for generalised linear models. Of a rate that is the
    median under the parameters, and `log_normal()` the mean; where values are at hand
    and these are far apart, :math:`\mathrm{Var}(\eta) > 1`, an `ff.DataWarning` says
    so. The interval is of the expected target, whatever the link. For a bank, mean and
    std are those of the mixture, and the interval is that of its moments on the scale
    of `eta`.

    Under a memory that moves the parameters (`random_walk`) a state's predictions are
    of the time of its last batch; a forecast is of `flow.advance(state)`.

    Args:
      state: anything with `.mean` and `.information`, or a bank's state.
      apply_fn: `(params, inputs) -> outputs`.
      likelihood: the flow's, from `ff.likelihoods`.
      inputs: leading axis n; parts in `ff.Shared` are passed whole.
      level: of the interval of the mean, in (0, 1).
      robust: with the sandwich variance, as in `ff.standard_error`.
      chunk_size: examples at a time; None: as many as keep 16 MiB.
      link: None, `ff.predictions.quadrature()` for classes, and else `plug_in()`; or
        another way to average over the outputs' normal: `probit()`, `laplace_bridge()`
        for classes, `log_normal()` for rates, `output_samples(key)`, or your own
        function of `(Outputs, likelihood)`. For a gaussian none changes the mean.

    Returns:
      A `Prediction` of arrays `(n, ...)`; categorical: `(n, ..., classes)`. Cost: one
      factorisation, and a backward pass and a solve for each predicted number; with
      scalar, diagonal and Kronecker structures products with what enters and returns to
      each layer in place of the solve, and no backward pass where the parameters are
      those of the last layer alone. Of up to 64 classes the average is 1,024 softmaxes
      an example, and a root of its k^2 covariances. Memory: that of a chunk.

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
      >>> print(prediction.mean, prediction.std.round(3))
      [0.5] [0.118]
      >>> print(prediction.lower.round(3), prediction.upper.round(3))
      [0.273] [0.727]
      >>> plain = {"link": ff.predictions.plug_in()}
      >>> prediction = ff.predict(
      ...     state, apply_fn, likelihood, jnp.array([1.0]), **plain
      ... )
      >>> print(prediction.mean, prediction.std)  # std(eta) = 1 / 2, slope 1 / 4
      [0.5] [0.125]

    References:
      Immer, Korzepa, Bauer, "Improving predictions of Bayesian neural nets via local
      linearization", 2021.
      McCullagh, Nelder, "Generalized Linear Models", 1989: rates at the mean.
    """
    posteriors.check_level(level)
    call = "ff.predict(state, apply_fn, likelihood, inputs)"
    check_choices(apply_fn, likelihood, call)
    inputs = check_inputs(state, inputs, chunk_size, robust)
    check_link(link)
    found = _found(
        state,
        apply_fn,
        inputs,
        Wanted(line_of=likelihood, robust=robust, chunk_size=chunk_size),
        _default(likelihood) if link is None else link,
    )
    if link is None:
        _warn_of_rates(state, likelihood, found)
    dtype = trees.wide_dtype(*(x.dtype for x in jax.tree.leaves(found)))
    spare = posteriors.degrees_of_freedom(state)
    quantile = posteriors.two_sided(level, spare, dtype)
    return _mixed(gaussians(state)[0], found, quantile, likelihood.scale)


# compiled as one: operation by operation a first call takes several times as long
@functools.partial(jax.jit, static_argnums=3)
def _mixed(
    weights: jax.Array, found: list["Moments"], quantile: jax.Array, scale: Scale
) -> Prediction:
    """The moments of a mixture, in the dtype of the quantile."""
    found = jax.tree.map(lambda x: x.astype(quantile.dtype), found)
    # eta for the interval; the mean on its own scale, where probabilities sum to one
    (line, mean, noise), (spread, variance, _) = posteriors.mixture(
        weights.astype(quantile.dtype),
        [(one.line, one.mean, one.noise) for one in found],
        [(one.line_variance, one.mean_variance, one.noise) for one in found],
    )
    reach = quantile * arrays.safe_sqrt(spread)
    return Prediction(
        mean=mean,
        std=arrays.safe_sqrt(variance),
        observation_std=arrays.safe_sqrt(variance + noise),
        lower=scale.inverse(line - reach),
        upper=scale.inverse(line + reach),
    )


class Moments(NamedTuple):
    """Of the prediction, each `(n, ...)`."""

    line: jax.Array  # eta
    line_variance: jax.Array
    mean: jax.Array  # g(eta), or averaged
    mean_variance: jax.Array
    noise: jax.Array  # the target's own variance


def _default(likelihood: Likelihood) -> Link:
    """Probabilities are averaged, all else is predicted at the mean."""
    return quadrature() if likelihood.is_classes else plug_in()


def _found(
    state: Any, apply_fn: Callable, inputs: PyTree, wanted: Wanted, link: Callable
) -> list[Moments]:
    """By the link, of each Gaussian of the state."""
    likelihood = wanted.line_of
    most = getattr(link, "covariance", False) if likelihood.mixes_outputs else 0
    wanted = wanted._replace(covariance=math.inf if most is True else most)
    if link == plug_in():
        wanted, within = wanted._replace(covariance=0), None
    elif getattr(link, "streamed", False):
        within = link
    else:
        wanted, within = wanted._replace(variance=True), None
    each = deciding(_compiled, state, apply_fn, inputs, wanted, within)
    if not wanted.variance:
        return [own for own, _ in each]
    families = [known(likelihood, belief) for belief in gaussians(state)[1]]
    return [
        _averaged(link(outputs, family), family, own)
        for family, (own, outputs) in zip(families, each, strict=True)
    ]


def _each(
    state: Any,
    apply_fn: Callable,
    inputs: PyTree,
    wanted: Wanted,
    link: Link | None,
) -> list[tuple[Moments, Outputs | None]]:
    """Of each Gaussian of the state, by the link; outputs where one is to follow."""
    model, each = once(apply_fn), []
    for belief in believed(state, wanted.robust)[1]:
        of = functools.partial(_moments, known(wanted.line_of, belief), wanted, link)
        each.append(moments(belief, model, inputs, wanted, of))
    return each


def _moments(
    likelihood: Likelihood, wanted: Wanted, link: Link | None, found: Outputs
) -> tuple[Moments, Outputs | None]:
    eta, spread = likelihood.line(found.mean), jnp.asarray(found.line_variance)
    mean, slope = jax.jvp(likelihood.scale.inverse, (eta,), (jnp.ones_like(eta),))
    own = Moments(
        line=eta,
        line_variance=spread,
        mean=mean,
        mean_variance=jnp.square(slope) * spread,
        noise=likelihood.variance(found.mean),
    )
    if link is not None:
        return _averaged(link(raw(found), likelihood), likelihood, own), None
    return own, raw(found) if wanted.variance else None


# compiled once a model and shape, so that a second call compiles nothing
_compiled = jax.jit(_each, static_argnums=(1, 3, 4))


def _averaged(averaged: Any, likelihood: Likelihood, own: Moments) -> Moments:
    """The moments with those that a link returned in the place of the model's own."""
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
        if not likelihood.mixes_outputs:  # times the dispersion: a fourth, at one half
            noise = noise * 4 * likelihood.variance(jnp.zeros_like(noise))
    elif noise is None:
        noise = own.noise
    return own._replace(mean=mean, mean_variance=variance, noise=noise)


def _warn_of_rates(state: Any, likelihood: Likelihood, found: list[Moments]) -> None:
    """Where a rate at the mean is far from its mean, and values are at hand."""
    spread = [one.line_variance for one in found]
    if likelihood.scale != LOG or checks.is_traced(spread):
        return
    spread = processes.on_host(spread)
    wide = np.concatenate([np.ravel(x)[np.ravel(x) > 1] for x in spread])
    if wide.size:
        warn_once(
            state,
            f"the logarithms of {wide.size} predicted rates have a variance above 1, "
            f"up to {np.max(wide):.3g}: what is predicted, the rate at the mean "
            "parameters, is their median and far below their mean. "
            "link=ff.predictions.log_normal() predicts the mean, "
            "link=ff.predictions.plug_in() the same without this warning.",
            topic="rates",
        )


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
