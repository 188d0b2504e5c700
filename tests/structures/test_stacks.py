"""Stacks of factorisations that run at once must end (they share a pool of threads)."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fisherflow_jax as ff


@pytest.mark.slow
def test_a_deep_network_in_blocks_ends():
    # jaxlib 0.10 waits for ever where several stacks are factorised at the same time
    sizes = (16, 32, 32, 32, 10)

    def apply_fn(params, x):
        for weight in params[:-1]:
            x = jnp.tanh(x @ weight)
        return x @ params[-1]

    rng, shapes = np.random.default_rng(0), itertools.pairwise(sizes)
    params = [rng.normal(size=shape) / shape[0] ** 0.5 for shape in shapes]
    flow = ff.fisher_flow(
        apply_fn,
        ff.likelihoods.categorical(),
        structure=ff.structures.block(),
        memory=ff.memories.stationary(),
        prior_precision=0.1,
    )
    x = rng.normal(size=(20, 8, 16))
    batches = (x, np.argmax(x[..., :10], -1))
    run = jax.jit(lambda state: jax.lax.scan(flow.update, state, batches)[0])
    state = jax.block_until_ready(run(flow.init(params)))
    assert int(state.step) == 20
    assert int(state.num_skipped) == 0
