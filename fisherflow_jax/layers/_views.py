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
    def pieces(self) -> Axis:
        return tuple(piece for axis in self.axes for piece in axis)

    @property
    def is_bijection(self) -> bool:
        """Whether every entry of the leaf is seen exactly once."""
        once = all(stride != 0 for _, stride in self.pieces)
        return once and math.prod(self.shape) == math.prod(self.leaf_shape)

    def with_axes(self, axes: Iterable[Iterable[tuple[int, int]]]) -> "View":
        """Another view of the same leaf, from the same offset."""
        return View(self.leaf_shape, tuple(map(merged, axes)), self.offset)

    def transpose(self, permutation: Iterable[int]) -> "View":
        return self.with_axes(self.axes[i] for i in permutation)

    def reshape(self, shape: Sequence[int]) -> "View":
        """
        Raises:
          NotStrided: where an axis would be cut across its pieces.
        """
        axes, rest = [], list(self.pieces)
        for size in reversed(shape):
            cut = [(size, 1)] if size != 1 else []
            axes.append([(n, stride) for n, stride, _ in common_pieces(rest, cut)])
            if cut:
                raise NotStrided
        return self.with_axes(reversed(axes))

    def squeeze(self, dimensions: Sequence[int]) -> "View":
        kept = (axis for i, axis in enumerate(self.axes) if i not in dimensions)
        return self.with_axes(kept)

    def expand_dims(self, dimensions: Sequence[int]) -> "View":
        rest = iter(self.axes)
        count = len(self.axes) + len(dimensions)
        return self.with_axes(
            () if i in dimensions else next(rest) for i in range(count)
        )

    def tile(self, repeats: Sequence[int]) -> "View":
        every = zip(repeats, self.axes, strict=True)
        return self.with_axes(((count, 0), *axis) for count, axis in every)

    def flip(self, dimensions: Sequence[int]) -> "View":
        axes, offset = list(self.axes), self.offset
        for i in dimensions:  # from the entry that was the axis's last
            offset += sum((size - 1) * stride for size, stride in axes[i])
            axes[i] = tuple((size, -stride) for size, stride in axes[i])
        return View(self.leaf_shape, tuple(axes), offset)

    def broadcast(self, shape: Sequence[int], dimensions: Sequence[int]) -> "View":
        """As `lax.broadcast_in_dim`: old axis i becomes axis `dimensions[i]`."""
        axes: list[Axis] = [((size, 0),) for size in shape]
        for axis, dimension in zip(self.axes, dimensions, strict=True):
            if length(axis) == shape[dimension]:
                axes[dimension] = axis
        return self.with_axes(axes)

    def within(self, inner: "View") -> "View":
        """This view of an array, of the leaf whose view `inner` the array is.

        Raises:
          NotStrided: where the pieces of the two do not fit each other.
        """
        steps, step = [], 1  # of the array's pieces, the fastest first
        for size, stride in reversed(inner.pieces):
            steps.append((step, size, stride))
            step *= size

        def pieces(size: int, stride: int) -> Axis:
            found: list[tuple[int, int]] = []
            for step, count, of_leaf in steps:
                if size == 1 or stride >= step * count:
                    continue
                skip, rest = divmod(stride, step)
                here = min(size, count // skip) if skip else 0
                if rest or not here or count % skip or size % here:
                    raise NotStrided
                found.append((here, skip * of_leaf))
                size, stride = size // here, stride * here
            return tuple(reversed(found))

        if self.offset:
            raise NotStrided
        axes = [[x for piece in axis for x in pieces(*piece)] for axis in self.axes]
        view = inner.with_axes(axes)
        if view.shape != self.shape:
            raise NotStrided
        return view

    def to_leaf(self, values: jax.Array) -> jax.Array:
        """Values of this view's shape, as an array of the leaf's shape."""
        self._check_bijection()
        return self.in_order(values).reshape(self.leaf_shape)

    def from_leaf(self, leaf: jax.Array) -> jax.Array:
        """What this view shows of the leaf; the inverse of `to_leaf`."""
        self._check_bijection()
        sizes, flipped, order = self._moves()
        # axis k of the leaf in pieces is piece order[k]; so is piece i axis inverse[i]
        leaf = leaf.reshape([sizes[i] for i in order])
        leaf = leaf.transpose([order.index(i) for i in range(len(order))])
        leaf = jnp.flip(leaf, flipped) if flipped else leaf
        return leaf.reshape(self.shape)

    def sum_to_leaf(self, values: jax.Array) -> jax.Array:
        """Values of this view's shape, summed where it repeats an entry of the leaf."""
        repeated = tuple(i for i, (_, stride) in enumerate(self.pieces) if stride == 0)
        values = jnp.sum(values.reshape([size for size, _ in self.pieces]), repeated)
        once = self.with_axes([piece] for piece in self.pieces if piece[1] != 0)
        return once.to_leaf(values)

    def in_order(self, values: jax.Array) -> jax.Array:
        """Values of this view's shape, an axis a piece, the largest strides first.

        That is the leaf's own order, and behind it the pieces that repeat entries.
        """
        sizes, flipped, order = self._moves()
        values = values.reshape(sizes)
        values = jnp.flip(values, flipped) if flipped else values
        return values.transpose(order)

    def _moves(self) -> tuple[list[int], list[int], list[int]]:
        """Sizes of the pieces, which are flipped, and their order by stride."""
        strides = [stride for _, stride in self.pieces]
        order = sorted(range(len(strides)), key=lambda i: -abs(strides[i]))
        flipped = [i for i, stride in enumerate(strides) if stride < 0]
        return [size for size, _ in self.pieces], flipped, order

    def _check_bijection(self) -> None:
        if not self.is_bijection:
            raise ValueError(
                "only a view that shows every entry of its parameter once maps back to "
                f"it; got shape {self.shape} of a parameter of shape {self.leaf_shape}."
            )


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


def reordered(values: View, positions: View) -> View:
    """`values` in the order of the leaf of `positions`, which shows it once.

    Both are views of one shape: where `positions` shows entry p of its own leaf,
    `values` shows what the result holds at p.

    Raises:
      NotStrided: where the pieces of the two do not fit each other.
    """
    pieces, offset = [], values.offset
    for one, other in zip(values.axes, positions.axes, strict=True):
        for size, stride, position in common_pieces(list(one), list(other)):
            if position < 0:  # read the piece from its other end
                offset += (size - 1) * stride
                stride, position = -stride, -position
            pieces.append((position, size, stride))
    pieces.sort(key=lambda piece: -piece[0])
    axis = merged((size, stride) for _, size, stride in pieces)
    return View(values.leaf_shape, (axis,), offset).reshape(positions.leaf_shape)


def common_pieces(one: list, other: list) -> list[tuple[int, int, int]]:
    """Pieces `(size, stride of one, stride of other)` that both describe.

    Taken off their ends, until one is empty: the last `size` entries of a piece
    (count, stride) are (size, stride), and (count / size, stride * size) is left of it.
    """
    pieces = []
    while one and other:
        size = math.gcd(one[-1][0], other[-1][0])
        if size not in (one[-1][0], other[-1][0]):
            raise NotStrided
        strides = []
        for rest in (one, other):
            count, stride = rest.pop()
            if count != size:
                rest.append((count // size, stride * size))
            strides.append(stride)
        pieces.append((size, strides[0], strides[1]))
    return pieces[::-1]
