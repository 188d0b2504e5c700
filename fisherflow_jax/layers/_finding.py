"""Finding the linear layers of any function of parameters and inputs."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fisherflow_jax._ground import batch as batches
from fisherflow_jax._ground import calling, checks, trees
from fisherflow_jax.layers import _alone as alone
from fisherflow_jax.layers._checkpoints import register
from fisherflow_jax.layers._layer import Layers
from fisherflow_jax.layers._tracing import Traced, trace

PyTree = Any


def find_layers(
    apply_fn: Callable, params: PyTree, inputs: PyTree, *, batched: bool | None = None
) -> Layers:
    r"""The linear layers of a model, found in its own code.

    The model is traced on one example. A parameter that enters matrix products,
    convolutions or row look-ups is the kernel of a layer,

    .. math:: h_{kt} = W_k^\top a_{kt} + b_k,

    for K stacked kernels and T positions that share them. One whose transpose is used
    too, as tied embeddings are at the outputs, is one layer, called tied, whose
    positions are those of both. Slices of a kernel are one layer: those that multiply
    one input are one product, others are further positions, and an index picks one of K
    stacked kernels. Kernels that are concatenated are one layer each. A parameter that
    is added to all outputs of one layer, and to nothing else, is its bias. Parameters
    are followed through reshapes, transposes, flips, broadcasts and changes of type,
    through `jit`, `vmap`, `jax.checkpoint` and `lax.scan`, also where a body hands back
    what it was given, and into multiples, sums and products of two: in
    :math:`x^\top (W + s A B)` the layer `B` is given :math:`s A^\top x`, and `A` gets
    :math:`B g` back. All others are listed with the reason: `str(layers)` is a table of
    how each parameter is treated. An operation that is not known never fails; its
    parameters are in that list.

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
    weight zero are still part of what the model sees. A layer may come after examples
    have met, in a product with the adjacency matrix of a graph, or where experts
    (`lax.ragged_dot`) take the tokens of a batch in their own order. If its rows are as
    many as n examples have, T each, they are squared as the others are, each with the
    mean weight: `mixed rows` in the table. Where examples do not interact
    both modes give the same numbers, save for the parameters marked.

    Args:
      apply_fn: `(params, inputs) -> outputs`, leading axis = examples.
      params: pytree of real arrays, or of their shapes (`jax.ShapeDtypeStruct`).
      inputs: pytree of arrays or shapes with a leading axis of examples, of which one
        is traced; parts in `ff.Shared` are passed whole.
      batched: whether estimators run the model on whole batches. None: if inputs of two
        or more examples show that they interact: a reduction, a product or a sort takes
        examples together, or random numbers are drawn for the batch. Where the program
        loses sight of them (slices of the batch, look-ups over it), values decide, each
        row against the same row alone; False: no, whatever is shown.

    Returns:
      `Layers`, static and hashable. Cost: one or two traces of the model, no
      computation; where values decide, two passes of the batch and of each row.

    Raises:
      ValueError: for parameters that are not real arrays; inputs without an axis of
        examples, or with several lengths of it; `batched=True` with a single example; a
        model that fails on one example, or gives it more than a row; one of which the
        program does not tell whether its examples interact, where values are not at
        hand.

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
      Martens, Grosse, "Optimizing neural networks with Kronecker-factored
      approximate curvature", 2015.
    """
    register()
    batches.check_inputs(inputs)
    return layers_of(apply_fn, params, inputs, batched)


def layers_of(
    apply_fn: Callable, params: PyTree, inputs: PyTree, batched: bool | None = None
) -> Layers:
    """As `find_layers`, of layers that no checkpoint will hold.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> params, x = {"w": jnp.ones((2, 1))}, jnp.ones((3, 2))
      >>> len(ff.layers.layers_of(lambda p, x: x @ p["w"], params, x).layers)
      1
    """
    one = _map_shapes(_example, inputs)  # which says what has no axis of examples
    count = _num_examples(inputs)
    if batched and count == 1:
        raise ValueError(
            "batched=True needs inputs of two or more examples (shapes suffice), to "
            "tell their axis from others; got arrays of [1] examples."
        )
    traced: Any
    row_by_row = None
    if batched is not False and count > 1:
        traced = trace(apply_fn, params, _map_shapes(_shape, inputs), count=count)
        found = _layers(traced)
        if batched or found.together is not None:
            (outputs_of_all,) = traced.program.outputs
            if outputs_of_all.shape[:1] != (count,):
                shapes = [tuple(leaf.shape) for leaf in batches.split(inputs)[0]]
                raise ValueError(
                    "inputs need a leading axis of examples, and each has a row of "
                    f"outputs; got inputs of shapes {shapes}, {count} examples, and "
                    f"outputs of shape {outputs_of_all.shape}. One is inputs[None]."
                )
            return found
        if traced.lost is not None:
            why = alone.decide(apply_fn, params, inputs, traced.lost)
            if why is not None:
                return dataclasses.replace(found, together=why)
            row_by_row = f"not followed through {traced.lost}, and by their values"
    elif batched is False:
        row_by_row = "as asked"

    def outputs() -> list:
        nonlocal traced
        traced = trace(apply_fn, params, one)
        return [jax.ShapeDtypeStruct(x.shape, bool) for x in traced.program.outputs]

    if batched is None and count > 1:  # the batch as a whole has a row for each
        alone.one_row(outputs, one)
    else:
        alone.check_rows(outputs())
    return dataclasses.replace(_layers(traced), row_by_row=row_by_row)


def _layers(traced: Traced) -> Layers:
    """Its layers, if it is a model: of one array of outputs."""
    outputs = traced.program.outputs
    if len(outputs) != 1:
        raise ValueError(
            "apply_fn(params, inputs) must return one array of outputs; got "
            f"{len(outputs)} of them.{calling.several(outputs)}"
        )
    return traced.layers


def interaction(
    apply_fn: Callable, params: PyTree, inputs: PyTree, of: Callable | None = None
) -> str | None:
    """What takes the examples of a batch together, if anything does.

    Args:
      apply_fn: `(params, inputs) -> outputs`.
      params: pytree of arrays.
      inputs: leading axis = examples; parts in `ff.Shared` are passed whole.
      of: the function that is asked about, where `apply_fn` stands in for it.

    Raises:
      Undecided: where neither the program nor values say it.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> x = jnp.ones((3, 2))
      >>> print(ff.layers.interaction(lambda p, x: x @ p, jnp.ones(2), x))
      None
      >>> print(
      ...     ff.layers.interaction(lambda p, x: (x - x.mean(0)) @ p, jnp.ones(2), x)
      ...     is None
      ... )
      False
    """
    leaves = jax.tree.leaves(params)
    if not all(
        trees.is_array(x) and jnp.issubdtype(x.dtype, jnp.floating) for x in leaves
    ):
        return "parameters that are not all arrays of floating point"
    count, of = _num_examples(inputs), of or apply_fn
    if count == 1:
        return None
    traced = trace(apply_fn, params, _map_shapes(_shape, inputs), count=count)
    if traced.layers.together is not None or traced.lost is None:
        return traced.layers.together
    try:
        return alone.said(of, params, inputs)
    except KeyError:
        return alone.decide(of, params, inputs, traced.lost)


def deciding(
    run: Callable[[], Any],
    apply_fn: Callable,
    given: Callable[[], tuple[PyTree, PyTree]],
) -> Any:
    """`run()`, which may trace; once more where values must first tell of examples.

    `given()` are the parameters and inputs, whose values may be at hand.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> apply_fn = lambda p, x: x @ p
      >>> ff.layers.deciding(
      ...     lambda: "no doubt arose", apply_fn, lambda: (jnp.ones(2), jnp.eye(2))
      ... )
      'no doubt arose'
    """
    try:
        return run()
    except alone.Undecided as undecided:
        params, inputs = given()
        alone.decide(apply_fn, params, inputs, undecided.lost)
        return run()


def _num_examples(inputs: PyTree) -> int:
    shapes = {leaf.shape for leaf in batches.split(inputs)[0]}
    counts = {shape[0] for shape in shapes} or {1}
    if len(counts) == 1:
        return counts.pop()
    raise ValueError(
        "inputs must agree in their leading axis, the examples' (wrap what all "
        "examples share, such as a mask or statistics, in ff.Shared); got shapes "
        f"{sorted(shapes)}."
    )


def _map_shapes(take: Callable, inputs: PyTree) -> PyTree:
    """Of what has an example axis; parts in `Shared` are whole."""

    def whole(node: batches.Shared) -> batches.Shared:
        return batches.Shared(
            jax.tree.map(lambda x: _shape(x) if trees.is_array(x) else x, node.tree)
        )

    return batches.map_inputs(take, inputs, whole)


def _shape(leaf: Any) -> Any:
    return jax.eval_shape(lambda x: x, leaf)


def _example(leaf: Any) -> jax.ShapeDtypeStruct:
    shape = getattr(leaf, "shape", None)
    if not shape or shape[0] == 0:
        raise ValueError(
            "every array of inputs has a leading axis of at least one example (wrap "
            f"what all examples share in ff.Shared); got {checks.described(leaf)}."
        )
    return jax.eval_shape(lambda x: x[:1], leaf)
