"""What is refused: states, models and likelihoods that do not go together."""

from collections.abc import Callable
from typing import Any

import jax

from fisherflow_jax import information as ops
from fisherflow_jax import layers
from fisherflow_jax._ground import batch as batches
from fisherflow_jax._ground import calling, checks, trees
from fisherflow_jax._ground.choices import hashable
from fisherflow_jax.likelihoods import Likelihood, gaussian
from fisherflow_jax.model import Model, plain
from fisherflow_jax.posteriors import Gaussian, check_like, gaussians, warn_of_refused

PyTree = Any


def check_inputs(
    state: Any, inputs: PyTree, chunk_size: int | None, robust: bool | str = False
) -> PyTree:
    """The inputs as arrays. Raises where values are at hand, and warns of batches that
    were refused."""
    if chunk_size is not None:
        checks.whole(chunk_size, "chunk_size", of="examples")
    inputs = batches.as_batch((inputs, None)).inputs  # of one leading axis, n > 0
    believed(state, robust)
    warn_of_refused(state)
    if jax.tree_util.all_leaves([state]):
        raise TypeError(
            "a state is a pytree, such as a NamedTuple, so that it can be an argument "
            f"of compiled functions; got {_described(state)}."
        )
    return inputs


def believed(state: Any, robust: bool | str) -> tuple[jax.Array, tuple[Gaussian, ...]]:
    """`gaussians(state)`, with the meat that `robust` asks for."""
    weights, members = gaussians(state)
    if not robust:
        return weights, members
    asked = gaussians(state, robust)[1]
    pairs = zip(members, asked, strict=True)
    return weights, tuple(one._replace(meat=other.meat) for one, other in pairs)


def one_belief(state: Any, refusal: str, robust: bool | str = False) -> Gaussian:
    """The Gaussian of a state that is no mixture of several."""
    members = believed(state, robust)[1]
    if len(members) > 1:
        raise ValueError(f"{refusal}: ask for that of each of bank.members.")
    return members[0]


def known(likelihood: Likelihood, belief: Gaussian) -> Likelihood:
    """The likelihood with the state's dispersion and the like, where unknown."""
    if likelihood.nuisance is not None:
        if belief.nuisance is None:
            raise ValueError(
                f"the {' and '.join(likelihood.nuisance.names)} of {likelihood.name} "
                "is unknown and this state does not estimate it: give a number."
            )
        return likelihood.nuisance.known(belief.nuisance.mean)
    if likelihood.with_dispersion is None:
        return likelihood
    if belief.dispersion is None:
        raise ValueError(
            f"the dispersion of {likelihood.name} is unknown and this state does "
            "not estimate it: give the likelihood it was made with, or "
            "likelihood.with_dispersion(value)."
        )
    return likelihood.with_dispersion(belief.dispersion)


def check_model(
    belief: Gaussian,
    apply_fn: Callable,
    inputs: PyTree,
    likelihood: Likelihood | None = None,
) -> None:
    """Raises where model and state do not go together. Static: shapes alone."""
    mean = belief.mean
    check_like(jax.eval_shape(ops.diagonal, belief.information, mean), mean)
    try:
        outputs = jax.eval_shape(apply_fn, mean, batches.unshare(inputs))
    except Exception as error:
        leaves = jax.tree_util.tree_leaves_with_path(mean, is_leaf=lambda x: x is None)
        holes = [trees.parameter_name(path) for path, leaf in leaves if leaf is None]
        if holes:
            error.add_note(
                f"The state is about some of the parameters, without {holes}: it goes "
                "with the function that ff.only returned, not with the whole model."
            )
        raise
    count = batches.split(inputs)[0][0].shape[0]
    shape = getattr(outputs, "shape", None)
    if not shape or shape[0] != count:
        several = calling.several(outputs)
        raise ValueError(
            "apply_fn(params, inputs) must return one array of outputs whose leading "
            f"axis is the examples' (n = {count}; one row alone is x[None]); got "
            f"{outputs}.{several}"
        )
    found: Any = ops.facts(belief.information).layers
    said = False if found is not None and found.row_by_row else None
    # any likelihood will do: it is no matter of theirs
    model = Model(apply_fn, likelihood or gaussian(), said)
    why = "and a row is predicted as it is alone (one row is x[None])"
    model.check_alone(mean, inputs, why)
    if likelihood is not None:
        # of one example, whose last axis is not that of the examples
        likelihood.check(jax.ShapeDtypeStruct(shape[1:], outputs.dtype), None)


def deciding(
    run: Callable, state: Any, apply_fn: Callable, inputs: PyTree, *rest: Any
) -> Any:
    """`run(state, apply_fn, inputs, *rest)`, for which values may have to tell whether
    examples interact."""
    held = hashable(apply_fn)  # a part of what is compiled
    return layers.deciding(
        lambda: run(state, held, inputs, *rest),
        plain(held),
        lambda: (gaussians(state)[1][0].mean, inputs),
    )


def one_by_one(inputs: PyTree) -> tuple[list[jax.Array], Callable[[list], PyTree]]:
    """The parts of the inputs that have an axis of examples, and one example of them.

    What is made of slices of all parts has a leading axis of 1.
    """
    parts, rebuild = batches.split(inputs)
    return parts, lambda one: batches.unshare(rebuild([x[None] for x in one]))


def _described(value: Any) -> str:
    return getattr(value, "__name__", None) or type(value).__name__
