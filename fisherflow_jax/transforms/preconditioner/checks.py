"""What a preconditioner accepts: options, trees, batches and keys that fit."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from fisherflow_jax import information as ops
from fisherflow_jax._ground import keys, trees
from fisherflow_jax._ground.checks import described, made, not_negative, whole
from fisherflow_jax._ground.screening import check_option
from fisherflow_jax.estimators import Estimator
from fisherflow_jax.memories import Memory
from fisherflow_jax.structures import ADAPTIVE
from fisherflow_jax.transforms.preconditioner.state import Recipe

PyTree = Any

_STATIC = (
    "within optax.inject_hyperparams name it in static_args, as estimator, memory, "
    "period, inverse_period, power, factorise and key."
)


def check_recipe(recipe: Recipe) -> None:
    """Raises where the choices of a preconditioner are out of range, or do not fit."""
    estimator, memory = recipe.estimator, recipe.memory
    check_estimator(estimator)
    made(memory, Memory, "memory", "ff.memories.exponential(0.95)")
    if ADAPTIVE in memory.needs:
        raise ValueError(
            f"{memory.name} tests the estimates of a flow, and a preconditioner has "
            "none: take stationary, windowed, exponential or random_walk."
        )
    for capability, reason in memory.needs.items():
        estimator.structure.require(capability, reason)
    try:
        whole(recipe.period, "period", of="steps")
        if recipe.inverse_period is not None:
            whole(recipe.inverse_period, "inverse_period", of="steps")
    except ValueError as error:
        raise ValueError(f"{error} Or {_STATIC}") from error
    power = recipe.power
    if not isinstance(power, (int, float)) or not -math.inf < power <= 0:
        raise ValueError(
            f"power is a number of at most 0, such as -1; got {power!r}; {_STATIC}"
        )
    _check_number(recipe.root_damping, "root_damping")
    if not callable(recipe.damping):
        _check_number(recipe.damping, "damping")
    if not callable(recipe.factorise):
        raise ValueError(
            "factorise is a function of (information, damping, power, root_damping), "
            f"such as ff.transforms.factorise; got {recipe.factorise!r}."
        )
    if not isinstance(recipe.momentum, optax.GradientTransformation):
        raise ValueError(
            "momentum is a transformation of the gradients, such as optax.ema(0.9); "
            f"got {recipe.momentum!r}."
        )
    _check_renewals(recipe)
    check_option(recipe.bad_rows)


def check_estimator(estimator: Any) -> None:
    """Raises for what is no estimator, or has no model yet."""
    if not isinstance(estimator, Estimator):
        raise ValueError(
            "estimator is what a factory of ff.estimators returns, with its model and "
            f"structure; got {estimator!r}."
        )


def _check_renewals(recipe: Recipe) -> None:
    for name, value in (
        ("spread_inverses", recipe.staggered),
        ("eigenvalue_correction", recipe.corrected),
    ):
        if not isinstance(value, bool):
            raise ValueError(f"{name} is True or False; got {value!r}; {_STATIC}")
    whole, stride = recipe.renewals
    given = f"inverse_period = {recipe.inverse_period} and period = {recipe.period}."
    if recipe.corrected:
        if recipe.estimator.rebuild is None and recipe.estimator.bound is None:
            raise ValueError(
                "eigenvalue_correction=True measures a batch also in the factors' "
                f"eigenbasis: estimators.{recipe.estimator.name} has no rebuild, which "
                "gives the same estimator in another structure."
            )
        if whole % stride:
            raise ValueError(
                "with eigenvalue_correction=True the basis is renewed where curvature "
                f"is, so that inverse_period is a multiple of period; got {given}"
            )
    if recipe.staggered and whole // stride < 2:
        raise ValueError(
            "spread_inverses=True staggers the renewals over inverse_period steps, of "
            f"which there must be several; got {given}"
        )


# below so many vectors a quadratic form of the estimate has a relative standard
# deviation of more than sqrt(2 / 32) = 1/4
FEWEST_VECTORS = 32


def check_rank(estimator: Estimator, information: Any) -> None:
    """Raises where the inverse would follow the noise of a few random vectors."""
    count = estimator.vectors_a_batch
    dense = ops.facts(information).dense
    if not dense or count is None or count >= FEWEST_VECTORS:
        return
    raise ValueError(
        f"estimators.{estimator.name} squares {count} random vectors a batch, and the "
        f"rank of an information in {estimator.structure.name} would be no more: the "
        f"inverse would follow their noise. Give it at least {FEWEST_VECTORS} (probes "
        "or samples, times groups) or groups=None, or keep the structure diagonal or "
        "kronecker."
    )


def _check_number(value: Any, name: str) -> None:
    if jnp.shape(value) != ():
        raise ValueError(f"{name} is one number; got shape {jnp.shape(value)}.")
    not_negative(value, name)


def check_adapted(recipe: Recipe, curvature: Any) -> None:
    """Raises where `adapt_damping` would change what is not used, or not see a
    penalty's curvature."""
    if curvature is not None:
        raise ValueError(
            "adapt_damping compares the loss with what batches say of it, without the "
            "penalty whose curvature is given: take one of the two."
        )
    damping = recipe.damping
    if isinstance(damping, (int, float)):
        return
    kind = "a schedule" if callable(damping) else described(damping)
    raise ValueError(
        "adapt_damping changes the damping in the state, and writes in vain where it "
        f"is asked for anew at each step: it is {kind} (arrays may be traced, or "
        "change as those of optax.inject_hyperparams do). Give a Python number, from "
        "which it starts."
    )


