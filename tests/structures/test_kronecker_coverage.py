"""Layers that are more than a product with a parameter: exact where K-FAC is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import fisherflow_jax as ff

EXACT = {"rtol": 1e-10, "atol": 1e-12}
# most of the time goes into compiling, and tiny arrays gain nothing from it
FAST = {"xla_backend_optimization_level": 0}
GAUSSIAN = ff.likelihoods.gaussian()


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def drawn(**shapes):
    return {
        name: draw(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())
    }


X = draw(3, 4, seed=9)


def adapted(p, x):
    """A low-rank update, and stacks of them over a fixed kernel, transposed."""
    h = jnp.tanh(x @ (p["w"] + 0.5 * (p["left"] @ p["right"])) + p["b"][None])

    def body(h, layer):
        kernel = np.eye(4) - (layer["down"] @ layer["up"]).T
        return jnp.tanh(kernel @ h), layer

    stacks = {name: p[name] for name in ("down", "up")}
    return jax.vmap(lambda h: lax.scan(jax.checkpoint(body), h, stacks)[0])(h)


MODELS = {
    "adapters": (
        adapted,
        drawn(
            w=(4, 4), b=(4,), left=(4, 2), right=(2, 4), down=(2, 4, 1), up=(2, 1, 4)
        ),
        X,
    ),
}


def blocks(layers, params):
    """For each entry of the parameters the number of its block: of one kernel."""
    leaves = [np.zeros(shape, int) for shape in layers.shapes]
    start = 1
    for layer in layers.layers:
        of_stacks = start + np.arange(layer.num_stacked)
        kernel = np.broadcast_to(of_stacks[:, None, None], layer.kernel_layout.shape)
        leaves[layer.kernel] = np.asarray(layer.kernel_layout.to_leaf(kernel))
        if layer.bias is not None:
            bias = np.broadcast_to(of_stacks[:, None], layer.bias_layout.shape)
            leaves[layer.bias] = np.asarray(layer.bias_layout.to_leaf(bias))
        start += layer.num_stacked
    for leaf, _ in layers.fallback:
        size = leaves[leaf].size
        leaves[leaf] = (start + np.arange(size)).reshape(leaves[leaf].shape)
        start += size
    return np.concatenate([leaf.ravel() for leaf in leaves])


@pytest.mark.parametrize("name", MODELS)
def test_blocks_of_one_example_are_exact(name):
    apply_fn, params, inputs = MODELS[name]
    layers = ff.layers.find_layers(apply_fn, params, inputs)
    assert layers.fallback == ()
    estimator = ff.estimators.exact(apply_fn, GAUSSIAN, ff.structures.kronecker(layers))

    def both(params, x):
        information = estimator(params, (x, None))
        dense = ff.information.to_dense(information, params)
        return dense, jax.jacrev(lambda p: apply_fn(p, x).ravel())(params)

    compiled = jax.jit(both, compiler_options=FAST)
    found, jacobian = compiled(params, inputs[:1])
    columns = [x.reshape(len(x), -1) for x in jax.tree.leaves(jacobian)]
    jacobian = np.concatenate(columns, axis=1)
    own = blocks(layers, params)
    expected = np.where(own[:, None] == own, jacobian.T @ jacobian, 0)
    assert np.trace(expected) > 1
    np.testing.assert_allclose(found, expected, **EXACT)


def test_factors_of_an_adapter():
    def apply_fn(p, x):
        return jnp.tanh(x @ (p["w"] + 0.5 * (p["left"] @ p["right"])))

    params = drawn(w=(4, 3), left=(4, 2), right=(2, 3))
    layers = ff.layers.find_layers(apply_fn, params, X)
    estimator = ff.estimators.exact(apply_fn, GAUSSIAN, ff.structures.kronecker(layers))
    found = jax.jit(estimator, compiler_options=FAST)(params, (X, None))
    kernel = params["w"] + 0.5 * params["left"] @ params["right"]
    slopes = 1 - np.tanh(X @ kernel) ** 2
    outputs = np.diag(np.sum(slopes**2, 0))
    passed = 0.5 * X @ params["left"]
    left, right = found.input_factors, found.output_factors
    np.testing.assert_allclose(left["w"][0], X.T @ X, **EXACT)
    np.testing.assert_allclose(right["w"][0], outputs, **EXACT)
    np.testing.assert_allclose(left["right"][0], passed.T @ passed, **EXACT)
    np.testing.assert_allclose(right["right"][0], outputs, **EXACT)
    # (A, G) of a product stand for A x G: half of the input times all of the gradient
    np.testing.assert_allclose(left["left"][0], 0.25 * X.T @ X, **EXACT)
    turned = params["right"] @ outputs @ params["right"].T
    np.testing.assert_allclose(right["left"][0], turned, **EXACT)
