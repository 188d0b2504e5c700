"""Estimators called with options alone, and bound to a model by who has it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fisherflow_jax as ff
from fisherflow_jax.model import once

estimators = ff.estimators
FULL, DIAGONAL = ff.structures.full(), ff.structures.diagonal()
GAUSSIAN = ff.likelihoods.gaussian()
BATCH = jnp.array([[1.0, 2.0], [0.5, -1.0]]), jnp.array([3.0, 1.0])


def linear(params, x):
    return x @ params


CHOICES = {
    "exact()": estimators.exact(),
    "exact(root=diagonal_root)": estimators.exact(root=ff.likelihoods.diagonal_root),
    "monte_carlo(num_samples=3)": estimators.monte_carlo(num_samples=3),
    "empirical(groups=2)": estimators.empirical(groups=2),
    "observed(chunk_size=1)": estimators.observed(chunk_size=1),
    "squared_gradient()": estimators.squared_gradient(),
    "hutchinson(num_probes=8)": estimators.hutchinson(num_probes=8),
    "hutchinson(groups=None, probe=gaussian)": estimators.hutchinson(
        groups=None, probe=estimators.gaussian
    ),
    "hutchinson_dg(num_probes=2)": estimators.hutchinson_dg(num_probes=2),
    "hutchinson_rankk(k=1)": estimators.hutchinson_rank1(),
}


def test_choices_read_as_they_are_written_and_equal_ones_are_equal():
    for text, choice in CHOICES.items():
        assert repr(choice) == text
        again = choice.factory(**dict(choice.options))
        assert again == choice, text
        assert hash(again) == hash(choice), text
        assert [other == choice for other in CHOICES.values()].count(True) == 1, text
    assert estimators.hutchinson(num_probes=1) == estimators.hutchinson()
    with pytest.raises(TypeError, match="num_probe"):
        estimators.hutchinson(num_probe=3)


@pytest.mark.slow
def test_a_bound_choice_is_the_estimator_of_the_same_options():
    key = jax.random.key(0)
    for text, choice in CHOICES.items():
        if "rankk" in text:  # of categories
            continue
        bound = choice.bind(linear, GAUSSIAN, FULL)
        called = choice.factory(linear, GAUSSIAN, FULL, **dict(choice.options))
        assert bound == called, text
        assert hash(bound) == hash(called), text
        assert bound != choice.bind(linear, GAUSSIAN, DIAGONAL), text
        assert repr(bound) == f"{text} in full()"
        one, other = (e(jnp.ones(2), BATCH, key) for e in (bound, called))
        jax.tree.map(np.testing.assert_array_equal, one, other)


def own(apply_fn, likelihood, structure):
    return estimators.exact(apply_fn, likelihood, structure)


@pytest.mark.parametrize(
    "chosen",
    [
        estimators.exact,
        estimators.exact(),
        functools.partial(estimators.exact, chunk_size=None),
        own,
        estimators.exact(linear, GAUSSIAN, FULL),
    ],
    ids=["function", "choice", "partial", "own", "bound"],
)
@pytest.mark.parametrize("model", [linear, once(linear)], ids=["plain", "once"])
def test_all_ways_to_choose_bind_alike(chosen, model):
    bound = estimators.bind(chosen, model, GAUSSIAN, FULL)
    assert bound.name == "exact"
    assert bound.structure is FULL
    assert bound.bound[1] is model
    with_option = estimators.bind(estimators.exact, model, GAUSSIAN, FULL, chunk_size=2)
    assert repr(with_option) == "exact(chunk_size=2) in full()"


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ((lambda p, x: x @ p, GAUSSIAN, FULL), "another apply_fn, linear"),
        ((linear, ff.likelihoods.poisson(), FULL), "another likelihood"),
        ((linear, GAUSSIAN, DIAGONAL), "another structure"),
    ],
)
def test_an_estimator_of_another_model_is_refused_by_name(model, message):
    bound = estimators.hutchinson(linear, GAUSSIAN, FULL)
    with pytest.raises(ValueError, match=f"hutchinson is bound to {message}"):
        estimators.bind(bound, *model)


def test_what_is_no_estimator_is_refused():
    for wrong in ("exact", 3, lambda apply_fn, likelihood, structure: 4):
        with pytest.raises(ValueError, match="estimator is a choice such as"):
            estimators.bind(wrong, linear, GAUSSIAN, FULL)
    with pytest.raises(TypeError, match=r"such as ff\.likelihoods\.categorical\(\)"):
        estimators.exact(linear)
