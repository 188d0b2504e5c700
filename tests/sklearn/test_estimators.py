"""Against scikit-learn, closed forms, the flow itself, and simulation."""

import importlib
import pickle
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from flax import linen, nnx
from scipy import stats
from sklearn import linear_model
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import fisherflow_jax as ff
from fisherflow_jax.sklearn import (
    FisherFlowClassifier,
    FisherFlowPoisson,
    FisherFlowRegressor,
)

COMPILED = []


def _listen(event, seconds, **_):
    if event == "/jax/core/compile/backend_compile_duration":
        COMPILED.append(seconds)


jax.monitoring.register_event_duration_secs_listener(_listen)

RNG = np.random.default_rng(0)
N, D = 96, 3
X = RNG.normal(size=(N, D)) * [1.0, 10.0, 0.1] + [0.0, 50.0, -2.0]
Z = (X - X.mean(0)) / X.std(0)
ETA = Z @ [1.0, -0.5, 0.2]
WEIGHTS = RNG.integers(0, 4, N)
TARGETS = {
    FisherFlowRegressor: 100 + 5 * ETA + RNG.normal(size=N),
    FisherFlowPoisson: RNG.poisson(np.exp(1 + 0.5 * ETA)),
    FisherFlowClassifier: np.where(ETA + RNG.logistic(size=N) > 0, "yes", "no"),
}
SPECIES = np.array(["a", "b", "c"])[np.digitize(ETA + RNG.logistic(size=N), [-1, 1])]
ALL = pytest.mark.parametrize("kind", TARGETS)
FLAT = {"coef": 2.0, "intercept": 1e-8}


def on_columns(model, loc, scale):
    """The coefficients of a model of standardised columns, on the original ones."""
    coef = model.coef_ / scale
    return coef, model.intercept_ - coef @ loc


PEERS = {
    FisherFlowRegressor: linear_model.Ridge(alpha=2.0),
    FisherFlowPoisson: linear_model.PoissonRegressor(
        alpha=2.0 / WEIGHTS.sum(), tol=1e-10, max_iter=1000
    ),
    FisherFlowClassifier: linear_model.LogisticRegression(
        C=0.5, tol=1e-10, max_iter=1000
    ),
}


@pytest.mark.slow_cases
@ALL
def test_fit_is_scikit_learns_on_weighted_standardised_columns(kind):
    y = TARGETS[kind]
    ours = kind(prior_precision=FLAT).fit(X, y, WEIGHTS)
    loc = np.average(X, axis=0, weights=WEIGHTS)
    scale = np.sqrt(np.average((X - loc) ** 2, axis=0, weights=WEIGHTS))
    np.testing.assert_allclose(ours.mean_, loc)
    np.testing.assert_allclose(ours.scale_, scale)
    theirs = clone(PEERS[kind]).fit((X - loc) / scale, y, WEIGHTS)
    coef, intercept = on_columns(theirs, loc, scale)
    np.testing.assert_allclose(ours.coef_, coef, rtol=1e-5)
    np.testing.assert_allclose(ours.intercept_, intercept, rtol=1e-5)
    score = theirs.score((X - loc) / scale, y, WEIGHTS)
    # which averages probabilities: a row may change sides
    close = 0.02 if kind is FisherFlowClassifier else 1e-6
    np.testing.assert_allclose(ours.score(X, y, WEIGHTS), score, atol=close)


@pytest.mark.slow
def test_three_classes_are_scikit_learns():
    ours = FisherFlowClassifier(prior_precision=FLAT).fit(X, SPECIES)
    theirs = linear_model.LogisticRegression(C=0.5, tol=1e-10, max_iter=1000)
    theirs.fit(Z, SPECIES)
    coef, intercept = on_columns(theirs, X.mean(0), X.std(0))
    np.testing.assert_allclose(ours.coef_, coef, rtol=1e-5, atol=1e-7)
    # up to a constant of all classes, which scikit-learn leaves where it stopped
    differences = [x - x.mean() for x in (ours.intercept_, intercept)]
    np.testing.assert_allclose(*differences, rtol=1e-5)


