"""Rows of a whole batch: those of single examples, and sums that are its gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import fisherflow_jax as ff
import layer_models as models
from fisherflow_jax.layers import _values as examples
from fisherflow_jax.layers import find_layers, tap, tap_batch
from layer_cases import (
    FOUND,
    STEPS,
    Bias,
    Model,
    Sizes,
    X,
    dense,
    draw,
    model,
    treatments,
)
from layer_gradients import kernel_gradient
from layer_near_misses import NEAR_MISSES


def time_major(p, x):
    """Positions before examples, both in one axis; a flip; examples in two axes."""
    steps = jnp.tanh(x.swapaxes(0, 1).reshape(-1, 4) @ p["w"] + p["b"][None])
    h = jnp.flip(steps.reshape(x.shape[1], x.shape[0], 3), 1)
    h = h + p["position"][:, None]
    h = h.reshape(x.shape[1], 2, -1, 3) @ p["v"]
    return p["gain"] * h.reshape(x.shape[1], -1, 2).swapaxes(0, 1)[::-1]


TIME_MAJOR = model(
    time_major,
    {"w": (4, 3), "b": (3,), "position": (5, 3), "v": (3, 2), "gain": ()},
    draw(6, 5, 4),
)
KEPT = (
    "vmap",
    "transformer",
    "convolutions",
    "scanned layers, checkpointed",
    "scanned experts",
    "tied",
    "adapters",
)
MIXED = {
    "routed": model(
        models.routed,
        {"w": (4, 4, 3), "v": (4, 3, 2), "left": (4, 3, 1), "right": (4, 1, 2)}
        | {"b": (2,)},
        STEPS,
        w=Sizes("experts", 4, 3, 4, 5),
        v=Sizes("experts", 3, 2, 4, 5),
        left=Sizes("experts", 3, 1, 4, 5),
        right=Sizes("experts", 1, 2, 4, 5),
        b="used in add",
    ),
    "graph": model(
        models.graph,
        {"w": (3, 3), "b": (3,), "u": (4, 3), "v": (2, 3, 3)},
        X,
        w=dense(3, 3),
        b=Bias("w"),
        u=dense(4, 3),
        v=dense(3, 3, stacked=2),
    ),
}
SUMMED = ("stopped", "weight norm")
CASES = {name: FOUND[name] for name in KEPT} | {"time-major": TIME_MAJOR}
CASES |= {name: NEAR_MISSES[name] for name in SUMMED}


def normalised(x):
    return (x - jnp.mean(x, 0, keepdims=True)) * lax.rsqrt(
        jnp.mean(jnp.square(x), 0, keepdims=True) + 0.1
    )


def batch_normalised(p, x):
    hidden = normalised(x @ p["w"] + p["b"][None])
    hidden = jnp.tanh(hidden * p["scale"][None] + p["shift"][None])
    return hidden @ p["v"] + p["c"][None]


INTERACTING = model(
    batch_normalised,
    {"w": (4, 3), "b": (3,), "scale": (3,), "shift": (3,), "v": (3, 2), "c": (2,)},
    X,
)


def run(case: Model, *, by_example: bool):
    """Everything to compare, from one compiled function."""
    layers = find_layers(case.apply_fn, case.params, case.inputs, batched=True)
    outputs = jax.eval_shape(case.apply_fn, case.params, case.inputs)
    cotangent = draw(*outputs.shape, seed=9)

    def rows(params, inputs, cotangent):
        outputs, entering, pull = tap_batch(case.apply_fn, layers, params, inputs)
        return outputs, entering, pull(cotangent)

    def one(params, x, v):
        single = find_layers(case.apply_fn, params, case.inputs, batched=False)
        _, entering, pull = tap(case.apply_fn, single, params, x[None])
        return entering, *pull(v[None])

    def every(params, inputs, cotangent):
        outputs, pull = jax.vjp(lambda p: case.apply_fn(p, inputs), params)
        singles = None
        if by_example:
            singles = jax.vmap(one, (None, 0, 0))(params, inputs, cotangent)
        found = rows(params, inputs, cotangent)
        return found, singles, outputs, pull(cotangent)[0]

    compiled = jax.jit(every, compiler_options={"xla_backend_optimization_level": 0})
    return layers, *compiled(case.params, case.inputs, cotangent)


def close(got, expected):
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(
            x, y, 1e-12, 1e-12 * np.abs(y).max(initial=1e-30)
        ),
        got,
        expected,
    )


def assert_sums_are_the_gradient(layers, entering, returned, gradient):
    leaves = jax.tree.leaves(gradient)
    sums = {i: rows.sum(0) for i, rows in returned.rows.items()} | returned.sums
    assert sorted(returned.sums) == sorted(layers.summed)
    for layer, a, g in zip(layers.layers, entering, returned.gradients, strict=True):
        sums[layer.kernel] = sum(map(kernel_gradient, [layer] * len(a), a, g))
        if layer.bias is not None:
            sums[layer.bias] = layer.bias_layout.to_leaf(g.sum((0, 2)))
    close([sums[i] for i in range(len(leaves))], leaves)


@pytest.mark.parametrize("name", MIXED)
def test_rows_of_no_single_example(name):
    case = MIXED[name]
    layers, (outputs, entering, returned), _, expected, gradient = run(
        case, by_example=False
    )
    assert treatments(layers) == case.expected
    unmixed = {layers.names[x.kernel] for x in layers.layers if not x.mixed}
    assert unmixed == ({"u"} if name == "graph" else set())
    close(outputs, expected)
    assert_sums_are_the_gradient(layers, entering, returned, gradient)


def test_experts_of_one_example():
    """Without `jax.vmap`, which does not know the operation."""
    case = MIXED["routed"]
    layers = find_layers(case.apply_fn, case.params, STEPS, batched=False)
    x = STEPS[:1]

    @jax.jit
    def both(params, cotangent):
        outputs, entering, pull = tap(case.apply_fn, layers, params, x)
        expected, vjp = jax.vjp(lambda p: case.apply_fn(p, x), params)
        return outputs, entering, *pull(cotangent), expected, *vjp(cotangent)

    outputs, entering, returned, rest, *expected = both(case.params, draw(1, 5, 2))
    found = dict(rest)
    for layer, a, g in zip(layers.layers, entering, returned, strict=True):
        found[layer.kernel] = kernel_gradient(layer, a, g)
        # one expert has no tokens, and each token one expert
        assert np.sum(np.any(a != 0, (1, 2))) < 4
        assert np.sum(np.any(a != 0, 2)) == 5
    leaves = [found[i] for i in range(len(layers.names))]
    close([outputs, *leaves], [expected[0], *jax.tree.leaves(expected[1])])


@pytest.mark.slow_cases
@pytest.mark.usefixtures("strict_promotion")
@pytest.mark.parametrize("name", CASES)
def test_rows_are_those_of_single_examples(name):
    case = CASES[name]
    layers, (outputs, entering, returned), singles, expected, gradient = run(
        case, by_example=name != "time-major"
    )
    close(outputs, expected)
    assert_sums_are_the_gradient(layers, entering, returned, gradient)
    if singles is None:
        return
    of_inputs, of_outputs, others = singles
    close(entering, of_inputs)
    close(returned.gradients, of_outputs)
    assert {*returned.rows, *returned.sums} == set(others)
    close(returned.rows, {leaf: others[leaf] for leaf in returned.rows})


def test_the_axis_of_examples_is_followed_where_shapes_do_not_tell():
    """Positions before examples, merged: compared with a permuted batch."""
    layers = find_layers(time_major, TIME_MAJOR.params, TIME_MAJOR.inputs, batched=True)
    assert [layer.num_positions for layer in layers.layers] == [5, 5]
    assert layers.summed == ()
    order = np.array([3, 1, 0, 5, 4, 2])

    @jax.jit
    def entering(inputs):
        return tap_batch(time_major, layers, TIME_MAJOR.params, inputs)[1]

    a, permuted = entering(TIME_MAJOR.inputs)[1], entering(TIME_MAJOR.inputs[order])[1]
    np.testing.assert_array_equal(a[:, 0], TIME_MAJOR.inputs)
    np.testing.assert_array_equal(permuted, a[order])


@pytest.mark.usefixtures("strict_promotion")
def test_rows_of_a_model_whose_examples_interact():
    layers, (outputs, entering, returned), _, expected, gradient = run(
        INTERACTING, by_example=False
    )
    close(outputs, expected)
    assert_sums_are_the_gradient(layers, entering, returned, gradient)
    assert treatments(layers)["scale"] == "used in mul" and layers.summed == ()
    # what enters the second layer is normalised over the batch, as in the model
    p = INTERACTING.params
    second, first = 0, 1  # in the order of their names

    def activations(h):
        return jnp.tanh(normalised(h) * p["scale"][None] + p["shift"][None])

    hidden = X @ p["w"] + p["b"]
    np.testing.assert_allclose(entering[second][:, 0, 0], activations(hidden), 1e-12)
    # and the gradient of a row of the first layer is that of all outputs
    rows = jax.grad(lambda h: jnp.sum((activations(h) @ p["v"]) * draw(3, 2, seed=9)))(
        hidden
    )
    np.testing.assert_allclose(returned.gradients[first][:, 0, 0], rows, 1e-10)


@pytest.mark.parametrize("mutate", ["roll", "none"])
def test_the_comparison_sees_rows_of_other_examples(mutate, monkeypatch):
    original = examples.examples_first

    def rolled(view, depth, values):
        return jnp.roll(original(view, depth, values), 1, 0)

    if mutate == "roll":
        monkeypatch.setattr("fisherflow_jax.layers._taps.examples_first", rolled)
    _, (_, entering, _), (expected, _, _), _, _ = run(CASES["vmap"], by_example=True)
    assert np.allclose(entering[0], expected[0]) == (mutate == "none")


def test_a_batch_of_one_example():
    case = INTERACTING
    layers = find_layers(case.apply_fn, case.params, X, batched=True)
    _, (_, a), pull = tap_batch(case.apply_fn, layers, case.params, X[:1])
    np.testing.assert_array_equal(a[:, 0, 0], X[:1])
    assert pull(jnp.ones((1, 2))).gradients[0].shape == (1, 1, 1, 2)


def test_shared_inputs_have_no_examples():
    def apply_fn(p, inputs):
        prototypes = inputs["frozen"] @ p["w"]
        return inputs["x"] @ p["v"] + jnp.sum(prototypes)

    params = {"w": draw(4, 2), "v": draw(4, 2)}
    inputs = {"x": X, "frozen": ff.Shared(X)}  # as many rows as there are examples
    layers = find_layers(apply_fn, params, inputs, batched=True)
    assert treatments(layers)["w"] == "the examples cannot be told apart in its inputs"
    assert [layers.names[i] for i in layers.summed] == ["w"]
    _, (a,), _ = tap_batch(apply_fn, layers, params, inputs)
    np.testing.assert_array_equal(a[:, 0, 0], X)


def test_another_model_than_the_one_found():
    found = find_layers(batch_normalised, INTERACTING.params, X, batched=True)
    with pytest.raises(ValueError, match=r" c was a bias .*no layer"):
        tap_batch(
            lambda p, x: batch_normalised(p, x) * p["v"][:1],
            found,
            INTERACTING.params,
            X,
        )
    recurrent = FOUND["recurrent"]
    layers = find_layers(recurrent.apply_fn, recurrent.params, STEPS, batched=True)
    with pytest.raises(ValueError, match=r"T = 5.*T = 4"):
        tap_batch(recurrent.apply_fn, layers, recurrent.params, STEPS[:, :4])
