"""How probable targets were, by what was believed before they were seen."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fisherflow_jax._ground.batch import as_batch, blank, observed
from fisherflow_jax.calibration import _densities as densities
from fisherflow_jax.likelihoods import Likelihood
from fisherflow_jax.model import check_choices
from fisherflow_jax.posteriors import gaussians
from fisherflow_jax.predictions import linearized_outputs
from fisherflow_jax.products import known

PyTree = Any


def log_score(
    state: Any,
    apply_fn: Callable,
    likelihood: Likelihood,
    batch: Any,
    *,
    link: Callable | None = None,
    chunk_size: int | None = None,
) -> jax.Array:
    r"""The log predictive density of each target.

    .. math:: \log \int p(y_i \mid z) \, \mathcal N(z; m_i, V_i) \, dz

    with the linearised outputs `N(m_i, V_i)`, in nats; the larger the better. A proper
    score, of rows that the state was not made of: it judges mean and uncertainty
    together, and compares structures, memories and priors alike, where an evidence is
    only that of a full structure. Of a flow that forgets or drifts, the state is
    `flow.advance(state)`.

    Args:
      state: anything with `.mean` and `.information`; of a bank the mixture's density.
      apply_fn: `(params, inputs) -> outputs`.
      likelihood: from `ff.likelihoods`; an unknown dispersion is the state's estimate.
      batch: `(inputs, targets)` or `(inputs, targets, weights)`.
      link: None, that of `ff.predict`; or another of `ff.predictions`, for classes.
      chunk_size: examples at a time in the linearised pass; None: its own choice.

    Returns:
      An array `(n, ...)`, one number a target, not weighted. Cost: that of
      `ff.predict`.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> model = lambda params, x: x * params, ff.likelihoods.gaussian(scale=1.0)
      >>> state = ff.fisher_flow(*model).init(jnp.array(0.0))
      >>> batch = jnp.array([0.0, 1.0]), jnp.array([0.0, 0.0])
      >>> ff.calibration.log_score(state, *model, batch).round(3)  # variance 1, and 2
      Array([-0.919, -1.266], dtype=float32)

    References:
      Dawid, "Present position and potential developments: the prequential approach",
      1984.
    """
    check_choices(apply_fn, likelihood)
    batch = as_batch(batch)
    if batch.targets is None:
        raise ValueError("a log score is of targets; the batch's are None.")
    there = None
    if likelihood.observing is not None:  # of its targets those that are there
        there, batch = observed(batch)[1], blank(batch)
    link = densities.default(likelihood, link)
    weights, members = gaussians(state)
    found = []
    for one in members:
        family = known(likelihood, one)
        shape = jax.eval_shape(apply_fn, one.mean, batch.inputs)
        family.check(shape, batch.targets)
        if there is not None and family.observing is not None:
            family = family.observing(there)
        wanted = densities.needs_covariance(family, link, shape, batch.targets)
        outputs = linearized_outputs(
            one, apply_fn, batch.inputs, covariance=wanted, chunk_size=chunk_size
        )
        found.append(densities.log_density(family, link, outputs, batch.targets))
    logs = jnp.stack(found)
    logs = logs + jnp.log(weights).reshape((-1,) + (1,) * (logs.ndim - 1))
    return jax.nn.logsumexp(logs, 0) if len(members) > 1 else logs[0]
