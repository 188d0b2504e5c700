"""Streams that once lost data in silence, or ended with numbers that were not right.

Distances are in standard errors, the largest over all contrasts that the data
determine: with `d` off the solution and `H` the information of the data alone, the
largest of `c^T d / sqrt(c^T H^+ c)` is `sqrt(d^T H d)`.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fisherflow_jax as ff

L = ff.likelihoods
ROWS = 1200


def off(mean, solution, inputs, weights=1.0):
    """The largest distance of a determined contrast, in its standard errors."""
    move = np.asarray(inputs, float) @ (np.asarray(mean, float) - solution)
    return np.sqrt(np.sum(weights * move**2))


def run(simulation, flow, inputs, targets, size, dtype):
    """One scan over batches of `size`."""
    with jax.enable_x64(dtype == jnp.float64):
        rows = jnp.asarray(inputs, dtype), jnp.asarray(targets, dtype)
        return simulation.stream(flow, *rows, size)


# ---- float32: dummy traps, single rows, far origins, large units


class Line(NamedTuple):
    """A linear or logistic regression, and its solution under the prior."""

    inputs: np.ndarray
    targets: np.ndarray
    prior_precision: float
    logistic: bool = False

    @property
    def likelihood(self):
        return L.bernoulli() if self.logistic else L.gaussian()

    def solution(self):
        """Newton's method in float64, in columns of unit length: exact for a line."""
        length = np.linalg.norm(self.inputs, axis=0)
        x, penalty = self.inputs / length, self.prior_precision / length**2
        params = np.zeros(len(length))
        for _ in range(30 if self.logistic else 2):
            mean, weights = x @ params, np.ones(len(x))
            if self.logistic:
                mean = 1 / (1 + np.exp(-mean))
                weights = mean * (1 - mean)
            score = x.T @ (self.targets - mean) - penalty * params
            information = (x.T * weights) @ x + np.diag(penalty)
            params = params + np.linalg.solve(information, score)
        return params / length, weights


def lines():
    rng = np.random.default_rng(3)
    one, group = np.ones(ROWS), np.arange(ROWS) % 3
    dummies = np.stack([one, group == 0, group == 1, group == 2], axis=1).astype(float)
    of_group = group + rng.normal(size=ROWS)
    year = rng.integers(2000, 2025, ROWS).astype(float)
    trend = 3 + 0.05 * (year - 2012) + rng.normal(size=ROWS)
    by_year = np.column_stack([one, year])
    centred = np.column_stack([one, (year - year.mean()) / year.std()])
    amount = 1e5 * rng.normal(size=ROWS)
    bought = (rng.logistic(size=ROWS) < 0.3 + 1e-5 * amount).astype(float)
    return {
        "dummy trap": Line(dummies, of_group, 1e-6),
        "years, prior 1e-2": Line(by_year, trend, 1e-2),
        "years, prior 1e-8": Line(by_year, trend, 1e-8),
        "standardised, prior 1e-8": Line(centred, trend, 1e-8),
        "amounts": Line(np.column_stack([one, amount]), bought, 1e-10, True),
    }


LINES = lines()


@pytest.mark.slow_cases
@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("dummy trap", 1),
        ("dummy trap", 20),
        ("years, prior 1e-2", 1),
        ("years, prior 1e-8", 1),
        ("standardised, prior 1e-8", 1),
        ("amounts", 1),
    ],
)
def test_no_stream_ends_in_float32(simulation, name, size):
    """Every contrast within .02 standard errors of float64.

    That is the closed form; of a logistic stream, the same stream in float64.
    """
    line = LINES[name]
    flow = ff.fisher_flow(
        simulation.linear, line.likelihood, prior_precision=line.prior_precision
    )
    state = run(simulation, flow, line.inputs, line.targets, size, jnp.float32)
    assert (state.count, state.num_skipped) == (ROWS, 0)
    solution, weights = line.solution()
    precision = (line.inputs.T * weights) @ line.inputs
    precision += line.prior_precision * np.eye(len(precision))
    error = np.sqrt(np.diag(np.linalg.inv(precision)))
    if line.logistic:
        rows = line.inputs, line.targets, size, jnp.float64
        wide = run(simulation, flow, *rows)
        solution, error = np.asarray(wide.mean), ff.standard_error(wide)
    assert off(state.mean, solution, line.inputs, weights) < 0.02
    if name == "dummy trap":  # whose single errors are the prior's; it is counted
        assert state.events.solves_regularised > 50
    else:
        np.testing.assert_allclose(ff.standard_error(state), error, rtol=0.01)


