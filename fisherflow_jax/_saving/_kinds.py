"""The types that a file may name: the package's own, by room, and no others."""

import dataclasses
import functools
import sys
import types
import typing
from importlib import import_module
from typing import Any

from fisherflow_jax import likelihoods
from fisherflow_jax.likelihoods import Likelihood
from fisherflow_jax.memories import Memory
from fisherflow_jax.structures import Structure

# Rooms with types that are parts of what is saved, from the ground up.
ROOMS = (
    "_ground",
    "expectations",
    "likelihoods",
    "layers",
    "structures",
    "estimators",
    "accumulation",
    "memories",
    "flow",
    "posteriors",
    "geometry",
    "predictions",
    "influence",
    "intervals",
    "transforms",
    "continual",
    "metrics",
    "calibration",
    "_laplace",
    "sparse",
    "selection",
)
# Records of functions, of which a file has the words alone.
CHOICES = Likelihood, Memory, Structure
# The likelihoods that are made again from the numbers in a file.
FAMILIES = {
    family.__name__: family
    for family in (
        likelihoods.bernoulli,
        likelihoods.categorical,
        likelihoods.gamma,
        likelihoods.gaussian,
        likelihoods.gaussian_location_scale,
        likelihoods.negative_binomial,
        likelihoods.poisson,
        likelihoods.student_t,
    )
}


@functools.cache
def by_name() -> dict[str, type]:
    """The NamedTuples and dataclasses of the rooms, by `room.Name`.

    A type is of the lowest room that knows it, since imports run downwards.
    """
    found: dict[str, type] = {}
    seen: set[type] = set()
    for room in ROOMS:
        name = f"fisherflow_jax.{room}"
        import_module(name)
        inside = [n for n in sorted(sys.modules) if f"{n}.".startswith(f"{name}.")]
        for value in [x for n in inside for x in vars(sys.modules[n]).values()]:
            if isinstance(value, type) and value not in seen and _is_own(value):
                seen.add(value)
                found.setdefault(f"{room}.{value.__name__}", value)
    return found


def _is_own(kind: type) -> bool:
    own = kind.__module__.partition(".")[0] == "fisherflow_jax"
    return own and not kind.__name__.startswith("_") and fields(kind) is not None


@functools.cache
def names() -> dict[type, str]:
    return {kind: name for name, kind in by_name().items()}


def fields(kind: type) -> dict[str, Any] | None:
    """A record's fields and their defaults, `...` for none; None: it is no record."""
    if issubclass(kind, tuple) and hasattr(kind, "_fields"):
        defaults = kind._field_defaults  # type: ignore[attr-defined]
        return {name: defaults.get(name, ...) for name in kind._fields}
    if dataclasses.is_dataclass(kind):
        return {
            field.name: ... if field.default is dataclasses.MISSING else field.default
            for field in dataclasses.fields(kind)
        }
    return None


def misfit(value: Any) -> str | None:
    """The field of a dataclass that has another type than is declared, if any does."""
    hints = typing.get_type_hints(type(value))
    for name in fields(type(value)) or ():
        if not _fits(getattr(value, name), hints[name]):
            return name
    return None


def _fits(value: Any, hint: Any) -> bool:
    kind, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if kind in (types.UnionType, typing.Union):
        return any(_fits(value, one) for one in inner)
    if kind is tuple:
        if type(value) is not tuple:
            return False
        if len(inner) == 2 and inner[1] is ...:
            return all(_fits(x, inner[0]) for x in value)
        return len(value) == len(inner) and all(map(_fits, value, inner))
    return type(value) is hint or (hint is None and value is None)
