"""Where Kronecker factors are exact, and what their correction keeps exactly."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fisherflow_jax as ff

EXACT = {"rtol": 1e-9, "atol": 1e-11}
GENERATOR = np.random.default_rng(2)
PARAMS = {"a": GENERATOR.normal(size=(3, 3)), "b": GENERATOR.normal(size=(3, 3))}
X = GENERATOR.normal(size=(6, 3))
LABELS = np.array([0, 1, 2, 2, 1, 0])
CATEGORICAL = ff.likelihoods.categorical()


def network(params, x):
    return jnp.tanh(x @ params["a"]) @ params["b"]


def tied(params, x):
    """Two kernels that are parts of one array."""
    both = params["both"]
    return jnp.tanh(x @ both[:3]) @ both[3:]


def kernel_blocks(matrix):
    return np.where(np.kron(np.eye(2), np.ones((9, 9))) > 0, matrix, 0.0)


@functools.cache
def matrices(estimator="exact"):
    """A compiled function of a batch -> K-FAC, and the exact information's blocks."""
    layers = ff.layers.find_layers(network, PARAMS, X)
    structures = ff.structures.kronecker(layers), ff.structures.full()
    factory = getattr(ff.estimators, estimator)
    pair = [factory(network, CATEGORICAL, structure) for structure in structures]

    @jax.jit
    def run(batch):
        return [ops.to_dense(e(PARAMS, batch), PARAMS) for e in pair]

    return run


ops = ff.information


@pytest.mark.parametrize("estimator", ["exact", "empirical"])
@pytest.mark.parametrize("copies", [1.0, 4.0])
def test_copies_of_one_example_are_exact(estimator, copies):
    weights = np.zeros(6)
    weights[2] = copies
    factored, whole = matrices(estimator)((X, LABELS, weights))
    np.testing.assert_allclose(factored, kernel_blocks(whole), **EXACT)
    one = matrices(estimator)((X, LABELS, np.where(weights > 0, 1.0, 0.0)))[0]
    np.testing.assert_allclose(factored, copies * one, **EXACT)


def test_copies_as_rows_are_copies_as_weights():
    rows = np.full(6, 2)
    weights = np.zeros(6)
    weights[2] = 6.0
    by_rows = matrices()((X[rows], LABELS[rows], np.ones(6)))[0]
    by_weight = matrices()((X, LABELS, weights))[0]
    np.testing.assert_allclose(by_rows, by_weight, **EXACT)


def test_many_examples_keep_the_trace_in_their_eigenbasis_alone():
    layers = ff.layers.find_layers(network, PARAMS, X)

    @jax.jit
    def run(batch):
        plain = ff.estimators.exact(
            network, CATEGORICAL, ff.structures.kronecker(layers)
        )(PARAMS, batch)
        structure = ff.structures.kronecker(layers, eigenvalue_correction=plain)
        corrected = ff.estimators.exact(network, CATEGORICAL, structure)(PARAMS, batch)
        return ops.to_dense(plain), ops.to_dense(corrected)

    batch = X, LABELS, np.ones(6)
    plain, corrected = run(batch)
    blocks = kernel_blocks(matrices()(batch)[1])
    np.testing.assert_allclose(np.trace(corrected), np.trace(blocks), rtol=1e-10)
    assert abs(np.trace(plain) / np.trace(blocks) - 1) > 1e-3
    errors = [np.linalg.norm(m - blocks) for m in (corrected, plain)]
    assert errors[0] < errors[1]


def test_an_array_that_holds_two_kernels_keeps_its_exact_diagonal():
    params = {"both": np.concatenate([PARAMS["a"], PARAMS["b"]])}
    layers = ff.layers.find_layers(tied, params, X)
    structures = ff.structures.kronecker(layers), ff.structures.diagonal()
    factored, diagonal = (
        ops.to_dense(
            jax.jit(ff.estimators.exact(tied, CATEGORICAL, structure))(
                params, (X, None)
            )
        )
        for structure in structures
    )
    assert "its slices are kernels of several products" in str(layers)
    np.testing.assert_allclose(np.diag(factored), np.diag(diagonal), **EXACT)
