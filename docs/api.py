"""Writes docs/api.txt, every public name with its arguments: `python docs/api.py`."""

import inspect
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import GenericAlias, ModuleType
from typing import Any

import fisherflow_jax as ff

PAGE = Path(__file__).with_name("api.txt")
TIERS = {
    "stable": "To optimise, to infer, to say how sure: the names that are promised.",
    "settling": "Tools around these; what changes is said in the changelog.",
    "research": "May change or go without a word.",
}
# The tier of each room that is not stable.
ROOMS = {
    "comparison": "settling",
    "compression": "research",
    "continual": "settling",
    "diagnostics": "settling",
    "expectations": "settling",
    "geometry": "research",
    "intervals": "settling",
    "selection": "settling",
    "sklearn": "settling",
    "sparse": "research",
    "testing": "settling",
}
# Rooms that need an extra, and are imported by their own names.
EXTRAS = ["sklearn"]
# Names of the package itself that are not stable.
SETTLING = {"load", "save"}
# Of a stable room, what is promised; the rest serves other rooms, and who writes a
# structure, a memory or a likelihood.
PROMISED = {
    "information": {
        "add",
        "color",
        "diagonal",
        "effective",
        "efficient",
        "inverse_diagonal",
        "is_estimable",
        "logdet",
        "matvec",
        "null_directions",
        "quadratic_form",
        "restrict",
        "sample",
        "scale",
        "solve",
        "solver",
        "spectral",
        "to_dense",
        "trace",
        "whiten",
    },
    "layers": {"Layer", "Layers", "find_layers", "tap", "tap_batch"},
    "memories": {
        "ChangeReport",
        "Memory",
        "adaptive",
        "exponential",
        "matern",
        "random_walk",
        "stationary",
        "windowed",
    },
    "structures": {
        "Block",
        "Compensated",
        "Diagonal",
        "Full",
        "Kronecker",
        "LowRank",
        "Scalar",
        "Structure",
        "UnitBlock",
        "block",
        "diagonal",
        "full",
        "kronecker",
        "low_rank",
        "scalar",
        "sharing",
    },
}


class Shown:
    """A default as one writes it: functions by their names, without addresses."""

    def __init__(self, value: Any):
        self.value = value

    def __repr__(self) -> str:
        if inspect.isroutine(self.value) or isinstance(self.value, type):
            return self.value.__name__
        text = " ".join(repr(self.value).split())
        named = re.sub(r"<function (?:[\w<>]+\.)*(\w+) at 0x\w+>", r"\1", text)
        return re.sub(r"<PjitFunction of (\w+)>", r"\1", named)


def arguments(value: Any) -> str:
    """`(first, *, option=default)` of what is called."""
    parameters = [
        parameter.replace(
            annotation=parameter.empty,
            default=parameter.empty
            if parameter.default is parameter.empty
            else Shown(parameter.default),
        )
        for name, parameter in inspect.signature(value).parameters.items()
        if name != "self"
    ]
    return str(inspect.Signature(parameters))


def described(name: str, value: Any) -> Iterator[str]:
    """The lines of one name: its own, and those of a class's public methods."""
    if isinstance(value, ModuleType):
        for inner, function in vars(value).items():
            if inspect.isfunction(function) and function.__module__ == value.__name__:
                yield f"{name}.{inner}{arguments(function)}"
        return
    if not callable(value) or isinstance(value, GenericAlias):
        yield f"{name} = {Shown(value)!r}"
        return
    if isinstance(value, type) and issubclass(value, Warning):
        yield name  # it is caught, not called
        return
    yield name + arguments(value)
    if isinstance(value, type):
        ours = [c for c in value.__mro__ if c.__module__.startswith(ff.__name__)]
        methods = {m: f for c in reversed(ours) for m, f in vars(c).items()}
        for method, function in methods.items():
            if inspect.isfunction(function) and not method.startswith("_"):
                yield f"{name}.{method}{arguments(function)}"


def exported(room: ModuleType) -> list[str]:
    """The names that a room's source imports as themselves, `X as X`."""
    return sorted(set(re.findall(r"\b(\w+) as \1\b", inspect.getsource(room))))


def tier_of(room: str, name: str) -> str:
    if name in PROMISED.get(room, {name}):
        return ROOMS.get(room, "stable")
    return "settling"


def names() -> Iterator[tuple[str, str, str, Any]]:
    """(tier, room or "", name, value) of every public name; those of a room last."""
    public = {name: getattr(ff, name) for name in ff.__all__}
    for name, value in public.items():
        if not isinstance(value, ModuleType):
            yield "settling" if name in SETTLING else "stable", "", name, value
    extras = {room: import_module(f"fisherflow_jax.{room}") for room in EXTRAS}
    for room, module in (public | extras).items():
        if isinstance(module, ModuleType):
            for name in exported(module):
                yield tier_of(room, name), room, name, getattr(module, name)


def entries(room: str, name: str, value: Any) -> list[str]:
    """A name's lines in the list; one that the package shows itself refers to it."""
    if room and getattr(ff, name, None) is value:
        return [f"ff.{room}.{name} is ff.{name}"]
    return list(described(f"ff.{room}.{name}" if room else f"ff.{name}", value))


def page() -> str:
    """The text of docs/api.txt."""
    lines: dict[str, dict[str, list[str]]] = {tier: {} for tier in TIERS}
    for tier, room, name, value in names():
        lines[tier].setdefault(room, []).extend(entries(room, name, value))
    text = "The public names of fisherflow_jax (ff); written by `python docs/api.py`.\n"
    for tier, meaning in TIERS.items():
        shown = []
        for room, listed in lines[tier].items():
            if room:
                about = (getattr(ff, room).__doc__ or "").splitlines()[0]
                shown += ["", f"ff.{room}: {about}", *listed]
            else:
                shown += sorted(listed)
        written = "\n".join(shown).strip() or "(none yet)"
        text += f"\n\n== {tier}\n{meaning}\n\n{written}\n"
    return text


if __name__ == "__main__":
    PAGE.write_text(page())
