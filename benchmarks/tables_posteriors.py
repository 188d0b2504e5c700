"""Posteriors whose seconds are compared: Fisher Flow, Laplace, NumPyro's; float64."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

jax.config.update("jax_enable_x64", True)

import jax.numpy as jnp  # noqa: E402
import logistic  # noqa: E402
import numpyro  # noqa: E402
import numpyro.distributions as dist  # noqa: E402
import optax  # noqa: E402
from jax.flatten_util import ravel_pytree  # noqa: E402
from numpyro.infer import MCMC, NUTS, SVI, Trace_ELBO  # noqa: E402
from numpyro.infer.autoguide import AutoMultivariateNormal, AutoNormal  # noqa: E402
from sklearn.datasets import make_moons  # noqa: E402

import fisherflow_jax as ff  # noqa: E402

BERNOULLI = ff.likelihoods.bernoulli()
CHUNK = 250  # steps of variational inference between looks
GUIDES = {"mean-field": AutoNormal, "full": AutoMultivariateNormal}


class Problem(NamedTuple):
    """What is estimated, of draws of the parameters and of a state."""

    name: str
    outputs: Callable[[jax.Array, jax.Array], jax.Array]  # (theta, x) -> logits
    rows: tuple
    start: jax.Array
    precision: float
    of_draws: Callable[[jax.Array], tuple]  # (n, d) -> mean, sd
    of_state: Callable[[Any], tuple]
    batch: int


def regression(num_rows: int) -> Problem:
    rows = tuple(jnp.asarray(a) for a in logistic.data(num_rows, 1))
    return Problem(
        f"logistic regression, {num_rows} rows",
        lambda theta, x: x @ theta,
        rows,
        jnp.zeros(logistic.NUM_FEATURES),
        logistic.PRIOR_PRECISION,
        lambda draws: (draws.mean(0), draws.std(0)),
        lambda state: (state.mean, ff.standard_error(state)),
        batch=50,
    )


def network() -> Problem:
    """Its start is small and random, and is where the flow's prior is centred."""
    x, y = make_moons(200, noise=0.3, random_state=0)
    sizes = {"w": (2, 5), "b": (5,), "v": (5,), "c": ()}
    keys = jax.random.split(jax.random.key(0), len(sizes))
    tree = {
        name: 0.1 * jax.random.normal(key, shape)
        for key, (name, shape) in zip(keys, sizes.items(), strict=True)
    }
    start, unravel = ravel_pytree(tree)

    def outputs(theta: jax.Array, x: jax.Array) -> jax.Array:
        p = unravel(theta)
        return jnp.tanh(x @ p["w"] + p["b"]) @ p["v"] + p["c"]

    sides = jnp.meshgrid(jnp.linspace(-2.0, 3.0, 20), jnp.linspace(-1.5, 2.0, 20))
    points = jnp.stack([side.ravel() for side in sides], 1)

    def of_draws(draws: jax.Array) -> tuple:
        chances = jax.nn.sigmoid(jax.vmap(outputs, (0, None))(draws, points))
        return chances.mean(0), chances.std(0)

    def of_state(state: Any) -> tuple:
        found = ff.predict(state, outputs, BERNOULLI, points)
        return found.mean, found.std

    rows = jnp.asarray(x), jnp.asarray(y, float)
    name = "network 2-5-1, 200 rows"
    return Problem(name, outputs, rows, start, 1.0, of_draws, of_state, batch=20)


# ---- ours, and Laplace


def in_one_pass(problem: Problem, refinements: int = 0, passes: int = 1) -> Callable:
    """`problem.batch` rows at a time; several passes count a row in parts."""
    options = {} if passes == 1 else {"num_steps": 1}
    flow = ff.fisher_flow(
        problem.outputs, BERNOULLI, prior_precision=problem.precision, **options
    )
    stacked = jax.tree.map(
        lambda a: jnp.tile(
            a.reshape(-1, problem.batch, *a.shape[1:]), (passes,) + (1,) * a.ndim
        ),
        problem.rows,
    )

    @jax.jit
    def run(stacked: tuple, rows: tuple) -> tuple:
        weights = jnp.full(stacked[1].shape, 1 / passes)
        batches = ff.Batch(*stacked, weights)
        state = jax.lax.scan(flow.update, flow.init(problem.start), batches)[0]
        for _ in range(refinements):
            state = ff.refine(flow, state, jax.tree.map(lambda a: a[None], rows))
        return problem.of_state(state)

    return lambda seed: run(stacked, problem.rows)


def by_laplace(problem: Problem) -> Callable:
    """Newton, of a logistic regression; else 2,000 steps of Adam on all rows."""
    loss = ff.negative_log_likelihood(problem.outputs, BERNOULLI)
    estimator = ff.estimators.exact(problem.outputs, BERNOULLI, ff.structures.full())
    count, optimizer = len(problem.rows[1]), optax.adam(0.03)

    def penalised(theta: jax.Array, rows: tuple) -> jax.Array:
        return loss(theta, rows) + 0.5 * problem.precision / count * theta @ theta

    def step(carry: tuple, rows: tuple) -> tuple:
        theta, state = carry
        updates, state = optimizer.update(jax.grad(penalised)(theta, rows), state)
        return optax.apply_updates(theta, updates), state

    @jax.jit
    def run(rows: tuple) -> tuple:
        theta = problem.start
        if problem.name.startswith("logistic"):
            ones = jnp.ones(count)
            found = logistic.newton(lambda t: logistic.sums(t, *rows, ones), theta)
            return tuple(logistic.laplace(found))
        carry = theta, optimizer.init(theta)
        theta = jax.lax.fori_loop(0, 2000, lambda _, c: step(c, rows), carry)[0]
        information = estimator(theta, rows)
        state = ff.posterior(theta, information, prior_precision=problem.precision)
        return problem.of_state(state)

    return lambda seed: run(problem.rows)


# ---- NumPyro


def model_of(problem: Problem) -> Callable:
    x, y = problem.rows

    def model() -> None:
        prior = dist.Normal(0.0, problem.precision**-0.5)
        theta = numpyro.sample("theta", prior.expand(problem.start.shape).to_event(1))
        logits = problem.outputs(theta, x)
        numpyro.sample("y", dist.Bernoulli(logits=logits), obs=y)

    return model


def sampled(problem: Problem, num_draws: int, num_warm: int) -> Callable:
    @jax.jit
    def run(seed: jax.Array) -> jax.Array:
        sampler = MCMC(
            NUTS(model_of(problem)),
            num_warmup=num_warm,
            num_samples=num_draws,
            progress_bar=False,
        )
        sampler.run(jax.random.key(seed))
        return sampler.get_samples()["theta"]

    return run


def variational(problem: Problem, guide: Any) -> tuple[Callable, Callable, Callable]:
    """To begin, to go on for some steps, and to read: `(state, key)`."""
    made = guide(model_of(problem))

    def inference(rate: Any) -> SVI:
        found = SVI(made.model, made, numpyro.optim.Adam(rate), Trace_ELBO())
        found.init(jax.random.key(0))  # sets what it updates by
        return found

    @jax.jit
    def advance(state: Any, rate: jax.Array) -> Any:
        def step(state: Any, _: None) -> tuple:
            return inference(rate).update(state)[0], None

        return jax.lax.scan(step, state, length=CHUNK)[0]

    @jax.jit
    def read(state: Any) -> tuple:
        params = inference(0.01).get_params(state)
        draws = made.sample_posterior(jax.random.key(1), params, sample_shape=(4000,))
        return problem.of_draws(draws["theta"])

    return lambda seed, rate: inference(rate).init(jax.random.key(seed)), advance, read
