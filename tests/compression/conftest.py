"""A small network, informations of it in each structure, and masks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fisherflow_jax as ff
from small_network import LIKELIHOOD, PRIOR, drawn, network


@pytest.fixture(scope="session")
def params():
    shapes = {"b": (4,), "c": (3,), "v": (4, 3), "w": (6, 4)}
    return {k: drawn(*s, seed=i) for i, (k, s) in enumerate(shapes.items())}


@pytest.fixture(scope="session")
def inputs():
    mixing = drawn(6, 6, seed=8) + 2 * jnp.eye(6)
    return drawn(50, 6, seed=9) @ mixing


@pytest.fixture(scope="session")
def layers(params, inputs):
    return ff.layers.find_layers(network, params, inputs[:1])


@pytest.fixture(scope="session")
def states(params, inputs, layers):
    structures = {
        "scalar": ff.structures.scalar(),
        "diagonal": ff.structures.diagonal(),
        "block": ff.structures.block(),
        "full": ff.structures.full(),
        "low_rank": ff.structures.low_rank(5),
        "kronecker": ff.structures.kronecker(layers),
    }
    made = {}
    for name, structure in structures.items():
        estimator = jax.jit(ff.estimators.exact(network, LIKELIHOOD, structure))
        information = estimator(params, (inputs, None))
        made[name] = ff.posterior(params, information, prior_precision=PRIOR)
    return made


@pytest.fixture(scope="session")
def kept(params):
    """Another mask in each column of the kernels."""
    flags = {k: np.asarray(drawn(*x.shape, seed=20)) > -0.2 for k, x in params.items()}
    return flags | {"b": np.ones(4, bool), "c": np.ones(3, bool)}
