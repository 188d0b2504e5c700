"""Posteriors and their calibration, beside laplax and laplace-torch in one run.

1. Predictions and evidences of the same parameters: equal, structure by structure.
2. Time and memory of a fit and of a prediction.
3. Calibrated probabilities against the mean alone: clean digits, and wrong labels.
4. Detection of what is out of distribution, before and after calibration.
5. 90 % intervals of regressions.

Needs the extra `benchmarks`; rows of peers also the extra `peers` (see there how):

    python benchmarks/uncertainty.py            # some minutes
    python benchmarks/uncertainty.py --quick    # under a minute
    python benchmarks/uncertainty.py --json uncertainty.json
"""

import argparse
import json
import time
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import laplace_calibration as calibrating
import laplace_memory
import numpy as np
from laplace_methods import (
    DIAGONAL,
    FULL,
    LAPLAX,
    OURS,
    STRUCTURES,
    TORCH,
    Method,
    installed,
    methods,
    ours_with_separate_biases,
)
from laplace_problem import Data, apply_fn, digits, maximise, start
from measuring import describe_machine, measure, seconds, table

LIBRARIES = (OURS, LAPLAX, TORCH)
SEPARATE = f"{OURS}, biases apart"
QUICK_STRUCTURES = tuple(name for name in STRUCTURES if name != FULL)


# ---- 1. the same numbers


def values_of(method: Method, data: Data) -> dict[str, float]:
    fitted = method.fit()
    inside, outside = (
        jnp.asarray(np.asarray(method.probabilities(fitted, rows)))
        for rows in (data.test[0], data.outside)
    )
    accuracy, nll, ece = calibrating.scores(inside, jnp.asarray(data.test[1]))
    return {
        "accuracy": accuracy,
        "NLL": nll,
        "ECE": ece,
        "AUROC": calibrating.detection(inside, outside),
        "log-evidence": method.log_evidence(fitted),
    }


def print_values(params: Any, data: Data, structures: tuple[str, ...]) -> list[dict]:
    """In float64, so that what differs is not rounding."""
    records, rows = [], []
    with jax.enable_x64(True):
        chances = [
            jax.nn.softmax(apply_fn(params, jnp.asarray(rows)))
            for rows in (data.test[0], data.outside)
        ]
        bare = calibrating.scores(chances[0], jnp.asarray(data.test[1]))
        bare = (*bare, calibrating.detection(*chances))
        rows.append((calibrating.BARE, "", *(f"{x:.4f}" for x in bare), "", ""))
        for structure in structures:
            found = {}
            for library in LIBRARIES:
                if library == LAPLAX and "Kronecker" in structure:
                    continue
                if not installed(library):
                    rows.append((structure, library, "not installed", *[""] * 5))
                    continue
                (method,) = (
                    m
                    for m in methods(params, data, library)
                    if m.structure == structure
                )
                found[library] = values_of(method, data)
            if "Kronecker" in structure:
                method = ours_with_separate_biases(params, data, structure)
                found[SEPARATE] = values_of(method, data)
            reference = found[SEPARATE if "Kronecker" in structure else OURS]
            for library, values in found.items():
                peer = library in (LAPLAX, TORCH)
                gap = max(abs(values[key] / reference[key] - 1) for key in reference)
                digits4 = [f"{values[key]:.4f}" for key in list(values)[:-1]]
                equal = f"{gap:.0e}" if peer else ""
                evidence = f"{values['log-evidence']:.2f}"
                rows.append((structure, library, *digits4, evidence, equal))
                record = {"structure": structure, "library": library, **values}
                records.append(record | ({"largest_gap": gap} if peer else {}))
    header = ("", "library", *list(reference), "differs")
    print(table(header, rows), "\n")
    return records


# ---- 2. time and memory


def print_times(params: Any, data: Data, structures: tuple, rounds: int) -> list[dict]:
    """In float32. Rounds are interleaved; the first call compiles and is not one."""
    records: list[dict] = []
    rows: list[tuple] = []
    verdicts: list[str] = []
    for structure in structures:
        found = [
            method
            for library in LIBRARIES
            if installed(library)
            for method in methods(params, data, library)
            if method.structure == structure
        ]
        fitted = {method.library: method.fit() for method in found}

        def fit(method: Method):
            return lambda _: _ready(method.fit())

        def predict(method: Method, fitted=fitted):
            return lambda _: _ready(
                method.probabilities(fitted[method.library], data.test[0])
            )

        for what, timed in (("fit", fit), ("predict", predict)):
            counts = dict.fromkeys(fitted, rounds)
            timings = measure({m.library: timed(m) for m in found}, counts)
            for library, timing in timings.items():
                rows.append(
                    (
                        structure,
                        what,
                        library,
                        seconds(timing.median),
                        timing.spread,
                        seconds(max(timing.first - timing.median, 0)),
                    )
                )
                records.append(
                    {
                        "structure": structure,
                        "what": what,
                        "library": library,
                        "seconds": timing.seconds,
                        "first": timing.first,
                    }
                )
            fastest = {name: min(timing.seconds) for name, timing in timings.items()}
            verdicts += _verdicts(structure, what, fastest)
    header = ("", "", "library", "median", "range", "first call's more")
    print(table(header, rows), "\n")
    print("\n".join(verdicts) or "no peer is installed, no ratio", "\n")
    return records


