"""Under jit, scan, vmap, cond and eval_shape, without compiling twice."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fisherflow_jax as ff
import streams

OPTIONS = {"num_steps": 4, "robust": True}


def build():
    return streams.flow("full", "exponential", "bernoulli", **OPTIONS)


def one_step():
    return streams.flow("full", "stationary", "bernoulli")


BATCHES = streams.batches(8, "bernoulli")
STACKED = jax.tree.map(lambda *x: jnp.stack([jnp.asarray(y) for y in x]), *BATCHES)


def close(left, right):
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-11, atol=1e-13),
        left,
        right,
    )


def test_scan_is_the_python_loop():
    flow = build()
    state, infos = jax.lax.scan(flow.update, streams.start(flow), STACKED)
    close(state, streams.run(flow, streams.start(flow), BATCHES)[-1])
    assert infos.log_evidence.shape == (3,)
    np.testing.assert_allclose(infos.log_evidence.sum(), state.log_evidence)


def test_a_second_call_compiles_nothing():
    flow = build()
    update = jax.jit(flow.update)
    state, _ = update(streams.start(flow), BATCHES[0])
    for batch in BATCHES[1:]:
        state, _ = update(state, batch)
    assert update._cache_size() == 1


def test_a_python_loop_without_jit_compiles_once():
    """A plain loop over a data loader does not trace its searches anew."""
    traces = []

    def counted(params, inputs):
        traces.append(None)
        return streams.linear(params, inputs)

    flow = ff.fisher_flow(
        counted,
        ff.likelihoods.bernoulli(),
        structure=ff.structures.diagonal(),
        memory=ff.memories.stationary(),
    )
    state, _ = flow.update(flow.init(streams.tree(np.zeros(3))), BATCHES[0])
    number = len(traces)
    for batch in BATCHES[1:]:
        state, _ = flow.update(state, batch)
    assert len(traces) == number


def test_a_state_keeps_its_types():
    flow = build()
    start = streams.start(flow)
    after, _ = flow.update(start, BATCHES[0])
    for before, value in zip(*map(jax.tree.leaves, (start, after)), strict=True):
        assert not before.weak_type and not value.weak_type
        assert (before.shape, before.dtype) == (value.shape, value.dtype)


def test_eval_shape_of_init_and_update():
    flow = build()
    params = streams.tree(np.zeros(3))
    shapes = jax.eval_shape(flow.init, params)
    state = flow.init(params)
    jax.tree.map(lambda x, y: _same(x, y), shapes, state)
    after, _ = jax.eval_shape(flow.update, shapes, BATCHES[0])
    jax.tree.map(lambda x, y: _same(x, y), after, state)


def _same(x, y):
    assert (x.shape, x.dtype) == (y.shape, y.dtype)


@pytest.mark.slow
def test_vmap_over_replications():
    flow = build()
    inputs, labels, weights = STACKED
    shuffled = jnp.stack([labels, 1 - labels, labels[::-1]])

    def one(labels):
        return jax.lax.scan(flow.update, streams.start(flow), (inputs, labels, weights))

    together, _ = jax.vmap(one)(shuffled)
    for index in range(3):
        batches = list(zip(inputs, shuffled[index], weights, strict=True))
        alone = streams.run(flow, streams.start(flow), batches)[-1]
        close(jax.tree.map(lambda x, i=index: x[i], together), alone)


def test_vmap_over_priors():
    """The flow itself may be built inside a transformation."""

    def evidence(precision):
        flow = ff.fisher_flow(
            streams.linear,
            ff.likelihoods.gaussian(streams.SCALE),
            structure=ff.structures.full(),
            memory=ff.memories.stationary(),
            prior_precision=precision,
            num_steps=1,
        )
        batch = streams.INPUTS, streams.TARGETS, streams.WEIGHTS
        return flow.update(streams.start(flow), batch)[0].log_evidence

    precisions = np.array([0.1, 1.0, 10.0])
    expected = [
        streams.predictive(streams.ORIGIN, p * np.eye(3), slice(0, 24))
        for p in precisions
    ]
    np.testing.assert_allclose(jax.vmap(evidence)(precisions), expected, rtol=1e-10)


def test_inside_cond():
    flow = one_step()
    state = streams.start(flow)

    @jax.jit
    def maybe(learn):
        return jax.lax.cond(
            learn, lambda s: flow.update(s, BATCHES[0])[0], lambda s: s, state
        )

    close(maybe(True), flow.update(state, BATCHES[0])[0])
    close(maybe(False), state)


def test_a_fresh_state_may_be_donated():
    """No two leaves share a buffer, nor does one with the user's parameters."""
    flow = one_step()
    params = streams.tree(np.zeros(3))
    state, _ = jax.jit(flow.update, donate_argnums=0)(flow.init(params), BATCHES[0])
    close(state, flow.update(flow.init(params), BATCHES[0])[0])
    assert not params["slope"].is_deleted()


@pytest.mark.parametrize("chunk_size", [3, 8])
def test_chunks_change_nothing(chunk_size):
    flow = streams.flow("full", "stationary", "bernoulli", chunk_size=chunk_size)
    whole = one_step()
    close(
        flow.update(streams.start(flow), BATCHES[0])[0],
        whole.update(streams.start(whole), BATCHES[0])[0],
    )


def test_evaluate_at_several_parameters_of_one_batch():
    """By vmap outside of jit, where the batch is at hand and the result is not."""
    rows = jnp.asarray(np.random.default_rng(4).normal(size=(6, 2)))
    batch = rows, jnp.ones(6)
    flow = ff.fisher_flow(lambda params, x: x @ params, ff.likelihoods.bernoulli())
    points = rows[:3]
    found = jax.vmap(lambda params: flow.evaluate(params, batch)[:2])(points)
    each = [flow.evaluate(params, batch)[:2] for params in points]
    for k, expected in enumerate(zip(*each, strict=True)):
        np.testing.assert_allclose(found[k], jnp.stack(expected), rtol=1e-12)
