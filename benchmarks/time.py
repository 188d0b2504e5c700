"""Filters and smoothers: the flow, dynamax and statsmodels, same model, same numbers.

    python benchmarks/time.py

A state of d numbers (a damped rotation in each pair), one number seen at each of n
times; float64 throughout. Seconds are of one pass over the series, compiled before; the
differences are the largest of all times and entries, to dynamax.
"""

import argparse
from collections.abc import Callable
from typing import Any

import jax

jax.config.update("jax_enable_x64", True)

import jax.numpy as jnp  # noqa: E402
import measuring  # noqa: E402
import numpy as np  # noqa: E402
from dynamax.linear_gaussian_ssm import lgssm_filter, lgssm_smoother  # noqa: E402
from dynamax.linear_gaussian_ssm.inference import (  # noqa: E402
    ParamsLGSSM,
    ParamsLGSSMDynamics,
    ParamsLGSSMEmissions,
    ParamsLGSSMInitial,
)
from statsmodels.tsa.statespace.kalman_smoother import KalmanSmoother  # noqa: E402

import fisherflow_jax as ff  # noqa: E402

NOISE = 0.5


def system(d: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The transition, the variance of its noise, and what is seen of the state."""
    angles = np.linspace(0.1, 1.0, d // 2)
    move = np.zeros((d, d))
    for i, angle in enumerate(angles):
        part = slice(2 * i, 2 * i + 2)
        turn = [[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]]
        move[part, part] = 0.98 * np.array(turn)
    look = np.tile([1.0, 0.0], d // 2)
    return move, 0.1 * np.eye(d) + 0.01, look


def series(d: int, count: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    move, noise, look = system(d)
    root, state = np.linalg.cholesky(noise), np.zeros(d)
    shocks, errors = rng.normal(size=(count, d)), rng.normal(size=count)
    found = np.empty(count)
    for time in range(count):
        found[time] = look @ state + NOISE * errors[time]
        state = move @ state + root @ shocks[time]
    return found


def of_flow(d: int, seen: np.ndarray) -> dict[str, Callable[[int], Any]]:
    move, noise, look = map(jnp.asarray, system(d))
    flow = ff.fisher_flow(
        lambda state, inputs: jnp.broadcast_to(look @ state, inputs.shape[:1]),
        ff.likelihoods.gaussian(NOISE),
        memory=ff.memories.random_walk(np.asarray(noise), np.asarray(move)),
        prior_is="predicted",
        num_steps=1,
    )
    batches = jnp.zeros((len(seen), 1, 0)), jnp.asarray(seen)[:, None]

    def step(state: ff.FlowState, batch: tuple) -> tuple:
        state, _ = flow.update(state, batch)
        return state, state

    @jax.jit
    def filtered(batches: tuple) -> tuple:
        last, states = jax.lax.scan(step, flow.init(jnp.zeros(d)), batches)
        return states.mean, last.log_evidence

    @jax.jit
    def smoothed(batches: tuple) -> tuple:
        _, states = jax.lax.scan(step, flow.init(jnp.zeros(d)), batches)
        found = ff.smooth(flow, states)
        return found.mean, jax.vmap(ff.standard_error)(found)

    return {
        "filter": lambda _: filtered(batches),
        "smoother": lambda _: smoothed(batches),
    }


def of_dynamax(d: int, seen: np.ndarray) -> dict[str, Callable[[int], Any]]:
    move, noise, look = map(jnp.asarray, system(d))
    params = ParamsLGSSM(
        ParamsLGSSMInitial(jnp.zeros(d), jnp.eye(d)),
        ParamsLGSSMDynamics(move, None, None, noise),
        ParamsLGSSMEmissions(look[None], None, None, NOISE**2 * jnp.eye(1)),
    )
    emissions = jnp.asarray(seen)[:, None]

    @jax.jit
    def filtered(emissions: jax.Array) -> tuple:
        found = lgssm_filter(params, emissions)
        return found.filtered_means, found.marginal_loglik

    @jax.jit
    def smoothed(emissions: jax.Array) -> tuple:
        found = lgssm_smoother(params, emissions)
        entries = jnp.diagonal(found.smoothed_covariances, 0, 1, 2)
        return found.smoothed_means, jnp.sqrt(entries)

    return {
        "filter": lambda _: filtered(emissions),
        "smoother": lambda _: smoothed(emissions),
    }


def of_statsmodels(d: int, seen: np.ndarray) -> dict[str, Callable[[int], Any]]:
    move, noise, look = system(d)
    model = KalmanSmoother(
        1, d, design=look[None], obs_cov=NOISE**2 * np.eye(1), transition=move,
        selection=np.eye(d), state_cov=noise,
    )  # fmt: skip
    model.bind(seen[:, None].copy())
    model.initialize_known(np.zeros(d), np.eye(d))

    def filtered(_: int) -> tuple:
        found = model.filter()
        return found.filtered_state.T, found.llf

    def smoothed(_: int) -> tuple:
        found = model.smooth()
        entries = np.diagonal(found.smoothed_state_cov, 0, 0, 1)
        return found.smoothed_state.T, np.sqrt(entries)

    return {"filter": filtered, "smoother": smoothed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1_000, 100_000])
    parser.add_argument("--sizes", type=int, nargs="+", default=[2, 10])
    arguments = measuring.parsed(parser)
    if arguments is None:
        return
    print(measuring.describe_machine(("jax", "jaxlib", "dynamax", "statsmodels")))
    rows = []
    for d in arguments.sizes:
        for count in arguments.lengths:
            seen = series(d, count)
            for kind in ("filter", "smoother"):
                calls = {
                    "flow": of_flow(d, seen)[kind],
                    "dynamax": of_dynamax(d, seen)[kind],
                    "statsmodels": of_statsmodels(d, seen)[kind],
                }
                rounds = dict.fromkeys(calls, arguments.rounds)
                timings = measuring.measure(calls, rounds, shuffle=True)
                peer = timings["dynamax"]
                for name, timing in timings.items():
                    off = [
                        float(np.max(np.abs(np.asarray(one) - np.asarray(other))))
                        for one, other in zip(
                            timing.outputs[0], peer.outputs[0], strict=True
                        )
                    ]
                    rows.append((
                        f"{kind}, d = {d}, n = {count}", name,
                        measuring.seconds(timing.median), timing.spread,
                        f"{timing.median / peer.median:.2f}",
                        measuring.seconds(timing.first), f"{off[0]:.0e}",
                        f"{off[1]:.0e}",
                    ))  # fmt: skip
    header = (
        "", "", "median", "range", "of dynamax", "first call", "means",
        "evidence or errors",
    )  # fmt: skip
    print(measuring.table(header, rows))


if __name__ == "__main__":
    main()
