"""One table of optimisers: bytes of state, seconds a step, and loss.

Adam, SGD, Muon, Shampoo, SOAP, K-FAC, EK-FAC and kfac-jax on the autoencoder and the
convolutional network of the digits, and on a transformer of d_model 256. Each is tuned
over one printed grid with the first seed (of parameters and of the order of the data),
and its best setting runs again with two others. Of each: bytes of state a parameter;
the time of a step, all in turns, over that of optax.adamw; and the loss of all data

- at equal steps,
- at equal seconds: when optax.adamw has taken all its steps,
- at equal bytes: within 16 bytes of state a parameter, twice Adam's. A method that
  takes more has a second row, with the `widest` sides that fit, tuned as the others.

Before it the bytes of state at 1.2 and 6.7 billion parameters, from shapes alone. Needs
the extra `benchmarks`; kfac-jax takes part where it is installed:

    python benchmarks/optimizers.py                  # about a quarter of an hour
    python benchmarks/optimizers.py --quick          # two minutes: the autoencoder
    python benchmarks/optimizers.py --problems cnn   # or autoencoder, transformer
    python benchmarks/optimizers.py --problems       # the bytes alone
"""

import argparse
import functools
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import checkouts
import jax
import jax.numpy as jnp
import kfac_jax_method
import optax
import optimizer_methods as methods
import optimizer_problems as problems
import optimizer_training as training
from kfac import kfac_jax_state
from language_model import apply_language_model, language_model_params
from measuring import describe_machine, parsed, table
from optimizer_methods import ADAMW, EKFAC, KFAC, KFAC_JAX, SGD, Setting
from optimizer_problems import Problem
from optimizer_training import Trained
from threadpoolctl import threadpool_limits

import fisherflow_jax as ff

SEEDS = 0, 1, 2
BUDGET = 16  # bytes of state a parameter
WIDEST = 2048  # wider sides are diagonal, where nothing else is said
# how it is built, the steps, and the learning rates of the grid
PROBLEMS: dict[str, tuple[Callable[..., Problem], int, tuple[float, ...]]] = {
    "autoencoder": (
        problems.autoencoder,
        400,
        (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3),
    ),
    "cnn": (problems.cnn, 400, (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3)),
    "transformer": (
        functools.partial(
            problems.transformer, width=256, depth=1, batch_size=32, rows=512
        ),
        40,
        (0.003, 0.01, 0.03, 0.1),
    ),
}
SECOND = 1e-4, 1e-2
SIZES = (("1.2 billion", 22, 2048), ("6.7 billion", 32, 4096))
VOCABULARY, LENGTH = 50257, 2048
DEVICES = jax.sharding.AbstractMesh((8,), ("data",))


def makes(widest: int) -> dict[str, methods.Make]:
    """All methods; those with factors keep the diagonal of wider sides."""
    return {
        ADAMW: methods.adamw,
        SGD: methods.sgd,
        methods.MUON: methods.muon,
        methods.SHAMPOO: functools.partial(methods.shampoo, widest=widest),
        methods.SOAP: functools.partial(methods.soap, widest=widest),
        KFAC: functools.partial(methods.kfac, widest=widest),
        EKFAC: functools.partial(methods.ekfac, widest=widest),
    }


FACTORED = methods.SHAMPOO, methods.SOAP, KFAC, EKFAC


# ---- bytes, from shapes alone


