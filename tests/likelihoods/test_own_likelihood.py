"""A likelihood of the user's own goes where those of the package go."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fisherflow_jax as ff
from fisherflow_jax import likelihoods


def geometric():
    """Failures before a success, by hand; also `negative_binomial(1.0)`."""

    def check(outputs, targets):
        if targets is not None and outputs.shape != targets.shape:
            raise ValueError(f"outputs {outputs.shape}, targets {targets.shape}")

    def root(outputs, probes, key=None):
        return jnp.exp(0.5 * jax.nn.log_sigmoid(outputs)) * probes

    def sample(key, outputs):
        number = jnp.log(jax.random.uniform(key, outputs.shape, outputs.dtype))
        return jnp.floor(-number / jax.nn.softplus(-outputs))

    return likelihoods.Likelihood(
        name="geometric",
        log_prob=lambda z, y: y * z - (y + 1) * jax.nn.softplus(z),
        mean=jnp.exp,
        variance=lambda z: jnp.exp(z) * (1 + jnp.exp(z)),
        sample=sample,
        root=root,
        probe_shape=tuple,
        line=likelihoods.widen,
        scale=likelihoods.LOG,
        support=lambda targets: targets >= 0,
        check=check,
        diagonal=True,
    )


GEOMETRIC = geometric()
RNG = np.random.default_rng(0)
X = RNG.normal(size=(12, 2))
Y = RNG.poisson(2.0, 12).astype(float)
PARAMS = {"w": np.array([[0.3], [-0.2]]), "b": np.array([0.1])}
BATCH, KEY = (X, Y), 0


def apply_fn(params, x):
    return (x @ params["w"] + params["b"][None])[:, 0]


LAYERS = ff.layers.find_layers(apply_fn, PARAMS, X)
DIAGONAL, KEPT = ff.structures.diagonal(), ff.memories.stationary()
STATE = ff.posterior(
    PARAMS, ff.structures.Scalar(jnp.asarray(20.0)), prior_precision=1.0
)
VAGUE = ff.posterior(
    PARAMS, ff.structures.Scalar(jnp.asarray(0.5)), prior_precision=1.0
)


def estimate(factory, likelihood):
    estimator = factory(apply_fn, likelihood, DIAGONAL)
    return estimator(PARAMS, BATCH, KEY)


def descend(optimizer, likelihood):
    loss = ff.negative_log_likelihood(apply_fn, likelihood)
    state, gradient = optimizer.init(PARAMS), jax.jit(jax.grad(loss))(PARAMS, BATCH)
    return optimizer.update(gradient, state, PARAMS, batch=BATCH, key=KEY)[0]


def flow(likelihood):
    build = ff.fisher_flow(
        apply_fn,
        likelihood,
        structure=ff.structures.full(),
        memory=ff.memories.stationary(),
    )
    state, _ = build.update(build.init(PARAMS, key=KEY), BATCH)
    return state.mean, state.information


def clipped(likelihood):
    clip = ff.clip_by_kl(apply_fn, likelihood, 0.01)
    return clip.update(PARAMS, clip.init(PARAMS), PARAMS, batch=BATCH, key=KEY)[0]


def observed_with_normal_errors(likelihood):
    normal = likelihood._replace(normal_errors=True)
    found = ff.predict(STATE, apply_fn, normal, X)
    return ff.predictions.observation_interval(found, normal)


ESTIMATORS = {
    "empirical": ff.estimators.empirical,
    "exact": ff.estimators.exact,
    "monte_carlo": ff.estimators.monte_carlo,
    "observed": ff.estimators.observed,
    "squared_gradient": ff.estimators.squared_gradient,
    "hutchinson": ff.estimators.hutchinson,
    "hutchinson_dg": ff.estimators.hutchinson_dg,
    "hutchinson_rank1": ff.estimators.hutchinson_rank1,
    "hutchinson_rankk": functools.partial(ff.estimators.hutchinson_rankk, k=1),
    "hutchinson_sqrt": ff.estimators.hutchinson_sqrt,
}
# what the functions that take a likelihood make of it
USES = {
    "fisher_flow": flow,
    "negative_log_likelihood": lambda own: jax.jit(
        ff.negative_log_likelihood(apply_fn, own)
    )(PARAMS, BATCH),
    "kfac": lambda own: descend(ff.kfac(0.1, apply_fn, own, LAYERS, key=KEY), own),
    "natural_gradient": lambda own: descend(
        ff.natural_gradient(
            0.1,
            ff.estimators.exact,
            apply_fn,
            own,
            structure=DIAGONAL,
            memory=KEPT,
            key=KEY,
        ),
        own,
    ),
    "clip_by_kl": clipped,
    "predict": lambda own: ff.predict(STATE, apply_fn, own, X),
    "weight_samples": lambda own: ff.predictions.weight_samples(
        STATE, apply_fn, own, X, KEY, 4
    ),
    "observation_interval": observed_with_normal_errors,
    "calibrate": lambda own: ff.calibrate(STATE, apply_fn, own, BATCH)[2:],
    "log_score": lambda own: ff.calibration.log_score(STATE, apply_fn, own, BATCH),
    "laplace": lambda own: (
        ff.laplace(apply_fn, own, PARAMS, [BATCH], key=KEY).state.information
    ),
    "maximize_marginal_likelihood": lambda own: (
        ff.calibration.maximize_marginal_likelihood(
            own, PARAMS, ff.structures.Scalar(jnp.asarray(20.0)), 0.0
        )
    ),
    "relative_error": lambda own: ff.diagnostics.relative_error(
        STATE.information, apply_fn, own, PARAMS, [BATCH], KEY
    ),
    "table": lambda own: [
        row[1:]
        for row in ff.diagnostics.table(
            {"own": STATE.information}, apply_fn, own, PARAMS, [BATCH], KEY
        ).rows
    ],
    "trace_ratio": lambda own: ff.diagnostics.trace_ratio(
        apply_fn, own, PARAMS, [BATCH], KEY
    ),
    "undetermined": lambda own: [
        direction.vector
        for direction in ff.diagnostics.undetermined(VAGUE, apply_fn, own, [BATCH])
    ],
    "scores": lambda own: ff.scores(apply_fn, own, PARAMS, BATCH),
    "root_columns": lambda own: jax.jit(
        functools.partial(likelihoods.root_columns, own)
    )(X[:, 0], jax.random.key(0)),
    "cholesky_root": lambda own: likelihoods.cholesky_root(own).probe_shape((4,)),
    "diagonal_root": lambda own: likelihoods.diagonal_root(own).probe_shape((4,)),
    "rank_root": lambda own: likelihoods.rank_root(own, 1).probe_shape((4,)),
} | {name: functools.partial(estimate, factory) for name, factory in ESTIMATORS.items()}
OF_CLASSES = {"top_tokens", "temperature_scaling"}
RECORDS = {"Problem", "Calibration", "Laplace", "bind"}


def test_every_function_that_takes_a_likelihood_is_here():
    rooms = ff, likelihoods, ff.estimators, ff.predictions, ff.calibration
    taking = set()
    for room in (*rooms, ff.diagnostics, ff.comparison, ff.transforms):
        for name in dir(room):  # those loaded on first use too
            value = getattr(room, name)
            if name.startswith("_") or not callable(value):
                continue
            try:
                parameters = inspect.signature(value).parameters
            except ValueError:  # without a signature
                continue
            if "likelihood" in parameters:
                taking.add(name)
    assert taking - RECORDS == set(USES) | OF_CLASSES


@pytest.mark.slow_cases
@pytest.mark.parametrize("name", USES)
def test_made_by_hand(name):
    """The same numbers as the package's own likelihood of these targets."""
    builtin = likelihoods.negative_binomial(1.0)._replace(sample=GEOMETRIC.sample)
    found, expected = (jax.tree.leaves(USES[name](one)) for one in (GEOMETRIC, builtin))
    for value, wanted in zip(found, expected, strict=True):
        np.testing.assert_allclose(value, wanted, rtol=1e-6, atol=1e-9)


