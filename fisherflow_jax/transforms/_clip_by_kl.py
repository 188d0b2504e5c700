"""A trust region in the space of distributions."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fisherflow_jax._ground import batch as batches
from fisherflow_jax._ground import checks, choices, keys, sharding, trees
from fisherflow_jax.likelihoods import Likelihood
from fisherflow_jax.model import Model, check_choices, derivative, once
from fisherflow_jax.transforms.preconditioner import checks as rules

PyTree = Any


class ClipByKLState(NamedTuple):
    """What the last update would have done, and how often there was none.

    Made by `ff.clip_by_kl`.
    """

    kl: jax.Array  # () of the update as it came in
    num_unmeasured: jax.Array  # () int32, updates whose divergence was not finite


def clip_by_kl(
    apply_fn: Callable, likelihood: Likelihood, max_kl: float | jax.Array
) -> optax.GradientTransformationExtraArgs:
    r"""Shortens updates that would change the predictions by more than `max_kl`.

    .. math:: \mathrm{KL} \approx \frac{1}{2 \sum_i w_i} \sum_i w_i \,
       \delta z_i^\top A_i\, \delta z_i, \qquad \delta z = J u, \qquad
       u' = u \min\bigl(1, \sqrt{\mathrm{max\_kl} / \mathrm{KL}}\bigr),

    with `A` the Fisher information of the outputs: the mean divergence of an example's
    distribution after the update from that before it, to second order. Put it after
    the learning rate, for it measures the step itself.

    Args:
      apply_fn: `(params, inputs) -> outputs`, leading axis = examples.
      likelihood: from `ff.likelihoods`.
      max_kl: the bound in nats an observation, positive.

    Returns:
      A transformation whose update is `update(updates, state, params, *, batch,
      key=None, model_params=None, **extra)`; `model_params` as in `ff.scale_by_fisher`,
      the key only for a likelihood whose root is sampled. An update whose divergence is
      not finite becomes zero and is counted; bad rows of the batch have weight 0. Cost:
      one forward and one tangent pass of the batch; where the model has a
      `jax.custom_vjp`, which has no tangent pass, two forward passes, whose difference
      is J u to the root of the precision.

    Raises:
      ValueError: for a bound that is not positive; at update, for a missing batch,
        missing parameters, or holes in them without `model_params`.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> apply_fn = lambda params, x: x @ params
      >>> clip = ff.clip_by_kl(apply_fn, ff.likelihoods.gaussian(), max_kl=0.02)
      >>> params = jnp.zeros(2)
      >>> batch = jnp.array([[1.0, 0.0], [0.0, 1.0]]), jnp.zeros(2)
      >>> updates, state = clip.update(
      ...     jnp.array([1.0, -1.0]), clip.init(params), params, batch=batch
      ... )
      >>> print(updates.round(3), state.kl)  # both means move by one: a KL of one half
      [ 0.2 -0.2] 0.5

    References:
      Schulman, Levine, Abbeel, Jordan, Moritz, "Trust region policy optimization",
      2015.
    """
    recipe = choices.shared(region(apply_fn, likelihood, max_kl))
    update = functools.partial(_update, recipe)
    return optax.GradientTransformationExtraArgs(begin, update)


@dataclasses.dataclass(frozen=True)
class Region:
    """What is kept of a trust region's choices."""

    apply_fn: Callable
    likelihood: Likelihood
    max_kl: float | jax.Array
    screens: bool = True  # a batch may have bad rows

    @property
    def random(self) -> bool:
        """Whether measuring draws from a key."""
        return self.likelihood.random_root


def region(
    apply_fn: Callable, likelihood: Likelihood, max_kl: float | jax.Array
) -> Region:
    """The choices, checked."""
    check_choices(apply_fn, likelihood)
    known = checks.is_concrete(max_kl)
    if jnp.shape(max_kl) != () or (known and not float(max_kl) > 0):
        raise ValueError(f"max_kl is one positive number; got {max_kl}.")
    return Region(choices.hashable(apply_fn), likelihood, max_kl)


