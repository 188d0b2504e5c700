"""Checks an estimator: one call, all the laws."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fisherflow_jax import information as ops
from fisherflow_jax import likelihoods
from fisherflow_jax import structures as structures_of
from fisherflow_jax._ground.batch import Shared
from fisherflow_jax._ground.keys import typed_key
from fisherflow_jax.estimators import Estimator
from fisherflow_jax.likelihoods import Likelihood
from fisherflow_jax.structures import Structure
from fisherflow_jax.testing import _draws as draws
from fisherflow_jax.testing import _transformations as transformations
from fisherflow_jax.testing._laws import (
    QUICKLY,
    Laws,
    Report,
    equal,
    setting,
    within_noise,
)

PyTree = Any

ESTIMATOR_LAWS = {
    "of the structure": "the information has the tree, shapes and types of the "
    "structure's own",
    "positive": "the information is symmetric and positive semi-definite",
    "reference": "the information, or the mean of its draws, is the reference's",
    "sums over parts": "information is a sum: of any two parts of the batch, their sum",
    "sizes": "a batch in pieces of any size, a single example too, sums to the whole",
    "order": "the order of the examples does not matter",
    "weights": "an example of weight two counts twice, one of weight 1/2 half",
    "padding": "rows of weight zero may hold anything, NaN too, and add nothing",
    "nothing": "a batch whose weights are all zero has no information",
    "chunks": "chunk_size changes memory and no number",
    "shared": "a part of the inputs in ff.Shared reaches the model whole",
    "jit": "eager calls give the numbers of compiled ones",
    "keys": "the same key gives the same result, another key another",
    "key needed": "what draws at random says so, and raises without a key",
    "float32 or wider": "half-precision parameters have a float32 information",
    "untouched": "neither parameters nor batch are changed",
    "empty": "a batch without examples raises ValueError",
}


class Trial(NamedTuple):
    """A model and a batch for which an estimator is checked."""

    apply_fn: Callable
    likelihood: Likelihood
    params: PyTree  # in float64
    inputs: np.ndarray  # (n, ...), n at least 4
    targets: Any


def default_problem() -> Trial:
    """Three classes from six examples, one of them far off: nine parameters."""
    generator = np.random.default_rng(0)

    def apply_fn(params: PyTree, x: jax.Array) -> jax.Array:
        logits = x @ params["kernel"] + params["bias"][None]
        return params["gain"] * jnp.tanh(logits)

    params = {
        "bias": generator.normal(size=3) / 2,
        "gain": np.asarray(1.3),
        "kernel": generator.normal(size=(2, 3)) / 2,
    }
    inputs = generator.normal(size=(6, 2))
    targets = np.array([0, 2, 1, 1, 0, 2])
    return Trial(apply_fn, likelihoods.categorical(), params, inputs, targets)


def check_estimator(
    factory: Callable[..., Estimator],
    *,
    structure: Structure | None = None,
    reference: Callable[..., Callable] | None = None,
    problem: Trial | None = None,
    key: Any = 0,
    tolerance: float = 1e-9,
    num_draws: int = 4000,
    skip: Mapping[str, str] | None = None,
) -> Report:
    r"""Checks every law of an estimator, by numbers.

    Runs in float64, whatever the settings of the caller, and under strict promotion of
    types and of ranks. A sum over observations is checked by weights (multiplicities),
    by parts of the batch and by chunks; an estimator that draws at random has no such
    sums but in the mean, which is compared with the reference by z-scores.

    Args:
      factory: `(apply_fn, likelihood, structure) -> Estimator`, yours or one of
        `ff.estimators`; `functools.partial` for options. If it takes `chunk_size`, that
        is checked too.
      structure: what is kept; None: `ff.structures.full()`, which shows most.
      reference: a factory of what the estimator is to equal, or to have for its mean,
        as `ff.estimators.exact`: `(apply_fn, likelihood, structure)` -> a function of
        `(params, batch)`, which returns an information or a matrix `(d, d)`.
      problem: the model and the batch; None: a small classifier of six examples.
      key: of the draws, an int or a key.
      tolerance: largest error, relative to the largest entry.
      num_draws: draws whose mean is compared with the reference. The worst of all
        entries may be as far off as happens once in a million checks.
      skip: law -> why it does not apply, as `{"positive": "a Hessian is indefinite"}`.

    Returns:
      A `Report`: the laws that hold, and those that do not apply with the reason. Cost:
      about five compiled programs, some seconds.

    Raises:
      AssertionError: if laws are broken: their names, rules and numbers, all at once.
      ValueError: for names in `skip` that are no laws.
      TypeError: if the factory returns no `Estimator`.

    Example:
      >>> import fisherflow_jax as ff
      >>> report = ff.testing.check_estimator(ff.estimators.empirical)
      >>> report.not_applicable["reference"]
      'no reference was given'
    """
    problem = default_problem() if problem is None else problem
    structure = structures_of.full() if structure is None else structure
    with setting("float64"):
        subject = factory(problem.apply_fn, problem.likelihood, structure)
        if not isinstance(subject, Estimator):
            raise TypeError(
                "factory(apply_fn, likelihood, structure) must return a "
                f"ff.estimators.Estimator; got {type(subject).__name__}."
            )
        laws = Laws(f"estimator {subject.name}", ESTIMATOR_LAWS, skip)
        _Checks(factory, subject, structure, problem, key, tolerance, laws).run(
            reference, num_draws
        )
    return laws.report()


class _Checks:
    """The checks of one estimator, which share its compiled functions."""

    def __init__(
        self,
        factory: Callable[..., Estimator],
        subject: Estimator,
        structure: Structure,
        problem: Trial,
        key: Any,
        tolerance: float,
        laws: Laws,
    ):
        self.factory, self.subject, self.problem = factory, subject, problem
        self.structure, self.tolerance, self.laws = structure, tolerance, laws
        self.params = jax.tree.map(np.asarray, problem.params)
        self.weights = np.ones(len(problem.inputs))
        self.key = typed_key(key)
        self.compiled = self._compile(subject)

    def _dense(self, estimator: Callable, params: Any, batch: Any, key: Any) -> Any:
        drawn = key if getattr(estimator, "random", False) else None
        made = estimator(params, batch, drawn)
        return ops.to_dense(made, params)

    def _compile(self, estimator: Estimator) -> Callable:
        return jax.jit(
            functools.partial(self._dense, estimator), compiler_options=QUICKLY
        )

    def batch(self, weights: Any = None, rows: Any = slice(None)) -> tuple:
        weights = self.weights if weights is None else np.asarray(weights, np.float64)
        targets = jax.tree.map(lambda y: y[rows], self.problem.targets)
        return self.problem.inputs[rows], targets, weights[rows]

    def matrix(self, weights: Any = None, rows: Any = slice(None)) -> np.ndarray:
        batch = self.batch(weights, rows)
        return np.asarray(self.compiled(self.params, batch, self.key))

    def run(self, reference: Callable | None, num_draws: int) -> None:
        check, random = self.laws.check, self.subject.random
        check("untouched", self.untouched)
        check("of the structure", self.of_the_structure)
        check("positive", self.positive)
        check("padding", self.padding)
        check("nothing", self.nothing)
        check("shared", self.shared)
        check("jit", self.eager)
        check("key needed", self.key_needed)
        check("float32 or wider", self.wide)
        check("empty", self.empty)
        if "chunk_size" in _options(self.factory):
            check("chunks", self.chunks)
        else:
            self.laws.pass_over("chunks", "the factory takes no chunk_size")
        if random:
            check("keys", self.keys)
            for law in ("sums over parts", "sizes", "order", "weights"):
                self.laws.pass_over(law, "draws at random: holds in the mean alone")
        else:
            self.laws.pass_over("keys", "nothing is drawn")
            check("sums over parts", self.parts)
            check("sizes", self.sizes)
            check("order", self.order)
            check("weights", self.multiplicities)
        if reference is None:
            self.laws.pass_over("reference", "no reference was given")
        else:
            check("reference", lambda: self.reference(reference, num_draws))

    def equal(self, found: Any, expected: Any, what: str) -> None:
        equal(found, expected, self.tolerance, what)

    # ---- form

    def untouched(self) -> None:
        kept = jax.tree.map(np.copy, (self.params, self.batch()))
        given = jax.tree.map(np.copy, kept)
        for leaf in jax.tree.leaves(given):
            leaf.flags.writeable = False
        params, batch = given
        self.subject(params, batch, self.key if self.subject.random else None)
        jax.tree.map(np.testing.assert_array_equal, given, kept)

    def _shapes(self, params: PyTree) -> tuple[Any, Any]:
        made = jax.eval_shape(
            lambda p, b: self.subject(p, b, self.key), params, self.batch()
        )
        return made, jax.eval_shape(lambda p: self.structure.isotropic(p, 0.0), params)

    def of_the_structure(self) -> None:
        made, own = self._shapes(self.params)
        transformations.same_layout(made, own, "what it makes, against its structure's")

    def wide(self) -> None:
        half = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), self.params)
        inputs, targets, weights = self.batch()
        batch = (jnp.asarray(inputs, jnp.bfloat16), targets, weights)
        # models in half precision promote as they please
        with jax.numpy_dtype_promotion("standard"):
            made = jax.eval_shape(
                lambda p, b: self.subject(p, b, self.key), half, batch
            )
        for leaf in jax.tree.leaves(made):
            assert jnp.finfo(leaf.dtype).bits >= 32, f"bfloat16 keeps {leaf.dtype}"

    def eager(self) -> None:
        found = self._dense(self.subject, self.params, self.batch(), self.key)
        self.equal(found, self.matrix(), "the eager result, against the compiled,")

    def positive(self) -> None:
        matrix = self.matrix()
        self.equal(matrix, matrix.T, "the matrix, against its transpose,")
        values = np.linalg.eigvalsh(matrix)
        assert values[0] >= -self.tolerance * max(values[-1], 1e-30), (
            f"the smallest eigenvalue is {values[0]:.3g}, beside the largest, "
            f"{values[-1]:.3g}"
        )

    def key_needed(self) -> None:
        if not self.subject.random:
            self.subject(self.params, self.batch())
            return
        _raises(lambda: self.subject(self.params, self.batch()), "a call without a key")

    def keys(self) -> None:
        first, again = self.matrix(), self.matrix()
        self.equal(again, first, "the result under the same key")
        other = self.compiled(
            self.params, self.batch(), jax.random.fold_in(self.key, 1)
        )
        assert np.any(np.asarray(other) != first), "two keys gave the same result"

    def empty(self) -> None:
        nothing = self.batch(rows=slice(0, 0))
        key = self.key if self.subject.random else None
        _raises(
            lambda: self.subject(self.params, nothing, key), "a batch of no examples"
        )

    # ---- sums over observations

    def padding(self) -> None:
        weights = self.weights.copy()
        weights[[1, -1]] = 0.0
        expected = self.matrix(weights)
        inputs, targets, _ = self.batch()
        inputs = inputs.copy()
        inputs[[1, -1]] = np.nan
        batch = inputs, targets, weights
        found = self.compiled(self.params, batch, self.key)
        self.equal(found, expected, "the information with NaN in rows of weight zero")

    def nothing(self) -> None:
        found = self.matrix(np.zeros_like(self.weights))
        self.equal(found, np.zeros_like(found), "the information of no weight")

    def parts(self) -> None:
        first = np.arange(len(self.weights)) % 3 == 0
        total = self.matrix(self.weights * first) + self.matrix(self.weights * ~first)
        self.equal(total, self.matrix(), "the sum of two parts, against the whole,")

    def sizes(self) -> None:
        pieces = [slice(0, 1), slice(1, None)]
        total = sum(self.matrix(rows=rows) for rows in pieces)
        what = "the sum of one example and the rest, against the whole,"
        self.equal(total, self.matrix(), what)

    def order(self) -> None:
        rows = np.arange(len(self.weights))[::-1]
        self.equal(self.matrix(rows=rows), self.matrix(), "the batch in reverse")

    def multiplicities(self) -> None:
        each = [self.matrix(np.eye(len(self.weights))[i]) for i in range(2)]
        weights = self.weights.copy()
        weights[:2] = 2.0, 0.5
        expected = self.matrix() + each[0] - 0.5 * each[1]
        self.equal(self.matrix(weights), expected, "the sum with weights 2 and 1/2")

    def chunks(self) -> None:
        # does not divide the batch, so that there is padding in the last chunk
        chunked = self.factory(
            self.problem.apply_fn,
            self.problem.likelihood,
            self.structure,
            chunk_size=len(self.weights) // 2 + 1,
        )
        found = self._compile(chunked)(self.params, self.batch(), self.key)
        self.equal(found, self.matrix(), "the result in chunks, against at once,")

    def shared(self) -> None:
        # as many rows as there are examples: nothing but the wrapper tells it apart
        offsets = np.zeros((len(self.weights), 3))
        offsets[0] = 1.0

        def apply_fn(params: PyTree, inputs: tuple) -> jax.Array:
            x, whole = inputs
            assert whole.shape == offsets.shape, (
                f"the shared part has shape {whole.shape}, not {offsets.shape}"
            )
            return self.problem.apply_fn(params, x) * whole[0, 0]

        estimator = self.factory(apply_fn, self.problem.likelihood, self.structure)
        inputs, targets, weights = self.batch()
        found = self._compile(estimator)(
            self.params, ((inputs, Shared(offsets)), targets, weights), self.key
        )
        self.equal(found, self.matrix(), "the result with a shared part")

    # ---- against the reference

    def reference(self, reference: Callable, num_draws: int) -> None:
        weights = self.weights.copy()
        weights[:3] = 2.0, 0.0, 0.5
        batch = self.batch(weights)
        made = reference(
            self.problem.apply_fn, self.problem.likelihood, self.structure
        )(self.params, batch)
        is_matrix = isinstance(made, (np.ndarray, jax.Array))
        expected = np.asarray(made if is_matrix else ops.to_dense(made, self.params))
        if not self.subject.random:
            self.equal(self.matrix(weights), expected, "the information")
            return
        run = jax.jit(
            jax.vmap(
                functools.partial(self._dense, self.subject), in_axes=(None, None, 0)
            ),
            compiler_options=QUICKLY,
        )
        drawn = np.asarray(run(self.params, batch, draws.keys(self.key, num_draws)))
        spread = drawn.std(0) / np.sqrt(num_draws)
        known = spread <= self.tolerance * np.max(np.abs(expected))
        errors = drawn.mean(0) - expected
        self.equal(errors[known] + 1, np.ones(known.sum()), "an entry without variance")
        scores = (errors / np.where(known, 1.0, spread))[~known]
        what = f"the mean of {num_draws} draws"
        within_noise(scores, draws.bound(max(scores.size, 1)), what)


def _options(factory: Callable) -> set[str]:
    """The names of options that the factory takes."""
    parameters = inspect.signature(factory).parameters
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return {*parameters, "chunk_size"}
    return set(parameters)


def _raises(call: Callable[[], Any], what: str) -> None:
    try:
        call()
    except ValueError:
        return
    raise AssertionError(f"{what} raises no ValueError")
