"""The natural-gradient flow: the ordinary differential equation, and steps of it."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fisherflow_jax import information as ops
from fisherflow_jax._ground import checks, choices, trees
from fisherflow_jax._ground.warning import warn_once
from fisherflow_jax.geometry._metric import floating, refuse_singular
from fisherflow_jax.geometry._solving import library, times_of, tolerance_of
from fisherflow_jax.structures import Scalar

PyTree = Any


class Flowed(NamedTuple):
    """Where the natural-gradient flow has come to.

    Made by `ff.geometry.natural_gradient_flow`.

    Attributes:
      params: leaves like the parameters; with `times`, `(k, ...)`.
      time: `()`, when it ended.
      log_likelihood: `()`, at the end, with the log-density of the prior.
      decrement: `()`, score^T I^-1 score at the end: twice what is left to gain, in
        nats, where the model is nearly quadratic.
      converged: whether the decrement fell below the tolerance.
      information: at the end, of the data: what `ff.posterior` takes.
      largest_error: `()`, the largest standard error, with the prior (of dispersion 1,
        where that is unknown): where it grows without end so do the parameters, as of
        separated classes, however small the decrement.
      num_steps: `()`, steps tried.
    """

    params: PyTree
    time: jax.Array
    log_likelihood: jax.Array
    decrement: jax.Array
    converged: jax.Array
    information: Any
    largest_error: jax.Array
    num_steps: jax.Array


class _Measured(NamedTuple):
    value: jax.Array
    score: PyTree
    information: Any  # of the data
    total: Any  # with the prior
    velocity: PyTree

    @property
    def decrement(self) -> jax.Array:
        return trees.dot(self.velocity, self.score)

    @property
    def largest_error(self) -> jax.Array:
        variances = ops.inverse_diagonal(self.total, self.score)
        return jnp.sqrt(jnp.max(trees.ravel(variances)))


class _Given(NamedTuple):
    """What the equation is of, as arrays."""

    batch: Any
    key: Any
    prior: tuple[PyTree, Any] | None
    damping: Any


@dataclasses.dataclass(frozen=True)
class _Recipe:
    """How it is solved."""

    evaluate: Callable
    tolerance: float
    step_size: float | None
    solver: Any
    rtol: float
    max_steps: int
    ends_early: bool

    def measure(self, params: PyTree, given: _Given) -> _Measured:
        more = () if given.key is None else (given.key,)
        value, score, information = self.evaluate(params, given.batch, *more)
        total = information
        if given.prior is not None:
            mean, precision = given.prior
            gap = optax.tree.sub(params, mean)
            pull = ops.matvec(precision, gap)
            value = value - 0.5 * trees.dot(gap, pull)
            score = optax.tree.sub(score, pull)
            total = ops.add(information, precision)
        velocity = ops.solver(total, given.damping)(score)
        return _Measured(value, score, information, total, velocity)


def natural_gradient_flow(
    evaluate: Callable,
    params: PyTree,
    batch: Any,
    key: Any = None,
    *,
    time: Any = jnp.inf,
    times: Any = None,
    tolerance: float = 1e-8,
    prior: tuple[PyTree, Any] | None = None,
    damping: Any = 0.0,
    step_size: float | None = None,
    solver: Any = None,
    rtol: float | None = None,
    max_steps: int = 4096,
) -> Flowed:
    r"""Follows the natural gradient of a batch, as a differential equation.

    .. math:: \dot\theta = I(\theta)^{-1} s(\theta), \qquad
       \frac{d}{dt} \log p = s^\top I^{-1} s \ge 0

    whatever curvature I is: of any estimator, in any structure. With the exact
    information of a canonical generalised linear model :math:`\dot s = -s`: the score
    falls as :math:`e^{-t}` whatever the conditioning, and mean parameters move straight
    (an m-geodesic; it is no geodesic of the metric).

    The steps are adaptive, or of one size. Of one size, Euler's is natural-gradient
    descent: it depends on the coordinates at first order, and is unstable above
    :math:`2 / \lambda_{\max}(I^{-1} H)`, 2 for a canonical model and the full
    structure. The midpoint rule (`solver=diffrax.Midpoint()`) depends on them at second
    order, and is as accurate, for two informations a step.

    Args:
      evaluate: `(params, batch) -> (log-likelihood, score, information)`, or with a key
        behind: `ff.fisher_flow(...).evaluate`, which brings estimator, structure and
        chunks along.
      params: where it begins, any pytree.
      batch: of `evaluate`.
      key: for an estimator that draws: the same draws all along.
      time: when it ends at the latest.
      times: `(k,)`, increasing from 0 or later: the parameters then; it ends with the
        last of them, whatever the decrement.
      tolerance: of the decrement :math:`s^\top I^{-1} s`, at which it ends.
      prior: `(mean, precision)` of a Gaussian, the precision an information or a
        number: in the score and in the information.
      damping: added to the information alone.
      step_size: of all steps; None: adaptive.
      solver: from diffrax; None: `Tsit5()`, with a step size `Euler()`.
      rtol: of adaptive steps, relative; absolute a thousandth of it. None: 1e-6, in
        float32 1e-5.
      max_steps: at most so many.

    Returns:
      A `Flowed`. Compiled and vmapped; not differentiated. Cost: an information, a
      score and a factorisation for each stage of a step, 7 of an adaptive one, some 25
      steps.

    Raises:
      ValueError: for numbers out of range; outside jit, for a singular information,
        with the directions in which it is zero, for steps that are unstable, and for
        more than `max_steps`. A `DataWarning` says where parameters grow without end.
      ImportError: without diffrax.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> model = lambda params, x: x @ params, ff.likelihoods.poisson()
      >>> evaluate = ff.fisher_flow(*model).evaluate
      >>> batch = jnp.ones((3, 1)), jnp.array([1.0, 2.0, 6.0])
      >>> found = ff.geometry.natural_gradient_flow(evaluate, jnp.zeros(1), batch)
      >>> print(jnp.exp(found.params).round(2), found.converged)  # the mean
      [3.] True

    References:
      Amari, "Natural gradient works efficiently in learning", 1998.
      Martens, "New insights and perspectives on the natural gradient method", 2020.
      Tsitouras, "Runge-Kutta pairs of order 5(4) satisfying only the first column
      simplifying assumption", 2011.
    """
    library("natural_gradient_flow")
    if not callable(evaluate):
        raise TypeError(
            "evaluate is a function, such as ff.fisher_flow(...).evaluate; got "
            f"{checks.described(evaluate)}."
        )
    params = floating(params)
    dtype = trees.float_dtype(params)
    checks.whole(max_steps, "max_steps")
    for name, value in (("tolerance", tolerance), ("damping", damping)):
        checks.not_negative(value, name)
    if step_size is not None:
        checks.positive(step_size, "step_size")
    prior = None if prior is None else _prior(prior, params)
    given = _Given(batch, key, prior, jnp.asarray(damping, dtype))
    ends_early = times is None
    if times is None:
        at, last = jnp.zeros(1, dtype), jnp.asarray(time, dtype)
    else:
        at = times_of(times, dtype)
        last = at[-1]
    if not checks.holds(last >= 0):
        raise ValueError(f"time must not be negative; got {time}.")
    numbers = tolerance, step_size, solver, tolerance_of(rtol, dtype, 1e-6), max_steps
    recipe = choices.shared(_Recipe(evaluate, *numbers, ends_early))
    start = recipe.measure(params, given)  # which raises for bad rows, where eager
    reached, done = choices.run(recipe, _solve, params, given, at, last)
    if not checks.is_traced((start, reached, done)):
        _check(recipe, start, reached, bool(done))
    return reached


def _prior(prior: tuple[PyTree, Any], params: PyTree) -> tuple[PyTree, Any]:
    if not isinstance(prior, tuple) or len(prior) != 2:
        raise ValueError(f"prior is a pair, (mean, precision); got {prior!r}.")
    mean, precision = prior
    trees.check_shapes(mean, params, "a prior's mean is a tree like the parameters")
    if not ops.is_information(precision):
        checks.not_negative(precision, "the prior's precision")
        precision = Scalar(jnp.asarray(precision, trees.float_dtype(params)))
    return mean, precision


def _solve(
    recipe: _Recipe, params: PyTree, given: _Given, times: jax.Array, last: jax.Array
) -> tuple[Flowed, jax.Array]:
    """Where it comes to, and whether it ended."""
    diffrax, dtype = library("natural_gradient_flow"), last.dtype
    size = recipe.step_size
    control: Any = diffrax.ConstantStepSize()
    solver = diffrax.Euler() if recipe.solver is None else recipe.solver
    if size is None:
        control = diffrax.PIDController(rtol=recipe.rtol, atol=recipe.rtol / 1000)
        solver = diffrax.Tsit5() if recipe.solver is None else recipe.solver

    def field(t: jax.Array, params: PyTree, given: _Given) -> PyTree:
        return recipe.measure(params, given).velocity

    def ends(t: jax.Array, params: PyTree, given: _Given, **_: Any) -> jax.Array:
        return recipe.measure(params, given).decrement < recipe.tolerance

    found = diffrax.diffeqsolve(
        diffrax.ODETerm(field),
        solver,
        jnp.zeros((), dtype),
        last,
        jnp.asarray(0.05 if size is None else size, dtype),
        params,
        given,
        saveat=diffrax.SaveAt(t1=True, ts=None if recipe.ends_early else times),
        stepsize_controller=control,
        event=diffrax.Event(ends) if recipe.ends_early else None,
        max_steps=recipe.max_steps,
        throw=False,
    )
    end = jax.tree.map(lambda x: x[-1], found.ys)
    at_end = recipe.measure(end, given)
    path = end if recipe.ends_early else jax.tree.map(lambda x: x[:-1], found.ys)
    reached = Flowed(
        params=path,
        time=found.ts[-1],
        log_likelihood=at_end.value,
        decrement=at_end.decrement,
        converged=at_end.decrement < recipe.tolerance,
        information=at_end.information,
        largest_error=at_end.largest_error,
        num_steps=found.stats["num_steps"],
    )
    return reached, diffrax.is_okay(found.result)


def _check(recipe: _Recipe, start: _Measured, reached: Flowed, done: bool) -> None:
    """Raises for a flow that went wrong, where values are at hand."""
    if not trees.all_finite(start.velocity):
        matrix = ops.to_dense(start.total, start.score)
        refuse_singular(matrix, start.score, "the natural gradient")
    gained = reached.log_likelihood - start.value
    if not (gained > -1e-3 * (1 + abs(start.value))):
        size = recipe.step_size
        what = "the flow" if size is None else f"steps of size {size}"
        raise ValueError(
            f"{what} made the log-likelihood fall, from {float(start.value):.6g} to "
            f"{float(reached.log_likelihood):.6g}: steps of one size are unstable "
            "above 2 over the largest eigenvalue of I^-1 H (2, with the exact "
            "information of a canonical model); take smaller or adaptive ones "
            "(step_size=None), or an information that does not vanish."
        )
    before, after = float(start.largest_error), float(reached.largest_error)
    if after > 100 * before:
        warn_once(
            reached.params,
            "along the flow the largest standard error grew from "
            f"{before:.3g} to {after:.3g}: some parameters seem to grow without end, "
            "as where classes are separated. Give a prior, or search with "
            "log_prior=ff.geometry.jeffreys(...) in ff.warm_start.",
        )
    if not done:
        raise ValueError(
            f"the flow did not end within {recipe.max_steps} steps: at time "
            f"{float(reached.time):.4g} the decrement is {float(reached.decrement):.3g}"
            f" and the largest standard error {after:.3g}. Give a larger max_steps, "
            "rtol or tolerance, or a prior where the data do not determine the "
            "parameters."
        )
