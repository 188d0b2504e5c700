"""What the default `widest` of kronecker and two_sided is chosen by.

Four small models, each with a side of one of the sizes that the candidates 512, 1024,
2048 and 4096 tell apart: hidden layers of 700 and of 1,500 units, the 2,080 products of
two pixels as inputs, and the next of 817 words as classes. K-FAC and SOAP keep
the factor of that side whole, or its diagonal. Each is tuned over one printed grid with
the first seed, and its best setting runs again with two others. Printed are the steps
to a loss that both reach, bytes of state, and seconds of a step (in turns, inverses or
bases every ten steps):

    python benchmarks/widest.py            # about ten minutes
    python benchmarks/widest.py --quick    # few steps, the hidden layer of 700 alone
    python benchmarks/widest.py --steps 50 --methods ff.kfac --problems products
"""

import argparse
import functools
import re
import statistics
import time
from typing import Any

import classifiers
import jax
import jax.numpy as jnp
import numpy as np
import optimizer_methods as methods
import optimizer_training as training
from classifiers import CATEGORICAL, apply_dense, dense_layers
from language_model import TEXTS
from measuring import describe_machine, parsed, seconds, table
from optimizer_methods import KFAC, SOAP, Setting
from optimizer_problems import Problem
from optimizer_training import Trained
from sklearn.datasets import load_digits
from threadpoolctl import threadpool_limits

CANDIDATES = 512, 1024, 2048, 4096
STEPS, SEEDS = 100, (0, 1, 2)
GRIDS = {
    KFAC: tuple(Setting(r, d) for r in (0.03, 0.1, 0.3) for d in (1e-3, 1e-2)),
    SOAP: tuple(Setting(r, d) for r in (0.001, 0.003, 0.01) for d in (1e-4, 1e-2)),
}


def _digits(name: str, seed: int, *hidden: int, products: bool = False) -> Problem:
    images, labels = load_digits(return_X_y=True)
    inputs = images / 16
    if products:
        first, second = np.triu_indices(64)
        inputs = inputs[:, first] * inputs[:, second]
    sizes = inputs.shape[1], *hidden, 10
    return Problem(
        f"{name}, " + "-".join(map(str, sizes)),
        functools.partial(apply_dense, jnp.tanh),
        CATEGORICAL,
        dense_layers(jax.random.key(seed), sizes),
        (jnp.asarray(inputs, jnp.float32), jnp.asarray(labels)),
        256,
        STEPS,
        seed,
    )


def hidden_700(seed: int) -> Problem:
    return _digits("hidden layer of 700", seed, 700)


def hidden_1500(seed: int) -> Problem:
    return _digits("hidden layer of 1,500", seed, 1500)


def products(seed: int) -> Problem:
    return _digits("products of pixels", seed, 32, products=True)


def words(seed: int) -> Problem:
    """The next word of a text from the three before it."""
    text = "".join(load().DESCR for load in TEXTS).lower()
    parts = np.array(re.findall(r"[a-z]+|[0-9]+|[^\sa-z0-9]", text))
    known, ids = np.unique(parts, return_inverse=True)
    windows = np.lib.stride_tricks.sliding_window_view(ids, 4)
    keys = jax.random.split(jax.random.key(seed), 2)
    params = {
        "table": jax.random.normal(keys[0], (len(known), 16)),
        "dense": dense_layers(keys[1], (48, 64, len(known))),
    }

    def apply_fn(params: Any, ids: jax.Array) -> jax.Array:
        entered = params["table"][ids].reshape(ids.shape[0], -1)
        return apply_dense(jnp.tanh, params["dense"], entered)

    return Problem(
        f"next word, 3 x 16-64-{len(known)}",
        apply_fn,
        classifiers.CATEGORICAL,
        params,
        (jnp.asarray(windows[:, :3]), jnp.asarray(windows[:, 3])),
        256,
        STEPS,
        seed,
    )


PROBLEMS = hidden_700, words, hidden_1500, products


def make(method: str, widest: int) -> methods.Make:
    made = methods.soap if method == SOAP else methods.kfac
    return functools.partial(made, widest=widest)


def compare(build: Any, method: str, steps: int, rounds: int) -> list[tuple[str, ...]]:
    """A row for each state that the candidates make."""
    problems = [build(seed) for seed in SEEDS]
    runs: dict[str, methods.OptaxRun] = {}
    for widest in CANDIDATES:
        run = methods.OptaxRun(problems[0], make(method, widest))
        same = [name for name in runs if runs[name].num_bytes() == run.num_bytes()]
        if same:
            runs[f"{same[0]}, {widest}"] = runs.pop(same[0])
        else:
            runs[str(widest)] = run
    found: dict[str, list[Trained]] = {}
    for name, run in runs.items():
        best = training.tuned(problems[0], run, GRIDS[method], steps)
        again = (training.tuned(p, run, [best.setting], steps) for p in problems[1:])
        found[name] = [best, *again]
    firsts = {name: each[0] for name, each in found.items()}
    timed = training.with_times(problems[0], runs, firsts, rounds)
    # the loss that all reach, seed by seed
    targets = [
        max(t.losses[-1] for t in ts) for ts in zip(*found.values(), strict=True)
    ]
    rows = []
    for name, each in found.items():
        reached = [t.steps_to(loss) for t, loss in zip(each, targets, strict=True)]
        mean, step = statistics.mean(reached), timed[name].step_seconds
        last = [t.losses[-1] for t in each]
        taken = runs[name].num_bytes()
        rows.append(
            (
                f"{method}, widest {name}",
                *(f"{value:g}" for value in each[0].setting),
                f"{taken / 2**20:.2f} MiB ({taken / problems[0].num_params:.1f})",
                f"{seconds(step)} ({timed[name].spread})",
                f"{statistics.mean(last):.3g} ({min(last):.3g}-{max(last):.3g})",
                f"{mean:.0f} ({min(reached):.0f}-{max(reached):.0f})",
                seconds(mean * step),
            )
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few steps, one model")
    parser.add_argument("--steps", type=int, default=STEPS, help="tens of steps")
    parser.add_argument("--methods", nargs="+", choices=GRIDS, default=list(GRIDS))
    names = [build.__name__ for build in PROBLEMS]
    parser.add_argument("--problems", nargs="+", choices=names, default=names)
    arguments = parsed(parser)
    if arguments is None:
        return
    quick, steps, names = arguments.quick, arguments.steps, arguments.problems
    if quick:
        steps, names = 20, names[:1]
    threadpool_limits(1, user_api="blas")
    print(f"{describe_machine(('jax', 'jaxlib', 'optax'))}\nLAPACK on one thread\n")
    for method in arguments.methods:
        grid = GRIDS[method]
        print(
            f"{method}: learning rate {sorted({s.learning_rate for s in grid})} x "
            f"{'eps, as the square of' if method == SOAP else 'damping'} "
            f"{sorted({s.damping for s in grid})}"
        )
    header = (
        "",
        "rate",
        "second",
        "state (bytes a parameter)",
        "a step (range)",
        f"loss at {steps} (range)",
        "steps to (range)",
        "seconds to",
    )
    for build in PROBLEMS:
        if build.__name__ not in names:
            continue
        problem = build(0)
        print(f"\n{problem.name}: {problem.num_params:,} parameters\n", flush=True)
        rows = [
            row
            for method in arguments.methods
            for row in compare(build, method, steps, 3 if quick else 5)
        ]
        print(table(header, rows), flush=True)
    print("\nto: the highest of the last losses of that method, a seed")
    print(f"{time.process_time():.0f} seconds of a processor in all.")


if __name__ == "__main__":
    main()
