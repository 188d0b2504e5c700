"""Batches as they arrive: stacked in arrays, or one by one from a loader."""

import sys
from collections.abc import Callable, Iterable, Iterator
from operator import itemgetter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fisherflow_jax._ground import batch as batches
from fisherflow_jax._ground import checks
from fisherflow_jax._ground.batch import Batch
from fisherflow_jax._ground.sharding import in_auto_mode

PyTree = Any

# A run that takes less shows no bar.
_SECONDS_BEFORE_BAR = 2.0
# Seconds between two states of a bar that a file or a pipe takes, a line each.
_SECONDS_BETWEEN_LINES = 60.0


class Stacked(NamedTuple):
    """Equal batches stacked in arrays, for `ff.accumulate` to scan in one program.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> stacked = ff.Stacked(jnp.ones((5, 3, 2)), jnp.zeros((5, 3)))  # 5 batches of 3
      >>> stacked.weights is None  # all one
      True
    """

    inputs: PyTree  # leaves (num_batches, n, ...), parts in ff.Shared excepted
    targets: PyTree  # leaves (num_batches, n, ...), or None
    weights: Any = None  # (num_batches, n), or as the targets; None: all one


class _Converted:
    """A loader, of which each item is made into a batch; as often as it can be read."""

    def __init__(self, loader: Any, to_batch: Callable[[Any], Any]) -> None:
        self.loader, self.to_batch = loader, to_batch

    def __iter__(self) -> Iterator:
        return map(self.to_batch, self.loader)

    def __len__(self) -> int:
        return len(self.loader)


def converted(loader: Any, to_batch: Callable[[Any], Any] | None) -> Any:
    """The batches that `to_batch` makes of what a loader gives; None: these are some.

    Raises:
      ValueError: for batches that stand in arrays, or one alone.
      TypeError: for what is no function.
    """
    if to_batch is None:
        return loader
    if not callable(to_batch):
        raise TypeError(
            "to_batch is a function of what the loader gives, which returns (inputs, "
            f"targets); got {checks.described(to_batch)}."
        )
    check_loader(loader, "to_batch is for a loader: ")
    if isinstance(loader, Iterator):
        return map(to_batch, loader)
    return _Converted(loader, to_batch)


def check_loader(loader: Any, why: str = "") -> None:
    """Raises for what is no loader, first of all for one batch alone."""
    one = isinstance(loader, (tuple, dict, str, np.ndarray, jax.Array))
    if one or batches.is_table(loader) or not isinstance(loader, Iterable):
        raise ValueError(
            f"{why}batches is a list or another iterable of batches, or "
            "ff.Stacked(inputs, targets, weights) with arrays (num_batches, n, ...); "
            f"got {type(loader).__name__} (one batch alone goes in a list, [batch])."
        )


def each_batch(data: Any) -> Iterable[Batch]:
    """The batches of one batch (a tuple), of a loader, or of a stack.

    Raises:
      ValueError: for what is none of them, and where there is no batch at all.
    """
    for batch, _ in counted(data):
        yield batches.as_batch(batch)


def counted(
    data: Any,
    to_batch: Callable[[Any], Any] | None = None,
    progress: bool | None = False,
    doing: str = "reading",
) -> Iterator[tuple[Batch, int]]:
    """As `each_batch`, unchecked; with the rows of each, which padding follows."""
    data = converted(data, to_batch)
    if isinstance(data, Stacked):
        for batch in each_of(stack_of_batches(data, 1)):
            yield batch, len(batch.weights)
        return
    if isinstance(data, tuple):
        yield (batch := batches.by_name(data)), _num_rows(batch)
        return
    check_loader(data)
    counts: list[int] = []

    def noted(loader: Iterable) -> Iterator[Batch]:
        for raw in loader:
            counts.append(_num_rows(batch := batches.by_name(raw)))
            yield batch

    for batch in padded(noted(with_bar(data, progress, doing)), 1):
        yield batch, counts[-1]
    if not counts:
        raise ValueError("there are no batches (a generator can be read only once).")


def as_stack(data: Any, to_batch: Callable[[Any], Any] | None = None) -> Batch:
    """All batches as one of leaves `(num_batches, n, ...)`, short ones padded."""
    if isinstance(data, Stacked):
        return stack_of_batches(data, 1)
    found = [batch for batch, _ in counted(data, to_batch)]
    longest = max(batch.weights.shape[0] for batch in found)
    found = [lengthened(batch, longest, axis=0) for batch in found]
    return jax.tree.map(lambda *leaves: np.stack(leaves), *found)


