"""What one estimator gave on a problem, and the file that keeps it."""

import json
import os
from typing import Any, NamedTuple
from zipfile import BadZipFile

import jax
import numpy as np

PyTree = Any

_SETTINGS = "settings"
_LEAF = "information/"


class Measurement(NamedTuple):
    """The diagonal information of an estimator, and how it came about."""

    information: dict[str, np.ndarray]  # path of a parameter -> sum over observations
    settings: dict[str, Any]  # name, options, seed, seconds, ...

    @property
    def label(self) -> str:
        """The estimator's name with its options."""
        options = self.settings["options"]
        if not options:
            return self.settings["name"]
        listed = ",".join(f"{key}={value}" for key, value in options.items())
        return f"{self.settings['name']}({listed})"

    @property
    def stem(self) -> str:
        """The label, fit for the name of a file."""
        options = self.settings["options"].items()
        return "-".join([self.settings["name"], *(f"{k}={v}" for k, v in options)])

    @property
    def average(self) -> dict[str, np.ndarray]:
        """The information of one observation, in float64."""
        count = self.settings["num_examples"]
        return {
            path: leaf.astype(np.float64) / count
            for path, leaf in self.information.items()
        }


def by_path(tree: PyTree) -> dict[str, np.ndarray]:
    """The leaves by their path in the tree.

    Example:
      >>> import numpy as np
      >>> from fisherflow_jax.comparison._measurement import by_path
      >>> list(by_path({"head": {"bias": np.zeros(2)}, "body": [np.ones(3)]}))
      ['body/0', 'head/bias']
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/") or "theta": np.asarray(x)
        for path, x in leaves
    }


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
