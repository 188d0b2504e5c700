r"""Several inputs together: their outputs' mean and whole covariance.

Where the covariance is known layer by layer and a kernel is used once an example, that
of outputs r, s of examples n, m is

.. math:: \sum_o g_{nro} \, g_{mso} \sum_i a_{ni} a_{mi} V_{io},

so that nothing of the size of outputs times parameters is formed.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fisherflow_jax import layers as layers_of
from fisherflow_jax._ground import chunks, keys, linalg, trees
from fisherflow_jax.model import check_function, once
from fisherflow_jax.posteriors import Gaussian
from fisherflow_jax.predictions import _covariance as covariances
from fisherflow_jax.predictions._checks import (
    check_inputs,
    check_model,
    deciding,
    one_belief,
)
from fisherflow_jax.predictions._covariance import LayerCovariance, Pulled
from fisherflow_jax.predictions._streaming import dispersed, one_by_one

PyTree = Any


class Joint(NamedTuple):
    """The joint normal of all outputs of several inputs, m numbers together."""

    mean: jax.Array  # (n, ..., k)
    covariance: jax.Array  # (m, m), in the order of `mean.ravel()`

    def sample(self, key: Any, shape: tuple[int, ...] = ()) -> jax.Array:
        """Draws `(*shape, n, ..., k)`."""
        count, dtype = self.mean.size, self.covariance.dtype
        draws = jax.random.normal(keys.typed_key(key), (*shape, count), dtype)
        flat = self.mean.ravel() + draws @ covariances.root(self.covariance).T
        return flat.reshape((*shape, *self.mean.shape))


def joint(
    state: Any,
    apply_fn: Callable,
    inputs: PyTree,
    *,
    robust: bool | str = False,
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
      robust: with the sandwich variance, as in `ff.standard_error`.
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
    check_function(apply_fn)
    check_inputs(state, inputs, chunk_size, robust)
    belief = one_belief(state, "the joint distribution of a bank is a mixture", robust)
    return deciding(_compiled, belief, apply_fn, inputs, robust, chunk_size)


def _joint(
    belief: Gaussian,
    apply_fn: Callable,
    inputs: PyTree,
    robust: bool | str,
    size: int | None,
) -> Joint:
    (parts, example_of), model = one_by_one(inputs), once(apply_fn)
    size = size or parts[0].shape[0]
    check_model(belief, model, inputs)
    found = covariances.layer_covariances(belief, model, inputs, robust)
    if found is None:
        at = covariances.by_gradients(belief, model, robust)
        outputs, covariance = _of_gradients(at, parts, example_of, size)
    else:
        outputs, covariance = _of_layers(
            belief.mean, model, found, parts, example_of, size
        )
    covariance = dispersed(covariance, belief, robust)
    return Joint(outputs.astype(covariance.dtype), (covariance + covariance.T) / 2)


# compiled once a model and shape, so that a second call compiles nothing
_compiled = jax.jit(_joint, static_argnums=(1, 3, 4))


def _of_gradients(
    at: covariances.Puller, parts: list[jax.Array], example_of: Callable, size: int
) -> tuple[jax.Array, jax.Array]:
    """The outputs `(n, ..., k)` and the covariance `(m, m)` of all of them."""

    def one(parts: list) -> tuple[jax.Array, Pulled]:
        outputs, pull = at(example_of(parts))
        return outputs[0], pull(covariances.units(outputs))

    outputs, rows = chunks.map_chunks(jax.vmap(one), parts, size)
    flat = Pulled(*(x.reshape((-1, x.shape[-1])) for x in rows))
    return outputs, flat.covariance()


def _of_layers(
    mean: PyTree,
    apply_fn: Callable,
    found: covariances.LayerCovariances,
    parts: list[jax.Array],
    example_of: Callable[[list], PyTree],
    size: int,
) -> tuple[jax.Array, jax.Array]:
    """The same, layer by layer."""
    dtype = trees.float_dtype(mean)

    def one(parts: list) -> tuple:
        example = example_of(parts)
        outputs, entering, back = layers_of.tap(apply_fn, found.layers, mean, example)
        return outputs[0], entering, *jax.vmap(back)(covariances.units(outputs))

    pulled = chunks.map_chunks(jax.vmap(one), parts, size)
    outputs, entering, gradients, others = pulled
    covariance = jnp.zeros((outputs.size, outputs.size), dtype)
    for part, inputs, back in zip(found.each, entering, gradients, strict=True):
        covariance += _of_layer(part, inputs, back.astype(dtype))
    for leaf, values in others.items():
        flat = values.astype(dtype).reshape((outputs.size, -1))
        covariance += found.of_leaf(leaf, flat).covariance()
    return outputs, covariance


def _of_layer(
    part: LayerCovariance, inputs: jax.Array, gradients: jax.Array
) -> jax.Array:
    """From inputs `(n, K, T, I)` and gradients `(n, R, K, T, O)`: `(n R, n R)`."""
    layer, count = part.layer, gradients.shape[0] * gradients.shape[1]
    embeds = layer.kind == "embedding"
    if not embeds and layer.num_positions > 1:
        rows = jax.vmap(part.pulled)(inputs, gradients)
        return Pulled(*(x.reshape((count, -1)) for x in rows)).covariance()
    returned = part.returned(gradients)
    if not embeds:
        inputs = jax.vmap(lambda a: part.entered(a, gradients.dtype))(inputs)
    met = _met_at_table if embeds else _met_at_kernel

    def with_all(one: tuple[jax.Array, jax.Array]) -> jax.Array:
        """The covariances `(R, n, R)` of one example's outputs with all."""
        return linalg.product("rkto,nskto->rns", *met(part, one, inputs, returned))

    return jax.lax.map(with_all, (inputs, returned)).reshape((count, count))


def _met_at_kernel(
    part: LayerCovariance, one: tuple, inputs: jax.Array, returned: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """One example and all others at a kernel that each uses once."""
    entering, rows = one
    products = jnp.swapaxes(entering[None] * inputs, 0, 2)[0]  # (K, n, I)
    weights = linalg.product("kni,kio->nko", products, part.variances)
    return rows, weights[:, None, :, None] * returned


def _met_at_table(
    part: LayerCovariance, one: tuple, ids: jax.Array, returned: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """One example and all others at the rows of a table that both look up."""
    own, rows = one
    left = part.looked_up(own, rows).left
    same = (own[None, :, :, None] == ids[:, :, None, :]).astype(left.dtype)
    met = linalg.product("nktu,nskuo->nskto", same, returned)
    if part.layer.bias is not None:
        of_bias = jnp.sum(returned, axis=3, keepdims=True)
        met = jnp.concatenate([met, of_bias], axis=3)
    return left, met
