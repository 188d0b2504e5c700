"""Stacks of factorisations that run at once must end (they share a pool of threads)."""

import itertools

import jax
import jax.numpy as jnp

import fisherflow_jax as ff


def test_a_deep_network_in_blocks_ends():
    # jaxlib 0.10 waits for ever where several stacks are factorised at the same time
    sizes = (16, 32, 32, 32, 10)

    def apply_fn(params, x):
        for weight in params[:-1]:
            x = jnp.tanh(x @ weight)
        return x @ params[-1]

    keys = jax.random.split(jax.random.key(0), len(sizes))
    shapes = list(itertools.pairwise(sizes))
    params = [
        jax.random.normal(key, shape) / shape[0] ** 0.5
        for key, shape in zip(keys, shapes, strict=False)
    ]
    flow = ff.fisher_flow(
        apply_fn,
        ff.likelihoods.categorical(),
        structure=ff.structures.block(),
        memory=ff.memories.stationary(),
        prior_precision=0.1,
    )
    x = jax.random.normal(keys[-1], (20, 8, 16))
    batches = (x, jnp.argmax(x[..., :10], -1))
    run = jax.jit(lambda state: jax.lax.scan(flow.update, state, batches)[0])
    state = jax.block_until_ready(run(flow.init(params)))
    assert int(state.step) == 20
    assert int(state.num_skipped) == 0