@pytest.mark.slow_cases
@ALL
def test_partial_fit_is_the_flow_on_standardised_columns_bit_for_bit(kind):
    y, chunks = TARGETS[kind], np.split(np.arange(N), [64])
    estimator = kind(prior_precision=0.5, memory=ff.memories.exponential(0.9))
    classes = {"classes": ["no", "yes"]} if kind is FisherFlowClassifier else {}
    for rows in chunks:
        estimator.partial_fit(X[rows], y[rows], sample_weight=WEIGHTS[rows], **classes)
    likelihood = {
        FisherFlowRegressor: ff.likelihoods.gaussian(scale=None),
        FisherFlowPoisson: ff.likelihoods.poisson(),
        FisherFlowClassifier: ff.likelihoods.bernoulli(),
    }[kind]
    intercept = 1e-8 if kind is FisherFlowRegressor else 0.01
    flow = ff.fisher_flow(
        lambda params, x: x @ params["coef"] + params["intercept"],
        likelihood,
        memory=ff.memories.exponential(0.9),
        prior_precision={"coef": 0.5, "intercept": intercept},
    )
    if kind is FisherFlowClassifier:
        y = np.searchsorted(classes["classes"], y)
    first = X[chunks[0]], WEIGHTS[chunks[0]]
    loc = np.average(first[0], axis=0, weights=first[1])
    scale = np.sqrt(np.average((first[0] - loc) ** 2, axis=0, weights=first[1]))
    state = flow.init({"coef": jnp.zeros(D), "intercept": jnp.zeros(())})
    for rows in chunks:
        batch = (X[rows] - loc) / scale, y[rows], 1.0 * WEIGHTS[rows]
        state, _ = flow.update(state, jax.tree.map(jnp.asarray, batch))
    jax.tree.map(np.testing.assert_array_equal, estimator.state_, state)


@pytest.mark.slow_cases
@ALL
def test_it_computes_in_float64_and_is_pickled_so(kind):
    with jax.enable_x64(False):
        estimator = kind().fit(X.astype(np.float32), TARGETS[kind])
        before = estimator.predict(X), *estimator.predict_interval(X)
        again = pickle.loads(pickle.dumps(estimator))
        after = again.predict(X), *again.predict_interval(X)
        again.partial_fit(X, TARGETS[kind])
    for x, y in zip(before, after, strict=True):
        np.testing.assert_array_equal(x, y)
    assert again.state_.mean["coef"].dtype == jnp.float64
    assert again.state_.count == 2 * N
    assert str(again.flow_) == str(estimator.flow_)


# ---- summaries


def test_summary_is_ordinary_least_squares_on_the_original_columns():
    frame = pd.DataFrame(X + [0.0, 1e6, 0.0], columns=["a", "b", "c"])
    y = TARGETS[FisherFlowRegressor]
    table = FisherFlowRegressor(prior_precision=1e-9).fit(frame, y).summary(level=0.9)
    design = np.column_stack([frame - [0.0, 1e6, 0.0], np.ones(N)])
    inverse = np.linalg.inv(design.T @ design)
    coef = inverse @ design.T @ y
    dispersion = np.sum((y - design @ coef) ** 2) / (N - 4)
    # of the intercept with the second column as it is
    back = np.eye(4)
    back[3, 1] = -1e6
    error = np.sqrt(dispersion * np.diag(back @ inverse @ back.T))
    assert table.names == ["a", "b", "c", "intercept"]
    np.testing.assert_allclose(table.estimate, back @ coef, rtol=1e-6)
    np.testing.assert_allclose(table.standard_error, error, rtol=1e-6)
    reach = stats.t(N - 4).ppf(0.95) * error
    np.testing.assert_allclose(table.upper - table.lower, 2 * reach, rtol=1e-6)
    tail = 2 * stats.t(N - 4).sf(np.abs(table.estimate / error))
    np.testing.assert_allclose(table.p_value, tail, rtol=1e-4)


@pytest.mark.slow
def test_summary_of_three_classes_names_classes_and_columns():
    classifier = FisherFlowClassifier().fit(X, SPECIES)
    with pytest.warns(ff.DataWarning, match="prior"):
        table = classifier.summary()
    assert table.names[:3] == ["a: x0", "b: x0", "c: x0"]
    assert table.names[-1] == "c: intercept"
    coef = [*classifier.coef_.T.ravel(), *classifier.intercept_]
    np.testing.assert_allclose(table.estimate, coef, rtol=1e-10)


