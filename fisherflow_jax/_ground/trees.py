"""Pytrees shaped like the parameters, seen as vectors."""

import difflib
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fisherflow_jax._ground import checks, placement, sharding
from fisherflow_jax._ground.keys import typed_key

PyTree = Any

# Entries of a leaf from which it is read alone: to lay it beside others copies it.
_LARGE = 2**16


def wide_dtype(*dtypes: Any) -> np.dtype:
    """The common type of `dtypes`; a floating type is never narrower than float32."""
    # np.result_type, because jnp's raises under strict promotion; half-precision
    # types widen to float32 first, so that bfloat16 and float16 meet in float32.
    narrow = (jnp.dtype("bfloat16"), jnp.dtype("float16"))
    wide = [jnp.float32 if d in narrow else d for d in dtypes]
    return np.result_type(*wide) if wide else np.dtype("float32")


def float_dtype(tree: PyTree) -> np.dtype:
    """The type in which information about `tree` is kept."""
    # optax.tree.map_params calls init on a tree without leaves: then float32
    return wide_dtype(*(leaf.dtype for leaf in jax.tree.leaves(tree)))


def widen(tree: PyTree) -> PyTree:
    """`tree` with every leaf in the one type of `float_dtype`."""
    dtype = float_dtype(tree)
    return jax.tree.map(lambda leaf: leaf.astype(dtype), tree)


def as_array(value: Any, dtype: Any = None) -> jax.Array:
    """`jnp.asarray`, which would compile a program for each shape of numpy's arrays."""
    if dtype is None and isinstance(value, jax.Array):
        return value
    if type(value) is np.ndarray or isinstance(value, np.generic):
        # a copy, because what is put on a CPU may share the memory that it came in
        return jax.device_put(np.array(value, dtype))
    return jnp.asarray(value, dtype)


def real_arrays(tree: PyTree, name: str) -> PyTree:
    """`tree` with arrays as leaves.

    Raises:
      ValueError: for a leaf that is not real floating point, naming it and `name`.
    """
    for leaf_name, leaf in named_leaves(tree):
        check_real(leaf_name, leaf, name, tree)
    return jax.tree.map(as_array, tree)


def check_real(leaf_name: str, leaf: Any, name: str, tree: PyTree = None) -> None:
    """Raises unless a leaf of `tree`, called `name`, is real floating point.

    Numbers are; the error says what to do about anything else.
    """
    kind = getattr(leaf, "dtype", None)
    if kind is None and isinstance(leaf, (bool, int, float, complex, list)):
        kind = np.asarray(leaf).dtype
    if kind is not None and jnp.issubdtype(kind, jnp.floating):
        return
    of_nnx = any(base.__module__.startswith("flax.nnx") for base in type(tree).__mro__)
    if of_nnx:
        way = (
            "split the module: graphdef, params, rest = nnx.split(net, nnx.Param, ...),"
            " and nnx.merge(graphdef, params, rest) within apply_fn"
        )
    elif callable(leaf) or isinstance(leaf, bool):
        way = (
            "split off what is no array, as functions and flags of a module are: "
            "params, static = eqx.partition(model, eqx.is_inexact_array), and "
            "eqx.combine(params, static) within apply_fn"
        )
    elif kind is not None and jnp.issubdtype(kind, jnp.complexfloating):
        way = "give its real and its imaginary part as two leaves"
    elif kind is not None and jnp.issubdtype(kind, jnp.integer):
        way = (
            "whole numbers have no derivative; give them as floating point, or what is "
            "frozen (quantised, counted) as a part of the inputs, in ff.Shared"
        )
    else:
        way = "leave it out: what is no parameter is a part of the inputs, in ff.Shared"
    what = f"is {checks.described(leaf)}" if kind is None else f"has dtype {kind}"
    raise ValueError(
        f"{name} must be real floating-point arrays; {leaf_name} {what}: {way}."
    )


