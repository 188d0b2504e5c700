"""Variances of a model's outputs, streamed over examples and over outputs."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fisherflow_jax import products
from fisherflow_jax._ground import calling
from fisherflow_jax._ground.chunks import map_chunks
from fisherflow_jax.likelihoods import SOFTMAX, Likelihood
from fisherflow_jax.posteriors import Gaussian
from fisherflow_jax.predictions import _last_layer as last_layer
from fisherflow_jax.predictions._last_layer import LastLayer
from fisherflow_jax.products import Pull, Pulled, Puller, one_by_one

PyTree = Any

# Pulled-back numbers held at once when no chunk_size is given: 16 MiB in float32.
_ENTRIES = 2**22
_WHOLE = "ff.predictions.weight_samples runs it on whole batches"
# With no more outputs than these, one pull serves for all that is asked.
_TOGETHER = 128


class Wanted(NamedTuple):
    """What is asked for; static."""

    variance: bool = False  # of each raw output; with the covariance always
    covariance: float = 0  # of the outputs on the last axis, where no more than these
    line_of: Any = None  # the likelihood whose line's variance is asked
    robust: bool | str = False  # with the sandwich variance
    chunk_size: int | None = None


class Outputs(NamedTuple):
    """Normal moments of a model's raw outputs under the linearised posterior.

    Made by `ff.predictions.linearized_outputs`.
    """

    mean: jax.Array  # (n, ..., k), the model's outputs at the mean parameters
    variance: jax.Array  # (n, ..., k), of each output
    covariance: jax.Array | None = None  # (n, ..., k, k), of the k on the last axis
    # of the likelihood's line, in the shape of the expected target
    line_variance: jax.Array | None = None


class Examples(NamedTuple):
    """How the model is seen, one example at a time."""

    parts: list[jax.Array]  # leading axis n
    last: Callable[[list], LastLayer] | None  # where there is a closed form
    pull: Puller  # of slices of the parts


def examples_of(
    belief: Gaussian, apply_fn: Callable, inputs: PyTree, wanted: Wanted
) -> Examples:
    """The cheapest way of pulling back; what it needs is factorised once."""
    products.check_model(belief, apply_fn, inputs, wanted.line_of)
    parts, example_of = one_by_one(inputs)
    mean, robust = belief.mean, wanted.robust
    found = products.layer_covariances(belief, apply_fn, inputs, robust)
    if found is not None and last_layer.is_last_layer(
        apply_fn, mean, inputs, found.layers
    ):
        form = last_layer.closed_form(apply_fn, mean, found)

        def last(one: list) -> LastLayer:
            return form(example_of(one))

        def pull(one: list) -> tuple[jax.Array, Pull]:
            known = last(one)
            return known.outputs[None], known.pull

        return Examples(parts, last, pull)
    if found is None:
        at = products.by_gradients(belief, apply_fn, robust)
    else:
        at = products.by_layers(mean, apply_fn, found)
    return Examples(parts, None, lambda one: at(example_of(one)))


def sizes(examples: Examples, chunk_size: int | None, closed: bool) -> tuple[int, int]:
    """How many examples at a time, and how many cotangents of each."""
    first = [jax.eval_shape(lambda x: x[0], x) for x in examples.parts]

    def row(one: list) -> tuple[jax.Array, jax.Array]:
        outputs, pull = examples.pull(one)
        return outputs, pull(outputs[None]).left

    outputs, row_of_one = jax.eval_shape(row, first)
    entries = max(outputs.size, row_of_one.size, 1)
    together = outputs.size
    if closed and examples.last is not None:
        # without an eigenbasis of the outputs all costs as much as the outputs
        basis = jax.eval_shape(examples.last, first).basis
        together = 1 if basis is None else outputs.shape[-1]
    count = examples.parts[0].shape[0]
    size = chunk_size or min(max(_ENTRIES // (together * entries), 1), count)
    return size, max(_ENTRIES // (size * entries), 1)


def moments(
    belief: Gaussian,
    apply_fn: Callable,
    inputs: PyTree,
    wanted: Wanted,
    of: Callable[[Outputs], Any] = lambda outputs: outputs,
) -> Any:
    """`of(outputs)`, a chunk of examples at a time, side by side.

    The mean is as the model returns it; the dispersion is included.
    """
    examples = examples_of(belief, apply_fn, inputs, wanted)
    last = examples.last
    with calling.mapping(_WHOLE):
        size, at_once = sizes(examples, wanted.chunk_size, True)

    def one(parts: list) -> Outputs:
        if last is not None:
            return _closed(last(parts), wanted, at_once)
        return _pulled(*examples.pull(parts), wanted, at_once)

    def chunk(parts: list) -> Any:
        with calling.mapping(_WHOLE):
            mean, *spread = jax.vmap(one)(parts)
        return of(Outputs(mean, *dispersed(spread, belief, wanted.robust)))

    return map_chunks(chunk, examples.parts, size)


def raw(found: Outputs) -> Outputs:
    """In the type of their variance."""
    dtype = jax.tree.leaves(found[1:])[0].dtype
    return found._replace(mean=found.mean.astype(dtype))


def dispersed(variances: Any, belief: Gaussian, robust: bool | str) -> Any:
    """Times the dispersion, where the state estimates one."""
    if robust or belief.dispersion is None:
        return variances
    return jax.tree.map(lambda x: x * belief.dispersion, variances)


def _closed(last: LastLayer, wanted: Wanted, at_once: int) -> Outputs:
    """Of one example, from the closed form of a last layer."""
    found, likelihood = _of_rows(last.outputs, last, wanted), wanted.line_of
    if likelihood is None:
        return found
    if not likelihood.mixes_outputs:
        return found._replace(line_variance=last.variance())
    if likelihood.scale == SOFTMAX:
        return found._replace(line_variance=last.log_odds_variance())
    outputs = last.outputs[None]
    line_variance = variance_of(likelihood.line, outputs, last.pull, at_once)
    return found._replace(line_variance=line_variance)


def _pulled(
    outputs: jax.Array, pull: Callable, wanted: Wanted, at_once: int
) -> Outputs:
    """Of one example, by pulling back `at_once` cotangents at a time."""
    shape, count, line_of = outputs.shape[1:], outputs.size, wanted.line_of
    k = shape[-1] if shape else 1
    if count == k <= min(at_once, _TOGETHER):
        rows = pull(products.units(outputs))
        found = _of_rows(outputs[0], rows, wanted)
        if line_of is None:
            return found
        return found._replace(line_variance=_mixed(line_of, outputs, rows))
    places, within = (jnp.arange(number, dtype=jnp.int32) for number in (count, k))

    def rows_at(places: jax.Array) -> Pulled:
        return pull(products.units(outputs, places))

    variance: Any = None
    covariance = line_variance = None
    if k <= wanted.covariance:
        # of classes the line of a position is that of its outputs alone
        of_classes = line_of is not None and line_of.is_classes

        def at_position(position: jax.Array) -> tuple[jax.Array, Any]:
            rows = rows_at(position * k + within)
            its = outputs.reshape((-1, k))[position][None]
            line = _mixed(line_of, its, rows) if of_classes else None
            return rows.covariance(), line

        covariance, line_variance = map_chunks(
            jax.vmap(at_position), places[: count // k], max(at_once // k, 1)
        )
        covariance = covariance.reshape((*shape, k))
        variance = jnp.diagonal(covariance, axis1=-2, axis2=-1)
    elif wanted.variance:
        variance = map_chunks(lambda p: rows_at(p).variance(), places, at_once)
        variance = variance.reshape(shape)
    if line_variance is not None:
        line_variance = line_variance.reshape(shape)
    elif line_of is not None:
        line_variance = variance_of(line_of.line, outputs, pull, at_once)
    return Outputs(outputs[0], variance, covariance, line_variance)


def _of_rows(outputs: jax.Array, rows: LastLayer | Pulled, wanted: Wanted) -> Outputs:
    variance: Any = None
    covariance = None
    if wanted.variance:
        variance = rows.variance().reshape(outputs.shape)
    if (outputs.shape[-1] if outputs.ndim else 1) <= wanted.covariance:
        covariance = rows.covariance()
    return Outputs(outputs, variance, covariance)


def _mixed(likelihood: Likelihood, outputs: jax.Array, rows: Pulled) -> jax.Array:
    """The line's variance from the rows of all outputs."""
    line, back = jax.vjp(lambda z: likelihood.line(z)[0], outputs)
    jacobian = jax.vmap(lambda unit: back(unit)[0])(products.units(line))
    mixed = rows.mixed(jacobian.reshape((line.size, -1)))
    return mixed.variance().reshape(line.shape)


def variance_of(
    line_of: Callable, outputs: jax.Array, pull: Callable, at_once: int
) -> jax.Array:
    """The variance of `line_of(outputs)[0]`, a block of its entries at a time."""
    line, back = jax.vjp(lambda z: line_of(z)[0], outputs)

    def block(places: jax.Array) -> jax.Array:
        units = products.units(line, places)
        return pull(jax.vmap(lambda unit: back(unit)[0])(units)).variance()

    places = jnp.arange(line.size, dtype=jnp.int32)
    return map_chunks(block, places, at_once).reshape(line.shape)
