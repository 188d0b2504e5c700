"""Finding the linear layers of any function of parameters and inputs."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fisherflow_jax._ground import batch as batches
from fisherflow_jax._ground import calling, checks
from fisherflow_jax.layers._checkpoints import register
from fisherflow_jax.layers._layer import Layers
from fisherflow_jax.layers._tracing import Traced, is_array, trace

PyTree = Any


def find_layers(
    apply_fn: Callable, params: PyTree, inputs: PyTree, *, batched: bool | None = None
) -> Layers:
    r"""The linear layers of a model, found in its own code.

    The model is traced on one example. A parameter that enters matrix products,
    convolutions or row look-ups is the kernel of a layer,

    .. math:: h_{kt} = W_k^\top a_{kt} + b_k,

    for K stacked kernels and T positions that share them; a parameter that is added to
    all outputs of one layer, and to nothing else, is its bias. Parameters are followed
    through reshapes, transposes, flips, broadcasts and changes of type, through `jit`,
    `vmap`, `jax.checkpoint` and `lax.scan`. All others are listed with the reason:
    `str(layers)` is a table of how each parameter is treated. An operation that is not
    known never fails; its parameters are in that list.

    Estimators map the model over single examples, which is one pass of the batch. Where
    examples interact, by batch normalisation in training mode or by one dropout mask,
    that is another model. With `batched=True` the table says so, and estimators with a
    structure that is given it hand the batch to the model as a whole. The row of
    example i in a layer then has the input that the batch gives it, and the gradient

    .. math:: g_i = \sum_j \sqrt{w_j}\, \epsilon_j\,
       (\partial f_j / \partial h_i)^\top L_j, \qquad
       E\, \epsilon_j \epsilon_k = \delta_{jk}

    of the outputs of all examples. (Sampled scores and probes bring signs of their own;
    `exact` and `empirical` draw them, and need a key.) The factors
    :math:`\sum_i a_i a_i^\top` and :math:`E \sum_i g_i g_i^\top` hold the interaction.
    Approximate is that a kernel's rows are squared one by one, as if what they add to
    one output were independent; so are parameters that are multiplied or added entry by
    entry. All others get one square for the whole batch, of the right mean and with a
    relative standard deviation of up to 1.4; they are marked in the table. Rows of
    weight zero are still part of what the model sees. Where examples do not interact
    both modes give the same numbers, save for the parameters marked.

    Args:
      apply_fn: `(params, inputs) -> outputs`, leading axis = examples.
      params: pytree of real arrays, or of their shapes (`jax.ShapeDtypeStruct`).
      inputs: pytree of arrays or shapes with a leading axis of examples, of which one
        is traced; parts in `ff.Shared` are passed whole.
      batched: whether estimators run the model on whole batches. None: if inputs of two
        or more examples show that they interact: a reduction, a product or a sort takes
        examples together, or random numbers are drawn for the batch. Interactions by
        other operations (slices of the batch, loops over it) are not seen.

    Returns:
      `Layers`, static and hashable. Cost: one or two traces of the model, no
      computation.

    Raises:
      ValueError: for parameters that are not real arrays, or inputs without an axis of
        examples; for `batched=True` with a single example.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> def apply_fn(params, x):
      ...     hidden = jnp.tanh(x @ params["w"] + params["b"])
      ...     return params["scale"] * (hidden @ params["v"].T)
      >>> params = {
      ...     "w": jnp.ones((3, 4)),
      ...     "b": jnp.ones(4),
      ...     "v": jnp.ones((2, 4)),
      ...     "scale": jnp.ones(2),
      ... }
      >>> print(ff.layers.find_layers(apply_fn, params, jnp.ones((8, 3))))
      parameter  shape   treatment              inputs  outputs  stacked  shared
      b          (4,)    bias of w              1       4        1        1
      scale      (2,)    no layer: used in mul
      v          (2, 4)  dense                  4       2        1        1
      w          (3, 4)  dense                  3       4        1        1

    References:
      Martens and Grosse, "Optimizing neural networks with Kronecker-factored
      approximate curvature", 2015.
    """
    register()
    batches.check_inputs(inputs)
    shapes = [getattr(leaf, "shape", ()) for leaf in batches.split(inputs)[0]]
    if len({shape[:1] for shape in shapes}) > 1 and all(shapes):
        raise ValueError(
            "inputs must agree in their leading axis, the examples' (wrap what all "
            f"examples share in ff.Shared); got shapes {shapes}."
        )
    return layers_of(apply_fn, params, inputs, batched)


def layers_of(
    apply_fn: Callable, params: PyTree, inputs: PyTree, batched: bool | None = None
) -> Layers:
    """As `find_layers`, of layers that no checkpoint will hold."""

    def shapes(take: Callable) -> PyTree:
        return batches.map_inputs(
            take, inputs, lambda node: batches.Shared(_shapes(node.tree))
        )

    one = shapes(_example)
    counts = {leaf.shape[0] for leaf in batches.split(inputs)[0]}
    if batched and (len(counts) != 1 or counts == {1}):
        raise ValueError(
            "batched=True needs inputs of two or more examples (shapes suffice), to "
            f"tell their axis from others; got arrays of {sorted(counts)} examples."
        )
    if batched is not False and len(counts) == 1 and counts != {1}:
        found = _layers(trace(apply_fn, params, shapes(_shapes), count=max(counts)))
        if batched or found.together is not None:
            return found
    return _layers(trace(apply_fn, params, one))


def _layers(traced: Traced) -> Layers:
    """Its layers, if it is a model: of one array of outputs."""
    outputs = traced.program.outputs
    if len(outputs) != 1:
        raise ValueError(
            "apply_fn(params, inputs) must return one array of outputs; got "
            f"{len(outputs)} of them.{calling.several(outputs)}"
        )
    return traced.layers


def interaction(apply_fn: Callable, params: PyTree, inputs: PyTree) -> str | None:
    """What takes the examples of a batch together, if anything is seen to."""
    leaves = jax.tree.leaves(params)
    if not all(is_array(x) and jnp.issubdtype(x.dtype, jnp.floating) for x in leaves):
        return "parameters that are not all arrays of floating point"
    counts = {leaf.shape[0] for leaf in batches.split(inputs)[0]}
    if len(counts) != 1 or counts == {1}:
        return None
    return trace(apply_fn, params, inputs, count=max(counts)).layers.together


def _shapes(tree: PyTree) -> PyTree:
    """Arrays as shapes, all else as it is."""
    return jax.tree.map(
        lambda x: jax.eval_shape(lambda y: y, x) if is_array(x) else x, tree
    )


def _example(leaf: Any) -> jax.ShapeDtypeStruct:
    shape = getattr(leaf, "shape", None)
    if not shape or shape[0] == 0:
        raise ValueError(
            "every array of inputs has a leading axis of at least one example (wrap "
            f"what all examples share in ff.Shared); got {checks.described(leaf)}."
        )
    return jax.eval_shape(lambda x: x[:1], leaf)
