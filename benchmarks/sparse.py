"""Hashed clicks: the sparse flow beside FTRL-Proximal and scikit-learn's SGD.

    python benchmarks/sparse.py

A stream of clicks: rows of 21 ids, an intercept and 20 fields whose values follow
Zipf's law, hashed into 2^18 features; the truth is a logistic regression on the values
before hashing. Every method predicts each batch of 64 rows before it learns from it;
printed is the mean log-loss of all rows, and of the last fifth. FTRL-Proximal is this
file's own, row by row as it is defined; its rate is the best of those printed. Then the
seconds of an update by the number of features, in a scan and in a loop whose state is
donated.
"""

import argparse
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import measuring
import numpy as np
from scipy import sparse as scipy_sparse
from sklearn.linear_model import SGDClassifier

import fisherflow_jax as ff

COUNT, WIDTH = 64, 21


def stream(num_batches: int, num_features: int) -> tuple[np.ndarray, ...]:
    """Ids `(batches, 64, 21)`, clicks, and their probabilities."""
    rng = np.random.default_rng(3)
    shape = (num_batches, COUNT, WIDTH - 1)
    ids = np.minimum(rng.zipf(1.2, shape), 10**9).astype(np.int64)
    codes = (ids * 2_654_435_761 + np.arange(WIDTH - 1) * 97_531) % (2**31 - 1)
    weights = np.sin(codes * 12.9898) * 43_758.5453
    weights = (2 * (weights - np.floor(weights)) - 1) * 3 / np.sqrt(WIDTH - 1)
    chance = 1 / (1 + np.exp(1.5 - weights.sum(-1)))
    clicks = (rng.random(chance.shape) < chance).astype(np.float32)
    hashed = np.concatenate(
        [np.zeros((*shape[:2], 1), np.int64), codes % (num_features - 1) + 1], -1
    )
    return hashed.astype(np.int32), clicks, chance


def log_loss(chance: np.ndarray, clicks: np.ndarray) -> np.ndarray:
    chance = np.clip(chance, 1e-7, 1 - 1e-7)
    return -(clicks * np.log(chance) + (1 - clicks) * np.log(1 - chance))


def ftrl(rate: float, state: tuple, row: tuple) -> tuple:
    """McMahan et al. 2013, with beta = 1 and l2 = 1."""
    (z, n), (ids, click) = state, row
    of_z, of_n = z[ids], n[ids]
    weights = -of_z / ((1 + jnp.sqrt(of_n)) / rate + 1)
    chance = jax.nn.sigmoid(jnp.sum(weights))
    slope = chance - click
    sigma = (jnp.sqrt(of_n + slope**2) - jnp.sqrt(of_n)) / rate
    z, n = z.at[ids].add(slope - sigma * weights), n.at[ids].add(slope**2)
    return (z, n), chance


def by_ftrl(rate: float, ids: np.ndarray, clicks: np.ndarray, size: int) -> Callable:
    rows = jnp.asarray(ids.reshape(-1, WIDTH)), jnp.asarray(clicks.ravel())

    @jax.jit
    def run(rows: tuple) -> jax.Array:
        start = jnp.zeros(size), jnp.zeros(size)
        return jax.lax.scan(functools.partial(ftrl, rate), start, rows)[1]

    return lambda: run(rows)


def by_flow(ids: np.ndarray, clicks: np.ndarray, size: int, **options: Any) -> Callable:
    flow = ff.sparse.flow(ff.likelihoods.bernoulli(), size, **options)
    rows = ff.sparse.Rows(jnp.asarray(ids), jnp.ones(ids.shape))
    batches = rows, jnp.asarray(clicks)

    @jax.jit
    def run(batches: tuple) -> jax.Array:
        _, info = jax.lax.scan(flow.update, flow.init(), batches)
        return jax.nn.sigmoid(info.output)

    return lambda: run(batches)


def by_sgd(ids: np.ndarray, clicks: np.ndarray, size: int) -> Callable:
    def run() -> np.ndarray:
        model = SGDClassifier(
            loss="log_loss", alpha=1e-5, learning_rate="constant", eta0=0.05
        )
        found = np.full(clicks.shape, 0.5)
        ends = np.arange(0, COUNT * WIDTH + 1, WIDTH)
        for time_, (own, click) in enumerate(zip(ids, clicks, strict=True)):
            x = scipy_sparse.csr_matrix(
                (np.ones(own.size), own.ravel(), ends), shape=(COUNT, size)
            )
            if time_:
                found[time_] = model.predict_proba(x)[:, 1]
            model.partial_fit(x, click, classes=[0.0, 1.0])
        return found

    return run


