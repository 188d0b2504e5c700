"""Every metric also runs without implicit changes of dtype or rank."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest


@pytest.fixture(autouse=True)
def strict(strict_promotion):
    return strict_promotion


@pytest.fixture(scope="session")
def predicted():
    """Probabilities (60, 4), labels (60,) and a mask, as numpy arrays."""
    rng = np.random.default_rng(0)
    probabilities = rng.dirichlet(np.ones(4), 60)
    labels = rng.integers(0, 4, 60)
    return probabilities, labels, rng.random(60) < 0.7


@pytest.fixture(scope="session")
def padded(predicted):
    """The same, with padding that must not be read."""
    probabilities, labels, mask = predicted
    probabilities = np.where(mask[:, None], probabilities, np.nan)
    return jnp.asarray(probabilities), jnp.asarray(np.where(mask, labels, -1)), mask


@pytest.fixture(scope="session")
def compiled():
    """Compiles each metric once, and calls it so that nothing is concrete."""
    made = {}

    def call(metric, *arrays, **options):
        if metric not in made:
            made[metric] = jax.jit(metric)
        return made[metric](*arrays, **options)

    return call
