"""The time of one step, method by method, of a wide network and of a deep one."""

import functools
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import classifiers
import jax
import jax.flatten_util
import jax.numpy as jnp
import kfac_jax_method
import optimizer_methods as methods
import optimizer_problems
from kfac_floor import FloorRun
from measuring import Timing, measure, seconds, table
from optimizer_methods import ADAM, MAX_KL, Setting
from optimizer_problems import Problem

# targets: over the floor's, between refreshes and otherwise; over kfac-jax's
BETWEEN, REFRESHING, OVER_KFAC_JAX = 1.2, 1.25, 1.0
EQUAL = 1e-5  # relative distance of updates from the floor's

NEVER = 10**6
NO_REFRESH = "ff.kfac, no refresh"
FACTORS = "ff.kfac, factors each step"
INVERSES = "ff.kfac, and inverses every 10"
BOUNDED = ", max_kl"
CORRECTED = "EK-FAC, and bases every 10"
DEFAULTS = "ff.kfac, its periods (1, 10), max_kl"
THEIRS = "kfac-jax, and inverses every 10"
THEIR_DEFAULTS = "kfac-jax, its periods (1, 5)"
PERIODS = {
    NO_REFRESH: {"period": NEVER, "inverse_period": NEVER},
    FACTORS: {"period": 1, "inverse_period": NEVER},
    INVERSES: {"period": 1, "inverse_period": methods.INVERSE_PERIOD},
}

Verdict = tuple[str, float, float, bool]  # what, found, target, met


class Network(NamedTuple):
    """A problem whose batch is all of its data, and its layers' activations."""

    problem: Problem
    activations: list[Callable | None]


def networks() -> list[Network]:
    model = classifiers.mlp()
    rows = model.batch[0].shape[0]
    wide = Problem(
        model.name,
        model.apply_fn,
        classifiers.CATEGORICAL,
        model.params,
        model.batch,
        rows,
        0,
    )
    deep = optimizer_problems.autoencoder()
    data = jax.tree.map(lambda x: x[: deep.batch_size], deep.data)
    half = [jnp.tanh, jnp.tanh, jnp.tanh, None]
    return [
        Network(wide, [jax.nn.relu, jax.nn.relu, None]),
        Network(deep._replace(data=data), half + half),
    ]


def step_times(rounds: int, with_kfac_jax: bool) -> tuple[dict, list[Verdict]]:
    """Times ten steps at a time, each a call of its own, and prints two tables."""
    print("1. Ten steps at a time, each a call of its own\n")
    found, verdicts = {}, []
    for network in networks():
        problem = network.problem
        print(
            f"{problem.name}: {problem.num_params:,} parameters, a batch of "
            f"{problem.batch_size}\n"
        )
        runs, floors = runs_of(network, with_kfac_jax)
        timings = _timed(problem, runs | floors, rounds)
        print_step_times(timings)
        verdicts += _verdicts(problem, timings)
        found[problem.name] = timings
    return found, verdicts


def runs_of(network: Network, with_kfac_jax: bool) -> tuple[dict, dict]:
    """The methods, and the floors of some of them."""
    problem = network.problem
    made: dict[str, methods.Make] = {ADAM: methods.adam, methods.SGD: methods.sgd}
    floors = {}
    for name, periods in PERIODS.items():
        for bound, max_kl in (("", None), (BOUNDED, MAX_KL)):
            options = periods | {"max_kl": max_kl}
            made[name + bound] = functools.partial(methods.kfac, **options)
            floors[_floor(name + bound)] = FloorRun(*network, **options)
    made[CORRECTED] = functools.partial(methods.ekfac, max_kl=None, period=10)
    made[DEFAULTS] = functools.partial(methods.kfac, period=1)
    runs: dict[str, Any] = {
        name: methods.OptaxRun(problem, make) for name, make in made.items()
    }
    if with_kfac_jax:
        runs[THEIRS] = kfac_jax_method.KfacJaxRun(problem, 1, None)
        # its default periods, without its steps of one batch each before the first
        runs[THEIR_DEFAULTS] = kfac_jax_method.KfacJaxRun(problem, 1, None, 5)
    return runs, floors


