"""Natural gradient descent and K-FAC, ready to use."""

from collections.abc import Callable
from typing import Any

import optax

from fisherflow_jax import estimators, likelihoods, memories, structures
from fisherflow_jax.layers import Layers
from fisherflow_jax.transforms._clip_by_kl import clip_by_kl
from fisherflow_jax.transforms._scale_by_fisher import scale_by_fisher
from fisherflow_jax.transforms.preconditioner.factorise import factored_damping
from fisherflow_jax.transforms.preconditioner.state import Damping


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
      key: an int or a key, for an estimator that draws.
      bad_rows: "raise" or "drop", as in `ff.scale_by_fisher`.

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
    scale = scale_by_fisher(
        estimator,
        memory=memories.exponential(0.95) if memory is None else memory,
        damping=damping,
        period=1 if period is None else period,
        inverse_period=inverse_period,
        spread_inverses=spread_inverses,
        eigenvalue_correction=eigenvalue_correction,
        power=-1 if power is None else power,
        root_damping=root_damping,
        factorise=factorise,
        key=key,
        bad_rows=bad_rows,
    )
    inertia = [] if momentum is None else [optax.trace(momentum)]
    decay = optax.add_decayed_weights(weight_decay, mask)
    rate = optax.scale_by_learning_rate(learning_rate)
    return optax.chain(scale, *inertia, decay, rate)


def kfac(
    learning_rate: optax.ScalarOrSchedule,
    apply_fn: Callable,
    likelihood: likelihoods.Likelihood,
    layers: Layers,
    *,
    estimator: Any = estimators.monte_carlo,
    damping: Damping = 1e-3,
    decay: float = 0.95,
    momentum: float | None = 0.9,
    max_kl: float | None = None,
    period: int | None = None,
    inverse_period: int | None = None,
    spread_inverses: bool = False,
    eigenvalue_correction: bool = False,
    weight_decay: float = 0.0,
    mask: Any = None,
    factorise: Callable[..., Any] | None = None,
    key: Any = None,
    bad_rows: str = "raise",
) -> optax.GradientTransformationExtraArgs:
    r"""Natural gradient descent with Kronecker-factored curvature.

    .. math:: \theta_t = \theta_{t-1} - \eta\, m_t, \qquad
       m_t = \mu\, m_{t-1}
       + \bigl(A_t + \pi \sqrt\lambda\bigr)^{-1} g_t
         \bigl(G_t + \sqrt\lambda / \pi\bigr)^{-1}

    with the factors A and G of each linear layer averaged over about `1 / (1 - decay)`
    batches. It is `ff.natural_gradient` with the structure `kronecker(layers)`, and
    `ff.clip_by_kl` after it if a bound is given.

    Args:
      learning_rate: a number or a schedule.
      apply_fn: `(params, inputs) -> outputs`, leading axis = examples.
      likelihood: from `ff.likelihoods`; the gradients are those of
        `ff.negative_log_likelihood(apply_fn, likelihood)`.
      layers: `ff.layers.find_layers(apply_fn, params, inputs)`, computed once; print it
        to see how each parameter is treated.
      estimator: from `ff.estimators`, without a model, such as `ff.estimators.exact` or
        `ff.estimators.monte_carlo(groups=8)`; sampled labels by default, which need a
        key.
      damping: as in `ff.scale_by_fisher`.
      decay: of the factors' moving average, a batch.
      momentum: of the multiplied gradients; None: none.
      max_kl: None, or the largest mean divergence of the predictions that one step may
        make (nats). Without a bound a learning rate of 0.1 with little damping can
        diverge; 0.03 is a first choice.
      period: steps between two curvatures; None: 1.
      inverse_period: steps between two renewals of inverses or eigenbases; None: 10.
      spread_inverses: renews layers by turns, each once in `inverse_period` steps.
      eigenvalue_correction: EK-FAC: in the factors' eigenbasis the exact second
        moments take the place of the product of eigenvalues, and damping is exact.
      weight_decay: as in `ff.natural_gradient`.
      mask: which parameters decay, as there.
      factorise: as in `ff.scale_by_fisher`; None: `ff.transforms.factored_damping`, or
        with a correction `ff.transforms.factorise`, whose damping is exact in the
        eigenbasis.
      key: an int or a key; None: it is given to each update.
      bad_rows: "raise" or "drop", as in `ff.scale_by_fisher`.

    Returns:
      A transformation whose update is `update(updates, state, params, *, batch,
      key=None)`. Cost of a step: a gradient, the estimator's passes, and the products
      with the inverses; every `inverse_period` steps the inverses, I^3 + O^3 a layer.

    Raises:
      ValueError: as `ff.scale_by_fisher`; for layers of another model, and for an
        estimator that has another model.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import fisherflow_jax as ff
      >>> def apply_fn(params, x):
      ...     return jnp.tanh(x @ params["w"]) @ params["v"]
      >>> likelihood = ff.likelihoods.categorical()
      >>> x = jax.random.normal(jax.random.key(0), (64, 4))
      >>> batch = x, jnp.argmax(x[:, :3], axis=1)
      >>> keys = jax.random.split(jax.random.key(1))
      >>> params = {
      ...     "w": jax.random.normal(keys[0], (4, 8)) / 2,
      ...     "v": jax.random.normal(keys[1], (8, 3)) / 3,
      ... }
      >>> layers = ff.layers.find_layers(apply_fn, params, x)
      >>> optimizer = ff.kfac(0.3, apply_fn, likelihood, layers, key=2)
      >>> loss = ff.negative_log_likelihood(apply_fn, likelihood)
      >>> @jax.jit
      ... def step(params, state):
      ...     gradients = jax.grad(loss)(params, batch)
      ...     updates, state = optimizer.update(gradients, state, params, batch=batch)
      ...     return optax.apply_updates(params, updates), state
      >>> state = optimizer.init(params)
      >>> for _ in range(30):
      ...     params, state = step(params, state)
      >>> bool(loss(params, batch) < 0.1)
      True

    References:
      Martens, Grosse, "Optimizing neural networks with Kronecker-factored approximate
      curvature", 2015.
      George, Laurent, Bouthillier, Ballas, Vincent, "Fast approximate natural gradient
      descent in a Kronecker-factored eigenbasis", 2018.
    """
    if factorise is None and not eigenvalue_correction:
        factorise = factored_damping
    descent = natural_gradient(
        learning_rate,
        estimator,
        apply_fn,
        likelihood,
        structure=structures.kronecker(layers),
        memory=memories.exponential(decay),
        damping=damping,
        period=period,
        inverse_period=10 if inverse_period is None else inverse_period,
        spread_inverses=spread_inverses,
        eigenvalue_correction=eigenvalue_correction,
        momentum=momentum,
        weight_decay=weight_decay,
        mask=mask,
        factorise=factorise,
        key=key,
        bad_rows=bad_rows,
    )
    if max_kl is None:
        return descent
    return optax.chain(descent, clip_by_kl(apply_fn, likelihood, max_kl))
