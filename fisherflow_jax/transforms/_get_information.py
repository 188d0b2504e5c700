"""The information that a training run has accumulated."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fisherflow_jax import information as ops
from fisherflow_jax._ground.checks import is_concrete
from fisherflow_jax.transforms.preconditioner.state import believed, fisher_state


def get_information(opt_state: Any, num_observations: float | jax.Array) -> Any:
    r"""The information of `num_observations`, out of an optimiser's state.

    .. math:: I = N \bar F = N \frac{\sum_t c_t F_t}{\sum_t c_t n_t}

    A moving average holds about `1 / (1 - decay)` batches and a stationary memory every
    row once an epoch, taken at the parameters of their time: what they say is the mean
    of an observation, and how many there are is for the caller to say. No prior is
    included.

    Args:
      opt_state: the state of any chain, `masked`, `partition`, `inject_hyperparams`,
        `MultiSteps` or `apply_if_finite` that holds one `ff.scale_by_fisher`; or a part
        of it, where there are two.
      num_observations: N, the number of distinct examples trained on; positive.

    Returns:
      An information in the estimator's structure; an `EigenKronecker` where eigenvalues
      are corrected. Within `masked` or `partition`, it is
      about the parameters that were shown, the others being held.

    Raises:
      ValueError: where there is no `ff.scale_by_fisher`, or more than one (their paths
        are listed); where it keeps squares of mean gradients, as `ff.adam` does; before
        the first batch; for a number that is not positive.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> estimator = ff.estimators.exact(
      ...     lambda params, x: x @ params,
      ...     ff.likelihoods.gaussian(),
      ...     ff.structures.diagonal(),
      ... )
      >>> optimizer = ff.natural_gradient(0.1, estimator)
      >>> params, batch = jnp.zeros(2), (jnp.array([[1.0, 2.0]]), None)
      >>> state = optimizer.init(params)
      >>> _, state = optimizer.update(jnp.ones(2), state, params, batch=batch)
      >>> print(ff.get_information(state, 100).entries.round(1))
      [100. 400.]
    """
    if is_concrete(num_observations) and not float(num_observations) > 0:
        raise ValueError(f"num_observations must be positive; got {num_observations}.")
    state = fisher_state(opt_state)
    weight = state.observations
    if not isinstance(weight, (jax.Array, np.ndarray)):
        raise ValueError(
            f"the state's arrays are wrapped in {type(weight).__name__}; of flax's "
            "nnx.Optimizer, give nnx.as_pure(optimizer.opt_state)."
        )
    if is_concrete(weight) and not weight > 0:
        raise ValueError("no batch has been taken in yet, so there is no information.")
    factor = jnp.asarray(num_observations).astype(weight.dtype) / weight
    return ops.scale(believed(state), factor)
