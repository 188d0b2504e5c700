"""A state is a tree of arrays that other libraries see into, in float32 or wider."""

import functools

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fisherflow_jax as ff
import streams
from together import together

OPTIONS = {"num_steps": 4, "robust": True}
BATCHES = streams.batches(8, "bernoulli")


def flows():
    yield "full", streams.flow("full", "exponential", "bernoulli", **OPTIONS)
    for structure in ("scalar", "diagonal", "units", "block", "low_rank"):
        for memory in ("stationary", "windowed"):
            flow = streams.flow(structure, memory, "bernoulli")
            yield f"{structure}-{memory}", flow
    for memory in ("adaptive", "random_walk"):
        flow = streams.flow("full", memory, compensated=True)
        yield f"full-{memory}-compensated", flow


@functools.cache
def start(flow):
    return streams.start(flow)


CASES = dict(flows())
every_case = pytest.mark.parametrize("flow", list(CASES.values()), ids=list(CASES))


@pytest.mark.slow
@together
@every_case
@pytest.mark.parametrize(
    "name", ["mean", "information", "count", "log_evidence", "step"]
)
def test_optax_finds_one_of_each_name(flow, name):
    state = start(flow)
    found = optax.tree.get(state, name)
    jax.tree.map(np.testing.assert_array_equal, found, getattr(state, name))
    changed = optax.tree.set(state, count=jnp.asarray(5.0))
    assert changed.count == 5.0


@together
@every_case
def test_a_state_is_arrays_only(flow):
    leaves = jax.tree.leaves(start(flow))
    assert all(isinstance(leaf, jax.Array) for leaf in leaves)


@together
@every_case
def test_flax_writes_and_reads_it(flow):
    # other numbers than a fresh state's
    state = jax.tree.map(lambda x: (np.asarray(x) + 1).astype(x.dtype), start(flow))
    data = flax.serialization.to_bytes(state)
    template = jax.tree.map(np.zeros_like, state)
    restored = flax.serialization.from_bytes(template, data)
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, restored, state)


def test_orbax_saves_and_restores_it(tmp_path):
    checkpoint = pytest.importorskip("orbax.checkpoint")
    flow = streams.flow("full", "exponential", "bernoulli", **OPTIONS)
    state = streams.run(flow, streams.start(flow), BATCHES[:2])[-1]
    with checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", streams.start(flow))
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    # and the stream goes on from it
    jax.tree.map(
        np.testing.assert_array_equal,
        flow.update(restored, BATCHES[2]),
        flow.update(state, BATCHES[2]),
    )


def test_half_precision_parameters_keep_a_float32_state():
    flow = streams.flow("full", "stationary", "bernoulli")

    def narrow(dtype):
        params = jax.tree.map(
            lambda x: x.astype(dtype), streams.tree(np.array([0.5, 0.25, -1.0]))
        )
        state = flow.init(params)
        for inputs, labels, weights in BATCHES:
            batch = (inputs.astype(np.float32), labels.astype(np.float32), weights)
            state, info = flow.update(state, batch)
            assert not info.skipped
        return state

    state = narrow(jnp.bfloat16)
    floats = [
        x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)
    ]
    assert {x.dtype for x in floats} == {jnp.dtype(jnp.float32)}
    # the start is exact in bfloat16, and nothing is computed in it after
    jax.tree.map(np.testing.assert_array_equal, state, narrow(jnp.float32))


def test_a_compensated_state_in_float32_loses_no_small_increments():
    """2^24 and a thousand units more: float32 alone would stay where it was."""
    flow = ff.fisher_flow(
        lambda params, x: x * params,
        ff.likelihoods.gaussian(),
        structure=ff.structures.diagonal(),
        memory=ff.memories.stationary(),
        prior_precision=2.0**24,
        num_steps=1,
        compensated=True,
    )
    one = jnp.ones(1, jnp.float32)
    batches = (jnp.tile(one, (1000, 1)), jnp.tile(one, (1000, 1)))
    state, _ = jax.lax.scan(flow.update, flow.init(jnp.float32(0)), batches)
    pair = state.information
    total = np.float64(pair.high.entries) + np.float64(pair.low.entries)
    assert total == 2.0**24 + 1000
    np.testing.assert_allclose(state.mean, 1000 / 2.0**24, rtol=1e-4)
