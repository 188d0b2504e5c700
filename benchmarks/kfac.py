"""K-FAC beside Adam, SGD, a diagonal and kfac-jax: time of a step, loss, wall clock.

First the time of a step of a wide network and of a deep one, beside a floor that is
written out (kfac_floor.py), then training on the digits: the deep autoencoder, a dense
and a convolutional classifier, a small transformer. Each method is
tuned over one printed grid. Needs the extra `benchmarks`; kfac-jax takes part where it
is installed (`pip install kfac-jax`):

    python benchmarks/kfac.py                    # about ten minutes
    python benchmarks/kfac.py --quick            # under a minute: the autoencoder
    python benchmarks/kfac.py --times            # the times of a step alone
    python benchmarks/kfac.py --plot kfac.png --json kfac.json
"""

import argparse
import importlib.metadata
import json
import math
import time
from pathlib import Path

import kfac_jax_method
import optimizer_methods as methods
import optimizer_plot
import optimizer_training as training
from measuring import describe_machine, parsed, seconds, table
from optimizer_methods import ADAM, EKFAC, KFAC, KFAC_JAX, Setting
from optimizer_problems import PROBLEMS, Problem
from optimizer_step_times import Verdict, step_times
from optimizer_training import Trained
from threadpoolctl import threadpool_limits

FEWER_STEPS = 3.0  # target: steps of Adam over steps of K-FAC

LEARNING_RATES = 0.001, 0.003, 0.01, 0.03, 0.1, 0.3
DAMPINGS = 1e-4, 1e-3, 1e-2
QUICK = Setting(0.003, 1e-3), Setting(0.1, 1e-3)
GRID = tuple(Setting(rate, value) for rate in LEARNING_RATES for value in DAMPINGS)


def kfac_jax_state() -> tuple[bool, str]:
    """Whether it takes part, and what to print of it."""
    try:
        version = importlib.metadata.version("kfac-jax")
        kfac_jax_method.load()
    except importlib.metadata.PackageNotFoundError:
        return False, "kfac-jax: not installed, its rows are missing (pip install it)"
    except (ImportError, AttributeError) as error:
        return False, f"kfac-jax {version} does not run with this JAX: {error}"
    return True, (
        f"kfac-jax {version}, its evaluation of one equation replaced for this JAX "
        "(kfac_jax_method.py); in training norm_constraint "
        f"{kfac_jax_method.NORM_CONSTRAINT:g}, for it knows no max_kl"
    )


def train_all(problem: Problem, quick: bool, with_kfac_jax: bool) -> dict[str, Trained]:
    """Each method, tuned; steps are timed afterwards, in turns."""
    grid, share = (QUICK, 5) if quick else (GRID, 1)
    runs: dict[str, methods.Run] = {
        name: methods.OptaxRun(problem, make) for name, make in methods.METHODS.items()
    }
    if with_kfac_jax:
        runs[KFAC_JAX] = kfac_jax_method.KfacJaxRun(
            problem, methods.PERIOD, kfac_jax_method.NORM_CONSTRAINT
        )
    found = {}
    for name, run in runs.items():
        first_order = name in methods.FIRST_ORDER
        steps = problem.num_steps // (share if first_order else 4 * share)
        steps -= steps % training.BLOCK
        try:
            found[name] = training.tuned(problem, run, grid, steps)
        except Exception as error:
            if name != KFAC_JAX:
                raise
            # another project's failure is a result
            print(f"   kfac-jax fails here: {type(error).__name__}: {error}\n"[:300])
    return training.with_times(
        problem, {name: runs[name] for name in found}, found, 3 if quick else 7
    )


