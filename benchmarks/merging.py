"""Models fine-tuned from one start on classes of their own, made into one.

    python benchmarks/merging.py [--seeds 4]

A network 64-16-10 learns 200 of scikit-learn's digits; K copies of it are then
fine-tuned by 200 steps of Adam (1e-3, batches of 64) on five classes each (K = 2) or on
two (K = 5). Merged are the copies alone, with the information of each about its own
data: `ff.merge` of pairs (mean, information) about the start, with a prior of 1 or 10,
or of posteriors without a start. RegMean keeps Kronecker factors with an identity for
the output factor. `Kronecker, factors` divides by the added factors, without conjugate
gradients. Printed: test accuracy in percent and the mean negative log-likelihood, with
standard errors over seeds, and the residual of the solve.
"""

import argparse
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from measuring import describe_machine
from sklearn.datasets import load_digits

import fisherflow_jax as ff

HIDDEN, TRAINED, STARTED = 16, 1297, 200
LIKELIHOOD = ff.likelihoods.categorical()


def apply_fn(params: dict, x: jax.Array) -> jax.Array:
    hidden = jax.nn.relu(x @ params["w1"] + params["b1"])
    return hidden @ params["w2"] + params["b2"]


MODEL = apply_fn, LIKELIHOOD
LOSS = ff.negative_log_likelihood(*MODEL)


def initial(seed: int) -> dict:
    keys = jax.random.split(jax.random.key(seed))
    return {
        "w1": jax.random.normal(keys[0], (64, HIDDEN)) * np.sqrt(2 / 64),
        "b1": jnp.zeros(HIDDEN),
        "w2": jax.random.normal(keys[1], (HIDDEN, 10)) * np.sqrt(1 / HIDDEN),
        "b2": jnp.zeros(10),
    }


LAYERS = ff.layers.find_layers(apply_fn, initial(0), jnp.zeros((2, 64)))
MEASURES = {
    "diagonal": ff.structures.diagonal(),
    "Kronecker": ff.structures.kronecker(LAYERS),
    "full": ff.structures.full(),
}
MEASURES = {
    name: jax.jit(ff.estimators.exact(*MODEL, structure))
    for name, structure in MEASURES.items()
}


@functools.partial(jax.jit, static_argnames=("steps", "rate"))
def train(params: dict, rows: ff.Batch, key: Any, steps: int, rate: float) -> dict:
    optimizer = optax.adam(rate)
    shares = rows.weights / rows.weights.sum()

    def step(carry: tuple, key: Any) -> tuple:
        params, state = carry
        chosen = jax.random.choice(key, len(rows.targets), (64,), p=shares)
        batch = rows.inputs[chosen], rows.targets[chosen]
        updates, state = optimizer.update(jax.grad(LOSS)(params, batch), state)
        return (optax.apply_updates(params, updates), state), None

    carry = params, optimizer.init(params)
    return jax.lax.scan(step, carry, jax.random.split(key, steps))[0][0]


@jax.jit
def judged(params: dict, rows: tuple) -> tuple[jax.Array, jax.Array]:
    right = jnp.argmax(apply_fn(params, rows[0]), -1) == rows[1]
    return 100 * jnp.mean(right), LOSS(params, rows)


def identity_outputs(information: Any) -> Any:
    """RegMean: A kron 1, the Gram matrix of a layer's inputs for every output."""
    outputs = {
        name: jnp.broadcast_to(jnp.eye(x.shape[-1]), x.shape)
        for name, x in information.output_factors.items()
    }
    one = jnp.ones_like(information.num_observations)
    return information._replace(output_factors=outputs, num_observations=one)


def by_added_factors(models: list, informations: list, start: dict, prior: float):
    """The same numerator, divided by the sum in the structure."""
    moves = [optax.tree.sub(model, start) for model in models]
    pulls = list(map(ff.information.matvec, informations, moves))
    total = functools.reduce(ff.information.add, informations)
    pull = functools.reduce(optax.tree.add, pulls)
    return optax.tree.add(start, ff.information.solve(total, pull, prior))