# at 3 and 1 of these orders searches once ended on a tail or ran away, and all was lost
ORDERS = {"years": [26, 45, 53, 0, 1, 2], "amounts": [72, 0, 1, 2, 3, 4]}


def contradicted(name, seed, rows=400):
    """Rows of which the first ones are nearly separated, far beyond 1 and -1."""
    rng = np.random.default_rng(seed)
    one, noise = np.ones(rows), rng.logistic(size=rows)
    if name == "amounts":
        amount = 1e5 * rng.normal(size=rows)
        inputs, level = np.column_stack([one, amount]), 0.3 + 1e-5 * amount
        return Line(inputs, (noise < level).astype(float), 1e-10, True)
    year = rng.integers(2000, 2025, rows).astype(float)
    level, inputs = 0.05 * (year - 2012), np.column_stack([one, year])
    return Line(inputs, (noise < level).astype(float), 1e-8, True)


@pytest.mark.slow_cases
@pytest.mark.parametrize("name", ORDERS)
def test_an_outcome_that_contradicts_a_certainty_is_learned(simulation, name):
    """Single rows under a vague prior, in six orders, within one standard error.

    After a few rows the outcomes are all but certain; Newton's step from there is too
    long by a factor of up to 1e18. Along the tails before, each step is too short to
    be seen in standard errors, and changes the information by a factor of e.
    """
    lines = [contradicted(name, seed) for seed in ORDERS[name]]
    prior = lines[0].prior_precision
    flow = ff.fisher_flow(simulation.linear, L.bernoulli(), prior_precision=prior)
    run = jax.jit(
        functools.partial(jax.lax.map, lambda rows: simulation.stream(flow, *rows, 1))
    )
    rows = [np.stack(x) for x in zip(*(line[:2] for line in lines), strict=True)]
    states = [
        run(tuple(jnp.asarray(x, dtype) for x in rows))
        for dtype in (jnp.float32, jnp.float64)
    ]
    gaps = []
    for i, line in enumerate(lines):
        solution, weights = line.solution()
        means = [np.asarray(state.mean[i], float) for state in states]
        for mean in means:
            assert off(mean, solution, line.inputs, weights) < 1
        gaps.append(off(means[0], means[1], line.inputs, weights))
    for state in states:
        assert np.all(state.events.searches_unfinished <= 8)
    assert np.median(gaps) < 0.01 and max(gaps) < 0.1


def test_rounding_ends_a_search_in_float32(simulation):
    """At a target of a million no step is shorter than rounding: none is counted."""
    rng = np.random.default_rng(0)
    inputs = np.column_stack([np.ones(ROWS), rng.normal(size=(ROWS, 2))])
    targets = 1e6 + inputs @ np.array([1.0, 2.0, -1.0]) + rng.normal(size=ROWS)
    flow = ff.fisher_flow(simulation.linear, L.gaussian(), prior_precision=1e-6)
    state = run(simulation, flow, inputs, targets, 20, jnp.float32)
    assert (state.count, state.num_skipped) == (ROWS, 0)
    assert state.events.searches_unfinished == 0
    assert off(state.mean, np.linalg.lstsq(inputs, targets)[0], inputs) < 2


