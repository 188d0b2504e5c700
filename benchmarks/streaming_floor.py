"""An update beside the least program that computes the same numbers, and beside peers.

Tables 4 to 7 of `streaming.py`, in float32, or alone. Needs the extra `benchmarks`:

    python benchmarks/streaming_floor.py            # some minutes
    python benchmarks/streaming_floor.py --quick    # fewer repeats, no d = 1,000
"""

import argparse
import contextlib
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.linalg import cho_solve
from measuring import Timing, describe_machine, measure, parsed, seconds, table

import fisherflow_jax as ff

SHORT, CONTRACTION = 1e-14, 0.01  # the flow's own


def data(number: int, size: int, dimension: int, seed: int = 0) -> tuple:
    """`number` batches of a logistic regression in float32."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(number, size, dimension)).astype(np.float32)
    chance = 1 / (1 + np.exp(-x @ rng.normal(size=dimension) / dimension**0.5))
    y = (rng.random((number, size)) < chance).astype(np.float32)
    return jnp.asarray(x), jnp.asarray(y)


def flow(**options: Any) -> ff.FisherFlow:
    return ff.fisher_flow(
        lambda params, x: x @ params, ff.likelihoods.bernoulli(), **options
    )


def floor(steps: int) -> Callable[[tuple, tuple], tuple[tuple, None]]:
    """A hand-written update of mean, information, log-determinant and evidence.

    One step: a gradient, an information, a factorisation. Else: Newton's step, steps by
    its factor while they contract, and the information and its factor at the solution.
    No line search, no check of values, no second loop, sums in one number an entry.
    """

    def log_likelihood(theta: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
        outputs = x @ theta
        return jnp.sum(y * outputs - jax.nn.softplus(outputs))

    def measured(theta: jax.Array, information: jax.Array, x: jax.Array) -> tuple:
        chance = jax.nn.sigmoid(x @ theta)
        rows = jnp.sqrt(chance * (1 - chance))[:, None] * x
        total = information + rows.T @ rows
        scale = jnp.sqrt(jnp.diagonal(total))
        factor = jnp.linalg.cholesky(
            total / (scale[:, None] * scale[None, :]), symmetrize_input=False
        )
        return total, factor, scale

    def solve(factor: jax.Array, scale: jax.Array, vector: jax.Array) -> jax.Array:
        return cho_solve((factor, True), vector / scale) / scale

    def update(state: tuple, batch: tuple) -> tuple[tuple, None]:
        mean, information, logdet, evidence = state

        def evaluate(theta: jax.Array) -> jax.Array:
            score = jax.grad(log_likelihood)(theta, *batch)
            return information @ (theta - mean) - score

        gradient = evaluate(mean)
        total, factor, scale = measured(mean, information, batch[0])
        step = solve(factor, scale, gradient)
        after = mean - step
        if steps > 1:
            before, gradient_after = gradient @ step, evaluate(after)
            rest = solve(factor, scale, gradient_after)

            def contracts(chord: tuple) -> jax.Array:
                _, _, remaining, before = chord
                short = remaining * remaining <= SHORT * before
                return ~short & (remaining < CONTRACTION * before)

            def move(chord: tuple) -> tuple:
                theta, rest, remaining, _ = chord
                theta = theta - rest
                gradient = evaluate(theta)
                rest = solve(factor, scale, gradient)
                return theta, rest, gradient @ rest, remaining

            start = after, rest, gradient_after @ rest, before
            after, rest, _, _ = jax.lax.while_loop(contracts, move, start)
            after = after - rest
            total, factor, scale = measured(after, information, batch[0])
        pivots = jnp.log(jnp.diagonal(factor)) + jnp.log(scale)
        logdet_after = 2 * jnp.sum(pivots)
        offset = after - mean
        gain = log_likelihood(after, *batch) - 0.5 * offset @ information @ offset
        gain = gain + 0.5 * (logdet - logdet_after)
        return (after, total, logdet_after, evidence + gain), None

    return update


def start(dimension: int) -> tuple:
    zero = jnp.zeros(())
    return jnp.zeros(dimension), jnp.eye(dimension), zero, zero


def passed(run: Callable, state: Any, batches: tuple, _: int) -> Any:
    """The state after a pass, for `measure`."""
    return run(state, batches)[0]


def ratio(subject: Timing, reference: Timing) -> str:
    """The median of rounds' ratios, and the least and greatest."""
    pairs = zip(subject.seconds, reference.seconds, strict=True)
    ratios = np.array([a / b for a, b in pairs])
    return f"{np.median(ratios):.2f} ({ratios.min():.2f}-{ratios.max():.2f})"


