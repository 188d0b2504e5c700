"""One task after another on digits: what is kept, by what is remembered.

    python benchmarks/continual.py [--tasks permuted rotated split classes] [--seeds 3]

Five tasks of scikit-learn's digits: their pixels permuted, turned by 30 degrees more
each time, or two classes at a time, under one head of two outputs (split) or of ten
(classes). A network 64-100-100-10 is trained on each by 300 steps of Adam (2e-3,
batches of 64). Penalties are `ff.continual.add_elastic_penalty` at the strengths that
are named, with what `ff.continual.consolidate` keeps: one quadratic. `per task` keeps a
quadratic for each task about its own mean (Kirkpatrick et al., 2017), `SI` is synaptic
intelligence (Zenke, Poole, Ganguli, 2017), `replay` keeps examples: 100 a task, or as
many as take the bytes of the Kronecker posterior. `joint` keeps all. Printed: accuracy
over all tasks at the end in percent with the standard error over seeds, transfer, and
how well each task was learned.
"""

import argparse
import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from measuring import describe_machine
from scipy.ndimage import rotate
from sklearn.datasets import load_digits

import fisherflow_jax as ff

NUM_TASKS, STEPS, BATCH, TRAINED = 5, 300, 64, 1297
LIKELIHOOD = ff.likelihoods.categorical()
OPTIMIZER = optax.chain(ff.continual.add_elastic_penalty(TRAINED), optax.adam(2e-3))
FREE = optax.adam(2e-3)


def apply_fn(params: dict, x: jax.Array) -> jax.Array:
    hidden = jax.nn.relu(x @ params["w1"] + params["b1"])
    hidden = jax.nn.relu(hidden @ params["w2"] + params["b2"])
    return hidden @ params["w3"] + params["b3"]


MODEL = apply_fn, LIKELIHOOD
LOSS = ff.negative_log_likelihood(*MODEL)


def start(seed: int, outputs: int) -> dict:
    keys = jax.random.split(jax.random.key(seed), 3)
    shapes = {"w1": (64, 100), "w2": (100, 100), "w3": (100, outputs)}
    params = {
        name: jax.random.normal(key, shape) * np.sqrt(2 / shape[0])
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }
    return params | {
        "b" + name[1]: jnp.zeros(shape[1]) for name, shape in shapes.items()
    }


class Task(NamedTuple):
    inputs: jax.Array
    labels: jax.Array
    held_out: tuple[jax.Array, jax.Array]


