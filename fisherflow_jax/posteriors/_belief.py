"""What a state stands for: Gaussians, and their weights."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fisherflow_jax import information as ops
from fisherflow_jax._ground import checks, linalg, trees

PyTree = Any


class Gaussian(NamedTuple):
    r"""The belief `N(mean, dispersion * information^-1)` about the parameters.

    Student's t where the dispersion is estimated.

    Attributes:
      mean: a pytree like the parameters.
      information: about them, prior included; of one structure.
      dispersion: `()`, the estimated factor of the covariance; NaN without a degree of
        freedom. None: it is known.
      degrees_of_freedom: `()`, of the t distribution. None: it is the normal.
      meat: the sum of squared scores, for the sandwich variance; None: not kept.
      num_observations: `()`, effective observations behind it; None: not counted.
      nuisance: a state about the logarithms of what the likelihood left unknown.
      prior_precision: the prior's part of the information, itself one; None: not known.
    """

    mean: PyTree
    information: Any
    dispersion: jax.Array | None = None
    degrees_of_freedom: jax.Array | None = None
    meat: Any | None = None
    num_observations: jax.Array | None = None
    nuisance: Any | None = None
    prior_precision: Any | None = None

    def __repr__(self) -> str:
        return f"Gaussian({described(self)})"


def gaussians(
    state: Any, robust: bool | str = False
) -> tuple[jax.Array, tuple[Gaussian, ...]]:
    """A state as weighted Gaussians: `(weights, Gaussian...)`, the weights sum to one.

    Args:
      state: anything with `.mean` and `.information`, such as a flow's state or a
        posterior: one Gaussian. Anything with `.members` (states) and `.weights`, such
        as a bank's state, or a list or tuple of states, weighted equally: a mixture.
      robust: for the sandwich variance, which needs the meat and no dispersion: True or
        "HC0", or "HC1" for its small-sample factor.

    Raises:
      TypeError: for what is no state.
      ValueError: with an unknown dispersion, where it is at hand and there are too few
        observations to estimate it; with `robust`, without the meat, and with too few
        observations or clusters for the factor.
    """
    if hasattr(state, "members") and hasattr(state, "weights"):
        weights, members = state.weights, state.members
    elif _is_state(state):
        one = _gaussian(state, robust)
        return jnp.ones((1,), trees.float_dtype(one.mean)), (one,)
    elif isinstance(state, tuple) and len(state) == 2 and _is_reported(*state):
        raise TypeError(
            "this is what flow.update returned, (state, info): take it apart first, "
            "state, info = flow.update(state, batch)."
        )
    elif (held := _state_within(state)) is not None:
        raise TypeError(f"{type(state).__name__} is no state, but has one: .{held}.")
    elif isinstance(state, (list, tuple)) and state:
        weights, members = [1 / len(state)] * len(state), state
    else:
        kind = getattr(state, "__name__", None) or type(state).__name__
        raise TypeError(
            "a state has .mean and .information: that of a flow, or ff.posterior(...); "
            f"got {kind}."
        )
    parts = [gaussians(member, robust) for member in members]
    weights = [
        jnp.asarray(weight, inner.dtype) * inner
        for weight, (inner, _) in zip(weights, parts, strict=True)
    ]
    return jnp.concatenate(weights), tuple(one for _, own in parts for one in own)


def _is_state(value: Any) -> bool:
    return hasattr(value, "mean") and hasattr(value, "information")


def _state_within(value: Any) -> str | None:
    """The field of a result, such as `ff.laplace`'s, that is a state beside others."""
    fields = getattr(value, "_fields", ())
    states = [name for name in fields if _is_state(getattr(value, name))]
    return states[0] if states and len(states) < len(fields) else None


def _is_reported(state: Any, info: Any) -> bool:
    """Whether a pair is a state with the report of the update that made it."""
    return hasattr(info, "log_evidence") and not hasattr(info, "mean")


def gaussian(state: Any, robust: bool | str = False) -> Gaussian:
    """The one Gaussian of a state.

    Raises:
      TypeError: for a mixture; and as `gaussians` does.
    """
    members = gaussians(state, robust)[1]
    if len(members) > 1:
        raise TypeError(
            "a bank's posterior is a mixture, not a Gaussian: sample it, or take one "
            "of state.members."
        )
    return members[0]


