"""Likelihoods of real targets given a location: gaussian, with its scale, student_t."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import polygamma
from jax.typing import ArrayLike

from fisherflow_jax._ground import quadrature
from fisherflow_jax._ground.arrays import like, widen
from fisherflow_jax.likelihoods import _distances as distances
from fisherflow_jax.likelihoods import _known_noise as known_noise
from fisherflow_jax.likelihoods import _likelihood as shared
from fisherflow_jax.likelihoods._known_noise import finite
from fisherflow_jax.likelihoods._likelihood import IDENTITY, Likelihood, one_output
from fisherflow_jax.likelihoods._log_gamma import log_beta
from fisherflow_jax.likelihoods._nuisance import Nuisance, unknown
from fisherflow_jax.likelihoods._roots import largest_entries

_FAR = 1e9  # residuals whose square is 1 + their square in float64


@shared.family
def gaussian(
    scale: ArrayLike | str | None = 1.0, *, covariance: ArrayLike | str | None = None
) -> Likelihood:
    r"""A real target with a normal error, or several with errors that go together.

    .. math::
      y \sim N(z, s^2), \qquad \text{output Fisher information } 1 / s^2; \qquad
      y \sim N(z, R), \quad R^{-1}

    Outputs are means `(n, ...)`; targets have the same shape and unit. With a
    covariance, one observation is the k targets on the last axis, `(n, ..., k)`, and
    has one log-probability; where some of them are missing (by the batch's mask, or a
    weight of 0), it is that of the others.

    What is known of the noise of each row comes with the outputs, behind the mean:
    with `scale="given"` outputs are `(n, ..., 2)`, the mean and the standard deviation;
    with `covariance="given"` they are `(n, ..., k + k^2)`, the means and the entries of
    the covariance:

        lambda params, x: jnp.stack([x["row"] @ params, x["sd"]], -1)

    Parameters must not move this noise, of which they would then be told by what the
    information does not hold: a model where they do is refused, at the first use.

    Args:
      scale: the standard deviation s of a target, in the targets' unit, a number. None:
        unknown. The likelihood is then that of unit dispersion, and
        `with_dispersion(phi)` the one with s^2 = phi known. "given": by the outputs.
      covariance: R, `(k, k)`, in place of the scale; or "given". Both may be traced.

    Returns:
      A `Likelihood`, the same object for equal arguments. With a covariance the root
      has k columns; cost: k^3 for R, or for each row where it is given.

    Raises:
      ValueError: for a scale that is not positive, a covariance that is not positive
        definite, or both; by `check`, for shapes that differ. Noise of the outputs that
        is no noise makes the log-probability NaN, as an impossible target does.

    Example:
      >>> import jax.numpy as jnp
      >>> from fisherflow_jax import likelihoods
      >>> likelihood = likelihoods.gaussian(scale=2.0)
      >>> outputs, targets = jnp.array([1.0]), jnp.array([3.0])
      >>> round(float(likelihood.log_prob(outputs, targets)[0]), 4)
      -2.1121
      >>> float(likelihood.root(outputs, jnp.ones(1))[0])
      0.5
      >>> unknown = likelihoods.gaussian(scale=None)
      >>> float(unknown.with_dispersion(4.0).variance(outputs)[0])
      4.0
      >>> noise = jnp.array([[2.0, 1.0], [1.0, 2.0]])
      >>> together = likelihoods.gaussian(covariance=noise)
      >>> together.log_prob(jnp.zeros((1, 2)), jnp.ones((1, 2))).round(3)
      Array([-2.721], dtype=float32)

    References:
      McCullagh, Nelder, "Generalized Linear Models", 1989.
    """
    name = "gaussian"
    for parameter, value in (("scale", scale), ("covariance", covariance)):
        if isinstance(value, str) and value != "given":
            raise ValueError(
                f"{name}: {parameter} is a value, or 'given' with the outputs; got "
                f"{value!r}."
            )
    if covariance is not None:
        if not (isinstance(scale, (int, float)) and scale == 1):
            raise ValueError(f"{name}: give a scale or a covariance, not both.")
        if isinstance(covariance, str):
            return known_noise.of_vectors(None)
        known_noise.require_covariance(covariance)
        return known_noise.of_vectors(covariance)
    if isinstance(scale, str):
        return known_noise.with_given_scale()
    if scale is None:
        return gaussian(1.0)._replace(
            with_dispersion=lambda dispersion: gaussian(jnp.sqrt(dispersion)),
            pearson=shared.on_both(name, lambda z, y: (y - z) ** 2),
            log_unit_variance=lambda targets: jnp.zeros_like(widen(targets)),
        )
    several = "; outputs with noise of their own have covariance=jnp.diag(scale**2)"
    shared.require_positive(name, "scale", scale, several)

    def variance(location: jax.Array) -> jax.Array:
        return jnp.full_like(location, like(scale, location) ** 2)

    def log_prob(location: jax.Array, targets: jax.Array) -> jax.Array:
        return jax.scipy.stats.norm.logpdf(targets, location, like(scale, location))

    def sample(key: jax.Array, location: jax.Array) -> jax.Array:
        noise = jax.random.normal(key, location.shape, location.dtype)
        return location + like(scale, location) * noise

    def expected_log_prob(
        mean: jax.Array, spread: jax.Array, covariance: Any, targets: ArrayLike
    ) -> jax.Array:
        mean = widen(mean)
        residual = like(targets, mean) - mean
        return quadrature.normal_log_density(residual, spread + variance(mean))

    def root(location: jax.Array) -> jax.Array:
        return 1 / like(scale, location)

    def distance(location: jax.Array, other: jax.Array) -> jax.Array:
        return distances.flat(root(location), location, other)

    parts = finite, log_prob, variance, sample, root, distance
    known = one_output(name, IDENTITY, *parts)
    return known._replace(
        expected_log_prob=expected_log_prob, normal_errors=True, with_noise=gaussian
    )


@shared.family
def gaussian_location_scale() -> Likelihood:
    r"""A real target with a normal error whose size is predicted too.

    .. math::
      y \sim N(m, e^{2s}), \qquad
      \text{output Fisher information } \operatorname{diag}(e^{-2s}, 2)
      \text{ of } (m, s).

    Outputs are `(n, ..., 2)`: the mean m, in the targets' unit, and the logarithm s of
    the standard deviation; targets are `(n, ...)`. The mean and the line are m.

    Returns:
      A `Likelihood`, the same object for every call.

    Raises:
      ValueError: by `check`, unless the last axis of the outputs is 2 and the targets
        have the other axes.

    Example:
      >>> import jax.numpy as jnp
      >>> from fisherflow_jax import likelihoods
      >>> likelihood = likelihoods.gaussian_location_scale()
      >>> outputs = jnp.array([[1.0, jnp.log(2.0)]])
      >>> [round(float(c), 4) for c in likelihood.root(outputs, jnp.ones((1, 2)))[0]]
      [0.5, 1.4142]

    References:
      Rao, "Information and the accuracy attainable in the estimation of
      statistical parameters", 1945.
    """
    name = "gaussian_location_scale"

    def check(outputs: Any, targets: Any) -> None:
        shape = shared.check_outputs(name, outputs)
        if len(shape) == 0 or shape[-1] != 2:
            raise ValueError(
                f"{name}: the last axis of the outputs must be 2 (mean and log standard"
                f" deviation), got shape {shape}."
            )
        rule = "targets must have the shape of the outputs without the last axis"
        shared.check_targets(name, shape, shape[:-1], targets, rule)

    def log_prob(outputs: ArrayLike, targets: ArrayLike) -> jax.Array:
        check(outputs, targets)
        location, log_scale = _both(outputs)
        residual = (like(targets, location) - location) * jnp.exp(-log_scale)
        value = -0.5 * residual**2 - log_scale - 0.5 * math.log(2 * math.pi)
        return shared.nan_outside(finite(targets), value)

    def sample(key: jax.Array, outputs: ArrayLike) -> jax.Array:
        location, log_scale = _both(outputs)
        noise = jax.random.normal(key, location.shape, location.dtype)
        return location + jnp.exp(log_scale) * noise

    def root(outputs: ArrayLike, probes: Any, key: Any = None) -> jax.Array:
        precision = jnp.exp(-_both(outputs)[1])
        factor = jnp.stack([precision, jnp.full_like(precision, math.sqrt(2))], -1)
        return shared.scaled_probes(outputs, factor, probes)

    return Likelihood(
        name=name,
        log_prob=log_prob,
        mean=lambda outputs: _both(outputs)[0],
        variance=lambda outputs: jnp.exp(2 * _both(outputs)[1]),
        sample=sample,
        root=root,
        probe_shape=tuple,
        line=lambda outputs: _both(outputs)[0],
        scale=IDENTITY,
        support=finite,
        check=check,
        diagonal=True,
        low_rank=largest_entries(root),
        expected_log_prob=_over_both,
        normal_errors=True,
        kl=shared.on_wide(known_noise.kl_of_normals),
        distance=shared.on_wide(distances.location_scale(1.0, 2.0)),
    )


def _both(outputs: ArrayLike) -> tuple[jax.Array, jax.Array]:
    wide = widen(outputs)
    return wide[..., 0], wide[..., 1]


def _over_both(
    mean: jax.Array, variance: jax.Array, covariance: jax.Array, targets: ArrayLike
) -> jax.Array:
    """Over the location in closed form, over the log-scale by quadrature."""
    location, log_scale = _both(mean)
    spread, cross = covariance[..., 0, 0], covariance[..., 0, 1]
    std = jnp.sqrt(covariance[..., 1, 1])
    slope = jnp.where(std > 0, cross / jnp.where(std > 0, std, 1), 0)
    # of the location, given the log-scale
    spread = jnp.maximum(spread - jnp.square(slope), 0)
    residual = like(targets, location) - location

    def log_prob(x: jax.Array) -> jax.Array:
        variance = spread + jnp.exp(2 * (log_scale + x * std))
        return quadrature.normal_log_density(residual - x * slope, variance)

    return quadrature.log_average(log_prob, *quadrature.normal_nodes(location.dtype))


@shared.family
def student_t(df: ArrayLike | None, scale: ArrayLike | None) -> Likelihood:
    r"""A real target with heavy-tailed errors: outliers pull little.

    .. math::
      (y - z) / s \sim t_\nu, \qquad
      \text{output Fisher information } \frac{\nu + 1}{(\nu + 3) s^2}.

    Outputs are locations `(n, ...)`; targets have the same shape and unit. The location
    is the mean for :math:`\nu > 1` (for :math:`\nu \le 1` there is no mean: read it as
    the median). The variance :math:`s^2 \nu / (\nu - 2)` is infinite for
    :math:`\nu \le 2`.

    Args:
      df: the degrees of freedom :math:`\nu`, a number. None: unknown.
      scale: the scale s, in the targets' unit, a number. None: unknown. A flow
        estimates the logarithms of what is unknown beside the parameters, under the
        priors N(log 5, 2^2) of df (nothing tells a large one from infinity) and
        N(0, 100^2) of scale; `state.nuisance` is a state about those.

    Returns:
      A `Likelihood`, the same object for equal arguments.

    Raises:
      ValueError: for a df or scale that is not positive; by `check`, for shapes that
        differ; where an unknown one would have to be known.

    Example:
      >>> import jax.numpy as jnp
      >>> from fisherflow_jax import likelihoods
      >>> likelihood = likelihoods.student_t(df=3.0, scale=1.0)
      >>> round(float(likelihood.variance(jnp.zeros(1))[0]), 3)
      3.0
      >>> round(float(likelihood.root(jnp.zeros(1), jnp.ones(1))[0]) ** 2, 3)
      0.667

    References:
      Lange, Little, Taylor, "Robust Statistical Modeling
      Using the t Distribution", 1989.
    """
    name = "student_t"
    if df is None or scale is None:
        return _unknown_student_t(df, scale)
    shared.require_positive(name, "df", df)
    shared.require_positive(name, "scale", scale)

    def both(location: jax.Array) -> tuple[jax.Array, jax.Array]:
        return like(df, location), like(scale, location)

    def log_prob(location: jax.Array, targets: jax.Array) -> jax.Array:
        nu, s = both(location)
        residual = (targets - location) / (s * jnp.sqrt(nu))
        # log(1 + r^2) = 2 log r beyond rounding: an outlier's square would overflow
        near = jnp.clip(residual, -_FAR, _FAR)
        beyond = jnp.log(jnp.maximum(jnp.abs(residual), _FAR) / _FAR)
        logs = jnp.log1p(near**2) + 2 * beyond
        normaliser = log_beta(0.5 * nu, 0.5) + 0.5 * jnp.log(nu) + jnp.log(s)
        return -0.5 * (nu + 1) * logs - normaliser

    def variance(location: jax.Array) -> jax.Array:
        nu, s = both(location)
        finite = s**2 * nu / jnp.where(nu > 2, nu - 2, 1)
        return jnp.full_like(location, jnp.where(nu > 2, finite, jnp.inf))

    def sample(key: jax.Array, location: jax.Array) -> jax.Array:
        nu, s = both(location)
        noise = jax.random.t(key, nu, location.shape, location.dtype)
        return location + s * noise

    def root(location: jax.Array) -> jax.Array:
        nu, s = both(location)
        return jnp.sqrt((nu + 1) / (nu + 3)) / s

    def distance(location: jax.Array, other: jax.Array) -> jax.Array:
        return distances.flat(root(location), location, other)

    def kl(location: jax.Array, other: jax.Array) -> jax.Array:
        nu, s = both(location)
        return _kl_of_student_t(nu, (other - location) / s)

    parts = finite, log_prob, variance, sample, root, distance
    return one_output(name, IDENTITY, *parts)._replace(kl=shared.on_wide(kl))


def _kl_of_student_t(nu: jax.Array, moved: jax.Array) -> jax.Array:
    """By a double exponential trapezoid over the errors: no closed form is known.

    The relative error is 1e-8 up to 5 scales apart, 1e-4 at 30 (of one degree of
    freedom; less of more).
    """
    steps = np.linspace(-3.9, 3.9, 241)
    inner = 0.5 * np.pi * np.sinh(steps)
    grown = np.log(np.cosh(inner)) + np.log(np.cosh(steps))
    u, logs = (jnp.asarray(x, moved.dtype) for x in (np.sinh(inner), grown))
    weights = jax.nn.softmax(logs - 0.5 * (nu + 1) * jnp.log1p(jnp.square(u) / nu))

    def one(gap: jax.Array) -> jax.Array:
        ratio = gap * (2 * u + gap) / (nu + jnp.square(u))
        return 0.5 * (nu + 1) * jnp.sum(weights * jnp.log1p(ratio))

    return jax.vmap(one)(moved.ravel()).reshape(moved.shape)


def _unknown_student_t(df: ArrayLike | None, scale: ArrayLike | None) -> Likelihood:
    """With the information that Lange, Little and Taylor give."""
    given = {"df": df, "scale": scale}
    priors = {"df": (math.log(5), 2.0), "scale": (0.0, 100.0)}
    names = tuple(name for name, value in given.items() if value is None)

    def values(logs: dict[str, jax.Array]) -> dict[str, Any]:
        return given | {name: jnp.exp(log) for name, log in logs.items()}

    def expected(logs: dict[str, jax.Array]) -> jax.Array:
        nu = like(values(logs)["df"], logs[names[0]])
        half = 0.5 * nu
        gap = polygamma(1, half) - polygamma(1, half + 0.5)
        tail = 0.25 * gap - (nu + 5) / (2 * nu * (nu + 1) * (nu + 3))
        both = -2 * nu / ((nu + 1) * (nu + 3))
        # the first difference is rounding where nothing tells nu from infinity
        own = jnp.maximum(nu**2 * tail, (nu + 3) / (2 * nu) * both**2)
        entries = {
            ("df", "df"): own,
            ("df", "scale"): both,
            ("scale", "df"): both,
            ("scale", "scale"): 2 * nu / (nu + 3),
        }
        rows = [jnp.stack([entries[i, j] for j in names]) for i in names]
        return jnp.stack(rows)

    def known(logs: dict[str, jax.Array]) -> Likelihood:
        return student_t(**values(logs))

    start, spread = zip(*(priors[name] for name in names), strict=True)
    return unknown(Nuisance(names, start, spread, known, expected))
