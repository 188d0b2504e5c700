"""One method of the tables over all seeds: tuned, calibrated, scored and timed."""

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tables_data as data
from tables_draws import dropout, ensemble, variational
from tables_methods import Method, of_flow, of_laplace, optimizers

import fisherflow_jax as ff

BINS = ff.metrics.equal_mass(15)


def methods(split: data.Split, num_passes: int) -> list[Method]:
    """Of a network, whose layers are found; Adam before those that need its rate."""
    layers = ff.layers.find_layers(
        data.apply_fn, split.params, split.train[0][: data.BATCH]
    )
    structures = {
        "scalar": ff.structures.scalar(),
        "diagonal": ff.structures.diagonal(),
        "block": ff.structures.block(),
        "Kronecker": ff.structures.kronecker(layers),
        "full": ff.structures.full(),
    }
    kept = {name: structures[name] for name in ("diagonal", "Kronecker")}
    return [
        *optimizers(layers),
        *(of_flow(*given, num_passes) for given in structures.items()),
        variational(),
        dropout(),
        *(of_laplace(*given) for given in kept.items()),
        ensemble(),
    ]


class Found(NamedTuple):
    """Of one method and budget; scores are `(seeds, metrics)`."""

    trained: dict[str, np.ndarray]
    calibrated: dict[str, np.ndarray]
    knobs: list[float]
    failed: int  # fits of the grid whose validation NLL is no number
    no_temperature: int  # seeds
    fits: list[float]  # seconds, the first with compilation
    predictions: list[float]
    num_bytes: tuple[int, int]  # carried in training, kept to predict


@jax.jit
def scores(logs: jax.Array, labels: jax.Array) -> jax.Array:
    chances = jnp.exp(logs)
    own = jnp.take_along_axis(logs, labels[:, None], 1)
    return jnp.stack(
        [
            ff.metrics.accuracy(chances, labels),
            -jnp.mean(own),
            ff.metrics.expected_calibration_error(chances, labels, binning=BINS),
            ff.metrics.brier(chances, labels),
        ]
    )


class Programs:
    """A method's functions, compiled."""

    def __init__(self, method: Method) -> None:
        self.method = method
        self.start, self.advance = jax.jit(method.start), jax.jit(method.advance)
        self.finish, self.logs = jax.jit(method.finish), jax.jit(method.logs)
        self.calibrate = method.calibrate and jax.jit(method.calibrate)

    def fit(self, split: data.Split, knob: Any, rate: Any, num_passes: int) -> Any:
        carry = self.start(split, knob, rate)
        share = jnp.float32(1 / num_passes)
        for number in range(num_passes):
            key = jax.random.fold_in(split.key, number)
            carry = self.advance(carry, split, key, knob, rate, share)
        return self.finish(carry, split, knob, rate)

    def num_bytes(self, split: data.Split) -> tuple[int, int]:
        knob = jnp.float32(0.1)
        carry = jax.eval_shape(self.start, split, knob, knob)
        kept = jax.eval_shape(self.finish, carry, split, knob, knob)
        leaves = jax.tree.leaves(carry), jax.tree.leaves(kept)
        return tuple(sum(x.size * x.dtype.itemsize for x in some) for some in leaves)


def timed(function: Callable[[], Any]) -> tuple[Any, float]:
    begun = time.perf_counter()
    found = jax.block_until_ready(function())
    return found, time.perf_counter() - begun


class Tuned(NamedTuple):
    """One seed's fit of the least validation NLL."""

    knob: float
    fitted: Any
    logs: jax.Array  # of the validation rows
    failed: int
    fits: list[float]


def tuned(
    programs: Programs, split: data.Split, rate: float | None, num_passes: int
) -> Tuned:
    inputs, labels = split.validation
    tried, fits = [], []
    for value in programs.method.grid:
        knob = jnp.float32(value)
        used = knob if rate is None else jnp.float32(rate)
        fit = functools.partial(programs.fit, split, knob, used, num_passes)
        fitted, elapsed = timed(fit)
        fits.append(elapsed)
        logs = programs.logs(fitted, inputs, knob)
        tried.append((float(scores(logs, labels)[1]), value, fitted, logs))
    failed = sum(not np.isfinite(nll) for nll, *_ in tried)
    best = min(tried, key=lambda t: t[0] if np.isfinite(t[0]) else np.inf)
    return Tuned(*best[1:], failed, fits)


def temperature_of(logs: jax.Array, labels: jax.Array) -> float | None:
    """None where the validation rows have no best one: all right, or all equal."""
    try:
        scaling = ff.calibration.temperature_scaling(logs, labels)
    except ValueError:
        return None
    return float(scaling.temperature)


def run(
    programs: Programs, splits: data.Split, rates: list[float] | None, num_passes: int
) -> Found:
    """All seeds and values of the knob; `rates` are Adam's, seed by seed."""
    predictions: list[float] = []
    chosen: list[Tuned] = []
    without = 0
    trained: dict[str, list] = {name: [] for name in splits.tests}
    calibrated: dict[str, list] = {name: [] for name in splits.tests}
    for seed in range(len(splits.labels)):
        split = data.of_seed(splits, seed)
        best = tuned(programs, split, rates and rates[seed], num_passes)
        chosen.append(best)
        knob, better, temperature = jnp.float32(best.knob), best.fitted, None
        if programs.calibrate:
            better = programs.calibrate(best.fitted, split)
        else:
            temperature = temperature_of(best.logs, split.validation[1])
            without += temperature is None
        for name, rows in split.tests.items():
            predict = functools.partial(programs.logs, best.fitted, rows, knob)
            logs, elapsed = timed(predict)
            predictions.append(elapsed)
            trained[name].append(scores(logs, split.labels))
            if programs.calibrate:
                logs = programs.logs(better, rows, knob)
            elif temperature is not None:
                logs = jax.nn.log_softmax(logs / temperature)
            calibrated[name].append(scores(logs, split.labels))
    return Found(
        {name: np.array(each) for name, each in trained.items()},
        {name: np.array(each) for name, each in calibrated.items()},
        [best.knob for best in chosen],
        sum(best.failed for best in chosen),
        without,
        [elapsed for best in chosen for elapsed in best.fits],
        predictions,
        programs.num_bytes(split),
    )
