"""Normal errors of known size: several together, or given with each row."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from fisherflow_jax._ground import checks, linalg, processes
from fisherflow_jax._ground.arrays import like, safe_sqrt, widen
from fisherflow_jax.likelihoods import _likelihood as shared
from fisherflow_jax.likelihoods._likelihood import IDENTITY, Likelihood

_NAME = "gaussian"


def finite(targets: ArrayLike) -> jax.Array:
    return jnp.isfinite(jnp.asarray(targets))


def kl_of_normals(outputs: jax.Array, other: jax.Array) -> jax.Array:
    """Of (mean, log standard deviation) on the last axis."""
    turned = other[..., 1] - outputs[..., 1]
    moved = (other[..., 0] - outputs[..., 0]) * jnp.exp(-other[..., 1])
    return turned + 0.5 * jnp.expm1(-2 * turned) + 0.5 * jnp.square(moved)


def with_given_scale() -> Likelihood:
    """Outputs `(n, ..., 2)`: the mean, and the standard deviation, which is known."""

    def both(outputs: ArrayLike) -> tuple[jax.Array, jax.Array]:
        wide = widen(outputs)
        return wide[..., 0], wide[..., 1]

    def check(outputs: Any, targets: Any) -> None:
        shape = shared.check_outputs(_NAME, outputs)
        if shape[-1:] != (2,):
            raise ValueError(
                f"{_NAME}: with scale='given' the last axis of the outputs must be 2 "
                f"(mean and standard deviation), got shape {shape}."
            )
        rule = "targets must have the shape of the outputs without the last axis"
        shared.check_targets(_NAME, shape, shape[:-1], targets, rule)

    def log_prob(outputs: ArrayLike, targets: ArrayLike) -> jax.Array:
        check(outputs, targets)
        location, scale = both(outputs)
        values = jax.scipy.stats.norm.logpdf(like(targets, location), location, scale)
        return shared.nan_outside(finite(targets) & (scale > 0), values)

    def sample(key: jax.Array, outputs: ArrayLike) -> jax.Array:
        location, scale = both(outputs)
        noise = jax.random.normal(key, location.shape, location.dtype)
        return location + scale * noise

    def root(outputs: ArrayLike, probes: Any, key: Any = None) -> jax.Array:
        _, scale = both(outputs)
        pulled = like(probes, scale) / jnp.where(scale > 0, scale, jnp.nan)
        # nothing is to be learned of the scale
        pulled = jnp.stack([pulled, jnp.zeros_like(pulled)], -1)
        return pulled.astype(jnp.asarray(outputs).dtype)

    def expected_log_prob(
        mean: jax.Array, variance: jax.Array, covariance: Any, targets: ArrayLike
    ) -> jax.Array:
        location, scale = both(mean)
        total = jnp.sqrt(variance[..., 0] + jnp.square(scale))
        return jax.scipy.stats.norm.logpdf(like(targets, location), location, total)

    def kl(outputs: ArrayLike, other: ArrayLike) -> jax.Array:
        pairs = [jnp.stack([m, jnp.log(s)], -1) for m, s in map(both, (outputs, other))]
        return kl_of_normals(*pairs)

    def distance(outputs: ArrayLike, other: ArrayLike) -> jax.Array:
        (location, scale), (moved, same) = both(outputs), both(other)
        return jnp.abs(moved - location) / jnp.where(scale == same, scale, jnp.nan)

    return Likelihood(
        name=_NAME,
        log_prob=log_prob,
        mean=lambda outputs: both(outputs)[0],
        variance=lambda outputs: jnp.square(both(outputs)[1]),
        sample=sample,
        root=root,
        probe_shape=lambda shape: tuple(shape[:-1]),
        line=lambda outputs: both(outputs)[0],
        scale=IDENTITY,
        support=finite,
        check=check,
        expected_log_prob=expected_log_prob,
        normal_errors=True,
        known=lambda outputs: both(outputs)[1],
        kl=kl,
        distance=distance,
    )


def require_covariance(covariance: ArrayLike) -> None:
    """Raises unless it is a matrix; where it is at hand, a positive definite one."""
    shape, _ = shared.shape_and_dtype(covariance)
    if len(shape) != 2 or shape[0] != shape[1] or shape[0] == 0:
        raise ValueError(
            f"{_NAME}: covariance must be a matrix (k, k), of the errors of k outputs, "
            f"or 'given'; got shape {shape}."
        )
    if checks.is_traced(covariance):
        return
    matrix = np.asarray(processes.fetched(covariance), float)
    if not np.allclose(matrix, matrix.T):  # NaN is unequal too
        raise ValueError(f"{_NAME}: covariance must be symmetric; got {covariance}.")
    lowest = np.linalg.eigvalsh(matrix).min()
    if not lowest > 0:
        raise ValueError(
            f"{_NAME}: covariance must be positive definite; its lowest eigenvalue is "
            f"{lowest}."
        )


def of_vectors(
    covariance: ArrayLike | None, used: ArrayLike | None = None
) -> Likelihood:
    """k targets with normal errors together, of a known covariance.

    Args:
      covariance: `(k, k)`, for outputs `(n, ..., k)`; None: that of the outputs
        `(n, ..., k + k^2)` behind the mean.
      used: `(n, ..., k)`, 1 for a target that there is, 0 for one that is missing; any
        other number is NaN, for errors that go together have no weights; None: all.
    """
    errors = _Errors(covariance, used)

    def mean(outputs: ArrayLike) -> jax.Array:
        return errors.split(outputs)[0]

    return Likelihood(
        name=_NAME,
        log_prob=errors.log_prob,
        mean=mean,
        variance=errors.variance,
        sample=errors.sample,
        root=errors.root,
        probe_shape=errors.shape_of_targets,
        line=mean,
        scale=IDENTITY,
        support=finite,
        check=errors.check,
        expected_log_prob=errors.expected_log_prob,
        normal_errors=True,
        kl=errors.kl,
        distance=errors.distance,
        observing=lambda used: of_vectors(covariance, used),
        known=None if covariance is not None else lambda z: errors.split(z)[1],
    )


@dataclasses.dataclass(frozen=True, eq=False)
class _Errors:
    """The functions of `of_vectors`."""

    covariance: ArrayLike | None
    used: ArrayLike | None

    def split(self, outputs: ArrayLike) -> tuple[jax.Array, jax.Array]:
        """Mean `(n, ..., k)` and covariance `(k, k)`, or one for each."""
        wide = widen(outputs)
        if self.covariance is not None:
            return wide, like(self.covariance, wide)
        k = _num_targets(wide.shape)
        return wide[..., :k], wide[..., k:].reshape((*wide.shape[:-1], k, k))

    def observed(self, matrix: jax.Array) -> jax.Array:
        """The covariance, what is not observed being of unit variance and alone."""
        if self.used is None:
            return matrix
        there = jnp.asarray(self.used) != 0
        pairs = there[..., :, None] & there[..., None, :]
        identity = jnp.eye(matrix.shape[-1], dtype=matrix.dtype)
        matrix, identity = (
            jnp.broadcast_to(x, pairs.shape) for x in (matrix, identity)
        )
        return jnp.where(pairs, matrix, identity)

    def keep(self, values: jax.Array) -> jax.Array:
        """Zero where nothing is observed, NaN for what is no weight of a channel."""
        if self.used is None:
            return values
        weights = jnp.asarray(self.used).astype(values.dtype)
        known = jnp.where(weights == 1, values, jnp.nan)
        return jnp.where(weights == 0, jnp.zeros_like(values), known)

    def density(self, residual: jax.Array, matrix: jax.Array) -> jax.Array:
        inverse = linalg.inverse_factor(self.observed(matrix))
        half = linalg.product("...ij,...j->...i", inverse, self.keep(residual))
        logs = 0.5 * math.log(2 * math.pi) - jnp.log(_diagonal(inverse))
        logs = self.keep(jnp.broadcast_to(logs, half.shape))
        return -jnp.sum(0.5 * jnp.square(half) + logs, -1)

    def shape_of_targets(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        if self.covariance is None:
            return (*shape[:-1], _num_targets(shape))
        return tuple(shape)

    def check(self, outputs: Any, targets: Any) -> None:
        shape = shared.check_outputs(_NAME, outputs)
        k = None if self.covariance is None else jnp.shape(self.covariance)[0]
        if k is not None and shape[-1:] != (k,):
            raise ValueError(
                f"{_NAME}: with a covariance ({k}, {k}) the last axis of the outputs "
                f"must be {k}, got shape {shape}."
            )
        expected = self.shape_of_targets(shape)
        rule = "targets must have the shape of the means"
        shared.check_targets(_NAME, shape, expected, targets, rule)

    def log_prob(self, outputs: ArrayLike, targets: ArrayLike) -> jax.Array:
        self.check(outputs, targets)
        location, matrix = self.split(outputs)
        possible = finite(targets)
        if self.used is not None:
            possible = possible | (jnp.asarray(self.used) == 0)
        values = self.density(like(targets, location) - location, matrix)
        return shared.nan_outside(jnp.all(possible, -1), values)

    def sample(self, key: jax.Array, outputs: ArrayLike) -> jax.Array:
        location, matrix = self.split(outputs)
        noise = jax.random.normal(key, location.shape, location.dtype)
        # R = L L^T, so that L = R (L^-1)^T
        half = linalg.product("...ji,...j->...i", linalg.inverse_factor(matrix), noise)
        return location + linalg.product("...ij,...j->...i", matrix, half)

    def root(self, outputs: ArrayLike, probes: Any, key: Any = None) -> jax.Array:
        location, matrix = self.split(outputs)
        half = linalg.inverse_factor(self.observed(matrix))
        pulled = linalg.product("...ji,...j->...i", half, like(probes, location))
        pulled = self.keep(jnp.broadcast_to(pulled, location.shape))
        if self.covariance is None:  # nothing is to be learned of the noise
            rest = pulled.shape[-1] ** 2
            zeros = jnp.zeros((*pulled.shape[:-1], rest), pulled.dtype)
            pulled = jnp.concatenate([pulled, zeros], -1)
        return pulled.astype(jnp.asarray(outputs).dtype)

    def variance(self, outputs: ArrayLike) -> jax.Array:
        location, matrix = self.split(outputs)
        return jnp.broadcast_to(_diagonal(matrix), location.shape)

    def expected_log_prob(
        self, mean: jax.Array, variance: Any, spread: jax.Array, targets: ArrayLike
    ) -> jax.Array:
        location, matrix = self.split(mean)
        k = location.shape[-1]
        spread = like(spread[..., :k, :k], location)
        total = spread + jnp.broadcast_to(matrix, spread.shape)
        return self.density(like(targets, location) - location, total)

    def kl(self, outputs: ArrayLike, other: ArrayLike) -> jax.Array:
        (location, matrix), (moved, noise) = self.split(outputs), self.split(other)
        half = linalg.inverse_factor(self.observed(noise))
        moved = linalg.product("...ij,...j->...i", half, self.keep(moved - location))
        distant = 0.5 * jnp.sum(jnp.square(moved), -1)
        if self.covariance is not None:
            return distant
        matrix = self.observed(matrix)
        own = linalg.inverse_factor(matrix)
        ratio = linalg.product("...ij,...jk,...ik->...i", half, matrix, half)
        turned = jnp.sum(ratio - 1, -1)
        logs = jnp.sum(jnp.log(_diagonal(own)) - jnp.log(_diagonal(half)), -1)
        return distant + 0.5 * turned + logs

    def distance(self, outputs: ArrayLike, other: ArrayLike) -> jax.Array:
        (location, matrix), (moved, noise) = self.split(outputs), self.split(other)
        half = linalg.inverse_factor(self.observed(matrix))
        moved = linalg.product("...ij,...j->...i", half, self.keep(moved - location))
        length = safe_sqrt(jnp.sum(jnp.square(moved), -1))
        if self.covariance is not None:
            return length
        return jnp.where(jnp.all(noise == matrix, (-2, -1)), length, jnp.nan)


def _diagonal(matrix: jax.Array) -> jax.Array:
    return jnp.diagonal(matrix, axis1=-2, axis2=-1)


def _num_targets(shape: tuple[int, ...]) -> int:
    """k, where the last axis holds k means and k^2 entries of a covariance."""
    size = shape[-1] if shape else 0
    k = math.isqrt(size)
    if size == 0 or k * (k + 1) != size:
        raise ValueError(
            f"{_NAME}: with covariance='given' the last axis of the outputs holds k "
            f"means and the k^2 entries of their errors' covariance; got shape {shape}."
        )
    return k
