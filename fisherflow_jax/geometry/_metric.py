"""Metrics: Fisher information as a function of parameters, and its volume."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fisherflow_jax import information as ops
from fisherflow_jax._ground import checks, choices, linalg, trees
from fisherflow_jax.estimators import Estimator
from fisherflow_jax.likelihoods import Likelihood, root_columns
from fisherflow_jax.structures import Full

PyTree = Any
Metric = Callable[[PyTree], jax.Array]


def metric(
    source: Likelihood | Estimator, batch: Any = None, key: Any = None
) -> Metric:
    r"""The Fisher information as a function of the parameters: a Riemannian metric.

    .. math:: g(\theta) = \sum_i J_i^\top I(z_i) J_i, \qquad g(z) = I(z)

    of a model, the pullback of the metric at its outputs; of a likelihood, that metric
    itself, for a family is a likelihood whose outputs are its parameters.

    Args:
      source: an estimator that is bound to its model, such as
        `ff.estimators.exact(apply_fn, likelihood, ff.structures.full())`; or a
        likelihood, for one observation of it.
      batch: of an estimator, the rows over which it sums.
      key: for what draws; the same draws at all parameters.

    Returns:
      A function of the parameters, a pytree, to a matrix `(d, d)` in the order of
      `jax.tree.leaves`, each leaf ravelled. Of a likelihood the parameters are the
      outputs of one example, without the leading axis. All of `ff.geometry` takes
      such a function, your own too. It is differentiated, vmapped and compiled as what
      it is made of. Cost: the estimator's, and d^2.

    Raises:
      TypeError: for an estimator that is not bound, and for anything else.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> normal = ff.geometry.metric(ff.likelihoods.gaussian_location_scale())
      >>> print(normal(jnp.array([0.0, jnp.log(2.0)])).round(3))
      [[0.25 0.  ]
       [0.   2.  ]]
      >>> model = lambda params, x: x @ params, ff.likelihoods.poisson()
      >>> rows = jnp.array([[1.0, 0.0], [1.0, 1.0]]), None
      >>> estimator = ff.estimators.exact(*model, ff.structures.full())
      >>> print(ff.geometry.metric(estimator, rows)(jnp.zeros(2)))
      [[2. 1.]
       [1. 1.]]

    References:
      Rao, "Information and the accuracy attainable in the estimation of statistical
      parameters", 1945.
      Amari, "Information Geometry and Its Applications", 2016.
    """
    if isinstance(source, Likelihood):
        return lambda outputs: _of_outputs(source, outputs, key)
    if not isinstance(source, Estimator):
        raise TypeError(
            "a metric is of a likelihood, or of an estimator that is bound to a model, "
            "such as ff.estimators.exact(apply_fn, likelihood, ff.structures.full()); "
            f"got {checks.described(source)}."
        )

    def of_model(params: PyTree) -> jax.Array:
        return ops.to_dense(source(params, batch, key), params)

    return of_model


def _of_outputs(likelihood: Likelihood, outputs: PyTree, key: Any) -> jax.Array:
    columns = root_columns(likelihood, floating(outputs)[None], key)
    rows = trees.widen(columns).reshape(len(columns), -1)
    return linalg.product("ri,rj->ij", rows, rows)


def pullback(metric: Metric, function: Callable[[PyTree], PyTree]) -> Metric:
    r"""The metric in other coordinates, or on a submanifold.

    .. math:: (f^* g)(\phi) = J^\top g(f(\phi))\, J, \quad J = \partial f / \partial\phi

    Args:
      metric: g, `params -> (d, d)`.
      function: f, `new params -> params`, differentiable.

    Returns:
      A function of the new parameters, `(k, k)`, singular where f folds them. Cost: k
      forward derivatives of f, and k d^2.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> logits = ff.geometry.metric(ff.likelihoods.bernoulli())
      >>> chances = ff.geometry.pullback(logits, jax.scipy.special.logit)
      >>> print(chances(jnp.array(0.2)).round(3))  # 1 / (p (1 - p))
      [[6.25]]

    References:
      Amari, "Information Geometry and Its Applications", 2016.
    """

    check_metric(metric)

    def pulled(params: PyTree) -> jax.Array:
        params = floating(params)
        point, flat = flattened(params)
        jacobian = jax.jacfwd(lambda x: trees.ravel(floating(function(point(x)))))(flat)
        matrix = metric(function(params)).astype(jacobian.dtype)
        return linalg.product("ai,ab,bj->ij", jacobian, matrix, jacobian)

    return pulled


def jeffreys(metric: Metric) -> Callable[[PyTree], jax.Array]:
    r"""Jeffreys' prior, as a log-density up to a constant.

    .. math:: \log \pi(\theta) = \tfrac12 \log |g(\theta)|

    It does not depend on the coordinates, and its integral is the Fisher volume. As a
    penalty it is Firth's: the estimate has no bias of order 1/n in an exponential
    family, and is finite for separated classes.

    Args:
      metric: `params -> (d, d)`. A factor of it, such as the number of rows, moves the
        result by a constant alone.

    Returns:
      A function of the parameters to a number, to be differentiated, vmapped and
      compiled; under these it is NaN where the metric is singular. Cost: the metric,
      and d^3.

    Raises:
      ValueError: by the function, outside jit, for a singular metric, with the
        directions in which it is zero.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> log_prior = ff.geometry.jeffreys(ff.geometry.metric(ff.likelihoods.poisson()))
      >>> print(log_prior(jnp.log(9.0)).round(3))  # log sqrt(9)
      1.099

    References:
      Jeffreys, "An invariant form for the prior probability in estimation problems",
      1946.
      Firth, "Bias reduction of maximum likelihood estimates", 1993.
    """
    check_metric(metric)

    def log_density(params: PyTree) -> jax.Array:
        matrix = metric(params)
        unit, scales = linalg.equilibrated(matrix)
        pivots = linalg.diagonal(linalg.cholesky(unit))
        regular = jnp.all(jnp.square(pivots) > rounding(matrix))
        if not checks.holds(regular):
            refuse_singular(matrix, floating(params), "the density of Jeffreys' prior")
        value = jnp.sum(jnp.log(pivots) + jnp.log(scales))
        return jnp.where(regular, value, jnp.nan)

    return log_density


# ---- what the room shares


def check_metric(metric: Any) -> None:
    """Raises for what is no function of the parameters."""
    if isinstance(metric, Likelihood | Estimator) or not callable(metric):
        raise TypeError(
            "a metric is a function, params -> (d, d), such as ff.geometry.metric("
            f"likelihood) or metric(estimator, batch); got {checks.described(metric)}."
        )


def floating(params: PyTree) -> PyTree:
    """Parameters as arrays of one floating type, float32 or wider."""
    arrays = jax.tree.map(jnp.asarray, params)
    return trees.widen(trees.real_arrays(arrays, "params"))


@dataclasses.dataclass(frozen=True)
class Flat:
    """A metric as a function of vectors; equal of one metric and parameters' shapes."""

    metric: Metric
    treedef: Any
    shapes: tuple[tuple[int, ...], ...]

    def __call__(self, flat: jax.Array) -> jax.Array:
        like = [jax.ShapeDtypeStruct(shape, flat.dtype) for shape in self.shapes]
        return self.metric(trees.unravel(flat, self.treedef.unflatten(like)))