def print_sizes() -> None:
    """Rows of methods, columns of models; nothing is made.

    Without kfac-jax, which makes its state to find its size.
    """
    ids = jax.ShapeDtypeStruct((1, LENGTH), jnp.int32)
    cells: dict[str, list[str]] = {}
    for _, depth, width in SIZES:
        params = jax.eval_shape(
            lambda d=depth, w=width: language_model_params(0, VOCABULARY, LENGTH, w, d)
        )
        count = sum(leaf.size for leaf in jax.tree.leaves(params))
        model = functools.partial(apply_language_model, num_heads=width // 128)
        categorical = ff.likelihoods.categorical()
        kfac = functools.partial(
            ff.kfac, 0.1, model, categorical, inputs=ids, key=0, decay=methods.DECAY
        )
        narrow, over = {"store": "bfloat16"}, {"factor_sharding": "data"}
        shampoo = functools.partial(ff.shampoo, 0.1, graft="adam")
        soap = functools.partial(ff.soap, 0.1)
        makes: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
            ADAMW: (functools.partial(optax.adamw, 0.1), {}),
            SGD: (functools.partial(optax.sgd, 0.1, momentum=0.9), {}),
            methods.MUON: (functools.partial(optax.contrib.muon, 0.1), {}),
            methods.SHAMPOO: (shampoo, over),
            f"{methods.SHAMPOO}, bfloat16": (shampoo, over | narrow),
            methods.SOAP: (soap, over),
            f"{methods.SOAP}, bfloat16": (soap, over | narrow),
            KFAC: (kfac, over),
            f"{KFAC}, widest=4096": (kfac, over | {"widest": 4096}),
            f"{KFAC}, widest=4096, bfloat16": (kfac, over | narrow | {"widest": 4096}),
            EKFAC: (kfac, over | {"eigenvalue_correction": True}),
        }
        for name, (make, options) in makes.items():
            alone = {key: options[key] for key in options if key not in over}
            taken = ff.transforms.bytes_per_device(make(**alone), params)
            text = [f"{taken / 2**30:.1f} GiB", f"{taken / count:.1f}"]
            shared = laid_out(params)
            for kind in (alone, options):
                taken = ff.transforms.bytes_per_device(make(**kind), shared, DEVICES)
                text.append(f"{taken / 2**30:.2f} GiB")
            cells.setdefault(name, []).extend(text)
    header = [""]
    for name, depth, width in SIZES:
        header += [f"{name}: {depth} layers of {width}", "bytes a parameter"]
        header += ["one of 8 devices, factors whole", "factors over all 8"]
    print(table(header, [(name, *each) for name, each in cells.items()]), "\n")


def laid_out(params: Any) -> Any:
    """Each array along the first axis that 8 devices divide, as FSDP places it."""

    def spread(leaf: Any) -> jax.ShapeDtypeStruct:
        axis = next((k for k, size in enumerate(leaf.shape) if size % 8 == 0), None)
        spec = () if axis is None else (*[None] * axis, "data")
        own = jax.sharding.NamedSharding(DEVICES, jax.sharding.PartitionSpec(*spec))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=own)

    return jax.tree.map(spread, params)


# ---- training


def widest_within(problem: Problem, name: str) -> int | None:
    """The most units of a whole side with which a method keeps to the budget."""
    sides = {0}
    for leaf in jax.tree.leaves(problem.params):
        if leaf.ndim > 1:
            rows = math.prod(leaf.shape[:-1])
            sides |= {rows, leaf.shape[-1]}
    for widest in sorted(sides, reverse=True):
        run = methods.OptaxRun(problem, makes(widest)[name])
        if run.num_bytes() <= BUDGET * problem.num_params:
            return widest
    return None


def candidates(problem: Problem, with_kfac_jax: bool) -> dict[str, methods.Run]:
    runs: dict[str, methods.Run] = {}
    for name, make in makes(WIDEST).items():
        run = methods.OptaxRun(problem, make)
        runs[name] = run
        if name not in FACTORED or run.num_bytes() <= BUDGET * problem.num_params:
            continue
        widest = widest_within(problem, name)
        if widest is not None:
            narrow = makes(widest)[name]
            runs[f"{name}, widest={widest}"] = methods.OptaxRun(problem, narrow)
    if with_kfac_jax:
        runs[KFAC_JAX] = kfac_jax_method.KfacJaxRun(
            problem, methods.PERIOD, kfac_jax_method.NORM_CONSTRAINT
        )
    return runs


def compare(
    build: Callable[..., Problem],
    steps: int,
    rates: Sequence[float],
    rounds: int,
    with_kfac_jax: bool,
) -> list[dict[str, Any]]:
    """The numbers of one problem, a row a method."""
    each = [build(seed) for seed in SEEDS]
    first, grid = each[0], [Setting(rate, s) for rate in rates for s in SECOND]
    runs = candidates(first, with_kfac_jax)
    found: dict[str, list[Trained]] = {}
    for name, run in runs.items():
        began = time.process_time()
        try:
            best = training.tuned(first, run, grid, steps)
        except Exception as error:
            if name != KFAC_JAX:
                raise
            # another project's failure is a result
            print(f"   kfac-jax fails here: {type(error).__name__}: {error}\n"[:300])
            continue
        again = [training.tuned(p, run, [best.setting], steps) for p in each[1:]]
        found[name] = [best, *again]
        losses = ", ".join(_loss(trained.losses[-1]) for trained in found[name])
        took = time.process_time() - began
        print(f"   {name}: {losses} ({took:.0f} s of a processor)", flush=True)
    timed = training.with_times(
        first,
        {name: runs[name] for name in found},
        {name: trained[0] for name, trained in found.items()},
        rounds,
    )
    rows = []
    for name, seeds in found.items():
        pairs = zip(timed[name].seconds, timed[ADAMW].seconds, strict=True)
        ratios = [mine / theirs for mine, theirs in pairs]
        # by the ratio of pairs, which the load of the machine moves least
        in_time = min(steps, round(steps / statistics.median(ratios)))
        took = runs[name].num_bytes() / first.num_params
        row = {
            "method": name,
            "setting": seeds[0].setting._asdict(),
            "bytes": took,
            "fits": took <= BUDGET,
            "ratios": ratios,
            "steps_in_time": in_time,
            "at_steps": [trained.losses[-1] for trained in seeds],
            "at_seconds": [trained.loss_at(in_time) for trained in seeds],
        }
        rows.append(row)
    return rows


