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

from fisherflow_jax.layers._compat import Convolution, Dot, Equation, Gather
from fisherflow_jax.layers._views import View


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


def _others(ndim: int, *used: Sequence[int]) -> tuple[int, ...]:
    return tuple(i for i in range(ndim) if not any(i in group for group in used))


@dataclasses.dataclass(frozen=True)
class Dense:
    """A product with a matrix."""

    operand: int  # which operand enters the layer
    kernel_axes: tuple  # of stacks, inputs, outputs
    operand_axes: tuple  # of stacks, positions, inputs
    output_axes: tuple  # of stacks, positions, outputs
    kind = "dense"

    def kernel(self, view: View) -> View:
        return grouped(view, *self.kernel_axes)

    def inputs(self, operand: jax.Array) -> jax.Array:
        return grouped(operand, *self.operand_axes)

    def outputs(self, values: Any) -> Any:
        return grouped(values, *self.output_axes)

    def counts(self, operand: jax.Array) -> None:
        """Which outputs depend on the kernel; None: all."""


@dataclasses.dataclass(frozen=True)
class Convolved:
    """A convolution: the product of patches of the input with a matrix."""

    convolution: Convolution
    kernel_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    operand = 0
    kind = "convolution"

    def kernel(self, view: View) -> View:
        features = self.convolution.kernel_spec[0]
        view = _split(view, features, self.convolution.feature_groups)
        pair = (features,), (features + 1,)
        # the order of the kernel's own axes makes its layout a plain reshape
        return grouped(view, pair[0], _others(len(view.shape), *pair), pair[1])

    def inputs(self, operand: jax.Array) -> jax.Array:
        """Patches in the order of the kernel's axes."""
        convolution = self.convolution
        windows = _windows(operand, convolution, self.kernel_shape, self.output_shape)
        windows = _split(windows, 1, convolution.feature_groups)
        # now (batch, groups, features, out, window, out, window, ...)
        _, features, *space = convolution.kernel_spec
        place = {features: 2} | {axis: 4 + 2 * i for i, axis in enumerate(space)}
        positions = (0, *(3 + 2 * i for i in range(len(space))))
        return grouped(windows, (1,), positions, [place[i] for i in sorted(place)])

    def outputs(self, values: Any) -> Any:
        batch, features, *space = self.convolution.output_spec
        values = _split(values, features, self.convolution.feature_groups)
        positions = [i + (i > features) for i in (batch, *space)]
        return grouped(values, (features,), positions, (features + 1,))

    def counts(self, operand: jax.Array) -> None:
        """Which outputs depend on the kernel; None: all."""


@dataclasses.dataclass(frozen=True)
class Embedding:
    """Rows of a table, looked up by their ids."""

    gather: Gather
    kernel_shape: tuple[int, ...]
    num_ids: int
    operand = 1
    kind = "embedding"

    def kernel(self, view: View) -> View:
        stacks, rows = self.gather.batch_dims, self.gather.index_map
        outputs = _others(len(self.kernel_shape), stacks, rows)
        return grouped(view, stacks, rows, outputs)

    def inputs(self, operand: jax.Array) -> jax.Array:
        """Ids `(K, T)`, int32; the number of rows for an id that the gather drops."""
        ids = _ids(operand)
        if self.gather.clips:
            ids = jnp.clip(ids, 0, self.num_ids - 1)
        else:
            end = jnp.asarray(self.num_ids, ids.dtype)
            ids = jnp.where(self._in_bounds(operand), ids, end)
        stacks = self.gather.index_batch_dims
        return grouped(ids.astype(jnp.int32), stacks, _others(ids.ndim, stacks))

    def outputs(self, values: Any) -> Any:
        looked_up = _others(len(values.shape), self.gather.offset_dims)
        stacks = [looked_up[i] for i in self.gather.index_batch_dims]
        return grouped(
            values,
            stacks,
            _others(len(values.shape), self.gather.offset_dims, stacks),
            self.gather.offset_dims,
        )

    def counts(self, operand: jax.Array) -> jax.Array | None:
        """Which outputs depend on the kernel; None: all."""
        if self.gather.clips:
            return None
        return jnp.expand_dims(self._in_bounds(operand), self.gather.offset_dims)

    def _in_bounds(self, operand: jax.Array) -> jax.Array:
        ids = _ids(operand)
        return (ids >= 0) & (ids < self.num_ids)


