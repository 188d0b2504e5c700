"""How fast streaming Fisher Flow is, and how far from the posterior it ends.

Three tables: logistic regression beside NUTS, variational inference and batch Newton;
a million rows through one scan beside the matrix products alone; the cost of an update
and the size of a state for every structure and memory. Needs the extra `benchmarks`:

    python benchmarks/streaming.py            # a few minutes
    python benchmarks/streaming.py --quick    # fewer repeats
"""

import argparse
import functools
import itertools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax.scipy.linalg import cho_factor, cho_solve
from measuring import Timing, describe_machine, measure, seconds, table
from numpyro.infer import MCMC, NUTS, SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoMultivariateNormal, AutoNormal

import fisherflow_jax as ff

NUM_FEATURES = 20
NUM_ROWS = 5000
BATCH_SIZE = 50
WARM_ROWS = 200
PRIOR_PRECISION = 1e-2
# Newton stops where the flow does: a step shorter than 1e-4 posterior sd.
TOLERANCE = 1e-8
LARGE_WARM_ROWS = 400
LARGE_BATCH_SIZES = (100, 1000)


class Gaussian(NamedTuple):
    """A posterior, as every method here reports it."""

    mean: jax.Array  # (d,)
    sd: jax.Array  # (d,)


def apply_fn(params: jax.Array, inputs: jax.Array) -> jax.Array:
    return inputs @ params


