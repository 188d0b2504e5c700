"""What is known of the examples in one value of a program that takes a whole batch.

The examples' axis is a `View` of the numbers 0 ... n - 1: the pieces of stride zero are
positions within an example, the others run over the examples.
"""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax

from fisherflow_jax.layers._views import (
    Axis,
    NotStrided,
    View,
    common_pieces,
    is_repeated,
    whole,
)


class Value(NamedTuple):
    """What is known of the examples in a value."""

    view: View | None  # whose entry is whose; None: not known
    together: str | None = None  # what made it depend on several examples at once
    lost: str | None = None  # what the examples were not followed through
    # of what holds no example: the axes along which entries may differ have strides
    # that are not zero
    differs: View | None = None
    drawn: bool = False  # random numbers of a key that all examples share are in it
    stepped: bool = False  # of the examples that a step of the scan around has

    def after(self, operands: Iterable["Value"]) -> "Value":
        """The same, made of these operands."""
        operands = list(operands)
        return self._replace(
            together=self.together or _first(x.together for x in operands),
            lost=self.lost or _first(x.lost for x in operands),
            drawn=self.drawn or any(x.drawn for x in operands),
            stepped=self.stepped or any(x.stepped for x in operands),
        )


class Examples(NamedTuple):
    """The examples in the operands and in the outputs of an equation."""

    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]


def no_example(count: int, shape: Sequence[int]) -> Value:
    """Of what all examples share."""
    return Value(shown_by_all(count, shape), differs=whole(shape))


def shown_by_all(count: int, shape: Sequence[int]) -> View:
    return View((count,), ()).broadcast(shape, ())


def every_example(count: int, shape: Sequence[int]) -> Value:
    """Of an input whose leading axis is that of the examples."""
    positions = (((size, 0),) for size in shape[1:])
    return Value(View((count,), ()).with_axes([((count, 1),), *positions]))


def has_examples(value: Value) -> bool:
    """Whether the entries are those of single examples, and it is known of which."""
    view = value.view
    return view is not None and (view.leaf_shape == (1,) or runs(view))


def runs(view: View) -> bool:
    """Whether other examples are met along the axes of a view."""
    return not is_repeated(view.pieces)


def examples_first(view: View, depth: int, values: jax.Array) -> jax.Array:
    """`(*scans, *shape)` as `(n, *scans, *shape of one example)`, `depth` scans."""
    scans = (((size, 0),) for size in values.shape[:depth])
    view = view.with_axes([*scans, *view.axes])
    # Pieces over the examples have strides of 1 or more and come first, in the order of
    # their numbers; positions have stride 0 and follow in the order of their axes.
    values = view.in_order(values)
    shape = [math.prod(n for n, stride in axis if stride == 0) for axis in view.axes]
    return values.reshape((*view.leaf_shape, *shape))


def checked(value: Value, shape: tuple[int, ...], name: str) -> Value:
    """The value, if it shows every example once at each position, or none of them."""
    view = value.view
    if view is not None and view.shape == shape:
        count = math.prod(size for size, stride in view.pieces if stride != 0)
        if not runs(view) or (count,) == view.leaf_shape:
            return value
    return value._replace(view=None, lost=value.lost or name)


def out_of_order(value: Value, count: int) -> str | None:
    """Why row i of an output may not be that of example i, if it may not."""
    view, differs = value.view, value.differs
    if value.lost or view is None or not view.axes:
        return value.lost
    own, *rest = view.axes
    if runs(view):
        in_order = own == ((count, 1),) and all(map(is_repeated, rest))
        return None if in_order else "outputs in another order than the inputs"
    same = differs is None or is_repeated(differs.axes[0])
    return None if same else "outputs that depend on the number of their row"


def agreed(views: Iterable[View | None]) -> View | None:
    """What views agree on, save those that all examples share; None: nothing known."""
    views = list(views)
    running = {view for view in views if view is None or runs(view)}
    if not running:
        return views[0] if views else None
    return running.pop() if len(running) == 1 else None


def one_of(values: Sequence[Value], name: str) -> Value:
    """A value that is one of these."""
    view = agreed(x.view for x in values)
    each = [(x.differs, x) for x in values if x.differs is not None]
    known = all(x.view is not None for x in values)
    found = Value(view, lost=name if view is None and known else None).after(values)
    if view is None:
        return found
    if not runs(view):
        return found._replace(differs=differing(view.shape, [x.axes for x, _ in each]))
    return found.after([met(view, x.axes, value, name) for x, value in each])


def met(view: View, axes: Sequence[Axis | None], shared: Value, name: str) -> Value:
    """What comes of examples that meet a value which differs along these axes."""
    for own, other in zip(view.axes, axes, strict=True):
        if is_repeated(own) or is_repeated(other or ()) or not _meet(own, other or ()):
            continue
        if shared.drawn:
            return Value(view, together="random numbers drawn for the batch")
        return Value(view, lost=f"{name} with numbers that differ from row to row")
    return Value(view)


def _meet(one: Axis, other: Axis) -> bool:
    try:
        pairs = common_pieces(list(one), list(other))
    except NotStrided:
        return True
    return any(first != 0 and second != 0 for _, first, second in pairs)


def differing(shape: Sequence[int], parts: Iterable[Sequence[Axis | None]]) -> View:
    """Where a value of this shape differs that is made of parts without examples.

    For each of its axes a part says how it differs there; None: it has no such axis.
    """
    parts, axes = list(parts), []
    for i, size in enumerate(shape):
        there = [part[i] for part in parts if part[i] is not None]
        moving = {axis for axis in there if axis and not is_repeated(axis)}
        if len(moving) == 1:
            axes.append(moving.pop())
        else:
            axes.append(((size, 0 if there and not moving else 1),))
    return whole(shape).with_axes(axes)


def _first(reasons: Iterable[str | None]) -> str | None:
    return next((reason for reason in reasons if reason), None)
