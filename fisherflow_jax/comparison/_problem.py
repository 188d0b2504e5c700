"""What estimators are compared on: a model, its parameters, data and likelihood."""

import importlib.util
import sys
from collections.abc import Callable, Iterator, Sized
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from fisherflow_jax.likelihoods import Likelihood

PyTree = Any


class Problem(NamedTuple):
    """A model at its parameters, and the data over which information is summed.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> problem = ff.comparison.Problem(
      ...     lambda p, x: x @ p,
      ...     ff.likelihoods.gaussian(),
      ...     jnp.zeros(2),
      ...     [(jnp.eye(2), None)],
      ... )
      >>> problem._fields
      ('apply_fn', 'likelihood', 'params', 'batches')
    """

    apply_fn: Callable  # (params, inputs) -> outputs
    likelihood: Likelihood
    params: PyTree
    batches: Any  # a list or loader of batches that can be read again, or ff.Stacked


def as_problem(value: Any) -> Problem:
    """A `Problem` of a tuple in its order, or of a mapping with its names.

    Raises:
      ValueError: for anything else, a part that is missing, or batches that can be read
        only once.

    Example:
      >>> from fisherflow_jax import likelihoods
      >>> from fisherflow_jax.comparison._problem import as_problem
      >>> problem = as_problem(
      ...     {
      ...         "apply_fn": lambda params, x: x @ params,
      ...         "likelihood": likelihoods.poisson(),
      ...         "params": [0.0],
      ...         "batches": [([[1.0]], None)],
      ...     }
      ... )
      >>> problem.likelihood.name
      'poisson'
    """
    names = ", ".join(Problem._fields)
    if isinstance(value, dict):
        if set(value) != set(Problem._fields):
            raise ValueError(
                f"a problem has the parts {names}; got {', '.join(map(str, value))}."
            )
        value = tuple(value[name] for name in Problem._fields)
    if not isinstance(value, tuple) or len(value) != len(Problem._fields):
        length = f" of length {len(value)}" if isinstance(value, tuple) else ""
        raise ValueError(
            f"a problem is a tuple ({names}), an ff.comparison.Problem, or a dict with "
            f"these names; got {type(value).__name__}{length}."
        )
    problem = Problem(*value)
    if not callable(problem.apply_fn):
        raise ValueError(
            "a problem's apply_fn is a function (params, inputs) -> outputs; got "
            f"{type(problem.apply_fn).__name__}."
        )
    if not isinstance(problem.likelihood, Likelihood):
        raise ValueError(
            "a problem's likelihood comes from ff.likelihoods; got "
            f"{type(problem.likelihood).__name__}."
        )
    if isinstance(problem.batches, Iterator):
        raise ValueError(
            "a problem's batches are read by every estimator, so they must be a list "
            f"or a loader; got {type(problem.batches).__name__}, which is read once."
        )
    if isinstance(problem.batches, Sized) and len(problem.batches) == 0:
        raise ValueError("a problem's batches are empty.")
    return problem


def find_function(place: str) -> Callable:
    """The function at `module:function`, or `path/to/file.py:function`.

    Raises:
      ValueError: if there is no such file, module or function.

    Example:
      >>> from fisherflow_jax.comparison._problem import find_function
      >>> find_function("math:hypot")(3.0, 4.0)
      5.0
    """
    where, colon, name = place.rpartition(":")
    if not colon or not where or not name:
        raise ValueError(
            "a problem is named module:function, or path/to/file.py:function; got "
            f"{place!r}."
        )
    module = _of_file(Path(where)) if where.endswith(".py") else _of_name(where)
    function = getattr(module, name, None)
    if not callable(function):
        public = [x for x in vars(module) if x[0] != "_" and callable(vars(module)[x])]
        raise ValueError(
            f"{where} has no function {name!r}; it has {', '.join(public) or 'none'}."
        )
    return function


def load_problem(place: str) -> Problem:
    """The problem that the function at `module:function` returns.

    Args:
      place: `module:function`, or `path/to/file.py:function`; neighbours of the file
        may be imported by it, as when it is run.

    Returns:
      A `Problem`.

    Raises:
      ValueError: if there is no such function, or it returns no problem.

    Example:
      >>> import pathlib, tempfile
      >>> import fisherflow_jax as ff
      >>> program = '''
      ... import fisherflow_jax as ff
      ... def made():
      ...     model = (lambda params, x: x * params), ff.likelihoods.gaussian()
      ...     return *model, 1.0, [([1.0], None)]
      ... '''
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     place = pathlib.Path(folder, "own.py")
      ...     _ = place.write_text(program)
      ...     print(ff.comparison.load_problem(f"{place}:made").likelihood.name)
      gaussian
    """
    return as_problem(find_function(place)())


def _of_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise ValueError(f"there is no file {path}.")
    # of a name of its own: a file json.py must not pass for json
    name = f"problem_of_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path.resolve())
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    _import_from(path.resolve().parent)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _of_name(name: str) -> ModuleType:
    _import_from(Path.cwd())
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        # not where the module is there, and what it imports is missing
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise
        raise ValueError(
            f"there is no module {name!r} (a file is named with its .py)."
        ) from error


def _import_from(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
