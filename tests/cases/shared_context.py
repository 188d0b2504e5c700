"""One MLIR context for many programs, in place of one each.

JAX loads every dialect into a new context before it lowers a program, which takes a
third of the time of a small one. Here the programs of a thread share a context, renewed
now and then, since it forgets nothing. This is the tests' one contact with JAX's
internals, and for their time alone: in a JAX that has another form of
`make_ir_context`, nothing is shared and nothing changes.
"""

import inspect
import threading
from typing import Any

PROGRAMS_A_CONTEXT = 500


def install() -> bool:
    """Makes this process share contexts; whether it does."""
    try:
        from jax._src.interpreters import mlir

        context, fresh = mlir.ir.Context, mlir.make_ir_context
        if inspect.signature(fresh).parameters or _within(context):
            return False
    except (ImportError, AttributeError, TypeError, ValueError):
        return False
    local = threading.local()

    def shared() -> Any:
        # what is computed while another program is lowered would become a part of it
        if _within(context):
            return fresh()
        if getattr(local, "programs_left", 0) <= 0:
            local.context, local.programs_left = fresh(), PROGRAMS_A_CONTEXT
        local.programs_left -= 1
        return local.context

    mlir.make_ir_context = shared
    return True


def _within(context: Any) -> bool:
    """Whether this thread has entered a context."""
    try:
        return context.current is not None
    except ValueError:
        return False
