"""Which parameter is found to be what, and why others are not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import fisherflow_jax as ff
from fisherflow_jax.layers import find_layers
from layer_cases import FOUND, treatments
from layer_near_misses import NEAR_MISSES
from together import together

CASES = FOUND | NEAR_MISSES


def found(name):
    apply_fn, params, inputs, _ = CASES[name]
    return find_layers(apply_fn, params, inputs)


@pytest.mark.slow
@together
@pytest.mark.usefixtures("strict_promotion")
@pytest.mark.parametrize("name", CASES)
def test_treatment_of_every_parameter(name):
    assert treatments(found(name)) == CASES[name].expected


def test_shapes_suffice():
    apply_fn, params, inputs, _ = CASES["transformer"]
    shapes = jax.eval_shape(lambda *arguments: arguments, params, inputs)
    assert find_layers(apply_fn, *shapes) == found("transformer")


def test_equal_models_have_equal_layers():
    variants = [found(name) for name in ("affine", "jit", "vmap", "checkpoint")]
    assert len(set(variants)) == 1
    assert found("scanned layers") == found("scanned layers, checkpointed")
    assert found("affine") != found("positions")


def test_layers_are_in_the_order_of_their_kernels():
    for name in ("transformer", "embeddings", "kernel as bias"):
        kernels = [layer.kernel for layer in found(name).layers]
        assert kernels == sorted(kernels) and len(kernels) > 1


def test_layers_are_static():
    layers = found("affine")
    doubled = jax.jit(lambda layers, x: x * len(layers.names))(layers, 2.0)
    assert doubled == 4
    assert jax.tree.leaves(layers) == []


@pytest.mark.parametrize("count", [1, 2, 50])
def test_the_number_of_examples_does_not_matter(count):
    apply_fn, params, inputs, _ = CASES["positions"]
    many = np.resize(inputs, (count, *inputs.shape[1:]))
    assert find_layers(apply_fn, params, many) == found("positions")


def test_shared_inputs_are_passed_whole():
    def apply_fn(params, inputs):
        h = inputs["x"] @ inputs["frozen"] @ params["w"]
        return jax.random.normal(inputs["key"], h.shape) * h if inputs["noisy"] else h

    shared = {"frozen": jnp.ones((4, 3)), "key": jax.random.key(0), "noisy": True}
    inputs = {"x": jnp.ones((5, 4)), **{k: ff.Shared(v) for k, v in shared.items()}}
    layers = find_layers(apply_fn, {"w": jnp.ones((3, 2))}, inputs)
    assert [(x.num_inputs, x.num_outputs) for x in layers.layers] == [(3, 2)]


def test_a_boolean_of_python_among_the_operands():
    """As diffrax's solvers leave it: a literal without a dtype."""

    def one(params, x):
        seen = jax.lax.and_p.bind(x[0] > 0, True)
        return jnp.where(seen, 1.0, 2.0) * (x @ params["w"])

    apply_fn = jax.vmap(one, (None, 0))
    layers = find_layers(apply_fn, {"w": jnp.ones((2, 3))}, jnp.ones((4, 2)))
    assert [(x.num_inputs, x.num_outputs) for x in layers.layers] == [(2, 3)]


def test_operations_without_a_derivative_are_walked_too():
    def apply_fn(params, x):
        def body(state):
            return state[0] + 1, jnp.tanh(state[1] @ params["w"])

        _, x = lax.while_loop(lambda state: state[0] < 3, body, (0, x))
        return lax.top_k(x, 1)[0] + jnp.argmax(params["b"])

    params = {"w": jnp.ones((4, 4)), "b": jnp.ones(3)}
    layers = find_layers(apply_fn, params, jnp.ones((2, 4)))
    assert treatments(layers) == {"w": "used in while", "b": "used in argmax"}


@pytest.mark.parametrize(
    ("params", "inputs", "match"),
    [
        ({"w": jnp.ones(3, int)}, jnp.ones((2, 3)), r"; w has dtype int"),
        ({"w": jnp.ones(3)}, jnp.ones(()), r"at least one example .*shape \(\)"),
        ({"w": jnp.ones(3)}, jnp.ones((0, 3)), r"at least one example .*\(0, 3\)"),
        ({"w": jnp.ones(3)}, (jnp.ones((2, 3)), True), r"ff.Shared\); got True"),
    ],
)
def test_errors_name_what_is_wrong(params, inputs, match):
    with pytest.raises(ValueError, match=match):
        find_layers(lambda p, x: x, params, inputs)
