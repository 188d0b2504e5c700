"""Linear operations in one form: `out[k, t] = a[k, t] @ kernel[k]`.

Kernels become `(K, I, O)`, what enters `(K, T, I)`, what leaves `(K, T, O)`: K stacked
kernels, each shared by T positions. The functions move shapes only, so that the same
ones bring an array and a `View` into that form.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from fisherflow_jax.layers._compat import (
    Convolution,
    Dot,
    Equation,
    Gather,
    Ragged,
)
from fisherflow_jax.layers._views import View

Axes = tuple[tuple[int, ...], ...]  # groups of axes, each of which becomes one


class NotLinear(Exception):
    """Why an operation is not a linear layer of the parameter that enters it."""


def grouped(array: Any, *groups: Sequence[int]) -> Any:
    """One axis for each group of axes."""
    sizes = tuple(math.prod(array.shape[i] for i in group) for group in groups)
    return array.transpose([i for group in groups for i in group]).reshape(sizes)


def _split(array: Any, axis: int, count: int) -> Any:
    shape = array.shape
    parts = (count, shape[axis] // count)
    return array.reshape((*shape[:axis], *parts, *shape[axis + 1 :]))


def others(ndim: int, *used: Sequence[int]) -> tuple[int, ...]:
    return tuple(i for i in range(ndim) if not any(i in group for group in used))


@dataclasses.dataclass(frozen=True)
class Dense:
    """A product with a matrix."""

    operand: int  # which operand enters the layer
    kernel_axes: Axes  # of stacks, inputs, outputs
    input_axes: Axes  # of stacks, positions, inputs
    output_axes: Axes  # of stacks, positions, outputs
    kind = "dense"

    def kernel(self, view: View) -> View:
        return grouped(view, *self.kernel_axes)

    def inputs(self, operand: jax.Array) -> jax.Array:
        return grouped(operand, *self.input_axes)

    def outputs(self, values: Any) -> Any:
        return grouped(values, *self.output_axes)

    def enters(self, operands: Sequence[Any]) -> jax.Array:
        """What `inputs` takes, of the operation's operands."""
        return operands[self.operand]

    def returns(self, zero: jax.Array, operands: Sequence[Any]) -> jax.Array:
        """What is added to the output, so that what `outputs` takes returns to it."""
        return zero

    def entered(self, view: View) -> View:
        """Of the operand, as a view of what `enters` makes of it."""
        return view


@dataclasses.dataclass(frozen=True)
class Convolved(Dense):
    """A convolution: the product of patches of the input with a matrix.

    Its axes are those after the axis of features is split into groups and features.
    """

    convolution: Convolution
    kernel_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    kind = "convolution"

    def kernel(self, view: View) -> View:
        convolution = self.convolution
        features = convolution.kernel_spec[0]
        return super().kernel(_split(view, features, convolution.feature_groups))

    def inputs(self, operand: jax.Array) -> jax.Array:
        """Patches in the order of the kernel's axes."""
        groups = self.convolution.feature_groups
        return super().inputs(_split(self._windows(operand), 1, groups))

    def outputs(self, values: Any) -> Any:
        convolution = self.convolution
        features = convolution.output_spec[1]
        return super().outputs(_split(values, features, convolution.feature_groups))

    def _windows(self, images: jax.Array) -> jax.Array:
        """`(batch, features, out, window, out, window, ...)`, by slices: exact copies.

        Along one axis of space, entry (o, j) is the padded image's at
        `o * stride + j * dilation`.
        """
        convolution = self.convolution
        images = images.transpose(convolution.input_spec)
        padding = zip(convolution.padding, convolution.input_dilation, strict=True)
        config = [(low, high, dilation - 1) for (low, high), dilation in padding]
        zero = jnp.zeros((), images.dtype)
        images = jax.lax.pad(images, zero, [(0, 0, 0), (0, 0, 0), *config])
        for i, stride in enumerate(convolution.strides):
            axis, dilation = 2 + 2 * i, convolution.kernel_dilation[i]
            size = self.output_shape[convolution.output_spec[2 + i]]
            window = self.kernel_shape[convolution.kernel_spec[2 + i]]
            span = (size - 1) * stride + 1
            starts = [j * dilation for j in range(window)]
            slices = [
                jax.lax.slice_in_dim(images, start, start + span, stride, axis)
                for start in starts
            ]
            images = jnp.stack(slices, axis + 1)
        return images


@dataclasses.dataclass(frozen=True)
class Embedding(Dense):
    """Rows of a table, looked up by their ids."""

    gather: Gather
    num_ids: int
    place: int  # of the ids, in the vectors of indices
    kind = "embedding"

    def inputs(self, operand: jax.Array) -> jax.Array:
        """Ids `(K, T)`, int32; the number of rows for an id that the gather drops."""
        ids = self._ids(operand)
        if self.gather.clips:
            ids = jnp.clip(ids, 0, self.num_ids - 1)
        else:
            end = jnp.asarray(self.num_ids, ids.dtype)
            ids = jnp.where(self._in_bounds(ids), ids, end)
        return super().inputs(ids.astype(jnp.int32))

    def returns(self, zero: jax.Array, operands: Sequence[Any]) -> jax.Array:
        """Nothing from ids out of bounds, whose outputs no row determines."""
        if self.gather.clips:
            return zero
        in_bounds = self._in_bounds(self._ids(operands[self.operand]))
        in_bounds = jnp.expand_dims(in_bounds, self.gather.offset_dims)
        return jnp.where(in_bounds, zero, jnp.zeros_like(zero))

    def _in_bounds(self, ids: jax.Array) -> jax.Array:
        return (ids >= 0) & (ids < self.num_ids)

    def _ids(self, operand: jax.Array) -> jax.Array:
        ids = operand[..., self.place]
        # the number of rows may not fit the type of the ids
        return ids.astype(jnp.int32) if ids.dtype.itemsize < 4 else ids