def flat_metric(metric: Metric, params: PyTree) -> Flat:
    check_metric(metric)
    leaves, treedef = jax.tree.flatten(params)
    return Flat(choices.hashable(metric), treedef, tuple(x.shape for x in leaves))


def flattened(params: PyTree) -> tuple[Callable[[jax.Array], PyTree], jax.Array]:
    """The way back from a vector, and the parameters as one."""
    return lambda flat: trees.unravel(flat, params), trees.ravel(params)


def rounding(matrix: jax.Array) -> float:
    """Below it a pivot or an eigenvalue of an equilibrated matrix is nothing."""
    return len(matrix) * float(jnp.finfo(matrix.dtype).eps)


def refuse_singular(matrix: jax.Array, params: PyTree, what: str) -> None:
    """Raises for a singular matrix, with the directions in which it is zero."""
    matrix, params = jax.lax.stop_gradient((matrix, params))
    if not bool(jnp.all(jnp.isfinite(matrix))):
        raise ValueError(f"{what}: the information is not finite at {params}.")
    found = ops.null_directions(Full(trees.unravel(matrix, params)))
    rows = trees.ravel(found.vectors, 1)[found.shares > 0.5][:3]
    names = trees.entry_names(params)
    shown = []
    for row in rows:
        size = jnp.abs(row)
        row = row / row[jnp.argmax(size > 0.9 * jnp.max(size))]
        terms = [(float(x), n) for x, n in zip(row, names, strict=True)]
        shown.append(" ".join(f"{x:+.3g} {n}" for x, n in terms if abs(x) > 1e-3))
    raise ValueError(
        f"{what} needs a positive definite information, and this one says nothing "
        f"along {'; '.join(shown) or 'some direction'}: leave out what is redundant, "
        "add a prior's precision, or choose coordinates that the data determine."
    )
