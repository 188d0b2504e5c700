"""A Gaussian posterior from any estimate and any information about it."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fisherflow_jax import information as ops
from fisherflow_jax._ground import trees
from fisherflow_jax._ground.checks import holds
from fisherflow_jax.posteriors._belief import described, gaussian
from fisherflow_jax.structures import _prior as priors

PyTree = Any


class Posterior(NamedTuple):
    """The Gaussian `N(mean, information^-1)`.

    Attributes:
      mean: a pytree like the parameters.
      information: of the data and of the prior, divided by the temperature.
      temperature: `()`, factor of the covariance.
    """

    mean: PyTree
    information: Any
    temperature: jax.Array

    def __repr__(self) -> str:
        return f"posterior({described(self)}, temperature {self.temperature})"


def posterior(
    mean: PyTree,
    information: Any,
    *,
    prior_precision: Any,
    temperature: jax.typing.ArrayLike = 1.0,
) -> Posterior:
    r"""The Gaussian posterior of an estimate: Laplace's approximation.

    .. math:: \mathcal N\big(\hat\theta,\; T (F + P)^{-1}\big)

    The mean may come from any training, and the information from any pass over the
    data: an estimator's value, `ff.accumulate(...).information`, or what an optimiser
    gathered on its way. All that takes a state (`ff.confidence_interval`, `ff.sample`,
    `ff.predict`, `ff.summary`, `ff.wald_test`, `ff.delta_method`) takes a posterior.

    Args:
      mean: the estimate, a pytree of arrays.
      information: F, a sum over the observations, about parameters like `mean`.
      prior_precision: P: a positive number, a pytree prefix of numbers, or an
        information. On a Kronecker information one number a layer.
      temperature: T, a positive factor of the covariance; below 1 for a cold posterior.

    Returns:
      A `Posterior`. Cost: one addition and the diagonal (for Kronecker factors that is
      their eigenvectors); what is solved is solved where it is used. On a Kronecker
      information a prior of several numbers is given outside of `jax.jit`.

    Raises:
      ValueError: where the information is about parameters of other shapes; for a prior
        or a temperature that is not positive, or an information that is not finite,
        where they are at hand.
      TypeError: for something that is no information.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> information = ff.structures.Diagonal(jnp.array([3.0, 15.0]))
      >>> state = ff.posterior(jnp.array([1.0, 2.0]), information, prior_precision=1.0)
      >>> ff.standard_error(state)
      Array([0.5 , 0.25], dtype=float32)

    References:
      MacKay, "A practical Bayesian framework for backpropagation networks", 1992.
      Wenzel et al., "How good is the Bayes posterior in deep neural networks really?",
      2020.
    """
    mean = trees.real_arrays(mean, "mean")
    check_about(information, mean)
    temperature = jnp.asarray(temperature, trees.float_dtype(mean))
    if temperature.shape != ():
        raise ValueError(f"temperature is one number; got shape {temperature.shape}.")
    if not holds((temperature > 0) & jnp.isfinite(temperature)):
        raise ValueError(f"temperature must be positive and finite; got {temperature}.")
    precision = priors.as_precision(prior_precision, mean)
    total = ops.add(information, precision)
    return Posterior(mean, ops.scale(total, 1 / temperature), temperature)


def check_about(information: Any, mean: PyTree) -> None:
    """Raises unless the information is about parameters like the mean, and finite."""
    entries = ops.diagonal(information, mean)
    check_like(entries, mean)
    for name, leaf in trees.named_leaves(entries):
        if not holds(jnp.isfinite(leaf) & (leaf >= 0)):
            raise ValueError(
                "the diagonal of an information is finite and not negative; that of "
                f"parameter {name} is {leaf}."
            )


def check_like(entries: PyTree, mean: PyTree) -> None:
    """Raises unless an information's diagonal, or its shapes, is like the mean."""
    shapes = [jax.tree.map(jnp.shape, tree) for tree in (entries, mean)]
    if not trees.same_structure(entries, mean) or shapes[0] != shapes[1]:
        raise ValueError(
            "the information is about another tree than the mean: its parameters have "
            f"shapes {shapes[0]}, the mean's are {shapes[1]}."
        )


def log_density(state: Any, params: PyTree) -> jax.Array:
    r"""The log-density of the posterior at `params`, a number.

    .. math:: \tfrac12 \log|I| - \tfrac d2 \log 2\pi
       - \tfrac12 (\theta - \hat\theta)^\top I (\theta - \hat\theta)

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> information = ff.structures.Diagonal(jnp.array([3.0]))
      >>> state = ff.posterior(jnp.zeros(1), information, prior_precision=1.0)
      >>> print(ff.log_density(state, jnp.zeros(1)).round(3))
      -0.226
    """
    mean, information = gaussian(state, robust=False)[:2]
    shapes = [jax.tree.map(jnp.shape, tree) for tree in (params, mean)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"params must be like the mean: got shapes {shapes[0]}, not {shapes[1]}."
        )
    step = jax.tree.map(lambda x, m: x - m, params, mean)
    logdet = ops.logdet(information, mean)
    quadratic = ops.quadratic_form(information, step)
    return 0.5 * (logdet - trees.size(mean) * jnp.log(2 * jnp.pi) - quadratic)
