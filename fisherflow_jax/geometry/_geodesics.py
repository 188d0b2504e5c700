"""Geodesics: the acceleration without Christoffel symbols, and the exponential map."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fisherflow_jax._ground import arrays, checks, choices, linalg, trees
from fisherflow_jax.geometry._metric import (
    Flat,
    Metric,
    check_metric,
    flat_metric,
    flattened,
    floating,
)
from fisherflow_jax.geometry._solving import library, times_of, tolerance_of

PyTree = Any

# The square of the relative change of the volume, integrated along a geodesic: 8 times
# its squared length for a normal, and 4 over what is left of the way before a boundary.
_MOST_CHANGE = 1e6


class Geodesic(NamedTuple):
    """Where a geodesic comes to, or passes at some times. Made by `ff.geometry.exp`.

    Attributes:
      params: the points.
      velocity: the velocities there.
      converged: whether it stays where the metric is regular, and was solved; where
        not, points and velocities are NaN.
      error: `()`, by how much the squared speed has changed, relative to itself, which
        an exact geodesic keeps: about the error of the end, relative to the way.
    """

    params: PyTree
    velocity: PyTree
    converged: jax.Array
    error: jax.Array


def acceleration(metric: Metric, params: PyTree, velocity: PyTree) -> PyTree:
    r"""The second derivative of a geodesic: what keeps it straight in the metric.

    .. math:: -\Gamma(v, v) = g^{-1} \left( \tfrac12 \nabla_x (v^\top g v)
       - (D_v g)\, v \right)

    A step :math:`x + h v + \tfrac12 h^2 (-\Gamma(v, v))` along a natural gradient v is
    the geodesic correction: it depends on the coordinates at third order alone. It
    follows the geodesic, not the natural-gradient flow, from which it is as far as
    Euler's step; the midpoint rule is second order in both.

    Args:
      metric: g, `params -> (d, d)`.
      params: x, any pytree.
      velocity: v, a tree like it.

    Returns:
      A tree like the parameters. Differentiated, vmapped and compiled. Cost: a forward
      derivative of the metric, a gradient of a number and a solve; no `(d, d, d)`.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> poisson = lambda rate: 1 / rate[None]  # (1, 1)
      >>> ff.geometry.acceleration(poisson, jnp.array([4.0]), jnp.array([2.0]))
      Array([0.5], dtype=float32)

    References:
      Song, Song, Ermon, "Accelerating natural gradient with higher-order invariance",
      2018.
    """
    check_metric(metric)
    params, velocity = both(params, velocity, "velocity")
    point, x = flattened(params)
    return point(_turn(lambda y: metric(point(y)), x, trees.ravel(velocity))[0])


def _turn(metric: Metric, x: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`-Gamma(v, v)`, and the relative change of the volume along v."""
    matrix, moved = jax.jvp(metric, (x,), (v,))
    force = jax.grad(lambda y: 0.5 * v @ metric(y) @ v)(x) - moved @ v
    solved = linalg.solve(matrix, jnp.concatenate([force[:, None], moved], 1))
    return solved[:, 0], 0.5 * jnp.trace(solved[:, 1:])


def both(params: PyTree, other: PyTree, name: str) -> tuple[PyTree, PyTree]:
    """Two trees of one shape in one floating type."""
    params, other = floating(params), floating(other)
    trees.check_shapes(other, params, f"{name} is a tree like the parameters")
    like = jnp.zeros((), trees.wide_dtype(*map(trees.float_dtype, (params, other))))
    params, other = (
        jax.tree.map(lambda x: arrays.like(x, like), tree) for tree in (params, other)
    )
    return params, other


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How geodesics are solved, and shot; of vectors."""

    metric: Flat
    tolerance: float
    max_steps: int = 256
    num_stages: int = 0
    num_newton: int = 0


def solved(
    recipe: Recipe, x: jax.Array, v: jax.Array, times: jax.Array, forward: bool = False
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Points, velocities `(k, d)` at times, and whether they are to be trusted.

    The change of the volume is integrated beside them: it has no end where the metric
    is singular, so that no step leads across a boundary at a finite distance, on the
    other side of which the equation goes on as if there were none.
    """
    diffrax, d = library("exp"), x.shape[0]
    small = recipe.tolerance

    def field(t: jax.Array, state: jax.Array, args: Any) -> jax.Array:
        turn, change = _turn(recipe.metric, state[:d], state[d:-1])
        return jnp.concatenate([state[d:-1], turn, jnp.square(2 * change)[None]])

    found = diffrax.diffeqsolve(
        diffrax.ODETerm(field),
        diffrax.Dopri8(),
        jnp.zeros((), x.dtype),
        times[-1],
        None,
        jnp.concatenate([x, v, jnp.zeros((1,), x.dtype)]),
        saveat=diffrax.SaveAt(ts=times),
        stepsize_controller=diffrax.PIDController(rtol=small, atol=small / 100),
        event=diffrax.Event(lambda t, y, args, **_: y[-1] > _MOST_CHANGE),
        max_steps=recipe.max_steps,
        throw=False,
        adjoint=diffrax.ForwardMode() if forward else diffrax.DirectAdjoint(),
    )
    states = found.ys
    fine = found.result == diffrax.RESULTS.successful
    fine = fine & jnp.all(jnp.isfinite(states))
    states = jnp.where(fine, states, jnp.nan)
    return states[:, :d], states[:, d:-1], fine


