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
_HEADS = 4


class Problem(NamedTuple):
    """A model, its data, and how long it is trained."""

    name: str
    apply_fn: Callable
    likelihood: ff.likelihoods.Likelihood
    params: Any
    data: tuple[jax.Array, jax.Array]
    batch_size: int
    num_steps: int  # of methods without curvature
    seed: int = 0  # of the parameters, and of the order of the data

    @property
    def num_params(self) -> int:
        return sum(leaf.size for leaf in jax.tree.leaves(self.params))


def _key(number: int, seed: int) -> jax.Array:
    return jax.random.key(number + 10 * seed)


def _digits() -> tuple[jax.Array, jax.Array]:
    images, labels = load_digits(return_X_y=True)
    return jnp.asarray(images / 16, jnp.float32), jnp.asarray(labels)


def autoencoder(seed: int = 0) -> Problem:
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
        dense_layers(_key(0, seed), _AUTOENCODER),
        (images, images),
        512,
        2000,
        seed,
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


def cnn(seed: int = 0) -> Problem:
    """Two convolutions with pooling, two dense layers."""
    images, labels = _digits()
    keys = jax.random.split(_key(2, seed), 3)
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
        seed,
    )


def transformer(
    seed: int = 0,
    width: int = 32,
    depth: int = 2,
    batch_size: int = 128,
    rows: int | None = None,
) -> Problem:
    """Reads a digit row by row, and predicts each row from those above it."""
    images = _digits()[0][:rows].reshape(-1, 8, 8)
    above = jnp.pad(images[:, :-1], ((0, 0), (1, 0), (0, 0)))
    keys = iter(jax.random.split(_key(3, seed), 20))

    params = {
        "read": classifiers.dense(next(keys), (8, width)),
        "position": 0.1 * jax.random.normal(next(keys), (8, width)),
        "layers": [classifiers.block(keys, width) for _ in range(depth)],
        "norm": classifiers.norm(width),
        "head": classifiers.dense(next(keys), (width, 8)),
    }
    return Problem(
        f"transformer, depth {depth}, width {width}, on rows of digits",
        _apply_transformer,
        ff.likelihoods.bernoulli(),
        params,
        (above, images),
        batch_size,
        800,
        seed,
    )


def _apply_transformer(params: Any, rows: jax.Array) -> jax.Array:
    x = classifiers.affine(params["read"], rows) + params["position"][None]
    causal = jnp.tril(jnp.ones((8, 8), bool))
    for layer in params["layers"]:
        x = classifiers.through_block(layer, x, _HEADS, causal, jnp.tanh)
    return classifiers.affine(params["head"], classifiers.normalised(params["norm"], x))


PROBLEMS = autoencoder, mlp, cnn, transformer
