"""What a walk of a program finds: where each parameter is used, and how."""

from collections import Counter
from typing import Any, NamedTuple

from fisherflow_jax.layers._compat import Atom
from fisherflow_jax.layers._linear import Linear
from fisherflow_jax.layers._views import Axis, View

Path = tuple[int, ...]  # of equations, from the outermost body inwards


class Parameter(NamedTuple):
    """A view of a parameter, or of one slice of it within scans."""

    leaf: int
    view: View
    slices: tuple[Axis | None, ...]  # for each scan around: what it slices; None: whole


class Output(NamedTuple):
    """A view of what a linear operation put out, used nowhere else so far.

    Or of its sum with something else: what counts is that its gradient is the output's.
    """

    use: int
    view: View


class Bias(NamedTuple):
    """A parameter that is added to the outputs of one use."""

    leaf: int
    view: View  # (K, O)


class Use(NamedTuple):
    """One linear operation that a parameter enters."""

    path: Path
    linear: Linear
    leaf: int
    kernel: View  # (K, I, O)
    scans: tuple[int, ...]  # lengths of the scans around, the outermost first
    sliced: tuple[bool, ...]  # for each of them, whether it slices the kernel
    output: Atom
    num_positions: int
    bias: Bias | None = None


class Broadcast(NamedTuple):
    """A parameter that meets other values entry by entry, repeated along some axes."""

    path: Path
    place: int  # of the parameter, among the operands
    leaf: int
    view: View  # (*scans, *output.shape)
    scans: tuple[int, ...]
    output: Atom


class Walk(NamedTuple):
    """What a walk finds."""

    uses: list[Use]
    broadcasts: list[Broadcast]
    reasons: dict[int, str]  # leaf -> why it is no layer's
    stopped: set[int]  # leaves with a use that has no gradient
    times: Counter[int]  # leaf -> uses that are no layer's kernel

    def reject(self, value: Any, reason: str) -> None:
        if isinstance(value, Parameter):
            self.reasons.setdefault(value.leaf, reason)
            self.times[value.leaf] += 1
