"""Logistic regressions of a few rows, and Firth's estimate of them in numpy."""

import numpy as np
from scipy.special import expit

import fisherflow_jax as ff

MODEL = (lambda params, x: x @ params), ff.likelihoods.bernoulli()


def rows(n, beta, seed=0):
    """`(x, y)`, the first column an intercept."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, len(beta)))
    x[:, 0] = 1
    return x, (rng.random(n) < expit(x @ beta)).astype(float)


def separated(n=20, seed=1):
    """The second column's sign tells the outcome."""
    rng = np.random.default_rng(seed)
    x = np.stack([np.ones(n), rng.normal(size=n)], 1)
    return x, (x[:, 1] > 0).astype(float)


def information(x, theta, weights=1.0):
    p = expit(x @ theta)
    return (x * (weights * p * (1 - p))[:, None]).T @ x


def firth_score(x, y, theta, weights=1.0):
    """The score and `X'(h (1/2 - p))`, h the leverages."""
    p = expit(x @ theta)
    solved = np.linalg.solve(information(x, theta, weights), x.T)
    leverages = weights * p * (1 - p) * np.einsum("ni,in->n", x, solved)
    return x.T @ (weights * (y - p) + leverages * (0.5 - p))


def firth(x, y, weights=1.0):
    """The root of Firth's score, by Fisher scoring with capped and halved steps."""
    theta = np.zeros(x.shape[1])

    def value(theta):
        eta = x @ theta
        log_likelihood = np.sum(weights * (y * eta - np.logaddexp(0, eta)))
        return (
            log_likelihood + 0.5 * np.linalg.slogdet(information(x, theta, weights))[1]
        )

    for _ in range(500):
        score = firth_score(x, y, theta, weights)
        step = np.linalg.solve(information(x, theta, weights), score)
        step *= min(1, 2 / np.abs(step).max())
        while value(theta + step) < value(theta) - 1e-12:
            step /= 2
        theta = theta + step
        if np.abs(score).max() < 1e-11:
            return theta
    raise AssertionError("Firth's search did not end")
