"""Intervals and tests that hold at all times at once, however often they are read."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fisherflow_jax import information as ops
from fisherflow_jax import memories
from fisherflow_jax._ground import checks, trees
from fisherflow_jax.posteriors import _belief as belief
from fisherflow_jax.posteriors._hypotheses import linear
from fisherflow_jax.posteriors._intervals import check_level

PyTree = Any


class EValue(NamedTuple):
    """The evidence against a value of a contrast; each `()`.

    Made by `ff.intervals.e_value`.

    Attributes:
      estimate: the contrast's, by the data alone.
      standard_error: its own, likewise.
      log_e_value: the logarithm of how many times a bet against the value has been
        paid back, on average at most once under it, whenever one stops.
      p_value: `min(1, 1 / e)`, below a at any time with probability at most a.
    """

    estimate: jax.Array
    standard_error: jax.Array
    log_e_value: jax.Array
    p_value: jax.Array


class Running(NamedTuple):
    """What the data alone say: the prior's pull taken out of a belief.

    Attributes:
      mean: `(d,)`, the estimate.
      vectors: `(d, d)`, rows `v` with `v I v = 1`.
      data: `(d,)`, the data's share of the information along each; 0: none.
      meat: `(d, d)`, of a sandwich; None: the model's own variance.
      dispersion: `()`; None: it is known.
    """

    mean: jax.Array
    vectors: jax.Array
    data: jax.Array
    meat: jax.Array | None
    dispersion: jax.Array | None

    def variance(self, contrasts: jax.Array) -> jax.Array:
        """Of each row of `(k, d)`; infinite where the data do not determine it."""
        along = contrasts @ self.vectors.T
        told = self.data > 0
        divided = jnp.where(told, along / jnp.where(told, self.data, 1), 0)
        if self.meat is None:
            found = jnp.sum(along * divided, 1)
            if self.dispersion is not None:
                found = found * self.dispersion
        else:
            solved = divided @ self.vectors
            found = jnp.sum(solved @ self.meat * solved, 1)
        whole = jnp.sum(jnp.square(along), 1)
        hidden = jnp.sum(jnp.where(told, 0, jnp.square(along)), 1)
        rounding = len(self.mean) * float(jnp.finfo(along.dtype).eps)
        return jnp.where(hidden > rounding * whole, jnp.inf, found)


def anytime(
    state: Any,
    effect_scale: Any,
    level: float = 0.95,
    robust: bool | str = False,
) -> tuple[PyTree, PyTree]:
    r"""Intervals of the parameters that hold at all times of a stream at once.

    .. math:: \hat\theta_j \pm \sqrt{s^2 \Big(1 + \frac{s^2}{\tau^2}\Big) \Big(\log
       \big(1 + \frac{\tau^2}{s^2}\big) + 2 \log \frac{1}{\alpha}\Big)}

    With probability `level` the interval covers the parameter after every batch, so
    that one may look as often as one likes and stop when it pleases. Estimate and
    standard error s are those of the data alone, without the prior's pull. Exact for a
    gaussian likelihood with a known scale, from the first row on; elsewhere as good as
    the normal approximation is at the first look that counts.

    Args:
      state: of a flow with full structure and stationary memory.
      effect_scale: :math:`\tau > 0`, the size of effect that the design hopes to see:
        there the interval is about the narrowest. A number or a pytree prefix of the
        parameters, chosen before the stream: chosen on it, nothing holds.
      level: the probability of covering at all times, in (0, 1).
      robust: with the sandwich variance, as in `ff.standard_error`: for a model whose
        variance may be wrong, where the model's own error is not valid at any time.

    Returns:
      `(lower, upper)`, pytrees like the parameters; infinite where the data say
      nothing. Some one and a half times as wide as `ff.confidence_interval`. Cost:
      eigenvectors of two dense matrices.

    Raises:
      ValueError: for a level outside (0, 1), an effect scale that is not positive, a
        structure that does not keep all covariances, a memory that forgets, or a state
        that does not know its prior.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> flow = ff.fisher_flow(lambda p, x: x * p, ff.likelihoods.gaussian(2.0))
      >>> state, _ = flow.update(
      ...     flow.init(jnp.array(0.0)), (jnp.ones(16), jnp.arange(16.0))
      ... )
      >>> lower, upper = ff.intervals.anytime(state, effect_scale=1.0)
      >>> print(lower.round(2), upper.round(2))  # 7.5; at this time alone +- .98
      5.96 9.04

    References:
      Robbins, "Statistical methods related to the law of the iterated logarithm", 1970.
      Waudby-Smith, Arbour, Sinha, Kennedy, Ramdas, "Time-uniform central limit theory
      and asymptotic confidence sequences", 2024.
    """
    check_level(level)
    _, lower, upper = at_all_times(state, effect_scale, level, robust)
    return lower, upper


def at_all_times(
    state: Any, effect_scale: Any, level: float, robust: bool | str
) -> tuple[PyTree, PyTree, PyTree]:
    """The log of the e-value against zero and the interval, of each parameter."""
    scales = _scales(effect_scale, state)
    running = _running(state, robust)
    found = _ends(running, scales, jnp.asarray(1 - level, scales.dtype))
    like = trees.widen(state.mean)
    log_e, lower, upper = (trees.unravel(flat, like) for flat in found)
    return log_e, lower, upper


def e_value(
    state: Any,
    contrast: PyTree | Callable[[PyTree], jax.Array],
    effect_scale: jax.typing.ArrayLike,
    null: jax.typing.ArrayLike = 0.0,
    robust: bool | str = False,
) -> EValue:
    r"""The evidence against `contrast = null`, valid whenever one looks.

    .. math:: e = \frac{\mathcal N(\hat g;\, g_0,\, s^2 + \tau^2)}
       {\mathcal N(\hat g;\, g_0,\, s^2)}

    the Bayes factor of an effect drawn from :math:`\mathcal N(g_0, \tau^2)` over none.
    Under the null it exceeds `1 / a` at any time of the stream with probability at most
    a, so that one may stop at the first look with `e >= 20`, or add data to an
    experiment that has ended.

    Args:
      state: of a flow with full structure and stationary memory.
      contrast: a pytree like the parameters, the weights of one linear combination; or
        a differentiable function from the parameters to one number.
      effect_scale: :math:`\tau > 0`, chosen before the stream.
      null: :math:`g_0`.
      robust: with the sandwich variance, as in `anytime`.

    Returns:
      An `EValue`. Cost and errors: those of `anytime`.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> flow = ff.fisher_flow(lambda p, x: x * p, ff.likelihoods.gaussian(1.0))
      >>> batch = jnp.ones(16), jnp.linspace(0.5, 1.5, 16)
      >>> state, _ = flow.update(flow.init(jnp.array(0.0)), batch)
      >>> found = ff.intervals.e_value(state, jnp.array(1.0), effect_scale=0.5)
      >>> print(jnp.exp(found.log_e_value).round(0), found.p_value.round(4))
      269.0 0.0037

    References:
      Ville, "Etude critique de la notion de collectif", 1939.
      Johari, Koomen, Pekelis, Walsh, "Always valid inference: continuous monitoring of
      A/B tests", 2022.
    """
    scale = _number(effect_scale, "effect_scale")
    checks.positive(scale, "effect_scale")
    null = _number(null, "null")
    running = _running(state, robust)
    like = trees.widen(state.mean)
    function = contrast if callable(contrast) else linear(contrast, state.mean)
    at = trees.unravel(running.mean, like)
    estimate, weights = jax.value_and_grad(lambda p: jnp.squeeze(function(p)))(at)
    return _against(running, trees.ravel(weights), estimate, scale, null)


def _number(value: Any, name: str) -> jax.Array:
    if jnp.ndim(value):
        raise ValueError(f"{name} is one number; got shape {jnp.shape(value)}.")
    return jnp.asarray(value)


def _scales(effect_scale: Any, state: Any) -> jax.Array:
    for leaf in jax.tree.leaves(effect_scale):
        checks.positive(leaf, "effect_scale")
    like = trees.widen(state.mean)
    return trees.ravel(trees.broadcast_prefix(effect_scale, like, "effect_scale"))


def _running(state: Any, robust: bool | str) -> Running:
    prior, storage = getattr(state, "prior", None), getattr(state, "memory", None)
    if prior is None:
        raise ValueError(
            "always-valid intervals take a flow's state, which knows its prior and "
            f"what it has seen; got a {type(state).__name__}."
        )
    if not memories.remembers_all(storage):
        raise ValueError(
            "always-valid intervals are of parameters that stand still, from a memory "
            f"that keeps all: this state forgets ({type(storage).__name__}). Build the "
            "flow with ff.memories.stationary()."
        )
    one = belief.gaussian(state, robust)
    if not ops.facts(one.information).whole:
        raise ValueError(
            "always-valid intervals need the covariances between all parameters, which "
            f"a {type(one.information).__name__} information does not keep: build the "
            "flow with structure=ff.structures.full()."
        )
    return _split(one._replace(nuisance=None), prior, one.meat if robust else None)


@jax.jit
def _split(one: Any, prior: Any, meat: Any) -> Running:
    mean = trees.widen(one.mean)
    found = ops.null_directions(one.information, prior.precision, mean)
    vectors, flat = trees.ravel(found.vectors, 1), trees.ravel(mean)
    rounding = len(flat) * float(jnp.finfo(flat.dtype).eps)
    data = 1 - found.shares
    data = jnp.where(data > rounding, data, 0)
    # F^-1 P (m - m_0), of which P v = (1 - data) I v
    away = flat - trees.ravel(trees.widen(prior.origin))
    pull = vectors @ (ops.to_dense(one.information, mean) @ away)
    back = jnp.where(data > 0, (1 - data) / jnp.where(data > 0, data, 1), 0)
    return Running(
        mean=flat + (back * pull) @ vectors,
        vectors=vectors,
        data=data,
        meat=None if meat is None else ops.to_dense(meat, mean),
        dispersion=one.dispersion,
    )


@jax.jit
def _ends(
    running: Running, scales: jax.Array, miss: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    own = running.variance(jnp.eye(len(scales), dtype=scales.dtype))
    ratio = own / jnp.square(scales)
    odds = jnp.log1p(1 / ratio) - 2 * jnp.log(miss)
    reach = jnp.sqrt(own * (1 + ratio) * odds)
    log_e = _log_e(jnp.square(running.mean), own, jnp.square(scales))
    return log_e, running.mean - reach, running.mean + reach


@jax.jit
def _against(
    running: Running, weights: jax.Array, estimate: Any, scale: Any, null: Any
) -> EValue:
    own = running.variance(weights[None])[0]
    away = jnp.square(estimate - null.astype(estimate.dtype))
    log_e = _log_e(away, own, jnp.square(scale.astype(own.dtype)))
    return EValue(
        estimate=estimate,
        standard_error=jnp.sqrt(own),
        log_e_value=log_e,
        p_value=jnp.minimum(1, jnp.exp(-log_e)),
    )


def _log_e(away: jax.Array, own: jax.Array, effect: jax.Array) -> jax.Array:
    """Of squared distances, and variances with and without an effect."""
    ratio = effect / own
    log_e = 0.5 * (away / own * ratio / (1 + ratio) - jnp.log1p(ratio))
    # nothing was seen; or the contrast is zero, or flat there
    return jnp.where(jnp.isinf(own) | (own == 0), 0, log_e)
