"""A small network that sees handwritten digits once, trained in five ways.

Every method sees the same 32 batches of 32 digits in the same order, and each batch
once (it may take several steps on it). What a method leaves open is chosen on a
validation split, with seeds that the table does not use.
"""

import itertools
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import figures
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits
from tqdm import tqdm

import fisherflow_jax as ff

BATCH_SIZE, NUM_BATCHES, NUM_VALIDATION = 32, 32, 273
NUM_ROWS = BATCH_SIZE * NUM_BATCHES
TUNING_SEEDS, SEEDS = range(100, 102), range(5)
NUM_BINS, NUM_DRAWS = 15, 30


# ---- data and model


def load() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The digits, split once: stream, validation, test."""
    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(y))
    x, y = (x[order] / 16).astype(np.float32), y[order].astype(np.int32)
    ends = NUM_ROWS, NUM_ROWS + NUM_VALIDATION
    parts = zip(np.split(x, ends), np.split(y, ends), strict=True)
    return dict(zip(("stream", "validation", "test"), parts, strict=True))


class Network(nn.Module):
    """64 - 32 - 10, tanh."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(10)(nn.tanh(nn.Dense(32)(x)))


network, likelihood = Network(), ff.likelihoods.categorical()


def apply_fn(params, x):
    return network.apply({"params": params}, x)


@jax.jit
def predict(params, x):
    return likelihood.mean(apply_fn(params, x))


# ---- measures of predicted probabilities (n, 10)


def accuracy(probabilities: np.ndarray, y: np.ndarray) -> float:
    return np.mean(probabilities.argmax(1) == y)


def negative_log_likelihood(probabilities: np.ndarray, y: np.ndarray) -> float:
    return -np.mean(np.log(probabilities[np.arange(len(y)), y] + 1e-30))


def calibration_bins(probabilities: np.ndarray, y: np.ndarray) -> np.ndarray:
    """`(bins, 3)`: how many, the sum of confidences, how many right."""
    confidence, right = probabilities.max(1), probabilities.argmax(1) == y
    index = np.minimum((confidence * NUM_BINS).astype(int), NUM_BINS - 1)
    columns = np.stack([np.ones(len(y)), confidence, right], 1)
    return np.stack([columns[index == b].sum(0) for b in range(NUM_BINS)])


def calibration_error(probabilities: np.ndarray, y: np.ndarray) -> float:
    _, confidence, right = calibration_bins(probabilities, y).T
    return np.abs(right - confidence).sum() / len(y)


MEASURES = {
    "accuracy": accuracy,
    "NLL": negative_log_likelihood,
    "ECE": calibration_error,
}


# ---- methods


class Method(NamedTuple):
    """A way to learn from a stream; a `setting` is one choice from its grid."""

    init: Callable[[dict, Any], Any]
    """`(setting, initial weights) -> state`."""
    update: Callable[[dict, Any, Any, jax.Array], Any]
    """`(setting, state, batch, key) -> state`."""
    weights: Callable[[Any], Any]
    """`state -> the weights that predict`."""
    grid: dict[str, list[float]]


def fisher_flow(structure: ff.structures.Structure) -> Method:
    """At most four Newton steps a batch, the default, from a prior at the start."""

    def flow(setting):
        return ff.fisher_flow(
            apply_fn,
            likelihood,
            structure=structure,
            memory=ff.memories.stationary(),
            prior_precision=setting["prior_precision"],
        )

    return Method(
        init=lambda setting, weights: flow(setting).init(weights),
        update=lambda setting, state, batch, key: flow(setting).update(state, batch)[0],
        weights=lambda state: state.mean,
        grid={"prior_precision": [0.01, 0.1, 1.0]},
    )


def gradient_method(
    optimizer: Callable, init: Callable, loss: Callable, weights: Callable, grid: dict
) -> Method:
    """`steps` steps of an Optax optimiser a batch, on `loss(variables, ...)`."""

    def start(setting, initial):
        variables = init(setting, initial)
        return variables, optimizer(setting["learning_rate"]).init(variables)

    def update(setting, state, batch, key):
        transform = optimizer(setting["learning_rate"])

        def step(i, state):
            variables, opt_state = state
            step_key = jax.random.fold_in(key, i)
            gradients = jax.grad(loss)(variables, setting, batch, step_key)
            updates, opt_state = transform.update(gradients, opt_state, variables)
            return optax.apply_updates(variables, updates), opt_state

        return jax.lax.fori_loop(0, setting["steps"], step, state)

    return Method(start, update, lambda state: weights(state[0]), grid)


