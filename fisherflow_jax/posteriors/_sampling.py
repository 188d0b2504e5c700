"""Draws of the parameters."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from fisherflow_jax import information as ops
from fisherflow_jax._ground.keys import typed_key
from fisherflow_jax.flow._bank import BankState
from fisherflow_jax.posteriors._intervals import degrees_of_freedom_of, dispersion_of

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
    keys = jax.random.split(typed_key(key), math.prod(shape))
    draws = jax.vmap(lambda k: _draw(state, k))(keys)
    return jax.tree.map(lambda x: x.reshape((*shape, *x.shape[1:])), draws)


@functools.singledispatch
def _draw(state: Any, key: jax.Array) -> PyTree:
    step = ops.sample(state.information, key, state.mean)
    dispersion = dispersion_of(state)
    spare = degrees_of_freedom_of(state)
    if dispersion is not None and spare is not None:
        chi2 = 2 * jax.random.gamma(
            jax.random.fold_in(key, 1), spare / 2, dtype=spare.dtype
        )
        root = jnp.sqrt(dispersion * spare / chi2)
        step = jax.tree.map(lambda x: x * root, step)
    return jax.tree.map(lambda m, x: m + x, state.mean, step)


@_draw.register
def _(state: BankState, key: jax.Array) -> PyTree:
    chosen = jax.random.categorical(key, state.log_weights)
    draws = [_draw(m, jax.random.fold_in(key, 2)) for m in state.members]
    return jax.tree.map(lambda *x: jnp.stack(x)[chosen], *draws)
