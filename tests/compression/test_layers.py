"""Convolutions, scanned layers and stacks: columns are those of the matrix."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fisherflow_jax as ff
from small_network import drawn, flat

compression = ff.compression


def convolved(params, x):
    numbers = ("NHWC", "HWIO", "NHWC")
    z = jax.lax.conv_general_dilated(
        x, params["filter"], (1, 1), "SAME", dimension_numbers=numbers
    )
    z = jnp.tanh(z + params["shift"]) * params["gain"]
    return z.reshape((len(x), -1)) @ params["head"]


def scanned(params, x):
    def body(h, layer):
        return jnp.tanh(h @ layer["w"] + layer["b"]), None

    return jax.lax.scan(body, x, params["layers"])[0] @ params["head"]


def alike(params, x):
    for name in ("first", "second"):
        x = jnp.tanh(params[name] @ x.T).T  # inputs last
    return x @ params["head"]


MODELS = {
    "convolution": (
        convolved,
        {
            "filter": drawn(2, 2, 2, 3, seed=1),
            "shift": drawn(3, seed=2),
            "gain": drawn(3, seed=3),
            "head": drawn(12, 2, seed=4),
        },
        drawn(20, 2, 2, 2, seed=5),
    ),
    "scanned": (
        scanned,
        {
            "layers": {"w": drawn(2, 4, 4, seed=1), "b": drawn(2, 4, seed=2)},
            "head": drawn(4, 3, seed=3),
        },
        drawn(20, 4, seed=4),
    ),
    "alike": (
        alike,
        {
            "first": drawn(4, 4, seed=1),
            "second": drawn(4, 4, seed=2),
            "head": drawn(4, 3, seed=3),
        },
        drawn(20, 4, seed=4),
    ),
}


@functools.cache
def made(name):
    model, params, x = MODELS[name]
    layers = ff.layers.find_layers(model, params, x)
    estimator = ff.estimators.exact(
        model, ff.likelihoods.gaussian(), ff.structures.kronecker(layers)
    )
    information = jax.jit(estimator)(params, (x, None))
    state = ff.posterior(params, information, prior_precision=0.3)
    return state, layers, np.asarray(ff.information.to_dense(state.information))


@pytest.mark.slow_cases
@pytest.mark.parametrize("name", MODELS)
def test_columns_are_blocks_of_the_matrix(name):
    state, layers, matrix = made(name)
    found = ff.information.by_columns(state.information)
    numbers, start = {}, 0
    leaves, treedef = jax.tree.flatten(state.mean)
    for index, leaf in enumerate(leaves):
        numbers[index] = np.arange(start, start + leaf.size).reshape(leaf.shape)
        start += leaf.size
    places = jax.tree.unflatten(treedef, [jnp.asarray(x) for x in numbers.values()])
    seen = []
    for group, part in zip(found.groups, found.split(places), strict=True):
        for k, o in np.ndindex(part.shape[0], part.shape[2]):
            own = np.asarray(part[k, :, o], int)
            block = np.asarray(group.matrix[k])
            block = block if block.ndim == 2 else np.diag(block)
            block = group.weights[k, o] * block + group.shifts[k] * np.eye(len(own))
            np.testing.assert_allclose(block, matrix[np.ix_(own, own)], atol=1e-10)
            seen += own.tolist()
    assert sorted(seen) == list(range(len(matrix)))
    joined = found.join(found.split(state.mean))
    np.testing.assert_array_equal(flat(joined), flat(state.mean))


@pytest.mark.slow_cases
@pytest.mark.parametrize("name", MODELS)
def test_all_is_pruned_and_rounded(name):
    state, layers, matrix = made(name)
    sizes = jax.tree.map(jnp.abs, state.mean)
    kept = compression.mask(sizes, 0.4, layers=layers)
    theta, held = flat(state.mean), ~flat(kept)
    # neither biases nor what belongs to no layer
    kernels = [layers.names[layer.kernel] for layer in layers.layers]
    flags = {layers.names[i]: x for i, x in enumerate(jax.tree.leaves(kept))}
    assert all(np.all(x) for n, x in flags.items() if n not in kernels)
    pruned = compression.prune(state, kept)
    inner = np.linalg.inv(matrix[np.ix_(~held, ~held)])
    expected = np.zeros(len(theta))
    pushed = matrix[np.ix_(~held, held)] @ theta[held]
    expected[~held] = theta[~held] + inner @ pushed
    np.testing.assert_allclose(flat(pruned.params), expected, atol=1e-9)
    found = compression.round_to_grid(state, 3, mask=kept)
    assert np.all(flat(found.params)[held] == 0)
    assert float(found.predicted_rise) < float(found.nearest_rise)
    rises = flat(found.params) - theta
    rise = rises @ matrix @ rises / 2
    np.testing.assert_allclose(found.predicted_rise, rise, rtol=1e-9)


@pytest.mark.slow
def test_scales_are_of_output_channels():
    shapes = {}
    for name in MODELS:
        found = compression.round_to_grid(made(name)[0], 4)
        shapes[name] = [x.shape for x in jax.tree.leaves(found.scales)]
    assert shapes["convolution"] == [(1, 1, 1, 3), (1, 2)]
    assert shapes["scanned"] == [(1, 3), (2, 1, 4)]
    assert shapes["alike"] == [(4, 1), (1, 3), (4, 1)]
    # one of two that are stacked
    state = made("alike")[0]
    found = compression.round_to_grid(state, {"second": 3})
    np.testing.assert_array_equal(found.params["first"], state.mean["first"])
    assert found.values["first"] is None


def test_rows_of_a_pattern_are_inputs():
    for name in ("alike", "scanned"):
        state, layers, _ = made(name)
        sizes = jax.tree.map(jnp.abs, state.mean)
        kept = compression.mask(sizes, "2:4", layers=layers)
        if name == "alike":
            assert np.all(np.sum(kept["first"], axis=1) == 2)
        else:
            assert np.all(np.sum(kept["layers"]["w"], axis=1) == 2)
            assert np.all(kept["layers"]["b"])


@pytest.mark.slow
def test_narrow_parameters(strict_promotion):
    state = made("scanned")[0]
    half = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), state.mean)
    single = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), state)
    narrow = single._replace(mean=half)
    kept = compression.mask(jax.tree.map(jnp.abs, half), 0.5)
    assert all(np.all(x >= 0) for x in jax.tree.leaves(compression.saliency(narrow)))
    pruned = compression.prune(narrow, kept)
    assert pruned.residual < 1e-3
    rounded = compression.round_to_grid(narrow, 4, mask=kept)
    for found in (pruned, rounded):
        assert {x.dtype for x in jax.tree.leaves(found.params)} == {
            jnp.dtype("bfloat16")
        }
        assert np.all(flat(found.params)[~flat(kept)] == 0)
    optimizer = compression.keep_zeros(kept)
    updates = jax.tree.map(lambda x: jnp.ones_like(x, jnp.float32), half)
    moved, _ = optimizer.update(updates, optimizer.init(half), pruned.params)
    assert np.all(flat(moved)[~flat(kept)] == 0)
