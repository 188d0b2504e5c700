"""Several inputs together: their outputs' mean and whole covariance."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fisherflow_jax._ground import batch as batches
from fisherflow_jax._ground.keys import typed_key
from fisherflow_jax.flow._bank import BankState
from fisherflow_jax.posteriors._intervals import dispersion_of
from fisherflow_jax.predictions._checks import check_inputs, check_model
from fisherflow_jax.predictions._layer_covariances import covariance_of_layers
from fisherflow_jax.predictions._pulling import Puller, spreads_of, whole
from fisherflow_jax.predictions._streaming import in_chunks
from fisherflow_jax.predictions._whitening import Rows

PyTree = Any


class Joint(NamedTuple):
    """The joint normal of all outputs of several inputs, m numbers together."""

    mean: jax.Array  # (n, ..., k)
    covariance: jax.Array  # (m, m), in the order of `mean.ravel()`

    def sample(self, key: Any, shape: tuple[int, ...] = ()) -> jax.Array:
        """Draws `(*shape, n, ..., k)`."""
        count, eps = self.mean.size, jnp.finfo(self.covariance.dtype)
        scale = jnp.max(jnp.diagonal(self.covariance))
        # singular where there are more outputs than parameters
        share = 10 * count * eps.eps * scale + math.sqrt(eps.tiny)
        identity = jnp.eye(count, dtype=self.covariance.dtype)
        root = jnp.linalg.cholesky(self.covariance + share * identity)
        draws = jax.random.normal(
            typed_key(key), (*shape, count), self.covariance.dtype
        )
        flat = self.mean.ravel() + draws @ root.T
        return flat.reshape((*shape, *self.mean.shape))


def joint(
    state: Any,
    apply_fn: Callable,
    inputs: PyTree,
    *,
    robust: bool = False,
    chunk_size: int | None = None,
) -> Joint:
    r"""The joint distribution of the outputs of several inputs.

    .. math:: \mathrm{Cov}(z_i, z_j) = J_i I^{-1} J_j^\top

    With the full structure it is the predictive of the Gaussian process whose kernel is
    :math:`J P^{-1} J^\top`, of the prior P, given all the data.

    Args:
      state: anything with `.mean` and `.information`.
      apply_fn: `(params, inputs) -> outputs (n, ..., k)`.
      inputs: leading axis n; parts in `ff.Shared` are passed whole.
      robust: with the sandwich variance.
      chunk_size: examples that are pulled back at a time; None: all.

    Returns:
      A `Joint` of m = n k outputs. Cost: a backward pass for each output, and a solve
      and m^2 d products; with scalar, diagonal and Kronecker structures in their place
      n^2 I O + m^2 O for each layer. Memory: m^2 and m d, d the number of parameters;
      with those structures m^2 and what returns to the layers, and m I O of one layer
      whose kernel several positions share. For few inputs.

    Raises:
      ValueError: for a bank, whose joint distribution is a mixture, not a normal; and
        as `linearized_outputs` does.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> information = ff.structures.Scalar(jnp.array(3.0))
      >>> state = ff.posterior(jnp.array(1.0), information, prior_precision=1.0)
      >>> x = jnp.array([1.0, 2.0])
      >>> ff.predictions.joint(state, lambda p, x: p * x, x).covariance
      Array([[0.25, 0.5 ],
             [0.5 , 1.  ]], dtype=float32)

    References:
      Khan, Immer, Abedi, Korzepa, "Approximate inference turns deep networks into
      Gaussian processes", 2019.
    """
    check_inputs(state, inputs, chunk_size)
    if isinstance(state, BankState):
        raise ValueError(
            "the joint distribution of a bank is a mixture: ask for that of each of "
            "bank.members."
        )
    return _compiled(state, apply_fn, inputs, robust, chunk_size)


def _joint(
    state: Any, apply_fn: Callable, inputs: PyTree, robust: bool, size: int | None
) -> Joint:
    parts, rebuild = batches.split(inputs)
    size = size or parts[0].shape[0]

    def example_of(parts: list) -> PyTree:
        return batches.unshare(rebuild([x[None] for x in parts]))

    check_model(state, apply_fn, inputs)
    spreads = spreads_of(state, apply_fn, inputs, robust)
    if spreads is None:
        at = whole(state, apply_fn, robust)
        outputs, covariance = _of_rows(at, parts, example_of, size)
    else:
        outputs, covariance = covariance_of_layers(
            state.mean, apply_fn, spreads, parts, example_of, size
        )
    dispersion = None if robust else dispersion_of(state)
    if dispersion is not None:
        covariance = covariance * dispersion
    return Joint(outputs.astype(covariance.dtype), (covariance + covariance.T) / 2)


def _of_rows(
    at: Puller, parts: list[jax.Array], example_of: Callable[[list], PyTree], size: int
) -> tuple[jax.Array, jax.Array]:
    def one(parts: list) -> tuple[jax.Array, Rows]:
        outputs, rows_of = at(example_of(parts))
        units = jnp.eye(outputs.size, dtype=outputs.dtype)
        return outputs[0], rows_of(units.reshape((outputs.size, *outputs.shape)))

    outputs, rows = in_chunks(one, parts, size)
    flat = Rows(*(x.reshape((-1, x.shape[-1])) for x in rows))
    return outputs, flat.covariance()


# compiled once a model and shape, so that a second call compiles nothing
_compiled = jax.jit(_joint, static_argnums=(1, 3, 4))
