"""Training over a grid by successive halving, and the time of a step in turns."""

import functools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from measuring import measure, seconds
from optimizer_methods import Run, Setting
from optimizer_problems import Problem

import fisherflow_jax as ff

BLOCK = 10  # steps between two looks at the loss of all data
# up to which share of the steps, and how many settings take part
STAGES = (1 / 8, None), (1 / 2, 4), (1, 2)


class Trained(NamedTuple):
    """The best setting of one method, and how it went."""

    setting: Setting
    steps: list[int]
    losses: list[float]  # of all data, after so many steps
    step_seconds: float = math.nan
    spread: str = ""
    seconds: tuple[float, ...] = ()  # of a step, in each round of the timing

    def seconds_at(self, step: float) -> float:
        return step * self.step_seconds

    def loss_at(self, step: float) -> float | None:
        """The last loss up to a step; None before the first and after the last."""
        if not self.steps[0] <= step < self.steps[-1] + BLOCK:
            return None
        number = sum(each <= step for each in self.steps)
        return self.losses[number - 1]

    def loss_after(self, duration: float) -> float | None:
        return self.loss_at(duration / self.step_seconds)

    def steps_to(self, loss: float) -> float:
        """The first look at which the loss is no higher; infinite if there is none."""
        for step, found in zip(self.steps, self.losses, strict=True):
            if found <= loss:
                return step
        return math.inf


def batches(problem: Problem) -> Callable[[int], Any]:
    """The stacked batches of a block, drawn by its number: the same for all methods."""
    rows, first = problem.data[0].shape[0], 10**6 * problem.seed

    @jax.jit
    def draw(data: Any, number: jax.Array) -> Any:
        keys = jax.random.split(jax.random.key(first + number), BLOCK)
        chosen = jax.vmap(
            lambda key: jax.random.choice(
                key, rows, (problem.batch_size,), replace=False
            )
        )(keys)
        return jax.tree.map(lambda x: x[chosen], data)

    return functools.partial(draw, problem.data)


def tuned(
    problem: Problem, run: Run, grid: Sequence[Setting], num_steps: int
) -> Trained:
    """The setting with the lowest last loss; those that fall behind are dropped."""
    draw = batches(problem)
    of_all = jax.jit(ff.negative_log_likelihood(problem.apply_fn, problem.likelihood))
    carries = {setting: run.start(setting, problem.params) for setting in grid}
    losses: dict[Setting, list[float]] = {setting: [] for setting in grid}
    for share, at_most in STAGES:
        alive = list(carries)
        if at_most is not None:
            alive.sort(key=lambda setting: losses[setting][-1])
            carries = {setting: carries[setting] for setting in alive[:at_most]}
        until = max(1, round(share * num_steps / BLOCK))
        for setting in carries:
            for number in range(len(losses[setting]), until):
                carries[setting] = run.advance(carries[setting], setting, draw(number))
                loss = float(of_all(run.params(carries[setting]), problem.data))
                losses[setting].append(loss if math.isfinite(loss) else math.inf)
    best = min(carries, key=lambda setting: losses[setting][-1])
    steps = [BLOCK * (number + 1) for number in range(len(losses[best]))]
    return Trained(best, steps, losses[best])


def with_times(
    problem: Problem, runs: Mapping[str, Run], found: dict[str, Trained], rounds: int
) -> dict[str, Trained]:
    """The time of a step at the best settings, all methods in turns.

    So that work of others on the machine falls on all of them.
    """
    block = batches(problem)(0)

    def steps(run: Run, setting: Setting) -> Callable[[int], Any]:
        carry = run.start(setting)

        def call(number: int) -> Any:
            nonlocal carry
            carry = run.advance(carry, setting, block)
            return jax.block_until_ready(jax.tree.leaves(run.params(carry)))[0]

        return call

    calls = {name: steps(run, found[name].setting) for name, run in runs.items()}
    timings = measure(calls, dict.fromkeys(calls, rounds), shuffle=True)
    timed = {}
    for name, timing in timings.items():
        each = [value / BLOCK for value in timing.seconds]
        spread = f"{seconds(min(each))}-{seconds(max(each))}"
        timed[name] = found[name]._replace(
            step_seconds=statistics.median(each), spread=spread, seconds=tuple(each)
        )
    return timed


def floor(problem: Problem) -> str:
    """What is known of the least loss there can be."""
    targets = problem.data[1]
    if not jnp.issubdtype(targets.dtype, jnp.floating):
        return "the least loss is 0"
    entropy = -jax.scipy.special.xlogy(targets, targets)
    entropy -= jax.scipy.special.xlogy(1 - targets, 1 - targets)
    least = float(jnp.sum(entropy) / targets.shape[0])
    return f"no loss is under the pixels' own entropy, {least:.4g}"
