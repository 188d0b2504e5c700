"""Five tasks one after another, and what each way of remembering keeps of the first.

Every task is to tell handwritten digits apart, each under another order of the pixels.
A network is trained on one task at a time, and never sees earlier data again; what
holds it is one quadratic about the last mean, in what was learned so far:

    python examples/continual.py

Under a minute. Saves the accuracies in `outputs/`. Needs
`pip install "fisherflow-jax[examples]"`.
"""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_digits

import fisherflow_jax as ff

NUM_TASKS, NUM_TRAIN, NUM_STEPS, BATCH_SIZE = 5, 1297, 300, 64


def apply_fn(params: dict, x: jax.Array) -> jax.Array:
    hidden = jax.nn.relu(x @ params["w1"] + params["b1"])
    hidden = jax.nn.relu(hidden @ params["w2"] + params["b2"])
    return hidden @ params["w3"] + params["b3"]


model = apply_fn, ff.likelihoods.categorical()
loss = ff.negative_log_likelihood(*model)  # the mean over a batch


def start() -> dict:
    params = {}
    shapes = (64, 100), (100, 100), (100, 10)
    for number, (key, shape) in enumerate(
        zip(jax.random.split(jax.random.key(0), 3), shapes, strict=True), 1
    ):
        params[f"w{number}"] = jax.random.normal(key, shape) * np.sqrt(2 / shape[0])
        params[f"b{number}"] = jnp.zeros(shape[1])
    return params


def load() -> tuple[tuple, tuple]:
    """Training and test data of all tasks, `(tasks, rows, 64)` and `(tasks, rows)`."""
    images, labels = load_digits(return_X_y=True)
    rng = np.random.default_rng(0)
    order = rng.permutation(len(images))
    images, labels = (images / 16).astype(np.float32)[order], labels[order]
    pixels = [np.arange(64), *(rng.permutation(64) for _ in range(NUM_TASKS - 1))]
    x = np.stack([images[:, each] for each in pixels])
    y = np.tile(labels, (NUM_TASKS, 1))
    train = x[:, :NUM_TRAIN], y[:, :NUM_TRAIN]
    return jax.tree.map(jnp.asarray, (train, (x[:, NUM_TRAIN:], y[:, NUM_TRAIN:])))


def train(params: dict, belief: Any, strength: jax.Array, task: tuple) -> dict:
    """The usual loop; the penalty is one more link of the optimiser's chain."""
    hold = ff.continual.add_elastic_penalty(NUM_TRAIN, strength=strength)
    optimizer = optax.chain(hold, optax.adam(2e-3))

    def step(carry: tuple, key: jax.Array) -> tuple:
        params, state = carry
        rows = jax.random.randint(key, (BATCH_SIZE,), 0, NUM_TRAIN)
        gradient = jax.grad(loss)(params, jax.tree.map(lambda a: a[rows], task))
        updates, state = optimizer.update(gradient, state, params, anchor=belief)
        return (optax.apply_updates(params, updates), state), None

    keys = jax.random.split(jax.random.key(1), NUM_STEPS)
    return jax.lax.scan(step, (params, optimizer.init(params)), keys)[0][0]


@functools.partial(jax.jit, static_argnums=0)
def learn(structure: Any, params: dict, strength: Any, tasks: tuple, test: tuple):
    """Accuracy on every task (columns) after each of them was learned (rows)."""
    estimator = ff.estimators.exact(*model, structure)

    def one(carry: tuple, task: tuple) -> tuple:
        params, belief = carry
        params = train(params, belief, strength, task)
        # what the task determines, at the end of its training; a sum over its rows
        information = estimator(params, task)
        belief = ff.continual.consolidate(belief, params, information)
        guesses = jax.vmap(lambda x: jnp.argmax(apply_fn(params, x), -1))(test[0])
        return (params, belief), jnp.mean(guesses == test[1], axis=1)

    before = ff.posterior(params, structure, prior_precision=1e-3)
    return jax.lax.scan(one, (params, before), tasks)[1]


def main() -> None:
    tasks, test = load()
    params = start()
    layers = ff.layers.find_layers(apply_fn, params, tasks[0][0])
    diagonal, kronecker = ff.structures.diagonal(), ff.structures.kronecker(layers)
    ways = {
        "nothing kept": (diagonal, 0.0),
        "diagonal, strength 100": (diagonal, 100.0),
        "kronecker, strength 10": (kronecker, 10.0),
    }
    print(f"{'':24}  accuracy at the end   forgotten   task 1 at the end")
    tables = {}
    for name, (structure, strength) in ways.items():
        tables[name] = table = np.asarray(
            learn(structure, params, strength, tasks, test)
        )
        found = ff.metrics.continual(table)
        print(
            f"{name:24}  {found.average:19.1%}   {found.forgetting:9.1%}"
            f"   {table[-1, 0]:17.1%}"
        )

    folder = Path("outputs")
    folder.mkdir(exist_ok=True)
    figure, axes = plt.subplots(
        1, 4, figsize=(13, 3.4), width_ratios=(1, 1, 1, 1.3), layout="constrained"
    )
    numbers = np.arange(1, NUM_TASKS + 1)
    for axis, (name, table) in zip(axes, tables.items(), strict=False):
        shown = axis.imshow(100 * table, vmin=0, vmax=100, cmap="Blues")
        for (row, column), value in np.ndenumerate(100 * table):
            color = "white" if value > 60 else "black"
            axis.text(
                column, row, f"{value:.0f}", ha="center", va="center", color=color
            )
        axis.set(title=name, xlabel="accuracy on task", ylabel="after training on task")
        axis.set_xticks(numbers - 1, numbers)
        axis.set_yticks(numbers - 1, numbers)
        axes[3].plot(numbers, 100 * table[:, 0], "o-", label=name)
    figure.colorbar(shown, ax=axes[2], label="%")
    axes[3].set(title="what is left of task 1", xlabel="after training on task")
    axes[3].set(ylabel="accuracy on task 1 (%)", xticks=numbers, ylim=(0, 102))
    axes[3].legend(frameon=False, loc="lower left")
    axes[3].spines[["top", "right"]].set_visible(False)
    figure.savefig(folder / "continual.png", dpi=110)
    print(f"\nFigure: {folder / 'continual.png'}")


if __name__ == "__main__":
    main()
