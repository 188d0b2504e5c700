"""Natural gradient descent, ready to use."""

from typing import Any

import optax

from fisherflow_jax.estimators import Estimator
from fisherflow_jax.memories import Memory, exponential
from fisherflow_jax.transforms._scale_by_fisher import scale_by_fisher
from fisherflow_jax.transforms.preconditioner.state import Damping

PyTree = Any


def natural_gradient(
    learning_rate: optax.ScalarOrSchedule,
    estimator: Estimator,
    *,
    memory: Memory | None = None,
    damping: Damping = 1e-3,
    momentum: float | None = None,
    weight_decay: float = 0.0,
    mask: Any = None,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    r"""Descends along the natural gradient, with momentum and weight decay.

    .. math:: m_t = \mu\, m_{t-1} + (\bar F_t + \lambda)^{-1} g_t, \qquad
       \theta_t = \theta_{t-1} - \eta\, (m_t + w\, \theta_{t-1})

    Args:
      learning_rate: a number or a schedule. One is a Newton step.
      estimator: from `ff.estimators`, with its structure.
      memory: from `ff.memories`; None: `exponential(0.95)`.
      damping: as in `ff.scale_by_fisher`.
      momentum: `mu`, of the steps already multiplied; None: none. (A momentum of raw
        gradients is given to `ff.scale_by_fisher`.)
      weight_decay: `w`, decoupled from the curvature, as in AdamW.
      mask: which parameters decay, a tree of booleans (or prefix), or a function of the
        parameters that returns one; None: all.
      **options: `period`, `inverse_period`, `spread_inverses`,
        `eigenvalue_correction`, `power`, `root_damping`, `factorise` and `key` of
        `ff.scale_by_fisher`.

    Returns:
      A transformation whose update needs the batch, as that of `ff.scale_by_fisher`,
      whose cost it has.

    Raises:
      ValueError: as `ff.scale_by_fisher`.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import fisherflow_jax as ff
      >>> model = lambda params, x: x @ params, ff.likelihoods.poisson()
      >>> optimizer = ff.natural_gradient(
      ...     1.0, ff.estimators.exact(*model, ff.structures.full())
      ... )
      >>> x = jnp.array([[1.0, 0.0], [1.0, 1.0], [1.0, 2.0]])
      >>> batch = x, jnp.array([1.0, 2.0, 4.0])
      >>> loss = ff.negative_log_likelihood(*model)
      >>> params = jnp.zeros(2)
      >>> state = optimizer.init(params)
      >>> @jax.jit
      ... def step(params, state):
      ...     gradients = jax.grad(loss)(params, batch)
      ...     updates, state = optimizer.update(gradients, state, params, batch=batch)
      ...     return optax.apply_updates(params, updates), state
      >>> for _ in range(20):
      ...     params, state = step(params, state)
      >>> print(jnp.exp(x @ params).round(2))
      [1. 2. 4.]

    References:
      Amari, "Natural gradient works efficiently in learning", 1998.
      Loshchilov, Hutter, "Decoupled weight decay regularization", 2019.
    """
    # optax.inject_hyperparams passes them by the name that they have together
    options = options.pop("options", {}) | options
    parts = [
        scale_by_fisher(
            estimator,
            memory=exponential(0.95) if memory is None else memory,
            damping=damping,
            **options,
        )
    ]
    if momentum is not None:
        parts.append(optax.trace(momentum))
    parts.append(optax.add_decayed_weights(weight_decay, mask))
    parts.append(optax.scale_by_learning_rate(learning_rate))
    return optax.chain(*parts)
