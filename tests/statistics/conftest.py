"""What the simulations share: a linear model, a stream, many replications."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest

import fisherflow_jax as ff


def linear(params: jax.Array, inputs: jax.Array) -> jax.Array:
    return inputs @ params


def stream(
    flow: ff.FisherFlow, inputs: jax.Array, targets: jax.Array, size: int, warm: int = 0
) -> ff.FlowState:
    """One pass in batches of `size`, the first `warm` rows solved before."""
    state = flow.init(jnp.zeros(inputs.shape[1], inputs.dtype))
    if warm:
        state = ff.warm_start(flow, state, (inputs[:warm], targets[:warm]))
    batches = jax.tree.map(
        lambda x: x[warm:].reshape((-1, size, *x.shape[1:])), (inputs, targets)
    )
    return jax.lax.scan(flow.update, state, batches)[0]


def compiled(one: Any) -> Any:
    """`one` over the leading axis, compiled, in blocks that stay in the cache."""
    return jax.jit(lambda parts: jax.lax.map(one, parts, batch_size=50))


def replicate(one: Any, seed: int, number: int) -> Any:
    """`one(key)` for `number` keys."""
    return compiled(one)(jax.random.split(jax.random.key(seed), number))


class Simulation:
    """The helpers of this folder, as a fixture: its name is that of a stdlib module."""

    linear = staticmethod(linear)
    stream = staticmethod(stream)
    compiled = staticmethod(compiled)
    replicate = staticmethod(replicate)


@pytest.fixture(scope="session")
def simulation() -> type[Simulation]:
    return Simulation
