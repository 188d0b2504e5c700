"""The scale of a posterior's covariance, found on held-out data."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fisherflow_jax import information as ops
from fisherflow_jax._ground import checks, trees
from fisherflow_jax._ground.warning import warn_once
from fisherflow_jax.accumulation import converted
from fisherflow_jax.calibration import _densities as densities
from fisherflow_jax.calibration import _scale_search as scale_search
from fisherflow_jax.likelihoods import Likelihood
from fisherflow_jax.model import check_choices
from fisherflow_jax.posteriors import Gaussian, Posterior, gaussian


class Calibration(NamedTuple):
    """A posterior and a likelihood whose scale was found on held-out data.

    Example:
      >>> import fisherflow_jax as ff
      >>> ff.Calibration._fields[:4]
      ('posterior', 'likelihood', 'scale', 'noise')
    """

    posterior: Posterior
    likelihood: Likelihood  # with the noise that was found
    scale: jax.Array  # (), factor of the covariance
    noise: jax.Array | None  # (), standard deviation of a target; None: not gaussian
    before: jax.Array  # (), mean negative log-likelihood, nats a target
    after: jax.Array  # ()
    mean_only: jax.Array  # (), with no uncertainty about the parameters
    boundary: jax.Array  # () int32: -1 if mean_only is as good, 1 for no upper limit


@checks.called_as(
    "calibrate(state, apply_fn, likelihood, validation), and (inputs, targets) is one "
    "argument: (X, y)"
)
def calibrate(
    state: Any,
    apply_fn: Callable,
    likelihood: Likelihood,
    validation: Any,
    *,
    link: Callable | None = None,
    search_noise: bool = True,
    chunk_size: int | None = None,
    to_batch: Callable[[Any], Any] | None = None,
) -> Calibration:
    r"""The scale of a posterior's covariance that predicts held-out data best.

    .. math:: s^* = \arg\min_{s > 0} -\frac 1 n \sum_i
       \log \int p(y_i \mid z) \, \mathcal N(z; m_i, s V_i) \, dz

    with the linearised outputs `N(m_i, V_i)` of the posterior: one number, and the
    default way to set it. A prior precision or a temperature that was guessed is
    thereby put right; what the structure says of one input beside another stays. With a
    gaussian likelihood the noise is found together with it, a target's predictive
    density being :math:`\mathcal N(m_i, s V_i + \sigma^2)`; so is the dispersion of
    `ff.likelihoods.gamma(shape=None)`. The outputs' variances are proportional to s, so
    that the model is passed over once.

    Classes are averaged as `ff.predict` averages them, by
    `ff.predictions.quadrature()` or the link that both are given: `after` is then the
    negative log-likelihood of its predictions. The mean and log-scale of
    `gaussian_location_scale` are averaged exactly but for a quadrature in the
    log-scale; other likelihoods by quadrature over each output, or, where a target has
    several outputs, by cubature at twice as many points as outputs.

    Args:
      state: anything with `.mean` and `.information`, such as `ff.posterior(...)` or a
        flow's state.
      apply_fn: `(params, inputs) -> outputs`.
      likelihood: from `ff.likelihoods`.
      validation: a batch `(inputs, targets)` or `(inputs, targets, weights)` that the
        state was not made of, a list or loader of batches, or `ff.Stacked`. About a
        hundred examples suffice.
      link: None, that of `ff.predict`; or another of `ff.predictions`, for classes.
      search_noise: False keeps a known noise of `ff.likelihoods.gaussian(scale)`.
      chunk_size: examples at a time in the linearised pass; None: its own choice.
      to_batch: makes a batch of what a loader gives, if it is none: of dicts, `lambda
        item: (item["x"], item["y"])`.

    Returns:
      A `Calibration(posterior, likelihood, scale, noise, before, after, mean_only,
      boundary)`. `after` is never larger than `before`. Where the mean alone predicts
      best, the scale is the smallest that was tried, `boundary` is -1 and an
      `ff.DataWarning` says so; where no uncertainty is too large, the largest and 1.
      Cost: one linearised pass, and about 110 evaluations on its outputs (float64:
      140); of several classes each is 1,024 softmaxes a target, a second in all for 360
      targets of ten classes; of 3,000 classes some seconds for 100 targets. Memory: the
      outputs' means and variances (of up to 64 classes, with some links and with some
      likelihoods covariances) of all the validation data.

    Raises:
      ValueError: for empty validation data, and, where the values are at hand, for
        targets that cannot be and values that are not finite; for a link beside a
        likelihood without classes; for gaussian targets that are all predicted exactly.
      TypeError: for a mixture, such as a bank's state, which has no one covariance.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> likelihood = ff.likelihoods.gaussian(scale=1.0)  # a guess
      >>> information = ff.structures.Full(jnp.array([[4.0]]))
      >>> state = ff.posterior(jnp.array([1.0]), information, prior_precision=1.0)
      >>> x = jnp.array([[0.0], [0.0], [2.0], [2.0]])
      >>> y = jnp.array([0.1, -0.1, 3.0, 1.0])
      >>> found = ff.calibrate(state, lambda p, x: x @ p, likelihood, (x, y))
      >>> print(
      ...     found.noise.round(2), found.scale.round(2)
      ... )  # variance 0.01, 0.01 + 0.99
      0.1 1.24
      >>> print(found.before.round(3), found.after.round(3))
      1.207 0.268

    References:
      Guo, Pleiss, Sun, Weinberger, "On calibration of modern neural networks", 2017.
      Ritter, Botev, Barber, "A scalable Laplace approximation for neural networks",
      2018.
    """
    call = "ff.calibrate(state, apply_fn, likelihood, validation)"
    check_choices(apply_fn, likelihood, call)
    belief, validation = gaussian(state), converted(validation, to_batch)
    if likelihood.nuisance is not None and belief.nuisance is not None:
        likelihood = likelihood.nuisance.known(belief.nuisance.mean)
    if link is not None and not likelihood.is_classes:
        raise ValueError(
            "a link makes probabilities of classes, which likelihood "
            f"{likelihood.name} does not have; leave it out."
        )
    link = densities.default(likelihood, link)
    held = scale_search.held_out(
        state, apply_fn, likelihood, validation, link=link, chunk_size=chunk_size
    )
    dispersion = belief.dispersion
    with_dispersion = likelihood.with_dispersion
    start = jnp.ones((), held.weights.dtype) if dispersion is None else dispersion
    noise = None
    with_noise = likelihood.with_noise
    if with_noise is not None and (search_noise or with_dispersion):
        found, variance = scale_search.with_noise(held, likelihood, start)
        if not checks.holds(variance > 0):
            raise ValueError(
                "there is no noise to find: the mean predicts every validation target "
                "exactly. Is the validation set that of the training?"
            )
        noise = jnp.sqrt(variance)
        calibrated = with_noise(_number(noise))
    elif with_dispersion is not None:
        found, known = scale_search.with_dispersion(held, likelihood, start)
        calibrated = with_dispersion(_number(known))
    else:
        found, calibrated = scale_search.alone(held, likelihood, link), likelihood
        if with_noise is not None:
            noise = jnp.sqrt(likelihood.variance(held.outputs.mean).ravel()[0])
    _warn_of_the_end(state, found)
    return Calibration(
        posterior=_rescaled(state, belief, found.scale),
        likelihood=calibrated,
        noise=noise,
        **found._asdict(),
    )


def _warn_of_the_end(state: Any, found: scale_search.Found) -> None:
    """Where no uncertainty is left, and values are at hand; one: it stays as given."""
    if checks.is_concrete(found) and found.boundary < 0 and found.scale != 1:
        warn_once(
            state,
            f"the scale of the covariance ends at {found.scale:.2g}, the least that "
            "was tried: on these held-out data the predictions are as good without "
            "any uncertainty about the parameters, and no error bars are left. Few "
            "rows, and rows that the training has seen, end so: hold out about a "
            "hundred others. If these are such, inputs like them need no error bars; "
            "for other ones keep the state given (of ff.laplace: ff.posterior of its "
            "report.accumulation).",
            topic="scale",
        )


def _number(value: jax.Array) -> Any:
    """A Python number where it is at hand: equal likelihoods are then one object."""
    return float(value) if checks.is_concrete(value) else value


def _rescaled(state: Any, belief: Gaussian, scale: jax.Array) -> Posterior:
    dtype = trees.float_dtype(belief.mean)
    scale, one = scale.astype(dtype), jnp.ones((), dtype)
    dispersion = one if belief.dispersion is None else belief.dispersion.astype(dtype)
    factor = 1 / (scale * dispersion)
    prior = belief.prior_precision
    return Posterior(
        mean=belief.mean,
        information=ops.scale(belief.information, factor),
        temperature=getattr(state, "temperature", one) * scale,
        prior_precision=None if prior is None else ops.scale(prior, factor),
    )
