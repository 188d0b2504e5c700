"""Finding the linear layers of any function of parameters and inputs."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fisherflow_jax import batch as batches
from fisherflow_jax.layers import _compat
from fisherflow_jax.layers.layer import Layer, Layers
from fisherflow_jax.layers.walk import Use, Walk, walk

PyTree = Any


class Traced(NamedTuple):
    """A model as a program, and the layers found in it."""

    program: _compat.Program
    arguments: list  # of the program: leaves of the parameters, then of the inputs
    output_tree: Any
    layers: Layers
    uses: tuple[tuple[Use, ...], ...]  # of each layer


def find_layers(apply_fn: Callable, params: PyTree, inputs: PyTree) -> Layers:
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

    Args:
      apply_fn: `(params, inputs) -> outputs`, leading axis = examples.
      params: pytree of real arrays, or of their shapes (`jax.ShapeDtypeStruct`).
      inputs: pytree of arrays or shapes with a leading axis of examples, of which one
        is traced; parts in `ff.Shared` are passed whole.

    Returns:
      `Layers`, static and hashable. Cost: one trace of the model, no computation.

    Raises:
      ValueError: for parameters that are not real arrays, or inputs without an axis of
        examples.

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
      ['b']      (4,)    bias of ['w']          1       4        1        1
      ['scale']  (2,)    no layer: used in mul
      ['v']      (2, 4)  dense                  4       2        1        1
      ['w']      (3, 4)  dense                  3       4        1        1

    References:
      Martens and Grosse, "Optimizing neural networks with Kronecker-factored
      approximate curvature", 2015.
    """
    leaves = jax.tree.leaves(inputs, is_leaf=_is_shared)
    treedef: Any = jax.tree.structure(inputs, is_leaf=_is_shared)
    one = [
        _shapes(leaf.tree) if _is_shared(leaf) else _example(leaf) for leaf in leaves
    ]
    return trace(apply_fn, params, treedef.unflatten(one)).layers


def trace(apply_fn: Callable, params: PyTree, inputs: PyTree) -> Traced:
    """Traces a model on inputs as it receives them, and finds its layers."""
    named = jax.tree_util.tree_leaves_with_path(params)
    names = tuple(jax.tree_util.keystr(path) for path, _ in named)
    for name, (_, leaf) in zip(names, named, strict=True):
        _check_parameter(name, leaf)
    leaves = jax.tree.leaves((params, inputs))
    treedef: Any = jax.tree.structure((params, inputs))
    # what is no array (a flag among shared inputs) is part of the program
    arrays = [i for i, leaf in enumerate(leaves) if _is_array(leaf)]

    def flat_apply(*values: Any) -> PyTree:
        filled = dict(enumerate(leaves)) | dict(zip(arrays, values, strict=True))
        return apply_fn(*treedef.unflatten([filled[i] for i in range(len(leaves))]))

    arguments = [leaves[i] for i in arrays]
    jaxpr, outputs = _compat.trace(flat_apply, *arguments)
    program = _compat.read(jaxpr)
    shapes = tuple(tuple(leaf.shape) for _, leaf in named)
    found = walk(program, list(shapes))
    uses = _settle(found)
    layers = Layers(
        tuple(map(_layer, uses)),
        _fallback(found, uses, len(names)),
        names,
        shapes,
        jax.tree.structure(params),
    )
    return Traced(program, arguments, jax.tree.structure(outputs), layers, uses)


def _settle(found: Walk) -> tuple[tuple[Use, ...], ...]:
    """The uses of each layer; reasons are noted for leaves that are not treated."""
    by_leaf: dict[int, list[Use]] = {}
    for use in found.uses:
        by_leaf.setdefault(use.leaf, []).append(use)
    biases = {use.bias.leaf for use in found.uses if use.bias is not None}
    for leaf, uses in by_leaf.items():
        if leaf in biases:
            found.reasons.setdefault(leaf, "used as a kernel and as a bias")
        if len({(use.kernel, use.linear.kind == "embedding") for use in uses}) > 1:
            found.reasons.setdefault(leaf, "used in several orientations or kinds")
    kept = {leaf: uses for leaf, uses in by_leaf.items() if leaf not in found.reasons}
    for bias in biases:
        owners = {use.leaf for use in found.uses if use.bias and use.bias.leaf == bias}
        if len(owners) > 1:
            found.reasons.setdefault(bias, "added to the outputs of several layers")
        elif not owners <= kept.keys():
            found.reasons.setdefault(bias, "bias of a parameter that is no layer")
        elif len({use.bias for use in kept[min(owners)]}) > 1:
            found.reasons.setdefault(bias, "added at some uses of its layer only")
    return tuple(
        tuple(
            use._replace(bias=None)
            if use.bias and use.bias.leaf in found.reasons
            else use
            for use in kept[leaf]
        )
        for leaf in sorted(kept)
    )


def _fallback(
    found: Walk, layers: tuple[tuple[Use, ...], ...], count: int
) -> tuple[tuple[int, str], ...]:
    treated = {uses[0].leaf for uses in layers}
    treated |= {uses[0].bias.leaf for uses in layers if uses[0].bias}
    reasons = {
        leaf: found.reasons.get(
            leaf, "no gradient passes" if leaf in found.stopped else "unused"
        )
        for leaf in range(count)
        if leaf not in treated
    }
    return tuple(reasons.items())


def _layer(uses: tuple[Use, ...]) -> Layer:
    first = uses[0]
    stacked, inputs, outputs = first.kernel.shape
    return Layer(
        first.leaf,
        first.bias and first.bias.leaf,
        first.linear.kind,
        stacked,
        sum(use.num_positions for use in uses),
        inputs,
        outputs,
        first.kernel,
        first.bias and first.bias.view,
        tuple(use.path for use in uses),
    )


def _is_shared(node: Any) -> bool:
    return isinstance(node, batches.Shared)


def _is_array(leaf: Any) -> bool:
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


def _shapes(tree: PyTree) -> PyTree:
    """Arrays as shapes, all else as it is."""
    return jax.tree.map(
        lambda x: jax.eval_shape(lambda y: y, x) if _is_array(x) else x, tree
    )


def _example(leaf: Any) -> jax.ShapeDtypeStruct:
    shape = getattr(leaf, "shape", None)
    if not shape or shape[0] == 0:
        raise ValueError(
            "every array of inputs has a leading axis of at least one example (wrap "
            f"what all examples share in ff.Shared); got {_described(leaf)}."
        )
    return jax.eval_shape(lambda x: x[:1], leaf)


def _check_parameter(name: str, leaf: Any) -> None:
    if not _is_array(leaf) or not jnp.issubdtype(leaf.dtype, jnp.floating):
        raise ValueError(
            "params must be real floating-point arrays, or their shapes; "
            f"params{name} is {_described(leaf)}."
        )


def _described(leaf: Any) -> str:
    if not _is_array(leaf):
        return f"{leaf!r}"
    return f"an array of shape {tuple(leaf.shape)} and dtype {leaf.dtype}"