def compared(num_batches: int, peer_batches: int, size: int) -> None:
    ids, clicks, chance = stream(num_batches, size)
    truth = log_loss(chance, clicks)
    print(
        f"\n{num_batches * COUNT:,} rows, {size:,} features, clicks "
        f"{clicks.mean():.3f}; the truth's own log-loss {truth.mean():.4f}"
    )
    methods = {
        f"flow, prior {prior:g}{', plain' * (not normalise)}": by_flow(
            ids, clicks, size, prior_precision=prior, normalise=normalise
        )
        for prior in (1.0, 10.0, 30.0)
        for normalise in (True, False)
    }
    methods["flow, prior 10, l1 1"] = by_flow(
        ids, clicks, size, prior_precision=10.0, l1=1.0
    )
    methods["flow, prior 10, decay .999"] = by_flow(
        ids, clicks, size, prior_precision=10.0, memory=ff.memories.exponential(0.999)
    )
    for rate in (0.03, 0.1, 0.3):
        methods[f"FTRL-Proximal, rate {rate}, rows"] = by_ftrl(rate, ids, clicks, size)
        methods[f"flow with rate={rate}, batches"] = by_flow(
            ids, clicks, size, rate=rate, prior_precision=1 / rate + 1, normalise=False
        )
    few = ids[:peer_batches], clicks[:peer_batches]
    methods[f"scikit-learn SGD, first {peer_batches * COUNT:,} rows"] = by_sgd(
        *few, size
    )
    rows = []
    for name, run in methods.items():
        jax.block_until_ready(run())
        start = time.perf_counter()
        found = np.asarray(run()).reshape(-1, COUNT)
        elapsed = time.perf_counter() - start
        losses = log_loss(found, clicks[: len(found)])
        first = losses[:peer_batches].mean()
        last = f"{losses[-len(losses) // 5 :].mean():.4f}"
        error = losses.std() / np.sqrt(losses.size)
        rows.append((
            name, f"{losses.mean():.4f} ({error:.4f})", f"{first:.4f}", last,
            f"{found.size / elapsed / 1e3:,.0f} k",
        ))  # fmt: skip
    header = (
        "",
        "log-loss (se)",
        f"first {peer_batches * COUNT:,}",
        "last fifth",
        "rows/s",
    )
    print(measuring.table(header, rows))


def timed(sizes: list[int], rounds: int) -> None:
    print("\nseconds of an update of 64 rows by the number of features")
    rows = []
    for memory in (ff.memories.stationary(), ff.memories.exponential(0.999)):
        for size in sizes:
            ids, clicks, _ = stream(200, size)
            flow = ff.sparse.flow(ff.likelihoods.bernoulli(), size, memory=memory)
            entries = ff.sparse.Rows(jnp.asarray(ids), jnp.ones(ids.shape))
            batches = entries, jnp.asarray(clicks)
            each = [jax.tree.map(lambda x, t=t: x[t], batches) for t in range(100)]
            scan = jax.jit(
                lambda state, batches, flow=flow: jax.lax.scan(
                    flow.update, state, batches
                ),
                donate_argnums=0,
            )
            update = jax.jit(flow.update, donate_argnums=0)
            jax.block_until_ready(
                (scan(flow.init(), batches), update(flow.init(), each[0]))
            )
            in_scan, in_loop = [], []
            for _ in range(rounds):
                state = jax.block_until_ready(flow.init())
                start = time.perf_counter()
                jax.block_until_ready(scan(state, batches))
                in_scan.append((time.perf_counter() - start) / len(ids))
                state = jax.block_until_ready(flow.init())
                start = time.perf_counter()
                for batch in each:
                    state, _ = update(state, batch)
                jax.block_until_ready(state)
                in_loop.append((time.perf_counter() - start) / len(each))
            cells = [
                f"{measuring.seconds(float(np.median(x)))} "
                f"({measuring.seconds(min(x))}-{measuring.seconds(max(x))})"
                for x in (in_scan, in_loop)
            ]
            rows.append((f"{memory}, {size:,}", *cells))
    print(measuring.table(("", "scan", "loop, donated"), rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, default=1_500)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    print(measuring.describe_machine(("jax", "jaxlib", "scikit-learn")))
    compared(arguments.batches, min(200, arguments.batches), 2**18)
    timed([10_000, 1_000_000, 10_000_000], arguments.rounds)


if __name__ == "__main__":
    main()
