"""Defects that were measured in other libraries of this kind, and are not here."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import multivariate_normal

import fisherflow_jax as ff
from together import together

ops = ff.information
CATEGORICAL, GAUSSIAN = ff.likelihoods.categorical(), ff.likelihoods.gaussian()
SIZE, COUNT = 3, 12
GENERATOR = np.random.default_rng(0)
X = GENERATOR.normal(size=(COUNT, SIZE))
Y = X @ np.array([1.0, -0.5, 0.3]) + GENERATOR.normal(size=COUNT)
PRIOR = 0.7
STRUCTURES = {
    "full": ff.structures.full(),
    "one block": ff.structures.block("all"),
    "low_rank": ff.structures.low_rank(SIZE),
    "low_rank of more than d": ff.structures.low_rank(SIZE + 4),
}
to_dense = jax.jit(ops.to_dense)
exact_structures = pytest.mark.parametrize("name", STRUCTURES)


def line(params, x):
    return x @ params


@functools.cache
def regression(name):
    """The posterior of a linear regression, exact in each of the structures."""
    estimator = ff.estimators.exact(line, GAUSSIAN, STRUCTURES[name])
    information = jax.jit(estimator)(np.zeros(SIZE), (X, Y))
    mean = np.linalg.solve(X.T @ X + PRIOR * np.eye(SIZE), X.T @ Y)
    return jnp.asarray(mean), information


# ---- scale: N against the size of a curvature batch


def test_forty_rows_of_four_hundred_count_ten_times():
    estimator = ff.estimators.exact(line, GAUSSIAN, ff.structures.full())
    optimizer = ff.scale_by_fisher(
        estimator, memory=ff.memories.exponential(0.5), damping=0.1
    )
    params = jnp.zeros(SIZE)
    state = optimizer.init(params)
    _, state = optimizer.update(params, state, params, batch=(X, Y))
    information = ff.get_information(state, num_observations=10 * COUNT)
    np.testing.assert_allclose(to_dense(information), 10 * X.T @ X, rtol=1e-10)


@exact_structures
def test_a_scale_multiplies_the_data_and_not_the_prior(name):
    mean, information = regression(name)
    scaled = ops.scale(information, 5.0)
    state = ff.posterior(mean, scaled, prior_precision=PRIOR)
    expected = 5 * X.T @ X + PRIOR * np.eye(SIZE)
    np.testing.assert_allclose(to_dense(state.information), expected, rtol=1e-10)


# ---- evidence


@exact_structures
def test_the_evidence_of_a_linear_regression_at_full_rank(name):
    mean, information = regression(name)
    log_likelihood = jnp.sum(GAUSSIAN.log_prob(X @ mean, jnp.asarray(Y)))
    found = ff.calibration.log_marginal_likelihood(
        mean, information, log_likelihood, PRIOR
    )
    covariance = X @ X.T / PRIOR + np.eye(COUNT)
    expected = multivariate_normal(np.zeros(COUNT), covariance).logpdf(Y)
    np.testing.assert_allclose(found, expected, rtol=1e-10)


def test_the_evidence_of_several_classes_is_a_number_that_depends_on_the_prior():
    params = jnp.asarray(GENERATOR.normal(size=(SIZE, 4)))
    labels = np.arange(COUNT) % 4
    estimator = ff.estimators.exact(line, CATEGORICAL, ff.structures.diagonal())
    information = estimator(params, (X, labels))
    log_likelihood = jnp.sum(CATEGORICAL.log_prob(X @ params, jnp.asarray(labels)))

    def evidence(prior):
        return ff.calibration.log_marginal_likelihood(
            params, information, log_likelihood, prior
        )

    both = jax.jit(jax.vmap(jax.value_and_grad(evidence)))
    values, slopes = both(jnp.array([1e-3, 1.0, 50]))
    assert np.all(np.isfinite(values)) and np.all(np.isfinite(slopes))
    assert slopes[0] > 0 > slopes[2]  # the best is within, not at the smallest


# ---- rank beyond the dimension, rank zero


@exact_structures
def test_rank_beyond_the_dimension_duplicates_nothing(name):
    mean, information = regression(name)
    dense = to_dense(information)
    np.testing.assert_allclose(dense, X.T @ X, rtol=1e-10)
    state = ff.posterior(mean, information, prior_precision=PRIOR)
    covariance = np.linalg.inv(X.T @ X + PRIOR * np.eye(SIZE))
    found = ff.standard_error(state)
    np.testing.assert_allclose(found, np.sqrt(np.diag(covariance)), rtol=1e-10)


def test_samples_of_low_rank_without_directions_are_those_of_its_diagonal():
    nothing = ff.structures.low_rank(2).isotropic(jnp.zeros(SIZE), 4.0)
    draw = jax.vmap(lambda key: ops.sample(nothing, key))
    samples = draw(jax.random.split(jax.random.key(0), 20_000))
    spread = np.sqrt(2 / 20_000) / 4
    assert np.max(np.abs(np.var(samples, axis=0) - 0.25)) < 5 * spread


# ---- what is not understood is an error

FACTORIES = [
    *(getattr(ff.structures, name) for name in ("scalar", "diagonal", "block", "full")),
    *(ff.structures.low_rank, ff.structures.kronecker),
    *(
        getattr(ff.estimators, name)
        for name in (
            "exact",
            "monte_carlo",
            "empirical",
            "observed",
            "squared_gradient",
            "hutchinson",
            "hutchinson_dg",
            "hutchinson_rankk",
            "hutchinson_rank1",
        )
    ),
    *(ff.fisher_flow, ff.posterior, ff.predict, ff.accumulate, ff.sample),
    *(ff.scale_by_fisher, ff.natural_gradient, ff.kfac, ff.adam, ff.calibrate),
]


@together
@pytest.mark.parametrize("factory", FACTORIES)
def test_an_unknown_option_is_an_error(factory):
    parameters = inspect.signature(factory).parameters.values()
    needed = [
        p
        for p in parameters
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    given = {p.name: None for p in needed if p.kind is p.KEYWORD_ONLY}
    values = {"apply_fn": line, "likelihood": CATEGORICAL, "rank": 2}
    values |= {"structure": ff.structures.diagonal(), "learning_rate": 0.1}
    values["layers"] = ff.layers.find_layers(line, np.zeros((SIZE, 4)), X)
    positional = [values.get(p.name) for p in needed if p.kind is not p.KEYWORD_ONLY]
    with pytest.raises(TypeError, match=r"maxiter"):
        factory(*positional, **given, maxiter=100)


# ---- classes end to end


@functools.cache
def classifier():
    params = jnp.asarray(GENERATOR.normal(size=(SIZE, 4)))
    estimator = ff.estimators.exact(line, CATEGORICAL, ff.structures.full())
    information = jax.jit(estimator)(params, (X, None))
    return ff.posterior(params, information, prior_precision=1.0)


LINKS = {
    "none": None,
    "probit": ff.predictions.probit(),
    "samples": ff.predictions.output_samples(0, 50),
    "bridge": ff.predictions.laplace_bridge(),
    "normalized bridge": ff.predictions.laplace_bridge(normalized=True),
}


@pytest.mark.slow_cases
@pytest.mark.parametrize("link", LINKS)
def test_every_link_predicts_classes_that_every_metric_takes(link):
    labels = np.arange(COUNT) % 4
    state = classifier()

    @jax.jit
    def predict(x):
        return ff.predict(state, line, CATEGORICAL, x, link=LINKS[link]).mean

    mean = predict(X)
    np.testing.assert_allclose(np.sum(mean, -1), 1.0, rtol=1e-9)
    # an input's probabilities are its own, whoever else is in the batch
    np.testing.assert_allclose(predict(X[3:4])[0], mean[3], rtol=1e-9)
    for metric in (
        ff.metrics.accuracy,
        ff.metrics.negative_log_likelihood,
        ff.metrics.brier,
        ff.metrics.expected_calibration_error,
        ff.metrics.maximum_calibration_error,
    ):
        value = metric(mean, labels)
        value = jax.tree.leaves(value)[0]
        assert np.isfinite(value) and value >= 0


def test_a_covariance_is_no_constant_of_a_compiled_prediction():
    size = 40
    mean = jnp.zeros(size)
    state = ff.posterior(mean, ff.structures.Full(jnp.eye(size)), prior_precision=1.0)
    inputs = jnp.ones((2, size))
    jaxpr = jax.make_jaxpr(lambda s, x: ff.predict(s, line, GAUSSIAN, x))(state, inputs)
    largest = max((np.size(c) for c in jaxpr.consts), default=0)
    assert largest < size**2


# ---- the Kalman filter: signs, and the exact Fisher


def test_a_first_datum_makes_a_filter_more_sure():
    flow = ff.fisher_flow(
        line,
        GAUSSIAN,
        structure=ff.structures.full(),
        memory=ff.memories.stationary(),
        prior_precision=PRIOR,
    )
    start = flow.init(jnp.zeros(SIZE))
    after, _ = flow.update(start, (X[:1], Y[:1]))
    gained = to_dense(after.information) - to_dense(start.information)
    np.testing.assert_allclose(gained, np.outer(X[0], X[0]), atol=1e-12)


def test_a_diagonal_filter_is_kalmans_in_one_dimension():
    x, y = X[:, :1], Y
    flow = ff.fisher_flow(
        line,
        GAUSSIAN,
        structure=ff.structures.diagonal(),
        memory=ff.memories.stationary(),
        prior_precision=PRIOR,
    )
    batches = x[:, None], y[:, None]
    state, _ = jax.lax.scan(flow.update, flow.init(jnp.zeros(1)), batches)
    precision = np.sum(x**2) + PRIOR
    np.testing.assert_allclose(state.mean, [np.sum(x[:, 0] * y) / precision])
    # squares of residuals, which are not the information, would give another
    np.testing.assert_allclose(ff.standard_error(state), [precision**-0.5])
