"""What a model raises, told with the shapes that it was called with."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from fisherflow_jax._ground import trees
from fisherflow_jax._ground.batch import map_inputs, unshare

PyTree = Any

_CALLED = "apply_fn(params, inputs) with params of shapes "
# What an error shows of a tree of shapes.
_LONG = 600


@contextlib.contextmanager
def telling(apply_fn: Callable, params: PyTree, inputs: PyTree) -> Iterator[None]:
    """Where a model is called: an error says with what, and what may be wrong.

    JAX's own TypeError and ValueError are raised anew, from themselves; errors of other
    classes stay and get a note.
    """
    try:
        yield
    except Exception as error:
        called = _called(params, inputs)
        told = [str(error), *getattr(error, "__notes__", ())]
        if called is None or any(line.startswith(_CALLED) for line in told):
            raise
        if type(error) in (TypeError, ValueError):
            hint = _hint(apply_fn, params, inputs, str(error))
            raise type(error)(f"{called} raised: {error}{hint}") from error
        error.add_note(f"{called} raised this.")
        raise


@contextlib.contextmanager
def mapping(way: str) -> Iterator[None]:
    """Where a model is mapped over examples: what cannot be says what can."""
    try:
        yield
    except NotImplementedError as error:
        if "vmap" not in str(error) and "atching" not in str(error):
            raise
        raise NotImplementedError(
            "the model has an operation that jax.vmap does not map over examples "
            f"({error}): {way}."
        ) from error


def _called(params: PyTree, inputs: PyTree) -> str | None:
    inputs = unshare(inputs)
    if not jax.tree.leaves(inputs):
        return None
    shapes = [str(jax.tree.map(np.shape, tree)) for tree in (params, inputs)]
    short = [x if len(x) <= _LONG else f"{x[:_LONG]}..." for x in shapes]
    return f"{_CALLED}{short[0]} and inputs of shapes {short[1]}"


def _hint(apply_fn: Callable, params: PyTree, inputs: PyTree, message: str) -> str:
    """What is likely to be wrong: the order of arguments, or a batch size."""
    rows = {np.shape(x)[:1] for x in jax.tree.leaves(unshare(inputs))}
    if rows == {(1,)} and ("reshape" in message or "broadcast" in message):
        return (
            "\nOne example is run here by itself, as a batch of one. A model into "
            "which another batch size is written takes it from its inputs, "
            "x.shape[0]; one that must see whole batches needs batched=True, of "
            "ff.layers.find_layers."
        )
    one = functools.partial(map_inputs, lambda x: x[None])
    shapes = jax.tree.map(trees.shape_of, (inputs, params))
    for otherwise, told in (
        (
            lambda x, p: apply_fn(unshare(x), p),
            "its arguments swapped it runs: apply_fn takes params first, then inputs",
        ),
        (
            lambda x, p: apply_fn(p, unshare(one(x))),
            "one axis more it runs: inputs have a leading axis of examples, and one "
            "alone is inputs[None]",
        ),
    ):
        with contextlib.suppress(Exception):
            jax.eval_shape(otherwise, *shapes)
            return f"\nWith {told}."
    return ""


def several(outputs: Any) -> str:
    """What to do about outputs that are several arrays."""
    if len(jax.tree.leaves(outputs)) < 2:
        return ""
    return (
        " Several go side by side in one array, jnp.concatenate(outputs, -1), which "
        "ff.likelihoods.from_log_prob takes apart; what is no output (new batch "
        "statistics) is left out."
    )
