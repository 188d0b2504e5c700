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

WIDE_STRUCTURES = ("diagonal", "Kronecker", "Kronecker, widest=4096")
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
    """MiB that the second of two calls adds; the first one compiles.

    A lower bound: memory that the process kept from the first call is not counted.
    """
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


def wide_last_layer(structure: str) -> tuple[float, float]:
    """MiB of fitting, and of predicting from, a layer of 64 features, 3,000 classes.

    What the compiled programs ask for: their arguments, results and temporaries.
    """
    features = jax.ShapeDtypeStruct((256, 64), jnp.float32)
    params = {
        "w": jax.ShapeDtypeStruct((64, 3000), jnp.float32),
        "b": jax.ShapeDtypeStruct((3000,), jnp.float32),
    }

    def model(params: dict, features: jax.Array) -> jax.Array:
        return features @ params["w"] + params["b"]

    layers = ff.layers.find_layers(model, params, features)
    kept = {
        "diagonal": ff.structures.diagonal(),
        # the factor of 3,000 outputs keeps its diagonal, that of 65 inputs is whole
        "Kronecker": ff.structures.kronecker(layers),
        "Kronecker, widest=4096": ff.structures.kronecker(layers, widest=4096),
    }[structure]
    # one draw an example: all columns of the root would be 2,999 of them
    estimator = ff.estimators.hutchinson(
        model, laplace_methods.CATEGORICAL, kept, groups=None, chunk_size=50
    )

    def fit(params: dict, features: jax.Array) -> Any:
        return estimator(params, (features, None), jax.random.key(1))

    def predict(params: dict, information: Any, features: jax.Array) -> Any:
        state = ff.posterior(params, information, prior_precision=1.0)
        return ff.predict(
            state,
            model,
            laplace_methods.CATEGORICAL,
            features,
            link=ff.predictions.probit(),
        )

    information = jax.eval_shape(fit, params, features)
    asked = jax.ShapeDtypeStruct((100, 64), jnp.float32)
    return (
        _of_program(fit, params, features),
        _of_program(predict, params, information, asked),
    )


def _of_program(function: Callable, *shapes: Any) -> float:
    found = jax.jit(function).lower(*shapes).compile().memory_analysis()
    sizes = (
        found.temp_size_in_bytes,
        found.argument_size_in_bytes,
        found.output_size_in_bytes,
    )
    return sum(sizes) / 2**20


if __name__ == "__main__":
    print(_peak(_fit_and_predict(*sys.argv[1:])))
