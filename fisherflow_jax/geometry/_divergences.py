"""Divergences between distributions, and the geometry that one of them makes."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fisherflow_jax._ground import arrays, checks, linalg, trees
from fisherflow_jax.geometry._metric import Metric, flattened, floating
from fisherflow_jax.likelihoods import Likelihood

PyTree = Any


class Geometry(NamedTuple):
    r"""What a divergence makes of parameter space; functions of the parameters.

    Made by `ff.geometry.metric`.

    Attributes:
      metric: `(d, d)`.
      exponential: `(d, d, d)`, the e-connection with its last index lowered,
        `[i, j, k]` is :math:`\Gamma_{ij,k}`: zero in natural parameters.
      mixture: `(d, d, d)`, the m-connection: zero in mean parameters.
      skewness: `(d, d, d)`, the tensor of Amari and Chentsov, their difference.
    """

    metric: Metric
    exponential: Metric
    mixture: Metric
    skewness: Metric


def from_divergence(divergence: Callable[[PyTree, PyTree], jax.Array]) -> Geometry:
    r"""The metric, both dual connections and the skewness of one divergence.

    .. math:: g_{ij} = -\partial_i \partial'_j D, \quad
       \Gamma^{(m)}_{ij,k} = -\partial_i \partial_j \partial'_k D, \quad
       \Gamma^{(e)}_{ij,k} = -\partial'_i \partial'_j \partial_k D, \quad
       T = \Gamma^{(m)} - \Gamma^{(e)}

    at :math:`x = y`, the prime marking derivatives in the second argument of
    :math:`D(x, y)`. Of a Kullback-Leibler divergence these are Fisher's metric and
    Amari's connections; the mean of the two is Levi-Civita's, and :math:`\Gamma^{(0)}
    - \tfrac\alpha2 T` the alpha-connection.

    Args:
      divergence: D, of two parameters to a number: three times differentiable, and
        least where they are equal. Derivatives are exact, whatever digits its values
        lose where the two are near.

    Returns:
      A `Geometry` of four functions of the parameters, to be differentiated, vmapped
      and compiled. Cost: d backward passes of D for the metric, d^2 for a connection.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> def kl(x, y):  # of exponentials of rate x, y
      ...     return jnp.log(x / y) + y / x - 1
      >>> found = ff.geometry.from_divergence(kl)
      >>> rate = jnp.array(2.0)
      >>> print(found.metric(rate), found.exponential(rate))  # a natural parameter
      [[0.25]] [[[0.]]]
      >>> print(found.skewness(rate))
      [[[-0.25]]]

    References:
      Eguchi, "Geometry of minimum contrast", 1992.
      Amari, "Information Geometry and Its Applications", 2016.
    """

    def of(params: PyTree) -> tuple[Callable, jax.Array]:
        params = floating(params)
        point, flat = flattened(params)
        return lambda x, y: divergence(point(x), point(y)), flat

    def metric(params: PyTree) -> jax.Array:
        own, x = of(params)
        return -jax.jacfwd(jax.grad(own, 0), 1)(x, x)

    def mixture(params: PyTree) -> jax.Array:
        own, x = of(params)
        return _last(jax.jacfwd(jax.jacfwd(jax.grad(own, 1), 0), 0)(x, x))

    def exponential(params: PyTree) -> jax.Array:
        own, x = of(params)
        return _last(jax.jacfwd(jax.jacfwd(jax.grad(own, 0), 1), 1)(x, x))

    def skewness(params: PyTree) -> jax.Array:
        return mixture(params) - exponential(params)

    return Geometry(metric, exponential, mixture, skewness)


def _last(derivatives: jax.Array) -> jax.Array:
    """The gradient's index last, and the sign."""
    return -jnp.moveaxis(derivatives, 0, -1)


