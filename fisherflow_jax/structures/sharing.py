"""Conventions of K-FAC for positions (tokens, pixels) that share a kernel."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

# (inputs (n, K, T, I), gradients (n, R, K, T, O)) -> ((n, K, S, I), (n, R, K, S, O)):
# what is treated as S independent positions, scaled so that both factors are sums
Sharing = Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


def expand(inputs: jax.Array, gradients: jax.Array) -> tuple[jax.Array, jax.Array]:
    r"""Positions that share a kernel are independent of each other.

    .. math:: A = \sum_{nt} a_{nt} a_{nt}^\top, \qquad
       G = \frac{1}{T} \sum_{nt} g_{nt} g_{nt}^\top

    Exact for a linear network with a loss at every position. The convention for
    sequence outputs, and for convolutions.

    References:
      Grosse, Martens, "A Kronecker-factored approximate Fisher matrix for convolution
      layers", 2016.
      Eschenhagen, Immer, Turner, Schneider, Hennig, "Kronecker-factored approximate
      curvature for modern neural network architectures", 2023.
    """
    positions = jnp.asarray(gradients.shape[3], gradients.dtype)
    return inputs, gradients / jnp.sqrt(positions)


def pool(inputs: jax.Array, gradients: jax.Array) -> tuple[jax.Array, jax.Array]:
    r"""Positions that share a kernel are pooled.

    .. math:: A = \sum_n \bar a_n \bar a_n^\top, \quad
       \bar a_n = \tfrac1T \sum_t a_{nt}, \qquad
       G = \sum_n \bar g_n \bar g_n^\top, \quad \bar g_n = \sum_t g_{nt}

    Exact for a linear network whose positions are averaged before the loss. Cheaper
    than `expand` by the number of positions.

    References:
      Eschenhagen, Immer, Turner, Schneider, Hennig, "Kronecker-factored approximate
      curvature for modern neural network architectures", 2023.
    """
    return (
        jnp.mean(inputs, axis=2, keepdims=True),
        jnp.sum(gradients, axis=3, keepdims=True),
    )
