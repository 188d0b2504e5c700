"""What arguments are asked for, and whether their values are at hand."""

import functools
import inspect
import operator
import sys
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

PyTree = Any
P = ParamSpec("P")
T = TypeVar("T")

# What an error shows of a value as it is.
_SHORT = 80


def holds(condition: Any) -> bool:
    """Whether a condition holds everywhere, as far as its values are known.

    Arrays that a traced function closes over are at hand, but what is computed of them
    there is not: it is the condition that must be asked. One of which other processes
    hold a part is reduced on the devices, in a program that all of them run.
    """
    if is_traced(condition):
        return True
    return bool((np if is_concrete(condition) else jnp).all(condition))


def is_traced(tree: PyTree) -> bool:
    return any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(tree))


def is_concrete(tree: PyTree) -> bool:
    """Whether the values are at hand, so that they may be read on this host.

    That is no tracer, and no array of which other processes alone hold a part.
    """
    return all(map(_is_here, jax.tree.leaves(tree)))


def _is_here(leaf: Any) -> bool:
    if isinstance(leaf, jax.core.Tracer):
        return False
    whole = not isinstance(leaf, jax.Array) or leaf.is_fully_addressable
    return whole or leaf.is_fully_replicated


def called_as(call: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Of a function whose arguments do not fit, the error shows this call too.

    A call that fits costs nothing more.
    """

    def of(function: Callable[P, T]) -> Callable[P, T]:
        @functools.wraps(function)
        def called(*args: P.args, **kwargs: P.kwargs) -> T:
            try:
                return function(*args, **kwargs)
            except TypeError as error:
                try:
                    inspect.signature(function).bind(*args, **kwargs)
                except TypeError:
                    raise TypeError(f"{error}. It is called as {call}.") from None
                raise

        return called

    return of


def made(
    value: Any, kind: type, name: str, such_as: str, of_functions: str = ""
) -> None:
    """Raises unless a choice of a kind was made, by a call of one of its factories.

    Args:
      value: what was given.
      kind: the choice's class, shown in the room of its factories.
      name: of the argument.
      such_as: a call that makes one.
      of_functions: what else to say of a function that is no factory.

    Raises:
      TypeError: for a factory that was not called, for its name, and for all else.
    """
    if isinstance(value, kind):
        return
    told = _factory(value, ".".join(kind.__module__.split(".")[:2]))
    if told is None:
        told = f"{described(value)}."
        if of_functions and inspect.isfunction(value):
            told = f"{told} {of_functions}"
    raise TypeError(f"{name} comes from a call such as {such_as}; got {told}")


def function(value: Any, room: str, name: str, such_as: str) -> None:
    """Raises unless a function was given, and not the factory of one.

    Args:
      value: what was given.
      room: the module that shows factories of such functions.
      name: of the argument, and what it is a function of.
      such_as: a call that makes one.

    Raises:
      TypeError: for a factory of the room that was not called, for its name, and for
        what cannot be called.
    """
    told = _factory(value, room)
    if told is None and not callable(value):
        told = f"{described(value)}."
    if told is not None:
        raise TypeError(f"{name}, such as {such_as}; got {told}")


def _factory(value: Any, room: str) -> str | None:
    """What to do about a factory of a room, or its name; None: it is none."""
    shown, own = f"ff.{room.rpartition('.')[2]}", vars(sys.modules[room])
    called = value if isinstance(value, str) else getattr(value, "__name__", None)
    factory = own.get(str(called))
    if factory is None or not (value is factory or value == called):
        return None
    got = repr(value) if value == called else f"{shown}.{called} itself"
    return f"{got}. Call it: {shown}.{_call(factory)}."


def _call(factory: Any) -> str:
    """A call of a factory with the names of what it cannot do without."""
    given = inspect.signature(factory).parameters.values()
    needed = [x.name for x in given if x.default is x.empty and x.kind < x.VAR_KEYWORD]
    return f"{factory.__name__}({', '.join(needed)})"


def described(value: Any) -> str:
    """A value in a few words: a function by its name, an array by its shape."""
    if hasattr(value, "__qualname__"):  # and a function that JAX has wrapped
        return f"the {type(value).__name__} {value.__qualname__}"
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"an array of shape {tuple(value.shape)} and dtype {value.dtype}"
    text = repr(value)
    return text if len(text) <= _SHORT else f"a {type(value).__name__}"


def whole(value: Any, name: str, least: int = 1, of: str = "") -> int:
    """`value`, a whole number of something (`of="steps"`), `least` or more.

    Raises:
      ValueError: for anything else: a float, a boolean, an array, a traced value.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        kind = "positive whole number" if least == 1 else "whole number"
        rule = f"{kind} of {of}" if of else kind
        bound = "" if least == 1 else f", at least {least}"
        raise ValueError(f"{name} must be a {rule}{bound}; got {value!r}.")
    return value


def positive(value: Any, name: str) -> None:
    """Raises unless a number, or every entry, is positive and finite, if at hand."""
    _require(value, name, "positive and finite", lambda x: (x > 0) & (x < np.inf))


def not_negative(value: Any, name: str) -> None:
    """Raises unless a number, or every entry, is finite and >= 0, if at hand."""
    rule = "finite and not negative"
    _require(value, name, rule, lambda x: (x >= 0) & (x < np.inf))


def fraction(value: Any, name: str) -> None:
    """Raises unless a number is in (0, 1), if it is at hand."""
    _require(value, name, "in (0, 1)", lambda x: (x > 0) & (x < 1))


def decay(value: Any, name: str, *, one: bool = True) -> None:
    """Raises unless a number is in [0, 1], or [0, 1) without `one`, if at hand."""
    rule, below = ("in [0, 1]", operator.le) if one else ("in [0, 1)", operator.lt)
    _require(value, name, rule, lambda x: (x >= 0) & below(x, 1))


def _require(value: Any, name: str, rule: str, satisfies: Any) -> None:
    if not is_traced(value) and not holds(satisfies(readable(value))):
        raise ValueError(f"{name} must be {rule}; got {shown(value)}.")


def is_finite(value: Any) -> bool:
    """Whether all entries are, as far as they are known."""
    return is_traced(value) or holds(abs(readable(value)) < np.inf)


def readable(value: Any) -> Any:
    """For a check to compute with: numpy's, which compiles nothing, if at hand."""
    return np.asarray(value) if is_concrete(value) else value


def shown(value: Any) -> str:
    """What an error says of a value: of an array of many numbers its ends."""
    with np.printoptions(threshold=20, edgeitems=1):
        return " ".join(str(value if is_concrete(value) else jax.typeof(value)).split())


def floating(dtype: Any, name: str) -> Any:
    """A floating-point type, or None."""
    if dtype is None:
        return None
    try:
        if jnp.issubdtype(jnp.dtype(dtype), jnp.floating):
            return jnp.dtype(dtype)
    except TypeError:
        pass
    raise ValueError(
        f"{name} is None or a floating-point type, such as bfloat16; got {dtype!r}."
    )
