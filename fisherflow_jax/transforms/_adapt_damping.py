"""Damping that follows how well the quadratic model has predicted the loss."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fisherflow_jax import information as ops
from fisherflow_jax._ground import checks, choices, sharding, trees
from fisherflow_jax.transforms.preconditioner import state as states

PyTree = Any


class AdaptDampingState(NamedTuple):
    """The wrapped state, in which the damping lives, and what was last found.

    Made by `ff.transforms.adapt_damping`.
    """

    adapted_state: Any
    reduction_ratio: jax.Array  # () of the last comparison; NaN before the first


def adapt_damping(
    transformation: optax.GradientTransformation,
    loss: Callable[[PyTree, Any], jax.Array],
    *,
    period: int = 5,
    rate: float = 0.95,
    low: float = 0.25,
    high: float = 0.75,
    smallest: float = 1e-8,
    largest: float = 1e8,
) -> optax.GradientTransformationExtraArgs:
    r"""Adapts the damping by the rule of Levenberg and Marquardt.

    .. math:: \rho = \frac{h(\theta) - h(\theta + \delta)}
       {-g^\top \delta - \tfrac12 \delta^\top \bar F \delta}, \qquad
       \lambda \leftarrow \begin{cases}
       \lambda / \omega^T & \rho < \text{low} \\
       \lambda\, \omega^T & \rho > \text{high}
       \end{cases}

    with the loss h, its gradient g, the step `delta` as it will be taken, `omega` the
    rate and T the period. Where the model promised too much, steps get shorter. The
    loss is compared on one batch, before and after the step: differences between two
    batches are noise. The mean information F is the one that is remembered, undamped.

    Args:
      transformation: a whole optimiser around one `ff.scale_by_fisher`, such as
        `ff.kfac(...)`, whose damping is a Python number. It must see the gradients of
        `loss`, and its updates must be the steps that are taken.
      loss: `(params, batch) -> number`, such as
        `ff.negative_log_likelihood(apply_fn, likelihood)`.
      period: T, steps between two comparisons.
      rate: `omega`, in (0, 1): by how much the damping falls an update.
      low: the ratio below which damping rises; so it does where no reduction was
        predicted, or where the loss after the step is not finite.
      high: the ratio above which damping falls.
      smallest: the damping never falls below it.
      largest: nor rises above this.

    Returns:
      A transformation whose update is `update(updates, state, params, *, batch,
      value=None, model_params=None, **extra)`, all of which it passes on; `value` is
      the loss at the parameters, where it is known. The state has `reduction_ratio`. A
      skipped or an accumulating update (as most of `optax.MultiSteps` are), or a loss
      that is not finite before the step, changes no damping.
      Cost: every `period` steps one evaluation of the loss (two without `value`) and
      one product with the information. Inverses that are kept use a new damping when
      they are next renewed.

    Raises:
      ValueError: for options out of range, and for an `optax.MultiSteps` object, which
        drops the batch; at update, for a missing batch or parameters, for a damping
        that is a schedule or an array, which would be written over what is adapted, and
        where there is not one `ff.scale_by_fisher` with a Fisher information.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import fisherflow_jax as ff
      >>> model = lambda params, x: x @ params, ff.likelihoods.gaussian()
      >>> loss = ff.negative_log_likelihood(*model)
      >>> estimator = ff.estimators.exact(*model, ff.structures.full())
      >>> optimizer = ff.transforms.adapt_damping(
      ...     ff.natural_gradient(1.0, estimator, damping=1.0), loss, period=1
      ... )
      >>> x = jnp.array([[1.0, 0.0], [1.0, 1.0], [1.0, 2.0]])
      >>> params, batch = jnp.zeros(2), (x, jnp.array([1.0, 3.0, 5.0]))
      >>> value, gradients = jax.value_and_grad(loss)(params, batch)
      >>> _, state = optimizer.update(
      ...     gradients, optimizer.init(params), params, batch=batch, value=value
      ... )
      >>> print(state.reduction_ratio.round(3))  # the model is exact
      1.0
      >>> print(f"{optax.tree.get(state, 'damping'):.2f}")
      0.95

    References:
      Martens, Grosse, "Optimizing neural networks with Kronecker-factored approximate
      curvature", 2015, section 6.5.
    """
    if not callable(loss):
        raise ValueError(
            "loss is a function of (params, batch), such as "
            f"ff.negative_log_likelihood(apply_fn, likelihood); got {loss!r}."
        )
    checks.whole(period, "period", of="steps")
    checks.fraction(rate, "rate")
    checks.not_negative(smallest, "smallest")
    for bounds, rule in (
        ((low, high), "low must not exceed high"),
        ((smallest, largest), "smallest must not exceed largest"),
    ):
        if not bounds[0] <= bounds[1]:
            raise ValueError(f"{rule}; got {bounds[0]} and {bounds[1]}.")
    if isinstance(transformation, optax.MultiSteps):
        raise ValueError(
            "an optax.MultiSteps within another transformation gets no batch: give "
            "optax.GradientTransformationExtraArgs(steps.init, steps.update), with "
            "steps the MultiSteps."
        )
    recipe = _Rule(
        loss=choices.hashable(loss),
        period=period,
        rate=rate,
        ratios=(low, high),
        dampings=(smallest, largest),
    )
    inner = optax.with_extra_args_support(transformation)
    init = functools.partial(_init, inner)
    update = functools.partial(_update, choices.shared(recipe), inner)
    return optax.GradientTransformationExtraArgs(init, update)


@dataclasses.dataclass(frozen=True)
class _Rule:
    loss: Callable[[PyTree, Any], jax.Array]
    period: int
    rate: float
    ratios: tuple[float, float]
    dampings: tuple[float, float]


def _init(
    inner: optax.GradientTransformationExtraArgs, params: PyTree
) -> AdaptDampingState:
    unknown = jnp.full((), jnp.nan, trees.float_dtype(params))
    return AdaptDampingState(inner.init(params), unknown)


def _update(
    rule: _Rule,
    inner: optax.GradientTransformationExtraArgs,
    updates: PyTree,
    state: AdaptDampingState,
    params: PyTree | None = None,
    *,
    batch: Any = None,
    value: jax.Array | None = None,
    model_params: PyTree | None = None,
    **extra: Any,
) -> tuple[PyTree, AdaptDampingState]:
    model = params if model_params is None else model_params
    if batch is None or model is None or trees.has_holes(model):
        raise ValueError(
            "adapt_damping compares losses: call update(updates, state, params, "
            "batch=(inputs, targets)), and within optax.masked or optax.partition "
            "with model_params=, the whole tree."
        )
    known = {"value": value, "model_params": model_params}
    known = {name: x for name, x in known.items() if x is not None}
    steps, after = inner.update(
        updates,
        state.adapted_state,
        params,
        batch=batch,
        adapts_damping=True,
        **known,
        **extra,
    )
    found = states.fisher_state(after)
    # not so in an update that is skipped, or that only accumulates
    stepped = found.step > states.fisher_state(state.adapted_state).step
    like = found.damping, state.reduction_ratio
    damping, ratio = sharding.in_auto_mode(
        functools.partial(choices.run, rule, _adapted),
        like,
        *(updates, steps, found, stepped, model, batch, value, state.reduction_ratio),
    )
    found_in = states.is_fisher_state
    adapted = jax.tree.map(
        lambda node: node._replace(damping=damping) if found_in(node) else node,
        after,
        is_leaf=found_in,
    )
    return steps, AdaptDampingState(adapted, ratio)


def _adapted(
    rule: _Rule,
    updates: PyTree,
    steps: PyTree,
    found: states.ScaleByFisherState,
    stepped: jax.Array,
    model: PyTree,
    batch: Any,
    value: jax.Array | None,
    ratio: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """The damping and the ratio after a step, compared where it is time to."""
    low, high = rule.ratios

    def judged() -> tuple[jax.Array, jax.Array]:
        start = rule.loss(model, batch) if value is None else value
        wide_steps, gradients = trees.widen(steps), trees.widen(updates)
        curved = ops.quadratic_form(states.believed(found), wide_steps)
        predicted = -trees.dot(gradients, wide_steps) - curved / found.observations / 2
        moved = optax.apply_updates(model, trees.fill_with_zeros(steps, model))
        now = rule.loss(moved, batch)
        start, now = (jnp.asarray(x).astype(ratio.dtype) for x in (start, now))
        new = (start - now) / predicted.astype(ratio.dtype)
        # what is not a number is a bad step too
        good = (predicted > 0) & (new >= low)
        factor = jnp.where(good, 1.0, rule.rate**-rule.period)
        factor = jnp.where(good & (new > high), rule.rate**rule.period, factor)
        damping = found.damping * factor.astype(found.damping.dtype)
        damping = jnp.clip(damping, *rule.dampings)
        fresh, kept = (damping, new), (found.damping, ratio)
        return optax.tree.where(jnp.isfinite(start), fresh, kept)

    due = stepped & (found.step % rule.period == 0)
    return jax.lax.cond(due, judged, lambda: (found.damping, ratio))