def logistic_data(num_rows: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Standard normal features with correlation 0.5, and labels 0 or 1, float64."""
    rng = np.random.default_rng(seed)
    coefficients = 0.3 * np.random.default_rng(0).standard_normal(NUM_FEATURES)
    features = rng.standard_normal((num_rows, NUM_FEATURES))
    features = np.sqrt(0.5) * (features + rng.standard_normal((num_rows, 1)))
    chance = 1 / (1 + np.exp(-features @ coefficients))
    return features, (rng.random(num_rows) < chance).astype(np.float64)


def logistic_flow(**options: Any) -> ff.FisherFlow:
    return ff.fisher_flow(
        apply_fn,
        ff.likelihoods.bernoulli(),
        structure=ff.structures.full(),
        memory=ff.memories.stationary(),
        prior_precision=PRIOR_PRECISION,
        **options,
    )


# --- batch Newton, the honest comparator ---


class Newton(NamedTuple):
    mean: jax.Array
    hessian: jax.Array
    steps: jax.Array


def sums(theta: jax.Array, x: jax.Array, y: jax.Array, used: jax.Array) -> tuple:
    """Minus log-likelihood, its gradient and its Hessian, over the used rows."""
    logits = x @ theta
    chance = jax.nn.sigmoid(logits)
    value = jnp.sum(used * (jnp.logaddexp(0.0, logits) - y * logits))
    weights = used * chance * (1 - chance)
    return value, (used * (chance - y)) @ x, x.T @ (x * weights[:, None])


def chunked_sums(theta: jax.Array, x: jax.Array, y: jax.Array, count: Any) -> tuple:
    """`sums` over the first `count` rows of chunks `(m, c, d)`, none beyond them."""
    length = x.shape[1]

    def add(chunk: jax.Array, total: tuple) -> tuple:
        used = (chunk * length + jnp.arange(length) < count).astype(x.dtype)
        return jax.tree.map(jnp.add, total, sums(theta, x[chunk], y[chunk], used))

    zero = (jnp.zeros((), x.dtype), theta * 0, jnp.outer(theta, theta) * 0)
    return jax.lax.fori_loop(0, (count + length - 1) // length, add, zero)


def newton(terms: Callable[[jax.Array], tuple], start: jax.Array) -> Newton:
    """Damped Newton to convergence; what a trial computed serves the next step."""

    def penalised(theta: jax.Array) -> tuple:
        value, gradient, hessian = terms(theta)
        return (
            value + 0.5 * PRIOR_PRECISION * theta @ theta,
            gradient + PRIOR_PRECISION * theta,
            hessian + PRIOR_PRECISION * jnp.eye(theta.size, dtype=theta.dtype),
        )

    def body(state: tuple) -> tuple:
        theta, (value, gradient, hessian), _, steps = state
        direction = -cho_solve(cho_factor(hessian), gradient)

        def worse(trial: tuple) -> jax.Array:
            return ~(trial[1][0] <= value + 1e-12 * jnp.abs(value)) & (trial[0] > 1e-6)

        def halve(trial: tuple) -> tuple:
            return trial[0] / 2, penalised(theta + trial[0] / 2 * direction)

        first = (jnp.ones((), theta.dtype), penalised(theta + direction))
        size, at = jax.lax.while_loop(worse, halve, first)
        return theta + size * direction, at, -gradient @ direction, steps + 1

    def unfinished(state: tuple) -> jax.Array:
        return (state[2] > TOLERANCE) & (state[3] < 100)

    infinity = jnp.asarray(jnp.inf, start.dtype)
    state = (start, penalised(start), infinity, jnp.asarray(0, jnp.int32))
    theta, (_, _, hessian), _, steps = jax.lax.while_loop(unfinished, body, state)
    return Newton(theta, hessian, steps)


def laplace(fit: Newton) -> Gaussian:
    return Gaussian(fit.mean, jnp.sqrt(jnp.diagonal(jnp.linalg.inv(fit.hessian))))


# --- one: logistic regression beside the other methods ---


def numpyro_methods(x: jax.Array, y: jax.Array) -> dict[str, Callable[[int], Any]]:
    """NUTS draws and variational posteriors; everything compiled, seeds differ."""

    def model() -> None:
        prior = dist.Normal(0.0, PRIOR_PRECISION**-0.5)
        theta = numpyro.sample("theta", prior.expand([NUM_FEATURES]).to_event(1))
        numpyro.sample("y", dist.Bernoulli(logits=x @ theta), obs=y)

    @jax.jit
    def nuts(seed: jax.Array) -> jax.Array:
        sampler = MCMC(
            NUTS(model), num_warmup=500, num_samples=1000, progress_bar=False
        )
        sampler.run(jax.random.key(seed))
        return sampler.get_samples()["theta"]

    def svi(guide: Any, read: Callable[[dict], Gaussian]) -> Callable[[int], Gaussian]:
        inference = SVI(model, guide, numpyro.optim.Adam(0.01), Trace_ELBO())

        @jax.jit
        def run(seed: jax.Array) -> Gaussian:
            key = jax.random.key(seed)
            return read(inference.run(key, 2000, progress_bar=False).params)

        return run

    def read_diagonal(params: dict) -> Gaussian:
        return Gaussian(params["theta_auto_loc"], params["theta_auto_scale"])

    def read_full(params: dict) -> Gaussian:
        root = params["auto_scale_tril"]
        return Gaussian(params["auto_loc"], jnp.sqrt(jnp.sum(root**2, 1)))

    return {
        "NUTS 500+1000, one chain": nuts,
        "SVI AutoNormal, 2000 Adam": svi(AutoNormal(model), read_diagonal),
        "SVI AutoMultivariateNormal, 2000 Adam": svi(
            AutoMultivariateNormal(model), read_full
        ),
    }


def flow_method(
    x: jax.Array, y: jax.Array, *, warm: bool, refine: bool = False, **options: Any
) -> Callable[[int], Gaussian]:
    """The whole stream as one compiled function."""
    flow = logistic_flow(**options)
    start = WARM_ROWS if warm else 0
    batches = jax.tree.map(
        lambda a: a[start:].reshape((-1, BATCH_SIZE, *a.shape[1:])), (x, y)
    )

    @jax.jit
    def run(first: Any, batches: Any) -> Gaussian:
        state = flow.init(jnp.zeros(NUM_FEATURES, x.dtype))
        if warm:
            state = ff.warm_start(flow, state, first)
        state, _ = jax.lax.scan(flow.update, state, batches)
        if refine:
            stored = jax.tree.map(lambda a: a[None], (x, y))
            state = ff.refine(flow, state, stored)
        return Gaussian(state.mean, ff.standard_error(state))

    first = (x[:WARM_ROWS], y[:WARM_ROWS])
    return lambda number: run(first, batches)


def newton_methods(x: jax.Array, y: jax.Array) -> dict[str, Callable[[int], Any]]:
    """One fit of all rows, and a fit after each batch of the stream."""
    zero = jnp.zeros(NUM_FEATURES, x.dtype)
    # chunks of 500 rows: a refit costs what its rows cost, with few steps of a loop
    chunks = jax.tree.map(lambda a: a.reshape((10, -1, *a.shape[1:])), (x, y))
    counts = jnp.arange(WARM_ROWS, len(x) + 1, BATCH_SIZE)

    @jax.jit
    def once(x: jax.Array, y: jax.Array) -> Gaussian:
        return laplace(newton(lambda t: sums(t, x, y, jnp.ones_like(y)), zero))

    @functools.partial(jax.jit, static_argnames="warm")
    def refits(chunks: tuple, counts: jax.Array, warm: bool) -> Newton:
        def refit(previous: jax.Array, count: jax.Array) -> tuple:
            start = previous if warm else zero
            fit = newton(lambda t: chunked_sums(t, *chunks, count), start)
            return fit.mean, fit

        return jax.lax.scan(refit, zero, counts)[1]

    return {
        "batch Newton, one fit": lambda number: once(x, y),
        "Newton after each batch, from the last": lambda number: refits(
            chunks, counts, warm=True
        ),
        "Newton after each batch, from zero": lambda number: refits(
            chunks, counts, warm=False
        ),
    }


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


def compare(quick: bool) -> None:
    """Prints the first table and its ratios."""
    x, y = (jnp.asarray(a, jnp.float64) for a in logistic_data(NUM_ROWS, 1))
    sampled = numpyro_methods(x, y)
    refitted = newton_methods(x, y)
    flows = {name: flow_method(x, y, **options) for name, options in FLOWS.items()}
    methods = {**sampled, **refitted, **flows}
    rounds = dict.fromkeys(methods, 7 if quick else 25)
    rounds |= dict.fromkeys(list(refitted)[1:], 3 if quick else 9)
    rounds |= dict.fromkeys(sampled, 3 if quick else 7)
    nuts, *variational = sampled
    rounds[nuts] = 1 if quick else 3
    timings = measure(methods, rounds)

    draws = np.stack(timings[nuts].outputs)
    effective = numpyro.diagnostics.effective_sample_size(draws)
    reference = Gaussian(draws.mean((0, 1)), draws.std((0, 1)))
    print(
        f"1. Logistic regression, n = {NUM_ROWS}, d = {NUM_FEATURES}, correlation 0.5, "
        f"prior N(0, {1 / PRIOR_PRECISION:.0f}), float64\n"
        f"   batches of {BATCH_SIZE}, warm start on {WARM_ROWS} rows; everything "
        "compiled, compilation only in the first call.\n"
        f"   Reference: the draws of all {len(draws)} NUTS runs; their Monte Carlo "
        f"error is {np.mean(effective**-0.5):.3f} sd (worst {np.max(effective**-0.5):.3f}).\n"
    )
    rows = []
    for name, timing in timings.items():
        output = timing.outputs[-1]
        if name == nuts:
            output = Gaussian(output.mean(0), output.std(0))
        elif isinstance(output, Newton):
            output = laplace(jax.tree.map(lambda a: a[-1], output))
        error = np.abs(output.mean - reference.mean) / reference.sd
        ratio = output.sd / reference.sd
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
    header = ("method", "median", "range", "first call", "max error", "median", "sd/sd")
    print(table(header, rows))
    print("   errors: |mean - reference| in posterior standard deviations\n")
    steps = [np.mean(timings[name].outputs[-1].steps) for name in list(refitted)[1:]]
    print(
        f"   {len(timings[list(refitted)[1]].outputs[-1].steps)} refits; Newton steps "
        f"a refit: {steps[0]:.1f} from the last solution, {steps[1]:.1f} from zero.\n"
    )
    print_ratios(timings, nuts, variational, list(refitted))


def print_ratios(
    timings: dict[str, Timing], nuts: str, variational: list, refitted: list
) -> None:
    once, from_last, from_zero = refitted
    targets = {
        nuts: 100.0,
        **dict.fromkeys(variational, 100.0),
        from_last: 50.0,
        from_zero: 50.0,
        once: None,
    }
    names = list(FLOWS)[:3]
    rows = []
    for other, target in targets.items():
        cells = []
        for name in names:
            ratio = timings[other].median / timings[name].median
            verdict = "met" if target and ratio >= target else "missed"
            cells.append(f"{ratio:.3g}x" + (f" {verdict}" if target else ""))
        goal = f"at least {target:.0f}x" if target else "(no target)"
        rows.append((f"{other} / Fisher Flow", goal, *cells))
    short = [name.removeprefix("Fisher Flow, ") for name in names]
    print(table(("ratio of medians", "target", *short), rows))
    print(
        "   Fisher Flow gives a posterior after every batch of its one pass. It is of "
        "Laplace quality, not MCMC quality:\n"
        "   its errors are those of one pass against the Laplace approximation, which "
        "batch Newton reaches in full and\n"
        "   which most of the distance to NUTS and SVI is owed to.\n"
    )


# --- two: a million rows through one scan ---


def million(quick: bool) -> None:
    """Prints throughput beside that of the matrix products alone."""
    num_rows = 1_000_000
    x, y = logistic_data(num_rows + LARGE_WARM_ROWS, 2)
    print(
        f"2. {num_rows:,} rows at d = {NUM_FEATURES} through one scan, after a warm "
        f"start on {LARGE_WARM_ROWS} rows\n"
        "   products: the same scan doing only X^T W X and X^T r with W and r given, "
        "no forward pass;\n"
        "   least filter: forward pass, products, one Cholesky solve, and nothing else "
        "(no evidence, no checks, no report).\n"
        "   errors: |mean - batch Newton on all rows| in posterior sd\n"
    )
    truth = jax.jit(
        lambda x, y, zero: laplace(
            newton(lambda t: chunked_sums(t, x, y, num_rows + LARGE_WARM_ROWS), zero)
        )
    )(
        jnp.asarray(x.reshape((-1, LARGE_WARM_ROWS, NUM_FEATURES))),
        jnp.asarray(y.reshape((-1, LARGE_WARM_ROWS))),
        jnp.zeros(NUM_FEATURES),
    )
    rows = []
    for dtype, size in itertools.product((jnp.float32, jnp.float64), LARGE_BATCH_SIZES):
        methods = scans(x, y, size, dtype)
        rounds = dict.fromkeys(methods, 2 if quick else 5)
        timings = measure(methods, rounds)
        products = timings["products"].median
        for name, timing in timings.items():
            output = timing.outputs[-1]
            error = "-"
            if isinstance(output, Gaussian):
                distance = np.abs(np.asarray(output.mean, np.float64) - truth.mean)
                error = f"{np.max(distance / truth.sd):.3f}"
            rows.append(
                (
                    f"{name}",
                    jnp.dtype(dtype).name,
                    f"{size}",
                    seconds(timing.median),
                    timing.spread,
                    seconds(timing.first),
                    f"{timing.median * size / num_rows * 1e6:.1f}",
                    f"{num_rows / timing.median / 1e6:.2f} M",
                    f"{products / timing.median:.0%}",
                    error,
                )
            )
    header = (
        "scan",
        "type",
        "batch",
        "median",
        "range",
        "first call",
        "us a batch",
        "rows/s",
        "of products",
        "max error",
    )
    print(table(header, rows), "\n")


def scans(x: np.ndarray, y: np.ndarray, size: int, dtype: Any) -> dict:
    """The four scans over the same batches, each a function of the round."""
    zero = jnp.zeros(NUM_FEATURES, dtype)
    first, rest = (
        tuple(jnp.asarray(a[part], dtype) for a in (x, y))
        for part in (slice(None, LARGE_WARM_ROWS), slice(LARGE_WARM_ROWS, None))
    )
    batches = jax.tree.map(lambda a: a.reshape((-1, size, *a.shape[1:])), rest)

    @jax.jit
    def products(batches: tuple) -> tuple:
        def body(total: tuple, batch: tuple) -> tuple:
            features, weights = batch  # any numbers serve as W and r
            information = features.T @ (features * weights[:, None])
            return (total[0] + information, total[1] + weights @ features), None

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
        return Gaussian(mean, jnp.sqrt(jnp.diagonal(jnp.linalg.inv(information))))

    def flow_scan(**options: Any) -> tuple[Callable, Any]:
        flow = logistic_flow(**options)
        state = ff.warm_start(flow, flow.init(zero), first)

        @jax.jit
        def run(state: Any, batches: tuple) -> Gaussian:
            state, _ = jax.lax.scan(flow.update, state, batches)
            return Gaussian(state.mean, ff.standard_error(state))

        return run, state

    one_step, state = flow_scan(num_steps=1)
    default, _ = flow_scan()
    dense = ff.information.to_dense(state.information)
    return {
        "products": lambda number: products(batches),
        "least filter": lambda number: least((state.mean, dense), batches),
        "Fisher Flow, 1 step": lambda number: one_step(state, batches),
        "Fisher Flow, default": lambda number: default(state, batches),
    }


# --- three: every structure and memory ---


def updates(quick: bool) -> None:
    """Prints microseconds an update and the size of the state."""
    size, number = 20, 500
    x, y = logistic_data(size * number, 3)
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
    quick = parser.parse_args().quick
    jax.config.update("jax_enable_x64", True)
    began = time.perf_counter()
    print(describe_machine(("jax", "jaxlib", "numpyro")), "\n")
    for part in (compare, million, updates):
        part(quick)
    print(f"{time.perf_counter() - began:.0f} seconds in all.")


if __name__ == "__main__":
    main()
