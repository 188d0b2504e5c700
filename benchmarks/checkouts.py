"""The same benchmark over two checkouts of the package, in one run and by turns.

    git worktree add ../before COMMIT
    python benchmarks/kfac.py --quick --other ../before

runs the script twice at once, with the package of each checkout. What
`measuring.measure` times is timed in one while the other waits.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parents[1]
REPEATS, SHORT = 3, 1.0  # times a round, while they take less than so many seconds
_REPORTS = "BENCHMARK_REPORTS"  # the file descriptor that a run writes to


def timed(name: tuple, function: Callable[[], tuple[float, Any]]) -> tuple[float, Any]:
    """`function()`, seconds first; of two runs, as often as it is told to.

    `name` is (table, row, title).
    """
    if _REPORTS not in os.environ:
        return function()
    _say(name)
    while sys.stdin.readline() == "go\n":
        wall, cpu = time.perf_counter(), time.process_time()
        result = function()
        busy = (time.process_time() - cpu) / (time.perf_counter() - wall)
        _say((result[0], busy * result[0]))
    return result


def _say(what: Any) -> None:
    os.write(int(os.environ[_REPORTS]), f"{json.dumps(what)}\n".encode())


class _Run:
    """A run of this script with the package of a checkout."""

    def __init__(self, checkout: Path) -> None:
        reading, writing = os.pipe()
        self._reports = os.fdopen(reading)
        self._process = subprocess.Popen(
            [sys.executable, *sys.argv],
            env={**os.environ, "PYTHONPATH": str(checkout), _REPORTS: str(writing)},
            pass_fds=[writing],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        os.close(writing)

    def tell(self, word: str) -> None:
        print(word, file=self._process.stdin, flush=True)

    def hear(self) -> Any:
        """What it says next; None at its end."""
        line = self._reports.readline()
        if not line and self._process.wait():
            raise SystemExit("one of the two runs failed")
        return json.loads(line) if line else None


def compared(other: Path | None) -> dict[tuple, list] | None:
    """Of each row the pairs of (seconds, CPU seconds), here and there.

    None without another checkout, and within the two runs.
    """
    if other is None or _REPORTS in os.environ:
        return None
    runs = [_Run(HERE), _Run(other.resolve())]
    found: dict[tuple, list] = {}
    while True:
        # a row may have another name there, but not another place
        here, there = [run.hear() for run in runs]
        if here is None or there is None or here[:2] != there[:2]:
            if here != there:
                print(f"ended early: here {here} is timed, there {there}")
            return found
        pairs = found.setdefault((here[0], here[2]), [])
        taken = 0.0
        for _ in range(REPEATS):
            pair: list[Any] = [None, None]
            for index in (0, 1) if len(pairs) % 2 else (1, 0):
                runs[index].tell("go")
                pair[index] = runs[index].hear()
            pairs.append(pair)
            taken += pair[0][0] + pair[1][0]
            if taken > SHORT:
                break
        for run in runs:
            run.tell("on")


def quartiles(values: list[float]) -> tuple[float, float, float]:
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high
