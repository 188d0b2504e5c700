"""Optimisers, posteriors and Fisher Flow on classes: quality, calibration, cost.

    python benchmarks/tables.py                     # all data sets: about an hour
    python benchmarks/tables.py --data digits
    python benchmarks/tables.py --quick             # a small part, under a minute
    python benchmarks/tables.py --file covtype.csv --rows 20000 --width 8

Three data sets that ship with packages (image segments: `pip install --no-deps river`),
or a file: CSV with a header and the class last, or an npz of `x` and `y`. One network a
data set, one hidden layer of tanh. Each seed draws a split, a start and the orders of
the batches. Each method has one knob, of five values: that of the least NLL on the
validation rows, mean of the first three seeds. Then the test rows, as they are and
shifted: as trained, and calibrated on each seed's validation rows, by `ff.calibrate`
where there is a posterior, else by one temperature. Posteriors average by probit, or
with `--quadrature` as `ff.predict` does unasked, at many times the cost. Means over
seeds, in brackets their standard errors; differences are taken seed by seed. ECE: 15
bins of equal mass. Seconds are of one fit, the median of all but the first, which
compiles. "diverged": fits of the grid whose validation NLL is no number.
"""

import argparse
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tables_data as data
from measuring import describe_machine, seconds, table
from tables_methods import ADAM
from tables_running import Found, Programs, methods, run

import fisherflow_jax as ff

METRICS = "accuracy", "NLL", "ECE", "Brier"
COOLED = "temperature scaling of Adam"
TABLES: dict[str, tuple[Callable[[int], data.Table], int]] = {
    "digits": (data.digits, 4),
    "segments": (data.segments, 8),
    "cancer": (data.cancer, 8),
}
BUDGETS = {1: "one pass", 30: "thirty passes"}
QUICK = (ADAM, "Fisher Flow, diagonal", "Laplace, diagonal")


def mean_and_error(values: np.ndarray, sign: str = "") -> str:
    """To three digits, without the zero before the point."""
    finite = np.isfinite(values)
    if not finite.all():
        return f"{len(values) - finite.sum()} of {len(values)} none"
    error = values.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else np.nan
    mean, error = f"{values.mean():{sign}.3f}", f"{error:.3f}".removeprefix("0")
    return f"{mean.replace('0.', '.', 1) if abs(values.mean()) < 1 else mean} ({error})"


def print_scores(found: dict[str, Found], test: str) -> None:
    rows = []
    for name, each in found.items():
        cells = [mean_and_error(x) for x in each.trained[test].T]
        better = [mean_and_error(x) for x in each.calibrated[test].T]
        rows.append((name, *cells, *better))
        if name == ADAM:
            rows.append((COOLED, *[""] * len(METRICS), *better))
    print(table(("as trained, then calibrated", *METRICS, *METRICS), rows), "\n")


def print_differences(found: dict[str, Found], test: str) -> None:
    """From Adam as trained, and from Adam with its temperature."""
    rows, adam = [], found[ADAM]
    for name, each in found.items():
        gains = each.trained[test] - adam.trained[test]
        better = each.calibrated[test] - adam.calibrated[test]
        if name == ADAM:
            gain = adam.calibrated[test] - adam.trained[test]
            cells = [mean_and_error(x, "+") for x in gain.T]
            rows.append((COOLED, *cells, *[""] * len(METRICS)))
            continue
        cells = [mean_and_error(x, "+") for gain in (gains, better) for x in gain.T]
        rows.append((name, *cells))
    print(table(("less Adam's, seed by seed", *METRICS, *METRICS), rows), "\n")


def print_costs(programs: dict[str, Programs], found: dict[str, Found]) -> None:
    rows = []
    for name, each in found.items():
        grid = programs[name].method.grid
        end = len(grid) > 1 and each.knob in (grid[0], grid[-1])
        median = statistics.median(each.fits[1:] or each.fits)
        rows.append(
            (
                name,
                programs[name].method.knob,
                ", ".join(f"{value:g}" for value in grid),
                f"{each.knob:g}{' (end)' if end else ''}",
                str(each.failed),
                str(each.no_temperature) if not programs[name].calibrate else "",
                seconds(median),
                seconds(max(each.fits[0] - median, 0.0)),
                seconds(statistics.median(each.predictions[1:] or each.predictions)),
                f"{each.num_bytes[0]:,}",
                f"{each.num_bytes[1]:,}",
            )
        )
    header = (
        "",
        "knob",
        "grid",
        "chosen",
        "diverged",
        "no temperature",
        "fit",
        "first, more",
        "predict",
        "bytes in training",
        "to predict",
    )
    print(table(header, rows), "\n")


