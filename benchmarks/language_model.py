"""K-FAC and Adam on a small language model whose embeddings are tied.

A transformer of two layers reads the descriptions of scikit-learn's data sets, which
come with the package, character by character. The table of characters is looked up at
the inputs and multiplies at the outputs: one layer of K-FAC. Each method is tuned over
one printed grid, and judged by the steps that it takes to Adam's last loss. Needs the
extra `benchmarks`:

    python benchmarks/language_model.py            # a few minutes
    python benchmarks/language_model.py --quick    # two settings, few steps
    python benchmarks/language_model.py --diagonal # K-FAC with the table's diagonal too
"""

import argparse
import functools
import time
from typing import Any

import classifiers
import jax
import jax.numpy as jnp
import numpy as np
import optimizer_methods as methods
import optimizer_training as training
from measuring import describe_machine, parsed, table
from optimizer_methods import ADAM, KFAC, Setting
from optimizer_problems import Problem
from sklearn import datasets
from threadpoolctl import threadpool_limits

import fisherflow_jax as ff

TEXTS = (
    datasets.load_iris,
    datasets.load_wine,
    datasets.load_breast_cancer,
    datasets.load_digits,
    datasets.load_diabetes,
    datasets.load_linnerud,
)
LENGTH, WIDTH, HEADS = 32, 32, 4
LEARNING_RATES = 0.001, 0.003, 0.01, 0.03, 0.1, 0.3
DAMPINGS = 1e-3, 1e-2, 1e-1
QUICK = Setting(0.01, 1e-3), Setting(0.1, 1e-3)
STEPS = 400
DIAGONAL = "ff.kfac, diagonal"
LOOKS = 50, 100, 200, 300, 400


def language_model_params(
    seed: int, vocabulary: int, length: int, width: int, depth: int
) -> dict:
    """Of a transformer with a table that is looked up and multiplies at the end."""
    keys = iter(jax.random.split(jax.random.key(seed), 4 + 8 * depth))

    return {
        "table": width**-0.5 * jax.random.normal(next(keys), (vocabulary, width)),
        "position": 0.1 * jax.random.normal(next(keys), (length, width)),
        "layers": [classifiers.block(keys, width) for _ in range(depth)],
        "norm": classifiers.norm(width),
    }


def language_model(seed: int) -> Problem:
    text = "".join(load().DESCR for load in TEXTS).lower()
    characters, ids = np.unique(list(text), return_inverse=True)
    rows = len(ids) // LENGTH
    starts = LENGTH * np.arange(rows)[:, None] - (np.arange(rows) == rows - 1)[:, None]
    windows = ids[starts + np.arange(LENGTH + 1)[None]]
    params = language_model_params(seed, len(characters), LENGTH, WIDTH, 2)
    return Problem(
        f"tied transformer, 2 layers of width {WIDTH}, {len(characters)} characters",
        apply_fn,
        ff.likelihoods.categorical(),
        params,
        (jnp.asarray(windows[:, :-1]), jnp.asarray(windows[:, 1:])),
        64,
        STEPS,
    )


def without_table(params: Any, ids: jax.Array) -> jax.Array:
    """The same model, in which the table is not found to be a layer."""
    table = jax.lax.pad(params["table"], 0.0, [(0, 0, 0)] * 2)
    return apply_fn(params | {"table": table}, ids)


def apply_language_model(params: Any, ids: jax.Array, num_heads: int) -> jax.Array:
    length, width = params["position"].shape
    x = width**0.5 * params["table"][ids] + params["position"][None]
    causal = jnp.tril(jnp.ones((length, length), bool))
    for layer in params["layers"]:
        x = classifiers.through_block(layer, x, num_heads, causal)
    return classifiers.normalised(params["norm"], x) @ params["table"].T


apply_fn = functools.partial(apply_language_model, num_heads=HEADS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two settings, few steps")
    parser.add_argument("--diagonal", action="store_true", help="one more row")
    parser.add_argument("--seed", type=int, default=0, help="of the parameters")
    arguments = parsed(parser)
    if arguments is None:
        return
    quick = arguments.quick
    threadpool_limits(1, user_api="blas")
    problem = language_model(arguments.seed)
    layers = ff.layers.find_layers(problem.apply_fn, problem.params, problem.data[0])
    rates, dampings = LEARNING_RATES, DAMPINGS
    grid = QUICK if quick else tuple(Setting(r, d) for r in rates for d in dampings)
    print(
        f"{describe_machine(('jax', 'jaxlib', 'optax'))}\n\n"
        f"{problem.name}: {problem.num_params:,} parameters, batches of "
        f"{problem.batch_size} of {problem.data[0].shape[0]} windows of {LENGTH} "
        f"characters, seed {arguments.seed}\n\n{layers}\n\n"
        "The grid, the same for all: learning rate "
        f"{sorted({s.learning_rate for s in grid})} x damping "
        f"{sorted({s.damping for s in grid})}; Adam reads the damping's square as "
        f"eps. Momentum {methods.MOMENTUM}; curvature: decay {methods.DECAY}, one "
        f"sampled text, factors every {methods.PERIOD} steps, inverses every "
        f"{methods.INVERSE_PERIOD}, max_kl {methods.MAX_KL}.\n",
        flush=True,
    )
    hidden = problem._replace(apply_fn=without_table)
    runs = {ADAM: (problem, ADAM), KFAC: (problem, KFAC)}
    if arguments.diagonal:
        runs[DIAGONAL] = hidden, KFAC
    found, rows = {}, []
    for name, (model, method) in runs.items():
        run = methods.OptaxRun(model, methods.METHODS[method])
        found[name] = training.tuned(model, run, grid, STEPS // (10 if quick else 1))
    target = found[ADAM].losses[-1]
    for name, trained in found.items():
        looks = [trained.loss_at(step) for step in LOOKS]
        rows.append(
            (
                name,
                f"{trained.setting.learning_rate:g}",
                f"{trained.setting.damping:g}",
                *("" if loss is None else f"{loss / LENGTH:.3f}" for loss in looks),
                f"{trained.steps_to(target):.0f}",
            )
        )
    heads = "loss a character:", "rate", "damping"
    steps = (f"step {step}" for step in LOOKS)
    print(table((*heads, *steps, f"steps to {target / LENGTH:.3f}"), rows))
    print(f"{time.process_time():.0f} seconds of a processor in all.")


if __name__ == "__main__":
    main()