def test_robust_standard_errors_of_counts():
    y = TARGETS[FisherFlowPoisson]
    prior = {"coef": 1e-9, "intercept": 1e-9}
    table = FisherFlowPoisson(robust=True, prior_precision=prior).fit(X, y).summary()
    design = np.column_stack([X, np.ones(N)])
    rate = np.exp(design @ table.estimate)
    bread = np.linalg.inv(design.T @ (rate[:, None] * design))
    meat = design.T @ ((y - rate)[:, None] ** 2 * design)
    error = np.sqrt(np.diag(bread @ meat @ bread))
    np.testing.assert_allclose(table.standard_error, error, rtol=1e-6)


# ---- intervals of predictions


def test_intervals_of_targets_are_those_of_least_squares():
    y = TARGETS[FisherFlowRegressor]
    regressor = FisherFlowRegressor(prior_precision=1e-9).fit(X, y)
    design = np.column_stack([X, np.ones(N)])
    inverse = np.linalg.inv(design.T @ design)
    residual = y - design @ (inverse @ design.T @ y)
    leverage = np.einsum("ij,jk,ik->i", design, inverse, design)
    spread = np.sqrt(residual @ residual / (N - 4) * (1 + leverage))
    lower, upper = regressor.predict_interval(X, level=0.8)
    np.testing.assert_allclose(
        upper - lower, 2 * stats.t(N - 4).ppf(0.9) * spread, rtol=1e-6
    )
    np.testing.assert_allclose((lower + upper) / 2, regressor.predict(X))


@pytest.mark.slow
def test_intervals_of_counts_cover():
    """Of new counts, with few rows: without what is not known of the rates they miss.

    120 fits of 8 rows: the share's standard error, of fits that are independent, is
    below .01.
    """
    rng, inside, plain = np.random.default_rng(1), [], []
    estimator = FisherFlowPoisson(prior_precision=1e-3)
    columns = rng.normal(size=(8, 2))
    rates = np.exp(3 + columns @ [0.2, 0.2])
    for _ in range(120):
        estimator.fit(columns, rng.poisson(rates))
        lower, upper = estimator.predict_interval(columns, level=0.9)
        fresh = rng.poisson(rates, size=(10, 8))
        inside.append((lower <= fresh) & (fresh <= upper))
        found = stats.poisson(estimator.predict(columns)).ppf([[0.05], [0.95]])
        plain.append((found[0] <= fresh) & (fresh <= found[1]))
    assert 0.88 < np.mean(inside) < 0.95
    assert np.mean(plain) < 0.88


def test_intervals_of_probabilities():
    y = TARGETS[FisherFlowClassifier]
    for classifier, classes in (
        (FisherFlowClassifier().fit(X, y), 2),
        (FisherFlowClassifier().fit(X, SPECIES), 3),
    ):
        lower, upper = classifier.predict_interval(X)
        probabilities = classifier.predict_proba(X)
        assert probabilities.shape == lower.shape == (N, classes)
        np.testing.assert_allclose(probabilities.sum(1), 1)
        assert np.all((lower < probabilities) & (probabilities < upper))
        narrow = classifier.predict_interval(X, level=0.5)
        assert np.all((lower < narrow[0]) & (narrow[1] < upper))


# ---- at home in scikit-learn


def test_pipeline_and_grid_search_over_the_prior():
    pipeline = make_pipeline(StandardScaler(), FisherFlowRegressor())
    grid = {"fisherflowregressor__prior_precision": [1e-2, 1.0, 1e4]}
    y = TARGETS[FisherFlowRegressor]
    search = GridSearchCV(pipeline, grid, cv=3).fit(X, y)
    theirs = make_pipeline(StandardScaler(), StandardScaler(), linear_model.Ridge())
    peer = GridSearchCV(theirs, {"ridge__alpha": [1e-2, 1.0, 1e4]}, cv=3).fit(X, y)
    for key in ("mean_test_score", "rank_test_score"):
        np.testing.assert_allclose(search.cv_results_[key], peer.cv_results_[key])


