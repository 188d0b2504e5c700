"""Running one estimator over a problem, timed."""

import functools
import inspect
import math
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from fisherflow_jax import estimators, likelihoods
from fisherflow_jax._ground import batch as batches
from fisherflow_jax._ground import trees
from fisherflow_jax._ground.batch import Batch
from fisherflow_jax.accumulation import accumulate
from fisherflow_jax.comparison._measurement import Measurement, by_path
from fisherflow_jax.comparison._problem import Problem, as_problem, loader_of
from fisherflow_jax.structures import diagonal

PyTree = Any

_PROBED = ("num_probes", "groups")

KNOWN: dict[str, tuple[Callable, tuple[str, ...]]] = {
    "exact": (estimators.exact, ()),
    "hutchinson": (estimators.hutchinson, _PROBED),
    "hutchinson_sqrt": (estimators.hutchinson_sqrt, _PROBED),
    "hutchinson_dg": (estimators.hutchinson_dg, _PROBED),
    "hutchinson_rankk": (
        estimators.hutchinson_rankk,
        (*_PROBED, "k", "num_iterations"),
    ),
    "hutchinson_rank1": (estimators.hutchinson_rank1, (*_PROBED, "num_iterations")),
    "monte_carlo": (estimators.monte_carlo, ("num_samples", "groups")),
    "empirical": (estimators.empirical, ("groups",)),
}
"""Estimators by name, and the options that each takes on the command line."""


def find_estimator(name: str) -> tuple[Callable, tuple[str, ...]]:
    """The factory of a known estimator, and the names of its options.

    Raises:
      ValueError: for a name that is not known, with those that are.
    """
    if name not in KNOWN:
        raise ValueError(
            f"there is no estimator {name!r} to compare; there are {', '.join(KNOWN)}."
        )
    return KNOWN[name]


def estimate(
    estimator: Any,
    problem: Problem,
    *,
    name: str | None = None,
    seed: int = 0,
    progress: bool | None = None,
    **options: Any,
) -> Measurement:
    """The diagonal information of a problem by one estimator, and what it took.

    The first batch is run once beforehand, so that compilation is timed apart. The
    seconds of the run are those of reading the batches and of estimating.

    Args:
      estimator: one of `ff.estimators`, such as `ff.estimators.hutchinson`.
      problem: an `ff.comparison.Problem`, or a tuple or dict of its parts.
      name: how to call it; None: by its own name.
      seed: of the draws, for estimators that draw.
      progress: a progress bar, as in `ff.accumulate`.
      **options: of the estimator, such as `groups=8`.

    Returns:
      A `Measurement`: `.information`, leaves by path, summed over observations; and
      `.settings`: name, options, seed, `seconds` of the run, `compile_seconds` (of the
      first batch beforehand, less its share of the run), `num_examples` (the sum of
      weights), `num_batches`, `num_skipped`, `passes` (backward passes of an example)
      and the device. Cost: that of the estimator, over all batches and one more.

    Raises:
      ValueError: as the estimator, `ff.accumulate` and the problem's checks.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> from fisherflow_jax import comparison
      >>> problem = comparison.Problem(
      ...     apply_fn=lambda params, x: x @ params["w"],
      ...     likelihood=ff.likelihoods.categorical(),
      ...     params={"w": jnp.zeros((2, 3))},
      ...     batches=[(jnp.ones((4, 2)), None), (jnp.ones((3, 2)), None)],
      ... )
      >>> truth = comparison.estimate(ff.estimators.exact, problem)
      >>> print(truth.average["w"].round(3)[0])  # p (1 - p)
      [0.222 0.222 0.222]
      >>> truth.settings["num_examples"], truth.settings["passes"]
      (7.0, 2)
    """
    problem = as_problem(problem)
    loader = loader_of(problem)
    if isinstance(estimator, functools.partial):  # so that its options are told
        estimator, options = estimator.func, {**estimator.keywords, **options}
    bound = estimator(problem.apply_fn, problem.likelihood, diagonal(), **options)
    key = seed if bound.random else None

    def run(batches: Any, progress: bool | None) -> tuple[Any, float]:
        began = time.perf_counter()
        state = accumulate(bound, problem.params, batches, key, progress=progress)
        jax.block_until_ready(state)
        return state, time.perf_counter() - began

    first = next(iter(loader), None)
    if first is None:
        raise ValueError("a problem's batches are empty.")
    _, first_seconds = run([first], False)
    state, seconds = run(loader, progress)
    if not state.count > 0:
        raise ValueError(
            f"there is nothing to average: {int(state.num_skipped)} of "
            f"{int(state.num_batches)} batches were skipped for a value that is not "
            "finite, and the weights of the others are zero."
        )
    share = seconds / int(state.num_batches)
    settings = {
        "name": name or bound.name,
        "options": {key: _readable(value) for key, value in options.items()},
        "seed": seed if bound.random else None,
        "seconds": seconds,
        "compile_seconds": max(first_seconds - share, 0.0),
        "num_examples": float(state.count),
        "num_batches": int(state.num_batches),
        "num_skipped": int(state.num_skipped),
        "passes": _backward_passes(problem, bound.name, options, first),
        "device": jax.devices()[0].device_kind,
    }
    information = jax.tree.map(np.asarray, state.information.entries)
    return Measurement(by_path(information), settings)


def _readable(value: Any) -> Any:
    """An option as JSON can hold it."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return getattr(value, "__name__", repr(value))


def _backward_passes(
    problem: Problem, name: str, options: dict[str, Any], raw: Any
) -> int:
    if name != "exact":
        return options.get("num_probes", options.get("num_samples", 1))
    batch: Batch = jax.eval_shape(batches.as_batch, tuple(raw))
    params = trees.real_arrays(problem.params, "params")
    outputs = jax.eval_shape(problem.apply_fn, params, batches.unshare(batch.inputs))
    default = inspect.signature(estimators.exact).parameters["root"].default
    rooted: likelihoods.Likelihood = options.get("root", default)(problem.likelihood)
    return math.prod(rooted.probe_shape(outputs.shape)[1:])
