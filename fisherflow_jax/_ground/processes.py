"""What several processes know together: values of each, and of arrays they share.

Each function here is run by all processes, or the others wait for ever.
"""

import functools
import zlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fisherflow_jax._ground import checks

PyTree = Any

# What is passed on of an error's text, in bytes.
_LONG = 1000


def fetched(tree: PyTree) -> PyTree:
    """The arrays with what others hold of them; on this host, if that is anything."""

    def fetch(leaf: Any) -> Any:
        if checks.is_concrete(leaf) or checks.is_traced(leaf):
            return leaf
        with jax.ensure_compile_time_eval():
            return multihost_utils.process_allgather(leaf, tiled=True)

    return jax.tree.map(fetch, tree)


def on_host(tree: PyTree) -> PyTree:
    """As `fetched`, in numpy."""
    return jax.tree.map(np.asarray, fetched(tree))


def gathered(values: np.ndarray) -> np.ndarray:
    """What each process gives, of one shape, `(num_processes, ...)`.

    Raises:
      RuntimeError: where another process is lost.
    """
    if jax.process_count() == 1:
        return values[None]
    try:
        with jax.ensure_compile_time_eval():
            rows, to_all = _meeting()
            shared = jax.make_array_from_process_local_data(rows, values[None])
            return np.asarray(to_all(shared))
    except Exception as error:  # a ValueError or a RuntimeError, of other names
        raise RuntimeError(
            f"another process is lost, or its connection ({error}). Nothing can be "
            "computed together any more: end this process (os._exit, since an orderly "
            "end waits for the other), and start all of them again from a checkpoint."
        ) from error


@functools.cache
def _meeting() -> tuple[NamedSharding, Callable]:
    """A row a process, and what gives all of them to all; also within a trace.

    `multihost_utils.process_allgather` sets a mesh, which only eager calls may.
    """
    count, devices = jax.process_count(), jax.devices()
    devices = sorted(devices, key=lambda device: device.process_index)
    mesh = Mesh(np.array(devices).reshape(count, -1), ("process", "device"))
    whole = NamedSharding(mesh, PartitionSpec())
    rows = NamedSharding(mesh, PartitionSpec("process"))
    return rows, jax.jit(lambda x: x, out_shardings=whole)


def texts(own: str) -> list[str]:
    """What each process says."""
    raw = own.encode()[:_LONG].ljust(_LONG)
    each = gathered(np.frombuffer(raw, np.uint8))
    return [row.tobytes().decode(errors="replace").rstrip() for row in each]


def mark(text: str) -> int:
    """A number of 31 bits that another text hardly has."""
    return zlib.crc32(text.encode()) >> 1


def check_same(own: str, rule: str) -> None:
    """Raises in all processes where what one has to say is not what others have."""
    marks = gathered(np.array(mark(own), np.int32))
    if np.any(marks != marks[0]):
        raise differing(texts(own), rule)


def differing(each: list[str], rule: str) -> ValueError:
    """What to raise for the first process that does not say what process 0 does."""
    other = next((k for k, one in enumerate(each) if one != each[0]), 0)
    return ValueError(
        f"{rule}: process 0 has {each[0]}; process {other} has {each[other]}."
    )
