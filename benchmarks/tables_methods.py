"""The methods of the tables: each trains pass by pass, predicts, and is calibrated."""

from collections.abc import Callable
from typing import Any, NamedTuple

import classifiers
import jax
import jax.numpy as jnp
import optax
from tables_data import BATCH, Split, apply_fn, batches

import fisherflow_jax as ff

CATEGORICAL = ff.likelihoods.categorical()
MODEL = apply_fn, CATEGORICAL
LOSS = ff.negative_log_likelihood(*MODEL)
RATES = (0.001, 0.003, 0.01, 0.03, 0.1)
SGD_RATES = (0.03, 0.1, 0.3, 1.0, 3.0)
NATURAL_RATES = (0.01, 0.03, 0.1, 0.3, 1.0)
PRECISIONS = (0.1, 0.5, 2.0, 10.0, 50.0)
DROPPED = (0.02, 0.05, 0.1, 0.2, 0.4)
DRAWS, MEMBERS, FIRST_SD = 50, 5, 0.1
ADAM = "Adam"


class Method(NamedTuple):
    """All functions are compiled once a data set; the knob is an argument of them.

    Attributes:
      start: `(split, knob, rate)` -> what training carries.
      advance: `(carry, split, key, knob, rate, share)` -> the same after a pass; a row
        counts by its share, one over the number of passes.
      finish: `(carry, split, knob, rate)` -> what predicts.
      logs: `(fitted, inputs, knob)` -> logarithms of the classes' probabilities.
      calibrate: `(fitted, split)` -> fitted; None: one temperature of the logarithms.
      after_adam: has the rate that was chosen for Adam on the same rows.
    """

    name: str
    knob: str
    grid: tuple[float, ...]
    start: Callable
    advance: Callable
    finish: Callable
    logs: Callable
    calibrate: Callable | None = None
    after_adam: bool = False


def with_first(carry: Any, *rest: Any) -> Any:
    """What predicts, of a training whose carry begins with it."""
    return carry[0]


def plugged_in(params: Any, inputs: jax.Array, knob: Any) -> jax.Array:
    return jax.nn.log_softmax(apply_fn(params, inputs))


def averaged(logs: jax.Array) -> jax.Array:
    """The logarithm of the mean probability of several draws."""
    return jax.nn.logsumexp(logs, 0) - jnp.log(len(logs))


# ---- optimisers of one set of parameters


def trained(make: Callable[[Any], Any], loss: Callable) -> tuple[Callable, Callable]:
    """`make(rate)` is an optimiser; `loss(params, batch, key, knob)`."""

    def optimizer(rate: Any) -> optax.GradientTransformationExtraArgs:
        return optax.with_extra_args_support(make(rate))

    def start(split: Split, knob: Any, rate: Any) -> tuple:
        return split.params, optimizer(rate).init(split.params)

    def advance(
        carry: tuple, split: Split, key: Any, knob: Any, rate: Any, share: Any
    ) -> tuple:
        def step(carry: tuple, given: tuple) -> tuple:
            params, state = carry
            batch, key = given
            gradients = jax.grad(loss)(params, batch, key, knob)
            updates, state = optimizer(rate).update(
                gradients, state, params, batch=batch
            )
            return (optax.apply_updates(params, updates), state), None

        given = in_order(split, key)
        return jax.lax.scan(step, carry, given)[0]

    return start, advance


def in_order(split: Split, key: jax.Array) -> tuple:
    """The batches of a pass, each with a key."""
    stacked = batches(split, key, 1)
    keys = jax.random.split(jax.random.fold_in(key, 1), len(stacked[1]))
    return stacked, keys


def plain(params: Any, batch: tuple, key: Any, knob: Any) -> jax.Array:
    return LOSS(params, batch)


def of_optimizer(name: str, make: Callable, grid: tuple) -> Method:
    """The knob is the rate."""
    start, advance = trained(make, plain)
    return Method(
        name,
        "rate",
        grid,
        lambda split, knob, rate: start(split, knob, knob),
        lambda carry, split, key, knob, rate, share: advance(
            carry, split, key, knob, knob, share
        ),
        with_first,
        plugged_in,
    )