def _length_kept(recipe: Recipe, x: jax.Array, v: jax.Array, times: jax.Array):
    """As `solved`, and the change of the squared speed."""
    ends, velocities, fine = solved(recipe, x, v, times)
    before = _square(recipe.metric(x), v)
    after = _square(recipe.metric(ends[-1]), velocities[-1])
    error = jnp.abs(after - before) / jnp.where(before > 0, before, 1)
    return ends, velocities, fine, error


def exp(
    metric: Metric,
    params: PyTree,
    velocity: PyTree,
    *,
    times: Any = None,
    tolerance: float | None = None,
    max_steps: int = 256,
) -> Geodesic:
    r"""The exponential map: where the geodesic with a velocity is after unit time.

    .. math:: \ddot x = -\Gamma(\dot x, \dot x), \qquad x(0) = \theta,
       \quad \dot x(0) = v, \qquad \exp_\theta(v) = x(1)

    Families with a boundary at a finite distance (a rate of zero, a face of the
    simplex) are incomplete: a geodesic may end before its time. That is found by the
    change of the volume element along it, in whatever coordinates, and refused.

    Args:
      metric: g, `params -> (d, d)`, regular at the parameters.
      params: theta, any pytree.
      velocity: v, a tree like it; the way is as long as its length in the metric.
      times: `(k,)`, increasing, not negative: the points then, leaves `(k, ...)`.
        None: at time one.
      tolerance: relative, of each coordinate; None: 1e-8, in float32 1e-5.
      max_steps: of the solver; of gradients the memory.

    Returns:
      A `Geodesic(params, velocity, converged, error)`. Differentiated (forward and
      backward), vmapped and compiled. Cost: some 13 accelerations a step, 5 to 20
      steps.

    Raises:
      ValueError: outside jit, for a geodesic that leaves the domain, or needs more
        steps; for shapes that differ, and times or numbers out of range.
      ImportError: without diffrax.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> poisson = ff.geometry.metric(ff.likelihoods.poisson())
      >>> end = ff.geometry.exp(poisson, jnp.log(4.0), jnp.array(1.0))
      >>> print(jnp.exp(end.params).round(3))  # (sqrt(4) (1 + 1 / 2))^2
      9.0

    References:
      do Carmo, "Riemannian Geometry", 1992, chapter 3.
      Dormand, Prince, "A family of embedded Runge-Kutta formulae", 1980.
    """
    params, velocity = both(params, velocity, "velocity")
    point, x = flattened(params)
    v = trees.ravel(velocity)
    at = times_of([1.0] if times is None else times, x.dtype)
    checks.whole(max_steps, "max_steps")
    small = tolerance_of(tolerance, x.dtype)
    recipe = choices.shared(Recipe(flat_metric(metric, params), small, max_steps))
    found = choices.run(recipe, _length_kept, x, v, at)
    ends, velocities, fine, error = found
    if not checks.holds(fine):
        raise ValueError(
            "the geodesic does not reach its end: it leaves the domain, or comes to "
            "where the metric is singular, or changes by many orders of magnitude. "
            "Go less far, or give coordinates that are unbounded (log rates, logits); "
            f"if it is only long, a larger max_steps than {max_steps}."
        )
    if times is None:
        ends, velocities = ends[0], velocities[0]
    return Geodesic(point(ends), point(velocities), fine, error)


def _square(matrix: jax.Array, v: jax.Array) -> jax.Array:
    return linalg.product("i,ij,j->", v, matrix, v)
