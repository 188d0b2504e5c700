"""The methods of the tables: what each carries, and those of one estimate."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from tables_data import BATCH, Split, apply_fn, batches

import fisherflow_jax as ff

CATEGORICAL = ff.likelihoods.categorical()
MODEL = apply_fn, CATEGORICAL
LOSS = ff.negative_log_likelihood(*MODEL)
RATES = (0.003, 0.01, 0.03, 0.1, 0.3)
SGD_RATES = (0.03, 0.1, 0.3, 1.0, 3.0)
NATURAL_RATES = (0.01, 0.03, 0.1, 0.3, 1.0)
PRECISIONS = (0.1, 0.5, 2.0, 10.0, 50.0)
LAPLACE_PRECISIONS = (0.5, 5.0, 50.0, 500.0, 5000.0)
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


def of_flow(name: str, structure: Any, num_passes: int, link: Any) -> Method:
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
        *averaging(link),
    )


def averaging(link: Any) -> tuple[Callable, Callable]:
    """How a posterior predicts and is calibrated; None is the functions' own link."""

    def logs(state: Any, inputs: jax.Array, knob: Any) -> jax.Array:
        return jnp.log(ff.predict(state, *MODEL, inputs, link=link).mean)

    def calibrate(state: Any, split: Split) -> Any:
        return ff.calibrate(state, *MODEL, split.validation, link=link).posterior

    return logs, calibrate


def of_laplace(name: str, structure: Any, link: Any) -> Method:
    """One pass over the rows after Adam's; prior around zero, as of no start."""
    start, advance = trained(optax.adam, plain)
    estimator = ff.estimators.exact(*MODEL, structure)

    def finish(carry: tuple, split: Split, knob: Any, rate: Any) -> Any:
        information = estimator(carry[0], split.train)
        return ff.posterior(carry[0], information, prior_precision=knob)

    return Method(
        f"Laplace, {name}",
        "prior precision",
        LAPLACE_PRECISIONS,
        start,
        advance,
        finish,
        *averaging(link),
        after_adam=True,
    )
