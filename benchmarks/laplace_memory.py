"""The memory that a fit and a prediction take: each in a process of its own.

python benchmarks/laplace_memory.py fisherflow_jax "all, diagonal"   # prints MiB
"""

import gc
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import laplace_methods
import laplace_problem
import numpy as np

import fisherflow_jax as ff

WIDE = "last layer, 3,000 classes"
WIDE_STRUCTURES = ("diagonal", "Kronecker, diagonal outputs")
_STATUS = Path("/proc/self/status")


def measure(library: str, structure: str) -> float | None:
    """Peak memory in MiB above what the process held before; None: not measured."""
    if not _STATUS.exists():
        return None
    # freed memory goes back at once, so that it is not counted as held
    environment = os.environ | {
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
    }
    child = subprocess.run(
        [sys.executable, __file__, library, structure],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if child.returncode:
        print(child.stderr[-2000:], file=sys.stderr)
        return None
    return float(child.stdout.split()[-1])


def _peak(call: Callable[[], Any]) -> float:
    """MiB that the second of two calls adds; the first one compiles."""
    call()
    gc.collect()
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    call()
    return (_status("VmHWM") - before) / 1024


def _status(field: str) -> float:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(field + ":"):
            return float(line.split()[1])
    raise KeyError(field)


def _fit_and_predict(library: str, structure: str) -> Callable[[], Any]:
    data = laplace_problem.digits()
    # memory does not depend on the values
    params = laplace_problem.start()
    (method,) = (
        method
        for method in laplace_methods.methods(params, data, library)
        if method.structure == structure
    )

    def call() -> None:
        fitted = method.fit()
        np.asarray(method.probabilities(fitted, data.test[0]))

    return call


def wide_last_layer(structure: str) -> Callable[[], Any]:
    """Fit and predictive variances of a layer of 256 features and 3,000 classes."""
    keys = jax.random.split(jax.random.key(0), 3)
    features = jax.random.normal(keys[0], (500, 256))
    params = {
        "w": 0.1 * jax.random.normal(keys[1], (256, 3000)),
        "b": jnp.zeros(3000),
    }

    def model(params: dict, features: jax.Array) -> jax.Array:
        return features @ params["w"] + params["b"]

    if structure == "diagonal":
        kept = ff.structures.diagonal()
    else:
        layers = ff.layers.find_layers(model, params, features)
        # the factor of 3,000 outputs keeps its diagonal, that of 257 inputs is whole
        kept = ff.structures.kronecker(layers, widest=1024)
    # one draw an example: all columns of the root would be 2,999 of them
    estimator = ff.estimators.hutchinson(
        model, laplace_methods.CATEGORICAL, kept, groups=None, chunk_size=50
    )
    compiled = jax.jit(estimator)

    def call() -> None:
        information = compiled(params, (features, None), jax.random.key(1))
        state = ff.posterior(params, information, prior_precision=1.0)
        outputs = ff.predictions.linearized_outputs(state, model, features[:100])
        jax.block_until_ready(outputs)

    return call


if __name__ == "__main__":
    name, kind = sys.argv[1:]
    wide = kind.removeprefix(WIDE + ": ")
    work = wide_last_layer(wide) if kind != wide else _fit_and_predict(name, kind)
    print(_peak(work))
