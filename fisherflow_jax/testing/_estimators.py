"""Checks an estimator: one call, all the laws."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fisherflow_jax import likelihoods, structures
from fisherflow_jax.estimators import Estimator
from fisherflow_jax.structures import Structure
from fisherflow_jax.testing import _examples
from fisherflow_jax.testing._examples import Subject, Trial
from fisherflow_jax.testing._laws import Laws, Report, laws_in, setting

PyTree = Any

LAWS = laws_in(_examples)


def _default_problem() -> Trial:
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
    problem = _default_problem() if problem is None else problem
    structure = structures.full() if structure is None else structure
    with setting("float64"):
        estimator = factory(problem.apply_fn, problem.likelihood, structure)
        if not isinstance(estimator, Estimator):
            raise TypeError(
                "factory(apply_fn, likelihood, structure) must return a "
                f"ff.estimators.Estimator; got {type(estimator).__name__}."
            )
        laws = Laws(f"estimator {estimator.name}", LAWS, skip)
        subject = Subject(
            factory, estimator, problem, structure, reference, key, tolerance, num_draws
        )
        laws.check(LAWS, subject)
    return laws.report()
