"""The classifiers of the estimators' benchmarks, written by hand, and their data."""

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from sklearn.datasets import load_digits

import fisherflow_jax as ff

CATEGORICAL = ff.likelihoods.categorical()
_TRANSFORMER_HEADS = 4


class Classifier(NamedTuple):
    """A model with a batch of data; the data enter compiled functions as arguments."""

    name: str
    apply_fn: Callable
    params: Any
    batch: tuple[jax.Array, jax.Array]
    num_classes: int

    @property
    def num_params(self) -> int:
        return sum(leaf.size for leaf in jax.tree.leaves(self.params))


def mlp() -> Classifier:
    """784-512-512-10 on 256 random rows."""
    keys = jax.random.split(jax.random.key(0), 3)
    inputs = jax.random.normal(keys[0], (256, 784))
    targets = jax.random.randint(keys[1], (256,), 0, 10)
    params = dense_layers(keys[2], (784, 512, 512, 10))
    batch = inputs, targets
    apply_fn = functools.partial(apply_dense, jax.nn.relu)
    return Classifier("MLP 784-512-512-10", apply_fn, params, batch, 10)


def cnn() -> Classifier:
    """Two convolutions and two dense layers on 128 random images of 28 x 28."""
    keys = jax.random.split(jax.random.key(1), 5)
    inputs = jax.random.normal(keys[0], (128, 28, 28, 1))
    targets = jax.random.randint(keys[1], (128,), 0, 10)
    params = {
        "conv1": dense(keys[2], (3, 3, 1, 16)),
        "conv2": dense(keys[3], (3, 3, 16, 32)),
        "dense": dense_layers(keys[4], (7 * 7 * 32, 64, 10)),
    }

    return Classifier(
        "CNN conv16-conv32-fc64-10", apply_convolutions, params, (inputs, targets), 10
    )


def apply_convolutions(params: Any, x: jax.Array) -> jax.Array:
    """Each convolution halves both sides; the dense layers follow."""
    x = _convolve(params["conv2"], _convolve(params["conv1"], x))
    return apply_dense(jax.nn.relu, params["dense"], x.reshape(x.shape[0], -1))


def _convolve(layer: dict, x: jax.Array) -> jax.Array:
    numbers = "NHWC", "HWIO", "NHWC"
    x = jax.lax.conv_general_dilated(
        x, layer["w"], (1, 1), "SAME", dimension_numbers=numbers
    )
    x = jax.nn.relu(x + layer["b"])
    rows, height, width, features = x.shape
    pooled = x.reshape(rows, height // 2, 2, width // 2, 2, features)
    return jnp.mean(pooled, (2, 4))


def transformer() -> Classifier:
    """Two layers of width 64 on 32 random sequences of 32 tokens, three classes."""
    width, vocabulary, length = 64, 1000, 32
    keys = iter(jax.random.split(jax.random.key(2), 20))
    inputs = jax.random.randint(next(keys), (32, length), 0, vocabulary)
    targets = jax.random.randint(next(keys), (32,), 0, 3)

    params = {
        "embedding": 0.5 * jax.random.normal(next(keys), (vocabulary, width)),
        "position": 0.5 * jax.random.normal(next(keys), (length, width)),
        "layers": [block(keys, width) for _ in range(2)],
        "norm": norm(width),
        "head": dense(next(keys), (width, 3)),
    }
    return Classifier(
        "transformer, width 64", _apply_transformer, params, (inputs, targets), 3
    )


def _apply_transformer(params: Any, ids: jax.Array) -> jax.Array:
    x = params["embedding"][ids] + params["position"]
    for layer in params["layers"]:
        x = through_block(layer, x, _TRANSFORMER_HEADS)
    return affine(params["head"], jnp.mean(normalised(params["norm"], x), 1))


def norm(width: int) -> dict:
    return {"scale": jnp.ones(width), "shift": jnp.zeros(width)}


def block(keys: Iterator[jax.Array], width: int) -> dict:
    """Of a transformer whose norms stand before attention and MLP; takes four keys."""
    return {
        "norm1": norm(width),
        "in": dense(next(keys), (width, 3 * width)),
        "out": dense(next(keys), (width, width)),
        "norm2": norm(width),
        "up": dense(next(keys), (width, 4 * width)),
        "down": dense(next(keys), (4 * width, width)),
    }


def through_block(
    layer: Any,
    x: jax.Array,
    num_heads: int,
    mask: jax.Array | None = None,
    activation: Callable = jax.nn.gelu,
) -> jax.Array:
    x = x + attention(layer, normalised(layer["norm1"], x), num_heads, mask)
    up = activation(affine(layer["up"], normalised(layer["norm2"], x)))
    return x + affine(layer["down"], up)


def attention(
    layer: Any, x: jax.Array, num_heads: int, mask: jax.Array | None = None
) -> jax.Array:
    """Where the mask `(length, length)` is false, a position (row) does not look."""
    rows, length, width = x.shape
    joint = affine(layer["in"], x)
    shape = rows, length, 3, num_heads, width // num_heads
    query, key, value = jnp.moveaxis(joint.reshape(shape), 2, 0)
    scores = jnp.einsum("bthk,bshk->bhts", query, key) * shape[-1] ** -0.5
    if mask is not None:
        scores = jnp.where(mask[None, None], scores, -jnp.inf)
    mixed = jnp.einsum("bhts,bshk->bthk", jax.nn.softmax(scores), value)
    return affine(layer["out"], mixed.reshape(rows, length, width))


def normalised(layer: Any, x: jax.Array) -> jax.Array:
    x = x - jnp.mean(x, -1, keepdims=True)
    x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + 1e-5)
    return x * layer["scale"] + layer["shift"]


