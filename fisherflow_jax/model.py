"""A model: traced once a shape, its log-likelihood, its loss, and parts of it."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import jaxpr_as_fun

from fisherflow_jax._ground import batch as batches
from fisherflow_jax._ground import sharding as meshes
from fisherflow_jax._ground import trees
from fisherflow_jax._ground.batch import Batch
from fisherflow_jax.likelihoods import Likelihood

PyTree = Any


class Once:
    """An `apply_fn` that is traced once a shape. Made by `once`."""

    def __init__(self, function: Callable) -> None:
        self.function = function
        self.traced: dict[Any, tuple[Callable, Any]] = {}

    def __call__(self, params: PyTree, inputs: PyTree) -> Any:
        leaves = jax.tree.leaves((params, inputs))
        treedef: Any = jax.tree.structure((params, inputs))
        held = tuple(None if _is_array(x) else _Held(x) for x in leaves)
        arrays = [x for x in leaves if _is_array(x)]
        mesh = jax.sharding.get_abstract_mesh()
        key = treedef, held, mesh, tuple(map(jax.typeof, arrays))
        if key not in self.traced:

            def flat(*arrays: Any) -> Any:
                rest = iter(arrays)
                filled = [next(rest) if x is None else x.value for x in held]
                return self.function(*treedef.unflatten(filled))

            jaxpr, outputs = jax.make_jaxpr(flat, return_shape=True)(*arrays)
            self.traced[key] = jaxpr_as_fun(jaxpr), jax.tree.structure(outputs)
        run, output_tree = self.traced[key]
        return output_tree.unflatten(run(*arrays))


class _Held:
    """What is no array, a flag among shared inputs: part of the program."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Held) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


def once(apply_fn: Callable) -> Callable:
    """`apply_fn`, whose Python runs once a shape; its equations are those of each call.

    For one update, whose search, scores and curvature call the model again and again.
    It keeps what was traced, tracers that `apply_fn` closes over among it: make it anew
    for each update, within the trace of the update.
    """
    return apply_fn if isinstance(apply_fn, Once) else Once(apply_fn)


def plain(apply_fn: Any) -> Any:
    """The function that was given to `once`, or what never was."""
    return apply_fn.function if isinstance(apply_fn, Once) else apply_fn


def _is_array(leaf: Any) -> bool:
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


def weighted_sum(
    apply_fn: Callable, function: Callable, params: PyTree, batch: Batch
) -> jax.Array:
    """`function(outputs, targets)` summed over targets and weighted over examples.

    In float32 or wider, whatever the type of the outputs.
    """
    outputs = apply_fn(params, batches.unshare(batch.inputs))

    def total(outputs: PyTree, targets: PyTree, weights: jax.Array) -> jax.Array:
        values = function(outputs, targets)
        values = values.astype(trees.wide_dtype(values.dtype))
        values = jnp.sum(values.reshape((values.shape[0], -1)), axis=1)
        weights = weights.astype(values.dtype)
        # where, so that a row of weight zero stays out even if it is not finite
        kept = jnp.where(weights == 0, jnp.zeros_like(values), weights * values)
        return jnp.sum(kept)

    return meshes.replicated(total, outputs, batch.targets, batch.weights)


def log_likelihood(
    apply_fn: Callable, likelihood: Likelihood, params: PyTree, batch: Batch
) -> jax.Array:
    """The weighted sum of the examples' log-likelihoods, a number."""
    if batch.targets is None:
        raise ValueError("the log-likelihood needs targets; the batch's are None.")
    return weighted_sum(apply_fn, likelihood.log_prob, params, batch)


def negative_log_likelihood(
    apply_fn: Callable, likelihood: Likelihood
) -> Callable[[PyTree, Any], jax.Array]:
    r"""The mean loss of a batch, on the scale of the Fisher information.

    .. math:: \ell(\theta) = -\frac{1}{\sum_i w_i}
       \sum_i w_i \log p(y_i | f(\theta, x_i))

    Its gradient is minus the mean score and its expected Hessian the mean Fisher
    information, so that gradients from Optax and curvature from this package agree.

    Args:
      apply_fn: `(params, inputs) -> outputs`, leading axis = examples.
      likelihood: from `ff.likelihoods`.

    Returns:
      A function `(params, batch) -> ()`; the batch is `(inputs, targets)` or
      `(inputs, targets, weights)`. Cost: one forward pass.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> loss = ff.negative_log_likelihood(
      ...     lambda params, x: x @ params, ff.likelihoods.poisson()
      ... )
      >>> print(loss(jnp.zeros(2), (jnp.ones((3, 2)), jnp.array([0.0, 1.0, 1.0]))))
      1.0
    """

    def loss(params: PyTree, batch: Any) -> jax.Array:
        batch = batches.as_batch(batch)
        total = log_likelihood(apply_fn, likelihood, params, batch)
        return -total / jnp.sum(batch.weights).astype(total.dtype)

    return loss


def only(
    apply_fn: Callable, params: PyTree, chosen: Callable[[str], bool] | PyTree
) -> tuple[Callable, PyTree]:
    """A model of some of its parameters, the others held at their values.

    The last layer, adapters, or any mask: everything in this package then sees the
    chosen parameters alone.

    Args:
      apply_fn: `(params, inputs) -> outputs`.
      params: all parameters.
      chosen: a function of a leaf's path (`jax.tree_util.keystr`, such as
        `"['head']['kernel']"`), or a pytree of booleans like the parameters, or a
        prefix of it.

    Returns:
      `(apply_chosen, chosen_params)`: a function `(chosen_params, inputs) -> outputs`,
      and the chosen parameters: `params` with None in place of the others. No pass of
      the model.

    Raises:
      ValueError: if no parameter is chosen, or `chosen` does not fit the parameters.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> apply_fn = lambda params, x: jnp.tanh(x @ params["w"]) @ params["head"]
      >>> params = {"w": jnp.ones((2, 3)), "head": jnp.ones(3)}
      >>> model, head = ff.only(apply_fn, params, lambda path: "head" in path)
      >>> head
      {'head': Array([1., 1., 1.], dtype=float32), 'w': None}
      >>> model(head, jnp.zeros((1, 2)))
      Array([0.], dtype=float32)
    """
    if callable(chosen):
        mask = jax.tree_util.tree_map_with_path(
            lambda path, _: bool(chosen(jax.tree_util.keystr(path))), params
        )
    else:
        try:
            mask = jax.tree.map(
                lambda keep, part: jax.tree.map(lambda _: bool(keep), part),
                chosen,
                params,
            )
        except ValueError as error:
            raise ValueError(
                "chosen must be a pytree of booleans like the parameters, or a prefix "
                f"of it: {error}"
            ) from error
    if not any(jax.tree.leaves(mask)):
        names = [
            jax.tree_util.keystr(path)
            for path, _ in jax.tree_util.tree_leaves_with_path(params)
        ]
        raise ValueError(f"no parameter is chosen; their paths are {names}.")
    kept = jax.tree.map(lambda keep, x: x if keep else None, mask, params)
    held = jax.tree.map(lambda keep, x: None if keep else x, mask, params)

    def apply_chosen(chosen_params: PyTree, inputs: PyTree) -> Any:
        whole = jax.tree.map(
            lambda x, y: y if x is None else x,
            chosen_params,
            held,
            is_leaf=lambda x: x is None,
        )
        return apply_fn(whole, inputs)

    return apply_chosen, kept
