"""Laws of estimators: sums over the examples of a batch."""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fisherflow_jax import information as ops
from fisherflow_jax._ground.batch import Shared
from fisherflow_jax._ground.keys import typed_key
from fisherflow_jax.estimators import Estimator
from fisherflow_jax.likelihoods import Likelihood
from fisherflow_jax.structures import Structure
from fisherflow_jax.testing._laws import (
    QUICKLY,
    NotApplicable,
    equal,
    positive_semi_definite,
    same_layout,
    wide,
    within_noise,
)

PyTree = Any


class Trial(NamedTuple):
    """A model and a batch for which an estimator is checked.

    Made by `ff.testing.check_structure`.
    """

    apply_fn: Callable
    likelihood: Likelihood
    params: PyTree  # in float64
    inputs: np.ndarray  # (n, ...), n at least 4
    targets: Any


class Subject:
    """An estimator, its problem, and the matrices that it makes."""

    def __init__(
        self,
        factory: Callable[..., Estimator],
        estimator: Estimator,
        problem: Trial,
        structure: Structure,
        reference: Callable[..., Callable] | None,
        key: Any,
        tolerance: float,
        num_draws: int,
    ):
        self.factory, self.estimator, self.reference = factory, estimator, reference
        self.structure, self.tolerance, self.num_draws = structure, tolerance, num_draws
        self.apply_fn, self.likelihood, _, self.inputs, self.targets = problem
        self.params = jax.tree.map(np.asarray, problem.params)
        self.weights = np.ones(len(self.inputs))
        self.key = typed_key(key) if estimator.random else None
        self.compiled = self.compile(estimator)

    def make(self, apply_fn: Callable, **options: Any) -> Estimator:
        """The factory's estimator, of another model or with options."""
        return self.factory(apply_fn, self.likelihood, self.structure, **options)

    def compile(self, estimator: Callable) -> Callable:
        """`(params, batch, key)` -> the matrix."""

        def run(params: PyTree, batch: Any, key: Any) -> jax.Array:
            return ops.to_dense(estimator(params, batch, key), params)

        return jax.jit(run, compiler_options=QUICKLY)

    def batch(self, weights: Any = None, rows: Any = slice(None)) -> tuple:
        weights = self.weights if weights is None else weights
        targets = jax.tree.map(lambda y: y[rows], self.targets)
        return self.inputs[rows], targets, weights[rows]

    def matrix(self, weights: Any = None, rows: Any = slice(None)) -> np.ndarray:
        batch = self.batch(weights, rows)
        return np.asarray(self.compiled(self.params, batch, self.key))

    def layout(self, params: PyTree, batch: Any) -> Any:
        """Shapes and types of the information."""
        return jax.eval_shape(self.estimator, params, batch, self.key)


def _needs_no_draws(s: Subject) -> None:
    if s.estimator.random:
        raise NotApplicable("draws at random: holds in the mean alone")


def _raises(call: Callable[[], Any], what: str) -> None:
    try:
        call()
    except ValueError:
        return
    raise AssertionError(f"{what} raises no ValueError")


def untouched(s: Subject) -> Any:
    """untouched: neither parameters nor batch are changed"""
    kept = jax.tree.map(np.copy, (s.params, s.batch()))
    params, batch = jax.tree.map(np.copy, kept)
    for leaf in jax.tree.leaves((params, batch)):
        leaf.flags.writeable = False
    s.estimator(params, batch, s.key)
    jax.tree.map(np.testing.assert_array_equal, (params, batch), kept)


def of_the_structure(s: Subject) -> Any:
    """of the structure: the information has the tree, shapes and types of the
    structure's own"""
    own = jax.eval_shape(lambda p: s.structure.isotropic(p, 0.0), s.params)
    made = s.layout(s.params, s.batch())
    same_layout(made, own, "what it makes, against its structure's")


def positive(s: Subject) -> Any:
    """positive: the information is symmetric and positive semi-definite"""
    positive_semi_definite(s.matrix(), s.tolerance)


def padding(s: Subject) -> Any:
    """padding: rows of weight zero may hold anything, NaN too, and add nothing"""
    weights, inputs = s.weights.copy(), s.inputs.copy()
    weights[[1, -1]], inputs[[1, -1]] = 0.0, np.nan
    found = s.compiled(s.params, (inputs, s.targets, weights), s.key)
    return found, s.matrix(weights)


def nothing(s: Subject) -> Any:
    """nothing: a batch whose weights are all zero has no information"""
    found = s.matrix(0 * s.weights)
    return found, np.zeros_like(found)


