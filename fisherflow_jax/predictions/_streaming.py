"""Variances of a model's outputs, streamed over examples and over outputs."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fisherflow_jax._ground import batch as batches
from fisherflow_jax.likelihoods import SOFTMAX, Likelihood
from fisherflow_jax.posteriors._intervals import dispersion_of
from fisherflow_jax.predictions._checks import check_model
from fisherflow_jax.predictions._closed_form import LastLayer, closed_form
from fisherflow_jax.predictions._last_layer import is_last_layer
from fisherflow_jax.predictions._pulling import spreads_of, tapped, whole
from fisherflow_jax.predictions._whitening import Rows

PyTree = Any

# Pulled-back numbers held at once when no chunk_size is given: 16 MiB in float32.
_ENTRIES = 2**22
# With no more outputs than these, one pull serves for all that is asked.
_TOGETHER = 128


class Wanted(NamedTuple):
    """What is asked for; static."""

    variance: bool = False  # of each raw output
    covariance: bool = False  # of the raw outputs on the last axis
    line_of: Any = None  # the likelihood whose line's variance is asked


class Spread(NamedTuple):
    """Of the outputs; None where it was not asked for."""

    outputs: jax.Array  # (n, ..., k)
    variance: Any  # (n, ..., k)
    covariance: Any  # (n, ..., k, k)
    line_variance: Any  # (n, ...)


class _Examples(NamedTuple):
    """How the model is seen, one example at a time."""

    parts: list[jax.Array]  # leading axis n
    last: Callable[[list], LastLayer] | None  # where there is a closed form
    pull: Callable[[list], tuple[jax.Array, Callable[[jax.Array], Rows]]]


def _examples(
    state: Any,
    apply_fn: Callable,
    inputs: PyTree,
    robust: bool,
    likelihood: Likelihood | None,
) -> _Examples:
    """The cheapest way of pulling back; what it needs is factorised once."""
    check_model(state, apply_fn, inputs, likelihood)
    parts, rebuild = batches.split(inputs)

    def example_of(parts: list) -> PyTree:
        return batches.unshare(rebuild([x[None] for x in parts]))

    spreads = spreads_of(state, apply_fn, inputs, robust)
    if spreads is None:
        at = whole(state, apply_fn, robust)
        return _Examples(parts, None, lambda one: at(example_of(one)))
    if not is_last_layer(apply_fn, state.mean, inputs, spreads.layers):
        at = tapped(state.mean, apply_fn, spreads)
        return _Examples(parts, None, lambda one: at(example_of(one)))
    form = closed_form(apply_fn, state.mean, spreads)

    def last(one: list) -> LastLayer:
        return form(example_of(one))

    def pull(one: list) -> tuple[jax.Array, Callable[[jax.Array], Rows]]:
        found = last(one)
        return found.outputs[None], found.rows

    return _Examples(parts, last, pull)


def _sizes(
    examples: _Examples, chunk_size: int | None, closed: bool
) -> tuple[int, int]:
    """How many examples at a time, and how many cotangents of each."""
    first = [jax.eval_shape(lambda x: x[0], x) for x in examples.parts]

    def row(one: list) -> tuple[jax.Array, jax.Array]:
        outputs, rows_of = examples.pull(one)
        return outputs, rows_of(outputs[None]).left

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


def spread(
    state: Any,
    apply_fn: Callable,
    inputs: PyTree,
    wanted: Wanted,
    robust: bool,
    chunk_size: int | None,
) -> Spread:
    """The outputs at the mean and their spread, of one state of unit dispersion."""
    examples = _examples(state, apply_fn, inputs, robust, wanted.line_of)
    last = examples.last
    size, at_once = _sizes(examples, chunk_size, last is not None)

    def one(parts: list) -> Spread:
        if last is not None:
            return _closed(last(parts), wanted, at_once)
        return _pulled(*examples.pull(parts), wanted, at_once)

    return in_chunks(one, examples.parts, size)


class Chosen(NamedTuple):
    """Some functions of the outputs, `(n, ...)`."""

    extra: jax.Array  # which they are
    line: jax.Array
    variance: jax.Array


def spread_of_chosen(
    state: Any,
    apply_fn: Callable,
    inputs: PyTree,
    likelihood: Likelihood,
    choose: Callable[[jax.Array], jax.Array],
    function: Callable[[jax.Array, jax.Array], jax.Array],
    robust: bool,
    chunk_size: int | None,
) -> Chosen:
    """`function(outputs, extra)`, `extra = choose(outputs)`, example by example."""
    examples = _examples(state, apply_fn, inputs, robust, likelihood)
    size, at_once = _sizes(examples, chunk_size, False)

    def one(parts: list) -> Chosen:
        outputs, rows_of = examples.pull(parts)
        extra = choose(outputs)

        def line(outputs: jax.Array) -> jax.Array:
            return function(outputs, extra)

        variance = _of_line(line, outputs, rows_of, at_once)
        return Chosen(extra[0], line(outputs)[0], variance)

    found = in_chunks(one, examples.parts, size)
    dispersion = None if robust else dispersion_of(state)
    if dispersion is None:
        return found
    return found._replace(variance=found.variance * dispersion)


def _closed(last: LastLayer, wanted: Wanted, at_once: int) -> Spread:
    """Of one example, from the closed form of a last layer."""
    outputs, likelihood = last.outputs, wanted.line_of
    if likelihood is None:
        line_variance = None
    elif not likelihood.mixes_outputs:
        line_variance = last.variance()
    elif likelihood.scale == SOFTMAX:
        line_variance = last.log_odds_variance()
    else:
        line_variance = _of_line(likelihood.line, outputs[None], last.rows, at_once)
    return Spread(
        outputs,
        last.variance() if wanted.variance else None,
        last.covariance() if wanted.covariance else None,
        line_variance,
    )


def _pulled(
    outputs: jax.Array, rows_of: Callable, wanted: Wanted, at_once: int
) -> Spread:
    """Of one example, by pulling back `at_once` cotangents at a time."""
    shape, count = outputs.shape[1:], outputs.size
    k = shape[-1] if shape else 1
    variance = covariance = line_variance = None

    def rows_at(places: jax.Array) -> Rows:
        return rows_of(_units(places, outputs))

    if count == k <= min(at_once, _TOGETHER):
        rows = rows_at(jnp.arange(k, dtype=jnp.int32))
        if wanted.covariance:
            covariance = rows.covariance()
        if wanted.variance:
            variance = rows.variance().reshape(shape)
        if wanted.line_of is not None:
            line_variance = _mixed(wanted.line_of, outputs, rows)
        return Spread(outputs[0], variance, _shaped(covariance, shape), line_variance)

    if wanted.covariance:
        within = jnp.arange(k, dtype=jnp.int32)
        covariance = in_chunks(
            lambda position: rows_at(position * k + within).covariance(),
            jnp.arange(count // k, dtype=jnp.int32),
            max(at_once // k, 1),
        )
        if wanted.variance:
            variance = jnp.diagonal(covariance, axis1=-2, axis2=-1).reshape(shape)
    elif wanted.variance:
        variance = _in_blocks(lambda p: rows_at(p).variance(), count, at_once)
        variance = variance.reshape(shape)
    if wanted.line_of is not None:
        line_variance = _of_line(wanted.line_of.line, outputs, rows_of, at_once)
    return Spread(outputs[0], variance, _shaped(covariance, shape), line_variance)


def _shaped(covariance: jax.Array | None, shape: tuple[int, ...]) -> jax.Array | None:
    if covariance is None:
        return None
    k = covariance.shape[-1]
    return covariance.reshape((*shape[:-1], k, k))


def _units(places: jax.Array, like: jax.Array) -> jax.Array:
    units = jax.nn.one_hot(places, like.size, dtype=like.dtype)
    return units.reshape((places.shape[0], *like.shape))


def _mixed(likelihood: Likelihood, outputs: jax.Array, rows: Rows) -> jax.Array:
    """The line's variance from the rows of all outputs."""
    line, pull = jax.vjp(lambda z: likelihood.line(z)[0], outputs)
    basis = jnp.eye(line.size, dtype=line.dtype).reshape((line.size, *line.shape))
    jacobian = jax.vmap(lambda unit: pull(unit)[0])(basis)
    mixed = rows.mixed(jacobian.reshape((line.size, -1)))
    return mixed.variance().reshape(line.shape)


