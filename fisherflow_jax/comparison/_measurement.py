"""What one estimator gives on a problem, timed, and the file that keeps it."""

import inspect
import json
import math
import os
import time
from collections.abc import Callable
from typing import Any, NamedTuple
from zipfile import BadZipFile

import jax
import numpy as np

from fisherflow_jax import estimators, likelihoods
from fisherflow_jax._ground import trees
from fisherflow_jax._ground.batch import Batch, unshare
from fisherflow_jax.accumulation import Stacked, accumulate, each_batch
from fisherflow_jax.comparison._problem import Problem, as_problem
from fisherflow_jax.structures import diagonal

_SETTINGS = "settings"
_LEAF = "information/"


class Measurement(NamedTuple):
    """The diagonal information of an estimator, and how it came about.

    Made by `ff.comparison.estimate`.
    """

    information: dict[str, np.ndarray]  # name of a parameter -> sum over observations
    settings: dict[str, Any]  # name, options, seed, seconds, ...

    @property
    def label(self) -> str:
        """The estimator's name with its options."""
        name, *options = self._parts
        return f"{name}({','.join(options)})" if options else name

    @property
    def stem(self) -> str:
        """The label, fit for the name of a file."""
        return "-".join(self._parts)

    @property
    def _parts(self) -> list[str]:
        options = self.settings["options"].items()
        return [self.settings["name"], *(f"{k}={v}" for k, v in options)]

    @property
    def average(self) -> dict[str, np.ndarray]:
        """The information of one observation, in float64."""
        count = self.settings["num_examples"]
        return {k: x.astype(np.float64) / count for k, x in self.information.items()}


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
      estimator: of `ff.estimators`, such as `ff.estimators.hutchinson(num_probes=8)`.
      problem: an `ff.comparison.Problem`, or a tuple or dict of its parts.
      name: how to call it; None: by its own name.
      seed: of the draws, for estimators that draw.
      progress: a progress bar, as in `ff.accumulate`.
      **options: of the estimator, such as `groups=8`.

    Returns:
      A `Measurement`: `.information`, leaves by name, summed over observations; and
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
    bound = estimators.bind(
        estimator, problem.apply_fn, problem.likelihood, diagonal(), **options
    )
    if bound.bound:  # options that it was chosen with are told too
        options = {**dict(bound.bound[0].options), **options}
    key = seed if bound.random else None

    def run(batches: Any, progress: bool | None) -> tuple[Any, float]:
        began = time.perf_counter()
        state = accumulate(bound, problem.params, batches, key, progress=progress)
        jax.block_until_ready(state)
        return state, time.perf_counter() - began

    first = next(iter(each_batch(problem.batches)))
    _, first_seconds = run([first], False)
    # one by one, for a fair measurement of all estimators
    stacked = isinstance(problem.batches, Stacked)
    loader = list(each_batch(problem.batches)) if stacked else problem.batches
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
        "seed": key,
        "seconds": seconds,
        "compile_seconds": max(first_seconds - share, 0.0),
        "num_examples": float(state.count),
        "num_batches": int(state.num_batches),
        "num_skipped": int(state.num_skipped),
        "passes": _backward_passes(problem, bound.name, options, first),
        "device": jax.devices()[0].device_kind,
    }
    leaves = trees.named_leaves(state.information.entries)
    return Measurement({name: np.asarray(leaf) for name, leaf in leaves}, settings)


def _readable(value: Any) -> Any:
    """An option as JSON can hold it."""
    plain = isinstance(value, int | float | str | None)
    return value if plain else getattr(value, "__name__", repr(value))


def _backward_passes(
    problem: Problem, name: str, options: dict[str, Any], batch: Batch
) -> int:
    if name != "exact":
        return options.get("num_probes", options.get("num_samples", 1))
    params = trees.real_arrays(problem.params, "params")
    outputs = jax.eval_shape(problem.apply_fn, params, unshare(batch.inputs))
    default = inspect.signature(estimators.exact).parameters["root"].default
    rooted: likelihoods.Likelihood = options.get("root", default)(problem.likelihood)
    return math.prod(rooted.probe_shape(outputs.shape)[1:])


def factories() -> dict[str, Callable]:
    """The functions of `ff.estimators` that make an estimator of a model, by name."""
    # whatever files they are written in: the truth first, then those with probes
    order = sorted(vars(estimators), key=lambda x: (x != "exact", "hutch" not in x, x))
    public = {name: vars(estimators)[name] for name in order if name[0].islower()}
    functions = {name: value for name, value in public.items() if callable(value)}
    parts = ["apply_fn", "likelihood", "structure"]
    takes = {name: [*inspect.signature(f).parameters] for name, f in functions.items()}
    return {name: f for name, f in functions.items() if takes[name][:3] == parts}


def save(path: str | os.PathLike, measurement: Measurement) -> None:
    """Writes a measurement as a `.npz`: an array a parameter, and settings as JSON.

    Args:
      path: of the file, which is written anew.
      measurement: what `ff.comparison.estimate` returned.

    Example:
      >>> import tempfile
      >>> import numpy as np
      >>> from fisherflow_jax import comparison
      >>> settings = {"name": "exact", "options": {}, "num_examples": 2.0}
      >>> measurement = comparison.Measurement({"w": np.ones(3)}, settings)
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     comparison.save(f"{folder}/exact.npz", measurement)
      ...     loaded = comparison.load(f"{folder}/exact.npz")
      >>> loaded.label, loaded.average
      ('exact', {'w': array([0.5, 0.5, 0.5])})
    """
    leaves = {_LEAF + name: leaf for name, leaf in measurement.information.items()}
    arrays: dict[str, Any] = {_SETTINGS: json.dumps(measurement.settings), **leaves}
    with open(path, "wb") as file:  # a name without .npz stays as it is
        np.savez(file, **arrays)


def load(path: str | os.PathLike) -> Measurement:
    """Reads what `save` wrote.

    Raises:
      OSError: if the file cannot be read.
      ValueError: if it is not a file of `save`.

    Example:
      >>> import tempfile
      >>> import numpy as np
      >>> import fisherflow_jax as ff
      >>> found = ff.comparison.Measurement(
      ...     {"w": np.ones(3)}, {"name": "exact", "options": {}, "num_examples": 2.0}
      ... )
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     ff.comparison.save(f"{folder}/exact.npz", found)
      ...     print(ff.comparison.load(f"{folder}/exact.npz").average)
      {'w': array([0.5, 0.5, 0.5])}
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        settings = json.loads(str(arrays.pop(_SETTINGS)))
    except (KeyError, ValueError, TypeError, BadZipFile) as error:
        raise ValueError(
            f"{os.fspath(path)} is not a file of ff.comparison.save."
        ) from error
    leaves = {name.removeprefix(_LEAF): leaf for name, leaf in arrays.items()}
    return Measurement(leaves, settings)
