"""Recursive least squares, ridge regression and the Bayesian batch posterior."""

import numpy as np
import pytest
from scipy import stats

import fisherflow_jax as ff
import streams


def build(memory, prior_precision, scale=1.0):
    return ff.fisher_flow(
        streams.linear,
        ff.likelihoods.gaussian(scale),
        structure=ff.structures.full(),
        memory=memory,
        prior_precision=prior_precision,
        num_steps=1,
    )


@pytest.mark.parametrize("forgetting", [1.0, 0.95])
def test_recursive_least_squares_with_forgetting(forgetting):
    """The textbook recursion, row by row; its P is the inverse of the information."""
    flow = build(ff.memories.exponential(forgetting, floor=False), 0.01)
    state = flow.init(streams.tree(np.zeros(3)))
    theta, covariance = np.zeros(3), np.eye(3) / 0.01
    for row, target in zip(streams.INPUTS, streams.TARGETS, strict=True):
        gain = covariance @ row / (forgetting + row @ covariance @ row)
        theta = theta + gain * (target - row @ theta)
        covariance = (covariance - np.outer(gain, row @ covariance)) / forgetting
        state, _ = flow.update(state, (row[None], target[None]))
        np.testing.assert_allclose(streams.flat(state.mean), theta, rtol=1e-8)
    np.testing.assert_allclose(
        np.linalg.inv(streams.dense(state.information)), covariance, rtol=1e-8
    )


@pytest.mark.parametrize(
    "penalty", [2.0, {"level": 1e-9, "slope": np.array([2.0, 5.0])}]
)
def test_ridge_regression(penalty):
    """The penalised least squares solution, also with its own penalty a parameter."""
    flow = build(ff.memories.stationary(), penalty)
    state = flow.init(streams.tree(np.zeros(3)))
    for batch in streams.batches(8, weights=np.ones(24)):
        state, _ = flow.update(state, batch)
    sizes = 2.0 * np.ones(3) if penalty == 2.0 else np.array([1e-9, 2.0, 5.0])
    # as one least squares problem, its penalty as further rows
    inputs = np.concatenate([streams.INPUTS, np.diag(np.sqrt(sizes))])
    targets = np.concatenate([streams.TARGETS, np.zeros(3)])
    expected = np.linalg.lstsq(inputs, targets)[0]
    np.testing.assert_allclose(streams.flat(state.mean), expected, rtol=1e-10)


def test_the_bayesian_posterior_and_its_intervals():
    """By conditioning the joint normal of parameters and targets."""
    flow = build(ff.memories.stationary(), streams.PRECISION, streams.SCALE)
    batches = streams.batches(8, weights=np.ones(24))
    state = streams.run(flow, streams.start(flow), batches)[-1]
    prior = np.eye(3) / streams.PRECISION
    cross = prior @ streams.INPUTS.T
    joint = streams.INPUTS @ cross + streams.SCALE**2 * np.eye(24)
    error = streams.TARGETS - streams.INPUTS @ streams.ORIGIN
    mean = streams.ORIGIN + cross @ np.linalg.solve(joint, error)
    covariance = prior - cross @ np.linalg.solve(joint, cross.T)
    np.testing.assert_allclose(streams.flat(state.mean), mean, rtol=1e-10)
    deviation = np.sqrt(np.diag(covariance))
    np.testing.assert_allclose(
        streams.flat(ff.standard_error(state)), deviation, rtol=1e-10
    )
    lower, upper = ff.confidence_interval(state, level=0.8)
    expected = stats.norm.interval(0.8, mean, deviation)
    np.testing.assert_allclose(streams.flat(lower), expected[0], rtol=1e-9)
    np.testing.assert_allclose(streams.flat(upper), expected[1], rtol=1e-9)
    evidence = stats.multivariate_normal.logpdf(error, cov=joint)
    np.testing.assert_allclose(state.log_evidence, evidence, rtol=1e-10)


def test_a_running_mean_and_its_standard_error():
    values = streams.TARGETS
    flow = ff.fisher_flow(
        lambda params, x: x * params,
        ff.likelihoods.gaussian(scale=None),
        structure=ff.structures.scalar(),
        memory=ff.memories.stationary(),
        prior_precision=1e-10,
    )
    state = flow.init(np.float64(0))
    for count, value in enumerate(values, start=1):
        state, _ = flow.update(state, (np.ones(1), value[None]))
        np.testing.assert_allclose(state.mean, values[:count].mean(), rtol=1e-8)
    error = values.std(ddof=1) / np.sqrt(len(values))
    np.testing.assert_allclose(ff.standard_error(state), error, rtol=1e-8)
