"""How often intervals hold the truth, and on which side they miss it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import expit
from scipy.stats import norm

import firth
import fisherflow_jax as ff

MODEL, REPLICATES = firth.MODEL, 2000
CORRELATED = np.array([-0.5, 1.0, -0.5, 0.5, 0.0, 0.0, 0.5, 0.0])
DESIGNS = {
    "few": (30, np.array([0.0, 1.0, -0.5])),
    "correlated": (60, CORRELATED),
    "separated": (30, np.array([-1.5, 1.0, -0.5])),  # one in eighty
}


def data(name, replicates):
    n, truth = DESIGNS[name]
    rng = np.random.default_rng(0)
    x = rng.normal(size=(replicates, n, len(truth)))
    if name == "correlated":  # .6 between any two
        common = rng.normal(size=(replicates, n, 1))
        x = np.sqrt(0.4) * x + np.sqrt(0.6) * common
    x[..., 0] = 1
    return x, (rng.random((replicates, n)) < expit(x @ truth)).astype(float)


def shares(lower, upper, truth=1.0):
    """Of intervals that hold the truth, lie above it, and lie below it."""
    above, below = (
        np.mean(np.asarray(lower) > truth),
        np.mean(np.asarray(upper) < truth),
    )
    held = np.mean((np.asarray(lower) <= truth) & (truth <= np.asarray(upper)))
    return np.array([held, above, below])


def mapped(state, interval, name, replicates):
    def one(x, y):
        return interval(state, *MODEL, (x, y), "theta[1]")

    return jax.jit(jax.vmap(one))(*data(name, replicates))


def likelihood_fits(name):
    """Wald's intervals in numpy, of data sets that have a maximum."""
    x, y = data(name, REPLICATES)
    theta = np.zeros((len(x), x.shape[2]))
    for _ in range(40):
        p = expit(np.einsum("rnd,rd->rn", x, theta))
        matrix = np.einsum("rnd,rn,rne->rde", x, p * (1 - p), x)
        matrix = matrix + 1e-9 * np.eye(x.shape[2])
        score = np.einsum("rnd,rn->rd", x, y - p)
        theta = theta + np.clip(
            np.linalg.solve(matrix, score[..., None])[..., 0], -2, 2
        )
    reach = norm.ppf(0.975) * np.sqrt(np.linalg.inv(matrix)[:, 1, 1])
    finite = np.abs(theta).max(1) < 15
    middle = theta[finite, 1]
    return middle - reach[finite], middle + reach[finite], np.mean(~finite)


@pytest.mark.slow
@pytest.mark.parametrize("name", DESIGNS)
def test_both_tails_of_the_corrected_interval_are_right(at_zero, name):
    state = at_zero(len(DESIGNS[name][1]))
    found = mapped(state, ff.intervals.corrected, name, REPLICATES)
    assert np.isfinite(found.lower).all() and np.isfinite(found.upper).all()
    held, above, below = shares(found.lower, found.upper)
    assert abs(held - 0.95) < 0.015
    assert abs(above - 0.025) < 0.011 and abs(below - 0.025) < 0.011
    lower, upper, separated = likelihood_fits(name)
    of_wald = shares(lower, upper)
    if name != "correlated":  # hardly any of Wald's intervals lies above the truth
        assert of_wald[1] < 0.01
    assert (separated > 0.005) == (name == "separated")
    # and Firth's estimate has next to no bias
    bias = np.mean(found.estimate) - 1.0
    assert abs(bias) < 4 * np.std(found.estimate) / np.sqrt(REPLICATES)
    assert np.mean(lower + upper) / 2 - 1.0 > 0.15


@pytest.mark.long
@pytest.mark.parametrize("name", ["few", "correlated"])
def test_the_profile_falls_short_and_its_modified_root_does_not(at_zero, name):
    state = at_zero(len(DESIGNS[name][1]))

    def interval(*given):
        return ff.intervals.profile(*given, num_points=0)

    found = mapped(state, interval, name, 1000)
    assert np.mean(found.converged) > 0.995
    finite = np.isfinite(np.asarray(found.estimate))
    plain = shares(found.lower, found.upper)
    modified = shares(found.modified_lower[finite], found.modified_upper[finite])
    deviation = np.sqrt(0.025 * 0.975 / 1000)
    assert plain[1] - 0.025 > 3 * deviation  # above the truth too often
    np.testing.assert_allclose(modified[1:], 0.025, atol=3 * deviation)


@pytest.mark.slow
def test_jeffreys_prior_in_a_warm_start_and_a_refinement_leaves_no_bias(at_zero):
    flow = ff.fisher_flow(*MODEL, prior_precision=1e-6)
    exact = ff.estimators.exact(*MODEL, ff.structures.full())

    def fitted(x, y):
        def jeffreys(count):
            rows = x[:count], y[:count]
            return ff.geometry.jeffreys(ff.geometry.metric(exact, rows))

        parts = [(x[k : k + 20], y[k : k + 20]) for k in (0, 20, 40)]
        state = flow.init(jnp.zeros(3))
        state = ff.warm_start(flow, state, parts[0], log_prior=jeffreys(20))
        for part in parts[1:]:
            state, _ = flow.update(state, part)
        first = ff.refine(flow, state, parts, log_prior=jeffreys(60))
        return state, first, ff.refine(flow, first, parts, log_prior=jeffreys(60))

    rng = np.random.default_rng(1)
    x = rng.normal(size=(1000, 60, 3))
    x[..., 0] = 1
    y = (rng.random((1000, 60)) < expit(x @ [-1.0, 1.0, -0.5])).astype(float)
    streamed, _, twice = jax.jit(jax.vmap(fitted))(x, y)
    pairs = list(zip(x[:200], y[:200], strict=True))
    expected = np.array([firth.firth(*pair) for pair in pairs])
    errors = [
        np.sqrt(np.diag(np.linalg.inv(firth.information(rows[0], theta))))
        for rows, theta in zip(pairs, expected, strict=True)
    ]
    off = np.abs(twice.mean[:200] - expected) / errors
    assert np.quantile(off, 0.95) < 0.02
    assert np.isfinite(streamed.mean).all()
    estimates = np.asarray(twice.mean)[:, 1]
    assert abs(estimates.mean() - 1) < 3 * estimates.std() / np.sqrt(1000)
