"""What is known of a model's linear layers: plain numbers, fit to be static."""

import dataclasses
from typing import Any

import jax

from fisherflow_jax.layers._inputs import Shapes
from fisherflow_jax.layers._table import table
from fisherflow_jax.layers._views import View


@dataclasses.dataclass(frozen=True)
class Layer:
    r"""A kernel, and perhaps its bias, that act on T positions of each example.

    With inputs `a` of shape (K, T, I) and gradients `g` at its outputs, (K, T, O), the
    gradient of the kernel is `kernel_layout.to_leaf(einsum("kti,kto->kio", a, g))` and
    that of the bias `bias_layout.to_leaf(sum_t g)`.
    """

    kernel: int  # index of the leaf
    bias: int | None
    kind: str  # "dense", "convolution" or "embedding", whose inputs are ids (K, T)
    num_stacked: int  # K: kernels in one leaf (experts, scanned layers, groups)
    num_positions: int  # T: tokens, pixels, steps and several uses, together
    num_inputs: int  # I
    num_outputs: int  # O
    kernel_layout: View  # (K, I, O) <-> the kernel's leaf
    bias_layout: View | None  # (K, O) <-> the bias's leaf
    # Where it is used says nothing of what it is: models that differ in it are equal.
    uses: tuple[tuple[int, ...], ...] = dataclasses.field(compare=False)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Layers:
    """The linear layers of a model, and the parameters that belong to none.

    Every leaf of the parameters is the kernel of one layer, the bias of one, or in
    `fallback`. Hashable, and a static node of pytrees. `str` makes a table.
    """

    layers: tuple[Layer, ...]
    fallback: tuple[tuple[int, str], ...]  # (leaf, reason)
    names: tuple[str, ...]  # of all leaves
    shapes: tuple[tuple[int, ...], ...]  # of all leaves
    tree: Any  # the parameters' jax.tree.structure
    batched: bool = False  # the model is run on whole batches
    together: str | None = None  # what takes examples together, as far as was looked
    summed: tuple[int, ...] = ()  # leaves squared once for a whole batch
    # Of one example. Models that differ only in it have the same informations.
    input_shapes: Shapes = dataclasses.field(default=(), compare=False)

    def __str__(self) -> str:
        return table(self)
