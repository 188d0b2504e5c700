"""Variational training on digits with wrong labels, beside Adam.

    python benchmarks/variational.py [--seeds 10] [--quick]

300 of scikit-learn's digits, a fifth of their labels wrong; a network 64-50-10 (tanh),
500 steps of 60 rows. Each method is tuned over one grid of learning rates, prior
precisions P (Adam's is the penalty of its mean loss) and a third number: for Adam the
step at which it stops, for variational training the information of an observation at
which the precision starts. The choice is by the NLL of 200 images with right labels, on
three seeds that are not used again; then the other 1,297 images are the test. Not in
the grid: Adam's decays, which are the usual ones, and those of the precision, which
were chosen by hand beforehand, as were the starts, by these three seeds. A seed
draws the images, the wrong labels, the start, the batches and the weights. `draws`
averages the probabilities of 32 networks. Means over seeds, with their standard errors,
and the differences from tuned Adam, pair by pair.

Then what a step costs, in those of Adam, by turns.
"""

import argparse
import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from measuring import describe_machine, measure, seconds, table
from sklearn.datasets import load_digits

import fisherflow_jax as ff

TRAINED, CHECKED, BATCH, STEPS = 300, 200, 60, 500
WRONG, DRAWS, TUNING = 0.2, 32, 3
RATES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3)
PRECISIONS = (0.3, 1.0, 3.0, 10.0)
STOPS, STARTS = (100, 200, 500), (0.1, 0.3, 1.0)


def apply_fn(params: dict, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ params["w"] + params["b"]) @ params["v"] + params["c"]


MODEL = apply_fn, ff.likelihoods.categorical()
LOSS = ff.negative_log_likelihood(*MODEL)
FISHER = ff.estimators.exact(*MODEL, ff.structures.diagonal())
ADAM, BARE = "Adam", "Adam, no penalty, all steps"
# decay of the precision: Stein's estimate is noisier by far
METHODS: dict[str, tuple[Any, float]] = {
    "variational, Stein": (None, 0.9995),
    "variational, exact Fisher": (FISHER, 0.98),
}


class Task(NamedTuple):
    """What one seed draws."""

    train: tuple
    checked: tuple
    test: tuple
    params: dict
    key: jax.Array


def start(key: jax.Array, width: int = 50) -> dict:
    keys = jax.random.split(key)
    return {
        "w": jax.random.normal(keys[0], (64, width)) / 8,
        "b": jnp.zeros(width),
        "v": jax.random.normal(keys[1], (width, 10)) / width**0.5,
        "c": jnp.zeros(10),
    }


def tasks(seeds: range) -> Task:
    """Of all seeds, stacked."""
    images, labels = load_digits(return_X_y=True)
    images = (images - images.mean()) / images.std()
    made = []
    for seed in seeds:
        rng = np.random.default_rng(seed)
        order = rng.permutation(len(labels))
        x = images[order].astype(np.float32)
        y = labels[order].astype(np.int32)
        cuts = TRAINED, TRAINED + CHECKED
        parts = list(zip(np.split(x, cuts), np.split(y, cuts), strict=True))
        other = (parts[0][1] + rng.integers(1, 10, TRAINED)) % 10
        wrong = rng.random(TRAINED) < WRONG
        parts[0] = parts[0][0], np.where(wrong, other, parts[0][1]).astype(np.int32)
        key = jax.random.key(seed)
        made.append(Task(*parts, start(key), jax.random.key_data(key)))
    return jax.tree.map(lambda *x: jnp.stack(x), *made)


