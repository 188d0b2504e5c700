"""What an update minimises, and the derivatives of where that is least."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.scipy.sparse.linalg import cg

from fisherflow_jax import information as ops
from fisherflow_jax._ground import trees
from fisherflow_jax.model import Traced

PyTree = Any


class Objective(NamedTuple):
    """`-log_likelihood(x) + |x - center|^2 / 2`, the norm by the information."""

    evaluate: Traced  # x -> it and its gradient
    curvature: Traced  # x -> the batch's information
    information: Any

    @property
    def arrays(self) -> Any:
        """All that it depends on beside x."""
        return self.evaluate.arrays, self.curvature.arrays, self.information

    def of(self, arrays: Any) -> "Objective":
        """The same function of x and other arrays."""
        evaluate, curvature, information = arrays
        return Objective(
            self.evaluate._replace(arrays=evaluate),
            self.curvature._replace(arrays=curvature),
            information,
        )

    def held(self) -> "Objective":
        """The same, without derivatives with respect to its arrays."""
        return self.of(jax.lax.stop_gradient(self.arrays))

    def factorised(self, x: PyTree) -> tuple[Any, ops.Regularised]:
        """The batch's information at x, and its sum with the one before, factorised."""
        own = self.curvature(x)
        return own, ops.regularised(ops.add(own, self.information), x)


def objective_of(
    log_likelihood: Callable[[PyTree], jax.Array],
    curvature: Callable[[PyTree], Any],
    center: PyTree,
    information: Any,
    rest: PyTree = None,
) -> Objective:
    """The objective, its Python run once however often it is written out.

    `rest`: what rounding took from the center.
    """

    def evaluate(x: PyTree) -> tuple[jax.Array, PyTree]:
        value, score = jax.value_and_grad(log_likelihood)(x)
        offset = optax.tree.sub(x, center)
        if rest is not None:
            offset = optax.tree.sub(offset, rest)
        pull = ops.matvec(information, offset)
        half = 0.5 * trees.dot(offset, pull)
        # in the parameters' type, whatever that of the data
        return half - value.astype(half.dtype), optax.tree.sub(pull, score)

    return Objective(
        evaluate=Traced.of(evaluate, center),
        curvature=Traced.of(curvature, center),
        information=information,
    )


def differentiable(
    objective: Objective, mean: PyTree, own: Any, logdet: jax.Array
) -> tuple[PyTree, Any, jax.Array]:
    """A solution that is known, with its derivatives: `(mean, own, logdet)` as given.

    The information `own` and the one before approximate the Hessian.
    """

    def measured(x: PyTree, arrays: Any) -> tuple[Any, jax.Array]:
        own, factors = objective.of(arrays).factorised(x)
        return own, factors.logdet

    def divided(found: tuple, x: PyTree, arrays: Any) -> Callable[[PyTree], PyTree]:
        total = ops.add(found[0], objective.of(arrays).information)
        return ops.regularised(total, x).divide

    def gradient(x: PyTree, arrays: Any) -> PyTree:
        return objective.of(arrays).evaluate(x)[1]

    given = Stationary(gradient, measured, divided)
    return given.solved(mean, (own, logdet), objective.arrays)


class Stationary(NamedTuple):
    """What is known of a point x where a gradient is zero."""

    gradient: Callable  # (x, arrays) -> like x
    measured: Callable  # (x, arrays) -> what is wanted of the point beside itself
    divided: Callable  # (that, x, arrays) -> v -> about H^-1 v

    def solved(self, x: PyTree, found: tuple, arrays: Any) -> tuple:
        r"""`(x, *found)` as they are known, with their derivatives in the arrays.

        .. math:: \mathrm{d} x = -H^{-1} \, \mathrm{d} g(x)

        g is the gradient, H its derivative, symmetric: conjugate gradients,
        preconditioned by what is about H, take one step where that is H. How the point
        was found does not matter, nor is it differentiated.
        """

        @jax.custom_jvp
        def known(given: Any, arrays: Any) -> Any:
            return given

        @known.defjvp
        def _(primals: Any, tangents: Any) -> Any:
            (x, *found), arrays = primals
            _, moved = tangents

            def hessian(vector: PyTree) -> PyTree:
                return jax.jvp(lambda x: self.gradient(x, arrays), (x,), (vector,))[1]

            def along(arrays: Any) -> PyTree:
                return self.gradient(x, arrays)

            pull = jax.jvp(along, (arrays,), (moved,))[1]
            divide = self.divided(tuple(found), x, arrays)
            tolerance = float(jnp.finfo(trees.float_dtype(x)).eps)
            step = jax.lax.custom_linear_solve(
                hessian,
                pull,
                lambda matvec, b: cg(matvec, b, tol=tolerance, maxiter=100, M=divide)[
                    0
                ],
                symmetric=True,
            )
            step = optax.tree.scale(-1.0, step)
            change = jax.jvp(self.measured, (x, arrays), (step, moved))[1]
            return (x, *found), (step, *change)

        return known((x, *found), arrays)
