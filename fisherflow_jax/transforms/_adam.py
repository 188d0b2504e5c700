"""Adam: the diagonal structure, a moving average, and the square of the gradient."""

import optax

from fisherflow_jax import estimators, memories, structures
from fisherflow_jax._ground import checks, choices
from fisherflow_jax.transforms._scale_by_fisher import scale_by_fisher

_average = choices.choice(optax.ema)


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
      ValueError: for b2 outside (0, 1).

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
    checks.fraction(b2, "b2")
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
