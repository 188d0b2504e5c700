"""Filters of generalised linear models: extended Kalman, renewable estimation."""

import numpy as np
import pytest
import streams


def moments(likelihood, line):
    if likelihood == "poisson":
        return np.exp(line), np.exp(line)
    mean = 1 / (1 + np.exp(-line))
    return mean, mean * (1 - mean)


@pytest.mark.parametrize("likelihood", ["bernoulli", "poisson"])
def test_one_step_is_the_extended_kalman_filter(likelihood):
    """In covariance form: the mean observed with its variance, linearised."""
    flow = streams.flow("full", "stationary", likelihood)
    state = flow.init(streams.tree(0.1 * streams.ORIGIN))
    mean, covariance = 0.1 * streams.ORIGIN, np.eye(3) / streams.PRECISION
    for batch in streams.batches(8, likelihood, np.ones(24)):
        inputs, targets, _ = batch
        expected, variance = moments(likelihood, inputs @ mean)
        design = inputs * variance[:, None]  # the derivative of the mean
        innovation = design @ covariance @ design.T + np.diag(variance)
        gain = np.linalg.solve(innovation, design @ covariance).T
        mean = mean + gain @ (targets - expected)
        covariance = covariance - gain @ innovation @ gain.T
        state, _ = flow.update(state, batch)
        np.testing.assert_allclose(streams.flat(state.mean), mean, rtol=1e-8)
        np.testing.assert_allclose(
            np.linalg.inv(streams.dense(state.information)), covariance, atol=1e-9
        )


@pytest.mark.parametrize("likelihood", ["bernoulli", "poisson"])
def test_many_steps_are_renewable_estimation(likelihood):
    """Each batch's estimating equation `J (b_old - b) + U(b) = 0`, solved."""
    flow = streams.flow("full", "stationary", likelihood, num_steps=25)
    state = streams.start(flow)
    estimate, aggregate = streams.ORIGIN, streams.PRECISION * np.eye(3)
    for batch in streams.batches(8, likelihood, np.ones(24)):
        inputs, targets, _ = batch
        solution = estimate
        for _ in range(300):
            expected, variance = moments(likelihood, inputs @ solution)
            negative_hessian = (inputs.T * variance) @ inputs
            equation = aggregate @ (estimate - solution)
            equation = equation + inputs.T @ (targets - expected)
            step = np.linalg.solve(aggregate + negative_hessian, equation)
            solution = solution + step / max(1, 5 * np.linalg.norm(step))
        assert np.linalg.norm(equation) < 1e-9
        aggregate = aggregate + negative_hessian
        estimate = solution
        state, _ = flow.update(state, batch)
        np.testing.assert_allclose(streams.flat(state.mean), estimate, atol=1e-5)
        np.testing.assert_allclose(
            streams.dense(state.information), aggregate, rtol=1e-4, atol=1e-5
        )
