"""What K-FAC gains from each option on a small transformer, beside kfac-jax.

A transformer of two layers predicts rows of the digits. Each variant is tuned over one
printed grid with the first seed (of parameters and of the order of the data), its best
setting is run again with two others, and judged by the loss of all data after 200
steps. kfac-jax takes part where it is installed (`pip install kfac-jax`):

    python benchmarks/kfac_transformer.py            # some minutes
    python benchmarks/kfac_transformer.py --quick    # few steps, two settings
"""

import argparse
import functools
import statistics
import time
from typing import Any

import kfac_jax_method
import optax
import optimizer_methods as methods
import optimizer_training as training
from kfac import kfac_jax_state
from measuring import describe_machine, parsed, table
from optimizer_methods import ADAM, KFAC, KFAC_JAX, Setting
from optimizer_problems import transformer
from threadpoolctl import threadpool_limits

import fisherflow_jax as ff

STEPS, SEEDS = 200, (0, 1, 2)
TARGET = 18.8  # nats an image: kfac-jax with adaptive damping
LEARNING_RATES = 0.01, 0.03, 0.1, 0.3, 1.0
DAMPINGS = 1e-4, 1e-3, 1e-2, 1e-1
GRID = tuple(Setting(rate, value) for rate in LEARNING_RATES for value in DAMPINGS)
QUICK = Setting(0.1, 1e-3), Setting(0.3, 1e-2)
ADAMS = tuple(Setting(r, v) for r in (0.001, 0.003, 0.01, 0.03) for v in (1e-4, 1e-2))


def adaptive(problem: Any, layers: Any, learning_rate: Any, damping: Any) -> Any:
    """Damping that starts at the grid's, and moves as fast as kfac-jax's."""
    loss = ff.negative_log_likelihood(problem.apply_fn, problem.likelihood)
    # a number, for what is given as an array is not adapted; the state has the grid's
    inner = ff.transforms.adapt_damping(
        methods.kfac(problem, layers, learning_rate, 1.0), loss, rate=0.9
    )

    def init(params: Any) -> Any:
        return optax.tree.set(inner.init(params), damping=damping)

    return optax.GradientTransformationExtraArgs(init, inner.update)


def variants() -> dict[str, methods.Make]:
    kfac, ekfac = methods.kfac, methods.ekfac
    change = functools.partial
    return {
        ADAM: methods.adam,
        KFAC: kfac,
        f"{KFAC}, max_kl=0.3": change(kfac, max_kl=0.3),
        f"{KFAC}, max_kl=1": change(kfac, max_kl=1.0),
        f"{KFAC}, adapt_damping": adaptive,
        f"{KFAC}, factors each step": change(kfac, period=1),
        f"{KFAC}, and inverses each step": change(kfac, period=1, inverse_period=1),
        f"{KFAC}, exact damping": change(kfac, factorise=ff.transforms.factorise),
        methods.EKFAC: ekfac,
        f"{methods.EKFAC}, max_kl=0.3": change(ekfac, max_kl=0.3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few steps")
    parser.add_argument("--only", nargs="+", help="variants, by a part of their name")
    arguments = parsed(parser)
    if arguments is None:
        return
    threadpool_limits(1, user_api="blas")
    quick, problems = arguments.quick, [transformer(seed) for seed in SEEDS]
    with_kfac_jax, line = kfac_jax_state()
    steps = STEPS // 10 if quick else STEPS
    print(
        f"{describe_machine(('jax', 'jaxlib', 'optax'))}\n{line}\n\n"
        f"{problems[0].name}: {problems[0].num_params:,} parameters, batches of "
        f"{problems[0].batch_size}, {training.floor(problems[0])}; {steps} steps\n"
        f"The grid: learning rate {LEARNING_RATES} x damping {DAMPINGS}; Adam's: "
        f"{sorted({s.learning_rate for s in ADAMS})}, eps 1e-8 and 1e-4. Momentum "
        f"{methods.MOMENTUM}, decay {methods.DECAY}, one sampled label; unless named, "
        f"factors every {methods.PERIOD} steps, inverses every "
        f"{methods.INVERSE_PERIOD}, max_kl {methods.MAX_KL}. Tuned with seed 0.\n",
        flush=True,
    )
    runs: dict[str, methods.Run] = {
        name: methods.OptaxRun(problems[0], make) for name, make in variants().items()
    }
    if with_kfac_jax:
        bound = methods.PERIOD, kfac_jax_method.NORM_CONSTRAINT
        for suffix, adapts in (("", False), (", adaptive damping", True)):
            runs[KFAC_JAX + suffix] = kfac_jax_method.KfacJaxRun(
                problems[0], *bound, adaptive=adapts
            )
    header = ("", "rate", "damping", *(f"seed {seed}" for seed in SEEDS), "mean", "met")
    rows = []
    for name, run in runs.items():
        if arguments.only and not any(part in name for part in arguments.only):
            continue
        grid = QUICK if quick else ADAMS if name == ADAM else GRID
        best = training.tuned(problems[0], run, grid, steps)
        again = [training.tuned(p, run, [best.setting], steps) for p in problems[1:]]
        losses = [trained.losses[-1] for trained in (best, *again)]
        setting = (f"{value:g}" for value in best.setting)
        cells = (f"{loss:.2f}" for loss in (*losses, statistics.mean(losses)))
        rows.append((name, *setting, *cells, "yes" if max(losses) <= TARGET else "no"))
        print(table(header, rows[-1:]).splitlines()[-1], flush=True)
    print(f"\nloss of all data after {steps} steps (met: all at or below {TARGET})\n")
    print(table(header, rows))
    print(f"{time.process_time():.0f} seconds of a processor in all.")


if __name__ == "__main__":
    main()
