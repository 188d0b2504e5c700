"""A batch averaged over a Gaussian around the mean, whose spread stays in a search."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from fisherflow_jax import information as ops
from fisherflow_jax import model
from fisherflow_jax._ground import batch as batches
from fisherflow_jax._ground import linalg, trees
from fisherflow_jax._ground.arrays import safe_sqrt
from fisherflow_jax._ground.choices import Compared
from fisherflow_jax.flow._recipe import Observed
from fisherflow_jax.likelihoods._smoothed import Layout, smoothed

PyTree = Any

# Numbers held at once: of passes of the model, and of informations.
_HELD = 2**22
# What tells the key of nodes from that of an estimator.
_OF_NODES = 7


def around(observed: Observed, information: Any, mean: PyTree) -> Observed:
    """The batch as a function of the mean of `N(mean, information^-1)`.

    The spread is that of this mean and information, whatever mean it is then asked of.
    """
    expectation = observed.recipe.expectation
    if expectation is None:
        return observed
    if expectation.nodes is None:
        return _over_outputs(observed, information, mean)
    key = None
    if observed.key is not None:
        key = jax.random.fold_in(observed.key, _OF_NODES)
    size, dtype = trees.size(mean), trees.float_dtype(mean)
    points, weights = expectation.nodes(size, key)
    white = ops.whitener(ops.plain(information), like=mean)

    def spread(point: jax.Array) -> PyTree:
        return white.color(white.laid_out(trees.unravel(point, mean)))

    offsets = jax.vmap(spread)(jnp.asarray(points, dtype))
    return OverNodes(
        dataclasses.replace(observed.recipe, apply_fn=observed.apply_fn),
        observed.batch,
        observed.key,
        observed.log_prior,
        offsets=offsets,
        weights=jnp.asarray(weights, dtype),
    )


@dataclasses.dataclass(frozen=True, eq=False)
class OverNodes(Observed):
    """Averages of a batch over nodes; leaves of `offsets` are `(k, *leaf.shape)`."""

    offsets: PyTree = None
    weights: Any = None

    def log_likelihood(self, params: PyTree) -> jax.Array:
        likelihood, batch = self.recipe.likelihood, self.batch

        def at(offset: PyTree) -> jax.Array:
            params_there = optax.tree.add(params, offset)
            return model.log_likelihood(self.apply_fn, likelihood, params_there, batch)

        held = trees.size(params) + batches.num_examples(batch)
        values = jax.lax.map(at, self.offsets, batch_size=self._at_once(held))
        return jnp.sum(self.weights.astype(values.dtype) * values)

    def information(self, params: PyTree) -> Any:
        own = functools.partial(Observed.information, self)

        def at(offset: PyTree) -> Any:
            return own(optax.tree.add(params, offset))

        shapes = jax.eval_shape(own, params)
        held = sum(math.prod(x.shape) for x in jax.tree.leaves(shapes))
        size = self._at_once(held)

        def summed(part: tuple) -> Any:
            offsets, weights = part
            stacked = jax.lax.map(at, offsets, batch_size=size)
            one = jax.tree.map(lambda x: x[0], stacked)
            return ops.conform(one, ops.total(stacked, weights))

        if size >= len(self.weights):
            return summed((self.offsets, self.weights))
        nodes = self.offsets, self.weights

        def add(total: Any, node: tuple) -> tuple[Any, None]:
            offset, weight = node
            return ops.add(total, ops.scale(at(offset), weight)), None

        first, rest = (jax.tree.map(lambda x, s=s: x[s], nodes) for s in (0, _REST))
        return jax.lax.scan(add, ops.scale(at(first[0]), first[1]), rest)[0]

    def _at_once(self, held: int) -> int:
        return max(1, min(len(self.weights), _HELD // max(held, 1)))


_REST = slice(1, None)


def _over_outputs(observed: Observed, information: Any, mean: PyTree) -> Observed:
    """The batch under the likelihood that is averaged at its outputs."""
    recipe, batch, run = observed.recipe, observed.batch, observed.apply_fn
    assert recipe.expectation is not None
    why = "and outputs() gives the outputs of each row a spread of their own"
    recipe.model.check_alone(mean, batch.inputs, why)
    outputs = recipe.model.outputs(mean, batch.inputs)
    layout = Layout.of(recipe.likelihood, outputs, batch.targets)
    assert recipe.expectation.output_nodes is not None
    nodes = recipe.expectation.output_nodes(layout.size)
    roots = _roots(observed, layout, information, mean)

    def joined(params: PyTree, inputs: tuple) -> jax.Array:
        own, roots = inputs
        return layout.joined(run(params, own), roots)

    estimator = recipe.estimator.value
    if bound := getattr(estimator, "bound", None):
        estimator = bound[0]
    likelihood = smoothed(recipe.likelihood, layout, nodes)
    averaged = dataclasses.replace(
        recipe,
        apply_fn=joined,
        likelihood=likelihood,
        estimator=Compared(estimator),
        expectation=None,
    )
    return Observed(
        averaged,
        batch._replace(inputs=(batch.inputs, roots)),
        observed.key,
        observed.log_prior,
        widest=_widest(roots, batch).astype(trees.float_dtype(mean)),
    )


def _widest(roots: jax.Array, batch: batches.Batch) -> jax.Array:
    """Of the outputs of rows that count, `()`."""
    each = jnp.sqrt(jnp.max(jnp.sum(jnp.square(roots), -1), -1))
    each = each.reshape((each.shape[0], -1))
    counts = jnp.any(batch.weights.reshape((each.shape[0], -1)) > 0, 1)
    return jnp.max(jnp.where(counts[:, None], each, jnp.zeros_like(each)))


def _roots(
    observed: Observed, layout: Layout, information: Any, mean: PyTree
) -> jax.Array:
    r"""Roots of :math:`J I^{-1} J^\top`, `(n, *targets, K, K)`."""
    white = ops.whitener(ops.plain(information), like=mean)
    parts, rebuild = batches.unpack(observed.batch)
    number, size = math.prod(layout.targets), layout.size

    def one(parts: tuple) -> jax.Array:
        row = rebuild(*jax.tree.map(lambda x: x[None], parts))

        def outputs(params: PyTree) -> jax.Array:
            return observed.apply_fn(params, batches.unshare(row.inputs))

        found, pull = jax.vjp(outputs, mean)
        units = jnp.eye(number * size, dtype=found.dtype)
        units = units.reshape((number * size, *found.shape))
        pulled = trees.widen(jax.vmap(lambda unit: pull(unit)[0])(units))
        rows = white.matrix(pulled).reshape((number, size, -1))
        covariance = linalg.product("tiq,tjq->tij", rows, rows)
        return covariance.reshape((*layout.targets, size, size))

    held = number * size * trees.size(mean)
    covariances = jax.lax.map(one, parts, batch_size=max(1, _HELD // max(held, 1)))
    if size == 1:
        return safe_sqrt(covariances)
    return linalg.semidefinite_root(covariances)