def cross_entropy(weights, batch):
    x, y = batch
    logits = apply_fn(weights, x)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def maximum_likelihood(optimizer: Callable, learning_rates: list[float]) -> Method:
    return gradient_method(
        optimizer,
        init=lambda setting, weights: weights,
        loss=lambda weights, setting, batch, key: cross_entropy(weights, batch),
        weights=lambda weights: weights,
        grid={"learning_rate": learning_rates, "steps": [1, 4, 16, 64]},
    )


def draw(gaussian, key):
    """Weights from independent Gaussians `(mean, log of the standard deviation)`."""
    mean, log_std = gaussian
    noise = optax.tree.random_like(key, mean)
    return jax.tree.map(lambda m, s, e: m + jnp.exp(s) * e, mean, log_std, noise)


def variational_bayes() -> Method:
    """Mean-field variational Bayes: Adam on the evidence bound, one draw a step.

    The divergence from the prior N(0, 1 / precision) is spread evenly over the rows of
    the stream, whose number must be known in advance.
    """

    def init(setting, weights):
        log_std = jnp.log(setting["initial_std"])
        return weights, jax.tree.map(lambda x: jnp.full_like(x, log_std), weights)

    def divergence(mean, log_std, precision):
        ratio = precision * (mean**2 + jnp.exp(2 * log_std))
        return 0.5 * jnp.sum(ratio - 1 - jnp.log(precision) - 2 * log_std)

    def loss(gaussian, setting, batch, key):
        precision = setting["prior_precision"]
        terms = jax.tree.map(lambda m, s: divergence(m, s, precision), *gaussian)
        return (
            cross_entropy(draw(gaussian, key), batch) + optax.tree.sum(terms) / NUM_ROWS
        )

    grid = {
        "learning_rate": [0.001, 0.003, 0.01],
        "steps": [1, 4, 16, 64],
        "prior_precision": [0.1, 1.0],
        "initial_std": [0.03, 0.1],
    }
    return gradient_method(optax.adam, init, loss, lambda gaussian: gaussian[0], grid)


METHODS = {
    "SGD": maximum_likelihood(optax.sgd, [0.1, 0.3, 1.0, 3.0]),
    "Adam": maximum_likelihood(optax.adam, [0.0003, 0.001, 0.003, 0.01, 0.03]),
    "Fisher Flow, diagonal": fisher_flow(ff.structures.diagonal()),
    "Fisher Flow, block": fisher_flow(ff.structures.block()),
    "variational Bayes": variational_bayes(),
}


# ---- the comparison


class Outcome(NamedTuple):
    """What a method did; lists have one entry a seed."""

    setting: dict[str, float]
    states: list
    probabilities: list[np.ndarray]  # of the test rows
    seconds: list[float]
    compile_seconds: float


def settings_of(method: Method) -> list[dict[str, float]]:
    choices = itertools.product(*method.grid.values())
    return [dict(zip(method.grid, values, strict=True)) for values in choices]


def learn(method: Method, setting, weights, stream, key):
    """One pass: a single `lax.scan` over the batches."""

    def body(state, part):
        index, batch = part
        batch_key = jax.random.fold_in(key, index)
        return method.update(setting, state, batch, batch_key), None

    parts = jnp.arange(NUM_BATCHES), stream
    return jax.lax.scan(body, method.init(setting, weights), parts)[0]


def inputs_of(setting: dict, data: dict, seed: int) -> tuple:
    """Initial weights and an order of the stream for each seed."""
    key = jax.random.key(seed)
    weights = network.init(key, jnp.zeros((1, 64)))["params"]
    order = np.random.default_rng(seed).permutation(NUM_ROWS)
    stream = jax.tree.map(
        lambda a: a[order].reshape(NUM_BATCHES, BATCH_SIZE, *a.shape[1:]),
        data["stream"],
    )
    return jax.tree.map(jnp.asarray, (setting, weights, stream, key))


def run(method: Method, data: dict, progress: tqdm) -> Outcome:
    """Chooses a setting on the validation split, then learns once for each seed."""
    settings = settings_of(method)
    began = time.perf_counter()
    program = jax.jit(lambda *inputs: learn(method, *inputs))
    compiled = program.lower(*inputs_of(settings[0], data, 0)).compile()
    compile_seconds = time.perf_counter() - began

    def learn_timed(setting, seed):
        inputs = jax.block_until_ready(inputs_of(setting, data, seed))
        began = time.perf_counter()
        state = jax.block_until_ready(compiled(*inputs))
        seconds = time.perf_counter() - began
        progress.update()
        return state, seconds

    def probabilities_on(part, state):
        return np.asarray(predict(method.weights(state), data[part][0]))

    def validation_loss(setting):
        states = [learn_timed(setting, seed)[0] for seed in TUNING_SEEDS]
        y = data["validation"][1]
        losses = [
            negative_log_likelihood(probabilities_on("validation", state), y)
            for state in states
        ]
        return np.nan_to_num(np.mean(losses), nan=np.inf)

    best = min(settings, key=validation_loss)
    states, seconds = zip(*(learn_timed(best, seed) for seed in SEEDS), strict=True)
    probabilities = [probabilities_on("test", state) for state in states]
    return Outcome(best, states, probabilities, seconds, compile_seconds)


