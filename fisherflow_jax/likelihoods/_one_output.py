"""Likelihoods whose every target has one output of its own: the mean on some scale."""

from collections.abc import Callable
from typing import Any

import jax
from jax.typing import ArrayLike

from fisherflow_jax._ground.arrays import like, widen
from fisherflow_jax.likelihoods import _likelihood as shared
from fisherflow_jax.likelihoods._likelihood import Likelihood


def on_both(
    name: str, function: Callable[[jax.Array, jax.Array], jax.Array]
) -> Callable[[ArrayLike, ArrayLike], jax.Array]:
    """A function of both, of one shape and wide, for those that pass the check."""

    def checked(outputs: ArrayLike, targets: ArrayLike) -> jax.Array:
        _check(name, outputs, targets)
        wide = widen(outputs)
        return function(wide, like(targets, wide))

    return checked


def _check(name: str, outputs: Any, targets: Any) -> None:
    shape = shared.check_outputs(name, outputs)
    rule = "targets must have the shape of the outputs"
    shared.check_targets(name, shape, shape, targets, rule)


def one_output(
    name: str,
    scale: shared.Scale,
    support: Callable[[ArrayLike], jax.Array],
    log_prob: Callable[[jax.Array, jax.Array], jax.Array],
    variance: Callable[[jax.Array], jax.Array],
    sample: Callable[[jax.Array, jax.Array], jax.Array],
    root: Callable[[jax.Array], jax.Array],
) -> Likelihood:
    """A `Likelihood` of functions of wide outputs (and wide targets, in the support).

    `root` is the square root of the Fisher information of one output.
    """
    value = on_both(name, log_prob)

    def log_prob_or_nan(outputs: ArrayLike, targets: ArrayLike) -> jax.Array:
        values = value(outputs, targets)
        return shared.nan_outside(support(targets), values)

    def apply_root(outputs: ArrayLike, probes: Any, key: Any = None) -> jax.Array:
        return shared.scaled_probes(outputs, root(widen(outputs)), probes)

    return Likelihood(
        name=name,
        log_prob=log_prob_or_nan,
        mean=lambda outputs: scale.inverse(widen(outputs)),
        variance=lambda outputs: variance(widen(outputs)),
        sample=lambda key, outputs: sample(key, widen(outputs)),
        root=apply_root,
        probe_shape=tuple,
        line=widen,
        scale=scale,
        support=support,
        check=lambda outputs, targets: _check(name, outputs, targets),
        diagonal=True,
    )
