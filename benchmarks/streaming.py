"""How fast streaming Fisher Flow is, and how far from the posterior it ends.

Seven tables: logistic regression beside NUTS, variational inference and batch Newton;
a million rows through one scan beside the matrix products alone; the cost of an update
and the size of a state for every structure and memory; an update beside a hand-written
floor; loops in Python; rows a second beside other libraries; large models. Needs the
extra `benchmarks`:

    python benchmarks/streaming.py            # a few minutes
    python benchmarks/streaming.py --quick    # fewer repeats
"""

import argparse
import functools
import itertools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import logistic
import numpy as np
import numpyro
import numpyro.distributions as dist
import streaming_floor as floors
from jax.scipy.linalg import cho_factor, cho_solve
from logistic import NUM_FEATURES, PRIOR_PRECISION, Gaussian
from measuring import Timing, describe_machine, measure, parsed, seconds, table
from numpyro.infer import MCMC, NUTS, SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoMultivariateNormal, AutoNormal

import fisherflow_jax as ff

NUM_ROWS = 5000
BATCH_SIZE = 50
WARM_ROWS = 200
LARGE_WARM_ROWS = 400
LARGE_BATCH_SIZES = (100, 1000)

NUTS_NAME = "NUTS 500+1000, one chain"
SVI_NAMES = ("SVI AutoNormal, 2000 Adam", "SVI AutoMultivariateNormal, 2000 Adam")
ONE_FIT = "batch Newton, one fit"
REFITS = (
    "Newton after each batch, from the last",
    "Newton after each batch, from zero",
)
FLOWS: dict[str, dict[str, Any]] = {
    "Fisher Flow, warm start, 1 step": {"warm": True, "num_steps": 1},
    "Fisher Flow, warm start, default steps": {"warm": True},
    "Fisher Flow, warm start, 1 step, refine": {
        "warm": True,
        "num_steps": 1,
        "refine": True,
    },
    "Fisher Flow, cold, default steps": {"warm": False},
    "Fisher Flow, cold, 1 step": {"warm": False, "num_steps": 1},
}


# --- one: logistic regression beside the other methods ---


def numpyro_methods(x: jax.Array, y: jax.Array) -> dict[str, Callable[[int], tuple]]:
    """NUTS and variational inference, each run compiled whole; the seed is the round.

    Each returns its posterior and, for NUTS, its draws.
    """

    def model() -> None:
        prior = dist.Normal(0.0, PRIOR_PRECISION**-0.5)
        theta = numpyro.sample("theta", prior.expand([NUM_FEATURES]).to_event(1))
        numpyro.sample("y", dist.Bernoulli(logits=x @ theta), obs=y)

    @jax.jit
    def nuts(seed: jax.Array) -> tuple:
        sampler = MCMC(
            NUTS(model), num_warmup=500, num_samples=1000, progress_bar=False
        )
        sampler.run(jax.random.key(seed))
        draws = sampler.get_samples()["theta"]
        return Gaussian(draws.mean(0), draws.std(0)), draws

    def svi(guide: Any, read: Callable[[dict], Gaussian]) -> Callable[[int], tuple]:
        inference = SVI(model, guide, numpyro.optim.Adam(0.01), Trace_ELBO())

        @jax.jit
        def run(seed: jax.Array) -> tuple:
            key = jax.random.key(seed)
            return read(inference.run(key, 2000, progress_bar=False).params), None

        return run

    def read_diagonal(params: dict) -> Gaussian:
        return Gaussian(params["theta_auto_loc"], params["theta_auto_scale"])

    def read_full(params: dict) -> Gaussian:
        root = params["auto_scale_tril"]
        return Gaussian(params["auto_loc"], jnp.sqrt(jnp.sum(root**2, 1)))

    full_guide = AutoMultivariateNormal(model)
    return {
        NUTS_NAME: nuts,
        SVI_NAMES[0]: svi(AutoNormal(model), read_diagonal),
        SVI_NAMES[1]: svi(full_guide, read_full),
    }


