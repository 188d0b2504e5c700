"""What a posterior says of held-out data: one linearised pass, then small arrays."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fisherflow_jax._ground import trees
from fisherflow_jax._ground.batch import Batch, is_finite, unshare
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
        if batch.targets is None:
            raise ValueError(
                f"validation needs targets; those of batch {number} are None."
            )
        shown = jax.eval_shape(apply_fn, state.mean, unshare(batch.inputs))
        likelihood.check(shown, batch.targets)
        _check(likelihood, batch, number)
        outputs = linearized_outputs(
            state,
            apply_fn,
            batch.inputs,
            covariance=covariance(shown.shape, batch.targets.shape),
            chunk_size=chunk_size,
        )
        _check(likelihood, batch, number, outputs)
        parts.append(HeldOut(outputs, batch.targets, batch.weights))
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


def _check(
    likelihood: Likelihood, batch: Batch, number: int, outputs: Outputs | None = None
) -> None:
    """Raises for values that are not finite and targets that cannot be, at hand."""
    finite, possible = _sound(likelihood, batch, outputs)
    if not holds(finite) and outputs is None:
        raise ValueError(
            f"validation batch {number} holds a NaN or an infinite value in a row of "
            "positive weight."
        )
    if not holds(finite):
        raise ValueError(
            f"the outputs of validation batch {number} or their variances are not "
            "finite: an overflow in apply_fn, or an information that is not positive "
            "definite in this precision."
        )
    if not holds(possible):
        raise ValueError(
            f"validation batch {number} holds targets that {likelihood.name} cannot "
            "produce: a label out of range, a negative count?"
        )


# compiled as one: operation by operation, a first call would take seconds
@functools.partial(jax.jit, static_argnums=0)
def _sound(
    likelihood: Likelihood, batch: Batch, outputs: Outputs | None
) -> tuple[jax.Array, jax.Array]:
    def used(condition: jax.Array) -> jax.Array:
        padding = (batch.weights == 0).reshape((-1,) + (1,) * (condition.ndim - 1))
        return jnp.all(condition | padding)

    if outputs is None:
        return is_finite(batch), used(likelihood.support(batch.targets))
    finite = jnp.isfinite(outputs.mean) & jnp.isfinite(outputs.variance)
    possible = jnp.isfinite(likelihood.log_prob(outputs.mean, batch.targets))
    return used(finite), used(possible)