def batches(task: Task) -> tuple:
    """Of every step: epochs in orders of their own."""
    key = jax.random.fold_in(jax.random.wrap_key_data(task.key), 1)
    keys = jax.random.split(key, STEPS * BATCH // TRAINED)
    orders = jax.vmap(lambda key: jax.random.permutation(key, TRAINED))(keys)
    rows = orders.reshape(STEPS, BATCH)
    return task.train[0][rows], task.train[1][rows]


def with_adam(task: Task, rate: jax.Array, precision: jax.Array, stop: Any) -> Any:
    optimizer = optax.adam(rate)

    def penalised(params: dict, batch: tuple) -> jax.Array:
        squares = optax.tree.norm(params, squared=True)
        return LOSS(params, batch) + 0.5 * precision / TRAINED * squares

    def step(carry: tuple, given: tuple) -> tuple:
        params, state = carry
        number, batch = given
        updates, state = optimizer.update(jax.grad(penalised)(params, batch), state)
        updates = jax.tree.map(lambda x: jnp.where(number < stop, x, 0), updates)
        return (optax.apply_updates(params, updates), state), None

    first = task.params, optimizer.init(task.params)
    given = jnp.arange(STEPS), batches(task)
    return jax.lax.scan(step, first, given)[0][0], None


def with_variational(
    name: str, task: Task, rate: jax.Array, precision: Any, start: jax.Array
) -> Any:
    estimator, decay = METHODS[name]
    optimizer = ff.transforms.variational(
        rate,
        estimator,
        num_observations=TRAINED,
        information=start * TRAINED,
        prior_precision=precision,
        b2=decay,
    )

    def step(carry: tuple, given: tuple) -> tuple:
        params, state = carry
        key, batch = given
        drawn = ff.sample(ff.transforms.get_posterior(state, params), key)
        gradients = jax.grad(LOSS)(drawn, batch)
        updates, state = optimizer.update(
            gradients, state, params, drawn=drawn, batch=batch
        )
        precision = state[0].information.entries
        least = jax.tree.reduce(jnp.minimum, jax.tree.map(jnp.min, precision))
        return (optax.apply_updates(params, updates), state), least

    key = jax.random.fold_in(jax.random.wrap_key_data(task.key), 2)
    first = task.params, optimizer.init(task.params)
    given = jax.random.split(key, STEPS), batches(task)
    (params, state), least = jax.lax.scan(step, first, given)
    return params, (state, jnp.min(least))


def scores(probabilities: jax.Array, labels: jax.Array) -> jax.Array:
    hits = jnp.mean(jnp.argmax(probabilities, 1) == labels)
    own = jnp.take_along_axis(probabilities, labels[:, None], 1)[:, 0]
    return jnp.stack([hits, -jnp.mean(jnp.log(jnp.maximum(own, 1e-12)))])


def evaluated(name: str, task: Task, choice: jax.Array, held: str) -> dict:
    """Accuracy and NLL of the mean, of draws, and the least precision of a step."""
    if name.startswith(ADAM):
        params, trained = with_adam(task, *choice)
    else:
        params, trained = with_variational(name, task, *choice)
    x, y = getattr(task, held)
    found = {"mean": scores(jax.nn.softmax(apply_fn(params, x)), y)}
    if trained is not None:
        state, found["least"] = trained
        posterior = ff.transforms.get_posterior(state, params)
        drawn = ff.sample(posterior, jax.random.wrap_key_data(task.key), (DRAWS,))
        chances = jax.nn.softmax(jax.vmap(apply_fn, (0, None))(drawn, x))
        found["draws"] = scores(jnp.mean(chances, 0), y)
        found["skipped"] = state[0].num_skipped
    return found


def each(name: str, some: Task, choices: np.ndarray, held: str) -> dict:
    """Of every choice, and of every seed."""
    run = functools.partial(evaluated, name, held=held)
    run = jax.vmap(jax.vmap(run, (0, None)), (None, 0))
    return jax.tree.map(np.asarray, jax.jit(run)(some, choices))


def tuned(name: str, some: Task, rates: tuple, precisions: tuple) -> tuple:
    """The choice of the lowest NLL of checked images, the grid's least precision, and
    how many choices diverged."""
    third = STARTS if name in METHODS else STOPS
    if name == BARE:
        precisions, third = (0.0,), (STEPS,)
    grid = np.array(list(itertools.product(rates, precisions, third)), np.float32)
    found = each(name, some, grid, "checked")
    nll = np.where(np.isnan(found["mean"]), np.inf, found["mean"])[..., 1].mean(1)
    least = found.get("least", np.full(1, np.nan)).min()
    return grid[np.argmin(nll)], float(least), int((~np.isfinite(nll)).sum())


def mean_and_error(values: np.ndarray) -> str:
    error = values.std(ddof=1) / len(values) ** 0.5
    return f"{values.mean():.3f} +- {error:.3f}"


def quality(num_seeds: int, rates: tuple, precisions: tuple) -> str:
    tuning, some = tasks(range(1000, 1000 + TUNING)), tasks(range(num_seeds))
    rows, reference = [], None
    for name in (ADAM, BARE, *METHODS):
        choice, least, failed = tuned(name, tuning, rates, precisions)
        found = each(name, some, choice[None], "test")
        for kind in ("mean", "draws"):
            if kind not in found:
                continue
            values = found[kind][0]
            reference = values if reference is None else reference
            gains = [mean_and_error(x) for x in (values - reference).T]
            told = "" if kind == "mean" else ", draws"
            smallest = min(least, float(found.get("least", np.full(1, np.nan)).min()))
            rows.append(
                (
                    name + told,
                    ", ".join(f"{number:.3g}" for number in choice),
                    *(mean_and_error(x) for x in values.T),
                    *(gains if name != ADAM else ("", "")),
                    "" if np.isnan(smallest) else f"{smallest:.2g}",
                    str(failed),
                )
            )
    header = (
        "method",
        "rate, P, stop or start",
        "accuracy",
        "NLL",
        "accuracy - Adam's",
        "NLL - Adam's",
        "least precision",
        "diverged",
    )
    return table(header, rows)


def cost(rounds: int) -> str:
    """A step of each method, by turns, at two widths."""
    rows = []
    for width in (50, 1000):
        params, key = start(jax.random.key(0), width), jax.random.key(1)
        batch = jnp.ones((BATCH, 64)), jnp.arange(BATCH) % 10
        steps: dict[str, Callable] = {ADAM: adam_step(params, batch)}
        for name in METHODS:
            steps[name] = variational_step(name, params, batch, key)
        timings = measure(steps, dict.fromkeys(steps, rounds), shuffle=True)
        for name, timing in timings.items():
            pairs = zip(timing.seconds, timings[ADAM].seconds, strict=True)
            low, middle, high = np.percentile([a / b for a, b in pairs], [25, 50, 75])
            rows.append(
                (
                    f"64-{width}-10, {name}",
                    seconds(timing.median),
                    f"{middle:.2f} ({low:.2f}-{high:.2f})",
                )
            )
    return table(("a step", "time", "over Adam's (quartiles of pairs)"), rows)


def adam_step(params: dict, batch: tuple) -> Callable:
    optimizer = optax.adam(0.01)

    @jax.jit
    def step(params: dict, state: Any) -> tuple:
        updates, state = optimizer.update(jax.grad(LOSS)(params, batch), state)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    return lambda number: step(params, state)


def variational_step(name: str, params: dict, batch: tuple, key: Any) -> Callable:
    estimator, decay = METHODS[name]
    optimizer = ff.transforms.variational(
        0.01,
        estimator,
        num_observations=TRAINED,
        information=0.1 * TRAINED,
        b2=decay,
    )

    @jax.jit
    def step(params: dict, state: Any, number: int) -> tuple:
        posterior = ff.transforms.get_posterior(state, params)
        drawn = ff.sample(posterior, jax.random.fold_in(key, number))
        gradients = jax.grad(LOSS)(drawn, batch)
        updates, state = optimizer.update(
            gradients, state, params, drawn=drawn, batch=batch
        )
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    return lambda number: step(params, state, number)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--quick", action="store_true", help="two seeds, a small grid")
    arguments = parser.parse_args()
    print(describe_machine(("jax", "optax")), "\n")
    rates, precisions, num_seeds = RATES, PRECISIONS, arguments.seeds
    if arguments.quick:
        rates, precisions, num_seeds = (0.01, 0.03), (1.0, 10.0), 2
    print(
        f"grid: learning rate {rates}, prior precision {precisions}, stop {STOPS} or "
        f"start {STARTS}\n"
    )
    print(quality(num_seeds, rates, precisions), "\n")
    print(cost(3 if arguments.quick else 30))


if __name__ == "__main__":
    main()
