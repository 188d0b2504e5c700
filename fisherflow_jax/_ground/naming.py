"""Public classes say where they are shown, not in which file they are written."""

import sys

from fisherflow_jax._ground.telling import brief


def show(module: str) -> None:
    """NamedTuples that a module shows say its name, as `type(state)` prints it.

    And print in a line (`brief`), if they have no way of their own.

    Classes with methods of their own keep their file, where doctests look for them.
    """
    for value in vars(sys.modules[module]).values():
        is_tuple = isinstance(value, type) and issubclass(value, tuple)
        if is_tuple and value.__module__.startswith(f"{module}."):
            value.__module__ = module
        if is_tuple and getattr(value.__repr__, "__module__", "") == "collections":
            value.__repr__ = brief
