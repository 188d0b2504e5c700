"""The classifier of the uncertainty benchmarks: digits, 64-50-10, at its optimum."""

import functools
import itertools
from typing import Any, NamedTuple

import classifiers
import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize
from jax.flatten_util import ravel_pytree
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import fisherflow_jax as ff

PRIOR_PRECISION = 1.0
NUM_CLASSES = 10
SIZES = (64, 50, NUM_CLASSES)
CATEGORICAL = ff.likelihoods.categorical()
apply_fn = functools.partial(classifiers.apply_dense, jnp.tanh)


class Data(NamedTuple):
    """Standardised images and labels, and images that are out of distribution."""

    train: tuple[np.ndarray, np.ndarray]
    test: tuple[np.ndarray, np.ndarray]
    outside: np.ndarray  # the test images with one permutation of their pixels


def digits() -> Data:
    """Handwritten digits, 8 x 8: 1437 to train on and 360 to test, stratified."""
    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(
        images, labels, test_size=0.2, random_state=0, stratify=labels
    )
    train, test, train_labels, test_labels = parts
    center, spread = train.mean(0), train.std(0)
    spread[spread == 0] = 1  # pixels that are always empty
    order = np.random.default_rng(0).permutation(images.shape[1])

    def standardised(rows: np.ndarray) -> np.ndarray:
        return (rows - center) / spread

    return Data(
        (standardised(train), train_labels),
        (standardised(test), test_labels),
        standardised(test)[:, order],
    )


def start(seed: int = 0, sizes: tuple[int, ...] = SIZES) -> list[dict]:
    """The parameters that training begins at, drawn by numpy."""
    generator = np.random.default_rng(seed)
    pairs = itertools.pairwise(sizes)
    return [
        {
            "w": generator.normal(size=shape) * shape[0] ** -0.5,
            "b": np.zeros(shape[1]),
        }
        for shape in pairs
    ]


def log_posterior(
    params: Any,
    batch: tuple,
    likelihood: ff.likelihoods.Likelihood = CATEGORICAL,
) -> jax.Array:
    """The log-likelihood of the batch and the prior's log-density, to a constant."""
    inputs, targets = batch
    squares = sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(params))
    log_likelihood = jnp.sum(likelihood.log_prob(apply_fn(params, inputs), targets))
    return log_likelihood - 0.5 * PRIOR_PRECISION * squares


def maximise(
    params: Any,
    batch: tuple,
    likelihood: ff.likelihoods.Likelihood = CATEGORICAL,
    max_steps: int = 2000,
) -> tuple[Any, float]:
    """The maximum a posteriori by L-BFGS in float64, and the gradient's size there.

    The whole data set at each step, so that nothing is drawn and a run is repeatable.
    """
    with jax.enable_x64(True):
        batch = jax.tree.map(jnp.asarray, batch)
        params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), params)
        flat, unravel = ravel_pytree(params)

        def fun(x: np.ndarray) -> tuple[float, np.ndarray]:
            value, gradient = _descent(unravel(jnp.asarray(x)), batch, likelihood)
            return float(value), np.asarray(ravel_pytree(gradient)[0])

        found = scipy.optimize.minimize(
            fun,
            np.asarray(flat),
            jac=True,
            method="L-BFGS-B",
            options={
                "maxiter": max_steps,
                "maxfun": 2 * max_steps,
                "ftol": 0,
                "gtol": 1e-7,
                "maxcor": 30,
            },
        )
        return unravel(jnp.asarray(found.x)), float(np.max(np.abs(found.jac)))


@functools.partial(jax.jit, static_argnums=2)
def _descent(params: Any, batch: tuple, likelihood: Any) -> tuple[jax.Array, Any]:
    return jax.value_and_grad(lambda p: -log_posterior(p, batch, likelihood))(params)
