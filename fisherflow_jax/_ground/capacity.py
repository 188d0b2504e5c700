"""How many bytes there are to hold arrays in."""

import functools
import os
import pathlib

import jax

# What a container may use of its machine, where it is told.
_LIMITS = (
    "/sys/fs/cgroup/memory.max",
    "/sys/fs/cgroup/memory/memory.limit_in_bytes",
)


@functools.cache
def num_bytes() -> int | None:
    """Of all devices together, or of the host where they are CPUs; None: not known."""
    device = jax.local_devices()[0]
    if device.platform != "cpu":
        own = (device.memory_stats() or {}).get("bytes_limit")
        return None if own is None else own * jax.device_count()
    try:
        whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None
    return min([whole, *_of_container()])


def _of_container() -> list[int]:
    found = []
    for path in map(pathlib.Path, _LIMITS):
        try:
            text = path.read_text().strip()
        except OSError:
            continue
        if text.isdecimal():
            found.append(int(text))
    return found
