"""Fisher-Rao distances, in closed form or along a geodesic, and lengths of paths."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fisherflow_jax._ground import arrays, checks, linalg, trees
from fisherflow_jax._ground.arrays import safe_sqrt
from fisherflow_jax.geometry._divergences import check_pair
from fisherflow_jax.geometry._geodesics import both
from fisherflow_jax.geometry._logarithm import log
from fisherflow_jax.geometry._metric import Metric, check_metric, floating, metric
from fisherflow_jax.likelihoods import Likelihood

PyTree = Any


def distance(
    space: Likelihood | Metric,
    params: PyTree,
    other: PyTree,
    *,
    tolerance: float | None = None,
    num_stages: int = 8,
    max_steps: int = 30,
) -> jax.Array:
    r"""The Fisher-Rao distance: the length of the shortest path between two models.

    .. math:: d(\theta, \theta') = \min_{x(0) = \theta,\; x(1) = \theta'}
       \int_0^1 \sqrt{\dot x^\top g(x)\, \dot x}\; dt

    It does not depend on the coordinates, and :math:`d^2 / 2` is the Kullback-Leibler
    divergence of near ones; n observations multiply it by :math:`\sqrt n`.

    Args:
      space: a likelihood: between predictions, in closed form where it has one
        (`Likelihood.distance`, in arcsinh or arcsin form: it keeps its digits where
        the two are near). Or a metric, `params -> (d, d)`: by shooting.
      params: of a likelihood outputs `(n, ...)`; of a metric any pytree.
      other: of the same shapes.
      tolerance: of shooting, as the two below: see `log`.
      num_stages: of its continuation.
      max_steps: of Newton's method.

    Returns:
      Of a likelihood `(n,)`: one an example, over whose independent targets squares are
      summed (the distance on the product manifold). Of a metric a number.
      Differentiated, vmapped and compiled; between equal points the derivative is 0.
      Cost: of the order of the outputs; of shooting that of `log`, for each example.

    Raises:
      ValueError: outside jit, for shooting that does not arrive (NaN under jit); for a
        likelihood without a closed form whose root is drawn at random, and where no
        distance is defined: outputs that bring different noise.
      ImportError: for shooting without diffrax.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> rates = jnp.log(jnp.array([4.0])), jnp.log(jnp.array([9.0]))
      >>> print(ff.geometry.distance(ff.likelihoods.poisson(), *rates))  # 2 |2 - 3|
      [2.]
      >>> two = jnp.array([[0.0, 0.0]]), jnp.array([[1.0, 0.0]])
      >>> print(ff.geometry.distance(ff.likelihoods.gaussian_location_scale(), *two))
      [0.98]

    References:
      Rao, "Information and the accuracy attainable in the estimation of statistical
      parameters", 1945.
      Atkinson, Mitchell, "Rao's distance measure", 1981.
      Skovgaard, "A Riemannian geometry of the multivariate normal model", 1984.
    """
    options = {"tolerance": tolerance, "num_stages": num_stages, "max_steps": max_steps}
    if not isinstance(space, Likelihood):
        found, arrives = _shot(space, *both(params, other, "the other point"), options)
        return _trusted(found, arrives)
    outputs, other = check_pair(space, params, other)
    if space.distance is not None:
        each = space.distance(outputs, other)
        if not checks.holds(jnp.all(jnp.isfinite(each))):
            _refuse(space, outputs, other, each)
        axes = tuple(range(1, each.ndim))
        return safe_sqrt(jnp.sum(jnp.square(each), axes))
    if space.random_root:
        raise ValueError(
            f"{space.name} has no Fisher-Rao distance in closed form, and its root is "
            "drawn at random, so that there is no metric to shoot in: give it one, "
            "likelihood._replace(distance=...), a function of (outputs, other)."
        )
    own = metric(space)
    found, arrives = jax.vmap(lambda z, w: _shot(own, z, w, options))(outputs, other)
    return _trusted(found, arrives)


def _shot(
    metric: Metric, params: PyTree, other: PyTree, options: dict[str, Any]
) -> tuple[jax.Array, jax.Array]:
    found = log(metric, params, other, **options)
    v, matrix = trees.ravel(found.velocity), metric(params)
    length = safe_sqrt(jnp.maximum(linalg.product("i,ij,j->", v, matrix, v), 0))
    return jnp.where(found.converged, length, jnp.nan), found.converged


def _trusted(found: jax.Array, arrives: jax.Array) -> jax.Array:
    if not checks.holds(arrives):
        lost = int(np.sum(~np.asarray(arrives)))
        raise ValueError(
            f"shooting did not arrive for {lost} of {np.size(arrives)} pairs: give "
            "coordinates that are unbounded (log scales, logits), more num_stages or "
            "max_steps, or a likelihood that has its distance in closed form; "
            "ff.geometry.log says how far it came."
        )
    return found


def _refuse(space: Likelihood, outputs: Any, other: Any, each: jax.Array) -> None:
    outputs, other, each = jax.lax.stop_gradient((outputs, other, each))
    row = int(np.argmin(np.isfinite(np.asarray(each).reshape(len(each), -1)).all(1)))
    raise ValueError(
        f"{space!r}: example {row} has no distance, of outputs {outputs[row]} and "
        f"{other[row]}: they must be finite, and what they bring of known noise alike."
    )


def length(
    metric: Metric,
    path: PyTree | Callable[[jax.Array], PyTree],
    *,
    num_nodes: int = 16,
) -> jax.Array:
    r"""The length of a path in parameter space, in standard deviations.

    .. math:: \int_0^1 \sqrt{\dot x^\top g(x)\, \dot x}\; dt

    Args:
      metric: g, `params -> (d, d)`.
      path: a function of a time in [0, 1] to parameters, differentiable; or points,
        leaves `(k, ...)`, such as the iterates of a training run, joined by straight
        lines.
      num_nodes: of Gauss and Legendre's quadrature, of the path, or of each line.

    Returns:
      A number. Differentiated, vmapped and compiled. Cost: a metric for each node.

    Raises:
      ValueError: for fewer than two points.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> rates = ff.geometry.metric(ff.likelihoods.poisson())
      >>> points = jnp.log(jnp.array([4.0, 6.0, 9.0]))
      >>> print(ff.geometry.length(rates, points).round(3))  # 2 (sqrt(9) - sqrt(4))
      2.0

    References:
      Amari, "Information Geometry and Its Applications", 2016.
    """
    checks.whole(num_nodes, "num_nodes")
    check_metric(metric)
    nodes, weights = np.polynomial.legendre.leggauss(num_nodes)
    if callable(path):
        return _length(metric, path, (nodes + 1) / 2, weights / 2)
    points = floating(path)
    counts = {leaf.shape[:1] for leaf in jax.tree.leaves(points)}
    if len(counts) != 1 or counts == {()} or min(counts)[0] < 2:
        raise ValueError(
            "a path is a function of time, or two or more points, stacked along the "
            f"first axis of each leaf; got shapes {jax.tree.map(jnp.shape, points)}."
        )

    def line(start: PyTree, end: PyTree) -> jax.Array:
        def between(time: jax.Array) -> PyTree:
            return jax.tree.map(lambda x, y: x + time * (y - x), start, end)

        return _length(metric, between, (nodes + 1) / 2, weights / 2)

    starts, ends = (
        jax.tree.map(lambda x, part=part: x[part], points)
        for part in (slice(None, -1), slice(1, None))
    )
    return jnp.sum(jax.vmap(line)(starts, ends))


def _length(
    metric: Metric, path: Callable, times: np.ndarray, weights: np.ndarray
) -> jax.Array:
    dtype = trees.float_dtype(jax.eval_shape(path, jnp.zeros(())))

    def speed(time: jax.Array) -> jax.Array:
        params, velocity = jax.jvp(path, (time,), (jnp.ones_like(time),))
        v = trees.ravel(velocity)
        square = linalg.product("i,ij,j->", v, metric(params), v)
        return safe_sqrt(jnp.maximum(square, 0))

    speeds = jax.vmap(speed)(jnp.asarray(times, dtype))
    return jnp.sum(arrays.like(weights, speeds) * speeds)
