"""Views of a parameter as strided layouts, moved by the shape operations of arrays.

What a chain of transpose, reshape, flip, broadcast and squeeze makes of a parameter is
kept as numbers: a size and a stride for each piece of each axis. A view therefore costs
nothing for a parameter of any size, is hashable, and turns arrays into the parameter's
own shape, and back, exactly.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp

Axis = tuple[tuple[int, int], ...]  # (size, stride) pieces, the slowest first


class NotStrided(Exception):
    """A shape operation whose result no list of sizes and strides describes."""


@dataclasses.dataclass(frozen=True)
class View:
    """An array whose entries are entries of a flat leaf of shape `leaf_shape`.

    The entry at an index is the leaf's at `offset` plus the sum of stride times index
    over the pieces; stride 0 is a broadcast, a negative stride a flip.
    """

    leaf_shape: tuple[int, ...]
    axes: tuple[Axis, ...]
    offset: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(length(axis) for axis in self.axes)

    @property
    def is_bijection(self) -> bool:
        """Whether every entry of the leaf is seen exactly once."""
        return math.prod(self.shape) == math.prod(self.leaf_shape) and not any(
            stride == 0 for axis in self.axes for _, stride in axis
        )

    def transpose(self, permutation: Iterable[int]) -> "View":
        return self._with(self.axes[i] for i in permutation)

    def reshape(self, shape: Sequence[int]) -> "View":
        """
        Raises:
          NotStrided: where an axis would be cut across its pieces.
        """
        pieces = [piece for axis in self.axes for piece in axis]
        axes = []
        for size in shape:
            axis, pieces = _take(pieces, size)
            axes.append(axis)
        return self._with(axes)

    def squeeze(self, dimensions: Sequence[int]) -> "View":
        kept = (axis for i, axis in enumerate(self.axes) if i not in dimensions)
        return self._with(kept)

    def expand_dims(self, dimensions: Sequence[int]) -> "View":
        rest = iter(self.axes)
        count = len(self.axes) + len(dimensions)
        return self._with(() if i in dimensions else next(rest) for i in range(count))

    def flip(self, dimensions: Sequence[int]) -> "View":
        flipped = [axis for i, axis in enumerate(self.axes) if i in dimensions]
        ends = sum((size - 1) * stride for axis in flipped for size, stride in axis)
        axes = (
            tuple((size, -stride) for size, stride in axis) if i in dimensions else axis
            for i, axis in enumerate(self.axes)
        )
        return dataclasses.replace(self._with(axes), offset=self.offset + ends)

    def broadcast(self, shape: Sequence[int], dimensions: Sequence[int]) -> "View":
        """As `lax.broadcast_in_dim`: old axis i becomes axis `dimensions[i]`."""
        axes: list[Axis] = [((size, 0),) for size in shape]
        for axis, dimension in zip(self.axes, dimensions, strict=True):
            if length(axis) == shape[dimension]:
                axes[dimension] = axis
        return self._with(axes)

    def to_leaf(self, values: jax.Array) -> jax.Array:
        """Values of this view's shape, as an array of the leaf's shape."""
        pieces, order = self._pieces()
        values = values.reshape([size for size, _ in pieces])
        values = jnp.flip(values, self._flipped(pieces)).transpose(order)
        return values.reshape(self.leaf_shape)

    def from_leaf(self, leaf: jax.Array) -> jax.Array:
        """What this view shows of the leaf; the inverse of `to_leaf`."""
        pieces, order = self._pieces()
        leaf = leaf.reshape([pieces[i][0] for i in order])
        leaf = leaf.transpose([order.index(i) for i in range(len(order))])
        return jnp.flip(leaf, self._flipped(pieces)).reshape(self.shape)

    def sum_to_leaf(self, values: jax.Array) -> jax.Array:
        """Values of this view's shape, summed where it repeats an entry of the leaf."""
        pieces = [piece for axis in self.axes for piece in axis]
        repeated = tuple(i for i, (_, stride) in enumerate(pieces) if stride == 0)
        values = jnp.sum(values.reshape([size for size, _ in pieces]), repeated)
        kept = (merged([piece]) for piece in pieces if piece[1] != 0)
        once = View(self.leaf_shape, tuple(kept), self.offset)
        return once.to_leaf(values)

    def _pieces(self) -> tuple[list[tuple[int, int]], list[int]]:
        if not self.is_bijection:
            raise ValueError(
                "only a view that shows every entry of its parameter once maps back to "
                f"it; got shape {self.shape} of a parameter of shape {self.leaf_shape}."
            )
        pieces = [piece for axis in self.axes for piece in axis]
        order = sorted(range(len(pieces)), key=lambda i: -abs(pieces[i][1]))
        return pieces, order

    @staticmethod
    def _flipped(pieces: list[tuple[int, int]]) -> list[int]:
        return [i for i, (_, stride) in enumerate(pieces) if stride < 0]

    def _with(self, axes: Iterable[Axis]) -> "View":
        return View(self.leaf_shape, tuple(map(merged, axes)), self.offset)


