"""The examples in loops and branches: a body is followed until nothing changes."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from fisherflow_jax.layers import _compat
from fisherflow_jax.layers._compat import Path, Program
from fisherflow_jax.layers._values import (
    Examples,
    Value,
    one_of,
    runs,
    shown_by_all,
)
from fisherflow_jax.layers._views import Axis, View, is_repeated, length, whole

# `_examples.follow`
Follow = Callable[..., tuple[list[Value], dict[Path, Examples]]]


def cond(
    follow: Follow, branches: _compat.Cond, operands: Sequence[Value], count: int
) -> list[Value]:
    index, *rest = operands
    found = [follow(_compat.read(x), rest, count)[0] for x in branches.branches]
    return [one_of(each, "cond").after([index]) for each in zip(*found, strict=True)]


def while_loop(
    follow: Follow, loop: _compat.While, operands: Sequence[Value], count: int
) -> list[Value]:
    of_condition, of_body = loop.num_constants
    known, rest = operands[:of_condition], operands[of_condition:]
    constants, carries = rest[:of_body], list(rest[of_body:])
    body, condition = _compat.read(loop.body), _compat.read(loop.condition)

    def step(carries: list[Value]) -> list[Value]:
        return follow(body, [*constants, *carries], count)[0]

    carries = _settled(step, carries, "while")
    (asked,), _ = follow(condition, [*known, *carries], count)
    if not asked.together and not asked.lost:
        return carries
    # steps go on while one example asks for them; the others may stand still
    return [x._replace(lost=x.lost or "while") for x in carries]


def _settled(step: Callable, carries: list[Value], name: str) -> list[Value]:
    """What is carried: it starts as zeros, and holds examples after a step."""
    for _ in range(2 * len(carries) + 4):
        pairs = zip(carries, step(carries), strict=True)
        after = [one_of(pair, name) for pair in pairs]
        if after == carries:
            return carries
        carries = after
    return [Value(None, lost=name).after([x]) for x in carries]


def scan(
    follow: Follow,
    loop: _compat.Scan,
    operands: Sequence[Value],
    count: int,
    path: Path,
) -> tuple[list[Value], dict[Path, Examples]]:
    body = _compat.read(loop.body)
    first, end = loop.num_constants, loop.num_constants + loop.num_carries
    over = {x.view.axes[0] for x in operands[end:] if x.view}
    over = {axis for axis in over if not is_repeated(axis)}
    if over:
        return _over_examples(follow, loop, operands, over, count, path)
    constants, carries = operands[:first], list(operands[first:end])
    slices = [_sliced(value) for value in operands[end:]]

    def step(carries: list[Value]) -> list[Value]:
        every = [*constants, *carries, *slices]
        return follow(body, every, count, path)[0][: loop.num_carries]

    carries = _settled(step, carries, "scan")
    results, rows = follow(body, [*constants, *carries, *slices], count, path)
    return [*carries, *(_stacked(x, loop) for x in results[loop.num_carries :])], rows


def _sliced(value: Value) -> Value:
    """A step of what is scanned, along another axis than the examples'."""
    view, differs = value.view, value.differs
    return value._replace(
        view=view and view.with_axes(view.axes[1:]),
        differs=differs and differs.with_axes(differs.axes[1:]),
    )


def _stacked(value: Value, loop: _compat.Scan) -> Value:
    """Steps of a result side by side: each may have numbers of its own."""
    view, differs = value.view, value.differs
    return value._replace(
        view=view and view.with_axes([((loop.length, 0),), *view.axes]),
        differs=differs and _with_axis(differs, ((loop.length, 1),)),
    )


def _with_axis(differs: View, axis: Axis) -> View:
    shape = (length(axis), *differs.shape)
    return whole(shape).with_axes([axis, *differs.axes])


def _over_examples(
    follow: Follow,
    loop: _compat.Scan,
    operands: Sequence[Value],
    over: set[Axis],
    count: int,
    path: Path,
) -> tuple[list[Value], dict[Path, Examples]]:
    """A scan whose steps have examples of their own, as those of `lax.map` have."""
    axis, *others = over
    each = count // length(axis)  # the examples of a step
    first, end = loop.num_constants, loop.num_constants + loop.num_carries
    body: Program = _compat.read(loop.body)

    def inside(value: Value) -> Value:
        view = value.view
        if view is None or runs(view):
            return Value(None, lost="scan").after([value])
        return value._replace(view=shown_by_all(each, view.shape))

    def of_step(value: Value) -> Value:
        view, differs = value.view, value.differs
        if view is None:
            return value
        shape = view.shape[1:]
        if view.axes[0] == axis and not others:
            own = View((each,), view.axes[1:])
            whole_step = math.prod(n for n, stride in own.pieces if stride) == each
            if whole_step and (each > 1) == runs(own):
                return value._replace(view=own, stepped=True)
            return Value(None, lost="scan")
        if runs(view):
            return Value(None, lost="scan").after([value])
        by_step = differs is not None and not is_repeated(differs.axes[0])
        return value._replace(
            view=shown_by_all(each, shape),
            differs=differs and differs.with_axes(differs.axes[1:]),
            lost="scan with numbers of each step" if by_step else value.lost,
        )

    constants = [inside(value) for value in operands[:first]]
    slices = [of_step(value) for value in operands[end:]]

    def step(carries: list[Value]) -> list[Value]:
        every = [*constants, *carries, *slices]
        results = follow(body, every, each, path)[0][: loop.num_carries]
        # what is carried goes from example to example
        return [Value(None, lost="scan") if x.stepped else x for x in results]

    carries = _settled(step, [inside(x) for x in operands[first:end]], "scan")
    results, rows = follow(body, [*constants, *carries, *slices], each, path)
    stacked = [_of_all_steps(x, axis, count, loop) for x in results[loop.num_carries :]]
    # in the body they are those of a step, not of the batch
    hidden = {
        at: Examples(*(tuple(x._replace(view=None) for x in part) for part in found))
        for at, found in rows.items()
    }
    return [*(_outside(x, count) for x in carries), *stacked], hidden


def _outside(value: Value, count: int) -> Value:
    view: Any = value.view
    return value._replace(view=view and shown_by_all(count, view.shape), stepped=False)


def _of_all_steps(value: Value, axis: Axis, count: int, loop: _compat.Scan) -> Value:
    view = value.view
    if view is None or not value.stepped:
        return _stacked(_outside(value, count), loop)
    view = View((count,), ()).with_axes([axis, *view.axes])
    return value._replace(view=view, differs=None, stepped=False)