@pytest.mark.slow_cases
@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("dummy trap", 20),
        ("years, prior 1e-8", 20),
        ("years, prior 1e-2", 1),
        ("years, prior 1e-8", 1),
        ("standardised, prior 1e-8", 1),
    ],
)
def test_float64_needs_no_help(simulation, name, size):
    line = LINES[name]
    flow = ff.fisher_flow(
        simulation.linear, line.likelihood, prior_precision=line.prior_precision
    )
    state = run(simulation, flow, line.inputs, line.targets, size, jnp.float64)
    assert (state.count, state.events.solves_regularised) == (ROWS, 0)
    assert off(state.mean, line.solution()[0], line.inputs) < 1e-6


@pytest.mark.slow_cases
@pytest.mark.parametrize(
    ("name", "rows", "size"), [("dummy trap", ROWS, 20), ("years, prior 1e-8", 60, 1)]
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_an_eager_loop_ends_where_a_scan_does(simulation, name, rows, size, dtype):
    line = LINES[name]
    line = line._replace(inputs=line.inputs[:rows], targets=line.targets[:rows])
    flow = ff.fisher_flow(
        simulation.linear, line.likelihood, prior_precision=line.prior_precision
    )
    inputs, targets = (np.asarray(x, dtype) for x in line[:2])
    state = flow.init(np.zeros(inputs.shape[1], dtype))
    for start in range(0, rows, size):
        part = slice(start, start + size)
        state, info = flow.update(state, (inputs[part], targets[part]))
        assert not info.skipped
    bound = 0.02 if dtype == jnp.float32 else 1e-6
    assert off(state.mean, line.solution()[0], line.inputs) < bound


# ---- first updates from far away


def counts(level):
    rng = np.random.default_rng(7)
    inputs = np.column_stack([np.ones(2000), rng.normal(size=(2000, 2))])
    rate = np.exp(level + inputs @ np.array([0.0, 0.3, -0.2]))
    return inputs, rng.poisson(rate).astype(float)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_counts_of_a_million_from_zeros(simulation, dtype):
    """Of expected count exp(14), from an expected count of one."""
    inputs, targets = counts(14.0)
    flow = ff.fisher_flow(simulation.linear, L.poisson(), prior_precision=1e-8)
    state = run(simulation, flow, inputs, targets, 20, dtype)
    params = np.array([14.0, 0.3, -0.2])
    for _ in range(10):
        rate = np.exp(inputs @ params)
        information = (inputs.T * rate) @ inputs
        params = params + np.linalg.solve(information, inputs.T @ (targets - rate))
    assert off(state.mean, params, inputs, rate) < 0.1
    error = np.sqrt(np.diag(np.linalg.inv(information)))
    np.testing.assert_allclose(ff.standard_error(state), error, rtol=0.01)


@pytest.mark.slow_cases
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_counts_that_begin_with_zeros_are_mended_by_refine(simulation, dtype):
    """Two hundred zeros first: five standard errors off by one pass, none by three."""
    inputs, targets = counts(0.5)
    targets[:200] = 0
    flow = ff.fisher_flow(simulation.linear, L.poisson(), prior_precision=1e-4)
    state = run(simulation, flow, inputs, targets, 20, dtype)
    params = np.array([0.5, 0.3, -0.2])
    for _ in range(10):
        rate = np.exp(inputs @ params)
        information = (inputs.T * rate) @ inputs
        params = params + np.linalg.solve(information, inputs.T @ (targets - rate))
    gaps = [off(state.mean, params, inputs, rate)]
    batches = inputs.reshape(-1, 20, 3), targets.reshape(-1, 20)
    batches = jax.tree.map(lambda x: jnp.asarray(x, dtype), batches)
    for _ in range(3):
        state = ff.refine(flow, state, batches)
        gaps.append(off(state.mean, params, inputs, rate))
    assert gaps[0] > 1  # as docs/limits.md says of a stream whose order tells
    assert gaps[2] < 0.01 and gaps[3] < (1e-3 if dtype == jnp.float32 else 1e-4)
