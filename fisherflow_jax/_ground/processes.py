"""What several processes know together: values of each, and of arrays they share.

Each function here is run by all processes, or the others wait for ever.
"""

from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

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


def gathered(values: np.ndarray) -> np.ndarray:
    """What each process gives, of one shape, `(num_processes, ...)`."""
    with jax.ensure_compile_time_eval():
        return multihost_utils.process_allgather(values)


def texts(own: str) -> list[str]:
    """What each process says."""
    raw = own.encode()[:_LONG].ljust(_LONG)
    each = gathered(np.frombuffer(raw, np.uint8))
    return [row.tobytes().decode(errors="replace").rstrip() for row in each]