def floors(quick: bool) -> None:
    """Prints the flow's update as multiples of the floor's, both in a scan."""
    rounds, rows = (5 if quick else 15), []
    for dimension, size in ((20, 1), (20, 20), (20, 100), (100, 20), (100, 100)):
        number = 40 * dimension // size + (1500 if dimension == 20 else 200)
        batches = data(number, size, dimension)
        own = flow().init(jnp.zeros(dimension))
        # after a first part of the stream: a belief, and no guess
        warm, rest = (
            jax.tree.map(lambda a, s=s: a[s], batches) for s in _parts(dimension, size)
        )
        cells = []
        for steps in (1, 4):
            scan = functools.partial(jax.lax.scan, flow(num_steps=steps).update)
            least = functools.partial(jax.lax.scan, floor(steps))
            runs = [(jax.jit(scan), own), (jax.jit(least), start(dimension))]
            (mine, _), (other, _) = [(run(at, warm)[0], 0) for run, at in runs]
            at = mine.mean, jnp.asarray(ff.information.to_dense(mine.information))
            other = (*at, mine.log_determinant, mine.log_evidence)
            methods = {
                "flow": functools.partial(passed, runs[0][0], mine, rest),
                "floor": functools.partial(passed, runs[1][0], other, rest),
            }
            timings = measure(methods, dict.fromkeys(methods, rounds))
            found, least_found = (timings[n].outputs[0] for n in methods)
            deviation = jnp.max(jnp.abs(found.mean - least_found[0]))
            deviation = deviation / jnp.max(ff.standard_error(found))
            count = len(rest[1])
            cells += [
                seconds(timings["floor"].median / count),
                ratio(timings["flow"], timings["floor"]),
                f"{float(deviation):.1e}",
            ]
        rows.append((f"{dimension}, {size}", *cells))
    print("4. An update in a scan beside the least program of equal numbers, float32\n")
    header = ["d, rows"]
    for name in ("one step", "default"):
        header += [f"floor, {name}", "flow / floor", "apart / se"]
    print(table(header, rows), "\n")


def _parts(dimension: int, size: int) -> tuple[slice, slice]:
    warm = 40 * dimension // size
    return slice(0, warm), slice(warm, None)


def loops(quick: bool) -> None:
    """Prints a plain Python loop over `flow.update` beside a jitted one."""
    batches = data(200, 20, 20)
    one = flow()
    listed = [(x, y) for x, y in zip(*batches, strict=True)]
    jitted = jax.jit(one.update)

    def loop(update: Callable) -> Callable[[int], Any]:
        def run(_: int) -> Any:
            state = one.init(jnp.zeros(20))
            for batch in listed:
                state, _ = update(state, batch)
            return state

        return run

    methods = {"plain": loop(one.update), "jitted": loop(jitted)}
    timings = measure(methods, dict.fromkeys(methods, 5 if quick else 15))
    print("5. A Python loop over updates at d = 20, 20 rows, float32, an update\n")
    rows = [(n, seconds(t.median / 200), t.spread) for n, t in timings.items()]
    print(table(("loop", "median", "of 200"), rows))
    print(f"   plain / jitted: {ratio(timings['plain'], timings['jitted'])}\n")