def newton_methods(x: jax.Array, y: jax.Array) -> dict[str, Callable[[int], tuple]]:
    """One fit of all rows, and a fit after each batch of the stream.

    Each returns its last posterior and its fits.
    """
    zero = jnp.zeros(NUM_FEATURES, x.dtype)
    # chunks of 500 rows: a refit costs what its rows cost, with few steps of a loop
    chunks = jax.tree.map(lambda a: a.reshape((-1, 500, *a.shape[1:])), (x, y))
    counts = jnp.arange(WARM_ROWS, len(x) + 1, BATCH_SIZE)

    @jax.jit
    def once(x: jax.Array, y: jax.Array) -> tuple:
        used = jnp.ones_like(y)
        fit = logistic.newton(lambda t: logistic.sums(t, x, y, used), zero)
        return logistic.laplace(fit), fit

    @functools.partial(jax.jit, static_argnames="warm")
    def refits(chunks: tuple, counts: jax.Array, warm: bool) -> tuple:
        def refit(previous: jax.Array, count: jax.Array) -> tuple:
            start = previous if warm else zero
            fit = logistic.newton(
                lambda t: logistic.chunked_sums(t, *chunks, count), start
            )
            return fit.mean, fit

        _, fits = jax.lax.scan(refit, zero, counts)
        return logistic.laplace(jax.tree.map(lambda a: a[-1], fits)), fits

    return {
        ONE_FIT: lambda number: once(x, y),
        REFITS[0]: lambda number: refits(chunks, counts, warm=True),
        REFITS[1]: lambda number: refits(chunks, counts, warm=False),
    }


def flow_method(
    x: jax.Array, y: jax.Array, *, warm: bool, refine: bool = False, **options: Any
) -> Callable[[int], tuple]:
    """The whole stream as one compiled function, its reports included."""
    flow = logistic.flow(**options)
    start = WARM_ROWS if warm else 0
    first = (x[:WARM_ROWS], y[:WARM_ROWS])
    batches = jax.tree.map(
        lambda a: a[start:].reshape((-1, BATCH_SIZE, *a.shape[1:])), (x, y)
    )
    stored = jax.tree.map(lambda a: a[None], (x, y))

    @jax.jit
    def run(first: tuple, batches: tuple, stored: tuple) -> tuple:
        state = flow.init(jnp.zeros(NUM_FEATURES, x.dtype))
        if warm:
            state = ff.warm_start(flow, state, first)
        state, info = jax.lax.scan(flow.update, state, batches)
        if refine:
            state = ff.refine(flow, state, stored)
        return Gaussian(state.mean, ff.standard_error(state)), info

    return lambda number: run(first, batches, stored)


def compare(quick: bool) -> None:
    """Prints the first table and its ratios."""
    x, y = (jnp.asarray(a, jnp.float64) for a in logistic.data(NUM_ROWS, 1))
    methods = numpyro_methods(x, y) | newton_methods(x, y)
    methods |= {name: flow_method(x, y, **o) for name, o in FLOWS.items()}
    rounds = dict.fromkeys(methods, 7 if quick else 25)
    rounds |= dict.fromkeys(REFITS, 3 if quick else 9)
    rounds |= dict.fromkeys(SVI_NAMES, 3 if quick else 7)
    rounds[NUTS_NAME] = 1 if quick else 3
    timings = measure(methods, rounds)

    draws = np.stack([draws for _, draws in timings[NUTS_NAME].outputs])
    reference = Gaussian(draws.mean((0, 1)), draws.std((0, 1)))
    noise = numpyro.diagnostics.effective_sample_size(draws) ** -0.5
    print(
        f"1. Logistic regression, n = {NUM_ROWS}, d = {NUM_FEATURES}, correlation 0.5, "
        f"prior N(0, {1 / PRIOR_PRECISION:.0f}), float64\n"
        f"   batches of {BATCH_SIZE}, warm start on {WARM_ROWS} rows; everything "
        "compiled, compilation only in the first call.\n"
        f"   Reference: the draws of all {len(draws)} NUTS runs; their Monte Carlo "
        f"error is {noise.mean():.3f} sd (worst {noise.max():.3f}).\n"
    )
    rows = []
    for name, timing in timings.items():
        posterior, _ = timing.outputs[-1]
        error = np.abs(posterior.mean - reference.mean) / reference.sd
        ratio = posterior.sd / reference.sd
        rows.append(
            (
                name,
                seconds(timing.median),
                timing.spread,
                seconds(timing.first),
                f"{error.max():.3f}",
                f"{np.median(error):.3f}",
                f"{ratio.min():.2f}-{ratio.max():.2f}",
            )
        )
    header = (
        "method",
        "median time",
        "range",
        "first call",
        "max error",
        "median error",
        "sd / reference",
    )
    print(table(header, rows))
    from_last, from_zero = (timings[name].outputs[-1][1].steps for name in REFITS)
    print(
        "   errors: |mean - reference| in posterior standard deviations\n"
        f"   Newton after each batch: {len(from_last)} fits, of {from_last.mean():.1f} "
        f"steps from the last solution, of {from_zero.mean():.1f} from zero\n"
    )
    print_ratios(timings)