@pytest.mark.slow
def test_clones_priors_and_lengths_share_what_is_compiled():
    y = TARGETS[FisherFlowRegressor]
    estimator = FisherFlowRegressor(memory=ff.memories.exponential(0.5)).fit(X, y)
    COMPILED.clear()
    clone(estimator).set_params(prior_precision=7.0).fit(X, y)
    estimator.fit(X[:70], y[:70])  # filled up to 128 rows, as all of them are
    assert COMPILED == []
    estimator.fit(X[:60], y[:60])
    assert COMPILED != []


# ---- models of one's own


class Dense(nnx.Module):
    def __init__(self):
        self.line = nnx.Linear(D, 1, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.line(x)


@pytest.mark.slow
def test_networks_of_each_kind_are_the_linear_model():
    y = TARGETS[FisherFlowRegressor]
    start = {"b": jnp.zeros(D), "a": jnp.zeros(())}
    cloudpickle = pytest.importorskip("cloudpickle")
    models = [
        linen.Dense(1),
        Dense(),
        (lambda params, x: x @ params["b"] + params["a"], start),
    ]
    linear = FisherFlowRegressor(prior_precision={"coef": 1e-8, "intercept": 1e-8})
    expected = linear.fit(X, y).predict(X)
    for model in models:
        estimator = FisherFlowRegressor(model, prior_precision=1e-8, random_state=0)
        found = clone(estimator).fit(X, y)
        np.testing.assert_allclose(found.predict(X), expected, rtol=1e-6)
        assert not hasattr(found, "coef_")
        assert len(found.summary().names) == D + 1
        again = pickle.loads(cloudpickle.dumps(found))  # lambdas, linen's initialisers
        np.testing.assert_array_equal(again.predict(X), found.predict(X))
        again.partial_fit(X, y)


@pytest.mark.slow
def test_two_classes_by_one_logit_or_two():
    y = TARGETS[FisherFlowClassifier]
    options = {"prior_precision": 0.1, "random_state": 0}
    one = FisherFlowClassifier(linen.Dense(1), **options).fit(X, y)
    # the difference of two weights, each of twice the precision
    two = FisherFlowClassifier(
        linen.Dense(2), **{**options, "prior_precision": 0.2}
    ).fit(X, y)
    np.testing.assert_allclose(one.predict_proba(X), two.predict_proba(X), atol=2e-3)


def test_a_models_outputs_are_checked():
    message = r"outputs for n=96 rows have shape \(96, 4\); .* \('n', 3\)"
    with pytest.raises(ValueError, match=message):
        FisherFlowClassifier(linen.Dense(4)).fit(X, SPECIES)
    with pytest.raises(TypeError, match="model is None"):
        FisherFlowRegressor("linear").fit(X, np.ones(N))


# ---- hard data


@pytest.mark.slow_cases
@ALL
def test_constant_columns_and_one_row(kind):
    y = TARGETS[kind]
    constant = np.column_stack([X, np.full(N, 0.1), np.full(N, 1e9)])
    plain, more = kind().fit(X, y), kind().fit(constant, y)
    np.testing.assert_allclose(more.scale_[-2:], 1)
    np.testing.assert_allclose(np.ravel(more.coef_)[-2:], 0, atol=1e-12)
    np.testing.assert_allclose(np.ravel(more.coef_)[:D], np.ravel(plain.coef_))
    if kind is not FisherFlowClassifier:
        one = kind().fit(X[:1], y[:1])
        np.testing.assert_allclose(one.predict(X[:1]), y[:1], rtol=0.2)


@pytest.mark.slow
def test_one_class_in_the_first_chunk():
    y = TARGETS[FisherFlowClassifier].copy()
    y[:10] = "no"
    with pytest.raises(ValueError, match="classes must be passed"):
        FisherFlowClassifier().partial_fit(X[:10], y[:10])
    classifier = FisherFlowClassifier()
    classifier.partial_fit(X[:10], y[:10], classes=["no", "yes"])
    assert set(classifier.predict(X[:10])) == {"no"}
    for rows in np.split(np.arange(10, 90), 8):
        classifier.partial_fit(X[rows], y[rows])
    share = np.mean(y[:90] == "yes")
    found = classifier.predict_proba(X)[:, 1].mean()
    np.testing.assert_allclose(found, share, atol=0.15)
    with pytest.raises(ValueError, match=r"not in classes=.*maybe"):
        classifier.partial_fit(X[:2], ["no", "maybe"])


def test_collinear_columns_of_great_scales_under_a_vague_prior():
    columns = np.column_stack([1e6 + 1e-2 * Z[:, 0], Z[:, 1], Z[:, 1], 1e-6 * Z[:, 2]])
    y = TARGETS[FisherFlowRegressor]
    regressor = FisherFlowRegressor(prior_precision=1e-8).fit(columns, y)
    plain = linear_model.LinearRegression().fit(Z, y)
    np.testing.assert_allclose(regressor.predict(columns), plain.predict(Z), rtol=1e-6)
    np.testing.assert_allclose(regressor.coef_[1], plain.coef_[1] / 2, rtol=1e-5)
    np.testing.assert_allclose(regressor.coef_[1], regressor.coef_[2], rtol=1e-6)


@ALL
def test_a_fit_that_is_refused_changes_nothing(kind):
    y = TARGETS[kind]
    estimator = kind().fit(X, y)
    before, expected = dict(vars(estimator)), estimator.predict(X)
    ones, no_weight = np.ones(N), np.zeros(N)
    for method in (estimator.fit, estimator.partial_fit):
        with pytest.raises(ValueError, match="NaN"):
            method(X * np.nan, y)
        with pytest.raises(ValueError, match="Negative values"):
            method(X, y, sample_weight=-ones)
        with pytest.raises(ValueError, match="at least one non-zero"):
            method(X, y, sample_weight=no_weight)
    with pytest.raises(ValueError, match="inconsistent numbers"):
        estimator.fit(X[:, :2], y[1:])
    assert vars(estimator) == before
    np.testing.assert_array_equal(estimator.predict(X), expected)


def test_a_first_chunk_that_is_refused_is_none():
    classifier = FisherFlowClassifier()
    with pytest.raises(ValueError, match="not in classes"):
        classifier.partial_fit(X, SPECIES, classes=["a", "b"])
    classifier.partial_fit(X, SPECIES, classes=["a", "b", "c"])
    before = dict(vars(classifier))
    with pytest.raises(ValueError, match="one class"):
        classifier.fit(X, np.full(N, "a"))
    assert vars(classifier) == before


def test_no_weight_at_all_is_refused_by_every_scikit_learn(monkeypatch):
    """Older ones say nothing of it."""
    name = "fisherflow_jax.sklearn._estimator._check_sample_weight"
    monkeypatch.setattr(name, lambda weights, *_, **__: weights)
    with pytest.raises(ValueError, match="at least one non-zero"):
        FisherFlowRegressor().fit(X, TARGETS[FisherFlowRegressor], np.zeros(N))


def test_a_structure_of_one_number():
    structure = ff.structures.scalar()
    y = TARGETS[FisherFlowRegressor]
    found = FisherFlowRegressor(structure=structure).fit(X, y).partial_fit(X, y)
    assert found.score(X, y) > 0.9


def test_a_search_that_does_not_end_says_so(monkeypatch):
    y = TARGETS[FisherFlowPoisson]
    estimator = FisherFlowPoisson(num_steps=2).fit(X, y)
    flow = estimator.flow_

    def unfinished(state, batch):
        counted = state.events._replace(searches_unfinished=jnp.ones((), jnp.int32))
        return state._replace(events=counted), None

    changed = flow._replace(update=unfinished)
    monkeypatch.setattr(estimator, "_flow", lambda prior: changed)
    with pytest.warns(ConvergenceWarning, match="num_steps=2"):
        estimator.partial_fit(X, y)


@pytest.mark.slow
def test_without_scikit_learn_the_extra_is_named(monkeypatch):
    for name in [x for x in sys.modules if x.startswith("fisherflow_jax.sklearn")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "sklearn.utils.validation", None)
    with pytest.raises(ImportError, match=r"fisherflow-jax\[sklearn\]"):
        importlib.import_module("fisherflow_jax.sklearn")
