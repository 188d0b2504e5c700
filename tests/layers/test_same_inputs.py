"""Kernels that one array enters, whatever wraps the code, and others."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fisherflow_jax import layers

NAMES = "k", "o", "q", "v"
PARAMS = {name: jnp.ones((4, 4)) for name in NAMES}
X = jnp.ones((2, 3, 4))


def by_products(p, x):
    return jnp.tanh((x @ p["q"]) * (x @ p["k"]) + x @ p["v"]) @ p["o"]


def by_einsums(p, x):  # each a program of its own
    q, k, v = (jnp.einsum("nsd,de->nse", x, p[name]) for name in "qkv")
    return jnp.einsum("nsd,de->nse", jnp.tanh(q * k + v), p["o"])


def within(wrap):
    return lambda p, x: wrap(by_einsums)(p, jnp.tanh(x))


def over_layers(p, x):
    return jax.lax.scan(lambda h, own: (h + by_einsums(own, h), None), x, p)[0]


@pytest.mark.parametrize(
    "apply_fn",
    [by_products, by_einsums, within(jax.jit), within(jax.checkpoint), over_layers],
)
def test_kernels_that_one_array_enters(apply_fn):
    params = PARAMS
    if apply_fn is over_layers:
        params = jax.tree.map(lambda w: jnp.stack([w, 2 * w]), PARAMS)
    found = layers.find_layers(apply_fn, params, X)
    assert [[found.names[leaf] for leaf in x] for x in found.entered] == [
        ["k", "q", "v"]
    ]
    (rows,) = found.same_inputs.values()
    stacked = len(rows) // 4
    each = np.arange(stacked)
    expected = [each, stacked + each, each, each]
    np.testing.assert_array_equal(rows, np.concatenate(expected))
    assert str(found).count("input shared with k") == 2
    assert found.only(["k", "o"]).entered == ()
    assert found.only(["o", "q", "v"]).entered == ((2, 3),)


def twice(p, x):
    return x @ p["q"] @ p["q"] + x @ p["k"]


@pytest.mark.parametrize(
    "apply_fn",
    [
        lambda p, x: x @ p["q"] + jnp.tanh(x) @ p["k"],  # two arrays
        lambda p, x: x @ p["q"] + x @ (2 * p["k"]),  # a multiple of it
        lambda p, x: x @ p["q"] + x[:, ::-1] @ p["k"],
        twice,  # at one of two uses
        lambda p, x: x @ (p["q"] @ p["k"]),  # one after the other
    ],
)
def test_kernels_that_it_does_not_enter_as_it_is(apply_fn):
    assert layers.find_layers(apply_fn, PARAMS, X).entered == ()
