"""The problems of the optimisers' benchmark, all on the 8 x 8 digits."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import classifiers
import jax
import jax.numpy as jnp
from classifiers import CATEGORICAL, apply_dense, dense_layers
from sklearn.datasets import load_digits

import fisherflow_jax as ff

_AUTOENCODER = (64, 128, 64, 32, 8, 32, 64, 128, 64)
_WIDTH, _HEADS = 32, 4


class Problem(NamedTuple):
    """A model, its data, and how long it is trained."""

    name: str
    apply_fn: Callable
    likelihood: ff.likelihoods.Likelihood
    params: Any
    data: tuple[jax.Array, jax.Array]
    batch_size: int
    num_steps: int  # of methods without curvature

    @property
    def num_params(self) -> int:
        return sum(leaf.size for leaf in jax.tree.leaves(self.params))


def _digits() -> tuple[jax.Array, jax.Array]:
    images, labels = load_digits(return_X_y=True)
    return jnp.asarray(images / 16, jnp.float32), jnp.asarray(labels)


def autoencoder() -> Problem:
    """Four layers down to a linear code of 8, four up; a cross-entropy a pixel."""
    images, _ = _digits()

    def apply_fn(params: list, x: jax.Array) -> jax.Array:
        half = len(params) // 2
        return apply_dense(
            jnp.tanh, params[half:], apply_dense(jnp.tanh, params[:half], x)
        )

    return Problem(
        "autoencoder " + "-".join(map(str, _AUTOENCODER)),
        apply_fn,
        ff.likelihoods.bernoulli(),
        dense_layers(jax.random.key(0), _AUTOENCODER),
        (images, images),
        512,
        2000,
    )


def mlp() -> Problem:
    sizes = (64, 128, 128, 10)
    return Problem(
        "MLP " + "-".join(map(str, sizes)),
        functools.partial(apply_dense, jnp.tanh),
        CATEGORICAL,
        dense_layers(jax.random.key(1), sizes),
        _digits(),
        256,
        800,
    )


def cnn() -> Problem:
    """Two convolutions with pooling, two dense layers."""
    images, labels = _digits()
    keys = jax.random.split(jax.random.key(2), 3)
    params = {
        "conv1": classifiers.dense(keys[0], (3, 3, 1, 8)),
        "conv2": classifiers.dense(keys[1], (3, 3, 8, 16)),
        "dense": dense_layers(keys[2], (2 * 2 * 16, 32, 10)),
    }
    return Problem(
        "CNN conv8-conv16-fc32-10",
        classifiers.apply_convolutions,
        CATEGORICAL,
        params,
        (images.reshape(-1, 8, 8, 1), labels),
        128,
        800,
    )


def transformer() -> Problem:
    """Reads a digit row by row, and predicts each row from those above it."""
    images, _ = _digits()
    rows = images.reshape(-1, 8, 8)
    above = jnp.pad(rows[:, :-1], ((0, 0), (1, 0), (0, 0)))
    keys = iter(jax.random.split(jax.random.key(3), 20))

    def norm() -> dict:
        return {"scale": jnp.ones(_WIDTH), "shift": jnp.zeros(_WIDTH)}

    def layer() -> dict:
        return {
            "norm1": norm(),
            "in": classifiers.dense(next(keys), (_WIDTH, 3 * _WIDTH)),
            "out": classifiers.dense(next(keys), (_WIDTH, _WIDTH)),
            "norm2": norm(),
            "up": classifiers.dense(next(keys), (_WIDTH, 4 * _WIDTH)),
            "down": classifiers.dense(next(keys), (4 * _WIDTH, _WIDTH)),
        }

    params = {
        "read": classifiers.dense(next(keys), (8, _WIDTH)),
        "position": 0.1 * jax.random.normal(next(keys), (8, _WIDTH)),
        "layers": [layer(), layer()],
        "norm": norm(),
        "head": classifiers.dense(next(keys), (_WIDTH, 8)),
    }
    return Problem(
        f"transformer, 2 layers of width {_WIDTH}, on rows of digits",
        _apply_transformer,
        ff.likelihoods.bernoulli(),
        params,
        (above, rows),
        128,
        800,
    )


def _apply_transformer(params: Any, rows: jax.Array) -> jax.Array:
    x = classifiers.affine(params["read"], rows) + params["position"][None]
    causal = jnp.tril(jnp.ones((8, 8), bool))
    for layer in params["layers"]:
        normalised = classifiers.normalised(layer["norm1"], x)
        x = x + classifiers.attention(layer, normalised, _HEADS, causal)
        normalised = classifiers.normalised(layer["norm2"], x)
        up = jnp.tanh(classifiers.affine(layer["up"], normalised))
        x = x + classifiers.affine(layer["down"], up)
    return classifiers.affine(params["head"], classifiers.normalised(params["norm"], x))


PROBLEMS = autoencoder, mlp, cnn, transformer
