"""The time of one step of a wide network, method by method."""

import functools
import statistics
from collections.abc import Callable
from typing import Any

import classifiers
import jax
import jax.numpy as jnp
import kfac_jax_method
import optimizer_methods as methods
from measuring import Timing, measure, seconds, table
from optimizer_methods import ADAM, Setting
from optimizer_problems import Problem

WITHOUT_REFRESH = 3.5  # targets: a step over Adam's,
OVER_KFAC_JAX = 0.6  # and with inverses every ten steps, over kfac-jax's

NEVER = 10**6
NO_REFRESH = "ff.kfac, no refresh"
FACTORS = "ff.kfac, factors each step"
INVERSES = "ff.kfac, and inverses every 10"
CORRECTED = "EK-FAC, and bases every 10"
THEIRS = "kfac-jax, and inverses every 10"

Verdict = tuple[str, float, float, bool]  # what, found, target, met


def step_times(rounds: int, with_kfac_jax: bool) -> tuple[dict[str, Timing], list]:
    """Times ten steps at a time, each a call of its own, and prints the table."""
    model = classifiers.mlp()
    rows = model.batch[0].shape[0]
    problem = Problem(
        model.name,
        model.apply_fn,
        classifiers.CATEGORICAL,
        model.params,
        model.batch,
        rows,
        0,
    )
    never = {"period": NEVER, "inverse_period": NEVER, "max_kl": None}
    kfac = functools.partial(methods.kfac, max_kl=None)
    made: dict[str, methods.Make] = {
        ADAM: methods.adam,
        methods.SGD: methods.sgd,
        NO_REFRESH: functools.partial(methods.kfac, **never),
        FACTORS: functools.partial(kfac, period=1, inverse_period=NEVER),
        INVERSES: functools.partial(kfac, period=1),
        CORRECTED: functools.partial(methods.ekfac, max_kl=None, period=10),
    }
    runs: dict[str, Any] = {
        name: methods.OptaxRun(problem, make) for name, make in made.items()
    }
    if with_kfac_jax:
        runs[THEIRS] = kfac_jax_method.KfacJaxRun(problem, 1, None)
    setting = Setting(jnp.float32(1e-3), jnp.float32(1e-2))

    def ten_steps(run: Any) -> Callable[[int], Any]:
        carry = run.start(setting)

        def call(number: int) -> Any:
            nonlocal carry
            for _ in range(10):
                carry = run.step(setting, carry, problem.data)
            return jax.block_until_ready(jax.tree.leaves(carry)[0]).ravel()[0]

        return call

    calls = {name: ten_steps(run) for name, run in runs.items()}
    timings = measure(calls, dict.fromkeys(calls, rounds), shuffle=True)
    print(
        f"1. {model.name}: {model.num_params:,} parameters, a batch of {rows}; ten "
        "steps at a time, each a call\n"
    )
    verdicts = print_step_times(timings)
    return timings, verdicts


def print_step_times(timings: dict[str, Timing]) -> list[Verdict]:
    def over(name: str, other: str) -> float:
        return statistics.median(
            mine / theirs
            for mine, theirs in zip(
                timings[name].seconds, timings[other].seconds, strict=True
            )
        )

    rows = []
    for name, timing in timings.items():
        each = [value / 10 for value in timing.seconds]
        rows.append(
            (
                name,
                seconds(statistics.median(each)),
                f"{seconds(min(each))}-{seconds(max(each))}",
                seconds(timing.first),
                f"{over(name, ADAM):.2f}x",
                f"{over(name, THEIRS):.2f}x" if THEIRS in timings else "",
            )
        )
    header = ("", "a step", "range", "first ten", "x Adam", "x kfac-jax")
    print(table(header, rows), "\n")
    ratio = over(NO_REFRESH, ADAM)
    what = "a step without refresh, over Adam's"
    verdicts = [(what, ratio, WITHOUT_REFRESH, ratio <= WITHOUT_REFRESH)]
    if THEIRS in timings:
        ratio = over(INVERSES, THEIRS)
        what = "a step with inverses every 10, over kfac-jax's"
        verdicts.append((what, ratio, OVER_KFAC_JAX, ratio <= OVER_KFAC_JAX))
    return verdicts
