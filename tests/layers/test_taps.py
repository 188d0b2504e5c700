"""Gradients from taps against plain reverse mode, example by example."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from fisherflow_jax.layers import _linear as linear
from fisherflow_jax.layers import find_layers, tap
from layer_cases import FOUND, STEPS, draw
from layer_gradients import by_taps, by_vjp, compare, kernel_gradient
from layer_near_misses import NEAR_MISSES

CASES = FOUND | NEAR_MISSES


@pytest.mark.slow
@pytest.mark.usefixtures("strict_promotion")
@pytest.mark.parametrize("name", CASES)
def test_gradients(name):
    apply_fn, params, inputs, _ = CASES[name]
    # half precision: products of rounded numbers, summed in another order
    compare(apply_fn, params, inputs, 2e-2 if name == "half precision" else 1e-12)


def grouped_convolution(w, x):
    return lax.conv_general_dilated(
        x,
        w,
        (1,),
        "VALID",
        dimension_numbers=("NWC", "WIO", "NWC"),
        feature_group_count=2,
    )


@pytest.mark.parametrize(
    "mutate",
    [lambda outputs: 1.001 * outputs, lambda outputs: outputs[::-1], None],
    ids=["scaled gradients", "swapped groups", "none"],
)
def test_the_comparison_sees_small_errors(mutate, monkeypatch):
    original = linear.Convolved.outputs
    arguments = grouped_convolution, draw(2, 2, 4), draw(2, 5, 4)
    if mutate is None:
        return compare(*arguments)

    def outputs(self, values):
        values = original(self, values)
        return values if not isinstance(values, jax.Array) else mutate(values)

    monkeypatch.setattr(linear.Convolved, "outputs", outputs)
    with pytest.raises(AssertionError, match="Mismatched elements"):
        compare(*arguments)


def test_inputs_keep_their_type():
    apply_fn, params, inputs, _ = CASES["half precision"]
    layers = find_layers(apply_fn, params, inputs)
    outputs, (a,), pull = tap(apply_fn, layers, params, inputs[:1])
    (g,), _ = pull(jnp.ones_like(outputs))
    assert a.dtype == g.dtype == jnp.bfloat16
    np.testing.assert_array_equal(a[0], inputs[:1].astype(jnp.bfloat16))


def test_uses_of_several_types_meet_in_the_wider():
    def apply_fn(w, x):
        half = x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16)
        return half.astype(x.dtype) + x @ w

    x, w = jnp.ones((1, 3), jnp.float32), jnp.ones((3, 2), jnp.float32)
    outputs, (a,), pull = tap(apply_fn, find_layers(apply_fn, w, x), w, x)
    (g,), _ = pull(jnp.ones_like(outputs))
    assert a.dtype == g.dtype == jnp.float32
    assert a.shape == (1, 2, 3) and g.shape == (1, 2, 2)


@pytest.mark.parametrize(
    ("mode", "expected"), [("fill", [0, 4, 3, 4]), ("clip", [0, 3, 3, 0])]
)
def test_ids_out_of_bounds(mode, expected):
    """A dropped id is the number of rows, where a scatter drops it again."""

    def apply_fn(table, ids):
        return table.at[ids].get(mode=mode)

    ids, table = jnp.array([[0, 7, -1, -9]]), jnp.ones((4, 2))
    layers = find_layers(apply_fn, table, ids)
    _, (found,), pull = tap(apply_fn, layers, table, ids)
    (g,), _ = pull(jnp.ones((1, 4, 2)))
    assert found.dtype == jnp.int32
    np.testing.assert_array_equal(found, [expected])
    np.testing.assert_array_equal(g[0, :, 0] == 1, np.array(expected) < 4)


def test_inside_transformations_with_tracers_closed_over():
    """In a scan, under grad and vmap; the model closes over what they trace."""

    def total(scale, params, x):
        def apply_fn(params, x):
            return jnp.sum(jnp.tanh(scale * (x @ params["w"]) @ params["w"]), 1)

        layers = find_layers(apply_fn, params, x[None])
        outputs, (a,), pull = tap(apply_fn, layers, params, x[None])
        (g,), rest = pull(jnp.cos(outputs))
        assert rest == {}
        return jnp.sum(jnp.square(kernel_gradient(layers.layers[0], a, g)))

    def reference(scale, params, x):
        def apply_fn(w):
            return jnp.sum(jnp.sin(jnp.sum(jnp.tanh(scale * (x[None] @ w) @ w), 1)))

        return jnp.sum(jnp.square(jax.grad(apply_fn)(params["w"])))

    def over_all(function):
        def step(carry, x):
            values = jax.vmap(jax.value_and_grad(function), (0, None, 0))
            return carry, values(scales, params, x)

        return lax.scan(step, 0, STEPS.swapaxes(0, 1))[1]

    params, scales = {"w": draw(4, 4, seed=1)}, draw(3, seed=2)
    got, expected = jax.jit(lambda: (over_all(total), over_all(reference)))()
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, 1e-10), got, expected)


def test_parameters_may_be_mapped_over():
    apply_fn, params, inputs, _ = CASES["affine"]
    layers = find_layers(apply_fn, params, inputs)
    stacked = jax.tree.map(lambda x: np.stack([x, 2 * x]), params)
    cotangents = draw(2, 1, 3)

    @jax.jit
    @jax.vmap
    def both(params):
        x = inputs[:1]
        return (
            by_taps(apply_fn, layers, params, x, cotangents),
            by_vjp(apply_fn, params, x, cotangents),
        )

    got, expected = both(stacked)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, 1e-12), got, expected)


def test_pull_forms_no_kernel_gradient():
    """No product of the size of a kernel is left in the program of `pull`."""

    def apply_fn(w, x):
        return jnp.tanh(x @ w)

    params, x = jnp.ones((50, 60)), jnp.ones((1, 50))
    layers = find_layers(apply_fn, params, x)

    def pulled(x):
        outputs, _, pull = tap(apply_fn, layers, params, x)
        return pull(outputs)

    program = jax.make_jaxpr(pulled)(x)
    products = [e for e in program.eqns if e.primitive.name == "dot_general"]
    assert [e.outvars[0].aval.shape for e in products] == [(1, 60)]


def recurrent(p, x):
    return FOUND["recurrent"].apply_fn(p, x)


@pytest.mark.parametrize(
    ("apply_fn", "params", "inputs", "match"),
    [
        (recurrent, {}, STEPS[:1, :4], r" u was dense .*T = 5.* it is .*T = 4"),
        (recurrent, {}, STEPS[:2], r" u was dense .*T = 5.* it is .*T = 10"),
        (recurrent, {"z": 1.0}, STEPS[:1], r"names were .*'w'.* now .*'w'.*'z'"),
        (recurrent, {"u": draw(2, 3)}, STEPS[:1], r"\(3, 3\), .* now .*\(2, 3\), "),
        (
            lambda p, x: recurrent(p, x) * p["u"][:1],
            {},
            STEPS[:1],
            r" u was dense .* now it is no layer \(used in slice\)",
        ),
    ],
)
def test_another_model_than_the_one_found(apply_fn, params, inputs, match):
    found_in = FOUND["recurrent"]
    layers = find_layers(recurrent, found_in.params, found_in.inputs)
    with pytest.raises(ValueError, match=match):
        tap(apply_fn, layers, found_in.params | params, inputs)
