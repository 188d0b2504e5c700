"""Classifiers that learnt wrong labels are put right by one number, on right labels.

Digits, 300 to train on with every fifth label wrong, no weight decay; the scale of the
last layer's Kronecker posterior is found on 100 examples.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.datasets import load_digits

import fisherflow_jax as ff
from fisherflow_jax import metrics

CATEGORICAL = ff.likelihoods.categorical()
NUM_TRAIN, NUM_VALIDATION, NUM_TEST = 300, 100, 400
SEEDS = [0, 1]
pytestmark = [pytest.mark.slow, pytest.mark.standard_promotion]


@pytest.fixture(autouse=True)
def strict() -> None:
    """The optimiser is not written for strict promotion."""


def features(params: dict, images: jax.Array) -> jax.Array:
    return jnp.tanh(images @ params["hidden"]["w"] + params["hidden"]["b"])


def last_layer(params: dict, inputs: jax.Array) -> jax.Array:
    return inputs @ params["w"] + params["b"]


def apply_fn(params: dict, images: jax.Array) -> jax.Array:
    return last_layer(params["last"], features(params, images))


def mistaken(generator: np.random.Generator, labels: np.ndarray) -> np.ndarray:
    """A fifth of the labels, each replaced by another class."""
    wrong = generator.permutation(len(labels)) < len(labels) // 5
    others = (labels + generator.integers(1, 10, len(labels))) % 10
    return np.where(wrong, others, labels)


@functools.cache
def digits() -> tuple[np.ndarray, np.ndarray]:
    images, labels = load_digits(return_X_y=True)
    spread = images.std(0)
    return (images - images.mean(0)) / np.where(spread > 0, spread, 1), labels


@jax.jit
def train(params: dict, batch: tuple, key: jax.Array) -> dict:
    """Adam, 100 epochs in batches of 60: most of the wrong labels are learnt too."""
    loss = ff.negative_log_likelihood(apply_fn, CATEGORICAL)
    optimizer = optax.adam(1e-2)

    def step(carry: tuple, rows: jax.Array) -> tuple:
        params, state = carry
        part = jax.tree.map(lambda x: x[rows], batch)
        updates, state = optimizer.update(jax.grad(loss)(params, part), state)
        return (optax.apply_updates(params, updates), state), None

    keys = jax.random.split(key, 100)
    rows = jax.vmap(lambda key: jax.random.permutation(key, NUM_TRAIN))(keys)
    carry = params, optimizer.init(params)
    return jax.lax.scan(step, carry, rows.reshape(-1, 60))[0][0]


@functools.cache
def trained(seed: int) -> tuple[dict, list[tuple]]:
    """Parameters, and training, validation and test examples of right labels."""
    generator = np.random.default_rng(seed)
    images, labels = digits()
    order = generator.permutation(len(labels))
    ends = np.cumsum([NUM_TRAIN, NUM_VALIDATION, NUM_TEST])
    parts = np.split(order, ends)[:3]
    data = [(jnp.asarray(images[rows]), jnp.asarray(labels[rows])) for rows in parts]
    data[0] = data[0][0], jnp.asarray(mistaken(generator, labels[parts[0]]))
    params = {
        "hidden": {"w": generator.normal(size=(64, 50)) / 8, "b": np.zeros(50)},
        "last": {"w": generator.normal(size=(50, 10)) / 7, "b": np.zeros(10)},
    }
    params = jax.tree.map(jnp.asarray, params)
    return train(params, data[0], jax.random.key(seed)), data


def calibrated(seed: int, labels: jax.Array) -> tuple[ff.Calibration, jax.Array]:
    """By validation examples with these labels, and the test probabilities then."""
    params, data = trained(seed)
    inputs = [features(params, images) for images, _ in data]
    model = last_layer, CATEGORICAL
    found = ff.calibrate(posterior(seed), *model, (inputs[1], labels))
    return found, ff.predict(found.posterior, *model, inputs[2]).mean


@functools.cache
def posterior(seed: int) -> ff.Posterior:
    params, data = trained(seed)
    inputs = features(params, data[0][0])
    layers = ff.layers.find_layers(last_layer, params["last"], inputs)
    structure = ff.structures.kronecker(layers)
    information = ff.estimators.exact(last_layer, CATEGORICAL, structure)(
        params["last"], (inputs, data[0][1])
    )
    return ff.posterior(params["last"], information, prior_precision=1.0)


def scores(probabilities: jax.Array, labels: jax.Array) -> tuple[Any, ...]:
    return (
        metrics.accuracy(probabilities, labels),
        metrics.negative_log_likelihood(probabilities, labels),
        metrics.expected_calibration_error(probabilities, labels),
    )


@pytest.mark.parametrize("seed", SEEDS)
def test_right_validation_labels(seed):
    params, (_, validation, test) = trained(seed)
    bare = scores(jax.nn.softmax(apply_fn(params, test[0])), test[1])
    found, probabilities = calibrated(seed, validation[1])
    accuracy, nll, error = scores(probabilities, test[1])
    assert found.after < found.mean_only - 0.05
    assert nll < bare[1] - 0.08
    assert error < 0.75 * bare[2]
    assert abs(accuracy - bare[0]) < 0.02


def test_wrong_validation_labels():
    """The scale then suits labels as wrong as those, and right ones no more."""
    params, (_, validation, test) = trained(0)
    labels = jnp.asarray(mistaken(np.random.default_rng(2), np.asarray(validation[1])))
    right, probabilities = calibrated(0, validation[1])
    found, misled = calibrated(0, labels)
    assert found.scale > 2 * right.scale
    assert found.after < found.mean_only
    error = metrics.expected_calibration_error
    assert error(misled, test[1]) > 2 * error(probabilities, test[1])
