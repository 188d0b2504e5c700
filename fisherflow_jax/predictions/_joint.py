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
from fisherflow_jax import products
from fisherflow_jax._ground import chunks, keys, trees
from fisherflow_jax.model import check_function, once
from fisherflow_jax.posteriors import Gaussian
from fisherflow_jax.predictions._streaming import dispersed
from fisherflow_jax.products import Pulled, check_inputs

PyTree = Any


class Joint(NamedTuple):
    """The joint normal of all outputs of several inputs, m numbers together.

    Made by `ff.predictions.joint`.
    """

    mean: jax.Array  # (n, ..., k)
    covariance: jax.Array  # (m, m), in the order of `mean.ravel()`

    def sample(self, key: Any, shape: tuple[int, ...] = ()) -> jax.Array:
        """Draws `(*shape, n, ..., k)`."""
        count, dtype = self.mean.size, self.covariance.dtype
        draws = jax.random.normal(keys.typed_key(key), (*shape, count), dtype)
        flat = self.mean.ravel() + draws @ products.root(self.covariance).T
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
    check_function(apply_fn, "ff.predictions.joint(state, apply_fn, inputs)")
    inputs = check_inputs(state, inputs, chunk_size, robust)
    belief = products.one_belief(
        state, "the joint distribution of a bank is a mixture", robust
    )
    return products.deciding(_compiled, belief, apply_fn, inputs, robust, chunk_size)


def _joint(
    belief: Gaussian,
    apply_fn: Callable,
    inputs: PyTree,
    robust: bool | str,
    size: int | None,
) -> Joint:
    (parts, example_of), model = products.one_by_one(inputs), once(apply_fn)
    size = size or parts[0].shape[0]
    products.check_model(belief, model, inputs)
    found = products.layer_covariances(belief, model, inputs, robust)
    if found is None:
        at = products.by_gradients(belief, model, robust)
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
    at: products.Puller, parts: list[jax.Array], example_of: Callable, size: int
) -> tuple[jax.Array, jax.Array]:
    """The outputs `(n, ..., k)` and the covariance `(m, m)` of all of them."""

    def one(parts: list) -> tuple[jax.Array, Pulled]:
        outputs, pull = at(example_of(parts))
        return outputs[0], pull(products.units(outputs))

    outputs, rows = chunks.map_chunks(jax.vmap(one), parts, size)
    flat = Pulled(*(x.reshape((-1, x.shape[-1])) for x in rows))
    return outputs, flat.covariance()


def _of_layers(
    mean: PyTree,
    apply_fn: Callable,
    found: products.LayerCovariances,
    parts: list[jax.Array],
    example_of: Callable[[list], PyTree],
    size: int,
) -> tuple[jax.Array, jax.Array]:
    """The same, layer by layer."""
    dtype = trees.float_dtype(mean)

    def one(parts: list) -> tuple:
        example = example_of(parts)
        outputs, entering, back = layers_of.tap(apply_fn, found.layers, mean, example)
        return outputs[0], entering, *jax.vmap(back)(products.units(outputs))

    pulled = chunks.map_chunks(jax.vmap(one), parts, size)
    outputs, entering, gradients, others = pulled
    covariance = jnp.zeros((outputs.size, outputs.size), dtype)
    for part, inputs, back in zip(found.each, entering, gradients, strict=True):
        kept = jax.vmap(part.kept)(inputs, back.astype(dtype))
        covariance += part.between(kept, kept).reshape(covariance.shape)
    for leaf, values in others.items():
        flat = values.astype(dtype).reshape((outputs.size, -1))
        covariance += found.of_leaf(leaf, flat).covariance()
    return outputs, covariance
