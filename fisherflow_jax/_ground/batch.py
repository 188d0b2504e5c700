"""Batches: inputs, targets and multiplicities, checked and sliced."""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fisherflow_jax._ground import checks, processes, sharding, trees
from fisherflow_jax._ground.given import check_numbers

PyTree = Any


class Shared(NamedTuple):
    """A part of the inputs that all examples share, passed whole to `apply_fn`.

    Batch statistics, frozen weights, a dropout key: never sliced, never vmapped.
    `apply_fn` receives the tree itself, without this wrapper. `lax.scan` knows nothing
    of it and slices a stack of batches, shared parts too: inside a scan, wrap what its
    body closes over, `lambda s, b: flow.update(s, ((b[0], ff.Shared(frozen)), b[1]))`.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> def apply_fn(params, inputs):
      ...     return (inputs["x"] - inputs["center"]) @ params
      >>> inputs = {"x": jnp.ones((4, 2)), "center": ff.Shared(jnp.array([0.5, 0.5]))}
      >>> estimator = ff.estimators.exact(
      ...     apply_fn, ff.likelihoods.gaussian(), ff.structures.diagonal()
      ... )
      >>> estimator(jnp.zeros(2), (inputs, jnp.zeros(4)))
      Diagonal(entries=Array([1., 1.], dtype=float32))
    """

    tree: PyTree


class Batch(NamedTuple):
    """A batch by its parts' names, accepted wherever `(inputs, targets)` is.

    Weights are multiplicities, 0 = padding. Of shape `(n,)`, an example is an
    observation, and the log-probabilities of its targets are summed. Of the targets'
    shape `(n, ...)`, a target is an observation (tokens, channels, nodes that have a
    label): each log-probability is multiplied by its own, and counts, mean losses and
    mean informations divide by the sum of them all. Ones of shape `(n, T)` give the
    sums of `(n,)` ones, and a count T times as large.

    Attributes:
      inputs: leaves `(n, ...)`, parts in `ff.Shared` excepted.
      targets: leaves `(n, ...)`, or None where no labels are needed.
      weights: `(n,)` or `(n, ...)`; booleans are a mask; None: all one.
      clusters: `(n,)` integers: the cluster (person, site) that each example is of, for
        what asks for it; None: every example is its own.
      mask: `(n, ...)` booleans: which targets of an example count, where the example is
        the observation, and none if it has no target left; None: all.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> batch = ff.Batch(
      ...     jnp.ones((3, 2)), jnp.zeros(3), clusters=jnp.array([0, 0, 1])
      ... )
      >>> batch.weights is None
      True
      >>> ff.negative_log_likelihood(lambda w, x: x @ w, ff.likelihoods.bernoulli())(
      ...     jnp.zeros(2), batch
      ... ).round(3)
      Array(0.693, dtype=float32)
    """

    inputs: PyTree
    targets: PyTree
    weights: Any = None
    clusters: Any = None
    mask: Any = None


def is_shared(node: Any) -> bool:
    return isinstance(node, Shared)


def unshare(inputs: PyTree) -> PyTree:
    """The inputs as `apply_fn` receives them."""
    return map_inputs(lambda x: x, inputs, lambda node: node.tree)


def map_inputs(
    function: Callable, inputs: PyTree, shared: Callable = lambda node: node
) -> PyTree:
    """`function` of the leaves with an example axis, `shared` of parts in `Shared`."""
    return jax.tree.map(
        lambda x: shared(x) if is_shared(x) else function(x), inputs, is_leaf=is_shared
    )


def by_axis(batch: Batch, rows: Any, whole: Any) -> Batch:
    """A prefix of the batch: `rows` where there is an example axis, else `whole`."""
    inputs = map_inputs(lambda _: rows, batch.inputs, lambda _: whole)
    return Batch(inputs, rows, rows, rows, rows)


def split(inputs: PyTree) -> tuple[list[jax.Array], Callable[[list], PyTree]]:
    """The leaves with an example axis, and how to rebuild inputs around others."""
    leaves, treedef = jax.tree.flatten(inputs, is_leaf=is_shared)
    sliced = [leaf for leaf in leaves if not is_shared(leaf)]

    def rebuild(parts: list) -> PyTree:
        rest = iter(parts)
        filled = [leaf if is_shared(leaf) else next(rest) for leaf in leaves]
        return jax.tree.unflatten(treedef, filled)

    return sliced, rebuild


def unpack(batch: Batch) -> tuple[tuple, Callable[..., Batch]]:
    """What has an example axis: inputs' leaves and the other parts; how to rebuild.

    `rebuild(*others)` is the batch of others, with the same parts in `Shared`.
    """
    sliced, rebuild = split(batch.inputs)
    return (sliced, *batch[1:]), lambda parts, *rest: Batch(rebuild(parts), *rest)


