"""Before the stream: a first batch solved whole."""

import warnings
from typing import Any

import jax.numpy as jnp

from fisherflow_jax._ground.checks import is_concrete
from fisherflow_jax.flow._state import FisherFlow, FlowState

_WARM_START_STEPS = 50
_SHORT = 0.1  # posterior standard deviations


def warm_start(flow: FisherFlow, state: FlowState, batch: Any) -> FlowState:
    r"""Solves a first batch to convergence, before streaming.

    One Newton step from a cold start can land anywhere for a Poisson or gamma model,
    and its information, taken there, stays in the sum. Twenty rows a parameter (or two
    batches, if that is more) are enough.

    Args:
      flow: from `ff.fisher_flow`.
      state: usually `flow.init(params)`.
      batch: the first rows, `(inputs, targets)` or with weights.

    Returns:
      The state after the batch, as `flow.update` with at most 50 damped Newton steps
      gives it. Cost: an information and a gradient a step, about 5 to 10 in practice.

    Warns:
      UserWarning: outside jit, if the steps did not converge.

    Raises:
      ValueError: as `flow.update` does, outside jit also where the solution is not
        finite (under jit: counted in `state.num_skipped`).

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> flow = ff.fisher_flow(
      ...     lambda params, x: x * params,
      ...     ff.likelihoods.poisson(),
      ...     structure=ff.structures.full(),
      ...     memory=ff.memories.stationary(),
      ...     prior_precision=1e-4,
      ... )
      >>> state = flow.init(jnp.array(0.0))
      >>> batch = (jnp.ones(4), jnp.array([2.0, 4.0, 3.0, 3.0]))
      >>> state = ff.warm_start(flow, state, batch)
      >>> print(jnp.exp(state.mean).round(2))  # the mean count
      3.0

    References:
      Luo, Song, "Renewable estimation and incremental inference in generalized linear
      models with streaming data sets", 2020.
    """
    after, info = flow.update(state, batch, num_steps=_WARM_START_STEPS)
    members = getattr(info, "members", (info,))
    for member in members:
        length = jnp.sqrt(member.decrement)
        if is_concrete(length) and bool(length > _SHORT):
            warnings.warn(
                f"warm_start did not converge: the last of at most "
                f"{_WARM_START_STEPS} Newton steps was {float(length):.1g} posterior "
                "standard deviations long; start "
                "nearer to the solution, or with a larger prior precision.",
                stacklevel=2,
            )
    return after
