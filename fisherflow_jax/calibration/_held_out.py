"""What a posterior says of held-out data: one linearised pass, then small arrays."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fisherflow_jax._ground import batch as batches
from fisherflow_jax._ground import trees
from fisherflow_jax._ground.batch import Batch
from fisherflow_jax._ground.checks import holds
from fisherflow_jax.accumulation import each_batch
from fisherflow_jax.likelihoods import Likelihood
from fisherflow_jax.predictions import Outputs, linearized_outputs

PyTree = Any


class HeldOut(NamedTuple):
    """Linearised outputs of all held-out examples, and what was seen."""

    outputs: Outputs  # leaves (n, ...)
    targets: jax.Array  # (n, ...)
    weights: jax.Array  # (n,), 0 = padding

    def mean(self, values: jax.Array) -> jax.Array:
        """The weighted mean over targets `(n, ...)`, `()`."""
        rows = values.reshape((values.shape[0], -1))
        weights = self.weights.astype(values.dtype)[:, None]
        # padding stays out even where it has no finite value
        total = jnp.sum(jnp.where(weights > 0, rows * weights, 0.0).astype(rows.dtype))
        count = jnp.asarray(rows.shape[1], values.dtype) * jnp.sum(weights)
        return total / count


def held_out(
    state: Any,
    apply_fn: Callable,
    likelihood: Likelihood,
    validation: Any,
    *,
    covariance: Callable[[tuple, tuple], bool],
    chunk_size: int | None,
) -> HeldOut:
    """One pass over the validation data.

    `covariance(shape of the outputs, shape of the targets)` says whether the
    covariances of a target's outputs are needed beside the variances.

    Raises:
      ValueError: for no data, no targets, targets that the likelihood cannot produce,
        or values that are not finite, where they are at hand.
    """
    parts = []
    for number, batch in enumerate(each_batch(validation)):
        shape = _checked_shape(state, apply_fn, batch, likelihood, number)
        outputs = linearized_outputs(
            state,
            apply_fn,
            batch.inputs,
            covariance=covariance(shape, batch.targets.shape),
            chunk_size=chunk_size,
        )
        part = HeldOut(outputs, batch.targets, batch.weights)
        _check_outputs(part, likelihood, number)
        parts.append(part)
    whole = parts[0]
    if len(parts) > 1:
        whole = jax.tree.map(lambda *x: jnp.concatenate(x), *parts)
    if not holds(jnp.sum(whole.weights) > 0):
        raise ValueError(
            "the validation data are empty: the weight of every example is zero."
        )
    dtype = trees.wide_dtype(whole.outputs.mean.dtype, whole.outputs.variance.dtype)
    return whole._replace(
        outputs=jax.tree.map(lambda x: x.astype(dtype), whole.outputs),
        weights=whole.weights.astype(dtype),
    )


def _checked_shape(
    state: Any, apply_fn: Callable, batch: Batch, likelihood: Likelihood, number: int
) -> tuple[int, ...]:
    """The shape of the outputs of a batch that is sound."""
    if batch.targets is None:
        raise ValueError(f"validation needs targets; those of batch {number} are None.")
    outputs = jax.eval_shape(apply_fn, state.mean, batches.unshare(batch.inputs))
    likelihood.check(outputs, batch.targets)
    finite, possible = _sound_batch(likelihood, batch)
    if not holds(finite):
        raise ValueError(
            f"validation batch {number} holds a NaN or an infinite value in a row of "
            "positive weight."
        )
    _refuse(possible, likelihood, number)
    return outputs.shape


def _check_outputs(part: HeldOut, likelihood: Likelihood, number: int) -> None:
    finite, possible = _sound_outputs(likelihood, part)
    if not holds(finite):
        raise ValueError(
            f"the outputs of validation batch {number} or their variances are not "
            "finite: an overflow in apply_fn, or an information that is not positive "
            "definite in this precision."
        )
    _refuse(possible, likelihood, number)


# compiled as one: operation by operation, a first call would take seconds
@functools.partial(jax.jit, static_argnums=0)
def _sound_batch(likelihood: Likelihood, batch: Batch) -> tuple[jax.Array, jax.Array]:
    possible = _used(likelihood.support(batch.targets), batch.weights)
    return batches.is_finite(batch), jnp.all(possible)


@functools.partial(jax.jit, static_argnums=0)
def _sound_outputs(
    likelihood: Likelihood, part: HeldOut
) -> tuple[jax.Array, jax.Array]:
    outputs = part.outputs
    finite = jnp.isfinite(outputs.mean) & jnp.isfinite(outputs.variance)
    possible = jnp.isfinite(likelihood.log_prob(outputs.mean, part.targets))
    return (
        jnp.all(_used(finite, part.weights)),
        jnp.all(_used(possible, part.weights)),
    )


def _used(condition: jax.Array, weights: jax.Array) -> jax.Array:
    """The condition, held to be true in rows of weight zero."""
    padding = (weights == 0).reshape((-1,) + (1,) * (condition.ndim - 1))
    return condition | padding


def _refuse(possible: jax.Array, likelihood: Likelihood, number: int) -> None:
    if not holds(possible):
        raise ValueError(
            f"validation batch {number} holds targets that {likelihood.name} cannot "
            "produce: a label out of range, a negative count?"
        )
