"""The one warning of the package: data that did not say what was asked of them."""

import sys
import warnings
import weakref
from types import FrameType
from typing import Any

import jax

from fisherflow_jax._ground import checks

PyTree = Any

_PACKAGE = __name__.partition(".")[0]
# What was said of which arrays, as long as these are alive.
_said: dict[tuple[int, ...], set[str]] = {}


class DataWarning(UserWarning):
    """The data were left out in part, or do not determine what was asked of them.

    Or an array is too odd in shape to be cut over devices, as `factor_sharding` asks.

    Said once a state, where values are at hand; under `jax.jit` nothing is said, and
    what a state keeps (`state.events`, `state.num_skipped`) is printed by `ff.summary`.
    `warnings.simplefilter("error", ff.DataWarning)` makes it an error, "ignore" silent.

    Example:
      >>> import fisherflow_jax as ff
      >>> issubclass(ff.DataWarning, UserWarning)
      True
    """


def warn_once(subject: PyTree, message: str, topic: str = "") -> None:
    """Warns of a subject (a state, or what a result is made of), once a topic.

    The subject is known by its arrays; traced ones are passed over in silence. The
    topic is the message, if no other is given. The message says what happened and the
    way out. The warning names the caller's line.
    """
    leaves = jax.tree.leaves(subject)
    if checks.is_traced(leaves):
        return
    key = tuple(map(id, leaves))
    if key not in _said:
        for leaf in leaves:
            try:
                # a place in memory may serve another array later
                weakref.finalize(leaf, _said.pop, key, None).atexit = False
            except TypeError:  # a number
                continue
            _said[key] = set()
            break
    said = _said.get(key, set())
    if (topic or message) not in said:
        said.add(topic or message)
        warnings.warn(message, DataWarning, stacklevel=_callers_level())


def _callers_level() -> int:
    """The `stacklevel`, as of `warn_once`, of the first frame outside the package."""
    level = 1
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and _is_inside(frame):
        frame, level = frame.f_back, level + 1
    return level


def _is_inside(frame: FrameType) -> bool:
    module = frame.f_globals.get("__name__", "")
    return module.partition(".")[0] in (_PACKAGE, "jax")
