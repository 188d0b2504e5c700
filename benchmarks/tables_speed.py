"""Seconds to a posterior of equal error: Fisher Flow, Laplace, NUTS, variational.

    python benchmarks/tables_speed.py           # some minutes
    python benchmarks/tables_speed.py --quick   # 500 rows alone, short runs

Logistic regression of 20 correlated columns, 500 and 5,000 rows: means and standard
deviations of its coefficients. A network 2-5-1 (tanh) on 200 rows of two moons: those
of its probabilities at 400 points, since coefficients have mirror images. Prior known,
float64. The reference is a long chain. An error is the root mean square, over
coefficients or points, of (mean - reference mean) / reference sd, and of sd /
reference sd - 1; the larger of the two counts. Every method is compiled beforehand.
NUTS (NumPyro) warms up for 150 or 500 steps, and its seconds to n draws are those of
the warm-up and n times those of a draw; variational inference (NumPyro, Adam) has the
best of three rates, and is looked at every 250 steps. Both are averaged over seeds.
"""

import argparse
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tables_posteriors as posteriors
from measuring import describe_machine, seconds, table
from tables_posteriors import CHUNK, GUIDES, Problem
from tables_running import timed

DRAWS, WARM, RATES = 2000, (150, 500), (0.003, 0.01, 0.03)


def errors(found: tuple, reference: tuple) -> np.ndarray:
    """Of the means and of the standard deviations."""
    shift = (found[0] - reference[0]) / reference[1]
    ratio = found[1] / reference[1] - 1
    return np.array([float(jnp.sqrt(jnp.mean(jnp.square(x)))) for x in (shift, ratio)])


class Curve(NamedTuple):
    """Seconds against errors `(points, seeds, 2)`."""

    name: str
    what: list[str]
    seconds: np.ndarray
    errors: np.ndarray

    def to(self, error: float) -> int | None:
        """The first point at which the mean error is no larger."""
        worst = self.errors.mean(1).max(1)
        reached = np.flatnonzero(worst <= error)
        return int(reached[0]) if len(reached) else None


def fixed(name: str, run: Callable, reference: tuple, rounds: int) -> Curve:
    run(0)
    found = [timed(lambda: run(0)) for _ in range(rounds)]
    each = errors(found[0][0], reference)
    return Curve(
        name, [""], np.array([np.median([t for _, t in found])]), each[None, None]
    )


def of_nuts(
    num_warm: int, problem: Problem, reference: tuple, seeds: range, quick: bool
) -> Curve:
    length = 1000 if quick else DRAWS
    long = posteriors.sampled(problem, length, num_warm)
    short = posteriors.sampled(problem, 10, num_warm)
    jax.block_until_ready((long(0), short(0)))
    counts = [n for n in (10, 30, 100, 300, 1000, 2000) if n <= length]
    of_draws = jax.jit(problem.of_draws)
    found, whole, part = [], [], []
    for seed in seeds:
        draws, elapsed = timed(lambda s=seed: long(s))
        whole.append(elapsed)
        part.append(timed(lambda s=seed: short(s))[1])
        found.append([errors(of_draws(draws[:n]), reference) for n in counts])
    begin = np.median(part)
    each = (np.median(whole) - begin) / (length - 10)
    told = [f"{num_warm} + {n} draws" for n in counts]
    times = np.array([begin + (n - 10) * each for n in counts])
    return Curve(
        f"NUTS, warm-up {num_warm}", told, times, np.array(found).swapaxes(0, 1)
    )


def of_variational(
    name: str, problem: Problem, reference: tuple, seeds: range, quick: bool
) -> list[Curve]:
    """A curve for each rate."""
    begin, advance, read = posteriors.variational(problem, GUIDES[name])
    curves, chunks = [], 8 if quick else 24
    jax.block_until_ready(read(advance(begin(0, 0.01), jnp.float64(0.01))))
    for rate in RATES:
        found, times = [], []
        for seed in seeds:
            state, each = begin(seed, rate), []
            for _ in range(chunks):
                state, elapsed = timed(
                    lambda s=state, r=rate: advance(s, jnp.float64(r))
                )
                times.append(elapsed)
                each.append(errors(read(state), reference))
            found.append(each)
        steps = CHUNK * np.arange(1, chunks + 1)
        told = [f"{n} steps at {rate:g}" for n in steps]
        curves.append(
            Curve(
                f"variational, {name}",
                told,
                np.median(times) * steps / CHUNK,
                np.array(found).swapaxes(0, 1),
            )
        )
    return curves