def _of_line(
    line_of: Callable, outputs: jax.Array, rows_of: Callable, at_once: int
) -> jax.Array:
    """The variance of `line_of(outputs)[0]`, a block of its entries at a time."""
    line, pull = jax.vjp(lambda z: line_of(z)[0], outputs)

    def block(places: jax.Array) -> jax.Array:
        cotangents = jax.vmap(lambda unit: pull(unit)[0])(_units(places, line))
        return rows_of(cotangents).variance()

    return _in_blocks(block, line.size, at_once).reshape(line.shape)


def _in_blocks(function: Callable, count: int, size: int) -> jax.Array:
    """`function(arange(count))`, at most `size` indices at a time."""
    number = math.ceil(count / size)
    length = math.ceil(count / number)
    places = jnp.minimum(jnp.arange(number * length, dtype=jnp.int32), count - 1)
    if number == 1:
        return function(places)
    blocks = jax.lax.map(function, places.reshape((number, length)))
    return blocks.reshape((number * length, *blocks.shape[2:]))[:count]


def in_chunks(function: Callable, stack: PyTree, size: int) -> PyTree:
    """`jax.vmap(function)(stack)`, at most `size` of the leading axis at a time.

    The last chunk is filled up with the last entry, so that one program serves all.
    """
    count = jax.tree.leaves(stack)[0].shape[0]
    number = math.ceil(count / size)
    if number == 1:
        return jax.vmap(function)(stack)
    length = math.ceil(count / number)
    padding = number * length - count

    def cut(x: jax.Array) -> jax.Array:
        if padding:
            rest = jnp.broadcast_to(x[-1:], (padding, *x.shape[1:]))
            x = jnp.concatenate([x, rest])
        return x.reshape((number, length, *x.shape[1:]))

    chunks = jax.lax.map(jax.vmap(function), jax.tree.map(cut, stack))
    return jax.tree.map(
        lambda x: x.reshape((number * length, *x.shape[2:]))[:count], chunks
    )
