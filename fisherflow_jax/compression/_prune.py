"""Parameters set to zero, the others moved to make up for it, and zeros kept."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fisherflow_jax import information as ops
from fisherflow_jax._ground import checks, tables, trees
from fisherflow_jax._ground.warning import warn_once
from fisherflow_jax.compression._state import (
    Quadratic,
    check_finite,
    earlier,
    quadratic,
)

PyTree = Any

# A residual above is not that of rounding, but of too few iterations.
UNFINISHED = 1e-3


class Compressed(NamedTuple):
    """A pruned model; printing it lists what is pruned of each parameter.

    Made by `ff.compression.prune`.

    Attributes:
      params: like the state's mean, zero where the mask is False.
      mask: what is kept.
      predicted_rise: `()`, of the summed objective, in nats.
      residual: `()`, how far what is kept is from its minimum: the quadratic's gradient
        there, relative to that before it moved; 0 if nothing was to move.
    """

    params: PyTree
    mask: PyTree
    predicted_rise: jax.Array
    residual: jax.Array

    def __str__(self) -> str:
        rows: list[tuple] = [("parameter", "shape", "entries", "kept", "sparsity")]
        for name, leaf in trees.named_leaves(self.mask):
            shape, kept = jnp.shape(leaf), int(np.sum(leaf))
            share = f"{1 - kept / max(np.size(leaf), 1):.3f}"
            rows.append((name, shape, np.size(leaf), kept, share))
        table = tables.aligned(rows)
        return f"{table}\npredicted rise: {float(self.predicted_rise):.4g} nats"


def prune(state: Any, mask: PyTree, *, compensate: bool = True) -> Compressed:
    r"""Sets parameters to zero and moves the others to where they are then best.

    .. math:: \theta'_K = \theta_K + I_{KK}^{-1} I_{KS} \theta_S, \qquad \theta'_S = 0

    the minimum of :math:`\tfrac12 (\theta' - \theta)^\top I (\theta' - \theta)` with
    the zeros S of the whole mask at once: no gradient step, no data, one solve, exact
    for the information of every structure. Scalar and diagonal: nothing moves.

    The quadratic holds near a fit, and the further it is asked the less. Its rise is to
    be compared with the measured one; beyond nine tenths go in stages, with a new
    information in each (`docs/compression.md`).

    Args:
      state: anything with `.mean`, a converged fit, and `.information`, with the prior
        in it.
      mask: a tree like the parameters, True for what is kept, from
        `ff.compression.mask` (which keeps an earlier one).
      compensate: False: the others stay.

    Returns:
      A `Compressed(params, mask, predicted_rise, residual)`. Cost: some dozens of
      products and solves with the information, of a Kronecker layer I O (I + O) each.
      A residual above 1e-3 is warned of, once a state.

    Raises:
      TypeError: for a mixture.
      ValueError: for a state or a mask of other parameters; where the information
        is not positive definite.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> information = ff.structures.Full(jnp.array([[1.5, 1.0], [1.0, 1.5]]))
      >>> state = ff.posterior(jnp.array([1.0, 2.0]), information, prior_precision=0.5)
      >>> found = ff.compression.prune(state, jnp.array([False, True]))
      >>> found.params, found.predicted_rise
      (Array([0. , 2.5], dtype=float32), Array(0.75, dtype=float32))

    References:
      Hassibi, Stork, "Second order derivatives for network pruning: optimal brain
      surgeon", 1992.
      Frantar, Alistarh, "Optimal brain compression: a framework for accurate
      post-training quantization and pruning", 2022.
    """
    around = quadratic(state)
    kept = earlier(mask, around.mean)
    params, rise, residual = _pruned(around, kept, compensate)
    if compensate:
        way = (
            ": the information is not positive definite in its precision, which a "
            "larger prior precision or float64 mends"
        )
        check_finite(params, "the compensation", way)
    if compensate and checks.is_concrete(residual) and residual > UNFINISHED:
        warn_once(
            (around.mean, kept),
            f"what is kept is not at its minimum: a residual of {residual:.1g}, for an "
            "information that is nearly singular. Take float64, a larger prior "
            "precision, or stages of fewer parameters.",
        )
    return Compressed(params, kept, rise, residual)


@functools.partial(jax.jit, static_argnames="compensate")
def _pruned(
    around: Quadratic, kept: PyTree, compensate: bool
) -> tuple[PyTree, jax.Array, jax.Array]:
    wide = params = trees.widen(around.mean)
    if compensate:
        params = ops.conditional_mean(around.information, kept, around.mean)

    def leaf(x: jax.Array, kept: jax.Array, like: jax.Array) -> jax.Array:
        return jnp.where(kept, x, 0).astype(like.dtype)

    params = jax.tree.map(leaf, params, kept, wide)
    rounded = jax.tree.map(lambda x, like: x.astype(like.dtype), params, around.mean)
    around = around._replace(mean=wide)
    # the residual is of the solve, and not of narrow parameters
    residual = _residual(around, kept, params)
    return rounded, around.rise(trees.widen(rounded)), residual


def _residual(around: Quadratic, kept: PyTree, params: PyTree) -> jax.Array:
    def gradient(params: PyTree) -> PyTree:
        step = jax.tree.map(jnp.subtract, params, around.mean)
        found = trees.widen(ops.matvec(around.information, step))
        return jax.tree.map(lambda x, keep: jnp.where(keep, x, 0), found, kept)

    alone = jax.tree.map(lambda x, keep: jnp.where(keep, x, 0), around.mean, kept)
    after, before = (trees.dot(g, g) for g in map(gradient, (params, alone)))
    return jnp.where(before > 0, jnp.sqrt(after / jnp.where(before > 0, before, 1)), 0)


class KeepZerosState(NamedTuple):
    """What `keep_zeros` keeps."""

    kept: PyTree  # booleans like the parameters; optax.tree.set replaces them


def keep_zeros(mask: PyTree) -> optax.GradientTransformation:
    """Updates after which what is pruned is zero, exactly: last in a chain.

    `optax.masked` is another thing: it takes whole arrays, and lets the updates of what
    it masks pass as they are. Here an update of an entry that is not kept is what makes
    it zero, whatever stands before: momentum, weight decay, noise.

    Args:
      mask: a tree like the parameters, True for what is kept.

    Returns:
      An `optax.GradientTransformation`, whose update needs the parameters. The mask is
      in its state, so that a schedule of masks compiles once.

    Raises:
      ValueError: at `init`, for a mask of another tree; at `update`, without the
        parameters.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import fisherflow_jax as ff
      >>> kept = ff.compression.keep_zeros(jnp.array([True, False]))
      >>> optimizer = optax.chain(optax.adamw(0.1), kept)
      >>> params = jnp.array([1.0, 0.0])
      >>> updates, _ = optimizer.update(jnp.ones(2), optimizer.init(params), params)
      >>> print(optax.apply_updates(params, updates).round(3))
      [0.9 0. ]
    """

    def init(params: PyTree) -> KeepZerosState:
        return KeepZerosState(earlier(mask, params))

    def update(
        updates: PyTree, state: KeepZerosState, params: PyTree | None = None
    ) -> tuple[PyTree, KeepZerosState]:
        if params is None:
            raise ValueError("keep_zeros needs params: update(updates, state, params).")

        def leaf(update: jax.Array, kept: jax.Array, x: jax.Array) -> jax.Array:
            return jnp.where(kept, update, -x.astype(update.dtype))

        return jax.tree.map(leaf, updates, state.kept, params), state

    return optax.GradientTransformation(init, update)
