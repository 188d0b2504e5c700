"""How often intervals of one coefficient hold the truth, and on which side they miss.

`python benchmarks/intervals.py` draws 2,000 data sets of each of six designs, and
prints for nominal 95 % intervals the share that holds the truth, the shares that lie
wholly above and wholly below it (nominal .025 each), and the median length. The
standard error of a share is that of a binomial: .005 of .95, .0035 of .025. The
profiles, which take longest, are of the first 500: .010 and .007. Data sets without a
maximum of the likelihood (separated classes) are left out where a method has no
interval of them; `sets` counts what is left. `--quick` draws 200 of two designs.
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
from scipy.stats import norm

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


def start(design: Design) -> Any:
    shape = jnp.zeros(len(design.truth))
    return ff.posterior(shape, ff.structures.full(), prior_precision=1.0)


def direct(design: Design) -> Callable:
    """Of one data set: `{method: (lower, upper, is there one)}`."""
    model, zeros = (apply_fn, design.likelihood), jnp.zeros(len(design.truth))
    vague, normal = (ff.fisher_flow(*model, prior_precision=p) for p in (1e-6, 0.16))

    def found(x: jax.Array, y: jax.Array) -> dict[str, tuple]:
        rows, always = (x, y), jnp.array(True)
        state = ff.warm_start(vague, vague.init(zeros), rows)
        lower, upper = ff.confidence_interval(state)
        # of separated classes the prior alone keeps the estimate, and its error, finite
        finite = jnp.max(ff.standard_error(state)) < 20
        belief = ff.warm_start(normal, normal.init(zeros), rows)
        own = ff.intervals.corrected(start(design), *model, rows, "theta[1]")
        skewed = ff.intervals.skewed(belief, *model, rows, "theta[1]")
        reach = norm.ppf(0.975) * own.standard_error
        return {
            "Wald": (lower[1], upper[1], finite),
            "Wald, Firth": (own.estimate - reach, own.estimate + reach, always),
            "corrected": (own.lower, own.upper, always),
            "skewed, prior sd 2.5": (skewed.lower, skewed.upper, always),
        }

    return found


def profiles(design: Design) -> Callable:
    """As `direct`, of searches for every end, which take longer."""
    model = apply_fn, design.likelihood
    exact = ff.estimators.exact(*model, ff.structures.full())

    def found(x: jax.Array, y: jax.Array) -> dict[str, tuple]:
        jeffreys = ff.geometry.jeffreys(ff.geometry.metric(exact, (x, y)))
        plain, penalised = (
            ff.intervals.profile(
                start(design), *model, (x, y), "theta[1]", num_points=0, log_prior=prior
            )
            for prior in (None, jeffreys)
        )
        always, finite = jnp.array(True), jnp.isfinite(plain.estimate)
        return {
            "profile": (plain.lower, plain.upper, always),
            "profile, Jeffreys": (penalised.lower, penalised.upper, always),
            "profile, r*": (plain.modified_lower, plain.modified_upper, finite),
        }

    return found


def rows_of_table(design: Design, replicates: int) -> Iterator[tuple]:
    """`(method, holds, above, below, median length, data sets)`."""
    x, y = data(design, replicates)
    truth, few = design.truth[1], min(replicates, CHUNK)
    for methods, size in ((direct(design), replicates), (profiles(design), few)):
        run = jax.jit(jax.vmap(methods))
        parts = [
            jax.tree.map(np.asarray, run(x[k : k + CHUNK], y[k : k + CHUNK]))
            for k in range(0, size, CHUNK)
        ]
        ends = jax.tree.map(lambda *a: np.concatenate(a), *parts)
        for name, (lower, upper, used) in ends.items():
            lower, upper = lower[used], upper[used]
            above, below = np.mean(~(lower <= truth)), np.mean(~(upper >= truth))
            holds = np.mean((lower <= truth) & (truth <= upper))
            yield name, holds, above, below, np.median(upper - lower), np.sum(used)


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
        print(f"{'':22}{'holds':>7}{'above':>8}{'below':>8}{'length':>8}{'sets':>8}")
        for method, *numbers in rows_of_table(design, replicates):
            holds, above, below, length, sets = numbers
            print(
                f"{method:22}{holds:7.3f}{above:8.3f}{below:8.3f}{length:8.2f}{sets:8d}"
            )
        print(f"({time.perf_counter() - began:.0f} s)", flush=True)


if __name__ == "__main__":
    main()
