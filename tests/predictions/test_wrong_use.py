"""Arguments that do not go together are refused, and the refusal names them."""

import jax.numpy as jnp
import pytest

import fisherflow_jax as ff
import prediction_cases as cases
from prediction_cases import MODELS

MODEL = MODELS["mlp"]
CATEGORICAL = ff.likelihoods.categorical()


@pytest.fixture
def posterior():
    return cases.state("mlp", "diagonal")


def predict(state, apply_fn=MODEL.apply_fn, likelihood=CATEGORICAL, **options):
    return ff.predict(state, apply_fn, likelihood, MODEL.inputs, **options)


def test_something_that_is_no_state(posterior):
    with pytest.raises(TypeError, match=r"has .mean and .information.*got predict"):
        predict(predict)

    class Plain:
        mean, information = posterior.mean, posterior.information

    with pytest.raises(TypeError, match=r"a state is a pytree.*got Plain"):
        predict(Plain())


def test_something_that_is_no_likelihood(posterior):
    with pytest.raises(
        TypeError, match=r"a call such as .*got ff.likelihoods.categorical itself"
    ):
        predict(posterior, likelihood=ff.likelihoods.categorical)


@pytest.mark.parametrize("structure", ["diagonal", "kronecker"])
def test_an_information_about_another_tree(structure):
    state = cases.state("mlp", structure)
    other = {**state.mean, "v": jnp.ones((4, 2))}
    with pytest.raises(ValueError, match="about another tree than the mean"):
        predict(state._replace(mean=other))


def test_a_posterior_of_some_parameters_with_the_whole_model():
    _, head = ff.only(MODEL.apply_fn, MODEL.params, lambda path: "v" in path)
    information = ff.structures.Scalar(jnp.ones(()))
    state = ff.posterior(head, information, prior_precision=1.0)
    with pytest.raises(TypeError) as caught:
        predict(state)
    assert any("the function that ff.only" in note for note in caught.value.__notes__)


def test_outputs_that_do_not_fit(posterior):
    def number(params, x):
        return MODEL.apply_fn(params, x)[:, 0]

    with pytest.raises(ValueError, match=r"logits of at least 1 class.*shape \(\)"):
        predict(posterior, number)
    with pytest.raises(ValueError, match="last axis of the outputs must be 2"):
        predict(posterior, likelihood=ff.likelihoods.gaussian_location_scale())
    with pytest.raises(ValueError, match="one array of outputs whose leading"):
        predict(posterior, lambda p, x: MODEL.apply_fn(p, x).sum(0))
    with pytest.raises(ValueError, match="one array of outputs whose leading"):
        predict(posterior, lambda p, x: (MODEL.apply_fn(p, x), x))


def test_something_that_is_no_link(posterior):
    with pytest.raises(TypeError, match=r"a link is a function.*got 'probit'"):
        predict(posterior, link="probit")
    with pytest.raises(TypeError, match=r"returns ff.predictions.Averaged.*; got"):
        predict(posterior, link=lambda given, _: given.mean)
    with pytest.raises(ValueError, match=r"targets, \(5, 3\); got \(5,\)"):
        predict(
            posterior,
            link=lambda given, _: ff.predictions.Averaged(given.mean[:, 0]),
        )
