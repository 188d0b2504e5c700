"""The quadratic of elastic weight consolidation, on a loss and on its gradient."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fisherflow_jax import information as ops
from fisherflow_jax._ground import checks, trees
from fisherflow_jax.posteriors import Gaussian, gaussian
from fisherflow_jax.structures import Scalar

PyTree = Any


def elastic_penalty(
    state: Any,
    params: PyTree,
    *,
    num_observations: jax.typing.ArrayLike,
    strength: jax.typing.ArrayLike = 1.0,
) -> jax.Array:
    r"""How far parameters are from what is believed of them, to be added to a loss.

    .. math:: \frac{\lambda}{2 n} (\theta - \hat\theta)^\top I (\theta - \hat\theta)

    Beside a mean loss over n observations, as `ff.negative_log_likelihood`, their sum
    is minus the log-posterior over n, up to a constant: the parameters of a next task
    are its mode, and no data of earlier tasks are kept. There is one quadratic with one
    centre, however many tasks there were; the information adds up (`consolidate`).

    Args:
      state: anything with `.mean` and `.information`: `flow.advance(state)` (after
        whose forgetting the next task begins), a posterior, or
        `ff.posterior(params, structure, prior_precision=...)` before the first task.
      params: like its mean.
      num_observations: n, those of the task's data, of whose mean loss this is a part;
        1 beside a sum.
      strength: 1 for Bayes' rule. Networks are held better by 3 to 30 with Kronecker
        factors, and 10 to 100 with a diagonal: far from a mode the quadratic says too
        little. Both numbers may be traced.

    Returns:
      A number. Cost: one product with the information.

    Raises:
      TypeError: for a mixture, which has no one centre.
      ValueError: for params unlike the mean (`extend` adds what a task brings), and,
        where they are at hand, a negative strength or no observations.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> information = ff.structures.Diagonal(jnp.array([3.0, 7.0]))
      >>> state = ff.posterior(jnp.zeros(2), information, prior_precision=1.0)
      >>> ff.continual.elastic_penalty(state, jnp.ones(2), num_observations=3)
      Array(2., dtype=float32)

    References:
      Kirkpatrick et al., "Overcoming catastrophic forgetting in neural networks", 2017.
      Huszar, "Note on the quadratic penalties in elastic weight consolidation", 2018.
      Ritter, Botev, Barber, "Online structured Laplace approximations for overcoming
      catastrophic forgetting", 2018.
    """
    _check(num_observations, strength)
    anchor = _anchor(state, params)
    move = optax.tree.sub(params, anchor.mean)
    squares = ops.quadratic_form(anchor.information, move)
    return squares * strength / (2 * num_observations)


class ElasticPenaltyState(NamedTuple):
    """The numbers of the penalty: another task's may be set here.

    Made by `ff.continual.add_elastic_penalty`.

    Attributes:
      num_observations: `()`, of the task's data.
      strength: `()`.
    """

    num_observations: jax.Array
    strength: jax.Array


def add_elastic_penalty(
    num_observations: jax.typing.ArrayLike,
    *,
    strength: jax.typing.ArrayLike = 1.0,
    implicit_rate: float | None = None,
    inner: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Adds the gradient of `elastic_penalty` to that of the loss.

    .. math:: g + \tfrac{\lambda}{n} I (\theta - \hat\theta)

    It belongs before what rescales gradients, as `optax.adam` or `ff.scale_by_fisher`
    do: the penalty is then part of the loss. After it, it is another algorithm, a decay
    towards the mean in the information's metric, which no preconditioner divides.
    With plain gradient descent of rate :math:`\eta` steps diverge where
    :math:`\eta \lambda / n` times the largest eigenvalue passes 2; `implicit_rate`
    says :math:`\eta`, and the penalty is then met at the end of the step:

    .. math:: (1 + \tfrac{\eta \lambda}{n} I)^{-1}
       \big(g + \tfrac{\lambda}{n} I (\theta - \hat\theta)\big)

    What rescales gradients by their curvature, as `ff.kfac` does, sees that of its
    batches alone, and would have to be damped by a stiff penalty's. Given as `inner` it
    is chained after the penalty, and told the penalty's:

    .. math:: (\bar F + \tfrac{\lambda}{n} I + \text{damping})^{-1}
       \big(g + \tfrac{\lambda}{n} I (\theta - \hat\theta)\big)

    Kronecker factors are added, as those of two batches are.

    Weight decay beside it counts the prior again, which the information includes.

    Args:
      num_observations: n, of the task's data, whose mean the loss is.
      strength: as of `elastic_penalty`. Both are numbers of the state: a new task's
        are set by `optax.tree.set(state, num_observations=..., strength=...)`, and
        compile nothing.
      implicit_rate: the learning rate of gradient descent that follows; None: the
        penalty's gradient as it is.
      inner: an optimiser that divides by a mean information: `ff.kfac(...)`,
        `ff.natural_gradient(...)`, a chain with `ff.scale_by_fisher(...)`. The anchor's
        information is in its structure, of the same layers. Inverses that are kept for
        some steps have the anchor of their time: begin a task with a new state.

    Returns:
      A transformation whose update is `update(updates, state, params, *, anchor,
      model_params=None, **extra)`. The anchor, anything with `.mean` and
      `.information`, is an argument, so that its arrays are kept once; before the first
      task it is the prior. `model_params`: the whole parameters, where `params` has
      holes. With `inner`, its state comes second, as in a chain. Cost: a product with
      the information, and a solve with `implicit_rate`.

    Raises:
      ValueError: as `elastic_penalty`; for `implicit_rate` beside `inner`; at update,
        without an anchor or parameters, or for an anchor in another structure than that
        of `inner`.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> import fisherflow_jax as ff
      >>> anchor = ff.posterior(
      ...     jnp.zeros(2), ff.structures.diagonal(), prior_precision=4.0
      ... )
      >>> optimizer = optax.chain(
      ...     ff.continual.add_elastic_penalty(num_observations=2), optax.sgd(0.1)
      ... )
      >>> params = jnp.ones(2)
      >>> updates, _ = optimizer.update(
      ...     jnp.zeros(2), optimizer.init(params), params, anchor=anchor
      ... )
      >>> print(updates.round(3))
      [-0.2 -0.2]
    """
    _check(num_observations, strength)
    if implicit_rate is not None:
        checks.positive(implicit_rate, "implicit_rate")

    def init(params: PyTree) -> ElasticPenaltyState:
        dtype = trees.float_dtype(params)
        numbers = num_observations, strength
        return ElasticPenaltyState(*(jnp.asarray(x, dtype) for x in numbers))

    update = functools.partial(_update, implicit_rate)
    if inner is None:
        return optax.GradientTransformationExtraArgs(init, update)
    if implicit_rate is not None:
        raise ValueError(
            "implicit_rate is of gradient descent: inner divides by the penalty's "
            "curvature itself."
        )
    inner = optax.with_extra_args_support(inner)
    return optax.GradientTransformationExtraArgs(
        lambda params: (init(params), inner.init(params)),
        functools.partial(_update_within, inner),
    )


