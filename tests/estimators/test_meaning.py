"""What the information means: divergence, gradients, and labels of the model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fisherflow_jax as ff

# the references are written as numpy would
pytestmark = pytest.mark.standard_promotion

GENERATOR = np.random.default_rng(3)
X = GENERATOR.normal(size=(5, 3))
PARAMS = GENERATOR.normal(size=(3, 4)) / 2
CATEGORICAL = ff.likelihoods.categorical()
POISSON = ff.likelihoods.poisson()


def logits(params, x):
    return jnp.tanh(x @ params) * 2.0


def rates(params, x):
    return (x @ params)[:, 0]


def categorical_divergence(new, old):
    return jnp.sum(
        jax.nn.softmax(old) * (jax.nn.log_softmax(old) - jax.nn.log_softmax(new))
    )


def poisson_divergence(new, old):
    return jnp.sum(jnp.exp(old) * (old - new) - jnp.exp(old) + jnp.exp(new))


MODELS = {
    "categorical": (logits, CATEGORICAL, categorical_divergence),
    "poisson": (rates, POISSON, poisson_divergence),
}


@pytest.mark.parametrize("name", MODELS)
def test_half_the_quadratic_form_is_the_divergence_of_a_small_step(name):
    apply_fn, likelihood, divergence = MODELS[name]
    estimator = ff.estimators.exact(apply_fn, likelihood, ff.structures.full())

    @jax.jit
    def ratios(params, directions):
        information = estimator(params, (X, None))

        def ratio(direction):
            step = 1e-2 * direction / jnp.linalg.norm(direction)
            exact = [
                divergence(apply_fn(params + sign * step, X), apply_fn(params, X))
                for sign in (1, -1)  # the third order cancels
            ]
            return sum(exact) / ff.information.quadratic_form(information, step)

        return jax.vmap(ratio)(directions)

    directions = GENERATOR.normal(size=(8, *PARAMS.shape))
    np.testing.assert_allclose(ratios(PARAMS, directions), 1.0, atol=1e-3)


def test_the_observed_information_is_the_slope_of_the_gradient():
    labels = np.array([0, 3, 1, 2, 2])
    estimator = ff.estimators.observed(logits, CATEGORICAL, ff.structures.full())
    score = jax.grad(
        lambda p: -jnp.sum(CATEGORICAL.log_prob(logits(p, X), jnp.asarray(labels)))
    )
    step = 1e-5 * GENERATOR.normal(size=PARAMS.shape)
    change = (score(PARAMS + step) - score(PARAMS - step)) / 2
    information = jax.jit(estimator)(PARAMS, (X, labels))
    found = ff.information.matvec(information, jnp.asarray(step))
    np.testing.assert_allclose(found, change, rtol=1e-5, atol=1e-12)


def test_squared_scores_averaged_over_all_labels_are_the_information():
    # the empirical Fisher is the Fisher only where labels are the model's own
    structure = ff.structures.full()
    empirical = jax.jit(ff.estimators.empirical(logits, CATEGORICAL, structure))
    exact = jax.jit(ff.estimators.exact(logits, CATEGORICAL, structure))
    probabilities = np.asarray(jax.nn.softmax(logits(PARAMS, X)))
    total = 0.0
    for label in range(4):
        batch = X, np.full(5, label), probabilities[:, label]
        total = total + ff.information.to_dense(empirical(PARAMS, batch))
    expected = ff.information.to_dense(exact(PARAMS, (X, None)))
    np.testing.assert_allclose(total, expected, rtol=1e-10, atol=1e-12)
    given = X, np.argmax(probabilities, -1), np.ones(5)
    fitted = np.trace(ff.information.to_dense(empirical(PARAMS, given)))
    assert fitted < 0.5 * np.trace(expected)


@pytest.mark.slow
def test_the_error_of_drawn_labels_falls_as_the_root_of_their_number():
    numbers = [1, 6, 36]
    exact = ff.estimators.exact(logits, CATEGORICAL, ff.structures.diagonal())
    expected = jax.jit(exact)(PARAMS, (X, None)).entries
    keys = jax.random.split(jax.random.key(0), 300)
    errors = []
    for number in numbers:
        estimator = ff.estimators.monte_carlo(
            logits, CATEGORICAL, ff.structures.diagonal(), num_samples=number
        )
        run = jax.jit(jax.vmap(lambda k, e=estimator: e(PARAMS, (X, None), k).entries))
        errors.append(np.sqrt(np.mean(np.square(run(keys) - expected))))
    slope = np.polyfit(np.log(numbers), np.log(errors), 1)[0]
    assert abs(slope + 0.5) < 0.1


@pytest.mark.slow
def test_settings_and_arguments_stay_as_they_were():
    params, batch = PARAMS.copy(), (X.copy(), None)
    settings = dict(jax.config.values)
    information = ff.estimators.exact(logits, CATEGORICAL, ff.structures.low_rank(20))(
        params, batch
    )
    state = ff.posterior(params, information, prior_precision=1.0)
    ff.sample(state, jax.random.key(0))
    ff.predict(state, logits, CATEGORICAL, X)
    assert dict(jax.config.values) == settings
    np.testing.assert_array_equal(params, PARAMS)
    np.testing.assert_array_equal(batch[0], X)