def _floor(name: str) -> str:
    return name.replace("ff.kfac", "floor")


def _timed(problem: Problem, runs: dict, rounds: int) -> dict[str, Timing]:
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
    # after the times: a reference for each of them would be kept meanwhile
    for bound in ("", BOUNDED):
        names = INVERSES + bound, _floor(INVERSES + bound)
        distance = _distance(problem, *(runs[name] for name in names))
        print(
            f"   updates{bound or ''}: {distance:.1e} from the floor's, relatively "
            f"(to be below {EQUAL:g})"
        )
        if not distance < EQUAL:
            print(f"   the floor of {names[0]} is not equal to it")
        floor = runs[names[1]]
        distance = _distance(problem, floor, floor, rounded=True)
        print(
            "   the floor's from its own, with parameters half of their last bit away: "
            f"{distance:.1e}"
        )
    print()
    return timings


def _distance(
    problem: Problem, run: Any, floor: Any, *, rounded: bool = False
) -> float:
    """Of the second update, which has momentum, in the norm.

    With `rounded` the second starts from parameters as far away as rounding is.
    """
    setting, moves = Setting(jnp.float32(1.0), jnp.float32(1e-2)), []
    for each in (run, floor):
        carry = each.start(setting)
        if rounded and moves:
            carry = _rounded(carry[0]), *carry[1:]
        carry = each.step(setting, carry, problem.data)
        before = jax.tree.map(jnp.copy, each.params(carry))
        after = each.params(each.step(setting, carry, problem.data))
        moves.append(jax.tree.map(jnp.subtract, after, before))
    mine, theirs = map(jax.flatten_util.ravel_pytree, moves)
    return float(jnp.linalg.norm(mine[0] - theirs[0]) / jnp.linalg.norm(theirs[0]))


def _rounded(params: Any) -> Any:
    def leaf(x: jax.Array) -> jax.Array:
        signs = jax.random.rademacher(jax.random.key(1), x.shape, x.dtype)
        return x * (1 + signs * jnp.finfo(x.dtype).eps / 2)

    return jax.tree.map(leaf, params)


def _over(timings: dict[str, Timing], name: str, other: str) -> float:
    return statistics.median(
        mine / theirs
        for mine, theirs in zip(
            timings[name].seconds, timings[other].seconds, strict=True
        )
    )


def print_step_times(timings: dict[str, Timing]) -> None:
    rows = []
    for name, timing in timings.items():
        each = [value / 10 for value in timing.seconds]
        columns = ADAM, _floor(name), THEIRS
        rows.append(
            (
                name,
                seconds(statistics.median(each)),
                f"{seconds(min(each))}-{seconds(max(each))}",
                seconds(timing.first),
                *(
                    f"{_over(timings, name, other):.2f}x"
                    if other in timings and other != name
                    else ""
                    for other in columns
                ),
            )
        )
    header = ("", "a step", "range", "first ten", "x Adam", "x floor", "x kfac-jax")
    print(table(header, rows), "\n")


def _verdicts(problem: Problem, timings: dict[str, Timing]) -> list[Verdict]:
    verdicts, of = [], problem.name.split()[0]
    for name in PERIODS:
        target = BETWEEN if name == NO_REFRESH else REFRESHING
        for each in (name, name + BOUNDED):
            ratio = _over(timings, each, _floor(each))
            verdicts.append(
                (f"{of}, {each}, over its floor", ratio, target, ratio <= target)
            )
    if THEIRS in timings:
        ratio = _over(timings, INVERSES, THEIRS)
        what = f"{of}, {INVERSES}, over kfac-jax's"
        verdicts.append((what, ratio, OVER_KFAC_JAX, ratio <= OVER_KFAC_JAX))
    return verdicts
