"""What a walk of a program finds: the uses of its parameters."""

import math
from collections import Counter
from typing import Any, NamedTuple

from fisherflow_jax.layers import _terms as of
from fisherflow_jax.layers import _views as views
from fisherflow_jax.layers._compat import Atom, Equation, Path
from fisherflow_jax.layers._linear import Dense, Embedding, Experts, NotLinear, match
from fisherflow_jax.layers._parts import Part
from fisherflow_jax.layers._terms import Factor, Parameter, Product, Scans, terms
from fisherflow_jax.layers._views import NotStrided, View


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
    linear: Dense
    leaf: int
    kernel: View  # (K, I, O)
    scans: Scans
    sliced: tuple[bool, ...]  # for each of them, whether it slices the kernel
    output: Atom
    num_positions: int
    bias: Bias | None = None
    turned: bool = False  # whether its layer's kernel is this one's transpose
    scale: float = 1.0  # of the kernel
    # of a kernel that is a product: the other factor, which what enters (or what
    # returns) has passed on the way
    before: Factor | None = None
    behind: Factor | None = None
    part: Part | None = None  # of the kernel, or of the operation
    entering: Any = None  # the variable of the other operand
    beside: bool = False  # whether it goes with the use before, of another part
    mixed: bool = False  # of a whole batch: whether its rows are of no one example


class Broadcast(NamedTuple):
    """A parameter that meets other values entry by entry, repeated along some axes."""

    path: Path
    place: int  # of the parameter, among the operands
    leaf: int
    view: View  # (*scans, *output.shape)
    scans: Scans
    output: Atom


class Walk(NamedTuple):
    """What a walk finds."""

    uses: list[Use]
    broadcasts: list[Broadcast]
    reasons: dict[int, str]  # leaf -> why it is no layer's
    stopped: set[int]  # leaves with a use that has no gradient
    times: Counter[int]  # leaf -> uses that are no layer's kernel
    products: list[Product]

    def leaves(self, term: Parameter) -> list[int]:
        own = term.leaf
        return [own] if own >= 0 else [x.leaf for x in self.products[~own]]

    def reject(self, value: Any, reason: str) -> None:
        for term in terms(value):
            for leaf in self.leaves(term):
                self.reasons.setdefault(leaf, term.after or reason)
                self.times[leaf] += 1


def nothing() -> Walk:
    return Walk([], [], {}, set(), Counter(), [])


def uses_of(
    found: Walk, equation: Equation, operands: list, path: Path, scans: Scans
) -> list[Use]:
    """Of each parameter in the one operand that has any; the last has its outputs."""
    place = next(i for i, x in enumerate(operands) if terms(x))
    linear, output, uses = match(equation, place), equation.outputs[0], []
    rows = linear.outputs(views.whole(output.shape)).shape[1]
    for term in terms(operands[place]):
        plain = term.leaf >= 0 and term.scale == 1 and term.box is None
        if isinstance(linear, Embedding) and not plain:
            raise NotLinear(f"used in {equation.name}")  # it enters as ids, not rows
        try:
            kernel, part = of.placed(term, linear.kernel(term.view))
        except NotStrided:
            raise NotLinear(f"reshaped before {equation.name}") from None
        if not kernel.is_bijection:
            raise NotLinear(f"broadcast before {equation.name}")
        # T: the positions of one output, for each step of a scan that shares the kernel
        shared = [n for n, own in zip(scans, term.sliced, strict=True) if not own]
        use = Use(
            path=path,
            linear=linear,
            leaf=term.leaf,
            kernel=kernel,
            scans=scans,
            sliced=term.sliced,
            output=output,
            num_positions=math.prod([*shared, rows]),
            scale=term.scale,
            part=part,
            entering=equation.inputs[linear.operand].variable,
        )
        if term.leaf >= 0:
            uses.append(use)
            continue
        try:
            first, last = of.factors(found.products[~term.leaf], kernel)
        except NotStrided:
            raise NotLinear(f"reshaped before {equation.name}") from None
        uses.append(use._replace(leaf=first.leaf, kernel=first.view, behind=last))
        uses.append(use._replace(leaf=last.leaf, kernel=last.view, before=first))
    return uses


def note_broadcast(
    found: Walk, place: int, value: Parameter, path: Path, scans: Scans, output: Atom
) -> None:
    known = isinstance(value, Parameter) and value.leaf >= 0 and value.box is None
    if not known or value.scale != 1:
        return
    dimensions = range(len(value.view.shape))
    if len(dimensions) not in (0, len(output.shape)):
        return
    view = value.view.broadcast(output.shape, dimensions)
    around = zip(value.slices, scans, strict=True)
    sliced = [axis or ((size, 0),) for axis, size in around]
    view = view.with_axes([*sliced, *view.axes])
    found.broadcasts.append(Broadcast(path, place, value.leaf, view, scans, output))


def merge_bias(found: Walk, operands: list, shape: tuple[int, ...]) -> bool:
    """Whether an addition adds biases to the output of uses; if so, notes them."""
    match operands:
        case [Output() as output, added] | [added, Output() as output] if terms(added):
            pass
        case _:
            return False
    if not output.view.is_bijection or output.view.shape != shape:
        return False
    owned = [_owned(found, output, term, shape) for term in terms(added)]
    owners = {owner for owner, _ in owned}
    if None in owners or len(owners) < len(owned):
        return False
    for owner, bias in owned:
        found.uses[owner] = found.uses[owner]._replace(bias=bias)
        found.times[bias.leaf] += 1
    return True


def _owned(
    found: Walk, output: Output, term: Parameter, shape: tuple[int, ...]
) -> tuple[Any, Any]:
    """The use whose bias a term is; `(None, None)`: there is none."""
    none, path = (None, None), found.uses[output.use].path
    if term.leaf < 0 or term.scale != 1 or len(term.view.shape) != len(shape):
        return none
    # axes of length 1 may be left for the addition to broadcast
    added = term.view.broadcast(shape, range(len(shape)))
    for owner, use in enumerate(found.uses):
        if use.path != path or not _may_own(use, term):
            continue
        try:
            # what is added at each place of the operation's own output, as (K, T, O)
            by_feature = use.linear.outputs(views.reordered(added, output.view))
            stacks, _, features = by_feature.axes
            bias, part = of.placed(term, by_feature.with_axes([stacks, features]))
        except NotStrided:
            return none
        # one that differs between positions has more entries than the features
        same = use.part == (part and part._replace(axis=2 * part.axis))
        if same and bias.is_bijection:
            return owner, Bias(term.leaf, bias)
    return none


def _may_own(use: Use, bias: Parameter) -> bool:
    # ids out of bounds have outputs that depend on the bias alone, and so have rows
    # of no expert
    partial = isinstance(use.linear, Experts)
    if isinstance(use.linear, Embedding):
        partial = not use.linear.gather.clips
    return not partial and use.behind is None and use.sliced == bias.sliced