@pytest.mark.slow_cases
@pytest.mark.parametrize("name", USES)
def test_from_its_log_probability(name):
    own = likelihoods.from_log_prob(
        GEOMETRIC.log_prob,
        GEOMETRIC.sample,
        mean=GEOMETRIC.mean,
        variance=GEOMETRIC.variance,
    )
    for value in jax.tree.leaves(USES[name](own)):
        assert np.all(np.isfinite(value))


def test_a_line_of_ones_own():
    """Nothing is known of it, and the numbers are the same."""
    own = GEOMETRIC._replace(line=lambda outputs: outputs)
    for link in (None, ff.predictions.output_samples(0, 8)):
        found, expected = (
            ff.predict(STATE, apply_fn, one, X, link=link) for one in (own, GEOMETRIC)
        )
        for value, wanted in zip(found, expected, strict=True):
            np.testing.assert_allclose(value, wanted, rtol=1e-8)


@pytest.mark.slow_cases
@pytest.mark.parametrize("root", ["diagonal_root", "rank_root"])
def test_bounds_of_sampled_scores_are_the_same_likelihood(root):
    own = likelihoods.from_log_prob(
        GEOMETRIC.log_prob, GEOMETRIC.sample, mean=GEOMETRIC.mean
    )._replace(variance=GEOMETRIC.variance)
    more = {"k": 1} if root == "rank_root" else {}
    bound = getattr(likelihoods, root)(own, **more)
    for name in ("predict", "calibrate", "weight_samples"):
        found, expected = (USES[name](one) for one in (bound, own))
        jax.tree.map(np.testing.assert_array_equal, found, expected)


