"""Natural gradient descent, ready to use."""

import dataclasses
from collections.abc import Callable
from typing import Any

import optax

from fisherflow_jax import estimators, likelihoods, memories, structures
from fisherflow_jax._ground import checks
from fisherflow_jax.transforms._scale_by_fisher import IDENTITY, transformation
from fisherflow_jax.transforms.preconditioner import checks as rules
from fisherflow_jax.transforms.preconditioner import factorise as exact
from fisherflow_jax.transforms.preconditioner.state import Damping, Recipe


@checks.called_as(
    "natural_gradient(learning_rate, estimator, apply_fn, likelihood, "
    "structure=structure): learning_rate comes first"
)
def natural_gradient(
    learning_rate: optax.ScalarOrSchedule,
    estimator: Any,
    apply_fn: Callable | None = None,
    likelihood: likelihoods.Likelihood | None = None,
    *,
    structure: structures.Structure | None = None,
    memory: memories.Memory | None = None,
    damping: Damping = 1e-3,
    period: int | None = None,
    inverse_period: int | None = None,
    spread_inverses: bool = False,
    eigenvalue_correction: bool = False,
    momentum: float | None = None,
    weight_decay: float = 0.0,
    mask: Any = None,
    power: float | None = None,
    root_damping: float = 0.0,
    factorise: Callable[..., Any] | None = None,
    key: Any = None,
    bad_rows: str = "raise",
    factor_sharding: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Descends along the natural gradient, with momentum and weight decay.

    .. math:: m_t = \mu\, m_{t-1} + (\bar F_t + \lambda)^{-1} g_t, \qquad
       \theta_t = \theta_{t-1} - \eta\, (m_t + w\, \theta_{t-1})

    Args:
      learning_rate: a number or a schedule. One is a Newton step.
      estimator: from `ff.estimators`, with its model and structure; or without, such as
        `ff.estimators.hutchinson(num_probes=8)`, for the model that follows.
      apply_fn: `(params, inputs) -> outputs`, leading axis = examples.
      likelihood: from `ff.likelihoods`.
      structure: from `ff.structures`.
      memory: from `ff.memories`; None: `exponential(0.95)`.
      damping: as in `ff.scale_by_fisher`.
      period: as there; None: 1.
      inverse_period: as there, and so the next two.
      spread_inverses: renews layers or blocks by turns.
      eigenvalue_correction: EK-FAC, for the structure `kronecker(layers)`.
      momentum: `mu`, of the steps already multiplied; None: none. (A momentum of raw
        gradients is given to `ff.scale_by_fisher`.)
      weight_decay: `w`, decoupled from the curvature, as in AdamW.
      mask: which parameters decay, a tree of booleans (or prefix), or a function of the
        parameters that returns one; None: all.
      power: as in `ff.scale_by_fisher`; None: -1.
      root_damping: as there, and so the next two.
      factorise: how the damped information is factorised.
      key: an int or a key, for an estimator that draws; others leave it alone.
      bad_rows: "raise" or "drop", as in `ff.scale_by_fisher`.
      factor_sharding: where what is kept lies on a mesh, as there.

    Returns:
      A transformation whose update needs the batch, as that of `ff.scale_by_fisher`,
      whose cost it has.

    Raises:
      ValueError: as `ff.scale_by_fisher`; for an estimator of another model than the
        one that is given, or without any.

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
    model: Any = apply_fn, likelihood, structure
    if any(part is not None for part in model):
        estimator = estimators.bind(estimator, *model)
    rules.check_estimator(estimator)
    descent = Descent(learning_rate, weight_decay, mask, momentum)
    fisher = Recipe(
        estimator=estimator,
        memory=memories.exponential(0.95) if memory is None else memory,
        damping=damping,
        period=1 if period is None else period,
        inverse_period=inverse_period,
        staggered=spread_inverses,
        corrected=eigenvalue_correction,
        packed=False,
        momentum=IDENTITY,
        power=-1 if power is None else power,
        root_damping=root_damping,
        factorise=factorise or exact.factorise,
        bad_rows=bad_rows,
        factor_sharding=factor_sharding,
    )
    key = key if estimator.random else None
    return descent.after(transformation(fisher, key))


@dataclasses.dataclass(frozen=True)
class Descent:
    """What is done with gradients that have been multiplied."""

    learning_rate: optax.ScalarOrSchedule
    weight_decay: Any
    mask: Any
    momentum: Any = None

    def __post_init__(self) -> None:
        checks.not_negative(self.weight_decay, "weight_decay")
        if self.momentum is not None:
            checks.decay(self.momentum, "momentum", one=False)

    def stages(self) -> list[optax.GradientTransformation]:
        found = [] if self.momentum is None else [optax.trace(self.momentum)]
        decay = self.weight_decay
        if not isinstance(decay, (int, float)) or decay != 0:
            found.append(optax.add_decayed_weights(decay, self.mask))
        return [*found, optax.scale_by_learning_rate(self.learning_rate)]

    def after(
        self, multiplied: optax.GradientTransformation
    ) -> optax.GradientTransformationExtraArgs:
        return optax.chain(multiplied, *self.stages())