def print_ratios(timings: dict[str, Timing]) -> None:
    targets = dict.fromkeys((NUTS_NAME, *SVI_NAMES), 100.0)
    targets |= dict.fromkeys(REFITS, 50.0)
    names = list(FLOWS)[:3]
    rows = []
    for other in (*targets, ONE_FIT):
        cells = []
        for name in names:
            slow, fast = timings[other], timings[name]
            ratio = slow.median / fast.median
            cell = f"{ratio:.3g}x ({min(slow.seconds) / min(fast.seconds):.3g}x)"
            if other in targets:
                cell += "    met" if ratio >= targets[other] else " missed"
            cells.append(cell)
        target = f">= {targets[other]:.0f}x" if other in targets else "none"
        rows.append((other, target, *cells))
    print("   Time of each method over that of Fisher Flow: medians (fastest rounds)\n")
    short = (name.removeprefix("Fisher Flow, ") for name in names)
    print(table(("over Fisher Flow", "target", *short), rows))
    alone = timings[NUTS_NAME].median / timings[ONE_FIT].median
    print(
        "   Fisher Flow is of Laplace quality, not MCMC quality. Most of its ratio to "
        f"NUTS is Laplace against sampling:\n   batch Newton alone is {alone:.3g}x "
        "faster than NUTS, and nearer to it. Fisher Flow adds a posterior after each "
        "batch.\n"
    )


# --- two: a million rows through one scan ---


def million(quick: bool) -> None:
    """Prints throughput beside that of the matrix products alone."""
    num_rows = 1_000_000
    x, y = logistic.data(num_rows + LARGE_WARM_ROWS, 2)
    print(
        f"2. {num_rows:,} rows at d = {NUM_FEATURES} through one scan, after a warm "
        f"start on {LARGE_WARM_ROWS} rows\n"
        "   products: the same scan doing only X^T W X and X^T r with W and r given, "
        "no forward pass\n"
        "   least filter: forward pass, products, one Cholesky solve; no evidence, no "
        "checks, no reports\n"
        "   error: largest |mean - batch Newton on all rows| in posterior standard "
        "deviations\n"
    )

    @jax.jit
    def batch_fit(x: jax.Array, y: jax.Array) -> Gaussian:
        def terms(theta: jax.Array) -> tuple:
            return logistic.chunked_sums(theta, x, y, y.size)

        return logistic.laplace(logistic.newton(terms, jnp.zeros(NUM_FEATURES)))

    chunks = (a.reshape((-1, LARGE_WARM_ROWS, *a.shape[1:])) for a in (x, y))
    reference = batch_fit(*map(jnp.asarray, chunks))
    flow = logistic.flow()
    state = flow.init(jnp.zeros(NUM_FEATURES))
    state = ff.warm_start(flow, state, (x[:LARGE_WARM_ROWS], y[:LARGE_WARM_ROWS]))
    x, y = x[LARGE_WARM_ROWS:], y[LARGE_WARM_ROWS:]
    rows = []
    for dtype, size in itertools.product((jnp.float32, jnp.float64), LARGE_BATCH_SIZES):
        methods = scans(x, y, state, size, dtype)
        timings = measure(methods, dict.fromkeys(methods, 3 if quick else 7))
        products = timings["products"].median
        for name, timing in timings.items():
            posterior, _ = timing.outputs[-1]
            error = "-"
            if name != "products":
                distance = np.abs(
                    np.asarray(posterior.mean, np.float64) - reference.mean
                )
                error = f"{np.max(distance / reference.sd):.3f}"
            rows.append(
                (
                    name,
                    jnp.dtype(dtype).name,
                    f"{size}",
                    seconds(timing.median),
                    timing.spread,
                    seconds(timing.first),
                    f"{timing.median * size / num_rows * 1e6:.1f}",
                    f"{num_rows / timing.median / 1e6:.2f}",
                    f"{products / timing.median:.0%}",
                    error,
                )
            )
    header = (
        "scan",
        "type",
        "batch",
        "median time",
        "range",
        "first call",
        "us a batch",
        "million rows/s",
        "of products",
        "error",
    )
    print(table(header, rows), "\n")