def optimizers(layers: Any) -> list[Method]:
    full = ff.estimators.exact(*MODEL, ff.structures.full())
    makes = {
        "SGD": (optax.sgd, SGD_RATES),
        ADAM: (optax.adam, RATES),
        "natural gradient": (
            lambda rate: ff.natural_gradient(rate, full, damping=1e-2),
            NATURAL_RATES,
        ),
        "K-FAC": (
            lambda rate: ff.kfac(rate, *MODEL, layers, damping=1e-2, key=0),
            NATURAL_RATES,
        ),
    }
    return [of_optimizer(name, *given) for name, given in makes.items()]


# ---- Fisher Flow


def of_flow(name: str, structure: Any, num_passes: int) -> Method:
    """Several passes count a row in parts, by one Newton step a batch."""
    options = {} if num_passes == 1 else {"num_steps": 1}

    def flow(precision: Any) -> ff.FisherFlow:
        return ff.fisher_flow(
            *MODEL, structure=structure, prior_precision=precision, **options
        )

    def start(split: Split, knob: Any, rate: Any) -> Any:
        return flow(knob).init(split.params)

    def advance(
        state: Any, split: Split, key: Any, knob: Any, rate: Any, share: Any
    ) -> Any:
        def step(state: Any, batch: tuple) -> tuple:
            weights = jnp.full(BATCH, share) if num_passes > 1 else None
            return flow(knob).update(state, ff.Batch(*batch, weights))[0], None

        return jax.lax.scan(step, state, batches(split, key, 1))[0]

    return Method(
        f"Fisher Flow, {name}",
        "prior precision",
        PRECISIONS,
        start,
        advance,
        lambda state, *rest: state,
        predicted,
        calibrated,
    )


def predicted(state: Any, inputs: jax.Array, knob: Any) -> jax.Array:
    return jnp.log(ff.predict(state, *MODEL, inputs).mean)


def calibrated(state: Any, split: Split) -> Any:
    return ff.calibrate(state, *MODEL, split.validation).posterior


# ---- after Adam, or around it


def of_laplace(name: str, structure: Any) -> Method:
    """One pass over the rows after Adam's; prior around zero, as of no start."""
    start, advance = trained(optax.adam, plain)
    estimator = ff.estimators.exact(*MODEL, structure)

    def finish(carry: tuple, split: Split, knob: Any, rate: Any) -> Any:
        information = estimator(carry[0], split.train)
        return ff.posterior(carry[0], information, prior_precision=knob)

    return Method(
        f"Laplace, {name}",
        "prior precision",
        PRECISIONS,
        start,
        advance,
        finish,
        predicted,
        calibrated,
        after_adam=True,
    )


def variational() -> Method:
    """Independent Gaussians around each parameter, prior N(0, 1), by one draw a step.

    The expected log-likelihood by its reparameterised gradient, Adam on means and on
    logarithms of standard deviations.
    """

    def drawn(beliefs: tuple, key: jax.Array) -> Any:
        mean, log_sd = beliefs
        noise = optax.tree.random_like(key, mean)
        return jax.tree.map(lambda m, s, e: m + jnp.exp(s) * e, mean, log_sd, noise)

    def bound(beliefs: tuple, batch: tuple, key: Any, count: Any) -> jax.Array:
        squares = optax.tree.norm(beliefs[0], squared=True)
        logs = optax.tree.sum(beliefs[1])
        variances = optax.tree.sum(jax.tree.map(lambda s: jnp.exp(2 * s), beliefs[1]))
        divergence = 0.5 * (squares + variances) - logs
        return LOSS(drawn(beliefs, key), batch) + divergence / count

    begin, advance = trained(optax.adam, bound)

    def start(split: Split, knob: Any, rate: Any) -> tuple:
        log_sd = jnp.log(FIRST_SD)
        first = jax.tree.map(lambda x: jnp.full_like(x, log_sd), split.params)
        return begin(split._replace(params=(split.params, first)), knob, knob)

    def logs(beliefs: tuple, inputs: jax.Array, knob: Any) -> jax.Array:
        keys = jax.random.split(jax.random.key(0), DRAWS)
        return averaged(
            jax.lax.map(lambda key: plugged_in(drawn(beliefs, key), inputs, knob), keys)
        )

    return Method(
        "mean-field variational",
        "rate",
        RATES,
        start,
        lambda carry, split, key, knob, rate, share: advance(
            carry, split, key, len(split.train[1]), knob, share
        ),
        with_first,
        logs,
    )


