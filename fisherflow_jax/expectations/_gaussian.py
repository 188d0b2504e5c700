"""Nodes and weights around a Gaussian: where a batch is looked at."""

import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fisherflow_jax._ground import checks, choices

# Nodes that a product rule may have: each is a pass of the model.
_MOST_NODES = 20_000
# Of a rule over the outputs of one target, which costs no pass.
_MOST_OUTPUT_NODES = 512
# A trapezoid this far out, in standard deviations, is exact to rounding.
_REACH = 7.0

Nodes = tuple[Any, Any]  # points (k, d) of the standard normal, and weights (k,)


class Expectation(NamedTuple):
    """Over which a flow averages its batches. Made by the factories of this room.

    One is made by `ff.expectations.cubature`.

    Attributes:
      call: how it was made, for printing.
      nodes: `(d, key) ->` points `(k, d)` of a standard normal in d dimensions, and
        weights `(k,)` that sum to one; None: `output_nodes` are used.
      output_nodes: the same, of the outputs of one target, d of them; None: of the
        parameters.
      random: whether the nodes are drawn, and a key is needed.
    """

    call: str
    nodes: Callable[[int, Any], Nodes] | None = None
    output_nodes: Callable[[int], Nodes] | None = None
    random: bool = False

    @property
    def is_at_mean(self) -> bool:
        return self.nodes is None and self.output_nodes is None

    def __repr__(self) -> str:
        return self.call


@choices.choice
def at_mean() -> Expectation:
    """The mean alone, as a flow without an expectation: Laplace, Kalman's extension.

    Example:
      >>> import fisherflow_jax as ff
      >>> ff.expectations.at_mean()
      at_mean()
    """
    return Expectation("at_mean()")


def _symmetric(size: int, center: float) -> Nodes:
    """A weight at the mean, and two points along each root of the covariance."""
    reach, none = math.sqrt(size / (1 - center)), np.zeros((1, size))
    axes = reach * np.eye(size)
    share = np.full(2 * size, (1 - center) / (2 * size))
    points, weights = np.concatenate([axes, -axes]), share
    if center == 0:
        return points, weights
    return np.concatenate([none, points]), np.concatenate([[center], weights])


@choices.choice
def cubature() -> Expectation:
    r"""2 d points, :math:`\pm \sqrt d` along each root: exact up to degree three.

    .. math:: \mathrm E f(\theta) \approx \frac{1}{2 d} \sum_{i=1}^d \sum_{\pm}
       f(\mu \pm \sqrt d\, R^\top e_i), \qquad R^\top R = I^{-1}

    All weights are positive. With one parameter it does not see a curvature: take
    `hermite(5)` there.

    Returns:
      An `Expectation`. Cost: 2 d passes of the model for one at the mean.

    Example:
      >>> import fisherflow_jax as ff
      >>> points, weights = ff.expectations.cubature().nodes(2, None)
      >>> print(points.round(2).tolist(), weights.sum())
      [[1.41, 0.0], [0.0, 1.41], [-1.41, -0.0], [-0.0, -1.41]] 1.0

    References:
      Arasaratnam, Haykin, "Cubature Kalman filters", 2009.
    """
    return Expectation("cubature()", lambda size, key: _symmetric(size, 0.0))


@choices.choice
def sigma_points(kappa: float | None = None) -> Expectation:
    r"""The mean and 2 d points, :math:`\pm \sqrt{d + \kappa}` along each root.

    Of weights :math:`\kappa / (d + \kappa)` and :math:`1 / 2 (d + \kappa)`.

    Args:
      kappa: zero or more, since a negative weight may leave an information that is not
        positive definite. None: `3 - d`, for which fourth moments along the roots are
        right, or zero (`cubature()`) from three parameters on.

    Returns:
      An `Expectation`. Cost: 2 d + 1 passes of the model for one at the mean.

    Example:
      >>> import fisherflow_jax as ff
      >>> points, weights = ff.expectations.sigma_points().nodes(1, None)
      >>> print(points.round(2).ravel(), weights.round(3))
      [ 0.    1.73 -1.73] [0.667 0.167 0.167]

    References:
      Julier, Uhlmann, "New extension of the Kalman filter to nonlinear systems", 1997.
    """
    if kappa is not None:
        checks.not_negative(kappa, "kappa")

    def nodes(size: int, key: Any) -> Nodes:
        own = max(3 - size, 0) if kappa is None else float(kappa)
        return _symmetric(size, own / (size + own))

    return Expectation(f"sigma_points({'' if kappa is None else kappa})", nodes)