def _update_within(
    inner: optax.GradientTransformationExtraArgs,
    updates: PyTree,
    state: tuple[ElasticPenaltyState, Any],
    params: PyTree | None = None,
    *,
    anchor: Any = None,
    **extra: Any,
) -> tuple[PyTree, tuple[ElasticPenaltyState, Any]]:
    penalty, below = state
    held, _ = _update(None, updates, penalty, params, anchor=anchor, **extra)
    share = penalty.strength / penalty.num_observations
    curvature = ops.scale(gaussian(anchor).information, share)
    moved, below = inner.update(held, below, params, curvature=curvature, **extra)
    return moved, (penalty, below)


def _update(
    implicit_rate: float | None,
    updates: PyTree,
    state: ElasticPenaltyState,
    params: PyTree | None = None,
    *,
    anchor: Any = None,
    model_params: PyTree | None = None,
    **extra: Any,
) -> tuple[PyTree, ElasticPenaltyState]:
    del extra
    whole = params if model_params is None else model_params
    if anchor is None or whole is None:
        missing = "anchor" if anchor is None else "params"
        raise ValueError(
            f"add_elastic_penalty needs {missing}: call update(updates, state, params, "
            "anchor=state), with what is believed before the task."
        )
    belief = _anchor(anchor, whole)
    share = state.strength / state.num_observations
    move = optax.tree.sub(whole, belief.mean)
    pull = optax.tree.scale(share, ops.matvec(belief.information, move))
    held = optax.tree.add(trees.fill_with_zeros(updates, whole), pull)
    if implicit_rate is not None:
        nearer = ops.scale(belief.information, implicit_rate * share)
        one = Scalar(jnp.ones_like(share))
        held = ops.solve(ops.add(nearer, one), held)
    held = optax.tree.cast_like(trees.punch(held, updates), updates)
    return held, state


def _anchor(state: Any, params: PyTree) -> Gaussian:
    anchor = gaussian(state)
    rule = (
        "params must be like the mean of the state that holds them (for what a task "
        "adds, ff.continual.extend)"
    )
    trees.check_shapes(params, anchor.mean, rule)
    return anchor


def _check(num_observations: Any, strength: Any) -> None:
    checks.positive(num_observations, "num_observations")
    checks.not_negative(strength, "strength")
