"""Values in words that are the same in every process: no address, no digit lost."""

import dataclasses
import functools
import hashlib
import re
from typing import Any

import jax
import numpy as np

# Arrays of more entries are told by their digest.
_MOST_ENTRIES = 16
# Of what is printed in a line: characters of a part, and parts of a dict.
_LONG, _MOST_PARTS = 200, 6


def told(value: Any) -> str:
    """A value in one line: a function by its name, an array by its numbers.

    An array of many entries, and what holds many, by a digest, so that different values
    are told differently.
    """
    if isinstance(value, functools.partial):
        named = [f"{name}={told(part)}" for name, part in value.keywords.items()]
        parts = [told(value.func), *map(told, value.args), *named]
        return f"partial({', '.join(parts)})"
    if isinstance(value, jax.core.Tracer):
        return "traced"
    if isinstance(value, (jax.Array, np.ndarray, np.generic)):
        return _array(value)
    if isinstance(value, (list, tuple, dict)):
        return _container(value)
    if (short := getattr(value, "told_as", None)) is not None:
        return short
    made = hasattr(type(value).__repr__, "__wrapped__")  # not written by hand
    if dataclasses.is_dataclass(value) and made:
        parts = [
            f"{field.name}={told(getattr(value, field.name))}"
            for field in dataclasses.fields(value)
        ]
        return f"{type(value).__name__}({', '.join(parts)})"
    if (name := getattr(value, "__name__", None)) and not isinstance(value, float):
        return name
    return _plain(repr(value))


def _plain(text: str) -> str:
    text = re.sub(r"<function (?:[\w<>]+\.)*([\w<>]+) at 0x\w+>", r"\1", text)
    return " ".join(re.sub(r" at 0x[0-9a-f]+", "", text).split())


def _container(value: Any) -> str:
    name = type(value).__name__
    if isinstance(value, dict):  # equal whatever their order
        items = sorted(value.items(), key=lambda item: str(item[0]))
        text = f"{{{', '.join(f'{key!r}: {told(x)}' for key, x in items)}}}"
    elif not hasattr(value, "_fields"):
        inside = ", ".join(map(told, value))
        text = f"[{inside}]" if isinstance(value, list) else f"({inside})"
    elif any(isinstance(x, (jax.Array, np.ndarray)) for x in jax.tree.leaves(value)):
        parts = zip(value._fields, value, strict=True)
        text = f"{name}({', '.join(f'{key}={told(x)}' for key, x in parts)})"
    else:
        text = _plain(repr(value))
    return text if len(text) <= _LONG else f"{name}:{_digest(text.encode())}"


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:12]


def _array(value: Any) -> str:
    if jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key):
        return f"key({_array(jax.random.key_data(value))})"
    if isinstance(value, jax.Array) and not value.is_fully_addressable:
        return f"{value.dtype}{list(value.shape)} of several processes"
    value = np.asarray(value)
    if value.size > _MOST_ENTRIES:
        return f"{value.dtype}{list(value.shape)}:{_digest(value.tobytes())}"
    entries = f"[{', '.join(map(str, value.ravel()))}]"
    if value.ndim == 0:
        return f"{value.dtype}({value[()]!s})"
    shape = "" if value.ndim == 1 else str(list(value.shape))
    return f"{value.dtype}{shape}{entries}"


def brief(record: Any) -> str:
    """A NamedTuple in a line: arrays of few entries as they are, others by shape."""
    parts = [f"{name}={_short(getattr(record, name))}" for name in record._fields]
    return f"{type(record).__name__}({', '.join(parts)})"


def _short(value: Any) -> str:
    if isinstance(value, jax.core.Tracer) or jax.tree_util.all_leaves([value]):
        return _short_leaf(value)
    leaves = jax.tree.leaves(value)
    few = sum(np.size(x) for x in leaves) <= _MOST_ENTRIES
    if (leaves and few) or hasattr(value, "_fields"):
        text = _plain(repr(value))
        return text if len(text) <= _LONG else f"{type(value).__name__}(...)"
    if isinstance(value, dict):
        shown = [f"{key!r}: {_short(x)}" for key, x in [*value.items()][:_MOST_PARTS]]
        rest = [", ..."] if len(value) > _MOST_PARTS else []
        return f"{{{', '.join(shown)}{''.join(rest)}}}"
    if isinstance(value, (list, tuple)):
        return f"a {type(value).__name__} of {len(value)}"
    return _short_leaf(value)


def _short_leaf(value: Any) -> str:
    held = isinstance(value, (jax.Array, np.ndarray, np.generic))
    held = held and not isinstance(value, jax.core.Tracer)
    if hasattr(value, "dtype") and not (held and np.size(value) <= _MOST_ENTRIES):
        return f"{value.dtype}{list(value.shape)}"
    text = _plain(repr(value))
    return text if len(text) <= _LONG else f"a {type(value).__name__}"
