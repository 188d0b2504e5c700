"""Which flow a state is of: its choices in words, and how two differ."""

import dataclasses
from typing import Any

import jax

from fisherflow_jax._ground.telling import told
from fisherflow_jax.flow._belonging import check_flow, check_state, form
from fisherflow_jax.flow._state import FisherFlow

# What decides how an update is computed, and not where it ends.
_NOT_KEPT = "chunk_size", "bad_rows"


def choices_of(flow: Any) -> dict[str, str]:
    """What is chosen of a flow, a bank or a sparse flow, by name, each in words.

    The words hold every number, and no address: they are the same in another process.
    """
    check_flow(flow)
    if hasattr(flow, "flows"):
        each = [choices_of(one) for one in flow.flows]
        found = {
            f"flows[{index}].{name}": words
            for index, one in enumerate(each)
            for name, words in one.items()
        }
        return found | {"weighing": told(flow.update.args[1])}
    recipe = getattr(flow, "recipe", None)
    if not dataclasses.is_dataclass(recipe):
        return {"flow": told(flow)}
    return {
        field.name: told(getattr(recipe, field.name))
        for field in dataclasses.fields(recipe)
        if field.name not in _NOT_KEPT
    }


def differing(known: dict[str, str], own: dict[str, str]) -> list[str]:
    """How the choices that are known of one flow differ from those of this one."""
    found = []
    for name in known | own:
        one, other = (x.get(name, "nothing") for x in (known, own))
        if one != other:
            found.append(f"its {name} is {one}, and this one's is {other}")
    return found


def check_belongs(flow: Any, state: Any) -> None:
    """Raises unless a state is such as the flow's `init` makes. From shapes alone."""
    check_flow(flow)
    if isinstance(flow, FisherFlow):
        check_state(flow.recipe, state)
        return
    members = getattr(state, "members", None)
    if hasattr(flow, "flows"):
        if members is None or len(members) != len(flow.flows):
            number = "no" if members is None else len(members)
            raise ValueError(
                f"the state has {number} members, and the bank {len(flow.flows)} flows."
            )
        for one, member in zip(flow.flows, members, strict=True):
            check_belongs(one, member)
        return
    own = jax.eval_shape(flow.init)
    if type(state) is not type(own) or form(state) != form(own):
        raise ValueError(
            f"the state is another flow's: {_shapes(state)}, and the flow has "
            f"{_shapes(own)}."
        )


def _shapes(state: Any) -> str:
    if not hasattr(state, "_fields"):
        return f"a {type(state).__name__}"
    shapes = {
        name: jax.tree.map(jax.numpy.shape, x) for name, x in state._asdict().items()
    }
    inside = ", ".join(f"{name} {shape}" for name, shape in shapes.items() if shape)
    return f"a {type(state).__name__} of {inside}"