CATEGORICAL = likelihoods.categorical()
ROOTS = {
    "cholesky": likelihoods.cholesky_root(CATEGORICAL),
    "diagonal": likelihoods.diagonal_root(CATEGORICAL),
    "rank": likelihoods.rank_root(CATEGORICAL, 1),
    "own": CATEGORICAL._replace(
        name="labels", cholesky=None, diagonal_bound=None, low_rank=None, call=""
    ),
}
LINKS = {
    "none": None,
    "probit": ff.predictions.probit(),
    "output_samples": ff.predictions.output_samples(0, 8),
    "laplace_bridge": ff.predictions.laplace_bridge(),
}


def logits(params, x):
    return x @ params


@functools.cache
def uses_of_classes(likelihood):
    table = np.random.default_rng(1).normal(size=(2, 3))
    state = ff.posterior(
        table, ff.structures.Scalar(jnp.asarray(9.0)), prior_precision=1
    )
    labels = np.argmax(X @ table, -1)
    labels[:2] = 1, 0  # not the likeliest
    scaled = ff.calibration.temperature_scaling(
        X @ table, labels, likelihood=likelihood
    )
    predictions = {
        name: ff.predict(state, logits, likelihood, X, link=link)
        for name, link in LINKS.items()
    }
    top = ff.predictions.top_tokens(state, logits, likelihood, X, 2)
    calibrated = ff.calibrate(state, logits, likelihood, (X, labels))
    return predictions, top, scaled, calibrated


@pytest.mark.slow
@pytest.mark.parametrize("root", ROOTS)
def test_classes_with_another_root_are_classes(root):
    *found, calibrated = uses_of_classes(ROOTS[root])
    *expected, of_classes = uses_of_classes(CATEGORICAL)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    jax.tree.map(np.testing.assert_array_equal, calibrated[2:], of_classes[2:])
    assert calibrated.likelihood == ROOTS[root]
