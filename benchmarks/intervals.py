"""How often intervals of one coefficient hold the truth, and on which side they miss.

`python benchmarks/intervals.py` draws 2,000 data sets of each of six designs, and
prints for nominal 95 % intervals the share that holds the truth, the shares that lie
wholly above and wholly below it (nominal .025 each), and the median length. The
standard error of a share is that of a binomial: .005 of .95, .0035 of .025. Data sets
whose estimate is not finite (separated classes) are left out where a method has no
interval of them; `share` is what is left. `--quick` draws 200 of the first two designs.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from measuring import describe_machine
from scipy.special import expit

import fisherflow_jax as ff

BERNOULLI, POISSON = ff.likelihoods.bernoulli(), ff.likelihoods.poisson()
# Data sets at a time: what they hold together stays small.
CHUNK = 500


class Design(NamedTuple):
    name: str
    num_rows: int
    truth: list[float]  # that of the second coefficient is asked for
    columns: str = "normal"
    likelihood: Any = BERNOULLI


DESIGNS = [
    Design("logistic", 30, [0.0, 1.0, -0.5]),
    Design("logistic", 50, [-1.0, 2.0, -0.5]),
    Design("logistic", 30, [-1.5, 1.0, -0.5]),
    Design("correlated", 60, [-0.5, 1, -0.5, 0.5, 0, 0, 0.5, 0], "correlated"),
    Design("a rare group", 60, [-1.0, 1.5, 0.5, 0.0], "rare"),
    Design("counts", 15, [0.0, 0.7, -0.3], likelihood=POISSON),
]


def data(design: Design, replicates: int) -> tuple[np.ndarray, np.ndarray]:
    rng, d = np.random.default_rng(0), len(design.truth)
    shape = replicates, design.num_rows
    x = rng.normal(size=(*shape, d))
    if design.columns == "correlated":  # .6 between any two
        x = np.sqrt(0.4) * x + np.sqrt(0.6) * rng.normal(size=(*shape, 1))
    if design.columns == "rare":
        x[..., 1] = rng.random(shape) < 0.15
    x[..., 0] = 1
    eta = x @ np.array(design.truth)
    if design.likelihood is POISSON:
        return x, 1.0 * rng.poisson(np.exp(eta))
    return x, 1.0 * (rng.random(shape) < expit(eta))


def apply_fn(params: jax.Array, x: jax.Array) -> jax.Array:
    return x @ params


def intervals(design: Design) -> Callable:
    """Of one data set: `{method: (lower, upper)}`, and if the estimate is finite."""
    d, model = len(design.truth), (apply_fn, design.likelihood)
    asked, exact = "theta[1]", ff.estimators.exact(*model, ff.structures.full())
    start = ff.posterior(jnp.zeros(d), ff.structures.full(), prior_precision=1.0)
    flow = ff.fisher_flow(*model, prior_precision=0.16)

    def found(x: jax.Array, y: jax.Array) -> tuple[dict, jax.Array]:
        rows = x, y
        state = ff.warm_start(flow, flow.init(jnp.zeros(d)), rows)
        own = ff.intervals.corrected(start, *model, rows, asked)
        jeffreys = ff.geometry.jeffreys(ff.geometry.metric(exact, rows))
        plain, penalised = (
            ff.intervals.profile(
                start, *model, rows, asked, num_points=0, log_prior=prior
            )
            for prior in (None, jeffreys)
        )
        skewed = ff.intervals.skewed(state, *model, rows, asked)

        def wald(of: Any) -> tuple[jax.Array, jax.Array]:
            reach = plain.quantile * of.standard_error
            return of.estimate - reach, of.estimate + reach

        return {
            "Wald": wald(plain),
            "Wald, Firth": wald(own),
            "profile": (plain.lower, plain.upper),
            "profile, Jeffreys": (penalised.lower, penalised.upper),
            "profile, r*": (plain.modified_lower, plain.modified_upper),
            "corrected": (own.lower, own.upper),
            "skewed, prior sd 2.5": (skewed.lower, skewed.upper),
        }, jnp.isfinite(plain.estimate)

    return found


NEEDS_A_MAXIMUM = {"Wald", "profile, r*"}


def rows_of_table(design: Design, replicates: int) -> Iterator[tuple]:
    """`(method, holds, above, below, median length, share)`."""
    run, truth = jax.jit(jax.vmap(intervals(design))), design.truth[1]
    x, y = data(design, replicates)
    parts = [
        jax.tree.map(np.asarray, run(x[k : k + CHUNK], y[k : k + CHUNK]))
        for k in range(0, replicates, CHUNK)
    ]
    ends, finite = jax.tree.map(lambda *a: np.concatenate(a), *parts)
    for method, (lower, upper) in ends.items():
        used = finite if method in NEEDS_A_MAXIMUM else np.ones_like(finite)
        lower, upper = lower[used], upper[used]
        above, below = np.mean(~(lower <= truth)), np.mean(~(upper >= truth))
        holds = np.mean((lower <= truth) & (truth <= upper))
        yield method, holds, above, below, np.median(upper - lower), np.mean(used)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="200 data sets, 2 designs")
    quick = parser.parse_args().quick
    jax.config.update("jax_enable_x64", True)
    print(describe_machine(["jax", "numpy"]))
    replicates, designs = (200, DESIGNS[:2]) if quick else (2000, DESIGNS)
    print(f"{replicates} data sets a design, nominal .950 (.025, .025)")
    for design in designs:
        began = time.perf_counter()
        print(f"\n{design.name}, n = {design.num_rows}, {design.truth}")
        print(f"{'':22}{'holds':>7}{'above':>8}{'below':>8}{'length':>8}{'share':>8}")
        for method, *numbers in rows_of_table(design, replicates):
            holds, above, below, length, share = numbers
            print(
                f"{method:22}{holds:7.3f}{above:8.3f}{below:8.3f}{length:8.2f}{share:8.3f}"
            )
        print(f"({time.perf_counter() - began:.0f} s)", flush=True)


if __name__ == "__main__":
    main()
