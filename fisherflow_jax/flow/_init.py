"""A flow before any data."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from fisherflow_jax import information as ops
from fisherflow_jax._ground import trees
from fisherflow_jax._ground.choices import Compared, compiled, shared
from fisherflow_jax._ground.keys import key_data
from fisherflow_jax.flow._checks import parameters
from fisherflow_jax.flow._recipe import Recipe
from fisherflow_jax.flow._state import Events, FlowState
from fisherflow_jax.memories import Prior, Shift, Sum
from fisherflow_jax.structures import _prior as priors
from fisherflow_jax.structures._compensated import compensate

PyTree = Any


def init(
    recipe: Recipe, params: PyTree, prior_mean: PyTree = None, key: Any = None
) -> FlowState:
    """The state that believes the prior, its search starting at `params`."""
    mean = parameters(params, "params")
    origin = mean if prior_mean is None else parameters(prior_mean, "prior_mean")
    shapes = jax.tree.map(jnp.shape, (origin, mean))
    if shapes[0] != shapes[1]:
        raise ValueError(
            "prior_mean must have the tree and shapes of params; got "
            f"{shapes[0]} for {shapes[1]}."
        )
    curvature = recipe.bound(recipe.estimator.value, recipe.apply_fn)
    if not curvature.random:
        key = None
    elif key is None:
        raise ValueError(
            f"estimators.{curvature.name} draws at random: give flow.init a key."
        )
    precision = priors.as_precision(recipe.prior_precision.value, mean)
    # compiled once for all models
    recipe = dataclasses.replace(
        recipe,
        apply_fn=begin,
        estimator=Compared(None),
        prior_precision=Compared(None),
        num_steps=1,
        chunk_size=None,
    )
    return compiled(shared(recipe), begin)(mean, origin, precision, key_data(key))


def begin(
    recipe: Recipe, mean: PyTree, origin: PyTree, precision: Any, key: Any
) -> FlowState:
    """The same from arrays that fit. No two leaves share a buffer, with each other or
    with the arguments: a state may be donated to a compiled update."""
    origin = jax.tree.map(lambda x, like: x.astype(like.dtype), origin, mean)
    nothing = recipe.structure.isotropic(mean, 0.0)
    information = priors.starting_information(nothing, precision)
    if recipe.marginal and type(information) is not type(nothing):
        raise ValueError(
            "marginal=True keeps one structure: give prior_precision as a number, "
            "a pytree prefix, or an information in that structure."
        )
    zero, none = jnp.zeros((), trees.float_dtype(mean)), jnp.zeros((), jnp.int32)
    residual = zero if recipe.estimates_dispersion else None
    zeros = Sum(
        curvature=nothing,
        weight=zero,
        linear=Shift(optax.tree.zeros_like(mean), residual),
        quadratic=(nothing,) if recipe.robust else (),
    )
    meat = None
    if recipe.robust:
        # as rich as the information, which a richer prior may have made richer than
        # the structure
        meat = ops.add(nothing, ops.scale(precision, 0.0))
    keep = compensate if recipe.compensated else (lambda x: x)
    state = FlowState(
        mean=mean,
        information=keep(information),
        count=zero,
        log_evidence=zero,
        meat=None if meat is None else keep(meat),
        residual=residual,
        prior=Prior(origin, precision),
        memory=recipe.memory.init(zeros),
        step=none,
        num_skipped=none,
        events=Events(none, none, none),
        key=key,
    )
    return jax.tree.map(jnp.copy, state)