def compare(folder: Path) -> None:
    data = load()
    print(
        f"2. A 64-32-10 tanh network on the digits: {NUM_ROWS} rows, seen once in "
        f"batches of {BATCH_SIZE}\n",
        flush=True,
    )
    num_tuning = sum(len(settings_of(m)) for m in METHODS.values()) * len(TUNING_SEEDS)
    num_passes = num_tuning + len(METHODS) * len(SEEDS)
    outcomes = {}
    with tqdm(
        total=num_passes, desc="tuning and learning", unit="pass", disable=None
    ) as progress:
        for name, method in METHODS.items():
            progress.set_postfix_str(name)
            outcomes[name] = run(method, data, progress)
    y = data["test"][1]
    print_table(outcomes, y)
    print_notes(outcomes, data)
    bins = {
        name: np.stack([calibration_bins(p, y) for p in outcome.probabilities])
        for name, outcome in outcomes.items()
    }
    figures.reliability(folder / "reliability.png", bins)


# ---- what is printed


def spread(values: list[float]) -> str:
    return f"{np.mean(values):.3f} ± {np.std(values, ddof=1):.3f}"


def print_table(outcomes: dict[str, Outcome], y: np.ndarray) -> None:
    rows = [["", *MEASURES, "seconds", "compile s", "state kB"]]
    for name, outcome in outcomes.items():
        bytes_kept = sum(leaf.nbytes for leaf in jax.tree.leaves(outcome.states[0]))
        rows.append(
            [
                name,
                *(
                    spread([measure(p, y) for p in outcome.probabilities])
                    for measure in MEASURES.values()
                ),
                f"{np.median(outcome.seconds):.3f}",
                f"{outcome.compile_seconds:.1f}",
                f"{bytes_kept / 1000:.0f}",
            ]
        )
    first, *others = (max(map(len, column)) for column in zip(*rows, strict=True))
    lines = [
        "  ".join([row[0].ljust(first), *map(str.rjust, row[1:], others)])
        for row in rows
    ]
    print("\n".join([lines[0], "-" * len(lines[0]), *lines[1:], ""]))


def print_notes(outcomes: dict[str, Outcome], data: dict) -> None:
    x, y = data["test"]
    averaged = []
    for seed, state in zip(SEEDS, outcomes["variational Bayes"].states, strict=True):
        keys = jax.random.split(jax.random.key(seed), NUM_DRAWS)
        drawn = [predict(draw(state[0], key), x) for key in keys]
        averaged.append(np.mean(drawn, axis=0))
    of_draws = ", ".join(
        f"{name} {spread([measure(p, y) for p in averaged])}"
        for name, measure in MEASURES.items()
    )
    notes = f"""\
        Mean ± standard deviation over {len(SEEDS)} seeds (initial weights, order of the
        stream) on the same {len(y)} test rows, which alone leave an accuracy of 0.95
        uncertain by ± {np.sqrt(0.95 * 0.05 / len(y)):.3f}. NLL: mean negative
        log-likelihood. ECE: calibration error, {NUM_BINS} bins. seconds: the median
        pass, once compiled. state: all that goes from batch to batch, weights included.
        Each row predicts with one set of weights; for Fisher Flow and variational Bayes
        it is the mean of their Gaussian. Averaged over {NUM_DRAWS} draws from it,
        variational Bayes has {of_draws}."""
    print(textwrap.fill(" ".join(notes.split()), 96))
    print(
        f"\nChosen by the NLL on {NUM_VALIDATION} validation rows, over "
        f"{len(TUNING_SEEDS)} other seeds (steps: gradient steps a batch;\nFisher Flow "
        "takes at most 4 Newton steps, its default):"
    )
    width = max(map(len, outcomes))
    for name, outcome in outcomes.items():
        chosen = "; ".join(
            f"{key.replace('_', ' ')} {outcome.setting[key]:g} of "
            + ", ".join(f"{value:g}" for value in values)
            for key, values in METHODS[name].grid.items()
        )
        indent = " " * (width + 4)
        line = f"  {name:{width}}  {chosen}"
        print(textwrap.fill(line, 96, subsequent_indent=indent))
