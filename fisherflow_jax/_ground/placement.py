"""Where arrays with a shape of their own lie on a mesh, and work divided over it.

A rule says of a shape where it lies. While it is in force, what treats the matrices of
stacks one by one gives each device its share of them.
"""

import contextlib
import contextvars
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fisherflow_jax._ground import choices, warning

PyTree = Any
_LARGE = 2**20  # bytes
Rule = Callable[[tuple[int, ...], Any], Any]  # (shape, mesh) -> where, or None


@dataclasses.dataclass(frozen=True)
class _Over:
    """Over these axes of the mesh: along the first axis that all of them divide.

    If there is none, each of them along the first one left that it divides.
    """

    names: tuple[str, ...]

    def __call__(self, shape: tuple[int, ...], mesh: Any) -> PartitionSpec:
        unknown = [name for name in self.names if name not in mesh.shape]
        if unknown:
            raise ValueError(
                f"factor_sharding names axes of the mesh, {tuple(mesh.axis_names)}; "
                f"got {', '.join(map(repr, unknown))}."
            )
        parts: list[Any] = [None] * len(shape)
        for names in (self.names, *((name,) for name in self.names)):
            number = math.prod(mesh.shape[name] for name in names)
            free = (k for k, size in enumerate(shape) if size and not size % number)
            found = next((k for k in free if parts[k] is None), None)
            if found is not None:
                parts[found] = names
                if names == self.names:
                    break
        return PartitionSpec(*parts)


@dataclasses.dataclass(frozen=True)
class _Given:
    """A function of the shape alone, as users write them."""

    function: Callable[[tuple[int, ...]], Any]

    def __call__(self, shape: tuple[int, ...], mesh: Any) -> Any:
        found = self.function(shape)
        if found is None or isinstance(found, (NamedSharding, PartitionSpec)):
            return found
        raise ValueError(
            "factor_sharding returns a jax.sharding.PartitionSpec, a NamedSharding or "
            f"None for a shape; for {shape} it returned {found!r}."
        )


def rule_of(given: Any) -> Rule | None:
    """What is given as `factor_sharding`, checked.

    Raises:
      ValueError: for what is neither names of axes nor a function of a shape.
    """
    if given is None or isinstance(given, (_Over, _Given)):
        return given
    names = (given,) if isinstance(given, str) else given
    if isinstance(names, tuple) and names and all(isinstance(x, str) for x in names):
        return _Over(names)
    if callable(given) and not isinstance(given, Mesh):  # a mesh decorates functions
        return _Given(choices.hashable(given))
    raise ValueError(
        'factor_sharding is the name of a mesh axis, such as "data", a tuple of names, '
        "or a function of a shape that returns a jax.sharding.PartitionSpec (or None: "
        f"as the compiler likes); got {given!r}."
    )


@dataclasses.dataclass(frozen=True)
class _Held:
    """A rule, and the mesh that it is for."""

    rule: Rule
    mesh: Any

    def sharding(self, shape: tuple[int, ...]) -> NamedSharding | None:
        found = self.rule(shape, self.mesh)
        if found is None or isinstance(found, NamedSharding):
            return found
        return NamedSharding(self.mesh, found)

    def axes(self, shape: tuple[int, ...]) -> tuple[str, ...]:
        """The axes of the mesh among which the work on an array is divided."""
        if isinstance(self.rule, _Over):
            return self.rule.names
        sharding = self.sharding(shape)
        parts = () if sharding is None else sharding.spec
        names = ((part,) if isinstance(part, str) else part or () for part in parts)
        return tuple(itertools.chain(*names))

    def is_whole(self, shape: tuple[int, ...]) -> bool:
        """Whether named axes were asked to divide it, and none did."""
        sharding = self.sharding(shape) if isinstance(self.rule, _Over) else None
        return sharding is not None and not any(sharding.spec)

    def place(self, x: jax.Array) -> jax.Array:
        sharding = self.sharding(x.shape)
        if sharding is None:
            return x
        if (
            sharding.mesh.explicit_axes
            and jax.sharding.get_abstract_mesh().explicit_axes
        ):
            return jax.sharding.reshard(x, sharding)
        return jax.lax.with_sharding_constraint(x, sharding)


_held: contextvars.ContextVar[_Held | None] = contextvars.ContextVar(
    "placement", default=None
)


@contextlib.contextmanager
def holding(rule: Rule | None, like: PyTree) -> Iterator[None]:
    """Within it the rule is in force, on the mesh that is set or that of `like`.

    Raises:
      ValueError: where there is no mesh.
    """
    leaves = jax.tree.leaves(like)
    held = _Held(rule, _mesh(leaves)) if rule is not None and leaves else None
    with _set(held):
        yield


@contextlib.contextmanager
def _set(held: _Held | None) -> Iterator[None]:
    token = _held.set(held)
    try:
        yield
    finally:
        _held.reset(token)


def _mesh(leaves: list) -> Any:
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty:
        return mesh
    for leaf in leaves:
        if isinstance(leaf, jax.core.Tracer):
            mesh = jax.typeof(leaf).sharding.mesh
        else:
            mesh = getattr(getattr(leaf, "sharding", None), "mesh", mesh)
        if not mesh.empty:
            return mesh
    raise ValueError(
        "factor_sharding places arrays on a mesh, and neither is one set nor do the "
        "parameters lie on one: call it within jax.set_mesh(mesh), or put the "
        "parameters on the mesh with jax.device_put(params, shardings)."
    )