def scans(x: np.ndarray, y: np.ndarray, state: ff.FlowState, size: int, dtype: Any):
    """The four scans over the same batches, each a function of the round."""
    state = jax.tree.map(
        lambda a: a.astype(dtype) if jnp.issubdtype(a.dtype, jnp.floating) else a, state
    )
    batches = tuple(
        jnp.asarray(a.reshape((-1, size, *a.shape[1:])), dtype) for a in (x, y)
    )

    @jax.jit
    def products(batches: tuple) -> tuple:
        def body(total: tuple, batch: tuple) -> tuple:
            features, weights = batch  # any numbers serve as W and r
            information = features.T @ (features * weights[:, None])
            return (total[0] + information, total[1] + weights @ features), None

        zero = jnp.zeros(NUM_FEATURES, dtype)
        start = (jnp.zeros((NUM_FEATURES, NUM_FEATURES), dtype), zero)
        return jax.lax.scan(body, start, batches)[0]

    @jax.jit
    def least(start: tuple, batches: tuple) -> tuple:
        def body(state: tuple, batch: tuple) -> tuple:
            (mean, information), (features, targets) = state, batch
            chance = jax.nn.sigmoid(features @ mean)
            weights = chance * (1 - chance)
            information = information + features.T @ (features * weights[:, None])
            score = (targets - chance) @ features
            return (mean + cho_solve(cho_factor(information), score), information), None

        (mean, information), _ = jax.lax.scan(body, start, batches)
        sd = jnp.sqrt(jnp.diagonal(jnp.linalg.inv(information)))
        return Gaussian(mean, sd), None

    def flow_scan(**options: Any) -> Callable[[int], tuple]:
        flow = logistic.flow(**options)

        @jax.jit
        def run(state: ff.FlowState, batches: tuple) -> tuple:
            state, info = jax.lax.scan(flow.update, state, batches)
            return Gaussian(state.mean, ff.standard_error(state)), info

        return lambda number: run(state, batches)

    dense = ff.information.to_dense(state.information)
    return {
        "products": lambda number: products(batches),
        "least filter": lambda number: least((state.mean, dense), batches),
        "Fisher Flow, 1 step": flow_scan(num_steps=1),
        "Fisher Flow, default": flow_scan(),
    }


# --- three: every structure and memory ---


def updates(quick: bool) -> None:
    """Prints microseconds an update and the size of the state."""
    size, number = 20, 500
    x, y = logistic.data(size * number, 3)
    batches = (
        jnp.asarray(x.reshape((number, size, NUM_FEATURES))),
        jnp.asarray(y.reshape((number, size))),
    )
    structures = (
        ff.structures.scalar(),
        ff.structures.diagonal(),
        ff.structures.block(),
        ff.structures.low_rank(5),
        ff.structures.full(),
    )
    memories = (
        ff.memories.stationary(),
        ff.memories.exponential(0.99),
        ff.memories.windowed(10),
        ff.memories.random_walk(1e-4),
        ff.memories.adaptive(),
    )
    methods, sizes = {}, {}
    for structure, memory in itertools.product(structures, memories):
        for steps in (1,) if quick else (1, 4):
            try:
                flow = ff.fisher_flow(
                    # a matrix of parameters, so that block has four blocks of five
                    lambda params, inputs: inputs @ params.reshape((-1,)),
                    ff.likelihoods.bernoulli(),
                    structure=structure,
                    memory=memory,
                    num_steps=steps,
                )
            except ValueError:
                continue  # refused when built, as the table says
            state = flow.init(jnp.zeros((NUM_FEATURES // 4, 4)))
            run = jax.jit(functools.partial(jax.lax.scan, flow.update))
            name = structure.name, memory.name, steps
            sizes[name] = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
            methods[name] = functools.partial(
                lambda run, state, number: run(state, batches)[0], run, state
            )
    timings = measure(methods, dict.fromkeys(methods, 5 if quick else 9))
    print(
        f"3. An update at d = {NUM_FEATURES}, batches of {size}, float64: microseconds "
        + ("(1 step)" if quick else "(1 step / at most 4, the default)")
        + ", and the state's size\n"
    )
    rows = []
    for structure in structures:
        cells = []
        for memory in memories:
            found = [n for n in timings if n[:2] == (structure.name, memory.name)]
            times = [f"{timings[n].median / number * 1e6:.1f}" for n in found]
            kib = f", {sizes[found[0]] / 1024:.1f} KiB" if found else "refused"
            cells.append(" / ".join(times) + kib)
        rows.append((structure.name, *cells))
    print(table(("structure", *(m.name.split("(")[0] for m in memories)), rows))
    print(
        "   refused: built with this structure, the memory raises and says why; "
        "windowed keeps 10 batches.\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer repeats")
    arguments = parsed(parser)
    if arguments is None:
        return
    quick = arguments.quick
    jax.config.update("jax_enable_x64", True)
    began = time.perf_counter()
    print(describe_machine(("jax", "jaxlib", "numpyro")), "\n")
    for part in (compare, million, updates):
        part(quick)
    with jax.enable_x64(False):
        for part in floors.TABLES:
            part(quick)
    print(f"{time.perf_counter() - began:.0f} seconds in all.")


if __name__ == "__main__":
    main()
