"""What each estimator of the Fisher diagonal costs, and how far from it one call ends.

For a dense network, a convolutional one and a transformer: time beside a plain gradient
in the same run, error at equal passes before and after training. Then per-example
squares beside the ways of others. Needs the extra `benchmarks`, and PyTorch for its
rows of the last table:

    python benchmarks/estimators.py            # some minutes
    python benchmarks/estimators.py --quick    # fewer rounds, no slow rows
    python benchmarks/estimators.py --json estimators.json
"""

import argparse
import functools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import classifiers
import jax
import numpy as np
import per_example
from classifiers import CATEGORICAL, Classifier
from measuring import describe_machine, measure, parsed, seconds, table

import fisherflow_jax as ff

GRADIENT = "gradient"
EXACT = "exact"
ONE_PASS = 1.2  # targets, over a gradient
PER_EXAMPLE = 1.5
EXACT_TEN_CLASSES = 9.0

MODELS = (
    # with the steps of Adam after which they are sure of their labels
    (classifiers.mlp, 12),
    (classifiers.cnn, 60),
    (classifiers.transformer, 15),
)


def estimators(apply_fn: Callable) -> dict[str, ff.estimators.Estimator]:
    """Every estimator of this table with the diagonal structure, by its name."""
    kinds, roots = ff.estimators, ff.likelihoods
    cholesky = roots.cholesky_root
    rank2 = functools.partial(kinds.hutchinson_rankk, k=2)
    factories: dict[str, tuple[Callable, dict[str, Any]]] = {
        EXACT: (kinds.exact, {}),
        "hutchinson": (kinds.hutchinson, {}),
        "hutchinson, Gaussian": (kinds.hutchinson, {"probe": kinds.gaussian}),
        "hutchinson, Cholesky root": (kinds.hutchinson, {"root": cholesky}),
        "hutchinson_dg": (kinds.hutchinson_dg, {}),
        "hutchinson_rank1": (kinds.hutchinson_rank1, {}),
        "hutchinson_rankk, k=2": (rank2, {}),
        "hutchinson_rankk, 30 steps": (rank2, {"num_iterations": 30}),
        "hutchinson, 8 groups": (kinds.hutchinson, {"groups": 8}),
        "hutchinson, 32 groups": (kinds.hutchinson, {"groups": 32}),
        "hutchinson, per example": (kinds.hutchinson, {"groups": None}),
        "  with the Cholesky root": (
            kinds.hutchinson,
            {"groups": None, "root": cholesky},
        ),
        "monte_carlo, whole batch": (kinds.monte_carlo, {"groups": 1}),
        "monte_carlo, per example": (kinds.monte_carlo, {}),
        "empirical, random signs": (kinds.empirical, {"groups": 1}),
        "empirical, per example": (kinds.empirical, {}),
    }
    structure = ff.structures.diagonal()
    return {
        name: factory(apply_fn, CATEGORICAL, structure, **options)
        for name, (factory, options) in factories.items()
    }


def targets(model: Classifier) -> dict[str, float]:
    """The most that a call may take, over a gradient."""
    dense = model.name.startswith("MLP")
    limits = {}
    for name, estimator in estimators(model.apply_fn).items():
        one_batch = "per example" not in name and "groups" not in name
        if estimator.name.startswith("hutchinson") and one_batch and name[0] != " ":
            limits[name] = ONE_PASS
    if dense:
        for name in ("hutchinson, per example", "empirical, per example"):
            limits[name] = PER_EXAMPLE
        limits[EXACT] = EXACT_TEN_CLASSES
    return limits


Compiled = Callable[[Any, tuple, jax.Array], Any]


def compiled(model: Classifier) -> dict[str, Compiled]:
    """A gradient of the batch and every estimator; parameters and data as arguments."""
    loss = ff.negative_log_likelihood(model.apply_fn, CATEGORICAL)
    functions = {
        GRADIENT: jax.jit(lambda params, batch, key: jax.grad(loss)(params, batch))
    }
    for name, estimator in estimators(model.apply_fn).items():
        if estimator.random:
            functions[name] = jax.jit(estimator)
        else:

            def without_key(params: Any, batch: tuple, key: Any, call=estimator):
                return call(params, batch)

            functions[name] = jax.jit(without_key)
    return functions


# --- time ---


def times(
    model: Classifier, functions: dict[str, Compiled], rounds: int
) -> list[dict[str, Any]]:
    """Prints the table of times; returns it as records."""
    keys = jax.random.split(jax.random.key(0), rounds + 1)

    def timed(function: Compiled) -> Callable[[int], None]:
        def call(number: int) -> None:
            jax.block_until_ready(function(model.params, model.batch, keys[number]))

        return call

    calls = {name: timed(function) for name, function in functions.items()}
    timings = measure(calls, dict.fromkeys(calls, rounds), shuffle=True)
    limits = targets(model)
    plain = timings[GRADIENT]
    records, rows = [], []
    for name, timing in timings.items():
        fastest = min(timing.seconds) / min(plain.seconds)
        middle = statistics.median(
            mine / gradient
            for mine, gradient in zip(timing.seconds, plain.seconds, strict=True)
        )
        limit = limits.get(name)
        verdict = "met" if limit and fastest <= limit else "missed"
        cells = (f"<= {limit:g}x", verdict) if limit else ("", "")
        rows.append(
            (
                name,
                seconds(timing.median),
                timing.spread,
                seconds(timing.first),
                f"{fastest:.2f}x",
                f"{middle:.2f}x",
                *cells,
            )
        )
        records.append(
            {
                "model": model.name,
                "estimator": name,
                "seconds": timing.seconds,
                "first": timing.first,
                "fastest_over_gradient": fastest,
                "median_over_gradient": middle,
                "target": limit,
                "met": fastest <= limit if limit else None,
            }
        )
    header = ("", "median", "range", "first call", "x gradient", "by round")
    print(table((*header, "target", ""), rows), "\n")
    return records


