"""An Optax transformation that multiplies gradients by a power of the information."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from fisherflow_jax import batch as batches
from fisherflow_jax import vectors
from fisherflow_jax.estimators import Estimator
from fisherflow_jax.memories import Memory
from fisherflow_jax.memories.memory import Site
from fisherflow_jax.transforms import checks, preconditioning, sharding
from fisherflow_jax.transforms.remembering import (
    Remembered,
    all_finite,
    mean_information,
    select,
    take_in,
)
from fisherflow_jax.transforms.restriction import has_holes, restrict
from fisherflow_jax.transforms.state import (
    ScaleByFisherState,
    SecondMoment,
    information_of,
)

PyTree = Any
Damping = jax.typing.ArrayLike | Callable[[jax.Array], jax.typing.ArrayLike]


def scale_by_fisher(
    estimator: Estimator,
    *,
    memory: Memory,
    damping: Damping,
    period: int = 1,
    inverse_period: int | None = None,
    momentum: optax.GradientTransformation | None = None,
    power: float = -1,
    root_damping: float = 0.0,
    factorise: Callable[..., Any] | None = None,
    key: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Multiplies gradients by a power of the damped Fisher information.

    .. math:: u = \bigl((\bar F + \lambda)^{-p} + \epsilon\bigr)^{-1} m, \qquad
       \bar F = \frac{\sum_t c_t F_t}{\sum_t c_t n_t},

    with `m` the gradient, or the inner momentum of it, and `c_t` what the memory gives
    to batch t. The mean is per observation, so that damping has one meaning whatever
    the size of batches. The curvature sees the gradients as they come in, which no
    order of a chain could give it. `ff.negative_log_likelihood` is the loss whose
    gradient is on this scale.

    Args:
      estimator: from `ff.estimators`, with its structure.
      memory: from `ff.memories`: stationary, windowed, exponential or random_walk.
        exponential is Optax's moving average of the batches' means.
      damping: `lambda >= 0`, a number (kept in the state, where a wrapper may change
        it), a schedule of the step, or an array.
      period: steps between two curvatures. Between them no pass is made.
      inverse_period: steps between two factorisations, kept in the state; None: at
        each step for the scalar and diagonal structures, else at each new curvature.
      momentum: a transformation of the gradients before they are multiplied, such as
        `optax.ema(0.9)`.
      power: p; -1 is the natural gradient, -1/2 Adam's root.
      root_damping: `epsilon`, added after the root, as Adam's eps.
      factorise: `(information, damping, power, root_damping) -> factorisation`, such
        as `ff.transforms.relative_to_mean_eigenvalue`; None: `ff.transforms.factorise`.
      key: an int or a key, from which an estimator that draws takes one at each step;
        None: it is given to each update.

    Returns:
      A transformation whose update is `update(updates, state, params, *, batch=None,
      key=None, model_params=None, **extra)`. The batch is that of the gradients. Within
      `optax.masked` or `optax.partition`, which show it only a part of the parameters,
      `model_params` is the whole tree, with which the model is run. An update with a
      non-finite value (gradient, curvature, result) or a negative damping returns
      zeros, keeps the state, and is counted in `num_skipped`; only a finite curvature
      is still taken in if the solve fails. Cost of a step: the estimator every `period`
      steps, a factorisation every `inverse_period`, and applying it. Memory: an
      information, its factorisation and what the memory stores.

    Raises:
      ValueError: when built, for options out of range or an adaptive memory; at init,
        for parameters that are not real; at update, for a missing batch, parameters or
        key, holes in the parameters without `model_params`, or another tree.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import fisherflow_jax as ff
      >>> model = lambda params, x: x @ params, ff.likelihoods.gaussian()
      >>> optimizer = optax.chain(
      ...     ff.scale_by_fisher(
      ...         ff.estimators.exact(*model, ff.structures.full()),
      ...         memory=ff.memories.windowed(1),
      ...         damping=0.0,
      ...     ),
      ...     optax.scale(-1.0),
      ... )
      >>> params = jnp.zeros(2)
      >>> x = jnp.array([[1.0, 0.0], [1.0, 1.0], [1.0, 2.0]])
      >>> batch = x, jnp.array([1.0, 3.0, 5.0])
      >>> gradients = jax.grad(ff.negative_log_likelihood(*model))(params, batch)
      >>> state = optimizer.init(params)
      >>> updates, state = optimizer.update(gradients, state, params, batch=batch)
      >>> print(optax.apply_updates(params, updates).round(2))  # one Newton step
      [1. 2.]

    References:
      Amari, "Natural gradient works efficiently in learning", 1998.
      Kingma, Ba, "Adam: a method for stochastic optimization", 2015.
      Martens, "New insights and perspectives on the natural gradient method", 2020.
    """
    checks.check_options(
        estimator, memory, damping, period, inverse_period, power, root_damping
    )
    if key is not None and not estimator.random:
        raise ValueError(f"estimators.{estimator.name} draws nothing; it takes no key.")
    structure = estimator.structure
    inner = optax.with_extra_args_support(momentum or optax.identity())
    own_key = vectors.key_data(key)

    def init_fn(params: PyTree) -> ScaleByFisherState:
        checks.check_real(params)
        nothing = sharding.zeros_like_parameters(
            structure.isotropic(params, 0.0), params
        )
        zero = jnp.zeros((), vectors.float_dtype(params))
        count = jnp.zeros((), jnp.int32)
        site = Site(nothing, None, None, zero, None, None)
        start = damping(count) if callable(damping) else damping
        made = jax.eval_shape(_factorise, nothing, zero)
        remembered = nothing
        if estimator.not_a_curvature:
            remembered = SecondMoment(nothing)
        kept = None
        if _period_of(made) > 1:
            kept = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), made)
        state = ScaleByFisherState(
            step=count,
            information=remembered,
            observations=zero,
            num_batches=count,
            damping=jnp.asarray(start).astype(zero.dtype),
            memory=memory.init(site),
            factorisation=kept,
            momentum=inner.init(params),
            num_skipped=count,
            key=own_key,
        )
        # no two leaves share a buffer: a state may be donated to a compiled update
        return jax.tree.map(jnp.copy, state)

    def _factorise(information: Any, damping: jax.Array) -> Any:
        made = factorise or preconditioning.factorise
        return made(information, damping, power, root_damping)

    def _refactorised(
        kept: Any, mean: Any, damping: jax.Array, due: jax.Array
    ) -> tuple[Any, jax.Array]:
        """The factorisation to use, and whether it could be made."""

        def anew() -> tuple[Any, jax.Array]:
            fresh = _factorise(mean, damping)
            finite = all_finite(fresh)
            return select(finite, fresh, kept), finite

        return jax.lax.cond(due, anew, lambda: (kept, jnp.array(True)))

    def _period_of(factorisation: Any) -> int:
        if inverse_period is not None:
            return inverse_period
        return 1 if preconditioning.is_elementwise(factorisation) else period

    def update_fn(
        updates: PyTree,
        state: ScaleByFisherState,
        params: PyTree | None = None,
        *,
        batch: Any = None,
        key: Any = None,
        model_params: PyTree | None = None,
        **extra: Any,
    ) -> tuple[PyTree, ScaleByFisherState]:
        checks.check_updates(structure, updates, information_of(state), params)
        model = None
        if estimator.from_gradient is None:
            model = checks.parameters_of_model(estimator, params, model_params)
            checks.check_batch(estimator, batch)
            key = checks.key_of(estimator, key, state.key)
        else:
            batch = key = None

        def advance(updates, state, params, batch, key, model):
            batch = None if batch is None else batches.as_batch(batch)
            return _advance(updates, state, params, batch, key, model, extra)

        arguments = updates, state, params, batch, key, model
        return sharding.in_auto_mode(advance, (updates, state), *arguments)

    def _advance(updates, state, params, batch, key, model, extra):
        damping_now = _damping(state)
        sound = all_finite(updates) & (damping_now >= 0)
        remembered, refreshed = _curvature(updates, state, batch, key, model, sound)
        sound = sound & refreshed
        mean = mean_information(memory, remembered)

        kept = state.factorisation
        if kept is None:
            factorisation = _factorise(mean, damping_now)
        else:
            due = sound & (state.step % _period_of(kept) == 0)
            kept, finite = _refactorised(kept, mean, damping_now, due)
            factorisation, sound = kept, sound & finite

        moved, moments = inner.update(updates, state.momentum, params, **extra)
        scaled = preconditioning.apply(factorisation, moved)
        sound = sound & all_finite(scaled)
        result = jax.tree.map(
            lambda x, g: jnp.where(sound, x.astype(g.dtype), jnp.zeros_like(g)),
            scaled,
            updates,
        )
        information = remembered.information
        if estimator.not_a_curvature:
            information = SecondMoment(information)
        after = ScaleByFisherState(
            step=state.step + sound.astype(jnp.int32),
            information=information,
            observations=remembered.observations,
            num_batches=remembered.num_batches,
            damping=jnp.where(damping_now >= 0, damping_now, state.damping),
            memory=remembered.memory,
            factorisation=kept,
            momentum=select(sound, moments, state.momentum),
            num_skipped=state.num_skipped + (~sound).astype(jnp.int32),
            key=state.key,
        )
        return result, after

    def _damping(state: ScaleByFisherState) -> jax.Array:
        value: Any = state.damping
        if callable(damping):
            value = damping(state.step)
        elif not isinstance(damping, (int, float)):
            value = damping
        # a wrapper may have put a Python number into the state
        return jnp.asarray(value).astype(state.observations.dtype)

    def _curvature(
        updates: PyTree,
        state: ScaleByFisherState,
        batch: batches.Batch | None,
        key: jax.Array | None,
        model: PyTree,
        sound: jax.Array,
    ) -> tuple[Remembered, jax.Array]:
        """What is remembered after the batch, and whether it was finite."""
        before = Remembered(
            information_of(state), state.observations, state.num_batches, state.memory
        )

        def refresh() -> tuple[Remembered, jax.Array]:
            if estimator.from_gradient is not None:
                information, weight = estimator.from_gradient(updates), None
            else:
                assert batch is not None
                typed = None
                if key is not None:
                    # folded, so that one key may be given to all updates
                    typed = jax.random.fold_in(vectors.typed_key(key), state.step)
                information = estimator.compute(model, batch, typed)
                if has_holes(updates):
                    information = restrict(information, updates)
                weight = batches.num_observations(batch, each_target=False)
                weight = weight.astype(before.observations.dtype)
            finite = sound & all_finite(information)
            after = take_in(memory, before, information, weight, updates)
            return select(finite, after, before), finite

        if period == 1:
            return refresh()
        due = sound & (state.step % period == 0)
        return jax.lax.cond(due, refresh, lambda: (before, sound))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
