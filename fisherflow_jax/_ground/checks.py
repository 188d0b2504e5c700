"""What arguments are asked for, and whether their values are at hand."""

from typing import Any

import jax
import numpy as np

PyTree = Any


def holds(condition: Any) -> bool:
    """Whether a condition holds everywhere, as far as its values are at hand.

    Arrays that a traced function closes over are at hand, but what is computed of them
    there is not: it is the condition that must be asked.
    """
    return isinstance(condition, jax.core.Tracer) or bool(np.all(condition))


def is_concrete(tree: PyTree) -> bool:
    """Whether the values are at hand (not traced), so that they may be checked."""
    return not any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(tree))


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
    _require(value, name, "positive and finite", lambda x: (x > 0) & np.isfinite(x))


def not_negative(value: Any, name: str) -> None:
    """Raises unless a number, or every entry, is finite and >= 0, if at hand."""
    rule = "finite and not negative"
    _require(value, name, rule, lambda x: (x >= 0) & np.isfinite(x))


def fraction(value: Any, name: str) -> None:
    """Raises unless a number is in (0, 1), if it is at hand."""
    _require(value, name, "in (0, 1)", lambda x: (x > 0) & (x < 1))


def _require(value: Any, name: str, rule: str, satisfies: Any) -> None:
    # in numpy, so that a check compiles nothing
    if is_concrete(value) and not np.all(satisfies(np.asarray(value))):
        raise ValueError(f"{name} must be {rule}; got {value}.")