def parameter_name(path: Any) -> str:
    """A leaf's name by its path, `layers.0.weight`; `theta` for a tree of one array.

    The same whether or not flax's nnx has wrapped the leaf: `nnx.Optimizer` shows
    `init` a state of variables, and `update` their values.
    """
    is_variable = path and path[-1] == jax.tree_util.GetAttrKey("value")
    path = path[:-1] if is_variable else path
    return jax.tree_util.keystr(path, simple=True, separator=".") or "theta"


def named_leaves(tree: PyTree) -> list[tuple[str, Any]]:
    """The leaves with their names, in the order of `jax.tree.leaves`.

    Raises:
      ValueError: for two leaves of one name, such as of `{"a.b": x, "a": {"b": y}}`.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    named = [(parameter_name(path), leaf) for path, leaf in leaves]
    names = [name for name, _ in named]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"two parameters have the name {twice!r}: rename one.")
    return named


def entry_names(tree: PyTree, batch_dims: int = 0) -> list[str]:
    """A name for each entry, `layers.0.weight[1,2]`, in ravelled order."""
    labels = []
    for name, leaf in named_leaves(tree):
        shape = np.shape(leaf)[batch_dims:]
        for index in np.ndindex(shape):
            labels.append(f"{name}[{','.join(map(str, index))}]" if shape else name)
    return labels


def chosen(params: PyTree, chosen: Any) -> PyTree:
    """Which parameters are chosen: a tree like `params` of booleans, some of them true.

    Args:
      params: all parameters.
      chosen: a predicate of a parameter's name (`layers.0.weight`); or a list of names,
        where a name also chooses all that lies under it; or booleans like `params`, or
        a prefix of them.

    Raises:
      ValueError: if nothing is chosen, for a name that no parameter has, or for
        booleans that do not fit; the parameters' names are listed.
    """
    names = [name for name, _ in named_leaves(params)]

    def refuse(what: str) -> ValueError:
        shown = names if len(names) <= 10 else _nearest(names, chosen)
        which = "are" if shown is names else f"are {len(names)}, among them"
        return ValueError(
            f"{what}; the parameters' names {which} {shown}. A predicate chooses by a "
            'part of the name: lambda name: "lora" in name.'
        )

    if isinstance(chosen, str):
        chosen = [chosen]
    if callable(chosen):
        kept = [bool(chosen(name)) for name in names]
    elif isinstance(chosen, (list, tuple, set, frozenset)) and all(
        isinstance(name, str) for name in chosen
    ):
        for wanted in chosen:
            if not any(_lies_under(name, wanted) for name in names):
                raise refuse(f"chosen: no parameter has the name {wanted!r}")
        kept = [any(_lies_under(name, wanted) for wanted in chosen) for name in names]
    else:
        try:
            kept = jax.tree.leaves(jax.tree.broadcast(chosen, params))
        except ValueError as error:
            raise refuse(
                "chosen must be a predicate of a parameter's name, a list of names, or "
                f"booleans like the parameters or a prefix of them ({error})"
            ) from error
        for keep in kept:
            if np.shape(keep) or np.asarray(keep).dtype != bool:
                raise refuse(f"chosen must hold booleans; got {keep!r}")
    if not any(kept):
        raise refuse("no parameter is chosen")
    return jax.tree.unflatten(jax.tree.structure(params), map(bool, kept))


def _nearest(names: list[str], chosen: Any) -> list[str]:
    """Ten names: those that hold or resemble what was asked for, then the first."""
    listed = isinstance(chosen, (list, tuple, set, frozenset))
    wanted = [x for x in (chosen if listed else ()) if isinstance(x, str)]
    near = [name for name in names if any(x in name for x in wanted)]
    for one in wanted:
        near += difflib.get_close_matches(one, names, 10, 0.4)
    return list(dict.fromkeys([*near, *names]))[:10]


def _lies_under(name: str, wanted: str) -> bool:
    return name == wanted or name.startswith(f"{wanted}.")


def where(condition: jax.Array, yes: PyTree, no: PyTree) -> PyTree:
    """One tree or another of its types, by a `()` bool: one equation a leaf, or none
    where the condition is at hand."""
    if not isinstance(condition, jax.core.Tracer):
        return yes if condition else no
    return jax.tree.map(lambda x, y: jax.lax.select(condition, x, y), yes, no)


def zero_unless(condition: jax.Array, tree: PyTree) -> PyTree:
    """The tree, or zeros of its types, by a `()` bool: one equation a leaf."""
    zeros: dict[Any, jax.Array] = {}

    def leaf(x: jax.Array) -> jax.Array:
        kind = jax.typeof(x)
        if kind not in zeros:
            zeros[kind] = jnp.zeros_like(x)
        return jax.lax.select(condition, x, zeros[kind])

    return jax.tree.map(leaf, tree)


def zipped(kind: Any, *trees: PyTree) -> PyTree:
    """One tree of `kind(*leaves)`; None where all leaves are.

    The inverse of `unzipped`. What is kept between steps is unzipped: under `nnx.jit`
    flax keeps arrays and None in the place of a parameter, and no node of ours.
    """

    def leaf(*parts: Any) -> Any:
        return None if all(part is None for part in parts) else kind(*parts)

    return jax.tree.map(leaf, *trees, is_leaf=lambda x: x is None)


def unzipped(kind: Any, tree: PyTree) -> list[PyTree]:
    """A tree for each field of `kind`, None beside leaves that are none of it."""

    def is_kind(node: Any) -> bool:
        return isinstance(node, kind)

    def field(index: int) -> PyTree:
        return jax.tree.map(
            lambda x: x[index] if is_kind(x) else None, tree, is_leaf=is_kind
        )

    return [field(index) for index in range(len(kind._fields))]


def concatenated(arrays: Sequence[jax.Array], axis: int) -> jax.Array:
    """Any number of arrays in one equation; of several types, in the common one."""
    if len({x.dtype for x in arrays}) > 1:
        dtype = wide_dtype(*(x.dtype for x in arrays))
        arrays = [x.astype(dtype) for x in arrays]
    return jax.lax.concatenate(arrays, axis) if len(arrays) > 1 else arrays[0]


def beside(arrays: Sequence[jax.Array], axis: int) -> jax.Array:
    """Arrays, alike but for their sizes along an axis, one after the other along it.

    As flat rows: what a model hands on to its next layer is then not computed anew in
    the shape of what is kept of it, which in a residual network is as many sums as
    there are layers before.
    """
    lead, tail = arrays[0].shape[:axis], arrays[0].shape[axis + 1 :]
    flat = [x.reshape((*lead, x.size // max(math.prod(lead), 1))) for x in arrays]
    found = concatenated(flat, axis)
    size = sum(x.shape[axis] for x in arrays)
    return found.reshape((*lead, size, *tail))


def cut(stack: jax.Array, sound: jax.Array | None = None) -> list[jax.Array]:
    """The rows `stack[0], stack[1], ...`; with a `()` bool, others unless it holds.

    On CPU XLA compiles equal kernels once, and a row at a place that it knows has one
    of its own. With a bool of the program it knows no place.
    """
    count, shape = stack.shape[0], stack.shape[1:]
    apart = sharding.has_explicit_axes() or placement.in_force()
    if sound is None or count == 1 or apart:
        parts = jax.lax.split(stack, (1,) * count, axis=0)
        return [part.reshape(shape) for part in parts]
    row = functools.partial(jax.lax.dynamic_slice, allow_negative_indices=False)
    rest = (np.int32(0),) * len(shape)
    return [
        row(stack, (place, *rest), (1, *shape)).reshape(shape)
        for place in _places(count, sound)
    ]


def _places(count: int, sound: jax.Array) -> Sequence[Any]:
    known = tuple(jnp.int32(place) for place in range(count))

    def hidden(sound: jax.Array) -> Sequence[Any]:
        return jax.lax.cond(sound, lambda: known, lambda: known[1:] + known[:1])

    return jax.lax.platform_dependent(sound, cpu=hidden, default=lambda _: known)


def all_finite(tree: PyTree) -> jax.Array:
    """Whether every entry of every leaf is finite, `()` bool."""
    alike: dict[Any, list[jax.Array]] = {}
    apart = sharding.has_explicit_axes() or placement.in_force()
    for index, leaf in enumerate(jax.tree.leaves(tree)):
        if jnp.issubdtype(leaf.dtype, jnp.inexact):
            # along an axis that all have, unless devices may hold parts of it
            alone = apart or not leaf.ndim or leaf.size > _LARGE
            kind = index if alone else (leaf.shape[1:], leaf.dtype)
            alike.setdefault(kind, []).append(leaf)
    finite = [jnp.all(jnp.isfinite(concatenated(x, 0))) for x in alike.values()]
    # A reduction of many booleans would be fused anew into every select that reads it:
    # leaves times leaves. XLA fuses no sort, and false comes first.
    if len(finite) > 8:
        return jax.lax.sort(jnp.stack(finite))[0]
    return functools.reduce(jnp.logical_and, finite or [jnp.array(True)])


def same_structure(left: PyTree, right: PyTree) -> bool:
    """Whether two trees have the same nodes, whatever their leaves."""
    structures: list[Any] = [jax.tree.structure(left), jax.tree.structure(right)]
    return structures[0] == structures[1]


def check_shapes(tree: PyTree, like: PyTree, rule: str) -> None:
    """Raises, with the rule, unless two trees have the same nodes and shapes."""
    shapes = [jax.tree.map(jnp.shape, each) for each in (tree, like)]
    if not same_structure(tree, like) or shapes[0] != shapes[1]:
        raise ValueError(f"{rule}: got shapes {shapes[0]}, not {shapes[1]}.")


def laid_over(tree: PyTree, like: PyTree) -> PyTree:
    """`like`, and over it the leaves of `tree`: by name, at the beginning of each axis.

    Raises:
      ValueError: for a leaf that `like` lacks, or has with fewer axes or entries.
    """
    over, under = dict(named_leaves(tree)), named_leaves(like)
    if gone := over.keys() - dict(under).keys():
        raise ValueError(
            f"params lack {', '.join(sorted(gone))}, of which something is known: "
            f"parameters may be added and grow; got {[name for name, _ in under]}."
        )

    def leaf(name: str, below: Any) -> jax.Array:
        below, above = jnp.asarray(below), over.get(name)
        if above is None:
            return below
        sizes = above.shape, below.shape
        if above.ndim != below.ndim or any(n > m for n, m in zip(*sizes, strict=True)):
            raise ValueError(
                f"parameter {name} has shape {below.shape}, and something is known of "
                f"its former shape {above.shape}: axes may grow at their ends."
            )
        alike = below.dtype == above.dtype
        dtype = below.dtype if alike else wide_dtype(below.dtype, above.dtype)
        both = below.astype(dtype), above.astype(dtype)
        return jax.lax.dynamic_update_slice(*both, (0,) * above.ndim)

    leaves = [leaf(name, below) for name, below in under]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def is_leaf(tree: PyTree) -> bool:
    """Whether a tree is a single leaf: a number or an array."""
    return same_structure(tree, 0)


def size(tree: PyTree) -> int:
    """The number of entries of all leaves together."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def ravel(tree: PyTree, batch_dims: int = 0) -> jax.Array:
    """Leaves `(*batch, *leaf.shape)` as one array `(*batch, d)`."""
    leaves, dtype = jax.tree.leaves(tree), float_dtype(tree)
    if not leaves:
        return jnp.zeros((0,), dtype)
    # the sizes by name: of an empty leaf -1 could be any
    shapes = [(*x.shape[:batch_dims], math.prod(x.shape[batch_dims:])) for x in leaves]
    flat = [x.reshape(s).astype(dtype) for x, s in zip(leaves, shapes, strict=True)]
    return jnp.concatenate(flat, axis=-1)


