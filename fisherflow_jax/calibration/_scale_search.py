"""What held-out data say of a state's outputs, and the search for the scale in it."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fisherflow_jax._ground import checks, quadrature, search, trees
from fisherflow_jax._ground.batch import Batch, blank, is_finite, observed, unshare
from fisherflow_jax.accumulation import each_batch
from fisherflow_jax.calibration import _densities as densities
from fisherflow_jax.likelihoods import Likelihood
from fisherflow_jax.model import Model
from fisherflow_jax.predictions import Outputs, linearized_outputs


class HeldOut(NamedTuple):
    """Linearised outputs of all held-out examples, and what was seen."""

    outputs: Outputs  # leaves (n, ...)
    targets: jax.Array  # (n, ...)
    weights: jax.Array  # (n,), or as the targets; 0 = padding
    there: Any = None  # as the targets, 1 or 0, of errors that go together

    def mean(self, values: jax.Array) -> jax.Array:
        """The weighted mean over targets `(n, ...)`, `()`."""
        weights = _beside(values, self.weights.astype(values.dtype))
        # padding stays out even where it has no finite value
        kept = jnp.where(weights > 0, values * weights, jnp.zeros_like(values))
        count = values.size // max(weights.size, 1)
        return jnp.sum(kept) / (jnp.asarray(count, values.dtype) * jnp.sum(weights))


def _beside(values: jax.Array, weights: jax.Array) -> jax.Array:
    """Weights with as many axes as the values that they are of."""
    return weights.reshape(weights.shape + (1,) * (values.ndim - weights.ndim))


def held_out(
    state: Any,
    apply_fn: Callable,
    likelihood: Likelihood,
    validation: Any,
    *,
    link: Callable | None,
    chunk_size: int | None,
) -> HeldOut:
    """One pass over the validation data.

    Raises:
      ValueError: for no data, no targets, targets that the likelihood cannot produce,
        or values that are not finite, where they are at hand.
    """
    parts = []
    for number, batch in enumerate(each_batch(validation)):
        if batch.targets is None:
            raise ValueError(
                f"validation needs targets; those of batch {number} are None."
            )
        shown = jax.eval_shape(apply_fn, state.mean, unshare(batch.inputs))
        Model(apply_fn, likelihood).check(state.mean, batch)
        batch, there = _weighed(likelihood, batch)
        _check(likelihood, there, batch, number)
        covariance = densities.needs_covariance(likelihood, link, shown, batch.targets)
        outputs = linearized_outputs(
            state,
            apply_fn,
            batch.inputs,
            covariance=covariance,
            line_of=None if link is None else likelihood,
            chunk_size=chunk_size,
        )
        _check(likelihood, there, batch, number, outputs)
        parts.append(HeldOut(outputs, batch.targets, batch.weights, there))
    whole = parts[0]
    if len(parts) > 1:
        whole = jax.tree.map(lambda *x: jnp.concatenate(x), *parts)
    if not checks.holds(jnp.sum(whole.weights) > 0):
        raise ValueError(
            "the validation data are empty: the weight of every example is zero."
        )
    dtype = trees.wide_dtype(whole.outputs.mean.dtype, whole.outputs.variance.dtype)
    return whole._replace(
        outputs=jax.tree.map(lambda x: x.astype(dtype), whole.outputs),
        weights=whole.weights.astype(dtype),
    )


def _weighed(likelihood: Likelihood, batch: Batch) -> tuple[Batch, Any]:
    """The batch with its mask in its weights; of errors that go together, beside them.

    These have one density an example, and so one weight.
    """
    if batch.mask is not None:
        batch = blank(batch)
    if likelihood.observing is not None:
        rows, there = observed(batch)
        if there is None:
            return rows, jnp.ones(batch.targets.shape)
        any_there = jnp.any(there > 0, tuple(range(1, there.ndim)))
        weights = jnp.where(any_there, rows.weights, jnp.zeros_like(rows.weights))
        return rows._replace(weights=weights), there
    if batch.mask is None:
        return batch, None
    weights = _beside(batch.mask, batch.weights) * batch.mask
    return batch._replace(weights=weights, mask=None), None


def _seen(likelihood: Likelihood, there: Any) -> Likelihood:
    return likelihood if there is None else likelihood.observing(there)  # type: ignore[misc]


def _check(
    likelihood: Likelihood,
    there: Any,
    batch: Batch,
    number: int,
    outputs: Outputs | None = None,
) -> None:
    """Raises for values that are not finite and targets that cannot be, at hand."""
    finite, possible = _sound(likelihood, there, batch, outputs)
    where = f"validation batch {number}"
    if not checks.holds(finite):
        raise ValueError(
            f"{where} holds a NaN or an infinite value in a row of positive weight."
            if outputs is None
            else f"the outputs of {where} or their variances are not finite: an "
            "overflow in apply_fn, or an information that is not positive definite in "
            "this precision."
        )
    if not checks.holds(possible):
        raise ValueError(
            f"{where} holds targets that {likelihood.name} cannot produce: a label out "
            "of range, a negative count?"
        )


# compiled as one: operation by operation, a first call would take seconds
@functools.partial(jax.jit, static_argnums=0)
def _sound(
    likelihood: Likelihood, there: Any, batch: Batch, outputs: Outputs | None
) -> tuple[jax.Array, jax.Array]:
    def used(condition: jax.Array) -> jax.Array:
        return jnp.all(condition | (_beside(condition, batch.weights) == 0))

    if outputs is None:
        return is_finite(batch), used(likelihood.support(batch.targets))
    finite = jnp.isfinite(outputs.mean) & jnp.isfinite(outputs.variance)
    log_prob = _seen(likelihood, there).log_prob(outputs.mean, batch.targets)
    possible = jnp.isfinite(log_prob)
    return used(finite), used(possible)


# The search reaches this many powers of e to both sides of where the outputs' variance
# equals what the likelihood resolves, or (logits, logs) one.
_REACH = 20.0
_DISPERSION_REACH = 12.0


class Found(NamedTuple):
    """What the search found; losses are mean negative log-likelihoods, each `()`."""

    scale: jax.Array
    before: jax.Array
    after: jax.Array
    mean_only: jax.Array
    boundary: jax.Array


def _range(held: HeldOut, likelihood: Likelihood | None) -> tuple[jax.Array, jax.Array]:
    """Log-scales at which all variances are negligible, and most are overwhelming.

    The unit is one for logits, and for other outputs what the likelihood resolves;
    without a likelihood it is one.
    """
    variance = held.outputs.variance
    unit = likelihood is None or likelihood.random_root or likelihood.is_classes
    if likelihood is not None and likelihood.diagonal and not unit:
        mean = held.outputs.mean
        factor = likelihood.root(mean, jnp.ones(likelihood.probe_shape(mean.shape)))
        variance = variance * jnp.square(factor.astype(variance.dtype))
    positive = variance > 0
    log = jnp.log(jnp.where(positive, variance, 1.0).astype(variance.dtype))
    rows = _beside(variance, held.weights) > 0
    middle = -held.mean(log)
    # the largest, not the typical: at the low end the mean alone must be what is left
    least = -jnp.max(jnp.where(positive & rows, log, -middle))
    return jnp.minimum(middle, least) - _REACH, middle + _REACH


def _settled(
    loss: Callable[[jax.Array], jax.Array],
    ends: tuple[jax.Array, jax.Array],
    start: jax.Array,
    before: jax.Array | None = None,
    **grid: int,
) -> tuple[Found, jax.Array, jax.Array]:
    """The best log-scale as `Found`, as it is, and whether what was given is kept.

    An end of the range that is as good as the best is preferred to it, and `start`
    where both ends are: nothing is then known of the scale. `before` is the loss of
    what was given, if that is not at `start`.
    """
    low, high = ends
    elsewhere = jnp.stack([start, jnp.full_like(low, -jnp.inf)])
    found = search.minimise(loss, low, high, elsewhere, **grid)
    at_start, mean_only = found.elsewhere
    before = at_start if before is None else before
    eps = float(jnp.finfo(found.value.dtype).eps)
    # what rounding can hide, of a mean and of logarithms over the range that cancel
    bound = found.value + 8 * eps * (_REACH + jnp.abs(found.value))
    at_low, at_high = found.at_low <= bound, found.at_high <= bound
    flat = at_low & at_high & (at_start <= bound)
    cases = [flat, at_low, at_high]
    point = jnp.select(cases, [start, low, high], found.point)
    value = jnp.select(cases, [at_start, found.at_low, found.at_high], found.value)
    keep = (before <= value) | jnp.isnan(value)
    point = jnp.where(keep, start, point)
    settled = Found(
        scale=jnp.exp(point),
        before=before,
        after=jnp.where(keep, before, value),
        mean_only=mean_only,
        boundary=jnp.select(cases, [jnp.int32(x) for x in (0, -1, 1)], jnp.int32(0)),
    )
    return settled, point, keep


@functools.partial(jax.jit, static_argnums=(1, 2))
def alone(held: HeldOut, likelihood: Likelihood, link: Callable | None) -> Found:
    def loss(log_scale: jax.Array) -> jax.Array:
        outputs = densities.scaled(held.outputs, jnp.exp(log_scale))
        value = densities.log_density(seen, link, outputs, held.targets)
        return -held.mean(value)

    seen, ends = _seen(likelihood, held.there), _range(held, likelihood)
    found, _, _ = _settled(loss, ends, jnp.zeros_like(ends[0]))
    mean_only = -held.mean(seen.log_prob(held.outputs.mean, held.targets))
    return found._replace(mean_only=mean_only)


@functools.partial(jax.jit, static_argnums=1)
def with_noise(
    held: HeldOut, likelihood: Likelihood, start: jax.Array
) -> tuple[Found, jax.Array]:
    """By the ratio of both variances; given that, the noise has a closed form."""
    outputs, dtype = held.outputs, held.outputs.variance.dtype
    residual, variance = held.targets.astype(dtype) - outputs.mean, outputs.variance
    square = jnp.square(residual)
    given = likelihood.variance(outputs.mean).ravel()[0] * start.astype(dtype)

    def profile(ratio: jax.Array) -> tuple[jax.Array, jax.Array]:
        relative = ratio * variance + 1
        noise = held.mean(square / relative)
        log = jnp.log(2 * math.pi * noise) + held.mean(jnp.log(relative))
        return 0.5 * (log + 1), noise

    before = -held.mean(quadrature.normal_log_density(residual, variance + given))
    found, _, keep = _settled(
        lambda x: profile(jnp.exp(x))[0], _range(held, None), -jnp.log(given), before
    )
    noise = profile(found.scale)[1]
    scale = jnp.where(keep, jnp.ones_like(noise), noise * found.scale)
    return found._replace(scale=scale), jnp.where(keep, given, noise)


@functools.partial(jax.jit, static_argnums=1)
def with_dispersion(
    held: HeldOut, likelihood: Likelihood, start: jax.Array
) -> tuple[Found, jax.Array]:
    """Scale and dispersion together: for each scale the best dispersion."""
    known_likelihood = likelihood.with_dispersion
    assert known_likelihood is not None
    dtype = held.outputs.variance.dtype

    def loss(log_scale: jax.Array, log_dispersion: jax.Array) -> jax.Array:
        outputs = densities.scaled(held.outputs, jnp.exp(log_scale))
        known = known_likelihood(jnp.exp(log_dispersion))
        return -held.mean(densities.log_density(known, None, outputs, held.targets))

    widest = jnp.asarray(_DISPERSION_REACH, dtype)

    def best(log_scale: jax.Array) -> search.Minimum:
        given, nothing = functools.partial(loss, log_scale), jnp.zeros((0,), dtype)
        fine = {"num_points": 13, "num_halvings": 14}
        return search.minimise(given, -widest, widest, nothing, **fine)

    ends = _range(held, likelihood)
    zero, given = jnp.zeros_like(ends[0]), jnp.log(start.astype(dtype))
    before, grid = loss(zero, given), {"num_points": 21, "num_halvings": 14}
    found, point, keep = _settled(
        lambda log_scale: best(log_scale).value, ends, zero, before, **grid
    )
    return found, jnp.where(keep, jnp.exp(given), jnp.exp(best(point).point))
