"""Draws of the parameters."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from fisherflow_jax import information as ops
from fisherflow_jax._ground.keys import typed_key
from fisherflow_jax.posteriors._belief import Gaussian, gaussians

PyTree = Any


def sample(state: Any, key: Any, shape: tuple[int, ...] = ()) -> PyTree:
    r"""Draws from the posterior `N(mean, information^-1)`.

    Where the dispersion is estimated the draws are of the multivariate Student's t that
    integrates over it; for a bank, of the mixture.

    Args:
      state: anything with `.mean` and `.information`.
      key: an int, a key, or key data.
      shape: leading shape of the draws.

    Returns:
      A pytree like the parameters with leaves `(*shape, *leaf.shape)`. Cost: one
      factorisation and a triangular solve a draw.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> flow = ff.fisher_flow(
      ...     lambda params, x: x @ params["w"],
      ...     ff.likelihoods.gaussian(),
      ...     structure=ff.structures.full(),
      ...     memory=ff.memories.stationary(),
      ... )
      >>> state = flow.init({"w": jnp.zeros(3)})
      >>> ff.sample(state, key=0, shape=(5,))["w"].shape
      (5, 3)
    """
    weights, members = gaussians(state)

    def draw(key: jax.Array) -> PyTree:
        if len(members) == 1:
            return _draw(members[0], key)
        chosen = jax.random.categorical(key, jnp.log(weights))
        draws = [_draw(member, jax.random.fold_in(key, 2)) for member in members]
        return jax.tree.map(lambda *x: jnp.stack(x)[chosen], *draws)

    draws = jax.vmap(draw)(jax.random.split(typed_key(key), math.prod(shape)))
    return jax.tree.map(lambda x: x.reshape((*shape, *x.shape[1:])), draws)


def _draw(belief: Gaussian, key: jax.Array) -> PyTree:
    step = ops.sample(belief.information, key, belief.mean)
    dispersion, spare = belief.dispersion, belief.degrees_of_freedom
    if dispersion is not None and spare is not None:
        chi2 = 2 * jax.random.gamma(
            jax.random.fold_in(key, 1), spare / 2, dtype=spare.dtype
        )
        root = jnp.sqrt(dispersion * spare / chi2)
        step = jax.tree.map(lambda x: x * root, step)
    return jax.tree.map(lambda m, x: m + x, belief.mean, step)
