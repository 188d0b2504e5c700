"""Models whose examples interact are seen, and those that do not are left alone."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

import fisherflow_jax as ff
from fisherflow_jax.layers import find_layers
from layer_cases import IDS, STEPS, X, draw

W = {"w": draw(4, 3)}


def layer(p, x):
    return jnp.tanh(x @ p["w"])


def dropout(p, inputs):
    h = layer(p, inputs["x"])
    return h * jax.random.bernoulli(inputs["key"], 0.5, h.shape).astype(h.dtype)


def noise_of_each(p, inputs):
    noise = jax.vmap(lambda key: jax.random.normal(key, (3,)))(inputs["keys"])
    return layer(p, inputs["x"]) + noise


def running_mean(p, x):
    start = jnp.zeros((1, 4))
    _, h = lax.scan(
        lambda mean, step: ((mean + jnp.mean(step, 0)) / 2, step - mean),
        start[0],
        x.swapaxes(0, 1),
    )
    return h[-1] @ p["w"]


def normalise(x, axis):
    mean = jnp.mean(x, axis, keepdims=True)
    return (x - mean) / jnp.std(x, axis, keepdims=True)


@jax.custom_jvp
def centred(x):
    return x - jnp.mean(x, 0)


centred.defjvp(lambda x, t: (centred(*x), centred(*t)))
DROPOUT = {"x": X, "key": ff.Shared(jax.random.key(0))}

INTERACTING = {
    "batch statistics": (lambda p, x: normalise(layer(p, x), 0), X, "reduce_sum"),
    "jitted": (jax.jit(lambda p, x: normalise(layer(p, x), 0)), X, "reduce_sum"),
    "checkpointed": (
        jax.checkpoint(lambda p, x: normalise(layer(p, x), 0)),
        X,
        "reduce_sum",
    ),
    "own derivative": (lambda p, x: centred(layer(p, x)), X, "reduce_sum"),
    "batch and space": (
        lambda p, x: normalise(x @ p["w"], (0, 1)),
        STEPS,
        "reduce_sum",
    ),
    "in a scan": (running_mean, STEPS, "reduce_sum"),
    "maximum": (lambda p, x: layer(p, x) - jnp.max(x), X, "reduce_max"),
    "products of examples": (
        lambda p, x: jax.nn.softmax(x @ x.T) @ layer(p, x),
        X,
        "dot_general",
    ),
    "whitened": (
        lambda p, x: jnp.linalg.solve(x.T @ x, x.T).T @ p["w"],
        draw(9, 4),
        "dot_general",
    ),
    "sorted": (lambda p, x: layer(p, jnp.sort(x, 0)), X, "sort"),
    "cumulative": (lambda p, x: jnp.cumsum(layer(p, x), 0), X, "cumsum"),
    "one mask": (dropout, DROPOUT, "random numbers drawn for the batch"),
}
SEPARATE = {
    "normalised features": (lambda p, x: normalise(layer(p, x), -1), X),
    "statistics that are not used": (
        lambda p, x: (normalise(layer(p, x), 0), layer(p, x))[1],
        X,
    ),
    "given statistics": (
        lambda p, i: layer(p, i["x"] - jnp.mean(i["all"], 0)),
        {"x": X, "all": ff.Shared(draw(9, 4))},
    ),
    "a key for each": (
        noise_of_each,
        {"x": X, "keys": jax.random.split(jax.random.key(0), 3)},
    ),
    "attention": (
        lambda p, x: jax.nn.softmax(jnp.einsum("btd,bsd->bts", x, x)) @ x @ p["w"],
        STEPS,
    ),
    "looked up": (
        lambda p, x: jnp.sum(jnp.sort(p["w"][x], axis=1), 1),
        IDS,
    ),
    "own positions": (
        lambda p, x: jnp.take_along_axis(x, jnp.argsort(x, -1), -1) @ p["w"],
        X,
    ),
    "mapped": (lambda p, x: lax.map(lambda one: layer(p, one[None])[0], x), X),
}


@pytest.mark.parametrize("name", INTERACTING)
def test_what_takes_examples_together_is_named(name):
    apply_fn, inputs, reason = INTERACTING[name]
    layers = find_layers(apply_fn, W, inputs)
    assert layers.batched and layers.together.startswith(reason)
    last = str(layers).splitlines()[-1]
    assert last == f"examples: run together ({layers.together})"
    alone = find_layers(apply_fn, W, inputs, batched=False)
    assert not alone.batched and "examples:" not in str(alone)


@pytest.mark.parametrize("name", SEPARATE)
def test_examples_on_their_own_are_left_alone(name):
    layers = find_layers(SEPARATE[name][0], W, SEPARATE[name][1])
    assert not layers.batched and layers.together is None


def test_asked_for_where_nothing_is_seen():
    layers = find_layers(layer, W, X, batched=True)
    assert layers.batched and layers.together is None
    assert str(layers).endswith("examples: run together (as asked)")
    assert layers.layers == find_layers(layer, W, X).layers
    assert layers != find_layers(layer, W, X)


def test_one_square_a_batch_is_told():
    def scaled(p, x):
        return normalise(x @ (2 * p["w"]), 0)

    assert "no layer: used in mul; one square a batch" in str(find_layers(scaled, W, X))
    assert "one square" not in str(find_layers(scaled, W, X, batched=False))


@pytest.mark.parametrize(
    ("inputs", "match"),
    [
        (X[:1], r"two or more .*\[1\]"),
        ((X, draw(2, 1)), r"agree in their leading axis.*ff.Shared"),
    ],
)
def test_one_example_does_not_tell_its_axis(inputs, match):
    with pytest.raises(ValueError, match=match):
        find_layers(lambda p, x: layer(p, x), W, inputs, batched=True)


class Linen(nn.Module):
    train: bool

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.BatchNorm(not self.train)(nn.Conv(4, (3,))(x)))
        return nn.Dense(2)(nn.avg_pool(x, (5,))[:, 0])


@pytest.mark.parametrize("train", [True, False])
def test_batch_norm_of_linen(train):
    module = Linen(train)
    shapes = jax.eval_shape(module.init, jax.random.key(0), STEPS)

    def apply_fn(params, inputs):
        variables = {"params": params, "batch_stats": inputs["statistics"]}
        return module.apply(variables, inputs["x"], mutable=["batch_stats"])[0]

    statistics = jax.tree.map(lambda x: np.ones(x.shape), shapes["batch_stats"])
    inputs = {"x": STEPS, "statistics": ff.Shared(statistics)}
    layers = find_layers(apply_fn, shapes["params"], inputs)
    assert layers.batched == train
    assert [x.kind for x in layers.layers] == ["convolution", "dense"]
    assert all(x.bias is not None for x in layers.layers)


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.hidden, self.out = nnx.Linear(4, 3, rngs=rngs), nnx.Linear(3, 2, rngs=rngs)
        self.norm = nnx.BatchNorm(3, rngs=rngs)

    def __call__(self, x):
        return self.out(nnx.relu(self.norm(self.hidden(x))))


@pytest.mark.parametrize("train", [True, False])
def test_batch_norm_of_nnx(train):
    model = Nnx(nnx.Rngs(0))
    (model.train if train else model.eval)()
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def apply_fn(params, inputs):
        return nnx.merge(graph, params, inputs["rest"])(inputs["x"])

    inputs = {"x": X.astype(np.float32), "rest": ff.Shared(rest)}
    layers = find_layers(apply_fn, params, inputs)
    assert layers.batched == train
    assert len(layers.layers) == 2