def unravel(flat: jax.Array, like: PyTree) -> PyTree:
    """`(*batch, d)` as a tree with leaves `(*batch, *leaf.shape)`."""
    leaves, treedef = jax.tree.flatten(like)
    ends = np.cumsum([math.prod(leaf.shape) for leaf in leaves])
    parts = [
        flat[..., end - math.prod(leaf.shape) : end].reshape(
            flat.shape[:-1] + leaf.shape
        )
        for leaf, end in zip(leaves, ends, strict=True)
    ]
    return jax.tree.unflatten(treedef, parts)


def dot(left: PyTree, right: PyTree) -> jax.Array:
    """The inner product of two vectors."""
    dtype = float_dtype(left)
    products = jax.tree.map(
        lambda x, y: jnp.sum(x.astype(dtype) * y.astype(dtype)), left, right
    )
    return functools.reduce(
        jnp.add, jax.tree.leaves(products) or [jnp.zeros((), dtype)]
    )


def standard_normal(key: jax.Array, like: PyTree) -> PyTree:
    """A draw of N(0, 1) in every entry, in the type of `float_dtype`."""
    draw = jax.random.normal(typed_key(key), (size(like),), float_dtype(like))
    return unravel(draw, like)


def broadcast_prefix(prefix: PyTree, like: PyTree, name: str) -> PyTree:
    """A pytree prefix of numbers (or arrays of the leaf's shape), leaf by leaf.

    Raises:
      ValueError: if the prefix does not fit, naming the argument `name`.
    """
    dtype = float_dtype(like)

    def fill(value: Any, leaf: Any) -> jax.Array:
        array = jnp.asarray(value, dtype)
        if array.shape not in ((), leaf.shape):
            raise ValueError(
                f"{name} must hold numbers or arrays of the parameter's shape: "
                f"got shape {array.shape} for a parameter of shape {leaf.shape}."
            )
        return jnp.broadcast_to(array, leaf.shape)

    try:
        filled = jax.tree.broadcast(prefix, like)
    except ValueError as error:
        raise ValueError(
            f"{name} must be a pytree prefix of the parameters, and a list is read as "
            f"a tree of its entries (of a vector: numpy.asarray): {error}"
        ) from error
    return jax.tree.map(fill, filled, like)


