"""Parameters on their way to a layer: views, multiples, sums and products of them."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fisherflow_jax.layers import _views as views
from fisherflow_jax.layers._compat import Cut, Equation, Stack
from fisherflow_jax.layers._linear import NotLinear, grouped, match
from fisherflow_jax.layers._parts import Box, Part, joined, sliced
from fisherflow_jax.layers._views import Axis, NotStrided, View

Scans = tuple[int, ...]  # lengths of the scans around, the outermost first
MULTIPLIED = "multiplied by another parameter"


class Fixed(NamedTuple):
    """What depends on no parameter and on no input; its number, where it is one."""

    number: float | None = None


class Parameter(NamedTuple):
    """A view of a parameter, or of one slice of it within scans, times a number."""

    leaf: int  # below 0: of the product ~leaf
    view: View
    slices: tuple[Axis | None, ...]  # for each scan around: what it slices; None: whole
    scale: float = 1.0
    after: str | None = None  # what makes it more than a view
    added: bool = False  # to something else
    box: Box | None = None  # where it is a part: of its leaf, or of what it is in

    def stacked(self, view: View) -> View:
        """The view whose first axis also runs over what scans slice."""
        # a scan's slice [s] of leaf[s, k, i, o] is s K + k: scans are the slower
        pieces = [piece for axis in self.slices if axis is not None for piece in axis]
        return view.with_axes([(*pieces, *view.axes[0]), *view.axes[1:]])

    @property
    def sliced(self) -> tuple[bool, ...]:
        return tuple(axis is not None for axis in self.slices)


class Sum(NamedTuple):
    """A sum of several."""

    terms: tuple[Parameter, ...]


class Factor(NamedTuple):
    """A parameter as K matrices, which stand on one side of others."""

    leaf: int
    view: View  # (K, rows, columns)


Product = tuple[Factor, Factor]  # the left and the right one


def terms(value: Any) -> tuple[Parameter, ...]:
    """The parameters that a value is made of."""
    if isinstance(value, Sum):
        return value.terms
    return (value,) if isinstance(value, Parameter) else ()


def each(change: Callable, value: Any) -> Any:
    """A change of each of the terms."""
    made = tuple(map(change, terms(value)))
    return Sum(made) if len(made) > 1 else made[0]


def cut(operation: Cut, value: Any) -> list[Any] | None:
    """What slices of a parameter are; None: they are not followed."""

    def of(value: Any, ends: dict[int, tuple[int, int, int]]) -> Any:
        for axis, (start, stop, step) in ends.items():
            if (start, stop, step) == (0, value.view.shape[axis], 1):
                continue
            if value.box is not None or step != 1:
                raise NotStrided
            view, box = sliced(value.view, axis, start, stop)
            after = value.after or "used in slice"
            value = value._replace(view=view, box=box, after=after)
        return value

    if not isinstance(value, Parameter) or value.leaf < 0:
        return None
    try:
        return [of(value, ends) for ends in operation.ends]
    except NotStrided:
        return None


def concatenated(equation: Equation, operands: Sequence[Any], scans: Scans) -> Any:
    """The parts of a concatenation, as a sum; None: something else is in it."""
    shape, start, made = equation.outputs[0].shape, 0, []
    axis, is_stack = equation.operation.axis, isinstance(equation.operation, Stack)
    for value, atom in zip(operands, equation.inputs, strict=True):
        if 0 in atom.shape:
            continue
        if isinstance(value, Parameter) and value.leaf >= 0 and value.box is None:
            stacks = [n for n, own in zip(scans, value.sliced, strict=True) if own]
            own = [x for x in value.slices if x is not None]
            view = value.view.expand_dims([axis]) if is_stack else value.view
            inner = view.with_axes([*own, *view.axes])
            view, box = joined(inner, stacks, shape, axis, start)
            axes = list(view.axes)
            slices = tuple(axes.pop(0) if own else None for own in value.sliced)
            view, after = view.with_axes(axes), value.after or "used in concatenate"
            new = value._replace(view=view, slices=slices, box=box, after=after)
            made.append(new)
        elif not isinstance(value, Fixed):
            return None
        start += 1 if is_stack else atom.shape[axis]
    return (Sum(tuple(made)) if len(made) > 1 else made[0]) if made else None


def placed(term: Parameter, view: View) -> tuple[View, Part | None]:
    """A view of a term, its stacks first, as that of its leaf; and which part it is.

    Raises:
      NotStrided: where the part's axis was cut on the way.
    """
    view = term.stacked(view)
    return term.box.placed(view) if term.box else (view, None)


def fixed(value: Any) -> Fixed:
    """What a constant is."""
    known = jnp.shape(value) == () and not isinstance(value, jax.core.Tracer)
    real = known and jnp.issubdtype(jnp.result_type(value), np.floating)
    return Fixed(float(value) if real else None)


def combined(equation: Equation, operands: Sequence[Any]) -> Any:
    """A sum of parameters and of what is fixed, or a multiple; None: it is neither."""
    if not all(terms(x) or isinstance(x, Fixed) for x in operands):
        return None
    name = equation.name
    numbers = [x.number for x in operands if isinstance(x, Fixed)]
    number = numbers[0] if len(numbers) == 1 else None
    scales: dict[str, tuple] = {"add": (1, 1), "add_any": (1, 1), "sub": (1, -1)}
    if number is not None:
        scales["mul"] = number, number
    if number and terms(operands[0]):
        scales["div"] = (1 / number,)
    made = [
        term._replace(
            scale=term.scale * scale,
            after=term.after or f"used in {name}",
            added=term.added or name in ("add", "add_any", "sub"),
        )
        for operand, scale in zip(operands, scales.get(name, ()), strict=False)
        for term in terms(operand)
    ]
    shape = equation.outputs[0].shape
    if not made or any(term.view.shape != shape for term in made):
        return None
    return made[0] if len(made) == 1 else Sum(tuple(made))


def product(
    equation: Equation, operands: Sequence[Any], scans: Scans
) -> tuple[Product, Parameter]:
    """Of two parameters; and what comes out, as a view of a leaf of its own.

    Raises:
      NotLinear: where they are no matrices, stack by stack.
    """
    left, right = operands
    dot = match(equation, 1)
    if (
        not (isinstance(left, Parameter) and isinstance(right, Parameter))
        or left.sliced != right.sliced
        or any(x.leaf < 0 or x.added or x.box for x in (left, right))
    ):
        raise NotLinear(MULTIPLIED)
    try:
        matrices = grouped(left.view, *dot.input_axes), dot.kernel(right.view)
    except NotStrided:
        raise NotLinear(MULTIPLIED) from None
    each = left.stacked(matrices[0]), right.stacked(matrices[1])
    if not all(view.is_bijection for view in each):
        raise NotLinear(MULTIPLIED)
    stacks = [n for n, sliced in zip(scans, left.sliced, strict=True) if sliced]
    view = views.whole((*stacks, *equation.outputs[0].shape))
    axes = list(view.axes)
    slices = tuple(axes.pop(0) if sliced else None for sliced in left.sliced)
    scale = left.scale * right.scale
    value = Parameter(0, view.with_axes(axes), slices, scale, MULTIPLIED)
    return (Factor(left.leaf, each[0]), Factor(right.leaf, each[1])), value


def factors(product: Product, kernel: View) -> Product:
    """The factors of a kernel `(K, I, O)`, which views their product.

    Raises:
      NotStrided: where it is neither the product nor its transpose, stack by stack.
    """
    left, right = product
    natural = views.whole((*left.view.shape[:2], right.view.shape[2]))
    if kernel.axes == natural.axes:
        return left, right
    if kernel.axes != natural.transpose((0, 2, 1)).axes:
        raise NotStrided
    turned = [x._replace(view=x.view.transpose((0, 2, 1))) for x in (right, left)]
    return turned[0], turned[1]