def degrees_of_freedom(state: Any) -> jax.Array | None:
    """For the quantiles of Student's t; None: of the normal, as for a mixture."""
    members = gaussians(state)[1]
    return members[0].degrees_of_freedom if len(members) == 1 else None


def mixture(
    weights: jax.Array, means: list[PyTree], variances: list[PyTree]
) -> tuple[PyTree, PyTree]:
    """The mean and the variance of each entry of a mixture."""
    if len(means) == 1:
        return means[0], variances[0]
    center = jax.tree.map(lambda *x: jnp.tensordot(weights, jnp.stack(x), 1), *means)

    def around(weight: jax.Array, mean: PyTree, variance: PyTree) -> PyTree:
        return jax.tree.map(
            lambda c, m, v: weight * (v + jnp.square(m - c)), center, mean, variance
        )

    # the mean variance and the variance of the means
    terms = map(around, weights, means, variances)
    return center, functools.reduce(optax.tree.add, terms)


def described(state: Any) -> str:
    """A mean and an information in a few words."""
    count = sum(np.size(leaf) for leaf in jax.tree.leaves(state.mean))
    kind = type(state.information).__name__
    return f"mean: {count} parameter{'s' * (count != 1)}, information: {kind}"


def _gaussian(state: Any, robust: bool | str) -> Gaussian:
    count, meat = getattr(state, "num_observations", None), getattr(state, "meat", None)
    if count is None and not callable(getattr(state, "count", None)):
        count = getattr(state, "count", None)  # every tuple has a method `count`
    one = Gaussian(
        mean=state.mean,
        information=ops.rounded(state.information),
        meat=None if meat is None else ops.plain(meat),
        num_observations=count,
        nuisance=getattr(state, "nuisance", None),
        prior_precision=getattr(state, "prior_precision", None),
    )
    if robust:
        one = _corrected(one, getattr(state, "clusters", None), robust)
    spare = None if robust else getattr(state, "degrees_of_freedom", None)
    if spare is None:
        return one
    # NaN where the information cannot be inverted, of which intervals warn by name
    lost = jnp.isnan(spare)
    spare = jnp.where(
        (spare > linalg.least_spare(state.mean)) | lost, spare, jnp.zeros_like(spare)
    )
    if not checks.holds((spare > 0) | lost):
        seen = "too few" if count is None else f"{float(jnp.min(count)):g}"
        raise ValueError(
            "the dispersion is unknown and cannot be estimated: "
            f"{seen} observations leave no degree of freedom beside the parameters."
        )
    dispersion = getattr(state, "dispersion", None)
    if dispersion is not None:
        dispersion = jnp.where(spare > 0, dispersion, jnp.nan)
    return one._replace(dispersion=dispersion, degrees_of_freedom=spare)


def _corrected(one: Gaussian, clusters: Any, robust: bool | str) -> Gaussian:
    """With the middle of the sandwich times its small-sample factor."""
    if robust not in (True, "HC0", "HC1"):
        raise ValueError(f'robust must be True, "HC0" or "HC1"; got {robust!r}.')
    meat, count = one.meat, one.num_observations
    factor: Any = 1.0
    if clusters is not None:
        meat = ops.squares(one.information, clusters.scores)
        seen = jnp.sum(clusters.weights > 0).astype(clusters.weights.dtype)
        factor = _ratio(seen, seen - 1, "clusters need two that were seen")
    if meat is None:
        raise ValueError(
            "robust=True needs the sum of squared scores, which a flow keeps when it "
            "is built with robust=True: ff.fisher_flow(..., robust=True)."
        )
    if robust == "HC1":
        size = trees.size(one.mean)
        if count is None:
            raise ValueError(f'robust="HC1" needs the number of observations, {_HC1}')
        own = count if clusters is None else count - 1
        rule = (
            f'robust="HC1" needs more observations than the {size} parameters, {_HC1}'
        )
        factor = factor * _ratio(own, count - size, rule)
    return one._replace(meat=ops.scale(meat, factor))


_HC1 = 'which this state does not have: "HC0" needs none.'


def _ratio(above: jax.Array, below: jax.Array, rule: str) -> jax.Array:
    """Above over below; where that is not positive an error, or NaN under jit."""
    if not checks.holds(below > 0):
        raise ValueError(rule)
    return jnp.where(below > 0, above / below, jnp.nan)
