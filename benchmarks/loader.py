"""How long the device waits for a stream, and a stream from a file beside memory.

One: a loader that takes about as long as an update, by turns with a plain loop (eager
`flow.update`), a jitted loop that waits for each batch, and `ff.run`: the share of the
time in which the device has nothing to do. Two: rows from a memory-mapped file through
`ff.run`, by turns with one `jax.lax.scan` over the same rows in memory.

    python benchmarks/loader.py            # ten million rows, a few minutes
    python benchmarks/loader.py --quick    # a million
"""

import argparse
import functools
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from measuring import describe_machine, measure, seconds, table

import fisherflow_jax as ff

DIMENSION = 20
TARGET = 1.3  # times one scan in memory


def logistic(**options: Any) -> ff.FisherFlow:
    return ff.fisher_flow(
        lambda params, x: x @ params, ff.likelihoods.bernoulli(), **options
    )


# --- one: the device's waiting ---


def network(params: dict, x: jax.Array) -> jax.Array:
    hidden = jnp.tanh(jnp.tanh(x @ params["a"]) @ params["b"])
    return hidden @ params["c"]


class Slow:
    """A loader that takes a while over each batch, as one that reads and decodes."""

    def __init__(self, batch: tuple, count: int, pause: float) -> None:
        self.batch, self.count, self.pause = batch, count, pause

    def __iter__(self) -> Iterator[tuple]:
        for _ in range(self.count):
            time.sleep(self.pause)
            yield self.batch

    def __len__(self) -> int:
        return self.count


def waiting(quick: bool) -> None:
    """Prints the share of a stream's time in which the device does nothing."""
    width, rows, count = (256, 512, 20) if quick else (512, 1024, 40)
    rng = np.random.default_rng(0)
    sizes = {"a": (64, width), "b": (width, width), "c": (width, 10)}
    params = {
        name: (rng.normal(size=size) / size[0] ** 0.5).astype(np.float32)
        for name, size in sizes.items()
    }
    batch = (
        rng.normal(size=(rows, 64)).astype(np.float32),
        rng.integers(0, 10, rows),
    )
    flow = ff.fisher_flow(
        network,
        ff.likelihoods.categorical(),
        structure=ff.structures.diagonal(),
        estimator=ff.estimators.hutchinson,
        num_steps=1,
    )
    jitted = jax.jit(flow.update)

    def loop(update: Callable, wait: bool, loader: Any) -> Any:
        state = flow.init(params, key=0)
        for item in loader:
            state, _ = update(state, item)
            if wait:
                jax.block_until_ready(state)
        return jax.block_until_ready(state)

    here = jax.device_put(batch)
    alone = measure(
        {"alone": lambda _: loop(jitted, False, [here] * count)},
        {"alone": 5},
    )["alone"]
    update = alone.median / count
    table_rows = []
    for share in (0.5, 1.0, 2.0):
        loader = Slow(batch, count, share * update)
        methods = {
            "alone": lambda _: loop(jitted, False, [here] * count),
            "plain loop over flow.update": lambda _, x=loader: loop(
                flow.update, False, x
            ),
            "jitted, each batch awaited": lambda _, x=loader: loop(jitted, True, x),
            "ff.run": lambda _, x=loader: jax.block_until_ready(
                ff.run(flow, flow.init(params, key=0), x, progress=False)
            ),
        }
        timings = measure(methods, dict.fromkeys(methods, 3 if quick else 5))
        busy = np.array(timings.pop("alone").seconds)
        least = np.maximum(busy, count * loader.pause)
        for name, timing in timings.items():
            took = np.array(timing.seconds)
            table_rows.append(
                (
                    f"{share:g} x an update",
                    name,
                    seconds(timing.median),
                    timing.spread,
                    f"{max(np.median(1 - busy / took), 0):.0%}",
                    f"{max(np.median(1 - busy / least), 0):.0%}",
                    f"{np.median(took / least):.2f}",
                )
            )
    print(
        f"1. {count} batches of a network ({width} wide, {rows} rows), an update of "
        f"{seconds(update)}; a loader that sleeps\n"
        "   waits: the share of the time beyond that of the updates alone, by turns; "
        "least: whichever of\n   loader and updates takes longer, and the share that "
        "the device waits then\n"
    )
    header = ("loader", "loop", "median", "range", "waits", "least", "time / least")
    print(table(header, table_rows), "\n")