def _ready(value: Any) -> None:
    leaves = jax.tree.leaves(value)
    jax.block_until_ready([leaf for leaf in leaves if isinstance(leaf, jax.Array)])


def _verdicts(structure: str, what: str, fastest: dict[str, float]) -> list[str]:
    """Ratios of fastest rounds, since other work on the machine only adds to a time."""
    lines = []
    for library, time_of_peer in fastest.items():
        if library == OURS:
            continue
        wanted = {(DIAGONAL, "fit"): 5.0, (FULL, "fit"): 2.0}.get((structure, what))
        wanted = wanted if library == LAPLAX else None
        wanted = 1.0 if what == "predict" else wanted
        ratio = time_of_peer / fastest[OURS]
        verdict = ""
        if wanted is not None:
            met = "met" if ratio >= wanted else "missed"
            verdict = f" (target {wanted:g}x: {met})"
        lines.append(f"{structure}, {what}: {ratio:.1f}x as fast as {library}{verdict}")
    return lines


def print_memory(structures: tuple[str, ...]) -> list[dict]:
    """Peak of a fit and a prediction of 360 rows, above what the process held."""
    records, rows = [], []
    for structure in structures:
        cells = []
        for library in LIBRARIES:
            if library == LAPLAX and "Kronecker" in structure:
                cells.append("-")
                continue
            if not installed(library):
                cells.append("not installed")
                continue
            peak = laplace_memory.measure(library, structure)
            cells.append("not measured" if peak is None else f"{peak:.0f} MiB")
            record = {"structure": structure, "library": library, "mebibytes": peak}
            records.append(record)
        rows.append((structure, *cells))
    print(table(("", *LIBRARIES), rows), "\n")
    return records


def print_wide() -> list[dict]:
    """The last layer of many classes; peers would form its Jacobian."""
    records, rows = [], []
    for structure in laplace_memory.WIDE_STRUCTURES:
        fit, predict = laplace_memory.wide_last_layer(structure)
        verdict = "met" if max(fit, predict) * 2**20 < 100e6 else "missed"
        rows.append((structure, f"{fit:.0f} MiB", f"{predict:.0f} MiB", verdict))
        records.append(
            {
                "structure": f"last layer, 3,000 classes: {structure}",
                "library": OURS,
                "mebibytes": max(fit, predict),
            }
        )
    head = ("last layer, 3,000 classes", "fit", "predict 100", "under 100 MB")
    print(table(head, rows))
    jacobian = 100 * 3000 * 65 * 3000 * 4 / 2**30
    print(f"   the Jacobian of 100 rows' logits alone would be {jacobian:,.0f} GiB\n")
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer rows and rounds")
    parser.add_argument("--json", type=Path, help="a file for the numbers")
    arguments = parser.parse_args()
    quick = arguments.quick
    warnings.filterwarnings("ignore", module="(laplax|laplace|torch|curvlinops)")
    began = time.perf_counter()
    machine = describe_machine(("jax", "jaxlib", "numpy", "scikit-learn"))
    print(machine, "\n")
    data = digits()
    params, slope = maximise(start(), data.train)
    structures = QUICK_STRUCTURES if quick else STRUCTURES
    print(
        "digits, 64-50-10 tanh, 1437 images to train on and 360 to test, prior "
        f"precision 1,\nmaximum a posteriori to a gradient of {slope:.0e}; linearised, "
        "probit\n(3: averaged as ff.predict and ff.calibrate do by default).\n"
        "AUROC: entropy, test images against the same with their pixels permuted.\n"
    )
    print("1. The same parameters, three libraries, float64\n")
    found: dict[str, Any] = {"machine": machine}
    found["values"] = print_values(params, data, structures)
    print(
        "   differs: the largest relative difference of the five numbers. Here a "
        "layer's bias is a row of its\n   kernel and shares its factors; laplace-torch "
        "gives it a block of its own: the row with biases\n   apart does so too, and "
        "that is what laplace-torch is compared with.\n"
    )
    print("2. Time in float32, and memory\n")
    found["times"] = print_times(params, data, structures, 1 if quick else 5)
    if not quick:
        found["memory"] = print_memory(structures)
        found["memory"] += print_wide()
    seeds = range(1 if quick else 4)
    print("3. Calibrated on 100 held-out examples: clean digits\n")
    found["clean"] = calibrating.print_scores(
        [calibrating.clean(data, seed) for seed in seeds]
    )
    print(
        "   300 examples, a fifth of the labels wrong, trained by Adam without decay\n"
    )
    found["noisy"] = calibrating.print_scores(
        [calibrating.noisy(data, seed) for seed in seeds]
    )
    print("4. Out of distribution: AUROC of the entropy, several permutations\n")
    found["detection"] = calibrating.detect(params, data, 2 if quick else 10)
    calibrating.print_detection(found["detection"])
    print(
        "   The prior that training used makes probabilities far too unsure (table 1: "
        "ECE), and ranks\n   strange inputs best. Calibration repairs the "
        "probabilities and gives the better ranking back.\n"
    )
    print("5. 90 % intervals, scale and noise found on a fifth of the rows\n")
    for name in ("diabetes", "friedman1"):
        print(f"   {name}\n")
        found[name] = calibrating.print_intervals(
            [calibrating.intervals(name, seed) for seed in range(2 if quick else 20)]
        )
    print(describe_machine(("jax",)).splitlines()[0] + " at the end")
    print(f"{time.perf_counter() - began:.0f} seconds in all.")
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
