"""What the tests of intervals share."""

import jax.numpy as jnp
import pytest

import fisherflow_jax as ff


@pytest.fixture(scope="session")
def at_zero():
    """A state of so many parameters, before any data."""

    def state(size):
        return ff.posterior(jnp.zeros(size), ff.structures.full(), prior_precision=1.0)

    return state
