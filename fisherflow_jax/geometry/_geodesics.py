"""Geodesics: the acceleration without Christoffel symbols, exponential, logarithm."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fisherflow_jax._ground import arrays, checks, choices, linalg, trees
from fisherflow_jax.geometry._metric import (
    Flat,
    Metric,
    flat_metric,
    flattened,
    floating,
)
from fisherflow_jax.geometry._solving import library, tolerance_of

PyTree = Any

# The square of the relative change of the volume, integrated along a geodesic: 8 times
# its squared length for a normal, and 4 over what is left of the way before a boundary.
_MOST_CHANGE = 1e6


class Geodesic(NamedTuple):
    """Where a geodesic comes to, or passes at some times.

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


class Logarithm(NamedTuple):
    """The velocity with which a geodesic comes from one point to another.

    Attributes:
      velocity: a tree like the parameters; that of the last try, if not converged.
      converged: whether the geodesic arrives.
      residual: `()`, the largest difference of its end from the point.
      num_steps: `()`, Newton steps taken.
    """

    velocity: PyTree
    converged: jax.Array
    residual: jax.Array
    num_steps: jax.Array


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
class _Recipe:
    """How geodesics are solved, and shot; of vectors."""

    metric: Flat
    tolerance: float
    max_steps: int = 256
    num_stages: int = 0
    num_newton: int = 0