def placed(tree: PyTree) -> PyTree:
    """The arrays where the rule in force says, if there is one."""
    held = _held.get()
    return tree if held is None else jax.tree.map(held.place, tree)


def made(function: Callable[[PyTree], PyTree], like: PyTree) -> PyTree:
    """`function(like)`, each array being made where the rule says, never whole.

    With a rule the function sees shapes alone. Warns of what is large and on no axis.
    """
    held = _held.get()
    if held is None:
        return function(like)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), like)

    def start() -> PyTree:
        with _set(None):  # nothing is worked out yet
            found = function(shapes)
        return placed(found)

    arrays = jax.tree.leaves(jax.eval_shape(start))
    large = {x.shape for x in arrays if x.size * x.dtype.itemsize >= _LARGE}
    whole = [shape for shape in sorted(large) if held.is_whole(shape)]
    if whole:
        shapes_told = ", ".join(map(str, whole))
        warning.warn_once(
            like,
            f"factor_sharding: arrays of shape {shapes_told} are whole on each device, "
            "since no axis of theirs is a multiple of the devices. Name axes of a mesh "
            "that divide one, or take a wider or narrower layer.",
        )
    return jax.jit(start)()


def in_force() -> bool:
    """Whether arrays are placed by a rule."""
    return _held.get() is not None


def divided(function: Callable, calls: list[tuple]) -> list:
    """`[function(*call) for call in calls]`, each device doing its share of the work.

    `function` takes and returns pytrees of stacks `(K, ...)`, and treats the entries of
    their first axis one by one. Calls of equal shapes are one stack. It is cut among
    the devices over which the rule spreads its largest array; what is filled up is
    filled with the last entry. No array is whole on a device at any time: matrices come
    and go by rows, from and to those devices.
    """
    held = _held.get()
    if held is None:
        return [function(*call) for call in calls]
    groups: dict[Any, list[int]] = {}
    for index, call in enumerate(calls):
        leaves, treedef = jax.tree.flatten(call)
        kinds = tuple((x.shape[1:], x.dtype) for x in leaves)
        groups.setdefault((treedef, kinds), []).append(index)
    results: list = [None] * len(calls)
    for members in groups.values():
        found = _shared_out(held, function, [calls[k] for k in members])
        for index, result in zip(members, found, strict=True):
            results[index] = result
    return results


def _shared_out(held: _Held, function: Callable, calls: list[tuple]) -> list:
    """`divided` for calls of equal shapes."""
    counts = [jax.tree.leaves(call)[0].shape[0] for call in calls]
    total, first = sum(counts), calls[0]
    widest = max(jax.tree.leaves(first), key=lambda x: x.size)
    axes = held.axes((total, *widest.shape[1:]))
    if total < 2 or widest.ndim < 3 or not axes:
        return [function(*call) for call in calls]
    number = math.prod(held.mesh.shape[name] for name in axes)
    filled = [jax.tree.map(functools.partial(_filled, number), call) for call in calls]
    shapes = jax.eval_shape(function, *first)

    def share(calls: list[tuple]) -> list:
        def mine(like: jax.Array, *parts: jax.Array) -> jax.Array:
            stack = jnp.concatenate(parts)
            last = jnp.broadcast_to(stack[-1:], (-total % number, *stack.shape[1:]))
            stack = jnp.concatenate([stack, last])
            if stack.ndim > 2:
                stack = jax.lax.all_to_all(stack, axes, 0, 1, tiled=True)
                return stack[:, : like.shape[1]]
            length = stack.shape[0] // number
            start = jax.lax.axis_index(axes) * length
            return jax.lax.dynamic_slice_in_dim(stack, start, length)

        def everyones(x: jax.Array) -> list[jax.Array]:
            if x.ndim > 2:
                x = jax.lax.all_to_all(_filled(number, x), axes, 1, 0, tiled=True)
            else:
                x = jax.lax.all_gather(x, axes, tiled=True)
            ends = list(itertools.accumulate(counts))
            return jnp.split(x[:total], ends[:-1])

        with _set(None):  # of a device's own share nothing is shared out
            found = function(*jax.tree.map(mine, first, *calls))
        leaves, treedef = jax.tree.flatten(found)
        columns = zip(*map(everyones, leaves), strict=True)
        return [jax.tree.unflatten(treedef, column) for column in columns]

    def spec(x: Any) -> PartitionSpec:
        return PartitionSpec(None, axes) if len(x.shape) > 2 else PartitionSpec()

    found = jax.shard_map(
        share,
        mesh=held.mesh,
        in_specs=(jax.tree.map(spec, filled),),
        out_specs=[jax.tree.map(spec, shapes)] * len(calls),
        check_vma=False,
    )(filled)

    def cut(like: Any, x: jax.Array) -> jax.Array:
        return x[:, : like.shape[1]] if x.ndim > 2 else x

    return [jax.tree.map(cut, shapes, part) for part in found]


def _filled(number: int, x: jax.Array) -> jax.Array:
    """The rows of matrices `(K, D, ...)` filled up to a multiple, with zeros."""
    extra = -x.shape[1] % number if x.ndim > 2 else 0
    if not extra:
        return x
    return jnp.pad(x, [(0, 0), (0, extra)] + [(0, 0)] * (x.ndim - 2))
