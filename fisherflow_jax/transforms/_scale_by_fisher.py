"""An Optax transformation that multiplies gradients by a power of the information."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from fisherflow_jax._ground import batch as batches
from fisherflow_jax._ground import trees
from fisherflow_jax._ground.keys import key_data
from fisherflow_jax.estimators import Estimator
from fisherflow_jax.memories import Memory
from fisherflow_jax.memories._memory import Site
from fisherflow_jax.transforms.preconditioner import checks, sharding
from fisherflow_jax.transforms.preconditioner import correct as correction
from fisherflow_jax.transforms.preconditioner import factorise as preconditioning
from fisherflow_jax.transforms.preconditioner import renew as spreading
from fisherflow_jax.transforms.preconditioner.damping import (
    Damping,
    at_present,
    at_start,
)
from fisherflow_jax.transforms.preconditioner.measure import take_batch
from fisherflow_jax.transforms.preconditioner.remember import (
    Remembered,
    all_finite,
    mean_information,
    select,
)
from fisherflow_jax.transforms.preconditioner.state import (
    ScaleByFisherState,
    as_kept,
    information_of,
)

PyTree = Any


def scale_by_fisher(
    estimator: Estimator,
    *,
    memory: Memory,
    damping: Damping,
    period: int = 1,
    inverse_period: int | None = None,
    spread_inverses: bool = False,
    eigenvalue_correction: bool = False,
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
      spread_inverses: renews layers or blocks by turns, each once in `inverse_period`
        steps (all at the first), in groups of about the same `sum d^3`.
      eigenvalue_correction: EK-FAC, for the structure `kronecker(layers)`: see below.
      momentum: a transformation of the gradients before they are multiplied, such as
        `optax.ema(0.9)`.
      power: p; -1 is the natural gradient, -1/2 Adam's root.
      root_damping: `epsilon`, added after the root, as Adam's eps.
      factorise: `(information, damping, power, root_damping) -> factorisation`, such
        as `ff.transforms.relative_to_mean_eigenvalue`; None: `ff.transforms.factorise`.
      key: an int or a key, from which an estimator that draws takes one at each step;
        None: it is given to each update.

    With `eigenvalue_correction`, :math:`U (U^\top m V / (s + \lambda)) V^\top` is
    applied to each layer: damping is exact. The basis is decomposed from the remembered
    factors every `inverse_period` steps; the squares `s` of examples' vectors are taken
    in it from the same batch on, and remembered as the factors are. They move with the
    basis (the diagonal in the new one, times the ratio of the factors' eigenvalues to
    what the same turn makes of them, scaled to the same trace): nothing is forgotten. A
    batch is measured twice, for the factors and in their basis; where it fits in one
    chunk the compiler shares the passes.

    Returns:
      A transformation whose update is `update(updates, state, params, *, batch=None,
      key=None, model_params=None, **extra)`. The batch is that of the gradients. Within
      `optax.masked` or `optax.partition` the model needs `model_params`, the whole
      tree. An update with a non-finite value (gradient, curvature, result) or a
      negative damping returns zeros, keeps the state, and is counted in `num_skipped`;
      only a finite curvature is still taken in if the solve fails. Cost of a step: the
      estimator every `period` steps, a factorisation every `inverse_period`, and
      applying it. Memory: an information, its factorisation, what the memory stores.

    Raises:
      ValueError: when built, for options out of range or an adaptive memory; at init,
        for parameters that are not real or not those of the layers, nothing to spread
        or to correct, and with the structures block and full fewer than 32 vectors a
        batch (Hutchinson probes times groups), whose noise an inverse would follow; at
        update, for a missing batch, parameters or key, holes without `model_params`, or
        another tree.

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
      Martens, "New insights and perspectives on the natural gradient method", 2020.
      George, Laurent, Bouthillier, Ballas, Vincent, "Fast approximate natural gradient
      descent in a Kronecker-factored eigenbasis", 2018.
    """
    checks.check_options(
        estimator, memory, damping, period, inverse_period, power, root_damping
    )
    checks.check_refreshing(
        estimator, period, inverse_period, spread_inverses, eigenvalue_correction
    )
    if key is not None and not estimator.random:
        raise ValueError(f"estimators.{estimator.name} draws nothing; it takes no key.")
    structure = estimator.structure
    inner = optax.with_extra_args_support(momentum or optax.identity())
    own_key = key_data(key)

    def init_fn(params: PyTree) -> ScaleByFisherState:
        checks.check_real(params)
        nothing = structure.isotropic(params, 0.0)
        checks.check_layers(nothing, params)
        checks.check_rank(estimator, nothing)
        nothing = sharding.zeros_like_parameters(nothing, params)
        bases = None
        if eigenvalue_correction:
            nothing, bases = correction.begin(nothing)
        zero = jnp.zeros((), trees.float_dtype(params))
        count = jnp.zeros((), jnp.int32)
        site = Site(nothing, None, None, zero, None, None)
        made = jax.eval_shape(_factorise, nothing, bases, zero)
        if spread_inverses:
            spreading.parts(bases if eigenvalue_correction else made)
        kept: Any = bases
        if not eigenvalue_correction and _period_of(made) > 1:
            kept = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), made)
        state = ScaleByFisherState(
            step=count,
            information=as_kept(nothing, estimator.not_a_curvature),
            observations=zero,
            num_batches=count,
            damping=at_start(damping, count).astype(zero.dtype),
            memory=memory.init(site),
            factorisation=kept,
            momentum=inner.init(params),
            num_skipped=count,
            key=own_key,
        )
        return sharding.settled(state)

    def _factorise(information: Any, bases: Any, damping: jax.Array) -> Any:
        if eigenvalue_correction:
            information = correction.corrected(information, bases)
        made = factorise or preconditioning.factorise
        return made(information, damping, power, root_damping)

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
        kept = correction.uncorrected(information_of(state))
        checks.check_updates(structure, updates, kept, params)
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
        damping_now = at_present(damping, state)
        sound = all_finite(updates) & (damping_now >= 0)
        (remembered, bases), refreshed = _curvature(
            updates, state, batch, key, model, sound
        )
        sound = sound & refreshed

        def make() -> Any:
            # of each step without a factorisation the mean would be a waste
            mean = mean_information(memory, remembered)
            return _factorise(mean, bases, damping_now)

        kept = bases if eigenvalue_correction else state.factorisation
        if kept is None or eigenvalue_correction:
            factorisation = make()
        else:
            kept, finite = spreading.renew(
                kept, make, sound, state.step, _period_of(kept), spread_inverses
            )
            factorisation, sound = kept, sound & finite

        moved, moments = inner.update(updates, state.momentum, params, **extra)
        scaled = preconditioning.apply(factorisation, moved)
        sound = sound & all_finite(scaled)
        result = jax.tree.map(
            lambda x, g: jnp.where(sound, x.astype(g.dtype), jnp.zeros_like(g)),
            scaled,
            updates,
        )
        after = ScaleByFisherState(
            step=state.step + sound.astype(jnp.int32),
            information=as_kept(remembered.information, estimator.not_a_curvature),
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

    def _curvature(
        updates: PyTree,
        state: ScaleByFisherState,
        batch: batches.Batch | None,
        key: jax.Array | None,
        model: PyTree,
        sound: jax.Array,
    ) -> tuple[tuple[Remembered, Any], jax.Array]:
        """What is remembered after the batch and in which bases; whether finite."""
        remembered = Remembered(
            information_of(state), state.observations, state.num_batches, state.memory
        )
        bases = state.factorisation if eigenvalue_correction else None
        before = remembered, bases

        def refresh() -> tuple[tuple[Remembered, Any], jax.Array]:
            turns = None
            if eigenvalue_correction:
                turns = spreading.turns(
                    bases, state.step, inverse_period or period, period, spread_inverses
                )
            data = updates, turns, batch, key, model, state.step
            after = take_batch(estimator, memory, before, *data)
            finite = sound & all_finite((after[0].information, after[1]))
            return select(finite, after, before), finite

        if period == 1:
            return refresh()
        due = sound & (state.step % period == 0)
        return jax.lax.cond(due, refresh, lambda: (before, sound))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