def _solved(
    recipe: _Recipe, x: jax.Array, v: jax.Array, times: jax.Array, forward: bool = False
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


def _length_kept(recipe: _Recipe, x: jax.Array, v: jax.Array, times: jax.Array):
    """As `_solved`, and the change of the squared speed."""
    ends, velocities, fine = _solved(recipe, x, v, times)
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
        steps; for shapes that differ.
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
    at = jnp.ones((1,)) if times is None else jnp.asarray(times)
    small = tolerance_of(tolerance, x.dtype)
    recipe = choices.shared(_Recipe(flat_metric(metric, params), small, max_steps))
    found = choices.run(recipe, _length_kept, x, v, arrays.like(at, x))
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


def log(
    metric: Metric,
    params: PyTree,
    other: PyTree,
    *,
    tolerance: float | None = None,
    num_stages: int = 8,
    max_steps: int = 30,
) -> Logarithm:
    r"""The logarithm: the velocity of the geodesic from one point to another.

    .. math:: \exp_\theta(v) = \theta'

    by shooting: Newton's method with exact Jacobians of the exponential map, halved
    until the end comes nearer. Where that is stuck, by continuation: to points on the
    straight line between the two, each from the solution before.

    Args:
      metric: g, `params -> (d, d)`, in coordinates that are unbounded (log scales,
        logits): a shot that leaves the domain is one that failed.
      params: theta, any pytree.
      other: theta', a tree like it.
      tolerance: of the geodesics, relative; the end is within ten times it. None: as of
        `exp`.
      num_stages: of the continuation.
      max_steps: of Newton's method, in each stage.

    Returns:
      A `Logarithm(velocity, converged, residual, num_steps)`: look at `converged`. The
      geodesic is the shortest, unless the space closes on itself. Differentiated
      (implicitly, forward and backward), vmapped and compiled. Cost: 4 to 40 Newton
      steps, each two geodesics and d derivatives of one.

    Raises:
      ValueError: for shapes that differ.
      ImportError: without diffrax.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> poisson = ff.geometry.metric(ff.likelihoods.poisson())
      >>> found = ff.geometry.log(poisson, jnp.log(4.0), jnp.log(9.0))
      >>> print(found.velocity.round(3), found.converged)
      1.0 True

    References:
      Keller, "Numerical Methods for Two-Point Boundary-Value Problems", 1968.
    """
    params, other = both(params, other, "the other point")
    point, x = flattened(params)
    y = trees.ravel(other)
    checks.whole(num_stages, "num_stages")
    small = tolerance_of(tolerance, x.dtype)
    flat = flat_metric(metric, params)
    shooting = {"num_stages": num_stages, "num_newton": max_steps}
    recipe = choices.shared(_Recipe(flat, small, **shooting))
    v, converged, residual, steps = choices.run(recipe, _shot, x, y)
    return Logarithm(point(v), converged, residual, steps)


def _shot(recipe: _Recipe, x: jax.Array, y: jax.Array) -> tuple[jax.Array, ...]:
    """The velocity, whether it arrives, the residual, and the steps taken."""
    found = _search(recipe, *jax.lax.stop_gradient((x, y)))
    v, jacobian, steps = jax.lax.stop_gradient(found)
    # one more step from the solution has the solution's derivatives
    gap = _end(recipe, x, v, forward=False) - y
    residual = jax.lax.stop_gradient(jnp.max(jnp.abs(gap)))
    converged = residual <= _within(recipe, y)
    way = linalg.solve(jacobian, gap[:, None])[:, 0]
    v = v - jnp.where(converged, way, 0)
    return v, converged, residual, steps


def _end(
    recipe: _Recipe, x: jax.Array, v: jax.Array, forward: bool = True
) -> jax.Array:
    ends, _, fine = _solved(recipe, x, v, jnp.ones((1,), x.dtype), forward)
    # a shot that leaves is far from everything
    return jnp.where(fine, ends[0], 1e6)


def _within(recipe: _Recipe, y: jax.Array) -> jax.Array:
    return 10 * recipe.tolerance * (1 + jnp.max(jnp.abs(y)))


def _search(recipe: _Recipe, x: jax.Array, y: jax.Array) -> tuple[jax.Array, ...]:
    """The velocity, the Jacobian of the end there, and the steps taken.

    Stage 0 is a shot at the point itself, the others go through those between.
    """
    count = recipe.num_stages

    def stage(state: tuple) -> tuple:
        k, v, *_, steps = state
        part = jnp.where(k == 0, count, k).astype(x.dtype) / count
        again = jnp.where(k == 1, (y - x) / count, v * k / jnp.maximum(k - 1, 1))
        target = x + part * (y - x)
        v, jacobian, arrived, taken = _newton(recipe, x, target, again)
        return k + 1, v, jacobian, arrived & (part == 1), steps + taken

    def more(state: tuple) -> jax.Array:
        return (state[0] <= count) & ~state[3]

    d, none = x.shape[0], jnp.zeros((), jnp.int32)
    start = none, y - x, jnp.eye(d, dtype=x.dtype), jnp.array(False), none
    found = jax.lax.while_loop(more, stage, start)
    return found[1], found[2], found[4]


def _newton(recipe: _Recipe, x: jax.Array, y: jax.Array, v: jax.Array) -> tuple:
    """The velocity, the Jacobian, whether it arrives, and the steps taken."""

    def gap(v: jax.Array) -> jax.Array:
        return _end(recipe, x, v) - y

    def step(state: tuple) -> tuple:
        v, _, steps, _, _ = state
        jacobian, before = jax.jacfwd(lambda u: (gap(u),) * 2, has_aux=True)(v)
        way = linalg.solve(jacobian, before[:, None])[:, 0]
        way = jnp.where(jnp.isfinite(way), way, 0)
        size = jnp.linalg.norm(before)

        def too_far(tried: tuple) -> jax.Array:
            return ~(tried[1] < size) & (tried[0] > 2.0**-8)

        def halved(tried: tuple) -> tuple:
            part = tried[0] / 2
            return part, jnp.linalg.norm(gap(v - part * way))

        start = jnp.full((), 2, x.dtype), jnp.full((), jnp.inf, x.dtype)
        part, nearest = jax.lax.while_loop(too_far, halved, start)
        arrived = jnp.max(jnp.abs(before)) <= _within(recipe, y)
        better = (nearest < size) & ~arrived
        moved = jnp.where(better, v - part * way, v)
        return moved, jacobian, steps + better, arrived, better

    def more(state: tuple) -> jax.Array:
        return (state[2] < recipe.num_newton) & ~state[3] & state[4]

    d, none = x.shape[0], jnp.zeros((), jnp.int32)
    start = v, jnp.eye(d, dtype=x.dtype), none, jnp.array(False), jnp.array(True)
    v, jacobian, steps, arrived, _ = jax.lax.while_loop(more, step, start)
    return v, jacobian, arrived, steps