def as_batch(batch: Any, *, values: bool = True) -> Batch:
    """`(inputs, targets)`, `(inputs, targets, weights)` or a `Batch`, checked.

    Rows of weight zero are replaced by the first row of positive weight before any
    model sees them, so that padding may hold anything: zero times NaN is NaN in a vjp.
    If there is none, targets are ones, and inputs where they are not finite. A negative
    weight becomes NaN, where it does not raise: with `values` False, for those who
    screen the batch, and where it is traced.

    Raises:
      ValueError: for an empty batch, shapes that do not fit, a third entry of integers,
        or (when the values are concrete) weights that are negative or not finite.
    """
    return as_arrays(by_name(batch), values=values)


def as_arrays(batch: Batch, *, values: bool = True) -> Batch:
    """`as_batch` of what `by_name` gave."""
    inputs = map_inputs(trees.as_array, batch.inputs)
    targets, clusters, mask = jax.tree.map(trees.as_array, batch[1:2] + batch[3:])
    count, dtype = _num_examples(inputs, targets), jnp.result_type(float)
    none = batch.weights is None
    if not none:
        weights = trees.as_array(batch.weights, dtype)
    elif checks.is_traced((inputs, targets)):
        weights = trees.as_array(np.ones((count,), dtype))
    else:
        device = jax.config.jax_default_device  # type: ignore[attr-defined]
        places = jax.sharding.get_abstract_mesh(), device
        made = _ones if count <= 10_000 else _ones.__wrapped__
        weights = made(count, dtype, places)
    checked = Batch(inputs, targets, weights, clusters, mask)
    _check_shapes(checked, count)
    _check_same_everywhere(checked)
    if none:
        return checked
    at_hand = checks.is_concrete(batch.weights)
    known = np.asarray(batch.weights).astype(dtype) if at_hand else None
    if values:
        checks.not_negative(known if at_hand else weights, "weights")
    if known is not None and np.all(known >= 0):
        return checked if np.all(known > 0) else blank(checked)
    # NaN reaches every sum over the batch
    return blank(checked._replace(weights=jnp.where(weights >= 0, weights, jnp.nan)))


@functools.lru_cache(maxsize=16)
def _ones(count: int, dtype: Any, places: Any) -> jax.Array:
    """Put on its place once, and not at each batch of a Python loop."""
    with jax.ensure_compile_time_eval():
        return trees.as_array(np.ones((count,), dtype))


def by_name(batch: Any) -> Batch:
    """What is given as a batch, its parts by their names and as they are.

    Raises:
      ValueError: for what is neither a `Batch` nor a pair or triple, and for a triple
        whose third entry holds integers, which may be a loader's task ids.
    """
    named = batch if isinstance(batch, Batch) else _named(batch)
    check_inputs(named.inputs)
    check_numbers(named.targets, "targets", keep=is_shared)
    check_numbers(named.clusters, "clusters", keep=is_shared)
    return named


def check_inputs(inputs: Any) -> None:
    """Raises for inputs that no arrays of numbers can be made of."""
    check_numbers(inputs, "inputs", keep=is_shared)


def _named(batch: Any) -> Batch:
    if not isinstance(batch, (tuple, list)) or len(batch) not in (2, 3):
        raise ValueError(
            "a batch is (inputs, targets) or (inputs, targets, weights), or an "
            f"ff.Batch of such parts; got {type(batch).__name__}"
            + (f" of length {len(batch)}." if hasattr(batch, "__len__") else ".")
            + _way_to_a_batch(batch)
        )
    named = Batch(*batch)
    weights = named.weights
    dtype = getattr(weights, "dtype", None) or np.asarray(weights).dtype
    if weights is not None and jnp.issubdtype(dtype, jnp.integer):
        raise ValueError(
            f"the third entry of a batch is its weights, and this one holds {dtype}, "
            "as a loader's task ids do. If they are multiplicities, say so by name, "
            "ff.Batch(inputs, targets, weights), or give them as floating point."
        )
    return named


def _way_to_a_batch(given: Any) -> str:
    if isinstance(given, Mapping):
        parts = ", ".join(f"batch[{key!r}]" for key in given)
        return (
            f" Take it apart, ({parts}); ff.accumulate, ff.run, ff.refine, "
            "ff.calibrate and ff.laplace do so with to_batch=, a function of what a "
            "loader gives."
        )
    if hasattr(given, "mean") and hasattr(given, "information"):
        return " A state stands before the batch, update(state, batch)."
    if is_table(given):
        columns = [str(name) for name in given.columns]
        return (
            f" A table is taken apart, (table[{columns[:-1]}], table[{columns[-1]!r}]) "
            "or as its columns are meant."
        )
    if isinstance(given, str):
        return " (To go through a table gives the names of its columns.)"
    if hasattr(given, "shape"):
        return f" It is {checks.described(given)}: parameters stand before the batch."
    return ""