def merged(models: list, measured: dict, start: dict) -> dict[str, tuple]:
    """Methods' parameters and residuals, by name."""
    found = {
        "plain mean": (jax.tree.map(lambda *x: sum(x) / len(x), *models), None),
    }
    measured = measured | {
        "RegMean": list(map(identity_outputs, measured["Kronecker"]))
    }
    for name, informations in measured.items():
        pairs = list(zip(models, informations, strict=True))
        for prior in (1.0, 10.0):
            one = ff.merge(pairs, start, prior_precision=prior)
            found[f"{name}, prior {prior:g}"] = one.mean, float(one.residual)
        states = [ff.posterior(*pair, prior_precision=1.0) for pair in pairs]
        one = ff.merge(states)
        found[f"{name}, prior 1, no start"] = one.mean, float(one.residual)
        if name == "Kronecker":
            one = by_added_factors(models, informations, start, 1.0)
            found["Kronecker, factors, prior 1"] = one, None
    return found


def run(count: int, seed: int) -> dict[str, tuple]:
    x, y = load_digits(return_X_y=True)
    x = (x / 16).astype(np.float32)
    order = np.random.default_rng(seed).permutation(len(x))
    train_rows, test_rows = order[:TRAINED], order[TRAINED:]

    def rows(chosen: np.ndarray, size: int) -> ff.Batch:
        padded = np.resize(chosen, size)
        weights = (np.arange(size) < len(chosen)).astype(np.float32)
        return ff.Batch(*map(jnp.asarray, (x[padded], y[padded], weights)))

    key = jax.random.key(100 + seed)
    start = train(initial(seed), rows(train_rows[:STARTED], TRAINED), key, 150, 3e-3)
    parts = [
        train_rows[np.isin(y[train_rows], classes)]
        for classes in np.array_split(np.arange(10), count)
    ]
    batches = [rows(part, max(map(len, parts))) for part in parts]
    keys = jax.random.split(key, count)
    models = [
        train(start, batch, key, 200, 1e-3)
        for batch, key in zip(batches, keys, strict=True)
    ]
    measured = {
        name: [measure(*each) for each in zip(models, batches, strict=True)]
        for name, measure in MEASURES.items()
    }
    everything = rows(train_rows, TRAINED)
    found = {
        "one start": (start, None),
        "one model": (models[0], None),
        **merged(models, measured, start),
        "trained on all": (train(start, everything, key, 300, 1e-3), None),
    }
    held_out = jnp.asarray(x[test_rows]), jnp.asarray(y[test_rows])
    return {
        name: (*map(float, judged(params, held_out)), residual)
        for name, (params, residual) in found.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=4)
    seeds = parser.parse_args().seeds
    print(describe_machine(["jax", "optax", "scikit-learn"]))
    for count in (2, 5):
        print(f"\n{count} models of {10 // count} classes each, {seeds} seeds")
        gain = "over plain mean"
        print(f"{'':32s}{'accuracy':>14s}{'NLL':>16s}{gain:>17s}{'residual':>10s}")
        results = [run(count, seed) for seed in range(seeds)]
        for name in results[0]:
            rows = [result[name] for result in results]
            values = np.array([row[:2] for row in rows])
            mean = values.mean(0)
            error = values.std(0, ddof=1) / np.sqrt(seeds)
            text = f"{mean[0]:8.1f} ({error[0]:.1f}){mean[1]:10.3f} ({error[1]:.3f})"
            over = values[:, 0] - [result["plain mean"][0] for result in results]
            text += f"{over.mean():+10.2f} ({over.std(ddof=1) / np.sqrt(seeds):.2f})"
            worst = max((row[2] or 0.0) for row in rows)
            residual = f"{worst:10.0e}" if rows[0][2] is not None else ""
            print(f"{name:32s}{text}{residual}", flush=True)


if __name__ == "__main__":
    main()
