"""Linearised outputs against `J Cov J^T` by the whole Jacobian, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fisherflow_jax as ff
import prediction_cases as cases
from prediction_cases import MODELS

CASES = [("mlp", s) for s in ("diagonal", "block", "low_rank", "kronecker", "eigen")]
CASES += [("conv", s) for s in ("diagonal", "kronecker")]
CASES += [("tokens", s) for s in ("diagonal", "eigen")]
CASES += [("linear", "kronecker")]


def outputs_of(name, posterior, **options):
    model = MODELS[name]
    return ff.predictions.linearized_outputs(
        posterior, model.apply_fn, model.inputs, **options
    )


@pytest.mark.slow_cases
@pytest.mark.parametrize(("name", "structure"), CASES)
def test_equals_the_explicit_jacobian(name, structure):
    posterior = cases.state(name, structure)
    found = outputs_of(name, posterior, covariance=True)
    expected = cases.explicit(name, posterior)
    model = MODELS[name]
    np.testing.assert_allclose(
        found.mean, model.apply_fn(model.params, model.inputs), rtol=1e-12
    )
    np.testing.assert_allclose(found.covariance, expected, rtol=1e-9, atol=1e-10)
    diagonal = np.diagonal(expected, axis1=-2, axis2=-1)
    np.testing.assert_allclose(found.variance, diagonal, rtol=1e-9)


def test_blocks_of_outputs_and_chunks_of_examples_do_not_matter(monkeypatch):
    posterior, model = cases.state("tokens", "diagonal"), MODELS["tokens"]
    expected = cases.explicit("tokens", posterior)

    def again(*arguments):  # not the model that was compiled
        return model.apply_fn(*arguments)

    # so little at once that one cotangent is pulled back after the other
    monkeypatch.setattr("fisherflow_jax.predictions._streaming._ENTRIES", 40)
    for options in ({"chunk_size": 2}, {"covariance": True}):
        found = ff.predictions.linearized_outputs(
            posterior, again, model.inputs, **options
        )
        diagonal = np.diagonal(expected, axis1=-2, axis2=-1)
        np.testing.assert_allclose(found.variance, diagonal, rtol=1e-9)
    np.testing.assert_allclose(found.covariance, expected, rtol=1e-9, atol=1e-10)


def test_robust_of_a_diagonal_is_the_sandwich(belief):
    posterior = cases.state("mlp", "diagonal")
    meat = jax.tree.map(lambda x: jnp.square(x) + 0.1, posterior.mean)
    robust = belief(posterior.mean, posterior.information, ff.structures.Diagonal(meat))
    bread = cases.covariance(posterior)
    middle = np.diag(np.concatenate([x.ravel() for x in jax.tree.leaves(meat)]))
    rows = cases.jacobian("mlp")
    expected = np.einsum("nid,de,nie->ni", rows, bread @ middle @ bread, rows)
    found = outputs_of("mlp", robust, robust=True)
    np.testing.assert_allclose(found.variance, expected, rtol=1e-10)


def test_dispersion_of_the_state_is_a_factor(belief):
    posterior = cases.state("mlp", "diagonal")
    expected = cases.explicit("mlp", posterior)
    state = belief(
        posterior.mean,
        posterior.information,
        dispersion=jnp.asarray(2.5),
        degrees_of_freedom=jnp.asarray(9.0),
    )
    found = outputs_of("mlp", state)
    variance = 2.5 * np.diagonal(expected, axis1=-2, axis2=-1)
    np.testing.assert_allclose(found.variance, variance, rtol=1e-10)


def test_a_kronecker_of_another_length_of_sequence():
    """The information is of sequences of three tokens, the prediction of two."""
    posterior, model = cases.state("tokens", "kronecker"), MODELS["tokens"]
    ids = model.inputs[:, :2]
    whole = cases.explicit("tokens", posterior)
    found = ff.predictions.linearized_outputs(posterior, model.apply_fn, ids)
    # causal: the third token does not reach the outputs of the first two
    variance = np.diagonal(whole, axis1=-2, axis2=-1)[:, :2]
    np.testing.assert_allclose(found.variance, variance, rtol=1e-9)


def test_outputs_of_one_number_an_example():
    posterior, model = cases.state("mlp", "full"), MODELS["mlp"]

    def first(params, x):
        return model.apply_fn(params, x)[:, 0]

    found = ff.predictions.linearized_outputs(
        posterior, first, model.inputs, covariance=True
    )
    expected = cases.explicit("mlp", posterior)[:, 0, 0]
    assert found.covariance.shape == (5, 1, 1)
    np.testing.assert_allclose(found.variance, expected, rtol=1e-10)
    np.testing.assert_allclose(found.covariance[:, 0, 0], expected, rtol=1e-10)


def test_bad_input():
    posterior, model = cases.state("mlp", "full"), MODELS["mlp"]
    arguments = posterior, model.apply_fn
    with pytest.raises(
        ValueError, match="chunk_size must be a positive whole number of examples; got"
    ):
        ff.predictions.linearized_outputs(*arguments, model.inputs, chunk_size=0)
    with pytest.raises(ValueError, match="must not be empty"):
        ff.predictions.linearized_outputs(*arguments, model.inputs[:0])
