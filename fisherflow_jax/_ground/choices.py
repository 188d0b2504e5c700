"""Choices: equal calls of a factory are one object, and equal recipes one program."""

import copyreg
import dataclasses
import functools
import hashlib
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import jax
import numpy as np

from fisherflow_jax._ground.telling import told

Result = TypeVar("Result")
Parameters = ParamSpec("Parameters")


# The calls of the choices used last, by ids, which stay theirs: they are kept too.
_CALLS: dict[int, tuple[Any, Callable, tuple, dict]] = {}


def choice(factory: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Makes equal calls of a factory return the same object.

    Arrays, also within dicts, lists and tuples, are equal by shape, dtype and bytes. A
    tracer, or an argument without a hash, makes a fresh object. The 256 choices used
    last are kept, with what they close over: a factory that takes a model is no choice.
    A copy of a choice is itself, and a pickle of it the call.
    """
    signature = inspect.signature(factory)

    def made(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        return _named(factory(*args, **kwargs), factory, signature, args, kwargs)

    @functools.lru_cache(maxsize=256)
    def build(call: Compared) -> tuple[Result, list[type], tuple | None]:
        args, options = _copied(call.value)
        # a choice first made within a trace must not keep that trace's arrays
        with jax.ensure_compile_time_eval():
            result = made(*args, **options)
        given = any(result is value for value in (*args, *options.values()))
        if type(result).__module__ == "builtins" or given:
            return result, call.kinds, None
        copyreg.pickle(type(result), _called)
        return result, call.kinds, (result, chosen, args, options)

    @functools.wraps(factory)
    def chosen(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        bound = _bound(factory, signature, args, kwargs)
        bound.apply_defaults()
        call = Compared((bound.args, bound.kwargs))
        if not _has_hash(call):
            return made(*args, **kwargs)
        result, kinds, known = build(call)
        if kinds != call.kinds:  # 2 and 2.0 are equal: one of them may be refused
            factory(*args, **kwargs)
        if known:
            _used(known)
        return result

    return chosen


def _used(call: tuple) -> None:
    """Keeps a choice's call, as the last one used."""
    _CALLS.pop(id(call[0]), None)
    _CALLS[id(call[0])] = call
    if len(_CALLS) > 256:
        _CALLS.pop(next(iter(_CALLS)), None)


def _called(made: Any) -> Any:
    """How a choice is copied and pickled: closures have no names to find them by."""
    if id(made) not in _CALLS:
        return made.__reduce_ex__(2)
    _, factory, args, options = _CALLS[id(made)]
    return functools.partial(factory, **options), args


def _named(result: Any, factory: Callable, signature: Any, *given: Any) -> Any:
    """With the call that it prints as, where it has a place for it.

    The first argument by its value, others by name, and what is a default not at all.
    """
    if getattr(result, "call", None) != "":
        return result
    args, kwargs = given
    shown, first = [], next(iter(signature.parameters), None)
    for name, value in signature.bind(*args, **kwargs).arguments.items():
        words, parameter = told(value), signature.parameters[name]
        alone = name == first and parameter.kind is not parameter.KEYWORD_ONLY
        if parameter.default is parameter.empty or words != told(parameter.default):
            shown.append(words if alone else f"{name}={words}")
    call = f"{factory.__name__}({', '.join(shown)})"
    if dataclasses.is_dataclass(result):
        return dataclasses.replace(result, call=call)  # type: ignore[type-var]
    return result._replace(call=call)


def _bound(
    factory: Callable, signature: inspect.Signature, args: tuple, kwargs: dict
) -> inspect.BoundArguments:
    """The arguments of a call; of one that is missing the docstring's line is told."""
    try:
        return signature.bind(*args, **kwargs)
    except TypeError as error:
        given = signature.bind_partial(*args, **kwargs).arguments
        needed = [k for k, x in signature.parameters.items() if x.default is x.empty]
        missing = [name for name in needed if name not in given]
        lines = (factory.__doc__ or "").splitlines()
        told = [
            line.strip()
            for name in missing
            for line in lines
            if line.strip().startswith(f"{name}: ")
        ]
        said = "".join(f"; {line}" for line in told)
        raise TypeError(f"{factory.__name__}: {error}{said}") from error


class Compared:
    """A value, equal to another as arguments of choices are."""

    def __init__(self, value: Any) -> None:
        self.value = value

    @functools.cached_property
    def key(self) -> Any:
        return comparable(self.value)

    @functools.cached_property
    def kinds(self) -> list[type]:
        return [type(leaf) for leaf in jax.tree.leaves(self.value)]

    def __repr__(self) -> str:
        return told(self.value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Compared) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)


