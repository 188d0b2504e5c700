"""Variational inference by natural gradients: an Optax loop whose weights are drawn."""

import functools
from typing import Any

import optax

from fisherflow_jax import estimators
from fisherflow_jax._ground import checks, choices, keys
from fisherflow_jax.transforms._descent import Descent
from fisherflow_jax.transforms._variational_state import Recipe, init
from fisherflow_jax.transforms._variational_step import update
from fisherflow_jax.transforms.preconditioner import checks as rules

PyTree = Any

_STATIC = (
    "within optax.inject_hyperparams name it in static_args, as estimator and "
    "num_samples."
)


def variational(
    learning_rate: optax.ScalarOrSchedule,
    estimator: estimators.Estimator | None = None,
    num_samples: int = 1,
    *,
    num_observations: Any,
    information: Any,
    prior_precision: Any = 1.0,
    prior_mean: PyTree | None = None,
    b1: Any = 0.9,
    b2: Any = 0.999,
    key: Any = None,
    bad_rows: str = "raise",
) -> optax.GradientTransformationExtraArgs:
    r"""Trains a Gaussian over the weights, `N(m, I^-1)`, by natural gradients.

    .. math:: \min_{m, I}\; N\, \mathrm{E}_q[\bar\ell(\theta)]
       + \mathrm{KL}\big(q \,\|\, \mathcal N(m_0, P^{-1})\big),
       \qquad q = \mathcal N(m, I^{-1})

    with the mean loss of an observation. The parameters of the Optax loop are the mean
    m. Weights are drawn from q, the gradient is taken there, and the update is told
    where: with rates :math:`\rho = 1 - b_2` and :math:`\eta`,

    .. math:: I \leftarrow I + \rho D, \quad D = N \bar F(\theta) + P - I, \qquad
       m \leftarrow m - \eta\, I^{-1} \big(N \hat g + P (m - m_0)\big)

    where g is averaged as Adam's momentum. What F is decides the method:

    - an estimator that is positive (`ff.estimators.exact`, `empirical`, `monte_carlo`,
      the Hutchinson family): VOGN, in any structure;
    - `ff.estimators.observed`, the Hessian: VON (scalar, diagonal, block, full);
    - None: Stein's identity, :math:`\bar F = \bar g\,(\theta - m)\, I` of the diagonal,
      from the gradient at hand: no batch, no pass of the model, the cost of Adam and a
      draw.

    The last two can be negative, and move the precision along the second-order
    retraction, which keeps it positive whatever the rate and the draw:

    .. math:: I \leftarrow I + \rho D + \tfrac{\rho^2}{2} D I^{-1} D
       = \tfrac12 \big(I + (I + \rho D) I^{-1} (I + \rho D)\big)

    At rest `I = P + N E_q[F]` and `P (m - m_0) = -N E_q[g]`, on average over draws:
    with the Hessian or Stein's identity the optimum of the bound, but for the noise of
    draws times the rates; with a Fisher information that of a generalised linear model
    with its canonical link, and elsewhere VOGN's fixed point, near it.

    Args:
      learning_rate: :math:`\eta`, a number or a schedule; 1 is a Newton step of the
        whole data set.
      estimator: from `ff.estimators`, with its model and structure; or None.
      num_samples: S, draws an update; `drawn` and the gradients have leaves `(S, ...)`
        if there are several, and are like the parameters if there is one.
      num_observations: N, the rows of the data set. `N / T` is the temperature T.
      information: where the precision starts, P aside: an information of the N rows at
        the starting parameters, such as `ff.accumulate(estimator, params, batches)`
        (an `Accumulation` is taken as its information); or a number times the identity,
        such as N / 10, of a network that is not trained yet, whose own information
        leaves many weights wide. Little of it means draws of which nothing is learnt.
      prior_precision: P: a positive number, a pytree prefix of numbers, or an
        information.
      prior_mean: :math:`m_0`, like the parameters; None: zero.
      b1: decay of the gradients' average, in [0, 1).
      b2: decay of the precision's, in [0, 1).
      key: an int or a key, for an estimator that draws; others leave it alone.
      bad_rows: "raise" or "drop", as in `ff.scale_by_fisher`, of an estimator's batch.

    Returns:
      A transformation whose update is `update(gradients, state, params, *, drawn,
      batch=None, key=None)`: gradients of the mean loss on the batch at the draws,
      `drawn = ff.sample(ff.transforms.get_posterior(state, params), key)`. An update
      with a non-finite value returns zeros, keeps the state, and is counted in
      `num_skipped`. Cost of a step: the estimator's passes at each draw, and one solve.
      Memory: the precision, the momentum, the prior.

    Raises:
      ValueError: when built, for options out of range and an estimator of squared mean
        gradients; at init, for parameters that are not real, a start or a prior that
        the structure cannot hold; at update, for missing draws, parameters, batch or
        key, and trees that differ.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import fisherflow_jax as ff
      >>> model = lambda params, x: x @ params, ff.likelihoods.bernoulli()
      >>> x = jax.random.normal(jax.random.key(0), (60, 2))
      >>> batch = x, (x[:, 0] > 0.5).astype(float)
      >>> params, loss = jnp.zeros(2), ff.negative_log_likelihood(*model)
      >>> estimator = ff.estimators.exact(*model, ff.structures.full())
      >>> optimizer = ff.transforms.variational(
      ...     0.2, estimator, num_observations=60, information=estimator(params, batch)
      ... )
      >>> def step(carry, key):
      ...     params, state = carry
      ...     drawn = ff.sample(ff.transforms.get_posterior(state, params), key)
      ...     gradients = jax.grad(loss)(drawn, batch)
      ...     updates, state = optimizer.update(
      ...         gradients, state, params, drawn=drawn, batch=batch
      ...     )
      ...     return (optax.apply_updates(params, updates), state), None
      >>> start = params, optimizer.init(params)
      >>> (params, state), _ = jax.lax.scan(
      ...     step, start, jax.random.split(jax.random.key(1), 200)
      ... )
      >>> posterior = ff.transforms.get_posterior(state, params)
      >>> bool(loss(posterior.mean, batch) < 0.5)
      True

    References:
      Khan, Nielsen, Tangkaratt, Lin, Gal, Srivastava, "Fast and scalable Bayesian deep
      learning by weight-perturbation in Adam", 2018 (VON and VOGN).
      Lin, Schmidt, Khan, "Handling the positive-definite constraint in the Bayesian
      learning rule", 2020 (the retraction).
      Shen, Daheim, Cong, Nickl, Marconi, Bazan, Yokota, Gurevych, Cremers, Khan,
      Moellenhoff, "Variational learning is effective for large deep networks", 2024.
    """
    _check(estimator, num_observations, b1, b2, bad_rows)
    try:
        checks.whole(num_samples, "num_samples", of="draws")
    except ValueError as error:
        raise ValueError(f"{error} Or {_STATIC}") from error
    recipe = Recipe(estimator, num_samples, num_observations, b1, b2, bad_rows)
    recipe = choices.shared(recipe)
    start = information, prior_precision, prior_mean, keys.key_data(key)
    made = optax.GradientTransformationExtraArgs(
        functools.partial(init, recipe, start), functools.partial(update, recipe)
    )
    return Descent(learning_rate, 0.0, None).after(made)


def _check(
    estimator: Any, num_observations: Any, b1: Any, b2: Any, bad_rows: str
) -> None:
    if estimator is not None:
        rules.check_estimator(estimator)
        if estimator.from_gradient is not None:
            raise ValueError(
                f"estimators.{estimator.name} squares mean gradients, which are no "
                "curvature: give the estimator None, for Stein's identity, which needs "
                "no pass of the model either."
            )
    checks.positive(num_observations, "num_observations")
    checks.decay(b1, "b1", one=False)
    checks.decay(b2, "b2", one=False)
    rules.check_option(bad_rows)
