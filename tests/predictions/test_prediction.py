"""Predictions against the explicit Jacobian, for every likelihood and structure."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats

import fisherflow_jax as ff
import structure_cases as cases
from fisherflow_jax import likelihoods
from structure_cases import COMPENSATED, STRUCTURES

MEAN = np.linspace(-1.0, 1.2, cases.SIZE)
ROWS = 7
INPUTS = np.random.default_rng(4).normal(size=(ROWS, 3))
CLOSE = {"rtol": 1e-8, "atol": 1e-12}


def three(params, x):
    """Three outputs an example, nonlinear in all the parameters."""
    first = jnp.sin(x @ params["kernel"] + params["deep"][1])
    second = x @ params["conv"].reshape(2, 3).T + params["deep"][0]
    mixed = first + second
    return jnp.concatenate([mixed, mixed[:, :1] * first[:, 1:]], 1)


def one(params, x):
    return three(params, x)[:, 0]


def two(params, x):
    return three(params, x)[:, :2]


def pixels(params, x):
    outputs = three(params, x)
    return jnp.stack([outputs, jnp.cos(outputs)], 1)  # (n, 2, 3)


class Case(NamedTuple):
    """A likelihood with its mean, written independently, and its scale."""

    name: str
    likelihood: ff.likelihoods.Likelihood
    apply_fn: Callable
    mean: Callable  # outputs -> expected targets, in jnp
    variance: Callable  # outputs -> variance of a target, in numpy
    scale: tuple[Callable, Callable]  # onto the line and back, in numpy
    slope: Callable  # d line / d mean as a function of the mean
    dispersion: float | None = None

    def __repr__(self) -> str:
        return self.name


def sigmoid(z):
    return 1 / (1 + jnp.exp(-z))


def shares(z):
    return jnp.exp(z) / jnp.sum(jnp.exp(z), -1, keepdims=True)


def first(z):
    return z[..., 0]


def same(z):
    return z


def ones(mean):
    return np.ones_like(mean)


LOGIT = (special.logit, special.expit), lambda p: 1 / (p * (1 - p))
LOG = (np.log, np.exp), lambda mean: 1 / mean
IDENTITY = (same, same), ones

CASES = [
    Case(
        "bernoulli",
        likelihoods.bernoulli(),
        one,
        sigmoid,
        lambda z: special.expit(z) * special.expit(-z),
        *LOGIT,
    ),
    Case(
        "categorical",
        likelihoods.categorical(),
        three,
        shares,
        lambda z: special.softmax(z, -1) * (1 - special.softmax(z, -1)),
        *LOGIT,
    ),
    Case(
        "categorical-pixels",
        likelihoods.categorical(),
        pixels,
        shares,
        lambda z: special.softmax(z, -1) * (1 - special.softmax(z, -1)),
        *LOGIT,
    ),
    Case("poisson-multi", likelihoods.poisson(), three, jnp.exp, np.exp, *LOG),
    Case(
        "gaussian",
        likelihoods.gaussian(scale=0.7),
        one,
        same,
        lambda z: np.full(z.shape, 0.49),
        *IDENTITY,
    ),
    Case(
        "gaussian-unknown-multi",
        likelihoods.gaussian(scale=None),
        three,
        same,
        lambda z: np.full(z.shape, 2.5),
        *IDENTITY,
        2.5,
    ),
    Case(
        "gaussian_location_scale",
        likelihoods.gaussian_location_scale(),
        two,
        first,
        lambda z: np.exp(2 * z[..., 1]),
        *IDENTITY,
    ),
    Case(
        "gamma-unknown",
        likelihoods.gamma(shape=None),
        one,
        jnp.exp,
        lambda z: 0.3 * np.exp(2 * z),
        *LOG,
        0.3,
    ),
    Case(
        "negative_binomial",
        likelihoods.negative_binomial(concentration=2.0),
        one,
        jnp.exp,
        lambda z: np.exp(z) + np.exp(2 * z) / 2,
        *LOG,
    ),
    Case(
        "student_t",
        likelihoods.student_t(df=3.0, scale=0.5),
        one,
        same,
        lambda z: np.full(z.shape, 0.25 * 3.0),
        *IDENTITY,
    ),
]
MULTI = next(case for case in CASES if case.name == "poisson-multi")
FULL = next(case for case in STRUCTURES if case.name == "full")
SOME = [c for c in STRUCTURES if c.name == "units"]
ROBUST = [c for c in STRUCTURES if c.name in ("block-names", "full")]


@functools.partial(jax.jit, static_argnames=("case", "robust", "chunk_size"))
def predict(state, inputs, *, case=MULTI, **options):
    """At the mean of the parameters, whatever the likelihood."""
    options["link"] = ff.predictions.plug_in()
    return ff.predict(state, case.apply_fn, case.likelihood, inputs, **options)


@functools.partial(jax.jit, static_argnames="case")
def derivatives(flat, case):
    """The outputs, the expected targets, and the Jacobian of these."""

    def outputs_of(flat):
        return case.apply_fn(cases.tree(flat), INPUTS)

    def mean_of(flat):
        return case.mean(outputs_of(flat))

    return outputs_of(flat), mean_of(flat), jax.jacfwd(mean_of)(flat)


def reference(case, covariance, level=0.95, df=None):
    """The same by the whole Jacobian of the mean, in numpy."""
    outputs, mean, jacobian = map(np.asarray, derivatives(jnp.asarray(MEAN), case))
    std = np.sqrt(np.einsum("...i,ij,...j->...", jacobian, covariance, jacobian))
    noise = case.variance(outputs)
    tail = (1 + level) / 2
    quantile = stats.norm.ppf(tail) if df is None else stats.t.ppf(tail, df)
    to_line, from_line = case.scale
    reach = quantile * std * case.slope(mean)
    return ff.Prediction(
        mean,
        std,
        np.sqrt(std**2 + noise),
        from_line(to_line(mean) - reach),
        from_line(to_line(mean) + reach),
    )


def compare(result, expected, **tolerance):
    for name, value, wanted in zip(result._fields, result, expected, strict=True):
        assert value.shape == wanted.shape, name
        np.testing.assert_allclose(value, wanted, **(tolerance or CLOSE), err_msg=name)


@pytest.fixture
def state(belief):
    return belief(
        cases.tree(MEAN), cases.information(FULL), cases.information(FULL, seed=1)
    )


@pytest.mark.slow_cases
@pytest.mark.parametrize("case", CASES, ids=repr)
def test_every_likelihood(state, case):
    covariance, df = np.linalg.inv(cases.matrix(FULL)), None
    if case.dispersion is not None:
        covariance, df = case.dispersion * covariance, 5.5
        state = state._replace(
            dispersion=jnp.asarray(case.dispersion),
            degrees_of_freedom=jnp.asarray(df),
            count=jnp.asarray(20.0),
        )
    result = predict(state, INPUTS, case=case, level=0.9)
    compare(result, reference(case, covariance, 0.9, df))
    lowest, highest = case.scale[1](np.array([-np.inf, np.inf]))
    assert np.all(result.lower > lowest) and np.all(result.upper < highest)


@pytest.mark.parametrize("structure", SOME + COMPENSATED[-1:], ids=repr)
def test_every_structure(belief, structure):
    state = belief(cases.tree(MEAN), cases.information(structure))
    covariance = np.linalg.inv(cases.matrix(structure))
    compare(predict(state, INPUTS), reference(MULTI, covariance))


@pytest.mark.parametrize("structure", ROBUST, ids=repr)
def test_robust(belief, structure):
    state = belief(
        cases.tree(MEAN),
        cases.information(structure),
        cases.information(structure, seed=1),
    )
    inverse = np.linalg.inv(cases.matrix(structure))
    covariance = inverse @ cases.matrix(structure, seed=1) @ inverse
    compare(predict(state, INPUTS, robust=True), reference(MULTI, covariance))


def test_chunks_do_not_matter(state):
    compare(
        predict(state, INPUTS, chunk_size=3),  # of seven
        predict(state, INPUTS),
        rtol=1e-11,
        atol=1e-13,
    )


def test_intervals_are_nested_in_the_level(state):
    levels = [0.01, 0.5, 0.9, 0.95, 0.999]
    lower, upper = [], []
    for level in levels:
        prediction = predict(state, INPUTS, level=level)
        lower.append(prediction.lower)
        upper.append(prediction.upper)
        assert np.all(prediction.lower < prediction.mean)
        assert np.all(prediction.upper > prediction.mean)
    assert np.all(np.diff(lower, axis=0) < 0)
    assert np.all(np.diff(upper, axis=0) > 0)


def test_shared_inputs_are_passed_whole(state):
    center = np.array([0.3, -0.1, 0.2])

    def apply_fn(params, inputs):
        assert inputs["center"].shape == (3,)
        return three(params, inputs["x"] + inputs["center"])

    inputs = {"x": INPUTS - center, "center": ff.Shared(jnp.asarray(center))}
    case = MULTI._replace(apply_fn=apply_fn)
    compare(predict(state, inputs, case=case, chunk_size=2), predict(state, INPUTS))


def test_vmap_over_states(state):
    other = state._replace(information=cases.information(FULL, seed=2))
    stacked = jax.tree.map(lambda *x: jnp.stack(x), state, other)
    together = jax.vmap(lambda s: predict(s, INPUTS))(stacked)
    for index, alone in enumerate((state, other)):
        row = jax.tree.map(lambda x, i=index: x[i], together)
        compare(row, predict(alone, INPUTS), rtol=1e-9)