# --- error ---


def errors(
    model: Classifier, functions: dict[str, Compiled], num_blocks: int
) -> dict[str, dict[str, float]]:
    """For each estimator its errors against `exact`, relative to the sum of that.

    `one`: of one call. `equal`: of as many calls as `exact` takes passes, averaged.
    `bias`: the mean call's sum over the exact sum.
    """
    passes = model.num_classes - 1
    keys = jax.random.split(jax.random.key(1), num_blocks * passes)

    def entries(name: str, key: jax.Array) -> np.ndarray:
        information = functions[name](model.params, model.batch, key)
        leaves = jax.tree.leaves(information)
        return np.concatenate([np.ravel(leaf) for leaf in leaves]).astype(float)

    truth = entries(EXACT, keys[0])

    def distance(estimate: np.ndarray) -> float:
        return float(np.sum(np.abs(estimate - truth)) / np.sum(truth))

    found = {}
    random = {n: e.random for n, e in estimators(model.apply_fn).items()}
    for name in functions:
        if name in (GRADIENT, EXACT):
            continue
        one, equal, sums = [], [], []
        for block in (
            keys.reshape(num_blocks, passes) if random[name] else keys[None, :1]
        ):
            mean = np.zeros_like(truth)
            for key in block:
                draw = entries(name, key)
                one.append(distance(draw))
                sums.append(float(np.sum(draw) / np.sum(truth)))
                mean += draw / len(block)
            equal.append(distance(mean))
        found[name] = {
            "one": statistics.mean(one),
            "equal": statistics.mean(equal),
            "bias": statistics.mean(sums),
        }
    return found


def print_errors(
    model: Classifier, functions: dict[str, Compiled], steps: int, num_blocks: int
) -> list[dict[str, Any]]:
    """Prints errors at the first parameters and after training; returns records."""
    after = classifiers.trained(model, steps, 1e-3)
    stages = {"at the start": model, f"after {steps} steps of Adam": after}
    records, columns = [], []
    passes = model.num_classes - 1
    for stage, version in stages.items():
        accuracy, sure = classifiers.confidence(version)
        print(
            f"   {stage}: accuracy {accuracy:.0%}, mean probability of the likeliest "
            f"class {sure:.3f}"
        )
        columns.append(errors(version, functions, num_blocks))
    rows = []
    for name in columns[0]:
        cells = []
        for stage, column in zip(stages, columns, strict=True):
            found = column[name]
            cells += [f"{found[kind]:.3g}" for kind in ("one", "equal", "bias")]
            records.append({"model": model.name, "stage": stage, "estimator": name})
            records[-1] |= found
        rows.append((name, *cells))
    kinds = ("error, 1 pass", f"{passes} passes", "sum")
    header = ("", *kinds, *(f"trained: {kind}" for kind in kinds))
    print()
    print(table(header, rows), "\n")
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--json", type=Path, help="a file for the numbers")
    arguments = parsed(parser)
    if arguments is None:
        return
    quick = arguments.quick
    began = time.perf_counter()
    machine = describe_machine(("jax", "jaxlib", "numpy"))
    print(machine, "\n")
    print(
        "float32, diagonal structure, one probe or label an example, rounds "
        "interleaved.\n"
        "   x gradient: fastest round over the gradient's fastest, by which targets "
        "are judged: other work on the machine only adds to a time\n"
        "   by round: the median over rounds of the ratio within a round\n"
        "   error: sum |estimate - exact| / sum exact, of one call and of the mean of "
        "as many calls as exact takes passes; sum: sum of estimates over the exact "
        "sum\n"
        "   hutchinson_sqrt is hutchinson under another name\n"
    )
    found: dict[str, Any] = {"machine": machine, "times": [], "errors": []}
    for number, (build, steps) in enumerate(MODELS, 1):
        model = build()
        rows = model.batch[0].shape[0]
        print(
            f"{number}. {model.name}: {model.num_params:,} parameters, a batch of "
            f"{rows}, {model.num_classes} classes\n"
        )
        functions = compiled(model)
        found["times"] += times(model, functions, 5 if quick else 15)
        blocks = 1 if quick else 2 if model.num_classes > 3 else 6
        found["errors"] += print_errors(model, functions, steps, blocks)
    print(f"{len(MODELS) + 1}. Per-example squares of the MLP, by other ways\n")
    found["per_example"] = per_example.compare(classifiers.mlp(), quick)
    judged = [record for record in found["times"] if record["target"]]
    met = sum(record["met"] for record in judged)
    print(f"{met} of {len(judged)} targets met.")
    for record in judged:
        if not record["met"]:
            print(
                f"   missed: {record['model']}, {record['estimator']}: "
                f"{record['fastest_over_gradient']:.2f}x, target {record['target']:g}x"
            )
    print(describe_machine(("jax",)).splitlines()[0] + " at the end")
    print(f"{time.perf_counter() - began:.0f} seconds in all.")
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
