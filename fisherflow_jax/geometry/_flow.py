"""The natural-gradient flow: the ordinary differential equation, and steps of it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fisherflow_jax import information as ops
from fisherflow_jax._ground import arrays, checks, trees
from fisherflow_jax.geometry._metric import floating, refuse_singular
from fisherflow_jax.geometry._solving import library
from fisherflow_jax.structures import Scalar

PyTree = Any


class Flowed(NamedTuple):
    """Where the natural-gradient flow has come to.

    Attributes:
      params: leaves like the parameters; with `times`, `(k, ...)`.
      time: `()`, when it ended.
      log_likelihood: `()`, at the end, with the log-density of the prior.
      decrement: `()`, score^T I^-1 score at the end: twice what is left to gain, in
        nats, where the model is nearly quadratic.
      converged: whether the decrement fell below the tolerance.
      information: at the end, with the prior in it: what `ff.posterior` takes.
      largest_error: `()`, the largest standard error by it: where it grows without end
        so do the parameters, as of separated classes, however small the decrement.
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
    information: Any
    velocity: PyTree

    @property
    def decrement(self) -> jax.Array:
        return trees.dot(self.velocity, self.score)


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
    rtol: float = 1e-6,
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
      rtol: of adaptive steps, relative; absolute a thousandth of it.
      max_steps: at most so many.

    Returns:
      A `Flowed`. Compiled and vmapped; not differentiated. Cost: an information, a
      score and a factorisation for each stage of a step, 7 of an adaptive one, some 25
      steps.

    Raises:
      ValueError: outside jit, for a singular information, with the directions in which
        it is zero; for steps that are unstable, and for more than `max_steps`.
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
    diffrax = library("natural_gradient_flow")
    params = floating(params)
    dtype = trees.float_dtype(params)

    def measure(params: PyTree) -> _Measured:
        given = (params, batch) if key is None else (params, batch, key)
        value, score, information = evaluate(*given)
        value, score, information = _with_prior(
            prior, params, value, score, information
        )
        velocity = ops.solver(information, damping)(score)
        return _Measured(value, score, information, velocity)

    def ends(t: Any, params: PyTree, args: Any, **_: Any) -> jax.Array:
        return measure(params).decrement < tolerance

    last = time if times is None else arrays.like(times, jnp.zeros((), dtype))[-1]
    adaptive = step_size is None
    control = diffrax.PIDController(rtol=rtol, atol=rtol / 1000)
    usual = diffrax.Tsit5() if adaptive else diffrax.Euler()
    start = measure(params)
    found = diffrax.diffeqsolve(
        diffrax.ODETerm(lambda t, params, args: measure(params).velocity),
        usual if solver is None else solver,
        jnp.zeros((), dtype),
        jnp.asarray(last, dtype),
        jnp.asarray(0.05 if adaptive else step_size, dtype),
        params,
        saveat=diffrax.SaveAt(
            t1=True, ts=None if times is None else jnp.asarray(times, dtype)
        ),
        stepsize_controller=control if adaptive else diffrax.ConstantStepSize(),
        event=diffrax.Event(ends) if times is None else None,
        max_steps=max_steps,
        throw=False,
    )
    end = jax.tree.map(lambda x: x[-1], found.ys)
    last_one = measure(end)
    done = diffrax.is_okay(found.result)
    variances = trees.ravel(ops.inverse_diagonal(last_one.information, end))
    reached = Flowed(
        params=end if times is None else jax.tree.map(lambda x: x[:-1], found.ys),
        time=found.ts[-1],
        log_likelihood=last_one.value,
        decrement=last_one.decrement,
        converged=last_one.decrement < tolerance,
        information=last_one.information,
        largest_error=jnp.sqrt(jnp.max(variances)),
        num_steps=found.stats["num_steps"],
    )
    if checks.is_concrete((start, reached, done)):
        _check(start, reached, bool(done), params, step_size, max_steps)
    return reached


def _with_prior(
    prior: tuple[PyTree, Any] | None,
    params: PyTree,
    value: jax.Array,
    score: PyTree,
    information: Any,
) -> tuple[jax.Array, PyTree, Any]:
    if prior is None:
        return value, score, information
    mean, precision = prior
    if not ops.is_information(precision):
        precision = Scalar(jnp.asarray(precision, trees.float_dtype(params)))
    gap = optax.tree.sub(params, mean)
    pull = ops.matvec(precision, gap)
    return (
        value - 0.5 * trees.dot(gap, pull),
        optax.tree.sub(score, pull),
        ops.add(information, precision),
    )


def _check(
    start: _Measured,
    reached: Flowed,
    done: bool,
    params: PyTree,
    step_size: float | None,
    max_steps: int,
) -> None:
    """Raises for a flow that went wrong, where values are at hand."""
    if not trees.all_finite(start.velocity):
        matrix = ops.to_dense(start.information, params)
        refuse_singular(matrix, params, "the natural gradient")
    gained = reached.log_likelihood - start.value
    rounding = 1e-3 * (1 + abs(start.value))
    if not (gained > -rounding):
        what = "the flow" if step_size is None else f"steps of size {step_size}"
        raise ValueError(
            f"{what} made the log-likelihood fall, from {float(start.value):.6g} to "
            f"{float(reached.log_likelihood):.6g}: steps of one size are unstable "
            "above 2 over the largest eigenvalue of I^-1 H (2, with the exact "
            "information of a canonical model); take smaller or adaptive ones "
            "(step_size=None), or an information that does not vanish."
        )
    if not done:
        raise ValueError(
            f"the flow did not end within {max_steps} steps: at time "
            f"{float(reached.time):.4g} the decrement is {float(reached.decrement):.3g}"
            f" and the largest standard error {float(reached.largest_error):.3g}. Give "
            "a larger max_steps, rtol or tolerance, or a prior where the data do not "
            "determine the parameters."
        )