def is_table(given: Any) -> bool:
    """Whether it is a DataFrame of pandas, or of a package like it."""
    return hasattr(given, "columns") and hasattr(given, "shape")


def _check_shapes(batch: Batch, count: int) -> None:
    leaves = [leaf.shape for leaf in jax.tree.leaves(batch.targets)]

    def fits(shape: tuple[int, ...]) -> bool:
        several = [one[: len(shape)] for one in leaves] or [(count, *shape[1:])]
        return shape == (count,) or (len(shape) > 1 and shape in several)

    for name, part in (("weights", batch.weights), ("mask", batch.mask)):
        if part is not None and not fits(part.shape):
            raise ValueError(
                f"{name} must have shape (n,) = ({count},), one an example, or the "
                f"shape of the targets, one a target; got {part.shape} for targets "
                f"{leaves}."
            )
    clusters = batch.clusters
    if clusters is None:
        return
    if clusters.shape != (count,) or not jnp.issubdtype(clusters.dtype, jnp.integer):
        raise ValueError(
            f"clusters must be integers of shape (n,) = ({count},), the number of each "
            f"example's cluster; got {clusters.dtype} {clusters.shape}. Of any names: "
            "numpy.unique(names, return_inverse=True)[1]."
        )


def _check_same_everywhere(batch: Batch) -> None:
    """Raises in all processes where what they share has other shapes in some.

    So it has if each made it of its own rows, and one had fewer. Programs of other
    shapes would end all processes without an exception.
    """
    leaves = jax.tree.leaves(batch)
    if jax.process_count() == 1 or checks.is_traced(leaves):
        return
    if all(leaf.is_fully_addressable for leaf in leaves):
        return
    processes.check_same(
        str([leaf.shape for leaf in leaves]),
        "a batch that processes share has the shapes of all their rows, and each must "
        "have given as many (ff.global_batches pads them)",
    )


def _num_examples(inputs: PyTree, targets: PyTree) -> int:
    leaves = split(inputs)[0] + jax.tree.leaves(targets)
    shapes = [leaf.shape for leaf in leaves]
    if not shapes:
        raise ValueError("a batch needs at least one array with an example axis.")
    if any(len(shape) == 0 for shape in shapes):
        raise ValueError(
            "every array of a batch has a leading example axis (wrap what all "
            f"examples share in ff.Shared); got shapes {shapes}. One row alone is "
            "(x[None], y[None]); one batch, where several are asked for, goes in a "
            "list, [batch]."
        )
    counts = {shape[0] for shape in shapes}
    if len(counts) != 1:
        raise ValueError(
            "inputs and targets must agree in their leading axis (wrap what all "
            f"examples share in ff.Shared); got shapes {shapes}. One row alone is "
            "(x[None], y[None])."
        )
    count = counts.pop()
    if count == 0:
        raise ValueError(f"a batch must not be empty (n = 0); got shapes {shapes}.")
    return count


def map_examples(function: Callable, batch: Batch) -> Batch:
    """Applies `function` to every array with an example axis."""
    parts, rebuild = unpack(batch)
    return rebuild(*jax.tree.map(function, parts))


def blank(batch: Batch) -> Batch:
    """What has weight zero, replaced by a row, or a target, of positive weight."""
    (*given, clusters, mask), rebuild = unpack(batch)
    # one program where the values are at hand, and not one an operation
    fill = _blanked if checks.is_traced(batch) else jax.jit(_blanked)
    return rebuild(*fill(given, mask), batch.weights, clusters, mask)


def _blanked(given: list, mask: jax.Array | None) -> list:
    *parts, weights = given
    return sharding.in_auto_mode(_fill, parts, parts, weights, mask)


def _fill(parts: list, weights: jax.Array, mask: jax.Array | None) -> list:
    each = weights > 0 if mask is None else mask
    used = _rows(weights > 0)
    each = each & used.reshape(used.shape + (1,) * (each.ndim - 1))
    # where nothing is observed inputs may still say how long the wait was
    inputs = jax.tree.map(
        lambda x: jax.lax.select(jnp.any(used) | ~jnp.isfinite(x), _filled(x, used), x),
        parts[0],
    )

    def possible(x: jax.Array) -> jax.Array:
        # filled once: an entry of an entry is slow, where XLA fuses it into a loss
        alone = each.ndim > 1 and x.shape[: each.ndim] == each.shape
        return _filled(x, each if alone else used)

    return [inputs, jax.tree.map(possible, parts[1])]


