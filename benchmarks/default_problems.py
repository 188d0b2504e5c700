"""Eight small problems, as different as the models that people train.

Each is a model with a loss, some hundred rows and the size of its batches.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import classifiers
import jax
import jax.numpy as jnp
from classifiers import apply_dense, dense, dense_layers
from sklearn.datasets import load_digits

import fisherflow_jax as ff


class Problem(NamedTuple):
    """A model, its data, and how many rows a step sees."""

    name: str
    apply_fn: Callable
    likelihood: ff.likelihoods.Likelihood
    params: Any
    data: tuple[Any, jax.Array]
    batch_size: int


def _keys(seed: int, number: int = 8) -> list[jax.Array]:
    return list(jax.random.split(jax.random.key(seed), number))


def _digits(rows: int = 600) -> tuple[jax.Array, jax.Array]:
    images, labels = load_digits(return_X_y=True)
    return jnp.asarray(images[:rows] / 16, jnp.float32), jnp.asarray(labels[:rows])


def readme() -> Problem:
    """The model of README's section on K-FAC: a hidden layer and a gain."""
    keys = _keys(2)
    x = jax.random.normal(keys[2], (500, 3)).at[:, 0].set(1.0)

    def network(params: Any, x: jax.Array) -> jax.Array:
        hidden = jnp.tanh(x @ params["w"] + params["b"])
        return params["gain"] * (hidden @ params["head"])

    params = {
        "w": jax.random.normal(keys[0], (3, 16)),
        "b": jnp.zeros(16),
        "head": jax.random.normal(keys[1], (16,)) / 4,
        "gain": jnp.ones(()),
    }
    targets = (x[:, 1] * x[:, 2] > 0).astype(jnp.float32)
    likelihood = ff.likelihoods.bernoulli()
    return Problem("README's network", network, likelihood, params, (x, targets), 500)


def mlp() -> Problem:
    """A dense classifier of digits."""

    def apply_fn(params: Any, x: jax.Array) -> jax.Array:
        return apply_dense(jax.nn.relu, params, x)

    params = dense_layers(jax.random.key(3), (64, 48, 48, 10))
    return Problem("MLP", apply_fn, classifiers.CATEGORICAL, params, _digits(), 128)


def cnn() -> Problem:
    """Two convolutions with pooling, two dense layers."""
    images, labels = _digits()
    keys = _keys(4)
    params = {
        "conv1": dense(keys[0], (3, 3, 1, 6)),
        "conv2": dense(keys[1], (3, 3, 6, 12)),
        "dense": dense_layers(keys[2], (2 * 2 * 12, 24, 10)),
    }
    data = images.reshape(-1, 8, 8, 1), labels
    apply_fn = classifiers.apply_convolutions
    return Problem("CNN", apply_fn, classifiers.CATEGORICAL, params, data, 128)


