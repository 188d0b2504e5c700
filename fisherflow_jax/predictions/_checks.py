"""What predictions refuse: states, models and likelihoods that do not go together."""

from collections.abc import Callable
from typing import Any

import jax

from fisherflow_jax import information as ops
from fisherflow_jax._ground import batch as batches
from fisherflow_jax._ground import trees
from fisherflow_jax.estimators._chunking import check_chunk_size
from fisherflow_jax.flow._bank import BankState
from fisherflow_jax.likelihoods import Likelihood
from fisherflow_jax.posteriors._gaussian import check_like
from fisherflow_jax.posteriors._intervals import dispersion_of

PyTree = Any


def check_inputs(state: Any, inputs: PyTree, chunk_size: int | None) -> None:
    """Raises where values are at hand."""
    check_chunk_size(chunk_size)
    batches.as_batch((inputs, None))  # a leading axis shared by all, n > 0
    for member in members_of(state):
        if not (hasattr(member, "mean") and hasattr(member, "information")):
            raise TypeError(
                "a state has .mean and .information: that of a flow, or "
                f"ff.posterior(...); got {_described(member)}."
            )
        if jax.tree_util.all_leaves([member]):
            raise TypeError(
                "a state is a pytree, such as a NamedTuple, so that it can be an "
                f"argument of compiled functions; got {_described(member)}."
            )
        dispersion_of(member)


def members_of(state: Any) -> tuple:
    """The states of a bank, or the one state."""
    return state.members if isinstance(state, BankState) else (state,)


def check_likelihood(likelihood: Any) -> None:
    """Raises unless it is one."""
    if not isinstance(likelihood, Likelihood):
        raise TypeError(
            "a likelihood comes from a call such as ff.likelihoods.categorical(); got "
            f"{_described(likelihood)}."
        )


def check_model(
    state: Any, apply_fn: Callable, inputs: PyTree, likelihood: Likelihood | None = None
) -> None:
    """Raises where model and state do not go together. Static: shapes alone."""
    about = jax.eval_shape(ops.diagonal, ops.plain(state.information), state.mean)
    check_like(about, state.mean)
    try:
        outputs = jax.eval_shape(apply_fn, state.mean, batches.unshare(inputs))
    except Exception as error:
        leaves = jax.tree_util.tree_leaves_with_path(
            state.mean, is_leaf=lambda x: x is None
        )
        holes = [trees.leaf_name(path) for path, leaf in leaves if leaf is None]
        if holes:
            error.add_note(
                f"The state is about some of the parameters, without {holes}: it goes "
                "with the function that ff.only returned, not with the whole model."
            )
        raise
    count = batches.split(inputs)[0][0].shape[0]
    shape = getattr(outputs, "shape", None)
    if not shape or shape[0] != count:
        raise ValueError(
            "apply_fn(params, inputs) must return one array of outputs whose leading "
            f"axis is the examples' (n = {count}); got {outputs}."
        )
    if likelihood is not None:
        # of one example, whose last axis is not that of the examples
        likelihood.check(jax.ShapeDtypeStruct(shape[1:], outputs.dtype), None)


def _described(value: Any) -> str:
    return getattr(value, "__name__", None) or type(value).__name__
