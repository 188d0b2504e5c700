"""What no estimator can do better than: the bound of Cramér and Rao."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fisherflow_jax import information as ops
from fisherflow_jax._ground import checks, linalg, trees
from fisherflow_jax.geometry._metric import flattened, floating, refuse_singular

PyTree = Any


def cramer_rao(
    information: Any,
    params: PyTree,
    function: Callable[[PyTree], PyTree] | None = None,
    *,
    bias: Callable[[PyTree], PyTree] | None = None,
) -> jax.Array:
    r"""The least covariance of an estimator of a function of the parameters.

    .. math:: \operatorname{Cov} \hat\psi \succeq (J + B)\, I^{-1} (J + B)^\top,
       \qquad J = \frac{\partial f}{\partial\theta}, \quad
       B = \frac{\partial b}{\partial\theta}

    All parameters are unknown: of a function of a few, the others are nuisance, and the
    bound is the inverse of their information by Schur's complement
    (`ff.information.efficient`). A biased estimator may lie below the bound of the
    unbiased ones, by its own B; its mean squared error is at least the bound and
    :math:`b b^\top`.

    Args:
      information: I, at the parameters, of any structure: a sum over observations.
      params: theta, where it was taken.
      function: f, of the parameters to a pytree of k numbers: what is estimated. None:
        the parameters themselves.
      bias: b, of the parameters to a tree of the same shapes, differentiable:
        :math:`\mathrm{E}\, \hat\psi = f + b`. None: unbiased.

    Returns:
      The matrix `(k, k)`, in the order of `jax.tree.leaves` of what the function
      returns. Directions that the data do not determine do not matter for functions
      that do not depend on them. Vmapped and compiled; infinite, where no estimator has
      a finite variance. Cost: k backward passes of f and b, and d^3.

    Raises:
      ValueError: outside jit, for a function that the data do not determine, with the
        directions in which they say nothing; above 4,096 parameters.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> n, variance = 10, jnp.array(2.0)
      >>> information = ff.structures.Full((n / (2 * variance**2))[None])
      >>> print(ff.geometry.cramer_rao(information, variance))  # 2 variance^2 / n
      [[0.8]]
      >>> of_the_mle = lambda v: -v / n
      >>> found = ff.geometry.cramer_rao(information, variance, bias=of_the_mle)
      >>> print(found.round(3))  # (1 - 1 / n)^2 of it
      [[0.648]]

    References:
      Rao, "Information and the accuracy attainable in the estimation of statistical
      parameters", 1945.
      Cramér, "Mathematical Methods of Statistics", 1946, chapter 32.
    """
    params = floating(params)
    own = jax.eval_shape(ops.diagonal, information, params)
    trees.check_shapes(params, own, "params are those of the information")
    point, x = flattened(params)

    def expected(x: jax.Array) -> jax.Array:
        theta = point(x)
        value = floating(theta if function is None else function(theta))
        if bias is not None:
            shift = floating(bias(theta))
            trees.check_shapes(shift, value, "a bias is a tree like what is estimated")
            value = jax.tree.map(jnp.add, value, shift)
        return trees.ravel(value)

    rows = jax.jacrev(expected)(x)
    contrasts = trees.unravel(rows, params)
    known = jax.vmap(lambda c: ops.is_estimable(information, c))(contrasts)
    if not checks.holds(jnp.all(known)):
        matrix = ops.to_dense(information, params)
        refuse_singular(matrix, params, "a bound of what depends on these directions")
    found = ops.null_directions(information, None, params)
    vectors = trees.ravel(found.vectors, 1)
    vectors = jnp.where(found.shares[:, None] > 0.5, 0, vectors)
    seen = linalg.product("ki,di->kd", rows.astype(vectors.dtype), vectors)
    bound = linalg.product("kd,ld->kl", seen, seen)
    both = known[:, None] & known[None, :]
    return jnp.where(both, bound, jnp.inf)
