"""What averaging over the belief brings: coverage of streams, rows one at a time.

`python benchmarks/expectations.py` draws 1,000 streams of 100 rows whose parameters
come from a normal distribution, so that an exact posterior under that prior covers
95 %. It prints the share of 95 % intervals that hold the truth, with the standard error
over streams, and the mean log-density of the posterior at the truth. `--quick` draws
200.

- logistic, three coefficients of standard deviation 2, in batches of 1, 10, 50, 100,
  and after a warm start of 20 rows;
- Poisson, three coefficients of standard deviation .5, under the priors .5, 1 and 3;
- a network with three tanh units: intervals of the logit at 20 new inputs, and the log
  score of 20 new labels, after a warm start of 20 rows and in one batch; linearised at
  the mean, and by 400 draws of the weights.
"""

import argparse
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from measuring import describe_machine

import fisherflow_jax as ff

ROWS, WIDTH = 100, 3
RULES = {
    "at the mean": None,
    "cubature": ff.expectations.cubature(),
    "outputs": ff.expectations.outputs(),
}
LEVEL = 1.96


def linear(params: Any, x: jax.Array) -> jax.Array:
    return x @ params


def network(params: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ params["in"]) @ params["out"]


def inputs(rng: Any, *shape: int) -> np.ndarray:
    x = rng.normal(size=(*shape, WIDTH))
    x[..., 0] = 1
    return x


def labels(rng: Any, logits: np.ndarray) -> np.ndarray:
    return 1.0 * (rng.random(logits.shape) < 1 / (1 + np.exp(-logits)))


def streamed(
    flow: ff.FisherFlow, start: Any, x: jax.Array, y: jax.Array, size: int, warm: int
) -> ff.FlowState:
    state = start
    if warm:
        state = ff.warm_start(flow, state, (x[:warm], y[:warm]))
    rest = x[warm:].reshape((-1, size, WIDTH)), y[warm:].reshape((-1, size))
    return jax.lax.scan(flow.update, state, rest)[0] if len(rest[0]) else state


def of_coefficients(
    likelihood: Any, rule: Any, prior_sd: float, size: int, warm: int = 0
) -> Callable:
    flow = ff.fisher_flow(
        linear, likelihood, prior_precision=prior_sd**-2, expectation=rule
    )

    def run(x: jax.Array, y: jax.Array, truth: jax.Array) -> tuple:
        state = streamed(flow, flow.init(jnp.zeros(WIDTH)), x, y, size, warm)
        inside = jnp.abs(state.mean - truth) < LEVEL * ff.standard_error(state)
        return jnp.mean(1.0 * inside), ff.log_density(state, truth)

    return jax.jit(jax.vmap(run))


def of_logits(rule: Any, size: int, warm: int = 0) -> Callable:
    flow = ff.fisher_flow(network, ff.likelihoods.bernoulli(), expectation=rule)

    def run(x: jax.Array, y: jax.Array, new: tuple, truth: Any, begin: Any) -> tuple:
        start = flow.init(begin, jax.tree.map(jnp.zeros_like, begin))
        state = streamed(flow, start, x, y, size, warm)
        points, seen = new
        there = network(truth, points)
        own = network(state.mean, points)
        slopes = jax.jacobian(network)(state.mean, points)
        solve = ff.information.solver(state.information)
        variance = jax.vmap(
            lambda v: sum(jax.tree.leaves(jax.tree.map(jnp.vdot, v, solve(v))))
        )(slopes)
        noise = np.random.default_rng(0).normal(size=(400, 1))
        linearised = own + noise * jnp.sqrt(variance)
        keys = jax.random.split(jax.random.key(0), 400)
        weights = jax.vmap(lambda key: ff.sample(state, key))(keys)
        drawn = jax.vmap(network, (0, None))(weights, points)
        low, high = jnp.quantile(drawn, jnp.array([0.025, 0.975]), axis=0)
        inside = jnp.abs(own - there) < LEVEL * jnp.sqrt(variance)

        def score(logits: jax.Array) -> jax.Array:
            p = jnp.mean(jax.nn.sigmoid(logits), 0)
            return jnp.mean(jnp.log(jnp.where(seen > 0, p, 1 - p)))

        sampled = (low < there) & (there < high)
        return (
            (jnp.mean(1.0 * inside), score(linearised)),
            (jnp.mean(1.0 * sampled), score(drawn)),
        )

    return jax.jit(jax.vmap(run))


def told(name: str, covered: Any, density: Any) -> None:
    covered, density = np.asarray(covered), np.asarray(density)
    root = np.sqrt(len(covered))
    print(
        f"{name:48s} {covered.mean():.3f} +- {covered.std() / root:.3f}   "
        f"{density.mean():7.2f} +- {density.std() / root:.2f}",
        flush=True,
    )


def logistic(replicates: int) -> None:
    rng = np.random.default_rng(0)
    x, truth = (
        inputs(rng, replicates, ROWS),
        2 * rng.normal(size=(replicates, WIDTH)),
    )
    y = labels(rng, np.einsum("rnd,rd->rn", x, truth))
    print("\nlogistic, prior sd 2               coverage        log-density at truth")
    for size, warm in ((1, 0), (10, 0), (50, 0), (100, 0), (1, 20)):
        for name, rule in RULES.items():
            likelihood = ff.likelihoods.bernoulli()
            run = of_coefficients(likelihood, rule, 2.0, size, warm)
            after = f", after {warm}" if warm else ""
            told(f"batches of {size}{after}, {name}", *run(x, y, truth))


def poisson(replicates: int) -> None:
    rng = np.random.default_rng(1)
    x, truth = (
        inputs(rng, replicates, ROWS),
        0.5 * rng.normal(size=(replicates, WIDTH)),
    )
    y = 1.0 * rng.poisson(np.exp(np.minimum(np.einsum("rnd,rd->rn", x, truth), 8)))
    print("\nPoisson, batches of 1              coverage        log-density at truth")
    for prior_sd in (0.5, 1.0, 3.0):
        for name, rule in RULES.items():
            run = of_coefficients(ff.likelihoods.poisson(), rule, prior_sd, 1)
            told(f"prior sd {prior_sd}, {name}", *run(x, y, truth))


def small_network(replicates: int) -> None:
    rng = np.random.default_rng(2)

    def drawn() -> Any:
        return {
            "in": rng.normal(size=(replicates, WIDTH, 3)),
            "out": rng.normal(size=(replicates, 3)),
        }

    truth, begin = drawn(), drawn()
    x, points = inputs(rng, replicates, ROWS), inputs(rng, replicates, 20)
    every = jax.vmap(network)
    y, seen = (labels(rng, np.asarray(every(truth, z))) for z in (x, points))
    print("\nnetwork, d = 12                    coverage        log score of labels")
    for size, warm in ((1, 20), (100, 0)):
        for name, rule in RULES.items():
            run = of_logits(rule, size, warm)
            after = f", after {warm}" if warm else ""
            found = run(x, y, (points, seen), truth, begin)
            for how, pair in zip(("linearised", "drawn"), found, strict=True):
                told(f"batches of {size}{after}, {name}, {how}", *pair)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="200 streams")
    replicates = 200 if parser.parse_args().quick else 1000
    jax.config.update("jax_enable_x64", True)
    print(describe_machine(["jax"]))
    logistic(replicates)
    poisson(replicates)
    small_network(replicates)


if __name__ == "__main__":
    main()
