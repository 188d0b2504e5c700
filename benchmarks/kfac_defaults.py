"""`ff.kfac` with its defaults beside Adam, on eight small problems: the table that
chose the default bound.

Of each problem: the loss of all data after 50 steps, K-FAC at three learning rates, and
the best of Adam at four. Then, for each bound, in how many of the 24 runs the loss
falls, how many steps were refused, and on how many problems K-FAC's best rate is at or
below Adam's.

    python benchmarks/kfac_defaults.py                   # some minutes
    python benchmarks/kfac_defaults.py --bounds 0.1      # the default alone
    python benchmarks/kfac_defaults.py --bounds 0.1 inf --problems mlp transformer
"""

import argparse
import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from default_problems import PROBLEMS, Problem
from measuring import describe_machine, table

import fisherflow_jax as ff

STEPS = 50
RATES = 0.03, 0.1, 0.3
ADAMS_RATES = 1e-3, 3e-3, 1e-2, 3e-2
BOUNDS = 0.03, 0.1, 0.3, math.inf
DEFAULT = inspect.signature(ff.kfac).parameters["max_kl"].default


class Runs(NamedTuple):
    """The runs of one optimiser on one problem, one a learning rate."""

    losses: list[float]  # of all data, at the end
    refused: int  # steps


def _trained(problem: Problem, make: Callable[..., Any]) -> Callable[..., Any]:
    """`(*settings) -> (last loss, last state)`, compiled once for all settings."""
    loss = ff.negative_log_likelihood(problem.apply_fn, problem.likelihood)
    rows = problem.data[1].shape[0]

    def run(data: Any, params: Any, *settings: jax.Array) -> Any:
        optimizer = optax.with_extra_args_support(make(*settings))

        def step(carry: Any, key: jax.Array) -> Any:
            params, state = carry
            chosen = jax.random.permutation(key, rows)[: problem.batch_size]
            batch = jax.tree.map(lambda x: x[chosen], data)
            gradients = jax.grad(loss)(params, batch)
            updates, state = optimizer.update(gradients, state, params, batch=batch)
            return (optax.apply_updates(params, updates), state), None

        start = params, optimizer.init(params)
        keys = jax.random.split(jax.random.key(0), STEPS)
        params, state = jax.lax.scan(step, start, keys)[0]
        return loss(params, data), state

    compiled = jax.jit(run)
    return lambda *settings: compiled(problem.data, problem.params, *settings)


def adam(problem: Problem) -> float:
    """The best of Adam's last losses."""
    run = _trained(problem, optax.adam)
    return min(float(run(rate)[0]) for rate in ADAMS_RATES)


def kfac(problem: Problem) -> Callable[[float], Runs]:
    """Runs within a bound, the other options being the defaults."""

    def make(rate: jax.Array, bound: jax.Array) -> Any:
        model = problem.apply_fn, problem.likelihood
        return ff.kfac(rate, *model, inputs=problem.data[0], max_kl=bound, key=0)

    run = _trained(problem, make)

    def runs(bound: float) -> Runs:
        # without a bound, as without measuring: one that nothing finite exceeds
        bound = min(bound, float(jnp.finfo(jnp.float32).max))
        losses, refused = [], 0
        for rate in RATES:
            loss, state = run(rate, bound)
            losses.append(float(loss))
            counts = ("num_skipped", "num_unmeasured")
            refused += sum(int(optax.tree.get(state, name)) for name in counts)
        return Runs(losses, refused)

    return runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--bounds", type=float, nargs="+", default=BOUNDS)
    names = [make.__name__ for make in PROBLEMS]
    parser.add_argument("--problems", nargs="+", choices=names, default=names)
    options = parser.parse_args()
    print(describe_machine(("jax", "jaxlib", "optax")))
    print(f"default: max_kl={DEFAULT}; loss of all data after {STEPS} steps\n")
    rows, won = [], {bound: [] for bound in options.bounds}
    fell, refused = dict.fromkeys(options.bounds, 0), dict.fromkeys(options.bounds, 0)
    for make in PROBLEMS:
        if make.__name__ not in options.problems:
            continue
        problem = make()
        loss = ff.negative_log_likelihood(problem.apply_fn, problem.likelihood)
        start, theirs = float(loss(problem.params, problem.data)), adam(problem)
        run = kfac(problem)
        for bound in options.bounds:
            ours = run(bound)
            fell[bound] += sum(each < start for each in ours.losses)
            refused[bound] += ours.refused
            best = min(x for x in (*ours.losses, math.inf) if not math.isnan(x))
            won[bound] += [problem.name] * (best <= theirs)
            cells = [f"{x:.4g}" for x in (start, theirs, *ours.losses)]
            rows.append((problem.name, f"{bound:g}", *cells, str(ours.refused)))
    rates = [f"rate {rate:g}" for rate in RATES]
    print(table(("problem", "max_kl", "start", "Adam", *rates, "refused"), rows))
    print()
    total = len(RATES) * len(options.problems)
    summary = [
        (
            f"{bound:g}",
            f"{fell[bound]} of {total}",
            str(refused[bound]),
            f"{len(won[bound])} of {len(options.problems)}",
        )
        for bound in options.bounds
    ]
    print(table(("max_kl", "falls", "steps refused", "at or below Adam"), summary))


if __name__ == "__main__":
    main()
