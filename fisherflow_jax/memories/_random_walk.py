"""Parameters that wander: the Kalman prediction step."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fisherflow_jax._ground import batch as batches
from fisherflow_jax._ground import checks, choices, processes, trees
from fisherflow_jax.memories._memory import Memory, keep
from fisherflow_jax.structures import Diagonal, Scalar
from fisherflow_jax.structures.capabilities import RANDOM_WALK

PyTree = Any


class Wandering(NamedTuple):
    """Stores nothing."""

    @property
    def keeps_prior(self) -> bool:
        return False  # the drift widens what the prior said, too


@choices.choice
def random_walk(
    process_noise: PyTree | Callable, transition: PyTree | Callable | None = None
) -> Memory:
    r"""Lets the parameters take a random step before each update.

    .. math:: \theta_t = A \theta_{t-1} + \mathcal{N}(0, Q), \quad
       I^-_t = (A I_{t-1}^{-1} A^\top + Q)^{-1}, \quad \theta^-_t = A \theta_{t-1}

    Linear-Gaussian with the full structure: the Kalman filter.

    Args:
      process_noise: the variance Q of a step: a number, a pytree prefix of the
        parameters, or with the full structure (or a block structure whose blocks it
        does not couple) a matrix `(d, d)` in ravelled order. In units of squared
        parameters; with an unknown dispersion, in units of it. May be traced, or a
        function of the batch that returns one of these (a gap in time), called before
        the batch is taken in: an `ff.Batch` whose parts in `ff.Shared` are unwrapped,
        each row of weight 0 holding the inputs of the first row that counts; if none
        does, its own.
      transition: A, in the same forms; None: the identity.

    Returns:
      A `Memory`. Cost of an update: one solve with a matrix right-hand side (d^3 with
      the full structure), or two products where a flow keeps the covariance
      (`num_steps=1`, float64); storage: none.

    Raises:
      ValueError: for a negative or asymmetric noise; when the flow is built, for a
        structure that cannot take the step; at the first update, for a noise or
        transition that would not keep the structure. Where the values are traced, such
        an update moves nothing, and is counted in `num_skipped`.

    Example:
      >>> import fisherflow_jax as ff
      >>> ff.memories.random_walk(1e-4).name
      'random_walk(0.0001)'

    References:
      Kalman, "A new approach to linear filtering and prediction problems", 1960.
    """
    for value, check in (process_noise, _check_noise), (transition, _check_finite):
        if not callable(value):
            check(value)

    def predict(storage: Wandering, believed: Any, batch: Any, like: PyTree) -> Any:
        noise, step = process_noise, transition
        if callable(noise) or callable(step):
            if batch is None:
                raise ValueError(
                    "this memory's noise or transition is a function of the batch, "
                    "and none is given: flow.advance(state, batch)."
                )
            batch = batch._replace(inputs=batches.unshare(batch.inputs))
        if callable(noise):
            noise = noise(batch)
            _check_noise(noise)
        if callable(step):
            step = step(batch)
            _check_finite(step)
        operator = _operator(noise, like, "process_noise")
        if checks.is_traced(noise):
            operator = _nan_unless_variance(operator)
        return believed.moved(operator, _operator(step, like, "transition"))

    number = isinstance(process_noise, (int, float)) and transition is None
    reason = "the sum of a variance and an inverse does not stay in this structure."
    return Memory(
        name="random_walk" + (f"({process_noise})" if number else ""),
        init=lambda zeros: Wandering(),
        predict=predict,
        remember=keep,
        needs={RANDOM_WALK: reason},
    )


def _is_matrix(value: Any) -> bool:
    return isinstance(value, (np.ndarray, jax.Array)) and value.ndim == 2


def _operator(value: Any, like: PyTree, name: str) -> Any:
    """A number as Scalar, a prefix as Diagonal, a matrix as an array."""
    if value is None:
        return None
    dtype, count = trees.float_dtype(like), trees.size(like)
    if _is_matrix(value) and value.shape == (count, count):
        return (np if checks.is_concrete(value) else jnp).asarray(value, dtype)
    if trees.is_leaf(value) and np.ndim(value) == 0:
        return Scalar(jnp.asarray(value, dtype))
    if _is_matrix(value) and not any(
        x.shape == value.shape for x in jax.tree.leaves(like)
    ):
        raise ValueError(
            f"a matrix {name} must be (d, d) = ({count}, {count}) in ravelled order; "
            f"got {value.shape}."
        )
    return Diagonal(trees.broadcast_prefix(value, like, name))


def _nan_unless_variance(noise: Any) -> Any:
    """The noise; NaN, which no update takes in, where its values cannot raise."""
    if _is_matrix(noise):
        sound = jnp.all(jnp.diagonal(noise) >= 0) & jnp.allclose(noise, noise.T)
        return jnp.where(sound, noise, jnp.nan)
    return jax.tree.map(lambda x: jnp.where(x >= 0, x, jnp.nan), noise)


def _check_finite(value: PyTree, name: str = "transition") -> None:
    for leaf in jax.tree.leaves(value):
        if not checks.is_finite(leaf):
            raise ValueError(f"{name} must be finite; got {checks.shown(leaf)}.")


def _check_noise(noise: PyTree) -> None:
    _check_finite(noise, "process_noise")
    if checks.is_traced(noise):
        return
    # inside a tree, an array of two axes holds the variances of a leaf's entries
    square = _is_matrix(noise) and noise.shape[0] == noise.shape[1]
    for leaf in jax.tree.leaves(noise):
        values = checks.readable(leaf)
        if not checks.holds((values.diagonal() if square else values) >= 0):
            raise ValueError(
                f"process_noise is a variance, at least 0; got {checks.shown(leaf)}."
            )
    if square:
        matrix = processes.on_host(noise).astype(float)
        scale = max(np.abs(matrix).max(initial=0.0), np.finfo(float).tiny)
        if not np.allclose(matrix, matrix.T, atol=1e-6 * scale):
            raise ValueError("a matrix process_noise must be symmetric.")
        lowest = np.linalg.eigvalsh(matrix).min(initial=0.0)
        if lowest < -1e-6 * scale:
            raise ValueError(
                "a matrix process_noise must be positive semi-definite; its lowest "
                f"eigenvalue is {lowest}."
            )
