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

BINS, TUNING = ff.metrics.equal_mass(15), 3


def methods(split: data.Split, num_passes: int, link: Any) -> list[Method]:
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
        *(of_flow(*given, num_passes, link) for given in structures.items()),
        variational(),
        dropout(),
        *(of_laplace(*given, link) for given in kept.items()),
        ensemble(),
    ]


class Found(NamedTuple):
    """Of one method and budget; scores are `(seeds, metrics)`."""

    trained: dict[str, np.ndarray]
    calibrated: dict[str, np.ndarray]
    knob: float
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


class Fits(NamedTuple):
    """Of all seeds, by the knob that the first of them chose."""

    knob: float
    fitted: list[Any]
    failed: int
    seconds: list[float]


def tuned(
    programs: Programs, splits: data.Split, rate: float | None, num_passes: int
) -> Fits:
    """The least mean validation NLL of the first `TUNING` seeds chooses."""
    times: list[float] = []

    def fit(seed: int, value: float) -> Any:
        used = jnp.float32(value if rate is None else rate)
        split, knob = data.of_seed(splits, seed), jnp.float32(value)
        found, elapsed = timed(lambda: programs.fit(split, knob, used, num_passes))
        times.append(elapsed)
        return found

    def loss(seed: int, fitted: Any, value: float) -> float:
        inputs, labels = data.of_seed(splits, seed).validation
        return float(
            scores(programs.logs(fitted, inputs, jnp.float32(value)), labels)[1]
        )

    num_seeds, losses, tried = len(splits.labels), {}, {}
    for value in programs.method.grid:
        tried[value] = [fit(seed, value) for seed in range(min(TUNING, num_seeds))]
        losses[value] = [loss(seed, f, value) for seed, f in enumerate(tried[value])]
    means = {v: np.mean(x) for v, x in losses.items()}
    knob = min(means, key=lambda v: means[v] if np.isfinite(means[v]) else np.inf)
    others = [fit(seed, knob) for seed in range(TUNING, num_seeds)]
    failed = sum(not np.isfinite(x) for each in losses.values() for x in each)
    return Fits(knob, tried[knob] + others, failed, times)


def temperature_of(logs: jax.Array, labels: jax.Array) -> float | None:
    """None where the validation rows have no best one: all right, or all equal."""
    try:
        scaling = ff.calibration.temperature_scaling(logs, labels)
    except ValueError:
        return None
    return float(scaling.temperature)


def run(
    programs: Programs, splits: data.Split, rate: float | None, num_passes: int
) -> Found:
    """All seeds; `rate` is what was chosen for Adam."""
    fits = tuned(programs, splits, rate, num_passes)
    knob, without = jnp.float32(fits.knob), 0
    predictions: list[float] = []
    trained: dict[str, list] = {name: [] for name in splits.tests}
    calibrated: dict[str, list] = {name: [] for name in splits.tests}
    for seed, fitted in enumerate(fits.fitted):
        split = data.of_seed(splits, seed)
        inputs, labels = split.validation
        better, temperature = fitted, None
        if programs.calibrate:
            better = programs.calibrate(fitted, split)
        else:
            temperature = temperature_of(programs.logs(fitted, inputs, knob), labels)
            without += temperature is None
        for name, rows in split.tests.items():
            logs, elapsed = timed(functools.partial(programs.logs, fitted, rows, knob))
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
        fits.knob,
        fits.failed,
        without,
        fits.seconds,
        predictions,
        programs.num_bytes(split),
    )