def compare(
    name: str,
    some: data.Table,
    num_seeds: int,
    budgets: dict[int, str],
    link: Any,
    left_out: Callable[[str], bool],
) -> dict:
    """Prints a data set's tables for each budget, and returns its numbers."""
    splits = data.splits(some, num_seeds)
    first = data.of_seed(splits, 0)
    num_params = sum(leaf.size for leaf in jax.tree.leaves(first.params))
    print(
        f"==== {name}: {'-'.join(map(str, some.sizes))}, {num_params} parameters; "
        f"{len(first.train[1])} rows train,\n{len(first.validation[1])} validate, "
        f"{len(first.labels)} test; {num_seeds} seeds\n"
    )
    compiled: dict[str, Programs] = {}
    numbers: dict[str, Any] = {}
    for num_passes, told in budgets.items():
        found: dict[str, Found] = {}
        for method in methods(first, num_passes, link):
            if left_out(method.name):
                continue
            begun = time.perf_counter()
            if "Flow" in method.name or method.name not in compiled:
                compiled[method.name] = Programs(method)
            rate = found[ADAM].knob if method.after_adam else None
            found[method.name] = run(compiled[method.name], splits, rate, num_passes)
            progress(f"{name}, {told}, {method.name}", begun)
        print(f"== {name}, {told}, test rows\n")
        print_scores(found, "test")
        print_differences(found, "test")
        for shift in some.shifts:
            print(f"== {name}, {told}, {shift}\n")
            print_scores(found, shift)
            print_differences(found, shift)
        print(f"== {name}, {told}, cost\n")
        print_costs(compiled, found)
        numbers[told] = {key: value._asdict() for key, value in found.items()}
    return numbers


def progress(what: str, begun: float) -> None:
    print(f"{what}: {time.perf_counter() - begun:.0f} s", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", nargs="*", choices=TABLES, default=list(TABLES))
    parser.add_argument("--file", type=Path, help="CSV or npz, in place of these")
    parser.add_argument("--rows", type=int, help="of the data, drawn at random")
    parser.add_argument("--width", type=int, help="of the hidden layer")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--without", nargs="*", default=[], help="parts of names")
    parser.add_argument("--quadrature", action="store_true", help="see above")
    parser.add_argument("--quick", action="store_true", help="cancer, a few methods")
    parser.add_argument("--json", type=Path, help="a file for the numbers")
    arguments = parser.parse_args()
    begun = time.perf_counter()
    print(describe_machine(("jax", "jaxlib", "numpy", "optax", "scikit-learn")), "\n")
    num_seeds = 2 if arguments.quick else arguments.seeds
    budgets = {1: BUDGETS[1]} if arguments.quick else BUDGETS

    def left_out(name: str) -> bool:
        if arguments.quick and name not in QUICK:
            return True
        return any(part in name for part in arguments.without)

    link = None if arguments.quadrature else ff.predictions.probit()
    numbers, path = {}, arguments.file
    if path:
        chosen = {path.stem: (functools.partial(data.from_file, path), 8)}
    else:
        names = ["cancer"] if arguments.quick else arguments.data
        chosen = {name: TABLES[name] for name in names}
    for name, (make, width) in chosen.items():
        some = data.thinned(make(arguments.width or width), arguments.rows)
        numbers[name] = compare(name, some, num_seeds, budgets, link, left_out)
    if arguments.json:
        arguments.json.write_text(json.dumps(numbers, default=_listed))
    print(f"{time.perf_counter() - begun:.0f} seconds in all")


def _listed(value: Any) -> Any:
    return np.asarray(value).tolist()


if __name__ == "__main__":
    main()