def peers(quick: bool) -> None:
    """Prints rows a second of one pass over batches of 100 rows."""
    from sklearn.linear_model import SGDClassifier

    rows = []
    for dimension in (10, 100) if quick else (10, 100, 1000):
        number = {10: 1000, 100: 300, 1000: 20}[dimension]
        batches = data(number, 100, dimension)
        x, y = (np.asarray(a) for a in batches)
        methods: dict[str, Callable[[int], Any]] = {}
        for name, options in {
            "ff full": {},
            "ff full, one step": {"num_steps": 1},
            "ff diagonal": {"structure": ff.structures.diagonal()},
        }.items():
            one = flow(**options)
            run = jax.jit(functools.partial(jax.lax.scan, one.update))
            state = one.init(jnp.zeros(dimension))
            methods[name] = functools.partial(passed, run, state, batches)

        def partial_fit(_: int, x: np.ndarray = x, y: np.ndarray = y) -> None:
            model = SGDClassifier(loss="log_loss")
            for features, targets in zip(x, y, strict=True):
                model.partial_fit(features, targets, classes=[0, 1])

        methods["scikit-learn partial_fit"] = partial_fit
        methods["statsmodels, one fit of all"] = functools.partial(_statsmodels, x, y)
        with contextlib.suppress(ImportError):  # river is in no extra
            methods["river learn_many"] = functools.partial(_river(), x, y)
        timings = measure(methods, dict.fromkeys(methods, 3 if quick else 7))
        for name, timing in timings.items():
            rate = number * 100 / np.array(timing.seconds)
            spread = f"{rate.min():,.0f}-{rate.max():,.0f}"
            rows.append((name, str(dimension), f"{np.median(rate):,.0f}", spread))
    rows.sort(key=lambda row: int(row[1]))
    print("6. Rows a second, logistic regression, batches of 100\n")
    print(table(("method", "d", "rows/s", "spread"), rows), "\n")


def _statsmodels(x: np.ndarray, y: np.ndarray, _: int) -> None:
    import statsmodels.api as sm

    model = sm.GLM(y.reshape(-1), x.reshape((-1, x.shape[-1])), sm.families.Binomial())
    model.fit()


def _river() -> Callable[[np.ndarray, np.ndarray, int], None]:
    import pandas as pd
    from river import linear_model

    def learn(x: np.ndarray, y: np.ndarray, _: int) -> None:
        model = linear_model.LogisticRegression()
        for features, targets in zip(x, y, strict=True):
            model.learn_many(pd.DataFrame(features), pd.Series(targets.astype(bool)))

    return learn


def large(quick: bool) -> None:
    """Prints milliseconds and memory of one full update at large d."""
    rows = []
    for dimension in (100, 1000) if quick else (100, 1000, 5000):
        x, y = data(2, 100, dimension)
        one = flow()
        state, _ = jax.jit(one.update)(one.init(jnp.zeros(dimension)), (x[0], y[0]))
        run = jax.jit(one.update).lower(state, (x[1], y[1])).compile()
        memory = run.memory_analysis()
        used = memory.temp_size_in_bytes + memory.output_size_in_bytes
        timing = measure(
            {"update": functools.partial(passed, run, state, (x[1], y[1]))},
            {"update": 3 if dimension > 1000 else 9},
        )["update"]
        kept = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        rows.append(
            (
                str(dimension),
                f"{timing.median * 1e3:.3g}",
                timing.spread,
                f"{kept / 2**20:.3g}",
                f"{used / 2**20:.3g}",
            )
        )
    print("7. A full update of 100 rows, float32\n")
    header = ("d", "ms", "spread", "state, MiB", "update and result, MiB")
    print(table(header, rows), "\n")


TABLES = floors, loops, peers, large


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer repeats")
    arguments = parsed(parser)
    if arguments is None:
        return
    print(describe_machine(("jax", "jaxlib", "scikit-learn", "statsmodels")), "\n")
    for part in TABLES:
        part(arguments.quick)


if __name__ == "__main__":
    main()
