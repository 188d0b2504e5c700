"""Linear algebra of stacks of matrices `(..., k, k)`."""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.lax import Precision

product = functools.partial(jnp.einsum, precision=Precision.HIGHEST)


def cholesky(matrices: jax.Array) -> jax.Array:
    """Lower Cholesky factors of symmetric matrices; NaN where one is not definite."""
    return _each(
        lambda m: jnp.linalg.cholesky(m, symmetrize_input=False), matrices
    ).reshape(matrices.shape)


def eigh(matrices: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Eigenvalues `(..., k)`, ascending, and columns `(..., k, k)`."""
    values, columns = _each(lambda m: tuple(jnp.linalg.eigh(m)), matrices)
    return values.reshape(matrices.shape[:-1]), columns.reshape(matrices.shape)


def _each(function: Callable, matrices: jax.Array):
    """`function` of one matrix, or of a stack of them flattened to `(number, k, k)`."""
    size = matrices.shape[-2:]
    if math.prod(matrices.shape[:-2]) == 1:
        return function(matrices.reshape(size))
    # jaxlib 0.10 hands the matrices of a stack to the pool of threads that waits for
    # them: as many stacks at once as threads, and none ever ends. One by one is safe.
    return jax.lax.platform_dependent(
        matrices.reshape((-1, *size)),
        cpu=lambda stack: jax.lax.map(function, stack),
        default=function,
    )
