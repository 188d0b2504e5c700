"""Parts along one axis: slices of a parameter, and its place in a concatenation."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fisherflow_jax.layers._views import NotStrided, View, length, whole


class Part(NamedTuple):
    """What is used of an axis `(outer, size, inner)` of a kernel, or of an operation.

    Of the kernel, where the operation uses a slice of it; of the operation, where the
    kernel is one of several that were concatenated.
    """

    axis: int  # of (K, I, O)
    size: int
    start: int
    taken: int
    inner: int
    joined: bool

    def moved(self, values: jax.Array, axis: int) -> jax.Array:
        """From what an operation has along this axis to what the kernel has."""
        axis, shape = axis % values.ndim, list(values.shape)
        size = self.size if self.joined else self.taken
        shape[axis : axis + 1] = [shape[axis] // (size * self.inner), size, self.inner]
        values = values.reshape(shape)
        if self.joined:
            end = self.start + self.taken
            values = jax.lax.slice_in_dim(values, self.start, end, axis=axis + 1)
        else:
            edges = [(0, 0, 0)] * values.ndim
            edges[axis + 1] = self.start, self.size - self.start - self.taken, 0
            values = jax.lax.pad(values, jnp.zeros((), values.dtype), edges)
        shape = list(values.shape)
        shape[axis : axis + 3] = [math.prod(shape[axis : axis + 3])]
        return values.reshape(shape)

    def is_beside(self, other: "Part") -> bool:
        """Whether both are slices along one axis, and have nothing in common."""
        same = self._replace(start=0, taken=0) == other._replace(start=0, taken=0)
        first, last = sorted((self, other), key=lambda part: part.start)
        apart = first.start + first.taken <= last.start
        return not self.joined and same and apart


class Box(NamedTuple):
    """The entries of a leaf at `start` and after, at this stride; or a leaf's place.

    Which is a place in an array that is larger by what was concatenated, and of which
    the parameter's view then is. `inner` is the part's own view of its leaf.
    """

    stride: int
    size: int
    start: int
    taken: int
    inner: View | None = None

    def placed(self, view: View) -> tuple[View, Part]:
        """The kernel's whole view, and where the part is in it or it in the operation.

        Raises:
          NotStrided: where the part's axis was cut on the way.
        """
        return self._of_slice(view) if self.inner is None else self._of_join(view)

    def _of_slice(self, view: View) -> tuple[View, Part]:
        view = View(view.leaf_shape, view.axes, view.offset - self.start * self.stride)
        axes = [list(axis) for axis in view.axes]
        if self.taken == 1:  # an index picks one of stacked kernels
            inner = length(view.axes[0])
            axes[0].insert(0, (self.size, self.stride))
            part = Part(0, self.size, self.start, 1, inner, False)
            return view.with_axes(axes), part
        for i, axis in enumerate(axes):
            for j, (size, stride) in enumerate(axis):
                # the slice, and finer pieces that go on where it ends
                if size * stride != self.taken * self.stride or self.stride % stride:
                    continue
                inner = self.stride // stride
                axis[j] = self.size * inner, stride
                inner *= length(tuple(axis[j + 1 :]))
                part = Part(i, self.size, self.start, self.taken, inner, False)
                return view.with_axes(axes), part
        raise NotStrided

    def _of_join(self, view: View) -> tuple[View, Part]:
        part, axes, end = None, [], self.size * self.stride

        def shrunk(stride: int) -> int:
            return stride // self.size * self.taken if stride >= end else stride

        for i, axis in enumerate(view.axes):
            pieces: list[tuple[int, int]] = []
            for j, (size, stride) in enumerate(axis):
                if stride <= self.stride and size * stride >= end:
                    if self.stride % stride or size * stride % end:
                        raise NotStrided
                    inner, outer = self.stride // stride, size * stride // end
                    new = self.taken * self.stride
                    pieces += (outer, new), (self.taken, self.stride), (inner, stride)
                    inner *= length(axis[j + 1 :])
                    part = Part(i, self.size, self.start, self.taken, inner, True)
                else:
                    pieces.append((size, shrunk(stride)))
            axes.append(pieces)
        if part is None or self.inner is None or view.offset:
            raise NotStrided
        return view.with_axes(axes).within(self.inner), part


def sliced(view: View, axis: int, start: int, stop: int) -> tuple[View, Box]:
    """
    Raises:
      NotStrided: where the slice is none of one piece of the axis.
    """
    (size, stride), *finer = view.axes[axis] or ((1, 0),)
    inner = length(tuple(finer))
    if start % inner or stop % inner or stride <= 0 or start == stop:
        raise NotStrided
    start, count = start // inner, (stop - start) // inner
    axes = list(view.axes)
    axes[axis] = ((count, stride), *finer)
    cut = view.with_axes(axes)
    cut = View(cut.leaf_shape, cut.axes, cut.offset + start * stride)
    return cut, Box(stride, size, start, count)


def joined(
    view: View, stacks: Sequence[int], shape: Sequence[int], axis: int, start: int
) -> tuple[View, Box]:
    """A view `(*stacks, *shape)` of the concatenation that a view begins at `start`."""
    around = len(stacks)
    stride, count = math.prod(shape[axis + 1 :]), view.shape[around + axis]
    box = Box(stride, shape[axis], start, count, view)
    return whole((*stacks, *shape)), box