def print_training(problem: Problem, found: dict[str, Trained]) -> list[Verdict]:
    """The table of one problem, and Adam over K-FAC to Adam's best loss."""
    target, most = found[ADAM].losses[-1], found[ADAM].steps[-1]
    total = found[ADAM].seconds_at(most)
    at_steps = [most // 20, most // 8, most // 4, most]
    shares = 0.125, 0.25, 0.5, 1.0
    rows = []
    for name, trained in found.items():
        reached = trained.steps_to(target)
        cells = ("", "")
        if not math.isinf(reached):
            cells = f"{reached:.0f}", seconds(trained.seconds_at(reached))
        rows.append(
            (
                name,
                f"{trained.setting.learning_rate:g}",
                f"{trained.setting.damping:g}",
                f"{seconds(trained.step_seconds)} ({trained.spread})",
                *(_loss(trained.loss_at(step)) for step in at_steps),
                *(_loss(trained.loss_after(share * total)) for share in shares),
                *cells,
            )
        )
    header = (
        "",
        "rate",
        "damping",
        "a step (range)",
        *(f"step {step}" for step in at_steps),
        *(seconds(share * total) for share in shares),
        "steps to",
        "seconds to",
    )
    print(table(header, rows))
    print(f"   (to: Adam's last loss, {target:.4g})\n")
    verdicts = []
    if problem.name.startswith("autoencoder"):
        for name in (KFAC, EKFAC):
            reached = found[name].steps_to(target)
            fewer = found[ADAM].steps_to(target) / reached
            faster = found[ADAM].seconds_at(found[ADAM].steps_to(target))
            faster /= found[name].seconds_at(reached)
            what = f"{problem.name.split()[0]}, Adam's {{}} over those of {name}"
            verdicts.append(
                (what.format("steps"), fewer, FEWER_STEPS, fewer >= FEWER_STEPS)
            )
            verdicts.append((what.format("seconds"), faster, 1.0, faster > 1))
    return verdicts


def _loss(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one problem, few steps")
    parser.add_argument("--times", action="store_true", help="of a step, no training")
    parser.add_argument("--json", type=Path, help="a file for the numbers")
    parser.add_argument("--plot", type=Path, help="a file for the loss curves")
    arguments = parsed(parser)
    if arguments is None:
        return
    quick, began = arguments.quick, time.perf_counter()
    # the threads of LAPACK and those of XLA would wait for each other's cores: on a
    # busy machine a factorisation then takes a hundred times as long
    threadpool_limits(1, user_api="blas")
    machine = describe_machine(("jax", "jaxlib", "optax"))
    print(machine)
    with_kfac_jax, line = kfac_jax_state()
    grid = QUICK if quick else GRID
    print(
        f"{line}\nLAPACK on one thread, as by OPENBLAS_NUM_THREADS=1\n\n"
        "float32. The grid, the same for all: learning rate "
        f"{sorted({s.learning_rate for s in grid})} x damping "
        f"{sorted({s.damping for s in grid})}; Adam reads the damping's square as eps, "
        "SGD 1 - 2 sqrt(damping) as momentum.\n"
        f"   Momentum {methods.MOMENTUM} otherwise; curvature: decay {methods.DECAY}, "
        f"one sampled label, factors every {methods.PERIOD} steps, inverses "
        f"every {methods.INVERSE_PERIOD}, max_kl {methods.MAX_KL}.\n"
        f"   Halving: all of the grid for {training.STAGES[0][0]:g} of the steps, the "
        f"best {training.STAGES[1][1]} for {training.STAGES[1][0]:g}, the best "
        f"{training.STAGES[2][1]} to the end; judged by the loss of all data.\n"
        "   Methods with curvature take a quarter of the steps. Compilation is left "
        "out of all times but `first ten`.\n"
    )
    timings, verdicts = step_times(3 if quick else 9, with_kfac_jax)
    everything = {}
    trained = () if arguments.times else PROBLEMS[:1] if quick else PROBLEMS
    for number, build in enumerate(trained, 2):
        problem = build()
        print(
            f"{number}. {problem.name}: {problem.num_params:,} parameters, batches of "
            f"{problem.batch_size} of {problem.data[0].shape[0]}, "
            f"{training.floor(problem)}\n",
            flush=True,
        )
        found = train_all(problem, quick, with_kfac_jax)
        verdicts += print_training(problem, found)
        everything[problem.name] = found
    if quick:
        print("Too few steps and settings to judge training by.")
    for what, value, target, met in verdicts:
        print(f"{'met   ' if met else 'missed'}  {what}: {value:.2f}x ({target:g}x)")
    print(describe_machine(("jax",)).splitlines()[0] + " at the end")
    print(f"{time.perf_counter() - began:.0f} seconds in all.")
    if arguments.json:
        numbers = {
            "machine": machine,
            "step_times": {
                problem: {name: t.seconds for name, t in each.items()}
                for problem, each in timings.items()
            },
            "training": {
                name: {method: t._asdict() for method, t in found.items()}
                for name, found in everything.items()
            },
            "targets": verdicts,
        }
        arguments.json.write_text(json.dumps(numbers, indent=1))
    if arguments.plot:
        optimizer_plot.save(everything, arguments.plot)


if __name__ == "__main__":
    main()