def _ids(operand: jax.Array) -> jax.Array:
    ids = operand[..., 0]
    # the number of rows may not fit the type of the ids
    return ids.astype(jnp.int32) if ids.dtype.itemsize < 4 else ids


Linear = Dense | Convolved | Embedding


def match(equation: Equation, place: int) -> Linear:
    """The linear layer of the parameter at `place` among the equation's operands.

    Raises:
      NotLinear: with the reason, where it is none.
    """
    operation = equation.operation
    if isinstance(operation, Dot):
        return _dense(operation, equation, place)
    if isinstance(operation, Convolution):
        return _convolved(operation, equation, place)
    if isinstance(operation, Gather):
        return _embedding(operation, equation, place)
    raise NotLinear(f"used in {equation.name}")


def _dense(dot: Dot, equation: Equation, place: int) -> Dense:
    other = 1 - place
    # in the order of the kernel's own axes, which makes its layout a plain reshape
    pairs = zip(dot.contracting[place], dot.contracting[other], strict=True)
    contracted = tuple(zip(*sorted(pairs), strict=True)) or ((), ())
    stacks = dot.batch[place], dot.batch[other]
    ndims = [len(equation.inputs[i].shape) for i in (place, other)]
    free = [_others(ndims[i], stacks[i], contracted[i]) for i in (0, 1)]
    # the output's axes: stacks, free ones of the left, free ones of the right
    start = len(stacks[0])
    sides = [len(free[0]), len(free[1])] if place == 0 else [len(free[1]), len(free[0])]
    left = tuple(range(start, start + sides[0]))
    right = tuple(range(start + sides[0], start + sum(sides)))
    shared, features = (right, left) if place == 0 else (left, right)
    return Dense(
        other,
        (stacks[0], contracted[0], free[0]),
        (stacks[1], free[1], contracted[1]),
        (tuple(range(start)), shared, features),
    )


def _convolved(convolution: Convolution, equation: Equation, place: int) -> Convolved:
    if place != 1:
        raise NotLinear("convolved as an image")
    if convolution.batch_groups != 1:
        raise NotLinear("used in a convolution with groups of the batch")
    return Convolved(convolution, equation.inputs[1].shape, equation.outputs[0].shape)


def _embedding(gather: Gather, equation: Equation, place: int) -> Embedding:
    shape = equation.inputs[0].shape
    rows = gather.index_map
    taken = (*rows, *gather.batch_dims)
    whole_rows = tuple(1 if i in taken else n for i, n in enumerate(shape))
    if (
        place != 0
        or len(rows) != 1
        or gather.collapsed_dims != rows
        or gather.slice_sizes != whole_rows
    ):
        raise NotLinear("looked up by more than the ids of whole rows")
    return Embedding(gather, shape, shape[rows[0]])


def _windows(
    images: jax.Array,
    convolution: Convolution,
    kernel_shape: tuple[int, ...],
    output_shape: tuple[int, ...],
) -> jax.Array:
    """`(batch, features, out, window, out, window, ...)`, by slices: exact copies."""
    images = images.transpose(convolution.input_spec)
    padding = zip(convolution.padding, convolution.input_dilation, strict=True)
    config = [(low, high, dilation - 1) for (low, high), dilation in padding]
    images = jax.lax.pad(
        images, jnp.zeros((), images.dtype), [(0, 0, 0), (0, 0, 0), *config]
    )
    for i, (stride, dilation) in enumerate(
        zip(convolution.strides, convolution.kernel_dilation, strict=True)
    ):
        axis = 2 + 2 * i
        window = kernel_shape[convolution.kernel_spec[2 + i]]
        span = (output_shape[convolution.output_spec[2 + i]] - 1) * stride + 1
        slices = [
            jax.lax.slice_in_dim(
                images, j * dilation, j * dilation + span, stride, axis
            )
            for j in range(window)
        ]
        images = jnp.stack(slices, axis + 1)
    return images
