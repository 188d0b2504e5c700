"""Our own structures hold the laws that others' are checked for."""

import functools

import jax
import numpy as np
import pytest

import fisherflow_jax as ff

PARAMS = {"b": np.zeros(2), "gain": np.zeros(()), "kernel": np.zeros((3, 2))}
TO_ITS_RANK = "a sum is recompressed to its rank"
FACTORS = "factors add, which is not the sum of the operators"

DENSE = {
    "scalar": ff.structures.scalar(),
    "diagonal": ff.structures.diagonal(),
    "units": ff.structures.block(),
    "groups": ff.structures.block({"b": "one", "gain": "two", "kernel": "one"}),
    "full": ff.structures.full(),
}


@pytest.mark.slow_cases
@pytest.mark.parametrize("name", DENSE)
def test_structures_of_matrices(name):
    # another partition has the operations of the units, in float32 too
    types = ["float64"] if name == "groups" else ["float64", "float32"]
    report = ff.testing.check_structure(DENSE[name], PARAMS, float_types=types)
    assert report.not_applicable == {}


@pytest.mark.slow
def test_low_rank():
    laws = ["sums over parts", "addition", "any order", "fuse"]
    skip = dict.fromkeys(laws, TO_ITS_RANK)
    report = ff.testing.check_structure(ff.structures.low_rank(3), PARAMS, skip=skip)
    assert "total" in report.checked
    # more directions than parameters lose nothing
    whole = ff.testing.check_structure(
        ff.structures.low_rank(20), PARAMS, float_types=["float64"], num_samples=100
    )
    assert {"addition", "any order", "fuse"} <= set(whole.checked)


def network(params, x):
    return params["gain"] * (x @ params["kernel"] + params["b"][None])


def layers():
    return ff.layers.find_layers(network, PARAMS, np.zeros((1, 3)))


def outer_products(params, key, count):
    """What an estimator gives to reduce: inputs and gradients of each example."""
    caught = []

    def catch(stack):
        caught.append(stack)
        return ff.structures.scalar().reduce(stack)

    inner = ff.structures.Structure(
        "catching", catch, ff.structures.scalar().isotropic, takes_outer_products=True
    )
    estimator = ff.estimators.monte_carlo(
        network, ff.likelihoods.gaussian(), inner, chunk_size=count
    )
    keys = jax.random.split(key, 2)
    params = jax.tree.map(lambda x: x + jax.numpy.ones((), x.dtype), params)
    inputs = jax.random.normal(keys[0], (count, 3), params["kernel"].dtype)
    with jax.disable_jit():  # what is caught in a program are no arrays
        estimator(params, (inputs, None), keys[1])
    (stack,) = caught
    return stack


@functools.cache
def past(float_type):
    with jax.enable_x64(float_type == "float64"):
        params = jax.tree.map(lambda x: np.asarray(x, float_type), PARAMS)
        structure = ff.structures.kronecker(layers())

        @jax.jit
        def reduced(params, key):
            return structure.reduce(outer_products(params, key, 8))

        return jax.tree.map(np.asarray, reduced(params, jax.random.key(9)))


@pytest.mark.slow
def test_kronecker():
    laws = ["addition", "a number to add"]
    report = ff.testing.check_structure(
        ff.structures.kronecker(layers()),
        PARAMS,
        draw=outer_products,
        skip={"addition": FACTORS, "its own part": "takes outer products alone"},
    )
    assert {"sums over parts", "any order", "sample", "total"} <= set(report.checked)
    assert laws[1] in report.checked


@pytest.mark.slow
@pytest.mark.parametrize("float_type", ["float64"])
def test_corrected_kronecker(float_type):
    structure = ff.structures.kronecker(
        layers(), eigenvalue_correction=past(float_type)
    )
    report = ff.testing.check_structure(
        structure,
        PARAMS,
        draw=outer_products,
        float_types=[float_type],
        skip={"its own part": "takes outer products alone"},
    )
    assert "addition" in report.checked  # in one basis matrices add
