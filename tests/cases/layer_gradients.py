"""Gradients from taps, and by plain reverse mode."""

import jax
import jax.numpy as jnp
import numpy as np

from fisherflow_jax import layers as ff_layers
from layer_cases import draw


def kernel_gradient(layer, a, g):
    """What the layer's inputs and output gradients make of its kernel's gradient."""
    turned = 0.0
    if layer.num_turned:
        (a, h), (g, d) = a, g
        assert h.shape == (layer.num_stacked, layer.num_turned, layer.num_outputs)
        assert d.shape == (layer.num_stacked, layer.num_turned, layer.num_inputs)
        turned = jnp.einsum("kti,kto->kio", d, h.astype(d.dtype))
    if layer.kind == "embedding":
        a = jax.nn.one_hot(a, layer.num_inputs, dtype=g.dtype)
    products = jnp.einsum("kti,kto->kio", a.astype(g.dtype), g)
    return layer.kernel_layout.to_leaf(products + turned)


def by_taps(apply_fn, layers, params, inputs, cotangents):
    """One example's outputs, and the gradient of all parameters for each cotangent.

    inputs (1, ...), cotangents (R, 1, ...) -> outputs, tree of (R, *leaf.shape)
    """
    outputs, entering, pull = ff_layers.tap(apply_fn, layers, params, inputs)

    def gradients(cotangent):
        returned, leaves = pull(cotangent)
        leaves = dict(leaves)
        for layer, a, g in zip(layers.layers, entering, returned, strict=True):
            shared = layer.num_stacked, layer.num_positions
            forward = (a[0], g[0]) if layer.num_turned else (a, g)
            assert forward[0].shape[:2] == shared
            assert forward[1].shape == (*shared, layer.num_outputs)
            leaves[layer.kernel] = kernel_gradient(layer, a, g)
            if layer.bias is not None:
                leaves[layer.bias] = layer.bias_layout.to_leaf(jnp.sum(g, 1))
        leaves = [leaves[i] for i in range(len(layers.names))]
        return jax.tree.unflatten(jax.tree.structure(params), leaves)

    return outputs, jax.vmap(gradients)(cotangents)


def by_vjp(apply_fn, params, inputs, cotangents):
    """The same by plain reverse mode."""
    outputs, pull = jax.vjp(lambda p: apply_fn(p, inputs), params)
    return outputs, jax.vmap(lambda v: pull(v)[0])(cotangents)


def compare(apply_fn, params, inputs, tolerance=1e-12):
    """Asserts that both agree for every example, with two cotangents each."""
    found = ff_layers.find_layers(apply_fn, params, inputs)

    def both(params, x, cotangents):
        x = jax.tree.map(lambda leaf: leaf[None], x)
        cotangents = jax.tree.map(lambda leaf: leaf[:, None], cotangents)
        return (
            by_taps(apply_fn, found, params, x, cotangents),
            by_vjp(apply_fn, params, x, cotangents),
        )

    count = jax.tree.leaves(inputs)[0].shape[0]
    example = jax.tree.map(lambda leaf: leaf[:1], inputs)
    cotangents = jax.tree.map(
        lambda leaf: draw(count, 2, *leaf.shape[1:], seed=9).astype(leaf.dtype),
        jax.eval_shape(apply_fn, params, example),
    )
    compared = jax.jit(
        jax.vmap(both, (None, 0, 0)),
        # most of the time goes into compiling, and tiny arrays gain nothing from it
        compiler_options={"xla_backend_optimization_level": 0},
    )
    (outputs, taps), (expected_outputs, expected) = compared(params, inputs, cotangents)
    jax.tree.map(np.testing.assert_array_equal, outputs, expected_outputs)
    jax.tree.map(
        lambda got, want: np.testing.assert_allclose(
            got, want, rtol=tolerance, atol=tolerance * np.abs(want).max(initial=1e-30)
        ),
        taps,
        expected,
    )
