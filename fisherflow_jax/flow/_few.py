"""One step where fewer numbers are seen than there are parameters: Kalman's gain."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from fisherflow_jax import estimators
from fisherflow_jax import information as ops
from fisherflow_jax._ground import trees
from fisherflow_jax.flow._newton import Solution
from fisherflow_jax.flow._recipe import Observed
from fisherflow_jax.memories import Belief
from fisherflow_jax.structures import _inverted as inverted

PyTree = Any


def rows_of(observed: Observed, params: PyTree) -> Any:
    """The batch's information, by the vectors whose squares it sums."""
    recipe = dataclasses.replace(observed.recipe, structure=inverted.rows())
    return dataclasses.replace(observed, recipe=recipe).information(params)


def are_seen(observed: Observed, predicted: Belief) -> bool:
    """Whether a batch adds few rows to a covariance. From shapes and types alone."""
    recipe, mean = observed.recipe, predicted.mean
    if not inverted.takes_rows(predicted.sums.curvature):
        return False
    plain = recipe.estimator.value is estimators.exact and recipe.chunk_size is None
    if not plain or observed.log_prior is not None or predicted.rest is not None:
        return False
    if trees.size(mean) > ops.LARGEST_DENSE:  # the rows may come in chunks
        return False
    vectors = jax.tree.leaves(jax.eval_shape(lambda at: rows_of(observed, at), mean))
    return vectors[0].shape[0] < trees.size(mean)


def single_step(observed: Observed, predicted: Belief, start: PyTree) -> Solution:
    r"""`newton.single_step`, without a matrix of the parameters inverted.

    With the batch's information `J^T J` and score g at the start s, and the belief
    `N(m, P)` before it, the quadratic model is least at

    .. math:: m + P^+ a, \quad a = g + J^\top J (s - m), \quad
       P^+ = P - P J^\top (1 + J P J^\top)^{-1} J P,

    where the pull of the belief is `a - J^T J P^+ a`. The log-determinant is what
    that of the information grows by.
    """
    own = rows_of(observed, start)
    total, logdet = inverted.gained(predicted.sums.curvature, own)
    score = jax.grad(observed.log_density)(start)
    offset = optax.tree.sub(start, predicted.mean)
    drawn = optax.tree.add(score, ops.matvec(own, offset))
    move = ops.solver(total)(drawn)
    pull = optax.tree.sub(drawn, ops.matvec(own, move))
    step = optax.tree.sub(move, offset)
    # for what is reported alone: a factorisation, where the start is not the mean
    own_slope = jax.lax.cond(
        jnp.any(trees.ravel(offset) != 0),
        lambda way: ops.solver(ops.inverse(predicted.sums.curvature))(way),
        optax.tree.zeros_like,
        offset,
    )
    slope = optax.tree.sub(score, own_slope)
    return Solution(
        mean=optax.tree.add(predicted.mean, move),
        rest=None,
        at=start,
        information=own,
        logdet=logdet,
        step_size=jnp.ones_like(logdet),
        decrement=trees.dot(slope, step),
        unfinished=jnp.zeros((), jnp.int32),
        helped=jnp.zeros((), jnp.int32),
        pull=pull,
    )