def check_key(name: str, random: bool, key: Any) -> None:
    """Raises for what draws and has no key to draw with."""
    if random and key is None:
        raise ValueError(
            f"{name} draws at random: build the optimiser with a key, as in "
            "ff.kfac(..., key=0) or ff.scale_by_fisher(..., key=0). The key of an "
            "update takes its place in that one."
        )


def check_real(params: PyTree) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if callable(leaf) or isinstance(leaf, bool):
            trees.check_real(trees.parameter_name(path), leaf, "params")
        # a leaf may be a shape, or a mere placeholder
        dtype = getattr(leaf, "dtype", jnp.float32)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(
                "params must be real floating-point arrays; "
                f"{trees.parameter_name(path)} has dtype {dtype} (leave it out with "
                "optax.masked)."
            )


def check_same(left: PyTree, right: PyTree, rule: str) -> None:
    """Raises where two trees have other leaves or shapes, by the first that differs."""
    paths = map(jax.tree_util.tree_leaves_with_path, (left, right))
    one, other = (
        {trees.parameter_name(path): jnp.shape(leaf) for path, leaf in leaves}
        for leaves in paths
    )
    if one == other:
        return
    first = min(name for name in one | other if one.get(name) != other.get(name))
    raise ValueError(
        f"{rule}; at {first} there is {one.get(first, 'nothing')} in one and "
        f"{other.get(first, 'nothing')} in the other."
    )


def check_no_holes(name: str, model: PyTree) -> None:
    if trees.has_holes(model):
        raise ValueError(
            "the parameters have holes, which optax.masked and optax.partition make, "
            f"and {name} runs the whole model: give it the whole tree, "
            "update(updates, state, params, batch=batch, model_params=params)."
        )


def needs_of_model(
    estimator: Estimator, model: PyTree | None, batch: Any, key: Any, own_key: Any
) -> tuple[PyTree, Any]:
    """The whole tree that the model is run with, and the key to draw with."""
    name = f"estimators.{estimator.name}"
    if model is None:
        raise ValueError(
            f"{name} runs the model: call update(updates, state, params, batch=batch)."
        )
    check_no_holes(name, model)
    model = trees.real_arrays(model, "params")
    if batch is None:
        raise ValueError(
            f"{name} needs the batch: call update(updates, state, params, "
            "batch=(inputs, targets)). Of wrappers that drop extra arguments, flax's "
            "TrainState.apply_gradients is one (ff.flax.TrainState in its place hands "
            "them on), and optax.MultiSteps within another transformation a second."
        )
    if not estimator.random:
        return model, None
    return model, own_key if key is None else keys.key_data(key)