def kl(likelihood: Likelihood, outputs: Any, other: Any) -> jax.Array:
    r"""The Kullback-Leibler divergence between two predictions, one for each target.

    .. math:: \mathrm{KL}(p \| q) = \mathrm{E}_{y \sim p(y | z)}
       \log \frac{p(y | z)}{p(y | z')}

    Args:
      likelihood: from `ff.likelihoods`; of unit dispersion where that is unknown.
      outputs: z, of shape `(n, ...)`.
      other: z', of the same shape.

    Returns:
      An array of the shape of the log-probabilities, in nats: a sum over targets is the
      divergence of them all. Closed forms; of `student_t` a quadrature, of relative
      error 1e-8 up to five scales apart; of `from_distribution` by its rule.
      Differentiated, vmapped and compiled. Cost: of the order of the outputs.

    Raises:
      ValueError: for a family without a closed form, and for shapes that differ.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> rates = jnp.log(jnp.array([2.0])), jnp.log(jnp.array([3.0]))
      >>> print(ff.geometry.kl(ff.likelihoods.poisson(), *rates).round(3))
      [0.189]

    References:
      Kullback, Leibler, "On information and sufficiency", 1951.
    """
    outputs, other = check_pair(likelihood, outputs, other)
    if likelihood.kl is None:
        raise ValueError(
            f"{likelihood.name} has no Kullback-Leibler divergence in closed form: "
            "give it one, likelihood._replace(kl=...), of (outputs, other); or "
            "average likelihood.log_prob(outputs, y) - likelihood.log_prob(other, y) "
            "over draws y of likelihood.sample(key, outputs)."
        )
    return likelihood.kl(outputs, other)


def check_pair(likelihood: Any, outputs: Any, other: Any) -> tuple[Any, Any]:
    """Two predictions of a likelihood as arrays, or an error."""
    checks.made(likelihood, Likelihood, "likelihood", "ff.likelihoods.gaussian()")
    outputs, other = jnp.asarray(outputs), jnp.asarray(other)
    if outputs.shape != other.shape or not outputs.ndim:
        raise ValueError(
            f"{likelihood.name}: two predictions have one shape, (n, ...); got "
            f"{outputs.shape} and {other.shape}."
        )
    likelihood.check(outputs, None)
    return arrays.widen(outputs), arrays.widen(other)


def fisher_divergence(
    log_density: Callable[[PyTree], jax.Array],
    other: Callable[[PyTree], jax.Array],
    points: PyTree,
    weights: Any = None,
) -> jax.Array:
    r"""The Fisher divergence: how far the slopes of two log-densities are apart.

    .. math:: \mathrm{E}_{x \sim p} |\nabla \log p(x) - \nabla \log q(x)|^2

    It needs no normaliser, and depends on the coordinates of x. Half of it is the rate
    at which :math:`\mathrm{KL}(p \| q)` falls with the variance of Gaussian noise that
    is added to both.

    Args:
      log_density: log p, of one point to a number, up to a constant.
      other: log q.
      points: leaves `(m, ...)`: draws of p, or nodes.
      weights: `(m,)`, of the nodes; they are divided by their sum. None: draws.

    Returns:
      A number, in the inverse square of the points' unit. Differentiated and compiled.
      Cost: a gradient of each density for each point.

    Example:
      >>> import jax.numpy as jnp
      >>> import numpy as np
      >>> import fisherflow_jax as ff
      >>> nodes, weights = np.polynomial.hermite_e.hermegauss(5)
      >>> standard = lambda x: -(x**2) / 2
      >>> moved = lambda x: -((x - 1) ** 2) / 3  # N(1, 1.5)
      >>> found = ff.geometry.fisher_divergence(
      ...     standard, moved, jnp.asarray(nodes), jnp.asarray(weights)
      ... )
      >>> print(found.round(4))  # 5 / 9
      0.5556

    References:
      Hyvärinen, "Estimation of non-normalized statistical models by score matching",
      2005.
      Lyu, "Interpretation and generalization of score matching", 2009.
    """
    points = floating(points)

    def squared(point: PyTree) -> jax.Array:
        slopes = jax.grad(log_density)(point), jax.grad(other)(point)
        gap = trees.ravel(slopes[0]) - trees.ravel(slopes[1])
        return jnp.sum(jnp.square(gap))

    each = jax.vmap(squared)(points)
    if weights is None:
        return jnp.mean(each)
    weights = arrays.like(weights, each)
    trees.check_shapes(weights, each, "weights are one for each point")
    return linalg.product("m,m->", weights, each) / jnp.sum(weights)
