"""What a network that reads digits loses to pruning and rounding, without a step."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.datasets import load_digits

import fisherflow_jax as ff

PRIOR, TRAINED, SEEDS = 0.3, 1100, range(3)
LIKELIHOOD = ff.likelihoods.categorical()
compression = ff.compression


def network(params, x):
    return jax.nn.relu(x @ params["w"] + params["b"]) @ params["v"] + params["c"]


def objective(params, data):
    loss = -jnp.sum(LIKELIHOOD.log_prob(network(params, data[0]), data[1]))
    return loss + PRIOR / 2 * sum(jnp.sum(x**2) for x in jax.tree.leaves(params))


@jax.jit
def fitted(params, data):
    optimizer = optax.adam(optax.cosine_decay_schedule(0.01, 1200))

    def step(carry, _):
        params, state = carry
        gradient = jax.grad(lambda p: objective(p, data) / TRAINED)(params)
        updates, state = optimizer.update(gradient, state)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, optimizer.init(params)), None, length=1200)[0][0]


@functools.cache
def fits():
    """Of each seed the state, and what measures accuracy and rise of others."""
    x, y = load_digits(return_X_y=True)
    x, found = ((x - x.mean()) / x.std()).astype("float32"), []
    for seed in SEEDS:
        order = np.random.default_rng(seed).permutation(len(y))
        rows, labels = jnp.asarray(x[order]), jnp.asarray(y[order])
        data = rows[:TRAINED], labels[:TRAINED]
        keys = jax.random.split(jax.random.key(seed))
        start = {
            "w": jax.random.normal(keys[0], (64, 32), jnp.float32) / 8,
            "b": jnp.zeros(32, jnp.float32),
            "v": jax.random.normal(keys[1], (32, 10), jnp.float32) / 32**0.5,
            "c": jnp.zeros(10, jnp.float32),
        }
        params = fitted(start, data)
        layers = ff.layers.find_layers(network, params, rows[:1])
        structure = ff.structures.kronecker(layers)
        estimator = jax.jit(ff.estimators.exact(network, LIKELIHOOD, structure))
        state = ff.posterior(params, estimator(params, data), prior_precision=PRIOR)

        def measure(other, rows=rows, labels=labels, data=data, params=params):
            right = network(other, rows[TRAINED:]).argmax(1) == labels[TRAINED:]
            return right.mean(), objective(other, data) - objective(params, data)

        found.append((state, jax.jit(measure)))
    return found


@pytest.mark.slow
def test_compensation_keeps_what_magnitude_alone_loses():
    alone, moved = [], []
    for state, measure in fits():
        kept = compression.mask(jax.tree.map(jnp.abs, state.mean), 0.8)
        for rows, compensate in ((alone, False), (moved, True)):
            found = compression.prune(state, kept, compensate=compensate)
            rows.append(measure(found.params)[0])
    assert np.mean(alone) <= 0.90
    assert np.mean(moved) >= 0.93


@pytest.mark.slow
def test_the_rise_is_what_was_predicted():
    rises = []
    for state, measure in fits():
        kept = compression.mask(jax.tree.map(jnp.abs, state.mean), 0.5)
        found = compression.prune(state, kept)
        rises.append((found.predicted_rise, measure(found.params)[1]))
    predicted, measured = np.mean(rises, axis=0)
    assert abs(predicted / measured - 1) < 0.2


@pytest.mark.slow
def test_three_bits_cost_half_of_nearest():
    measured, predicted = [], []
    for state, measure in fits():
        found = compression.round_to_grid(state, 3, dead_inputs="nearest")
        predicted.append((found.predicted_rise, found.nearest_rise))
        near = dict(state.mean)
        for name in "vw":
            scale = jnp.max(jnp.abs(near[name]), axis=0) / 3
            near[name] = jnp.round(near[name] / scale) * scale
        measured.append([measure(x)[1] for x in (found.params, near)])
    for ours, nearest in (np.sum(predicted, axis=0), np.sum(measured, axis=0)):
        assert ours <= 0.5 * nearest
