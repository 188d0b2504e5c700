"""What is known of a model's linear layers: plain numbers, fit to be static."""

import contextlib
import dataclasses
import functools
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from fisherflow_jax._ground import batch as batches
from fisherflow_jax._ground import tables, trees
from fisherflow_jax.layers._views import View

PyTree = Any
Shapes = tuple[tuple[str, tuple[int, ...]], ...]  # of each array: its name and shape


@dataclasses.dataclass(frozen=True)
class Layer:
    r"""A kernel, and perhaps its bias, that act on T positions of each example.

    Made by `ff.layers.find_layers`.

    With inputs `a` of shape (K, T, I) and gradients `g` at its outputs, (K, T, O), the
    gradient of the kernel is `kernel_layout.to_leaf(einsum("kti,kto->kio", a, g))` and
    that of the bias `bias_layout.to_leaf(sum_t g)`. Where a layer is tied, its kernel's
    transpose takes inputs `h`, (K, T', O), to outputs with gradients `d`, (K, T', I):
    `einsum("kti,kto->kio", d, h)` is added.
    """

    kernel: int  # index of the leaf
    bias: int | None
    # "dense", "convolution", "experts", whose inputs are zero at rows of others, or
    # "embedding", whose inputs are ids (K, T)
    kind: str
    num_stacked: int  # K: kernels in one leaf (experts, scanned layers, groups)
    num_positions: int  # T: tokens, pixels, steps and several uses, together
    num_inputs: int  # I
    num_outputs: int  # O
    kernel_layout: View  # (K, I, O) <-> the kernel's leaf
    bias_layout: View | None  # (K, O) <-> the bias's leaf
    num_turned: int  # T': positions at which the kernel's transpose is used
    mixed: bool  # of a whole batch: whether its n T rows are those of no one example
    # Where it is used says nothing of what it is: models that differ in it are equal.
    uses: tuple[tuple[int, ...], ...] = dataclasses.field(compare=False)

    @property
    def treatment(self) -> str:
        """In words."""
        tied = ", tied" if self.num_turned else ""
        return f"{self.kind}{tied}{', mixed rows' if self.mixed else ''}"


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Layers:
    """The linear layers of a model, and the parameters that belong to none.

    Made by `ff.layers.find_layers`.

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
    # what says that examples are run one by one, where the program does not show it
    row_by_row: str | None = None
    summed: tuple[int, ...] = ()  # leaves squared once for a whole batch
    apart: bool = False  # what is kept of layers that are alike is not stacked
    entered: tuple[tuple[int, ...], ...] = ()  # kernels that one array enters
    # Of one example. Models that differ only in it have the same informations.
    input_shapes: Shapes = dataclasses.field(default=(), compare=False)

    told_as: ClassVar[str] = "layers"  # within the call of a structure

    @functools.cached_property  # written past the frozen fields
    def alike(self) -> dict[str, tuple[Layer, ...]]:
        """The layers that differ in their leaves alone, by the first one's kernel.

        What is kept of them is stacked, in arrays whose leading axis has the
        `num_stacked` kernels of each, one layer after the other.
        """
        found: dict[Any, list[Layer]] = {}
        for layer in self.layers:
            # leaves have numbers from 0
            bias = None if layer.bias is None else -1
            shape = dataclasses.replace(layer, kernel=-1, bias=bias)
            key = shape, layer.kernel if self.apart else -1
            found.setdefault(key, []).append(layer)
        return {self.names[group[0].kernel]: tuple(group) for group in found.values()}

    @property
    def one_by_one(self) -> bool:
        """Whether a layer is an operation that `jax.vmap` does not map."""
        return any(layer.kind == "experts" for layer in self.layers)

    @functools.cached_property
    def places(self) -> dict[str, tuple[str, slice]]:
        """Of each kernel: whose stack it is in, and where."""
        found = {}
        for first, group in self.alike.items():
            for index, layer in enumerate(group):
                rows = index * layer.num_stacked, (index + 1) * layer.num_stacked
                found[self.names[layer.kernel]] = first, slice(*rows)
        return found

    @functools.cached_property
    def same_inputs(self) -> dict[str, np.ndarray]:
        """Of each stack, for each of its rows the first that sees the same inputs."""
        found = {}
        for first, group in self.alike.items():
            rows = np.arange(len(group) * group[0].num_stacked).reshape(len(group), -1)
            kernels = [layer.kernel for layer in group]
            for shared in self.entered:
                own = [i for i, kernel in enumerate(kernels) if kernel in shared]
                rows[own] = rows[own[:1]]
            found[first] = rows.ravel()
        return found

    def only(self, names: Iterable[str]) -> "Layers":
        """The table of these layers and of these leaves of none."""
        kept = set(names)
        if kept.issuperset(self.names):
            return self
        layers = [x for x in self.layers if self.names[x.kernel] in kept]
        fallback = [x for x in self.fallback if self.names[x[0]] in kept]
        of_kept = {layer.kernel for layer in layers}
        entered = (tuple(i for i in x if i in of_kept) for x in self.entered)
        return dataclasses.replace(
            self,
            layers=tuple(layers),
            fallback=tuple(fallback),
            entered=tuple(x for x in entered if len(x) > 1),
        )

    def __repr__(self) -> str:
        count, entries = len(self.layers), len(self.names)
        return f"Layers({count} layers of {entries} parameters; print shows the table)"

    def __str__(self) -> str:
        rows: dict[int, tuple] = {}
        for leaf, reason in self.fallback:
            square = "; one square a batch" if leaf in self.summed else ""
            rows[leaf] = (f"no layer: {reason}{square}", *[""] * 4)
        for layer in self.layers:
            shared = layer.num_positions + layer.num_turned
            sizes = layer.num_outputs, layer.num_stacked, shared
            others = (x for x in self.entered if layer.kernel in x[1:])
            beside = "".join(f", input shared with {self.names[x[0]]}" for x in others)
            treatment = f"{layer.treatment}{beside}"
            rows[layer.kernel] = (treatment, layer.num_inputs, *sizes)
            if layer.bias is not None:
                rows[layer.bias] = (f"bias of {self.names[layer.kernel]}", 1, *sizes)
        heads = ("parameter", "shape", "treatment", "inputs", "outputs", "stacked")
        lines: list[tuple] = [(*heads, "shared")]
        for leaf, name in enumerate(self.names):
            lines.append((name, self.shapes[leaf], *rows[leaf]))
        table = tables.aligned(lines, text=True)
        if self.batched:
            return f"{table}\nexamples: run together ({self.together or 'as asked'})"
        if self.row_by_row is not None:
            return f"{table}\nexamples: run one by one ({self.row_by_row})"
        return table

    def descriptions(self) -> list[str]:
        """For each leaf a text that tells it from other treatments."""
        texts = {leaf: f"no layer ({reason})" for leaf, reason in self.fallback}
        for layer in self.layers:
            tied = f", T' = {layer.num_turned}" if layer.num_turned else ""
            texts[layer.kernel] = (
                f"{layer.treatment} with K = {layer.num_stacked}, T = "
                f"{layer.num_positions}, I = {layer.num_inputs}, O = "
                f"{layer.num_outputs}{tied} ({layer.kernel_layout})"
            )
            if layer.bias is not None:
                kernel = self.names[layer.kernel]
                texts[layer.bias] = f"a bias of {kernel} ({layer.bias_layout})"
        return [texts[leaf] for leaf in range(len(self.names))]


def shapes_of_one(inputs: PyTree) -> Shapes:
    """Of one example; parts in `ff.Shared` have none."""
    leaves = jax.tree_util.tree_leaves_with_path(inputs, is_leaf=batches.is_shared)
    return tuple(
        (trees.parameter_name(path) if path else "", tuple(jnp.shape(leaf)[1:]))
        for path, leaf in leaves
        if not batches.is_shared(leaf)
    )


@contextlib.contextmanager
def expecting(layers: Layers | None, inputs: PyTree) -> Iterator[None]:
    """An error of the model, with other inputs than those of the layers, names both.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> with ff.layers.expecting(None, jnp.ones((3, 2))):
      ...     print(jnp.ones((3, 2)) @ jnp.ones(2))
      [2. 2. 2.]
    """
    try:
        yield
    except Exception as error:  # flax has its own for shapes
        if layers is None or shapes_of_one(inputs) == layers.input_shapes:
            raise
        raise ValueError(
            f"apply_fn fails on inputs of shape {_listed(shapes_of_one(inputs))} an "
            "example, and the layers were found for inputs of shape "
            f"{_listed(layers.input_shapes)}{_first(layers)}."
            f"{without_examples(layers, inputs)} It says: {error}"
        ) from error


def without_examples(layers: Layers, inputs: PyTree) -> str:
    """What to say where layers were found for one example, without an axis of them."""
    now = shapes_of_one(inputs)
    if [shape[1:] for _, shape in now] != [shape for _, shape in layers.input_shapes]:
        return ""
    return (
        f" They were found for inputs of shape {_listed(now)}, which is one example of "
        "these: inputs need a leading axis of examples, and one alone is inputs[None]."
    )


def _listed(shapes: Shapes) -> str:
    if len(shapes) == 1 and not shapes[0][0]:
        return str(shapes[0][1])
    return ", ".join(f"{shape} ({name})" for name, shape in shapes)


def _first(layers: Layers) -> str:
    if not layers.layers:
        return ""
    first = min(layers.layers, key=lambda layer: layer.uses)
    return (
        f"; the first layer is {layers.names[first.kernel]}, {first.kind}, of "
        f"{first.num_inputs} inputs and kernel shape {layers.shapes[first.kernel]}"
    )
