"""The mean loss: its value, gradient and Hessian, weights, types and checks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

import estimator_cases as cases
import fisherflow_jax as ff
from estimator_cases import NAMED, WEIGHTS

MODEL = lambda params, x: x @ params, ff.likelihoods.poisson()
POISSON = ff.negative_log_likelihood(*MODEL)
X = cases.draw(7, 2, seed=1)
COUNTS = np.array([0.0, 3, 1, 0, 2, 1, 5])
PARAMS = np.array([0.4, -0.7])


def poisson_terms():
    return -scipy.stats.poisson.logpmf(COUNTS, np.exp(X @ PARAMS))


def test_the_mean_over_examples():
    loss = jax.jit(POISSON)(PARAMS, (X, COUNTS))
    np.testing.assert_allclose(loss, poisson_terms().mean(), rtol=1e-12)


def test_the_weighted_mean():
    loss = jax.jit(POISSON)(PARAMS, (X, COUNTS, WEIGHTS))
    expected = WEIGHTS @ poisson_terms() / WEIGHTS.sum()
    np.testing.assert_allclose(loss, expected, rtol=1e-12)


def test_the_targets_of_one_example_are_summed():
    model = NAMED["tokens"]
    loss = ff.negative_log_likelihood(model.apply_fn, model.likelihood)
    logits = np.asarray(model.apply_fn(model.params, model.inputs))
    log_p = scipy.special.log_softmax(logits, axis=-1)
    picked = np.take_along_axis(log_p, model.targets[..., None], -1)[..., 0]
    found = jax.jit(loss)(model.params, model.batch)
    np.testing.assert_allclose(found, -picked.sum(1).mean(), rtol=1e-12)


@pytest.mark.parametrize("name", ["tokens", "location_scale", "poisson"])
def test_the_gradient_is_minus_the_mean_score(name):
    model = NAMED[name]
    loss = ff.negative_log_likelihood(model.apply_fn, model.likelihood)
    gradient = jax.jit(jax.grad(loss))(model.params, (*model.batch, WEIGHTS))
    flat = np.concatenate([np.ravel(x) for x in jax.tree.leaves(gradient)])
    expected = -WEIGHTS @ cases.scores(model.name) / WEIGHTS.sum()
    np.testing.assert_allclose(flat, expected, rtol=1e-9, atol=1e-12)


def test_the_hessian_is_the_mean_information_of_a_canonical_model():
    hessian = jax.jit(jax.hessian(POISSON))(PARAMS, (X, COUNTS, WEIGHTS))
    estimator = ff.estimators.exact(
        lambda params, x: x @ params, ff.likelihoods.poisson(), ff.structures.full()
    )
    information = jax.jit(estimator)(PARAMS, (X, None, WEIGHTS))
    np.testing.assert_allclose(hessian, information.rows / WEIGHTS.sum(), rtol=1e-10)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_rows_of_weight_zero_may_hold_anything(bad):
    x, y = X.copy(), COUNTS.copy()
    x[WEIGHTS == 0], y[WEIGHTS == 0] = bad, bad
    both = jax.jit(jax.value_and_grad(POISSON))
    value, gradient = both(PARAMS, (x, y, WEIGHTS))
    expected_value, expected_gradient = both(PARAMS, (X, COUNTS, WEIGHTS))
    np.testing.assert_allclose(value, expected_value, rtol=1e-12)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-12)


def test_bfloat16_outputs_are_summed_in_float32():
    params, x = jnp.asarray(PARAMS, jnp.bfloat16), jnp.asarray(X, jnp.bfloat16)
    loss, gradient = jax.jit(jax.value_and_grad(POISSON))(params, (x, COUNTS))
    assert loss.dtype == jnp.float32
    assert gradient.dtype == jnp.bfloat16
    np.testing.assert_allclose(loss, poisson_terms().mean(), rtol=0.03)


def test_integer_targets_are_taken_as_they_are():
    exact = jax.jit(POISSON)(PARAMS, (X, COUNTS.astype(np.int32)))
    np.testing.assert_allclose(exact, poisson_terms().mean(), rtol=1e-12)


def test_what_does_not_fit_is_explained():
    with pytest.raises(ValueError, match="needs targets; the batch's are None"):
        POISSON(PARAMS, (X, None))
    with pytest.raises(ValueError, match=r"drop it \(targets\[\.\.\., 0\]\)"):
        POISSON(PARAMS, (X, COUNTS[:, None]))
    with pytest.raises(ValueError, match="must agree in their leading axis"):
        POISSON(PARAMS, (X, COUNTS[:3]))


SCORED = {
    "poisson": (lambda p, x: jnp.tanh(x @ p["w"]) @ p["v"], ff.likelihoods.poisson()),
    "classes": (lambda p, x: x @ p["w"] * p["v"], ff.likelihoods.categorical()),
}


@pytest.mark.parametrize("name", SCORED)
def test_scores_are_the_weighted_rows_of_the_jacobian(name):
    apply_fn, likelihood = SCORED[name]
    rng = np.random.default_rng(3)
    params = {"w": rng.normal(size=(4, 3)), "v": rng.normal(size=3)}
    x, y = rng.normal(size=(5, 4)), np.array([0, 2, 1, 1, 0])
    weights = np.array([1.0, 0.5, 0.0, 3.0, 1.0])

    def log_probs(params):
        return likelihood.log_prob(apply_fn(params, x), y).reshape((5, -1)).sum(1)

    expected = jax.tree.map(np.asarray, jax.jit(jax.jacrev(log_probs))(params))
    for batch, factor in (((x, y), np.ones(5)), ((x, y, weights), weights)):
        found = ff.scores(apply_fn, likelihood, params, batch)
        for key, leaf in expected.items():
            scaled = factor.reshape((-1,) + (1,) * (leaf.ndim - 1)) * leaf
            np.testing.assert_allclose(found[key], scaled, rtol=1e-10, atol=1e-12)
        again = jax.jit(lambda p, b: ff.scores(apply_fn, likelihood, p, b))
        same = again(params, batch)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b), same, found)
    blank = x.copy()
    blank[2] = np.nan
    spoilt = ff.scores(apply_fn, likelihood, params, (blank, y, weights))
    assert all(np.all(leaf[2] == 0) for leaf in jax.tree.leaves(spoilt))


def test_scores_sum_to_the_score_of_the_batch_and_square_to_the_empirical_fisher():
    found = ff.scores(*MODEL, PARAMS, (X, COUNTS, WEIGHTS))
    gradient = jax.jit(jax.grad(POISSON))(PARAMS, (X, COUNTS, WEIGHTS))
    total = np.asarray(gradient) * -WEIGHTS.sum()
    np.testing.assert_allclose(np.sum(found, 0), total, rtol=1e-10)
    estimator = ff.estimators.empirical(*MODEL, ff.structures.full())
    plain = np.asarray(ff.scores(*MODEL, PARAMS, (X, COUNTS)))
    information = estimator(PARAMS, (X, COUNTS))
    np.testing.assert_allclose(plain.T @ plain, information.rows, rtol=1e-10)


def test_scores_of_what_has_none():
    with pytest.raises(ValueError, match="scores need targets"):
        ff.scores(*MODEL, PARAMS, (X, None))
    centred = (lambda p, x: (x - x.mean(0)) @ p, MODEL[1])
    with pytest.raises(ValueError, match=r"interact \(reduce_sum over the examples\)"):
        ff.scores(*centred, PARAMS, (X, COUNTS))
