"""A Gaussian process in time as parameters that move."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.polynomial import Polynomial

from fisherflow_jax._ground import checks
from fisherflow_jax.memories._memory import Memory
from fisherflow_jax.memories._random_walk import random_walk
from fisherflow_jax.structures import Full, full

PyTree = Any


class Matern(NamedTuple):
    """A Matern process for `ff.fisher_flow`: `(memory, prior_precision, read_out)`.

    Attributes:
      memory: how the state moves on from one batch to the next.
      prior_precision: of its stationary distribution.
      read_out: `(params, inputs) -> (n,)`, the process itself, for each row of inputs.
    """

    memory: Memory
    prior_precision: Full
    read_out: Callable[[Any, PyTree], jax.Array]


def matern(
    order: float,
    length_scale: jax.typing.ArrayLike,
    variance: jax.typing.ArrayLike,
    step: jax.typing.ArrayLike | Callable[[Any], jax.typing.ArrayLike],
) -> Matern:
    r"""A Gaussian process in time with Matern's covariance, in `O(n)` for n batches.

    With :math:`\lambda = \sqrt{2 \nu} / \ell`, the covariance

    .. math:: k(\tau) = \sigma^2 \frac{2^{1-\nu}}{\Gamma(\nu)}
       (\lambda \tau)^\nu K_\nu(\lambda \tau)

    is that of a linear stochastic differential equation, whose state, the process and
    its first `p = nu - 1/2` derivatives, each in units of :math:`\lambda^{-i}`, are
    the flow's parameters. Exact: filtered by a flow and smoothed by `ff.smooth` it is
    the Gaussian process, its `log_evidence` the marginal likelihood.

    Args:
      order: :math:`\nu`, 1/2 (rough), 3/2, 5/2, ...: the process has p derivatives.
      length_scale: :math:`\ell`, in the units of time. May be traced, as the next two.
      variance: :math:`\sigma^2`, of the process at any time.
      step: the time from one batch to the next; or a function of the batch that returns
        it, as `ff.memories.random_walk` calls one, for times that are not equally far
        apart. 0: at the same time.

    Returns:
      `(memory, prior_precision, read_out)` for a flow of full structure over parameters
      of shape `(p + 1,)`, with `prior_is="predicted"` where the first step is a
      function of the batch and no time before it is meant. A row of inputs is an
      observation at the time of its batch. Cost of an update: `(p + 1)^3`.

    Raises:
      ValueError: for an order that is not half an odd number; a length scale or
        variance that is not positive, a step that is negative, where they are at hand.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> memory, prior, read_out = ff.memories.matern(1.5, 2.0, 1.0, step=0.5)
      >>> flow = ff.fisher_flow(
      ...     read_out,
      ...     ff.likelihoods.gaussian(scale=0.1),
      ...     memory=memory,
      ...     prior_precision=prior,
      ... )
      >>> state = flow.init(jnp.zeros(2))
      >>> state, info = flow.update(state, (jnp.zeros((1, 0)), jnp.array([1.0])))
      >>> print(state.mean[0].round(3))  # 1 / 1.01 of what was seen
      0.99

    References:
      Hartikainen, Sarkka, "Kalman filtering and smoothing solutions to temporal
      Gaussian process regression models", 2010.
    """
    process = _process(_derivatives(order))
    checks.positive(length_scale, "length_scale")
    checks.positive(variance, "variance")
    if not callable(step):
        checks.not_negative(step, "step")
    for name, value in (
        ("length_scale", length_scale),
        ("variance", variance),
        ("step", step),
    ):
        if not callable(value) and jnp.ndim(value):
            raise ValueError(
                f"{name} is one number; got shape {jnp.shape(value)}. Times that are "
                "not equally far apart come with the batches: a function of the batch "
                "as step."
            )
    rate = math.sqrt(2 * order) / jnp.asarray(length_scale, jnp.result_type(float))
    variance = jnp.asarray(variance, rate.dtype)

    def moved(function: Callable) -> Any:
        if not callable(step):
            return function(rate * step)

        def after(batch: Any) -> jax.Array:
            time = step(batch)
            checks.not_negative(time, "step")
            return function(rate * time)

        return after

    memory = random_walk(
        moved(lambda time: variance * process.noise(time)), moved(process.transition)
    )
    root = jnp.asarray(process.root_of_precision, rate.dtype) / jnp.sqrt(variance)
    return Matern(memory, full().reduce(root), _first)


def _first(params: Any, inputs: PyTree) -> jax.Array:
    rows = len(jax.tree.leaves(inputs)[0])
    return jnp.broadcast_to(params[0], (rows,))


def _derivatives(order: float) -> int:
    if 2 * order not in range(1, 22, 2):
        raise ValueError(
            f"order is half an odd number, from 0.5 to 10.5; got {order}: only those "
            "have a state of finitely many derivatives."
        )
    return int(order - 0.5)


@dataclasses.dataclass(frozen=True)
class _Process:
    r"""`(d/dt + 1)^(p+1) f = c` times white noise, with variance 1.

    The response of the i-th derivative to a shock is :math:`g_i(t) e^{-t}`, `g_i` a
    polynomial; noise and covariance are integrals of their products.
    """

    products: np.ndarray  # (p + 1, p + 1, 2 p + 1) coefficients of c^2 g_i g_j

    @property
    def covariance(self) -> np.ndarray:
        """`(p + 1, p + 1)`, of the stationary distribution."""
        return self.products @ _INTEGRALS[: self.products.shape[-1]]

    @property
    def root_of_precision(self) -> np.ndarray:
        """`R`, with `R^T R` the inverse of that."""
        return np.linalg.cholesky(np.linalg.inv(self.covariance)).T

    def noise(self, time: jax.Array) -> jax.Array:
        """`(p + 1, p + 1)`, what is added within a time."""
        return jnp.asarray(self.products, time.dtype) @ _integrals(
            time, self.products.shape[-1]
        )

    def transition(self, time: jax.Array) -> jax.Array:
        """`(p + 1, p + 1)`: what remains of a state after a time."""
        size = len(self.products)
        shift = np.eye(size) + np.eye(size, k=1)
        shift[-1] -= [math.comb(size, k) for k in range(size)]  # nilpotent
        terms = [np.eye(size)]
        for k in range(1, size):
            terms.append(terms[-1] @ shift / k)
        powers = jnp.stack([time**k for k in range(size)])
        series = jnp.asarray(np.stack(terms, -1), time.dtype)
        return jnp.exp(-time) * (series @ powers)


# of t^k e^(-2t), over all times
_INTEGRALS = np.array([math.factorial(k) / 2.0 ** (k + 1) for k in range(21)])


@functools.cache
def _process(p: int) -> _Process:
    response = Polynomial([0.0] * p + [1 / math.factorial(p)])
    responses = [response]
    for _ in range(p):
        responses.append(responses[-1].deriv() - responses[-1])
    products = np.zeros((p + 1, p + 1, 2 * p + 1))
    for i, one in enumerate(responses):
        for j, other in enumerate(responses):
            found = (one * other).coef
            products[i, j, : len(found)] = found
    return _Process(products / (products[0, 0] @ _INTEGRALS[: 2 * p + 1]))


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _integrals(time: jax.Array, count: int) -> jax.Array:
    """Of `t^k e^(-2t)` up to a time, k < count: to full relative accuracy."""
    parts = jax.scipy.special.gammainc(
        jnp.arange(1, count + 1, dtype=time.dtype), 2 * time
    )
    return parts * jnp.asarray(_INTEGRALS[:count], time.dtype)


@_integrals.defjvp
def _(count: int, primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    # at a time of zero as well, where that of gammainc is NaN
    (time,), (moved,) = primals, tangents
    slopes = jnp.stack([time**k for k in range(count)]) * jnp.exp(-2 * time)
    return _integrals(time, count), slopes * moved