@dataclasses.dataclass(frozen=True)
class Experts(Dense):
    """Each row meets one of K matrices: in order, so many rows for each of them.

    What enters a kernel is zero at the rows of others. What returns is that of all
    rows, so that their mean stands for each kernel, however many rows it has.
    """

    num_experts: int
    kind = "experts"

    def enters(self, operands: Sequence[Any]) -> jax.Array:
        rows, _, sizes = operands
        ends = jnp.cumsum(sizes)[:, None, None]
        places = jnp.arange(rows.shape[0], dtype=ends.dtype)[None, :, None]
        own = (places < ends) & (places >= ends - sizes[:, None, None])
        return jnp.where(own, rows[None], jnp.zeros_like(rows[None]))

    def entered(self, view: View) -> View:
        return view.broadcast((self.num_experts, *view.shape), (1, 2))

    def outputs(self, values: Any) -> Any:
        shape = self.num_experts, *values.shape
        if isinstance(values, View):
            return values.broadcast(shape, (1, 2))
        return jnp.broadcast_to(values[None], shape)


def match(equation: Equation, place: int) -> Dense:
    """The linear layer of the parameter at `place` among the equation's operands.

    Raises:
      NotLinear: with the reason, where it is none.
    """
    match equation.operation:
        case Dot() as dot:
            return _dense(dot, equation, place)
        case Convolution() as convolution:
            return _convolved(convolution, equation, place)
        case Gather() as gather:
            return _embedding(gather, equation, place)
        case Ragged() if place == 1:
            axes = (0,), (1,), (2,)
            return Experts(0, axes, axes, (), equation.inputs[1].shape[0])
    raise NotLinear(f"used in {equation.name}")


def _dense(dot: Dot, equation: Equation, place: int) -> Dense:
    other = 1 - place
    # in the order of the kernel's own axes, which makes its layout a plain reshape
    pairs = zip(dot.contracting[place], dot.contracting[other], strict=True)
    contracted = tuple(zip(*sorted(pairs), strict=True)) or ((), ())
    stacks = dot.batch[place], dot.batch[other]
    ndims = [len(equation.inputs[i].shape) for i in (place, other)]
    free = [others(ndims[i], stacks[i], contracted[i]) for i in (0, 1)]
    # the output's axes: stacks, free ones of the left, free ones of the right
    axes = range(len(equation.outputs[0].shape))
    start, count = len(stacks[0]), len(free[0])
    first = start if place == 0 else len(axes) - count
    features = tuple(axes[first : first + count])
    of_stacks = tuple(axes[:start])
    return Dense(
        operand=other,
        kernel_axes=(stacks[0], contracted[0], free[0]),
        input_axes=(stacks[1], free[1], contracted[1]),
        output_axes=(of_stacks, others(len(axes), of_stacks, features), features),
    )


def _convolved(convolution: Convolution, equation: Equation, place: int) -> Convolved:
    if place != 1:
        raise NotLinear("convolved as an image")
    if convolution.batch_groups != 1:
        raise NotLinear("used in a convolution with groups of the batch")
    kernel_shape, output_shape = equation.inputs[1].shape, equation.outputs[0].shape
    outputs, features, *space = convolution.kernel_spec
    # the order of the kernel's own axes makes its layout a plain reshape
    inputs = others(len(kernel_shape) + 1, (outputs, outputs + 1))
    # windows are (batch, groups, features, out, window, out, window, ...)
    place_of = {features: 2} | {axis: 4 + 2 * i for i, axis in enumerate(space)}
    out = (0, *(3 + 2 * i for i in range(len(space))))
    batch, channels, *pixels = convolution.output_spec
    positions = tuple(i + (i > channels) for i in (batch, *pixels))
    return Convolved(
        operand=0,
        kernel_axes=((outputs,), inputs, (outputs + 1,)),
        input_axes=((1,), out, tuple(place_of[i] for i in sorted(place_of))),
        output_axes=((channels,), positions, (channels + 1,)),
        convolution=convolution,
        kernel_shape=kernel_shape,
        output_shape=output_shape,
    )


def _embedding(gather: Gather, equation: Equation, place: int) -> Embedding:
    shape, ndim = equation.inputs[0].shape, len(equation.outputs[0].shape)
    named, stacks = gather.index_map, gather.batch_dims
    # what is taken whole has no choice, if the index may be moved
    free = [i for i in named if not gather.clips or gather.slice_sizes[i] < shape[i]]
    rows = tuple(free or named[:1])
    whole_rows = tuple(1 if i in rows + stacks else n for i, n in enumerate(shape))
    if (
        place != 0
        or len(rows) != 1
        or gather.collapsed_dims not in ((), rows)
        or gather.slice_sizes != whole_rows
    ):
        raise NotLinear("looked up by more than the ids of whole rows")
    # the output has the ids' axes in order, and between them those of the rows
    looked_up = others(ndim, gather.offset_dims)
    features = gather.offset_dims
    if not gather.collapsed_dims:  # an axis of one id, beside those of its row
        one = others(len(shape), stacks).index(rows[0])
        features = features[:one] + features[one + 1 :]
    of_stacks = tuple(looked_up[i] for i in gather.index_batch_dims)
    return Embedding(
        operand=1,
        kernel_axes=(stacks, rows, others(len(shape), stacks, rows)),
        input_axes=(
            gather.index_batch_dims,
            others(len(looked_up), gather.index_batch_dims),
        ),
        output_axes=(
            of_stacks,
            others(ndim, features, of_stacks),
            features,
        ),
        gather=gather,
        num_ids=shape[rows[0]],
        place=named.index(rows[0]),
    )