def _hermite(order: int, size: int) -> Nodes:
    points, weights = np.polynomial.hermite_e.hermegauss(order)
    weights = weights / weights.sum()
    grid = np.array(list(itertools.product(points, repeat=size)))
    shares = np.array(list(itertools.product(weights, repeat=size)))
    return grid.reshape(-1, size), shares.prod(-1)


@choices.choice
def hermite(order: int) -> Expectation:
    """Gauss-Hermite nodes in each parameter: for few of them.

    Args:
      order: nodes a parameter; a polynomial of degree `2 order - 1` in each is exact.

    Returns:
      An `Expectation`. Cost: `order ** d` passes of the model for one at the mean; more
      than 20,000 are refused.

    Example:
      >>> import fisherflow_jax as ff
      >>> points, weights = ff.expectations.hermite(3).nodes(2, None)
      >>> points.shape, float(weights.sum().round(6))
      ((9, 2), 1.0)
    """
    checks.whole(order, "order", of="nodes")

    def nodes(size: int, key: Any) -> Nodes:
        if order**size > _MOST_NODES:
            raise ValueError(
                f"hermite({order}) has {order}^{size} nodes for {size} parameters: "
                "take outputs(), where the model has few outputs, or cubature()."
            )
        return _hermite(order, size)

    return Expectation(f"hermite({order})", nodes)


@choices.choice
def monte_carlo(num_samples: int) -> Expectation:
    """Draws from the belief, in pairs on both sides of the mean.

    They are drawn once an update, from the state's key and its step, and stay while it
    is solved.

    Args:
      num_samples: an even number.

    Returns:
      An `Expectation`; the flow's `init` needs a key. Cost: `num_samples` passes of the
      model for one at the mean.

    Example:
      >>> import fisherflow_jax as ff
      >>> ff.expectations.monte_carlo(32)
      monte_carlo(32)
    """
    checks.whole(num_samples, "num_samples", least=2, of="nodes")
    if num_samples % 2:
        raise ValueError(
            f"num_samples must be even, since draws come in pairs; got {num_samples}."
        )

    def nodes(size: int, key: Any) -> Nodes:
        half = jax.random.normal(key, (num_samples // 2, size))
        share = np.full(num_samples, 1 / num_samples)
        return jnp.concatenate([half, -half]), share

    return Expectation(f"monte_carlo({num_samples})", nodes, random=True)


@choices.choice
def outputs(order: int = 20) -> Expectation:
    r"""At the outputs, which are normal for a model that is linear in its parameters.

    .. math:: z_i \sim N\big(f(\mu, x_i),\; J_i I^{-1} J_i^\top\big)

    The likelihood is averaged over the outputs of each target, in as many dimensions as
    a target has outputs, and the model itself is run at the mean alone. Exact for
    generalised linear models; of others it sees the model by its linearisation.

    With one output a target: as many nodes as `order`, equally spaced, which are right
    to 1e-4 for a logit with a standard deviation of 3 and to 5e-3 for one of 5
    (Gauss-Hermite: 5e-3 and .1); wider beliefs want more nodes. With several, products
    of Gauss-Hermite rules with at most 512 nodes, and from six on `cubature`.

    Args:
      order: nodes an output.

    Returns:
      An `Expectation`. Cost: a pass of the model, a backward pass for each output of an
      example and a half solve with the information, once a refresh.

    Example:
      >>> import fisherflow_jax as ff
      >>> points, weights = ff.expectations.outputs().output_nodes(1)
      >>> print((weights @ points**2).round(12))  # a variance of one
      [1.]
    """
    checks.whole(order, "order", least=2, of="nodes")

    def nodes(size: int) -> Nodes:
        if size == 1:
            points = np.linspace(-_REACH, _REACH, order)
            weights = np.exp(-np.square(points) / 2)
            weights = weights / weights.sum()
            points = points / np.sqrt(weights @ np.square(points))
            return points[:, None], weights
        each = min(order, math.floor(_MOST_OUTPUT_NODES ** (1 / size) + 1e-9))
        return _hermite(each, size) if each > 2 else _symmetric(size, 0.0)

    return Expectation(f"outputs({order})", output_nodes=nodes)
