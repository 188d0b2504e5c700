"""Batches of which each process reads a part, as arrays that all share."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fisherflow_jax._ground import batch as batch_parts
from fisherflow_jax._ground import checks, processes, sharding, trees
from fisherflow_jax._ground.batch import Batch
from fisherflow_jax.accumulation import _loading as loading

# What a process has of the next batch.
_READ, _ENDED, _FAILED = range(3)


def global_batches(
    batches: Iterable,
    mesh: Mesh,
    *,
    axes: Any = None,
    to_batch: Callable[[Any], Any] | None = None,
) -> Iterator[Batch]:
    """Batches of which each process has read a part, as arrays that all share.

    For loops over `flow.update`, or an Optax step, in several processes: a global batch
    is the rows of process 0, then those of process 1, and so on. Each part is as long
    as the longest that any process has had so far, by rows of weight zero, so that a
    ragged last batch has the shapes that all expect, and compiles nothing. Before a
    batch is given, the processes tell each other what they have read, since arrays of
    different shapes end all of them without an exception.

    Args:
      batches: of this process alone, its own rows: a list, a generator or a loader of
        `(inputs, targets)`, `(inputs, targets, weights)` or `ff.Batch`. Arrays that
        span processes already, and parts in `ff.Shared`, which must be equal in all
        processes, are taken as they are.
      mesh: over whose devices the rows are spread, those of this process over its own.
      axes: names of the mesh's axes that divide the rows; None: all of them. Processes
        that differ only along others read the same rows.
      to_batch: makes a batch of what the loader gives.

    Returns:
      An iterator of `ff.Batch` with weights. Cost: of each batch a transfer, and a
      gather of three numbers a process, which waits for the step before.

    Raises:
      ValueError: on all processes, for parts that differ in their types or in the
        shapes of an example, and where some have ended before others.
      RuntimeError: where another process could not read its part; that one raises its
        own error.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> mesh = jax.make_mesh((jax.device_count(),), ("data",))
      >>> loader = [(jnp.ones((n, 2)), jnp.ones(n)) for n in (16, 3)]
      >>> for batch in ff.global_batches(loader, mesh):
      ...     print(batch.inputs.shape, batch.weights.sum())
      (16, 2) 16.0
      (16, 2) 3.0
    """
    own = sharding.automatic(mesh)
    if own is None:
        raise ValueError("global_batches needs the mesh that rows are spread over.")
    batches = loading.converted(batches, to_batch)
    loading.check_loader(batches)
    return spread(batches, own, own.axis_names if axes is None else axes)


def spread(
    loader: Iterable, mesh: Mesh, axes: Any, longest: int = 0
) -> Iterator[Batch]:
    """As `global_batches`, of arguments that are checked.

    `longest`: rows of the longest batch, of all processes, before these.
    """
    rows = NamedSharding(mesh, PartitionSpec(axes))
    read, number = loading.padded(loader, own_parts(rows)), 0
    parts = mesh.size // rows.shard_shape((mesh.size,))[0]
    length = -(-longest // parts) * own_parts(rows)
    while (found := _agreed(read, number)) is not None:
        batch, rows_read = found
        number, length = number + 1, max(length, rows_read)
        yield place(rows, loading.lengthened(batch, length, axis=0), axis=0)


def laid_out(loader: Iterable, mesh: Mesh | None, longest: int = 0) -> Iterator[Batch]:
    """Batches of equal length: spread over a mesh, or, without one, as they lie."""
    if mesh is None:
        return loading.padded(loader, 1, longest)
    return spread(loader, mesh, mesh.axis_names, longest)


def stack_of_batches(stacked: Any, mesh: Mesh | None) -> Batch:
    """As `laid_out`, of a stack `(num_batches, n, ...)`."""
    if mesh is None:
        return loading.stack_of_batches(stacked, 1)
    rows = NamedSharding(mesh, PartitionSpec(None, mesh.axis_names))
    # within what raises in all processes
    made = (loading.stack_of_batches(x, own_parts(rows)) for x in [stacked])
    found = _agreed(made, 0, axis=1)
    assert found is not None
    return place(rows, loading.lengthened(*found, axis=1), axis=1)


def own_parts(rows: NamedSharding) -> int:
    """Into how many parts what this process has of the rows is cut."""
    count = rows.mesh.size  # a multiple of the number of all parts
    one = NamedSharding(rows.mesh, PartitionSpec(rows.spec[-1]))
    places = one.addressable_devices_indices_map((count,)).values()
    return len({place[0].indices(count) for place in places if place is not None})


def place(rows: NamedSharding, batch: Batch, axis: int) -> Batch:
    """The batch with its rows, along an axis, spread as a sharding says."""
    whole = NamedSharding(rows.mesh, PartitionSpec())

    def put(to: NamedSharding, x: Any) -> Any:
        if to.is_fully_addressable or not _is_own(x):
            return jax.device_put(x, to)
        return jax.make_array_from_process_local_data(to, np.asarray(x))

    shardings = batch_parts.by_axis(batch, rows, whole)
    return jax.tree.map(
        lambda to, part: jax.tree.map(lambda x: put(to, x), part), shardings, batch
    )


def _is_own(x: Any) -> bool:
    """Whether an array is this process's alone."""
    if checks.is_traced(x):
        return False
    return not isinstance(x, jax.Array) or x.is_fully_addressable


def _agreed(
    read: Iterator[Batch], number: int, axis: int = 0
) -> tuple[Batch, int] | None:
    """The next batch here, and the rows of the longest of all; None: all have ended.

    What is wrong in one process raises in all of them.
    """
    batch, state, said, failure = None, _READ, "", None
    try:
        batch = next(read, None)
    except Exception as error:
        state, said, failure = _FAILED, f"{type(error).__name__}: {error}", error
    if batch is not None:
        said = _form(batch, axis)
    elif failure is None:
        state = _ENDED
    rows = 0 if batch is None else batch.weights.shape[axis]
    told = np.array([state, processes.mark(said), rows], np.int32)
    told = processes.gathered(told)
    states, forms, lengths = told.T
    if np.all(states == _READ) and np.all(forms == forms[0]):
        assert batch is not None
        return batch, int(lengths.max())
    if np.all(states == _ENDED):
        return None
    each = processes.texts(said)
    if failure is not None:
        raise failure
    if len(failed := np.flatnonzero(states == _FAILED)):
        raise RuntimeError(
            f"process {failed[0]} could not read its part of batch {number}: "
            f"{each[failed[0]]}"
        )
    if len(ended := np.flatnonzero(states == _ENDED)):
        raise ValueError(
            f"processes have other numbers of batches: process {ended[0]} ended after "
            f"{number}, and others go on. Let each read as many, the last ones of rows "
            "of weight zero if it must be."
        )
    raise processes.differing(
        each, f"the examples of batch {number} differ between processes"
    )


def _form(batch: Batch, axis: int) -> str:
    """The types of a batch, and the shapes of its parts but for the rows."""
    along = batch_parts.by_axis(batch, axis, -1)
    told: list[str] = []

    def tell(axis: int, part: Any) -> None:
        for path, x in jax.tree_util.tree_leaves_with_path(part):
            shape = x.shape if axis < 0 else x.shape[:axis] + x.shape[axis + 1 :]
            name = f" {trees.parameter_name(path)}" if path else ""
            told.append(f"{jax.dtypes.canonicalize_dtype(x.dtype)} {shape}{name}")

    for name, where, part in zip(Batch._fields, along, batch, strict=True):
        told.append(f"{name}:")
        jax.tree.map(tell, where, part)
    return " ".join(told)
