"""Gradients times a power of the information, and Adam, which is one of these."""

import functools
from collections.abc import Callable
from typing import Any

import optax

from fisherflow_jax import estimators, memories, structures
from fisherflow_jax._ground import checks, choices, keys
from fisherflow_jax.transforms.preconditioner import checks as rules
from fisherflow_jax.transforms.preconditioner import factorise as exact
from fisherflow_jax.transforms.preconditioner import step
from fisherflow_jax.transforms.preconditioner.state import Damping, Recipe

IDENTITY = optax.identity()
_average = choices.choice(optax.ema)


def scale_by_fisher(
    estimator: estimators.Estimator,
    *,
    memory: memories.Memory,
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
    bad_rows: str = "raise",
    factor_sharding: Any = None,
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
        an update's own key takes its place. Others take none.
      bad_rows: of a row with a value that is not finite, or a target that cannot be:
        "raise", an error outside jit that names it; or "drop", weight 0, counted in
        `rows_skipped`, as under jit.
      factor_sharding: where the arrays of the information, its memory and its
        factorisation lie on a mesh, from `init` on and after each update. The name of a
        mesh axis, or a tuple of names: along the first axis of an array that all of
        them divide, or else each along the first that it does. Or a function of an
        array's shape, to a `jax.sharding.PartitionSpec`, a `NamedSharding`, or None
        (as the compiler likes). Inverses and eigenvectors of stacked matrices are
        divided among the same devices. The mesh is that of `jax.set_mesh`, or that of
        the parameters. None: where the compiler places them, or, if axes are explicit,
        as parameters where they have the shape of these, else whole on each device.

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
      key=None, model_params=None, curvature=None, **extra)`. The batch is that of the
      gradients. Within `optax.masked` or `optax.partition` the model needs
      `model_params`, the whole tree. `curvature`, an information, is of a penalty that
      the loss has beside its mean, and is added to the mean information
      (`ff.continual.add_elastic_penalty(..., inner=...)` gives it). An update with a
      non-finite value (gradient, curvature, result) or a negative damping returns
      zeros, keeps the state, and is counted in `num_skipped`; only a finite curvature
      is still taken in if the solve fails. Cost of a step: the estimator every `period`
      steps, a factorisation every `inverse_period`, and applying it. Memory: an
      information, its factorisation, what the memory stores.

    Raises:
      ValueError: when built, for options out of range or an adaptive memory; at init,
        for parameters that are not real or not those of the layers, nothing to spread
        or to correct, and with the structures block and full fewer than 32 vectors a
        batch (Hutchinson probes times groups), whose noise an inverse would follow; at
        update, for a missing batch, parameters or key, holes without `model_params`, or
        another tree; for a `factor_sharding` without a mesh, or of axes that it lacks.

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
    recipe = Recipe(
        estimator=estimator,
        memory=memory,
        damping=damping,
        period=period,
        inverse_period=inverse_period,
        staggered=spread_inverses,
        corrected=eigenvalue_correction,
        packed=False,
        momentum=IDENTITY if momentum is None else momentum,
        power=power,
        root_damping=root_damping,
        factorise=factorise or exact.factorise,
        bad_rows=bad_rows,
        factor_sharding=factor_sharding,
    )
    made = transformation(recipe, key)
    if key is not None and not estimator.random:
        raise ValueError(f"estimators.{estimator.name} draws nothing; it takes no key.")
    return made


def transformation(recipe: Recipe, key: Any) -> optax.GradientTransformationExtraArgs:
    """That of a recipe, which is checked."""
    rules.check_recipe(recipe)
    recipe = choices.shared(recipe)
    init = functools.partial(step.init, recipe, keys.key_data(key))
    update = functools.partial(step.update, recipe)
    return optax.GradientTransformationExtraArgs(init, update)


def adam(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    eps_root: float = 0.0,
    mu_dtype: object = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Adam as diagonal Fisher Flow, equal to `optax.adam` bit for bit.

    .. math:: u = -\eta\, \frac{\hat m}{\sqrt{\hat v + \epsilon_{root}} + \epsilon}

    with `m` the moving average of gradients (the inner momentum) and `v` that of their
    squares (the memory of a diagonal structure). The squares are those of the mean
    gradient and no Fisher information; give `ff.scale_by_fisher` an estimator of it to
    have one.

    Args:
      learning_rate: a number or a schedule.
      b1: decay of the gradients' average, in [0, 1).
      b2: decay of the squares' average, in (0, 1).
      eps: added after the root.
      eps_root: added within it.
      mu_dtype: type in which the gradients' average is kept; None: that of the
        parameters. The squares' is float32 or wider.

    Returns:
      A transformation; no batch is needed. Cost: that of `optax.adam`, and a look for
      non-finite values, which are skipped and counted. Memory: two vectors.

    Raises:
      ValueError: for b1 outside [0, 1), b2 outside (0, 1), a negative eps or eps_root.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import fisherflow_jax as ff
      >>> params, gradients = jnp.zeros(2), jnp.array([3.0, -0.1])
      >>> steps = []
      >>> for optimizer in (ff.adam(0.1), optax.adam(0.1)):
      ...     updates, _ = optimizer.update(gradients, optimizer.init(params))
      ...     steps.append(updates)
      >>> print(bool((steps[0] == steps[1]).all()), steps[0].round(3))
      True [-0.1  0.1]

    References:
      Kingma, Ba, "Adam: a method for stochastic optimization", 2015.
    """
    checks.decay(b1, "b1", one=False)
    checks.fraction(b2, "b2")
    checks.not_negative(eps, "eps")
    checks.not_negative(eps_root, "eps_root")
    return optax.chain(
        scale_by_fisher(
            estimators.squared_gradient(structure=structures.diagonal()),
            memory=memories.exponential(b2),
            damping=eps_root,
            momentum=_average(b1, accumulator_dtype=mu_dtype),
            power=-0.5,
            root_damping=eps,
        ),
        optax.scale_by_learning_rate(learning_rate),
    )