# --- two: from a file ---


def write(folder: Path, count: int) -> None:
    """`count` rows of a logistic regression in two files, a piece at a time."""
    shape = count, DIMENSION
    x = np.lib.format.open_memmap(folder / "x.npy", "w+", np.float32, shape)
    y = np.lib.format.open_memmap(folder / "y.npy", "w+", np.float32, shape[:1])
    rng = np.random.default_rng(0)
    slopes = rng.normal(size=DIMENSION).astype(np.float32)
    for start in range(0, count, 1_000_000):
        piece = slice(start, min(start + 1_000_000, count))
        x[piece] = rng.standard_normal(x[piece].shape, np.float32)
        chance = 1 / (1 + np.exp(-x[piece] @ slopes / DIMENSION**0.5))
        y[piece] = rng.random(len(chance)) < chance
    x.flush()
    y.flush()


def from_file(quick: bool) -> None:
    """Prints the times of a stream from a file and of a scan in memory, by turns."""
    count = 1_000_000 if quick else 10_000_000
    rows: list[tuple] = []
    ratios: dict[str, tuple] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder, count)
        x, y = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in "xy")
        for steps in (1, 10):
            flow = logistic(num_steps=steps)
            for size in (1_000, 10_000, 100_000):
                row, took, ratio = pair(flow, x, y, size, f"{steps}", 3 if quick else 5)
                rows.append(row)
                own = f"steps {steps}"
                ratios[own] = min(ratios.get(own, (np.inf,)), (took, size, ratio))
    print(
        f"2. {count:,} rows at d = {DIMENSION} in float32, a full flow: from a "
        "memory-mapped file by ff.run, and by a\n   scan over the same rows in memory, "
        "by turns; ratio: the median of the rounds'\n"
    )
    header = ("steps", "rows", "ff.run", "range", "scan", "range", "rows/s", "ratio")
    print(table(header, rows), "\n")
    for own, (_, size, ratio) in ratios.items():
        met = "met   " if ratio <= TARGET else "missed"
        print(
            f"{met}  {own}, ff.run's fastest batch ({size:,} rows): {ratio:.2f} times "
            f"the scan of the same batches (at most {TARGET:g})"
        )


def pair(
    flow: ff.FisherFlow, x: Any, y: Any, size: int, steps: str, rounds: int
) -> tuple[tuple, float, float]:
    parts = x.reshape((-1, size, DIMENSION)), y.reshape((-1, size))
    held = tuple(jnp.asarray(np.array(part)) for part in parts)
    scan = jax.jit(functools.partial(jax.lax.scan, flow.update))
    start = flow.init(np.zeros(DIMENSION, np.float32))
    methods = {
        "run": lambda _: ff.run(flow, start, ff.Stacked(*parts), progress=False),
        "scan": lambda _: scan(start, held)[0],
    }
    timings = measure(methods, dict.fromkeys(methods, rounds))
    run, one = timings["run"], timings["scan"]
    ratios = np.array(run.seconds) / np.array(one.seconds)
    apart = np.abs(run.outputs[0].mean - one.outputs[0].mean).max()
    assert apart < 1e-3, apart
    row = (
        steps,
        f"{size:,}",
        seconds(run.median),
        run.spread,
        seconds(one.median),
        one.spread,
        f"{len(y) / run.median:,.0f}",
        f"{np.median(ratios):.2f} ({ratios.min():.2f}-{ratios.max():.2f})",
    )
    return row, run.median, float(np.median(ratios))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer rows and rounds")
    quick = parser.parse_args().quick
    print(describe_machine(("jax", "jaxlib")), "\n")
    waiting(quick)
    from_file(quick)


if __name__ == "__main__":
    main()