def whole(shape: Sequence[int]) -> View:
    """The view that shows a leaf as it is."""
    strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    axes = tuple(merged((piece,)) for piece in zip(shape, strides, strict=True))
    return View(tuple(shape), axes)


def length(axis: Axis) -> int:
    return math.prod(size for size, _ in axis)


def is_repeated(axis: Axis) -> bool:
    """Whether all entries along an axis are one and the same."""
    return all(stride == 0 for _, stride in axis)


def merged(axis: Iterable[tuple[int, int]]) -> Axis:
    """The same axis in the fewest pieces, so that equal views compare equal."""
    pieces: list[tuple[int, int]] = []
    for size, stride in axis:
        if size == 1:
            continue
        if pieces and pieces[-1][1] == size * stride:
            size *= pieces.pop()[0]
        pieces.append((size, stride))
    return tuple(pieces)


def _take(
    pieces: list[tuple[int, int]], size: int
) -> tuple[Axis, list[tuple[int, int]]]:
    """Splits pieces of `size` entries together off the front."""
    taken, rest = [], list(pieces)
    while size > 1:
        if not rest:
            raise NotStrided
        (count, stride), *rest = rest
        if size % count == 0:
            taken.append((count, stride))
            size //= count
        elif count % size == 0:
            taken.append((size, stride * (count // size)))
            rest = [(count // size, stride), *rest]
            size = 1
        else:
            raise NotStrided
    return tuple(taken), rest


def reordered(values: View, positions: View) -> View:
    """`values` in the order of the leaf of `positions`, which shows it once.

    Both are views of one shape: where `positions` shows entry p of its own leaf,
    `values` shows what the result holds at p.

    Raises:
      NotStrided: where the pieces of the two do not fit each other.
    """
    pieces = []
    for one, other in zip(values.axes, positions.axes, strict=True):
        pieces += _common_pieces(one, other)
    offset = values.offset
    for i, (size, stride, position) in enumerate(pieces):
        if position < 0:
            offset += (size - 1) * stride
            pieces[i] = (size, -stride, -position)
    pieces.sort(key=lambda piece: -piece[2])
    axis = merged((size, stride) for size, stride, _ in pieces)
    return View(values.leaf_shape, (axis,), offset).reshape(positions.leaf_shape)


def _common_pieces(one: Axis, other: Axis) -> list[tuple[int, int, int]]:
    """Pieces `(size, stride of one, stride of other)` of an axis that both describe."""
    rest_of_one, rest_of_other, pieces = list(one), list(other), []
    while rest_of_one:
        size = math.gcd(rest_of_one[-1][0], rest_of_other[-1][0])
        if size not in (rest_of_one[-1][0], rest_of_other[-1][0]):
            raise NotStrided
        strides = []
        for rest in (rest_of_one, rest_of_other):
            count, stride = rest.pop()
            if count > size:
                rest.append((count // size, stride * size))
            strides.append(stride)
        pieces.append((size, strides[0], strides[1]))
    return pieces[::-1]