def is_hole(node: Any) -> bool:
    return isinstance(node, optax.MaskedNode)


# of a tree with holes, as `optax.masked` and `optax.partition` show them, and another
_beside = functools.partial(jax.tree.map, is_leaf=is_hole)


def has_holes(tree: PyTree) -> bool:
    return any(map(is_hole, jax.tree.leaves(tree, is_leaf=is_hole)))


def punch(whole: PyTree, holed: PyTree) -> PyTree:
    """`whole` without what lies at the holes of `holed`."""
    return _beside(lambda node, part: node if is_hole(node) else part, holed, whole)


def fill_with_zeros(holed: PyTree, whole: PyTree) -> PyTree:
    """`holed` with zeros like `whole` at its holes; without any, as it is."""
    if not has_holes(holed):
        return holed
    zeros = optax.tree.zeros_like
    return _beside(lambda node, x: zeros(x) if is_hole(node) else node, holed, whole)


def shown_leaves(whole: PyTree, holed: PyTree) -> list[bool]:
    """Whether `holed` shows it, for each leaf of `whole`."""
    marked = jax.tree.broadcast(holed, whole, is_leaf=is_hole)
    return [not is_hole(node) for node in jax.tree.leaves(marked, is_leaf=is_hole)]


def arrays_of(tree: PyTree) -> tuple[list, Callable[[Sequence], PyTree]]:
    """A tree's arrays or shapes, and the tree around others of them.

    What is no array (a flag) stays as it is.
    """
    leaves, treedef = jax.tree.flatten(tree)
    places = [i for i, leaf in enumerate(leaves) if is_array(leaf)]

    def rebuild(arrays: Sequence) -> PyTree:
        filled = dict(enumerate(leaves)) | dict(zip(places, arrays, strict=True))
        return jax.tree.unflatten(treedef, [filled[i] for i in range(len(leaves))])

    return [leaves[i] for i in places], rebuild


def is_array(leaf: Any) -> bool:
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


def shape_of(leaf: Any) -> Any:
    """Of an array; what is none stays as it is."""
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if is_array(leaf) else leaf
