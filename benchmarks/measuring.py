"""What the benchmarks share: the machine's description, timing side by side, tables."""

import argparse
import functools
import itertools
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import checkouts
import jax

# A call shorter than this is timed as the mean of several calls in a row.
_SHORTEST_SECONDS = 0.02

_tables = itertools.count(1)


def describe_machine(packages: Sequence[str]) -> str:
    """Cores, load, device and versions: what a reader needs to judge the times."""
    device = jax.devices()[0]
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    load = f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown"
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    return (
        f"machine: {platform.system()} {platform.machine()}, {cores} cores, "
        f"load average {load}\n"
        f"device:  {device.platform}, {device.device_kind}\n"
        f"python {platform.python_version()}, {versions}"
    )


class Timing(NamedTuple):
    """How long a function took, and what it returned."""

    first: float  # seconds of the first call, compilation included
    seconds: list[float]  # of each later round
    outputs: list[Any]  # of the first call and of each later round

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> str:
        return f"{seconds(min(self.seconds))}-{seconds(max(self.seconds))}"


def measure(
    functions: Mapping[str, Callable[[int], Any]],
    rounds: Mapping[str, int],
    *,
    shuffle: bool = False,
) -> dict[str, Timing]:
    """Times `function(round)` for all functions in turn, round by round.

    Taking turns spreads the noise of a shared machine over all of them; with `shuffle`,
    in another order each round, so that no function always follows a heavy one.
    """
    timings, place = {}, next(_tables)
    for name, function in functions.items():
        elapsed, output = _time(function, 0, 1)
        timings[name] = Timing(elapsed, [], [output])
    calls = {}
    for name, function in functions.items():
        elapsed, _ = _time(function, 0, 1) if rounds[name] > 3 else (1.0, None)
        calls[name] = max(1, min(1000, int(_SHORTEST_SECONDS / elapsed)))
    for number in range(1, max(rounds.values()) + 1):
        order = list(functions)
        if shuffle:
            random.Random(number).shuffle(order)
        for name in order:
            if number <= rounds[name]:
                elapsed, output = checkouts.timed(
                    (place, list(functions).index(name), str(name)),
                    functools.partial(_time, functions[name], number, calls[name]),
                )
                timings[name].seconds.append(elapsed)
                timings[name].outputs.append(output)
    return timings


def _time(function: Callable[[int], Any], number: int, calls: int) -> tuple[float, Any]:
    start = time.perf_counter()
    for _ in range(calls):
        output = jax.block_until_ready(function(number))
    return (time.perf_counter() - start) / calls, output


def seconds(value: float) -> str:
    """A duration to about three digits, with its unit."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value / 1e-6:.3g} us"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Plain text, the first column left and the others right aligned."""
    lines = [header, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]

    def text(line: Sequence[str]) -> str:
        cells = [line[0].ljust(widths[0])]
        cells += [c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True)]
        return "  ".join(cells).rstrip()

    rule = "-" * len(text(header).ljust(sum(widths) + 2 * (len(widths) - 1)))
    return "\n".join([text(header), rule, *map(text, rows)])


def parsed(parser: argparse.ArgumentParser) -> argparse.Namespace | None:
    """The options; None where another checkout is named, and its times are printed.

    Those of both, and their ratios pair by pair, for each row of each table.
    """
    parser.add_argument(
        "--other", type=Path, help="another checkout: times of both, and their ratios"
    )
    arguments = parser.parse_args()
    found = checkouts.compared(arguments.other)
    if found is None:
        return arguments
    print(describe_machine(("jax", "jaxlib")))
    print(
        f"here: {checkouts.HERE}, there: {arguments.other.resolve()}\n"
        "times: median (range); ratios, here over there, pair by pair: median "
        "(quartiles)\n"
    )
    rows = []
    for (place, name), pairs in found.items():
        cells = []
        for index in (0, 1):
            each = [pair[index][0] for pair in pairs]
            spread = f"{seconds(min(each))}-{seconds(max(each))}"
            cells.append(f"{seconds(statistics.median(each))} ({spread})")
        for kind in (0, 1):
            ratios = [here[kind] / max(there[kind], 1e-9) for here, there in pairs]
            low, middle, high = checkouts.quartiles(ratios)
            cells.append(f"{middle:.2f} ({low:.2f}-{high:.2f})")
        rows.append((f"{place}. {name}", *cells))
    print(table(("", "here", "there", "ratio", "of CPU time"), rows))
    return None
