"""What a step `theta -> A theta + N(0, Q)` makes of dense blocks."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fisherflow_jax import information as ops
from fisherflow_jax._ground import checks, linalg, trees
from fisherflow_jax.structures._algebra import dense
from fisherflow_jax.structures._diagonal import Diagonal
from fisherflow_jax.structures._scalar import Scalar


def _operator_blocks(information: Any, operator: Any, name: str) -> list[jax.Array]:
    """A noise or transition as one matrix `(..., k, k)` for each block."""
    if isinstance(operator, (Scalar, Diagonal)):
        entries = ops.diagonal(operator, dense.diagonal(information))
        return [dense.diagonal_matrix(v) for v in dense.pack(information, entries)]
    dtype = trees.float_dtype(information)
    picks = [(p[..., :, None], p[..., None, :]) for p in dense.places(information)]
    outside = np.ones(operator.shape, bool)
    for pick in picks:
        outside[pick] = False
    matrix: Any = (np if checks.is_concrete(operator) else jnp).asarray(operator, dtype)
    coupled = (matrix * outside.astype(dtype) != 0).any()
    if not checks.holds(~coupled):
        raise ValueError(
            f"{name} couples parameters of different blocks, which this structure does "
            "not keep: use structures.full(), or a partition that joins them."
        )
    if len(picks) == 1 and not outside.any():  # in the order of the matrix
        shape = np.broadcast_shapes(*(pick.shape for pick in picks[0]))
        return [jnp.asarray(matrix).reshape(shape)]
    blocks = [jnp.asarray(matrix[pick]) for pick in picks]
    # traced, it cannot raise and must not be dropped in silence: the update is refused
    return [jnp.where(coupled, jnp.nan, block) for block in blocks]


def _propagate(information: Any, noise: Any, transition: Any | None = None) -> Any:
    def wait(block: jax.Array, noise: jax.Array) -> jax.Array:
        # (1 + I Q)^-1 I: nothing is inverted, so a singular I or Q is harmless
        system = dense.identity(block) + block @ noise
        return dense.symmetric(linalg.solve(system, block))

    def move(block: jax.Array, noise: jax.Array, step: jax.Array) -> jax.Array:
        # -(A I^-1 A^T + Q)^-1 is a block of [[I, A^T], [A, -Q]]^-1: I, which rounding
        # may have made indefinite, A or Q may be singular, as long as the whole is not
        block, before = linalg.equilibrated(block)
        after = before / jnp.sqrt(1 + linalg.diagonal(noise) * jnp.square(before))
        step = after[..., :, None] * step / before[..., None, :]
        noise = after[..., :, None] * noise * after[..., None, :]
        above = jnp.concatenate([block, jnp.swapaxes(step, -1, -2)], -1)
        below = jnp.concatenate([step, -noise], -1)
        none = jnp.zeros_like(block)
        right = jnp.concatenate([none, -dense.identity(block)], -2)
        found = linalg.solve(jnp.concatenate([above, below], -2), right)
        found = found[..., block.shape[-1] :, :]
        return dense.symmetric(after[..., :, None] * found * after[..., None, :])

    blocks = dense.matrices(information)
    noises = _operator_blocks(information, noise, "process_noise")
    if transition is None:
        return dense.with_matrices(information, map(wait, blocks, noises))
    steps = _operator_blocks(information, transition, "transition")
    return dense.with_matrices(information, map(move, blocks, noises, steps))


def spread(covariance: Any, noise: Any, transition: Any | None) -> Any:
    """The covariance `A P A^T + Q` of a step, in blocks; A None: the identity."""
    blocks = dense.matrices(covariance)
    if transition is not None:
        steps = _operator_blocks(covariance, transition, "transition")
        blocks = list(map(linalg.turned, steps, blocks))
    noises = _operator_blocks(covariance, noise, "process_noise")
    return dense.with_matrices(covariance, map(jnp.add, blocks, noises))


def register(kind: type) -> None:
    """Gives a type of dense blocks the step."""
    ops.propagate.register(kind, _propagate)