def best(curves: list[Curve]) -> Curve:
    """The rate of the least error at any point."""
    return min(curves, key=lambda c: c.errors.mean(1).max(1).min())


def reference_of(problem: Problem, chains: int, draws: int) -> tuple:
    """Mean and sd, and how far halves of the chains are apart: (reference, errors)."""
    run = posteriors.sampled(problem, draws, 1000)
    each = jnp.stack([run(1000 + seed) for seed in range(chains)])
    halves = [problem.of_draws(jnp.concatenate(list(x))) for x in np.split(each, 2)]
    whole = problem.of_draws(jnp.concatenate(list(each)))
    return whole, errors(halves[0], halves[1]) / 2


def compare(problem: Problem, quick: bool) -> None:
    chains, draws = (2, 4000) if quick else (8, 2500)
    reference, apart = reference_of(problem, chains, draws)
    print(
        f"==== {problem.name}, {len(problem.start)} parameters; reference: {chains} "
        f"chains of {draws}, own error {apart[0]:.3f} sd, {apart[1]:.3f}\n"
    )
    rounds, seeds = (3, range(1, 3)) if quick else (15, range(1, 4))
    curves = [
        fixed(
            "Fisher Flow, one pass", posteriors.in_one_pass(problem), reference, rounds
        )
    ]
    if problem.name.startswith("logistic"):
        more = (
            "Fisher Flow, one pass, refined",
            posteriors.in_one_pass(problem, refinements=1),
        )
    else:
        more = "Fisher Flow, thirty passes", posteriors.in_one_pass(problem, passes=30)
    curves.append(fixed(*more, reference, rounds))
    curves.append(fixed("Laplace", posteriors.by_laplace(problem), reference, rounds))
    for num_warm in WARM:
        curves.append(of_nuts(num_warm, problem, reference, seeds, quick))
    for guide in GUIDES:
        curves.append(best(of_variational(guide, problem, reference, seeds, quick)))
    print_curves(curves)


def print_curves(curves: list[Curve]) -> None:
    """At the end of each run, then at the errors of the first three."""
    rows = []
    for curve in curves:
        cells = []
        for each in curve.errors[-1].T:
            spread = each.std(ddof=1) / len(each) ** 0.5 if len(each) > 1 else np.nan
            told = f" ({spread:.3f})" if len(each) > 1 else ""
            cells.append(f"{each.mean():.3f}{told}")
        rows.append((curve.name, curve.what[-1], seconds(curve.seconds[-1]), *cells))
    header = "whole runs", "length", "seconds", "error of means, sd", "of sds"
    print(table(header, rows), "\n")
    rows = []
    for ours in curves[:3]:
        error = float(ours.errors.mean(1).max())
        for curve in curves[3:]:
            place = curve.to(error)
            took = "not reached" if place is None else seconds(curve.seconds[place])
            ratio = place is not None and curve.seconds[place] / ours.seconds[0]
            rows.append(
                (
                    f"{ours.name}: {error:.3f} in {seconds(ours.seconds[0])}",
                    curve.name,
                    "" if place is None else curve.what[place],
                    took,
                    f"{ratio:.3g}x" if ratio else "",
                )
            )
    header = "to the error of", "", "needs", "seconds", "times as long"
    print(table(header, rows), "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    begun = time.perf_counter()
    print(describe_machine(("jax", "jaxlib", "numpyro", "optax")), "\n")
    problems = [posteriors.regression(500)]
    if not quick:
        problems += [posteriors.network(), posteriors.regression(5000)]
    for problem in problems:
        compare(problem, quick)
    print(f"{time.perf_counter() - begun:.0f} seconds in all")


if __name__ == "__main__":
    main()