def draw_tasks(kind: str, seed: int) -> list[Task]:
    rng = np.random.default_rng(seed)
    digits, labels = load_digits(return_X_y=True)
    digits = (digits / 16).astype(np.float32)
    order = rng.permutation(len(digits))
    parts = order[:TRAINED], order[TRAINED:]
    tasks = []
    for number in range(NUM_TASKS):
        pixels = rng.permutation(64) if number else np.arange(64)

        def change(x, number=number, pixels=pixels):
            if kind == "permuted":
                return x[:, pixels]
            if kind in ("split", "classes"):
                return x
            turn = functools.partial(rotate, angle=30 * number, reshape=False, order=1)
            return np.stack([turn(image.reshape(8, 8)).ravel() for image in x])

        rows = parts
        if kind in (
            "split",
            "classes",
        ):  # of equal sizes, so that all tasks are one program
            own = [part[labels[part] // 2 == number] for part in parts]
            rows = own[0][:240], own[1][:80]
        classes = labels % 2 if kind == "split" else labels
        (x, y), held_out = (
            (jnp.asarray(change(digits[r]), jnp.float32), jnp.asarray(classes[r]))
            for r in rows
        )
        tasks.append(Task(x, y, held_out))
    return tasks


class Kept(NamedTuple):
    """What a method carries from task to task."""

    anchor: Any = None  # a posterior
    information: Any = None  # of earlier tasks, where each keeps its own centre
    pull: Any = None  # the sum of information times centre
    rows: tuple = ()  # examples


class Method(NamedTuple):
    title: str
    begin: Callable = lambda params: Kept()
    learn: Callable = lambda kept, before, after, path, task: kept
    strength: float = 0.0


@functools.partial(jax.jit, static_argnames="held")
def train(
    params: dict, task: Task, kept: Kept, strength: jax.Array, key: Any, held: bool
) -> tuple[dict, dict]:
    """The parameters after a task, and the path integral of synaptic intelligence."""
    optimizer = OPTIMIZER if held else FREE
    state = optimizer.init(params)
    if held:
        count = jnp.asarray(float(len(task.inputs)))
        state = optax.tree.set(state, strength=strength, num_observations=count)

    def step(carry: tuple, key: Any) -> tuple:
        params, state, path = carry
        keys = jax.random.split(key)
        chosen = jax.random.randint(keys[0], (BATCH,), 0, len(task.inputs))
        own = gradient = jax.grad(LOSS)(
            params, (task.inputs[chosen], task.labels[chosen])
        )
        if kept.rows:  # each earlier task weighs as much as the present one
            inputs, labels, number, tasks = kept.rows
            chosen = jax.random.randint(keys[1], (BATCH,), 0, jnp.maximum(number, 1))
            earlier = jax.grad(LOSS)(params, (inputs[chosen], labels[chosen]))
            gradient = optax.tree.add_scale(gradient, tasks, earlier)
        updates, state = optimizer.update(gradient, state, params, anchor=kept.anchor)
        path = jax.tree.map(lambda p, g, u: p - g * u, path, own, updates)
        return (optax.apply_updates(params, updates), state, path), None

    begin = params, state, optax.tree.zeros_like(params)
    return jax.lax.scan(step, begin, jax.random.split(key, STEPS))[0][::2]


@functools.cache
def measure(structure: Any, estimator: Callable) -> Callable:
    return jax.jit(estimator(*MODEL, structure))


def quadratic(structure, estimator=ff.estimators.exact, decay=1.0):
    """One quadratic about the last mean; before any task a vague prior."""

    def begin(params):
        return Kept(ff.posterior(params, structure, prior_precision=1e-3))

    def learn(kept, before, after, path, task):
        information = measure(structure, estimator)(after, (task.inputs, task.labels))
        consolidate = functools.partial(ff.continual.consolidate, decay=decay)
        return Kept(consolidate(kept.anchor, after, information))

    return {"begin": begin, "learn": learn}


def per_task(structure):
    """The sum of a quadratic a task, each about its own mean."""

    def begin(params):
        nothing = ff.posterior(params, structure, prior_precision=1e-3)
        pull = ff.information.matvec(nothing.information, params)
        return Kept(nothing, nothing.information, pull)

    def learn(kept, before, after, path, task):
        exact = measure(structure, ff.estimators.exact)
        information = exact(after, (task.inputs, task.labels))
        pull = optax.tree.add(kept.pull, ff.information.matvec(information, after))
        total = ff.information.add(kept.information, information)
        centre = ff.information.solve(total, pull)
        return Kept(kept.anchor._replace(mean=centre, information=total), total, pull)

    return {"begin": begin, "learn": learn}


def intelligence():
    def begin(params):
        return Kept(
            ff.posterior(params, ff.structures.diagonal(), prior_precision=1e-6)
        )

    def learn(kept, before, after, path, task):
        count = len(task.inputs)
        importance = jax.tree.map(
            lambda p, a, b: 2 * count * jnp.maximum(p, 0) / ((a - b) ** 2 + 1e-3),
            path,
            after,
            before,
        )
        importance = ff.structures.Diagonal(importance)
        return Kept(ff.continual.consolidate(kept.anchor, after, importance))

    return {"begin": begin, "learn": learn}


def replay(each: int):
    def begin(params):
        size = NUM_TASKS * each
        rows = jnp.zeros((size, 64)), jnp.zeros(size, int)
        return Kept(rows=(*rows, jnp.zeros((), int), jnp.zeros(())))

    def learn(kept, before, after, path, task):
        inputs, labels, number, tasks = kept.rows
        some = min(each, len(task.inputs))
        put = functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=0)
        inputs = put(inputs, task.inputs[:some], number)
        labels = put(labels, task.labels[:some], number)
        return Kept(rows=(inputs, labels, number + some, tasks + 1))

    return {"begin": begin, "learn": learn}


def methods(kind: str, outputs: int) -> list[Method]:
    shapes = jax.eval_shape(lambda: start(0, outputs))
    layers = ff.layers.find_layers(apply_fn, shapes, jnp.zeros((1, 64)))
    scalar, diagonal = ff.structures.scalar(), ff.structures.diagonal()
    kronecker = ff.structures.kronecker(layers)
    found = jax.eval_shape(kronecker.empty, shapes)
    size = sum(x.size for x in jax.tree.leaves((shapes, found)))
    alike = size // (65 * (NUM_TASKS - 1))  # numbers of a row, and its label
    # of classes that appear strong penalties keep something, too
    strong = [
        Method("kronecker, 100", **quadratic(kronecker), strength=100.0),
        Method("kronecker, 1000", **quadratic(kronecker), strength=1000.0),
        Method("diagonal, 10000", **quadratic(diagonal), strength=10000.0),
        Method("replay, 20 a task", **replay(20)),
    ]
    return [
        *(strong if kind == "classes" else ()),
        Method("naive"),
        Method("scalar", **quadratic(scalar), strength=1.0),
        *(
            Method(f"diagonal, {x:g}", **quadratic(diagonal), strength=x)
            for x in (1.0, 10.0, 100.0)
        ),
        Method("diagonal per task, 10", **per_task(diagonal), strength=10.0),
        Method(
            "diagonal empirical, 100",
            **quadratic(diagonal, ff.estimators.empirical),
            strength=100.0,
        ),
        Method(
            "diagonal online .9, 100", **quadratic(diagonal, decay=0.9), strength=100.0
        ),
        *(
            Method(f"kronecker, {x:g}", **quadratic(kronecker), strength=x)
            for x in (1.0, 10.0)
        ),
        Method("SI, .1", **intelligence(), strength=0.1),
        Method("replay, 100 a task", **replay(100)),
        Method(f"replay, {alike} a task (as many bytes)", **replay(alike)),
        Method("joint", **replay(TRAINED)),
    ]


@jax.jit
def accuracy(params: dict, held_out: tuple) -> jax.Array:
    inputs, labels = held_out
    return jnp.mean(jnp.argmax(apply_fn(params, inputs), -1) == labels)


def run(method: Method, tasks: list[Task], params: dict, seed: int) -> Any:
    untrained = [float(accuracy(params, task.held_out)) for task in tasks]
    kept, table = method.begin(params), np.zeros((NUM_TASKS, NUM_TASKS))
    for number, task in enumerate(tasks):
        key = jax.random.fold_in(jax.random.key(1000 + seed), number)
        strength, held = jnp.asarray(method.strength), kept.anchor is not None
        after, path = train(params, task, kept, strength, key, held)
        kept = method.learn(kept, params, after, path, task)
        params = after
        table[number] = [float(accuracy(params, other.held_out)) for other in tasks]
    return ff.metrics.continual(table, untrained), float(np.diagonal(table).mean())


def compare(kind: str, seeds: int) -> None:
    outputs = 2 if kind == "split" else 10
    print(f"\n{kind} digits, {NUM_TASKS} tasks, {seeds} seeds")
    columns = ("accuracy", "se", "backward", "forward", "forgetting", "learned", "s")
    print(f"{'':34s}" + "".join(f"{name:>11s}" for name in columns))
    tasks = [draw_tasks(kind, seed) for seed in range(seeds)]
    for method in methods(kind, outputs):
        began, rows = time.perf_counter(), []
        for seed in range(seeds):
            found, learned = run(method, tasks[seed], start(seed, outputs), seed)
            rows.append([*(100 * float(x) for x in found), 100 * learned])
        average, backward, forward, forgetting, learned = np.mean(rows, 0)
        error = np.std([row[0] for row in rows], ddof=1) / np.sqrt(seeds)
        values = average, error, backward, forward, forgetting, learned
        text = "".join(f"{value:11.1f}" for value in values)
        seconds = time.perf_counter() - began
        print(f"{method.title:34s}{text}{seconds:11.1f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    kinds = ("permuted", "rotated", "split", "classes")
    parser.add_argument("--tasks", nargs="+", choices=kinds, default=["permuted"])
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    print(describe_machine(["jax", "optax", "scikit-learn"]))
    for kind in given.tasks:
        compare(kind, given.seeds)


if __name__ == "__main__":
    main()
