"""Kinds of rows that once were lost or refused, in float32 and float64, under scan.

Beside what other files hold in one type: a channel that is missing together with an
unknown dispersion, weights of each kind, separation, and an eager loop from far away.
"""

import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fisherflow_jax as ff

L = ff.likelihoods
both_types = pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
NUMBER, ROWS = 12, 20


def rng(seed):
    return np.random.default_rng(seed)


X = np.column_stack([np.ones(NUMBER * ROWS), rng(0).normal(size=(NUMBER * ROWS, 2))])
TRUTH = np.array([[0.8, -0.4], [0.3, 0.2], [-0.2, 0.5]])


def linear(params, inputs):
    return inputs @ params


def beside_a_reference(params, inputs):
    return jnp.pad(inputs @ params, ((0, 0), (1, 0)))


def scanned(flow, start, *parts, dtype):
    cut = [
        jnp.asarray(part, dtype).reshape((NUMBER, ROWS, *part.shape[1:]))
        for part in parts
    ]
    with jax.enable_x64(dtype == jnp.float64):
        start = flow.init(jnp.zeros(start, dtype))
        run = jax.jit(lambda s, b: jax.lax.scan(flow.update, s, b)[0])
        return run(start, tuple(cut))


def poisson_fit(y, weights):
    """Newton's method; the mean, the inverse information and the fitted rates."""
    params = np.zeros(3)
    for _ in range(30):
        rate = np.exp(X @ params)
        inverse = np.linalg.inv((X.T * (weights * rate)) @ X)
        params = params + inverse @ (X.T @ (weights * (y - rate)))
    return params, inverse, rate


@pytest.mark.slow
def test_missing_channels_of_overdispersed_counts():
    """A row's channel that is NaN, the others kept; quasi-Poisson in each channel."""
    draw = rng(1)
    rate = np.exp(X @ TRUTH) * draw.gamma(2.0, 0.5, size=(len(X), 2))
    counts = draw.poisson(rate).astype(float)
    seen = draw.random(counts.shape) > 0.2
    flow = ff.fisher_flow(linear, L.poisson(dispersion=None), prior_precision=1e-6)
    holes = np.where(seen, counts, np.nan)
    states = [
        scanned(flow, (3, 2), X, holes, dtype=dtype)
        for dtype in (jnp.float32, jnp.float64)
    ]
    means = [np.asarray(state.mean, float) for state in states]
    squares = 0.0
    for j in range(2):
        params, inverse, fitted = poisson_fit(counts[:, j], seen[:, j])
        squares += np.sum(seen[:, j] * (counts[:, j] - fitted) ** 2 / fitted)
        error = np.sqrt(np.diag(inverse))
        np.testing.assert_array_less(np.abs(means[0] - means[1])[:, j] / error, 0.01)
        np.testing.assert_array_less(np.abs(means[1][:, j] - params) / error, 1)
    for state in states:
        assert state.num_skipped == 0
        assert state.events.rows_skipped == np.sum(~seen.all(1))
        # each target that was seen is an observation of the dispersion
        np.testing.assert_allclose(state.count, seen.sum(), rtol=1e-6)
        dispersion = squares / (seen.sum() - 6)
        np.testing.assert_allclose(state.dispersion, dispersion, rtol=0.05)


@pytest.mark.slow_cases
@pytest.mark.parametrize("kind", ["variance", "sampling"])
def test_weights_of_each_kind_in_float32(kind):
    """HC1 of weighted least squares, one pass and a refinement."""
    draw, dtype = rng(2), jnp.float32
    y = X @ TRUTH[:, 0] + draw.normal(size=len(X)) * np.exp(0.3 * X[:, 1])
    weights = draw.integers(1, 4, len(X)).astype(float)
    flow = ff.fisher_flow(
        linear, L.gaussian(None), prior_precision=1e-6, robust=True, weights_are=kind
    )
    state = scanned(flow, 3, X, y, weights, dtype=dtype)
    cut = [jnp.asarray(p, dtype).reshape((NUMBER, ROWS, *p.shape[1:])) for p in (X, y)]
    cut.append(jnp.asarray(weights, dtype).reshape((NUMBER, ROWS)))
    state = ff.refine(flow, state, tuple(cut))
    bread = np.linalg.inv((X.T * weights) @ X)
    params = bread @ (X.T @ (weights * y))
    left = y - X @ params
    meat, count = (X.T * np.square(weights * left)) @ X, len(X)
    error, rtol = np.sqrt(np.diag(bread @ meat @ bread) * count / (count - 3)), 1e-4
    np.testing.assert_allclose(ff.standard_error(state, robust="HC1"), error, rtol=rtol)
    np.testing.assert_allclose(state.mean, params, atol=rtol)
    assert float(state.count) == count


@pytest.mark.slow
def test_separation_a_zero_column_an_empty_cell_and_an_unseen_class_in_float32():
    """What only the prior determines is told, and nothing else."""
    draw, one = rng(3), np.ones(60)
    side = draw.uniform(0.5, 2.0, 30)
    cells = np.eye(2)[np.arange(60) % 2]
    counts = np.where(cells[:, 1] == 1, 0.0, draw.poisson(3.0, 60))
    z = draw.normal(size=60)
    cases = [
        (L.bernoulli(), [one, np.concatenate([-side, side])], np.arange(60) >= 30, 1),
        (L.bernoulli(), [z, 0 * one], draw.logistic(size=60) < z, 1),
        (L.poisson(), list(cells.T), counts, 1),
        (L.categorical(), [one, z], np.arange(60) % 2, (0, 1)),  # of three classes
    ]
    for likelihood, columns, targets, which in cases:
        classes = likelihood.name == "categorical"
        start = jnp.zeros((2, 2) if classes else 2, jnp.float32)
        model = beside_a_reference if classes else linear
        flow = ff.fisher_flow(model, likelihood, prior_precision=1e-6)
        x = jnp.asarray(np.stack(columns, 1), "f4")
        y = jnp.asarray(targets, "i4" if classes else "f4")
        state, _ = flow.update(flow.init(start), (x, y))
        name = re.escape(f"theta[{','.join(map(str, np.atleast_1d(which)))}]")
        with pytest.warns(ff.DataWarning, match=f"the prior: .*{name}"):
            error = np.asarray(ff.standard_error(state))
        assert np.isfinite(error).all() and error[which] > 100
        share = np.reshape(ff.summary(state).prior_share, start.shape)
        assert share[which] > 0.05


@both_types
def test_an_eager_loop_from_zeros_to_counts_of_a_million(dtype):
    counts = rng(4).poisson(np.exp(14 + X @ np.array([0.0, 0.3, -0.2]))).astype(float)
    flow = ff.fisher_flow(linear, L.poisson(), prior_precision=1e-8)
    state = flow.init(jnp.zeros(3, dtype))
    for rows in np.split(np.arange(len(X)), NUMBER):
        batch = jnp.asarray(X[rows], dtype), jnp.asarray(counts[rows], dtype)
        state, info = flow.update(state, batch)
        assert not info.skipped
    params, rate = np.array([14.0, 0.3, -0.2]), None
    for _ in range(10):
        rate = np.exp(X @ params)
        information = (X.T * rate) @ X
        params = params + np.linalg.solve(information, X.T @ (counts - rate))
    move = np.asarray(state.mean, float) - params
    if state.rest is not None:
        move = move + np.asarray(state.rest, float)
    assert np.sqrt(move @ information @ move) < 0.1
    error = np.sqrt(np.diag(np.linalg.inv(information)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_allclose(ff.standard_error(state), error, rtol=0.01)