def _num_rows(batch: Batch) -> int:
    leaves = jax.tree.leaves((batches.split(batch.inputs)[0], batch.targets))
    return np.shape(leaves[0])[0] if leaves and np.shape(leaves[0]) else 0


def each_of(stack: Batch) -> Iterator[Batch]:
    """The batches of a stack."""
    for index in range(stack.weights.shape[0]):
        yield batches.map_examples(itemgetter(index), stack)


def padded(loader: Iterable, multiple: int, length: int = 0) -> Iterator[Batch]:
    """Batches with weights, each as long as the longest so far, by rows of weight zero.

    So a ragged last batch meets the program that is compiled already. `length`: of the
    longest before these.
    """
    checked = set()
    for number, raw in enumerate(loader):
        raw = batches.by_name(raw)
        batch = jax.tree.map(_array, raw._replace(weights=None))
        leaves, form = jax.tree.flatten(batch)
        form = form, *(leaf.shape for leaf in leaves)
        if form not in checked:  # tracing costs more than a small batch
            jax.eval_shape(batches.as_batch, batch)
            checked.add(form)
        parts, _ = batches.unpack(batch)
        rows = jax.tree.leaves(parts)[0].shape[0]
        weights = _weights(raw.weights, (rows,), f"weights of batch {number}")
        length = max(length, rows + -rows % multiple)
        yield lengthened(batch._replace(weights=weights), length, axis=0)


def stack_of_batches(stacked: Stacked, multiple: int) -> Batch:
    """The stack as a `Batch` of leaves `(num_batches, n, ...)`, checked and padded."""
    inputs, targets = jax.tree.map(_array, (stacked.inputs, stacked.targets))
    leaves = batches.split(inputs)[0] + jax.tree.leaves(targets)
    leading = {x.shape[:2] for x in leaves}
    if len(leading) != 1 or len(shape := leading.pop()) != 2 or 0 in shape:
        raise ValueError(
            "the arrays of ff.Stacked share their first two axes (num_batches, n), "
            f"neither of them 0; got shapes {[x.shape for x in leaves]}."
        )
    weights = _weights(stacked.weights, shape, "weights of ff.Stacked")
    stack = Batch(inputs, targets, weights)
    return lengthened(stack, shape[1] + -shape[1] % multiple, axis=1)


def with_bar(
    loader: Iterable,
    progress: bool | None,
    doing: str = "accumulating",
    initial: int = 0,
) -> Iterable:
    """The loader, under a progress bar where one is wanted: in a file, a line a minute.

    Raises:
      ImportError: for `progress=True` without tqdm.
    """
    if progress is False:
        return loader
    try:
        from tqdm import tqdm
    except ImportError as error:
        if progress is None:
            return loader
        raise ImportError(
            "progress=True draws its bar with tqdm, which is not installed: "
            "pip install tqdm."
        ) from error
    if jax.process_index():  # one bar, whatever the number of processes
        return loader
    apart = 0.1 if sys.stderr.isatty() else _SECONDS_BETWEEN_LINES
    return tqdm(
        loader,
        desc=doing,
        unit="batch",
        initial=initial,
        mininterval=apart,
        maxinterval=max(apart, 10.0),
        delay=0.0 if progress else _SECONDS_BEFORE_BAR,
        disable=None if progress is None else False,  # None: unless a terminal
    )


def _array(x: Any) -> Any:
    # numpy's stay on the host, where padding compiles nothing
    return x if isinstance(x, jax.Array) else np.asarray(x)


def _weights(weights: Any, shape: tuple[int, ...], name: str) -> Any:
    dtype = jnp.result_type(float)
    if weights is None:
        return np.ones(shape, dtype)
    weights = _array(weights)
    if weights.shape[: len(shape)] != shape:
        raise ValueError(
            f"{name} must have shape {shape}, one an example, or that of the targets; "
            f"got {weights.shape}."
        )
    return weights.astype(dtype, copy=False)


def lengthened(batch: Batch, length: int, axis: int) -> Batch:
    """The batch with so many rows, the rest of weight zero; these may hold anything."""
    rest = length - batch.weights.shape[axis]

    def longer(x: Any) -> Any:
        ends = [(0, rest if i == axis else 0) for i in range(x.ndim)]
        if isinstance(x, jax.Array):
            return in_auto_mode(lambda x: jnp.pad(x, ends), x, x)
        return np.pad(x, ends)

    return batches.map_examples(longer, batch) if rest else batch