def affine(layer: Any, x: jax.Array) -> jax.Array:
    return x @ layer["w"] + layer["b"]


def digits(num_classes: int, widths: tuple[int, ...] = (64, 64)) -> Classifier:
    """A tanh network on the digits below `num_classes`, 8 x 8 pixels in [0, 1]."""
    images, labels = load_digits(return_X_y=True)
    kept = labels < num_classes
    batch = jnp.asarray(images[kept] / 16.0), jnp.asarray(labels[kept])
    params = dense_layers(jax.random.key(3), (64, *widths, num_classes))
    name = "digits " + "-".join(str(w) for w in (64, *widths, num_classes))
    apply_fn = functools.partial(apply_dense, jnp.tanh)
    return Classifier(name, apply_fn, params, batch, num_classes)


def dense_layers(key: jax.Array, sizes: tuple[int, ...]) -> list:
    keys = jax.random.split(key, len(sizes) - 1)
    shapes = itertools.pairwise(sizes)
    return [dense(key, shape) for key, shape in zip(keys, shapes, strict=True)]


def apply_dense(activation: Callable, params: list, x: jax.Array) -> jax.Array:
    for layer in params[:-1]:
        x = activation(affine(layer, x))
    return affine(params[-1], x)


def dense(key: jax.Array, shape: tuple[int, ...]) -> dict:
    fan_in = 1
    for size in shape[:-1]:
        fan_in *= size
    return {
        "w": jax.random.normal(key, shape) * fan_in**-0.5,
        "b": jnp.zeros(shape[-1]),
    }


def trained(model: Classifier, num_steps: int, learning_rate: float) -> Classifier:
    """The same model after some steps of Adam on its own batch."""
    loss = ff.negative_log_likelihood(model.apply_fn, CATEGORICAL)
    optimizer = optax.adam(learning_rate)

    @jax.jit
    def step(params: Any, state: Any, batch: tuple) -> tuple:
        updates, state = optimizer.update(jax.grad(loss)(params, batch), state)
        return optax.apply_updates(params, updates), state

    params, state = model.params, optimizer.init(model.params)
    for _ in range(num_steps):
        params, state = step(params, state, model.batch)
    return model._replace(params=params)


def confidence(model: Classifier) -> tuple[float, float]:
    """Accuracy, and the mean probability of the likeliest class."""
    inputs, targets = model.batch
    chances = jax.nn.softmax(jax.jit(model.apply_fn)(model.params, inputs))
    accuracy = jnp.mean(jnp.argmax(chances, -1) == targets)
    return float(accuracy), float(jnp.mean(jnp.max(chances, -1)))
