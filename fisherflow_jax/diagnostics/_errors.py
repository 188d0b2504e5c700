"""What a structure, or an estimator, misses of the exact Fisher information."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fisherflow_jax import estimators, structures
from fisherflow_jax import information as ops
from fisherflow_jax._ground import checks, keys, trees
from fisherflow_jax._ground.batch import Batch, is_finite, unshare, zero_if_missing
from fisherflow_jax._ground.choices import hashable
from fisherflow_jax.accumulation import accumulate, each_batch
from fisherflow_jax.likelihoods import Likelihood
from fisherflow_jax.posteriors import check_like

PyTree = Any


class RelativeError(NamedTuple):
    """What an information misses, and how far chance may have moved it, each `()`.

    Made by `ff.diagnostics.relative_error`.
    """

    value: jax.Array
    standard_error: jax.Array


def relative_error(
    information: Any,
    apply_fn: Callable,
    likelihood: Likelihood,
    params: PyTree,
    batches: Any,
    key: Any,
    *,
    num_probes: int = 32,
) -> RelativeError:
    r"""The relative error of an information against the exact one, in Frobenius norm.

    .. math:: \frac{\|S - F\|_F}{\|F\|_F}, \qquad
       \|A\|_F^2 = \mathbb E_z \|A z\|^2, \quad z \sim \mathcal N(0, 1)

    with the exact products `F z` by derivatives along and against the model, so that
    the exact matrix is never formed. With as many probes as parameters these are an
    orthonormal basis instead: the value is then exact.

    Args:
      information: S, of any structure, a sum over the same data, without a prior.
      apply_fn: `(params, inputs) -> outputs`.
      likelihood: from `ff.likelihoods`.
      params: where the information was taken.
      batches: a batch, a list or loader of batches, or `ff.Stacked`.
      key: an int or a key, for the probes.
      num_probes: their number, at least 2.

    Returns:
      A `RelativeError(value, standard_error)`. Cost: two passes of the model a batch
      and probe. Memory: the probes and their products, `2 num_probes d`.

    Raises:
      ValueError: for fewer than two probes, no data, or an information about another
        tree.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> apply_fn = lambda params, x: x @ params
      >>> likelihood, params = ff.likelihoods.gaussian(), jnp.zeros(2)
      >>> batch = jnp.array([[1.0, 1.0], [1.0, -1.0], [2.0, 2.0]]), None
      >>> information = ff.estimators.exact(
      ...     apply_fn, likelihood, ff.structures.diagonal()
      ... )(params, batch)
      >>> error = ff.diagnostics.relative_error(
      ...     information, apply_fn, likelihood, params, batch, key=0
      ... )
      >>> print(error.value.round(3))  # [[6, 4], [4, 6]] without its 4s: sqrt(32 / 104)
      0.555

    References:
      Hutchinson, "A stochastic estimator of the trace of the influence matrix for
      Laplacian smoothing splines", 1990.
    """
    model, one = (apply_fn, likelihood), {"": information}
    return relative_errors(one, model, params, batches, key, num_probes)[""]


def relative_errors(
    informations: Mapping[str, Any],
    model: tuple[Callable, Likelihood],
    params: PyTree,
    batches: Any,
    key: Any,
    num_probes: int,
) -> dict[str, RelativeError]:
    """The error of each, by the exact information times the same normal vectors.

    Times all `d` unit vectors, if as many are asked for.
    """
    (apply_fn, likelihood), params = model, trees.real_arrays(params, "params")
    checks.whole(num_probes, "num_probes", least=2, of="probes, for a standard error")
    count, dtype = trees.size(params), trees.float_dtype(params)
    if num_probes >= count:  # a basis
        probes = trees.unravel(jnp.eye(count, dtype=dtype), params)
    else:
        drawn = jax.random.normal(keys.typed_key(key), (num_probes, count), dtype)
        probes = trees.unravel(drawn, params)
    total = jax.tree.map(jnp.zeros_like, probes)
    for number, batch in enumerate(each_batch(batches)):
        outputs = jax.eval_shape(apply_fn, params, unshare(batch.inputs))
        likelihood.check(outputs, batch.targets)
        if not checks.holds(is_finite(batch)):
            raise ValueError(
                f"batch {number} holds a NaN or an infinite value in a row of positive "
                "weight."
            )
        drawn = jax.random.fold_in(keys.typed_key(key), number)
        products = _products(
            hashable(apply_fn), likelihood, params, batch, probes, drawn
        )
        total = jax.tree.map(lambda x, y: x + y.astype(x.dtype), total, products)
    for information in informations.values():
        check_like(jax.eval_shape(ops.diagonal, information, params), params)
    return {
        name: _error(information, params, probes, total)
        for name, information in informations.items()
    }


@functools.partial(jax.jit, static_argnums=(0, 1))
def _products(
    apply_fn: Callable,
    likelihood: Likelihood,
    params: PyTree,
    batch: Batch,
    probes: PyTree,
    key: jax.Array,
) -> PyTree:
    """`sum_i w_i J_i^T L_i L_i^T J_i v` of each probe v, the root's draws the same.

    By one forward and one backward derivative. Memory: a pass of the whole batch.
    """
    inputs = unshare(batch.inputs)

    def model(p: PyTree) -> jax.Array:
        return apply_fn(p, inputs)

    def product(vector: PyTree) -> PyTree:
        tangent = jax.tree.map(lambda v, p: v.astype(p.dtype), vector, params)
        outputs, moved = jax.jvp(model, (params,), (tangent,))
        shape = likelihood.probe_shape(outputs.shape)
        probes = jax.ShapeDtypeStruct(shape, trees.wide_dtype(outputs.dtype))

        def root(x: jax.Array) -> jax.Array:
            return likelihood.root(outputs, x, key)

        (transposed,) = jax.linear_transpose(root, probes)(moved)
        cotangents = root(transposed)
        weights = batch.weights.astype(trees.wide_dtype(cotangents.dtype))
        weights = weights.reshape(
            weights.shape + (1,) * (cotangents.ndim - weights.ndim)
        )
        weighted = jnp.where(weights > 0, weights * cotangents.astype(weights.dtype), 0)
        _, vjp = jax.vjp(model, params)
        product = trees.widen(vjp(weighted.astype(outputs.dtype))[0])
        return zero_if_missing(batch, product)

    return jax.lax.map(product, probes)


@jax.jit
def _error(
    information: Any, params: PyTree, probes: PyTree, products: PyTree
) -> RelativeError:
    def squares(probe: PyTree, product: PyTree) -> tuple[jax.Array, jax.Array]:
        kept = trees.ravel(ops.matvec(information, probe))
        exact = trees.ravel(product).astype(kept.dtype)
        return jnp.sum(jnp.square(kept - exact)), jnp.sum(jnp.square(exact))

    missed, whole = jax.lax.map(lambda pair: squares(*pair), (probes, products))
    count = missed.shape[0]
    ratio = jnp.mean(missed) / jnp.mean(whole)
    value = jnp.sqrt(ratio)
    # by the delta method: of a ratio of means, and of its root
    residual = (missed - ratio * whole) / jnp.mean(whole)
    variance = jnp.sum(jnp.square(residual)) / (count * (count - 1))
    error = jnp.sqrt(variance) / jnp.where(value > 0, 2 * value, jnp.inf)
    if count == trees.size(params):
        error = jnp.zeros_like(error)  # a basis leaves nothing to chance
    return RelativeError(value, error)


def trace_ratio(
    apply_fn: Callable,
    likelihood: Likelihood,
    params: PyTree,
    batches: Any,
    key: Any = None,
    *,
    reference: Any = estimators.exact,
) -> jax.Array:
    r"""The trace of the empirical Fisher as a share of the expected one's.

    .. math:: \frac{\sum_i \|\nabla \log p(y_i \mid x_i)\|^2}
       {\sum_i \mathbb E_y \|\nabla \log p(y \mid x_i)\|^2}

    One in the mean where labels come from the model. It falls as the model fits its
    training labels (to 0.03 on a small network on digits), and with it all that is made
    of the empirical Fisher: variances and steps become too large by its inverse.

    Args:
      apply_fn: `(params, inputs) -> outputs`.
      likelihood: from `ff.likelihoods`.
      params: where to look.
      batches: a batch with targets, a list of batches, or `ff.Stacked`; no generator,
        since it is read twice.
      key: for a reference that draws.
      reference: of `ff.estimators`, for the denominator: `exact`, or `monte_carlo`,
        which is cheaper for many outputs.

    Returns:
      A number. Cost: the diagonal by both estimators.

    Raises:
      ValueError: without targets, without data, or for a generator.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> batch = jnp.ones((4, 1)), jnp.array([0.5, -0.5, 0.5, -0.5])
      >>> print(
      ...     ff.diagnostics.trace_ratio(
      ...         lambda params, x: x @ params,
      ...         ff.likelihoods.gaussian(),
      ...         jnp.zeros(1),
      ...         batch,
      ...     )
      ... )
      0.25

    References:
      Kunstner, Balles, Hennig, "Limitations of the empirical Fisher approximation for
      natural gradient descent", 2019.
    """
    if hasattr(batches, "__next__"):
        raise ValueError("the data are read twice: give a list of batches.")
    several = list(each_batch(batches)) if isinstance(batches, tuple) else batches
    traces = []
    for choice, draws in ((estimators.empirical, None), (reference, key)):
        estimator = estimators.bind(choice, apply_fn, likelihood, structures.diagonal())
        found = accumulate(estimator, params, several, draws, progress=False)
        if not checks.holds(found.num_skipped == 0):
            raise ValueError(
                f"{found.num_skipped} batches hold values that are not finite, or "
                f"targets that {likelihood.name} cannot produce."
            )
        traces.append(ops.trace(found.information))
    return traces[0] / traces[1]