def dropout() -> Method:
    """Hidden units are left out in training and in each of the draws that predict."""

    def thinned(params: Any, inputs: jax.Array, key: Any, dropped: Any) -> jax.Array:
        first, second = params
        hidden = jnp.tanh(inputs @ first["w"] + first["b"])
        kept = jax.random.bernoulli(key, 1 - dropped, hidden.shape)
        return jnp.where(kept, hidden / (1 - dropped), 0) @ second["w"] + second["b"]

    def loss(params: Any, batch: tuple, key: Any, dropped: Any) -> jax.Array:
        def outputs(params: Any, inputs: jax.Array) -> jax.Array:
            return thinned(params, inputs, key, dropped)

        return ff.negative_log_likelihood(outputs, CATEGORICAL)(params, batch)

    def logs(params: Any, inputs: jax.Array, dropped: Any) -> jax.Array:
        def once(key: jax.Array) -> jax.Array:
            return jax.nn.log_softmax(thinned(params, inputs, key, dropped))

        keys = jax.random.split(jax.random.key(0), DRAWS)
        return averaged(jax.lax.map(once, keys))

    start, advance = trained(optax.adam, loss)
    return Method(
        "MC dropout",
        "share dropped",
        DROPPED,
        start,
        advance,
        with_first,
        logs,
        after_adam=True,
    )


def ensemble() -> Method:
    """Members of their own starts and orders; the first has Adam's own."""
    begin, move = trained(optax.adam, plain)

    def start(split: Split, knob: Any, rate: Any) -> tuple:
        first, second = split.params
        sizes = *first["w"].shape, second["w"].shape[1]
        keys = jax.random.split(split.key, MEMBERS - 1)
        others = [classifiers.dense_layers(key, sizes) for key in keys]
        params = jax.tree.map(lambda *x: jnp.stack(x), split.params, *others)
        return jax.vmap(lambda p: begin(split._replace(params=p), knob, rate))(params)

    def advance(
        carry: tuple, split: Split, key: Any, knob: Any, rate: Any, share: Any
    ) -> tuple:
        keys = [key, *jax.random.split(jax.random.fold_in(key, 2), MEMBERS - 1)]
        return jax.vmap(lambda c, k: move(c, split, k, knob, rate, share))(
            carry, jnp.stack(keys)
        )

    def logs(params: Any, inputs: jax.Array, knob: Any) -> jax.Array:
        return averaged(jax.vmap(plugged_in, (0, None, None))(params, inputs, knob))

    return Method(
        f"ensemble of {MEMBERS}",
        "none",
        (0.0,),
        start,
        advance,
        with_first,
        logs,
        after_adam=True,
    )


def methods(split: Split, num_passes: int) -> list[Method]:
    """Of a network, whose layers are found; Adam before those that need its rate."""
    layers = ff.layers.find_layers(apply_fn, split.params, split.train[0][:BATCH])
    structures = {
        "scalar": ff.structures.scalar(),
        "diagonal": ff.structures.diagonal(),
        "block": ff.structures.block(),
        "Kronecker": ff.structures.kronecker(layers),
        "full": ff.structures.full(),
    }
    kept = {name: structures[name] for name in ("diagonal", "Kronecker")}
    return [
        *optimizers(layers),
        *(of_flow(*given, num_passes) for given in structures.items()),
        variational(),
        dropout(),
        *(of_laplace(*given) for given in kept.items()),
        ensemble(),
    ]