def begin(params: PyTree) -> ClipByKLState:
    """Nothing measured yet."""
    dtype = trees.float_dtype(params)
    return ClipByKLState(jnp.zeros((), dtype), jnp.zeros((), jnp.int32))


def _update(
    region: Region,
    updates: PyTree,
    state: ClipByKLState,
    params: PyTree | None = None,
    *,
    batch: Any = None,
    key: Any = None,
    model_params: PyTree | None = None,
    **extra: Any,
) -> tuple[PyTree, ClipByKLState]:
    del extra
    model = params if model_params is None else model_params
    if batch is None or model is None:
        missing = "batch" if batch is None else "params"
        raise ValueError(
            f"clip_by_kl needs {missing}: call update(updates, state, params, "
            "batch=(inputs, targets))."
        )
    rules.check_no_holes("clip_by_kl", model)
    if region.random and key is None:
        raise ValueError(
            f"{region.likelihood.name} samples its root: give each update a key."
        )
    key = keys.typed_key(key) if region.random else None
    batch = batches.as_batch(batch, values=False)
    (clipped, _), state = shorten(region, updates, (), state, model, batch, key)
    return clipped, state


def shorten(
    region: Region,
    updates: PyTree,
    alike: PyTree,
    state: ClipByKLState,
    model: PyTree,
    batch: batches.Batch,
    key: jax.Array | None,
) -> tuple[tuple[PyTree, PyTree], ClipByKLState]:
    """Updates within the region, and what is to be shortened by the same factor."""
    run = functools.partial(choices.run, region, _clip)
    like = (updates, alike), state
    arguments = updates, alike, state, model, batch, key
    return sharding.in_auto_mode(run, like, *arguments)


def _clip(
    region: Region,
    updates: PyTree,
    alike: PyTree,
    state: ClipByKLState,
    model: PyTree,
    batch: batches.Batch,
    key: jax.Array | None,
) -> tuple[tuple[PyTree, PyTree], ClipByKLState]:
    kl = _divergence(region, updates, model, batch, key).astype(state.kl.dtype)
    finite = jnp.isfinite(kl)
    factor = jnp.sqrt(region.max_kl / jnp.maximum(kl, region.max_kl)).astype(kl.dtype)
    both = updates, alike
    scaled = jax.tree.map(lambda x: (x * factor).astype(x.dtype), both)
    clipped = trees.zero_unless(finite, scaled)
    count = state.num_unmeasured + (~finite).astype(jnp.int32)
    return clipped, ClipByKLState(jnp.where(finite, kl, state.kl), count)


def _divergence(
    region: Region,
    updates: PyTree,
    model: PyTree,
    batch: batches.Batch,
    key: jax.Array | None,
) -> jax.Array:
    """Of an example's distribution after the updates, to second order, in the mean."""
    apply_fn, likelihood = once(region.apply_fn), region.likelihood
    if region.screens:
        batch, _ = Model(apply_fn, likelihood).screen(model, batch)(batch)
    inputs, total = batches.unshare(batch.inputs), jnp.sum(batch.weights)
    if likelihood.observing is not None:
        batch, there = batches.observed(batch)
        likelihood = likelihood if there is None else likelihood.observing(there)
    direction = optax.tree.cast_like(trees.fill_with_zeros(updates, model), model)
    outputs, change = derivative(apply_fn, model, inputs, direction)
    region.likelihood.check(outputs, None)
    dtype = trees.wide_dtype(outputs.dtype)
    outputs, change = outputs.astype(dtype), change.astype(dtype)
    probes = jnp.zeros(likelihood.probe_shape(outputs.shape), dtype)
    # the root is linear in its probes: its transpose turns the change into L^T dz
    _, transpose = jax.vjp(lambda x: likelihood.root(outputs, x, key), probes)
    (turned,) = transpose(change)
    each = region.likelihood.shape_of_targets(outputs)
    squares = jnp.sum(jnp.square(turned), axis=tuple(range(len(each), turned.ndim)))
    return batches.weighted_total(batch, squares) / (2 * total.astype(dtype))
