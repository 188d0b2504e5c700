"""The methods of the tables that average the probabilities of several networks."""

from typing import Any

import classifiers
import jax
import jax.numpy as jnp
import optax
from tables_data import Split
from tables_methods import (
    CATEGORICAL,
    LOSS,
    RATES,
    Method,
    averaged,
    plain,
    plugged_in,
    trained,
    with_first,
)

import fisherflow_jax as ff

DROPPED = (0.02, 0.05, 0.1, 0.2, 0.4)
DRAWS, MEMBERS, FIRST_SD = 50, 5, 0.1


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
