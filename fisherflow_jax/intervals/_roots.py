"""The likelihood root of a combination at one value of it, and the modified root."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fisherflow_jax import information as ops
from fisherflow_jax.flow import Solution
from fisherflow_jax.intervals._stored import Stored, highest
from fisherflow_jax.structures import Full

# The roots are both near zero there: one is log(q / r) / r from the other, 0 / 0.
_NEAR = 1e-3
# Of each search. Likelihoods without a maximum are then within 1e-10 of their limit.
STEPS = 25


class Point(NamedTuple):
    """The profile at a value; each `()`."""

    root: jax.Array
    slope: jax.Array  # of the root
    modified: jax.Array
    ended: jax.Array  # bool, of the search
    below: jax.Array  # bool, whether the estimate is as high


class _Fitted(NamedTuple):
    """Where the density is highest, the combination being held at a value."""

    point: jax.Array  # (d,)
    height: jax.Array
    logdet: jax.Array  # of the information of the other parameters
    ended: jax.Array


class _Eliminated(NamedTuple):
    """One parameter given by the others: theta is `out psi + into others`."""

    pivot: jax.Array
    others: jax.Array  # (d - 1,), their places
    out: jax.Array  # (d,)
    into: jax.Array  # (d, d - 1)

    @classmethod
    def of(cls, row: jax.Array, sizes: jax.Array) -> "_Eliminated":
        """That which the combination says most of, by the sizes of the parameters."""
        pivot = jnp.argmax(jnp.abs(row * sizes))
        others = (pivot + 1 + jnp.arange(len(row) - 1)) % len(row)
        out = jnp.zeros_like(row).at[pivot].set(1 / row[pivot])
        into = jnp.eye(len(row), dtype=row.dtype)[:, others]
        return cls(pivot, others, out, into.at[pivot].set(-row[others] / row[pivot]))


def profiled(
    rows: Stored,
    row: jax.Array,
    start: jax.Array,
    along: jax.Array,
    best: Solution,
) -> Callable[[jax.Array], Point]:
    """The profile as a function of the value of the combination `row`.

    Each search begins on the line from `start` along a direction of unit error.
    """
    kept = _Eliminated.of(row, along)
    center, top = row @ start, row @ best.mean
    peak = rows.log_density(best.mean)
    rounding = jnp.finfo(peak.dtype).eps ** 0.5 * (1 + jnp.abs(peak))
    # of all parameters, in the coordinates of the combination and the others
    logdet = best.logdet - 2 * jnp.log(jnp.abs(row[kept.pivot]))
    error = jnp.sqrt(row @ ops.regularised(best.information, start).divide(row))

    def fitted(value: jax.Array) -> _Fitted:
        begun = start + along * (value - center) / (row @ along)
        height = rows.log_density(begun)
        if len(row) == 1:
            return _Fitted(begun, height, jnp.zeros_like(height), jnp.array(True))

        def whole(rest: jax.Array) -> jax.Array:
            return kept.out * value + kept.into @ rest

        def information(rest: jax.Array) -> Full:
            matrix = ops.to_dense(rows.information(whole(rest)), start)
            return Full(kept.into.T @ matrix @ kept.into)

        def density(rest: jax.Array) -> jax.Array:
            return rows.log_density(whole(rest))

        found = highest(density, information, begun[kept.others], STEPS)
        reached = density(found.mean)
        better = reached >= height
        return _Fitted(
            point=jnp.where(better, whole(found.mean), begun),
            height=jnp.where(better, reached, height),
            logdet=found.logdet,
            ended=found.unfinished == 0,
        )

    def at(value: jax.Array) -> Point:
        found, away = fitted(value), top - value
        size = jnp.sqrt(2 * jnp.maximum(peak - found.height, 0))
        root, near = jnp.sign(away) * size, size < _NEAR
        safe = jnp.where(near, 1, root)
        # the height's slope at a constrained maximum is that along psi alone
        slope = -(jax.grad(rows.log_density)(found.point) @ kept.out) / safe
        ratio = jnp.abs(away / safe) * jnp.exp(0.5 * (logdet - found.logdet))
        modified = root + jnp.log(jnp.where(near, 1, ratio)) / safe
        return Point(
            root=root,
            slope=jnp.where(near, -1 / error, slope),
            modified=jnp.where(near, root, modified),
            ended=found.ended,
            below=found.height <= peak + rounding,
        )

    return at