def transformer() -> Problem:
    """Two plain blocks, without normalisation, on sequences of a Markov chain."""
    width, vocabulary, length, rows = 24, 12, 9, 256
    keys = iter(_keys(5, 16))
    chain = 2 * jax.random.normal(next(keys), (vocabulary, vocabulary))

    def follow(token: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        token = jax.random.categorical(key, chain[token])
        return token, token

    start = jax.random.randint(next(keys), (rows,), 0, vocabulary)
    later = jax.random.split(next(keys), length)
    tokens = jax.lax.scan(follow, start, later)[1]
    tokens = jnp.concatenate([start[None], tokens]).T

    def block() -> dict:
        return {
            "in": dense(next(keys), (width, 3 * width)),
            "out": dense(next(keys), (width, width)),
            "up": dense(next(keys), (width, 4 * width)),
            "down": dense(next(keys), (4 * width, width)),
        }

    params = {
        "embedding": jax.random.normal(next(keys), (vocabulary, width)),
        "position": jax.random.normal(next(keys), (length, width)),
        "blocks": [block(), block()],
        "head": dense(next(keys), (width, vocabulary)),
    }
    causal = jnp.tril(jnp.ones((length, length), bool))

    def apply_fn(params: Any, tokens: jax.Array) -> jax.Array:
        x = params["embedding"][tokens] + params["position"][None]
        for block in params["blocks"]:
            x = x + classifiers.attention(block, x, 3, causal)
            up = jax.nn.gelu(classifiers.affine(block["up"], x))
            x = x + classifiers.affine(block["down"], up)
        return classifiers.affine(params["head"], x)

    data = tokens[:, :-1], tokens[:, 1:]
    name, likelihood = "transformer", classifiers.CATEGORICAL
    return Problem(name, apply_fn, likelihood, params, data, 64)


def autoencoder() -> Problem:
    """Three layers down to a code of 6, three up; a cross-entropy a pixel."""
    images, _ = _digits()

    def apply_fn(params: list, x: jax.Array) -> jax.Array:
        down, up = params[:3], params[3:]
        return apply_dense(jnp.tanh, up, apply_dense(jnp.tanh, down, x))

    params = dense_layers(jax.random.key(6), (64, 48, 24, 6, 24, 48, 64))
    likelihood = ff.likelihoods.bernoulli()
    return Problem("autoencoder", apply_fn, likelihood, params, (images, images), 128)


def regression() -> Problem:
    """Linear, its inputs' covariance of condition 1e4."""
    keys = _keys(7)
    turn, _ = jnp.linalg.qr(jax.random.normal(keys[0], (20, 20)))
    scales = jnp.logspace(0, -2, 20)
    x = jax.random.normal(keys[1], (512, 20)) * scales @ turn.T
    truth = turn @ (jax.random.normal(keys[2], (20,)) / scales)
    y = x @ truth + 0.1 * jax.random.normal(keys[3], (512,))

    def apply_fn(params: Any, x: jax.Array) -> jax.Array:
        return x @ params["w"] + params["b"]

    params = {"w": jnp.zeros(20), "b": jnp.zeros(())}
    name, likelihood = "regression, 1e4", ff.likelihoods.gaussian()
    return Problem(name, apply_fn, likelihood, params, (x, y), 128)


def physics() -> Problem:
    """A boundary problem, u'' + u' = f, u(0) = u(1) = 0: its residuals are observed."""

    def apply_fn(params: Any, points: dict) -> jax.Array:
        def solution(x: jax.Array) -> jax.Array:
            hidden = x[..., None]
            for layer in params[:-1]:
                hidden = jnp.tanh(classifiers.affine(layer, hidden))
            return classifiers.affine(params[-1], hidden)[..., 0]

        def slope(x: jax.Array) -> jax.Array:
            return jax.jvp(solution, (x,), (jnp.ones_like(x),))[1]

        x = points["x"]
        first, second = jax.jvp(slope, (x,), (jnp.ones_like(x),))
        edges = jnp.array([0.0, 1.0]) + 0 * x[:, None]
        residual = second + first - points["force"]
        at_edges = 10 * jax.vmap(solution, 1, 1)(edges)
        return jnp.concatenate([residual[:, None], at_edges], 1)

    x = jnp.linspace(0, 1, 128)
    wave = 2 * jnp.pi
    force = wave * jnp.cos(wave * x) - wave**2 * jnp.sin(wave * x)
    params = dense_layers(jax.random.key(8), (1, 24, 24, 1))
    data = {"x": x, "force": force}, jnp.zeros((128, 3))
    name, likelihood = "physics-informed", ff.likelihoods.gaussian()
    return Problem(name, apply_fn, likelihood, params, data, 128)


def value() -> Problem:
    """Discounted costs of a noisy linear system, from where it starts."""
    keys = _keys(9)
    step = jnp.eye(6) + 0.1 * jax.random.normal(keys[0], (6, 6))
    step = 0.95 * step / jnp.max(jnp.abs(jnp.linalg.eigvals(step)))
    starts = 2 * jax.random.normal(keys[1], (600, 6))

    def follow(state: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        noise = 0.2 * jax.random.normal(key, state.shape)
        return state @ step.T + noise, jnp.minimum(jnp.sum(state**2, 1), 30)

    costs = jax.lax.scan(follow, starts, jax.random.split(keys[2], 30))[1]
    returns = -jnp.einsum("t,tn->n", 0.95 ** jnp.arange(30.0), costs) / 10

    def apply_fn(params: Any, x: jax.Array) -> jax.Array:
        return apply_dense(jnp.tanh, params, x)[:, 0]

    params = dense_layers(keys[3], (6, 32, 32, 1))
    name, likelihood = "value network", ff.likelihoods.gaussian()
    return Problem(name, apply_fn, likelihood, params, (starts, returns), 128)


PROBLEMS = readme, mlp, cnn, transformer, autoencoder, regression, physics, value
