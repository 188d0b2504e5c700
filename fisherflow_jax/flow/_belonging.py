"""A state is one of the flow that it is given to, or the difference is told."""

from typing import Any

import jax
import numpy as np

from fisherflow_jax import information as ops
from fisherflow_jax import memories
from fisherflow_jax._ground import checks
from fisherflow_jax.flow._recipe import Recipe
from fisherflow_jax.flow._state import FisherFlow, FlowState, init


def check_flow(flow: Any) -> None:
    """Raises for what has no update: a flow stands before its state."""
    if not hasattr(flow, "update"):
        raise TypeError(
            "a flow stands before its state and the data, as ff.fisher_flow makes it; "
            f"got a {type(flow).__name__}."
        )


def check_member(flow: Any, name: str) -> None:
    """Raises for what is no flow of `ff.fisher_flow`, to be run beside others.

    A sparse flow's state is never read as a whole, so that what judges dense states
    would cost all features a batch, and its rows go to no other flow.
    """
    if hasattr(flow, "update") and hasattr(flow, "predict"):
        raise TypeError(
            f"{name} is a sparse flow: its batches are ff.sparse.Rows, which no other "
            "flow takes, and its predictions are its own. Run sparse flows by "
            "themselves and compare the log scores of flow.predict(state, rows) before "
            "each update (docs/choosing.md)."
        )
    checks.made(flow, FisherFlow, name, "ff.fisher_flow(...)")


def check_kind(state: Any) -> None:
    """Raises for what is no flow's state, saying what it seems to be."""
    if isinstance(state, FlowState):
        return
    hint = ""
    if isinstance(state, tuple) and state and isinstance(state[0], FlowState):
        hint = ": update returns (state, info), to be taken apart"
    elif hasattr(state, "members"):
        hint = ": a bank's state goes to the bank's update"
    elif hasattr(state, "mean") and hasattr(state, "information"):
        hint = (
            ": a Gaussian is where a flow begins, fisher_flow(..., "
            "prior_precision=state.information).init(state.mean)"
        )
    elif isinstance(state, (tuple, list)):
        hint = ": the batch comes second"
    raise TypeError(
        "a flow's update is (state, batch), with a state of flow.init; got a "
        f"{type(state).__name__}{hint}."
    )


def check_state(recipe: Recipe, state: Any) -> None:
    """Raises unless a state is such as the flow's `init` makes. From shapes alone."""
    check_kind(state)
    own = jax.eval_shape(lambda mean: init(recipe, mean, key=0), state.mean)
    differs = differences(state, own)
    if differs:
        raise ValueError(
            f"the state is another flow's than {recipe!r}: {'; '.join(differs)}. A "
            "flow goes on from states of its own init."
        )


def differences(state: FlowState, own: FlowState) -> list[str]:
    """What is kept in one state and not in the other, in words; of one flow nothing."""
    found: list[str] = []
    for field in ("mean", "information", "memory"):
        one, other = getattr(state, field), getattr(own, field)
        # shapes of what comes later follow from what is told already
        if form(one) != form(other) and (not found or _kind(one) != _kind(other)):
            found.append(f"its {field} is {told(one, other)}")
    for field, what in _KEPT.items():
        one, other = getattr(state, field), getattr(own, field)
        if (one is None) != (other is None):
            has = "lacks" if one is None else "has"
            found.append(f"it {has} {what}")
        elif not found and form(one) != form(other):
            found.append(f"its {field} is {told(one, other)}")
    return found


# What some flows keep, and for what.
_KEPT = {
    "residual": "the sum of squares of an unknown dispersion",
    "nuisance": "what is known of other unknowns of the likelihood",
    "meat": "the squared scores of robust=True",
    "clusters": "the scores of num_clusters",
    "key": "a key to draw with",
}


def form(tree: Any) -> Any:
    return jax.tree.structure(tree), [np.shape(leaf) for leaf in jax.tree.leaves(tree)]


def told(one: Any, other: Any) -> str:
    """How two parts of states differ: in kind, or else in shapes."""
    kinds = _kind(one), _kind(other)
    if kinds[0] == kinds[1]:
        kinds = str(jax.tree.map(np.shape, one)), str(jax.tree.map(np.shape, other))
    return f"{kinds[0]}, not {kinds[1]}"


def _kind(tree: Any) -> str:
    kind = type(jax.eval_shape(ops.plain, tree))
    room, _, file = kind.__module__.rpartition("._")
    # what a memory keeps lies beside the factory, which is the name that users know
    return f"ff.memories.{file}" if room == memories.__name__ else kind.__name__