def print_rows(rows: list[dict[str, Any]], steps: int) -> None:
    header = (
        "",
        "rate",
        "second",
        "bytes",
        "x adamw (quartiles)",
        f"loss at {steps} steps (range)",
        "at equal seconds (range)",
        f"within {BUDGET} bytes",
    )
    lines = []
    for row in rows:
        low, middle, high = checkouts.quartiles(row["ratios"])
        ratio = f"{middle:.2f} ({low:.2f}-{high:.2f})"
        at_steps = _spread(row["at_steps"])
        lines.append(
            (
                row["method"],
                f"{row['setting']['learning_rate']:g}",
                f"{row['setting']['damping']:g}",
                f"{row['bytes']:.1f}",
                ratio,
                at_steps,
                _spread(row["at_seconds"]),
                at_steps if row["fits"] else "does not fit",
            )
        )
    print(f"\n{table(header, lines)}\n", flush=True)


def _spread(losses: list[float | None]) -> str:
    known = [loss for loss in losses if loss is not None]
    if len(known) < len(losses):
        return "before 10 steps"
    return f"{_loss(statistics.mean(known))} ({_loss(min(known))}-{_loss(max(known))})"


def _loss(value: float) -> str:
    return f"{value:.3g}" if value < 1 else f"{value:.4g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few steps and settings")
    parser.add_argument("--problems", nargs="*", choices=PROBLEMS, default=PROBLEMS)
    parser.add_argument("--json", type=Path, help="a file for the numbers")
    arguments = parsed(parser)
    if arguments is None:
        return
    threadpool_limits(1, user_api="blas")
    machine = describe_machine(("jax", "jaxlib", "optax"))
    with_kfac_jax, line = kfac_jax_state()
    print(
        f"{machine}\n{line}\nLAPACK on one thread; float32\n\n"
        "Bytes of state, the defaults, a tied table of "
        f"{VOCABULARY:,} tokens (from shapes):\n"
    )
    print_sizes()
    print(
        "The grid, the same for all methods: learning rates x a second number s, "
        f"{SECOND}: the damping of K-FAC, EK-FAC and kfac-jax; Adam's and SOAP's eps "
        "and Shampoo's damping are s^2; SGD's and "
        f"Muon's momentum is 1 - 2 sqrt(s).\n   Momentum {methods.MOMENTUM} otherwise; "
        f"curvature: decay {methods.DECAY}, one sampled label, factors every "
        f"{methods.PERIOD} steps (Shampoo and SOAP each step), inverses, roots and "
        f"bases every {methods.INVERSE_PERIOD}, max_kl {methods.MAX_KL}; Shampoo "
        "grafted to Adam.\n   Halving: all of the grid for "
        f"{training.STAGES[0][0]:g} of the steps, the best {training.STAGES[1][1]} for "
        f"{training.STAGES[1][0]:g}, the best {training.STAGES[2][1]} to the end.\n",
        flush=True,
    )
    numbers: dict[str, Any] = {"machine": machine}
    for name in list(arguments.problems)[: 1 if arguments.quick else None]:
        build, steps, rates = PROBLEMS[name]
        if arguments.quick:
            steps, rates = 20, rates[1:4:2]
        problem = build(0)
        print(
            f"{problem.name}: {problem.num_params:,} parameters, batches of "
            f"{problem.batch_size} of {problem.data[0].shape[0]}, {steps} steps, "
            f"learning rates {rates}, {training.floor(problem)}",
            flush=True,
        )
        rounds = 3 if arguments.quick else 5
        rows = compare(build, steps, rates, rounds, with_kfac_jax)
        print_rows(rows, steps)
        numbers[name] = rows
        if arguments.json:
            arguments.json.write_text(json.dumps(numbers, indent=1))
    print(f"{time.process_time():.0f} seconds of a processor in all.")


if __name__ == "__main__":
    main()