def shared(s: Subject) -> Any:
    """shared: a part of the inputs in ff.Shared reaches the model whole"""
    # as many rows as there are examples: nothing but the wrapper tells it apart
    offsets = np.zeros((len(s.weights), 3))
    offsets[0] = 1.0

    def apply_fn(params: PyTree, inputs: tuple) -> jax.Array:
        x, whole = inputs
        assert whole.shape == offsets.shape, (
            f"the shared part has shape {whole.shape}, not {offsets.shape}"
        )
        return s.apply_fn(params, x) * whole[0, 0]

    batch = (s.inputs, Shared(offsets)), s.targets, s.weights
    found = s.compile(s.make(apply_fn))(s.params, batch, s.key)
    return found, s.matrix()


def eager(s: Subject) -> Any:
    """jit: eager calls give the numbers of compiled ones"""
    made = s.estimator(s.params, s.batch(), s.key)
    return ops.to_dense(made, s.params), s.matrix()


def key_needed(s: Subject) -> Any:
    """key needed: what draws at random says so, and raises without a key"""
    if s.estimator.random:
        _raises(lambda: s.estimator(s.params, s.batch()), "a call without a key")
    else:
        s.estimator(s.params, s.batch())


def float32_or_wider(s: Subject) -> Any:
    """float32 or wider: half-precision parameters have a float32 information"""
    half = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), s.params)
    batch = jnp.asarray(s.inputs, jnp.bfloat16), s.targets, s.weights
    # models in half precision promote as they please
    with jax.numpy_dtype_promotion("standard"):
        wide(s.layout(half, batch), "an estimator of bfloat16")


def empty(s: Subject) -> Any:
    """empty: a batch without examples raises ValueError"""
    batch = s.batch(rows=slice(0, 0))
    _raises(lambda: s.estimator(s.params, batch, s.key), "a batch of no examples")


def chunks(s: Subject) -> Any:
    """chunks: chunk_size changes memory and no number"""
    options = inspect.signature(s.factory).parameters.values()
    if not any(p.name == "chunk_size" or p.kind is p.VAR_KEYWORD for p in options):
        raise NotApplicable("the factory takes no chunk_size")
    # does not divide the batch, so that there is padding in the last chunk
    chunked = s.make(s.apply_fn, chunk_size=len(s.weights) // 2 + 1)
    return s.compile(chunked)(s.params, s.batch(), s.key), s.matrix()


def keys(s: Subject) -> Any:
    """keys: the same key gives the same result, another key another"""
    if s.key is None:
        raise NotApplicable("nothing is drawn")
    other = s.compiled(s.params, s.batch(), jax.random.fold_in(s.key, 1))
    assert np.any(np.asarray(other) != s.matrix()), "two keys gave the same result"
    return s.matrix(), s.matrix()


def sums_over_parts(s: Subject) -> Any:
    """sums over parts: information is a sum: of any two parts of the batch, their
    sum"""
    _needs_no_draws(s)
    first = np.arange(len(s.weights)) % 3 == 0
    return s.matrix(s.weights * first) + s.matrix(s.weights * ~first), s.matrix()


def sizes(s: Subject) -> Any:
    """sizes: a batch in pieces of any size, a single example too, sums to the whole"""
    _needs_no_draws(s)
    return s.matrix(rows=slice(0, 1)) + s.matrix(rows=slice(1, None)), s.matrix()


def order(s: Subject) -> Any:
    """order: the order of the examples does not matter"""
    _needs_no_draws(s)
    return s.matrix(rows=slice(None, None, -1)), s.matrix()


def multiplicities(s: Subject) -> Any:
    """weights: an example of weight two counts twice, one of weight 1/2 half"""
    _needs_no_draws(s)
    first, second = (s.matrix(one) for one in np.eye(len(s.weights))[:2])
    weights = s.weights.copy()
    weights[:2] = 2.0, 0.5
    return s.matrix(weights), s.matrix() + first - 0.5 * second


def reference(s: Subject) -> Any:
    """reference: the information, or the mean of its draws, is the reference's"""
    if s.reference is None:
        raise NotApplicable("no reference was given")
    weights = s.weights.copy()
    weights[:3] = 2.0, 0.0, 0.5
    batch = s.batch(weights)
    made = s.reference(s.apply_fn, s.likelihood, s.structure)(s.params, batch)
    is_matrix = isinstance(made, (np.ndarray, jax.Array))
    expected = np.asarray(made if is_matrix else ops.to_dense(made, s.params))
    if s.key is None:
        return s.matrix(weights), expected
    run = jax.vmap(s.compiled, in_axes=(None, None, 0))
    drawn = np.asarray(run(s.params, batch, jax.random.split(s.key, s.num_draws)))
    spread = drawn.std(0) / np.sqrt(s.num_draws)
    known = spread <= s.tolerance * np.max(np.abs(expected))
    errors = drawn.mean(0) - expected
    equal(errors[known] + 1, np.ones(known.sum()), s.tolerance, "what does not vary")
    scores = (errors / np.where(known, 1.0, spread))[~known]
    within_noise(scores, f"the mean of {s.num_draws} draws")
    return None