def _rows(each: jax.Array) -> jax.Array:
    """Whether a row has any, `(n,)`."""
    return jnp.any(each, axis=tuple(range(1, each.ndim))) if each.ndim > 1 else each


def _filled(x: jax.Array, used: jax.Array) -> jax.Array:
    """What is not used replaced by the first that is; `used` has the leading axes."""
    rest, used = x.shape[used.ndim :], used.reshape(-1)
    stack = x.reshape((used.size, *rest))  # rows may be empty
    # an index of no sign is not wrapped
    first = jax.lax.argmax(used, 0, jnp.uint32)
    one = jax.lax.dynamic_slice_in_dim(stack, first, 1)
    # one is a possible target of every likelihood, zero is not
    one = jax.lax.select(jnp.any(used), one, jnp.ones_like(one))
    keep = jax.lax.broadcast_in_dim(used, stack.shape, (0,))
    return jax.lax.select(keep, stack, jnp.broadcast_to(one, stack.shape)).reshape(
        x.shape
    )


def num_observations(batch: Batch, *, each_target: bool) -> jax.Array:
    """The sum of all weights; or of targets, where weights are those of examples."""
    weights, mask = batch.weights, batch.mask
    if weights.ndim > 1 or not each_target:
        return jnp.sum(weights)
    if mask is not None:
        num_targets = jnp.sum(mask, axis=tuple(range(1, mask.ndim)))
        return jnp.sum(weights * num_targets.astype(weights.dtype))
    targets = jax.tree.leaves(batch.targets)
    return jnp.sum(weights) * math.prod(targets[0].shape[1:])


def observed(batch: Batch) -> tuple[Batch, jax.Array | None]:
    """The batch with weights of its examples, and 1 or 0 for each target: is it there.

    Weights of targets are taken for that; None: all are.
    """
    weights, mask = batch.weights, batch.mask
    if weights.ndim == 1:
        there = None if mask is None else mask.astype(weights.dtype)
        return batch._replace(mask=None), there
    return batch._replace(weights=_rows(weights > 0).astype(weights.dtype)), weights


def roots_of_weights(batch: Batch) -> tuple[jax.Array, jax.Array | None]:
    """What an example's vectors are multiplied by, `(n,)`, and each target's, if any.

    Their squares are the weights.
    """
    weights, mask = jnp.sqrt(batch.weights), batch.mask
    if weights.ndim == 1:
        return weights, None if mask is None else mask.astype(weights.dtype)
    return _rows(weights > 0).astype(weights.dtype), weights


_ONE_ROW = (
    " Here a batch is one target, without an axis of examples: one row alone is "
    "(x[None], y[None])."
)


def weighted_total(
    batch: Batch, values: jax.Array, *, together: bool = False
) -> jax.Array:
    """Values of targets `(n, ...)`, weighted and summed.

    A row or target of weight zero stays out even if it is not finite. `together`: the
    targets of an example have one value, and none if none of them is there.
    """
    if together:
        batch, there = observed(batch)
        if there is not None:
            some = jnp.any(there > 0, tuple(range(1, there.ndim)))
            weights = jnp.where(some, batch.weights, jnp.zeros_like(batch.weights))
            batch = batch._replace(weights=weights)
    weights, mask = batch.weights.astype(values.dtype), batch.mask
    for part in (weights, mask):
        if part is not None and part.shape not in (values.shape, values.shape[:1]):
            raise ValueError(
                f"targets have log-probabilities of shape {values.shape}: give weights "
                f"of that shape, or one an example; got {part.shape}."
                + _ONE_ROW
                * (values.ndim == 0)
            )
    if mask is not None:
        values = jnp.where(mask, values, jnp.zeros_like(values))
    values = jnp.sum(values, axis=tuple(range(weights.ndim, values.ndim)))
    out = weights == 0
    return jnp.sum(jax.lax.select(out, jnp.zeros_like(values), weights * values))


def num_examples(batch: Batch) -> int:
    """The static number of rows, padding included."""
    return batch.weights.shape[0]


def is_finite(batch: Batch) -> jax.Array:
    """Whether all floating values are finite and no weight is negative, `()` bool."""
    weights = jnp.where(batch.weights >= 0, batch.weights, jnp.nan)
    return trees.all_finite((split(batch.inputs)[0], batch.targets, weights))


def zero_if_missing(batch: Batch, tree: PyTree) -> PyTree:
    """`tree`, or zeros for a batch whose weights are all zero.

    Rows of weight zero are blanked, but no blanked row is finite for every model.
    """
    missing = jnp.all(batch.weights == 0)
    return jax.tree.map(lambda x: jnp.where(missing, jnp.zeros_like(x), x), tree)