def comparable(value: Any) -> Any:
    """What stands for a value where values are compared: it has a hash.

    Raises:
      TypeError: for a tracer, and for what has no hash.
    """
    if isinstance(value, jax.core.Tracer):
        raise TypeError("a traced value is equal to no other")
    if isinstance(value, (np.ndarray, jax.Array)):
        kind: tuple = (np.shape(value), value.dtype)
        if isinstance(value, jax.Array):
            if not value.is_fully_addressable:
                raise TypeError("an array of other processes cannot be compared")
            kind = (*kind, value.sharding, value.weak_type)
        content = np.asarray(value)  # a TypeError for typed keys
        return kind, hashlib.sha256(content.tobytes()).digest()
    if isinstance(value, dict):
        return dict, frozenset((k, comparable(v)) for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return type(value), tuple(map(comparable, value))
    if isinstance(value, functools.partial):
        parts = value.func, value.args, value.keywords
        return functools.partial, comparable(parts)
    hash(value)
    return type(value) if isinstance(value, bool) else None, value


def _copied(tree: Any) -> Any:
    """The tree with arrays of its own, so that a choice stays what it was made as."""
    leaves, treedef = jax.tree.flatten(tree, is_leaf=_is_fixed)
    own = [x.copy() if isinstance(x, np.ndarray) else x for x in leaves]
    return jax.tree.unflatten(treedef, own)


def _is_fixed(node: Any) -> bool:
    """None, and named tuples without arrays, such as likelihoods: the same objects."""
    if not hasattr(node, "_fields"):
        return node is None
    return not any(isinstance(x, np.ndarray) for x in jax.tree.leaves(node))


class _ByIdentity:
    """A function without a hash, equal to itself alone."""

    def __init__(self, value: Callable) -> None:
        self.value = value

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.value(*args, **kwargs)

    def __repr__(self) -> str:
        return repr(self.value)

    def __eq__(self, other: object) -> bool:
        return self.value is getattr(other, "value", other)

    def __hash__(self) -> int:
        return id(self.value)


def hashable(function: Callable) -> Callable:
    """A function as a part of a recipe: itself, or compared by identity."""
    return function if _has_hash(function) else _ByIdentity(function)


@functools.lru_cache(maxsize=32)
def _first(recipe: Result) -> Result:
    return recipe


def shared(recipe: Result) -> Result:
    """The recipe, a frozen dataclass, or an equal one of the 32 used last.

    Each owns what is compiled of it: it goes when the recipe does.
    """
    alone = _holds_tracer(recipe, set()) or not _has_hash(recipe)
    return recipe if alone else _first(recipe)


def compiled(recipe: Any, function: Callable, **options: Any) -> Callable:
    """`function(recipe, ...)` without its first argument, compiled once a recipe.

    A recipe that holds a traced number, if only in what its functions close over, is
    shared with no other, and inlined in the trace that the number belongs to. `options`
    are those of `jax.jit`.
    """
    own = vars(recipe).setdefault("_compiled", {})
    if function not in own:
        call, traced = functools.partial(function, recipe), _holds_tracer(recipe, set())
        own[function] = jax.jit(call, inline=traced, **options)
    return own[function]


def run(recipe: Any, function: Callable, *arguments: Any) -> Any:
    """`function(recipe, *arguments)`, as one program where it would run eagerly.

    That is compiled once a recipe. Traced, with arguments that are no arrays or lie on
    several devices, or with a recipe without a hash (it holds an array, which may be
    another one at each call), it runs as it is.
    """
    leaves = jax.tree.leaves(arguments)
    if _has_hash(recipe) and all(map(_is_at_hand, leaves)):
        return compiled(recipe, function)(*arguments)
    return function(recipe, *arguments)


def _has_hash(value: Any) -> bool:
    try:
        return hash(value) is not None
    except TypeError:
        return False


def _is_at_hand(leaf: Any) -> bool:
    if isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer):
        return len(leaf.sharding.device_set) == 1
    return isinstance(leaf, np.ndarray)


def _holds_tracer(value: Any, seen: set[int]) -> bool:
    """Whether a tracer is in a value, its fields, or what its functions close over."""
    if isinstance(value, jax.core.Tracer):
        return True
    if id(value) in seen:
        return False
    seen.add(id(value))
    parts: Any = ()
    if isinstance(value, dict):
        parts = value.values()
    elif isinstance(value, (list, tuple, set, frozenset)):
        parts = value
    elif isinstance(value, functools.partial):
        parts = value.func, value.args, value.keywords
    elif isinstance(value, (Compared, _ByIdentity)):
        parts = (value.value,)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = [getattr(value, field.name) for field in dataclasses.fields(value)]
    elif inspect.ismethod(value):
        parts = value.__self__, value.__func__
    elif inspect.isfunction(value):
        cells = value.__closure__ or ()
        parts = [value.__defaults__, *(_content(cell) for cell in cells)]
    return any(_holds_tracer(part, seen) for part in parts)


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not yet assigned
        return None
