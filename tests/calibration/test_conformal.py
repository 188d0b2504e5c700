"""Conformal sets and intervals: their thresholds by hand, coverage by simulation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from fisherflow_jax import calibration, metrics

FIXED = functools.partial(calibration.adaptive, randomised=False)


def test_the_rank_is_exact():
    targets = np.random.default_rng(0).permutation(np.arange(1.0, 101))
    zeros, ones = np.zeros(100), np.ones(100)
    fit = calibration.conformal_intervals().fit

    @jax.jit
    def factors(mean, std, targets, count):
        mask = jnp.arange(100) < count
        return [fit(mean, std, targets, level=x, mask=mask) for x in levels]

    # (n + 1) level is whole for most of these, with a rounding of either sign
    levels = [0.07, 0.29, 0.57, 0.9, 0.55]
    ranks = {99: [7, 29, 57, 90, 55], 19: [2, 6, 12, 18, 11]}
    for count, expected in ranks.items():
        columns = (x.astype(np.float32) for x in (zeros, ones, np.arange(1.0, 101)))
        np.testing.assert_array_equal(factors(*columns, count), expected)
    # 90.9 is rounded up
    assert fit(zeros, ones, targets, level=0.9) == 91


@pytest.mark.parametrize("count, level", [(8, 0.9), (1, 0.6)])
def test_too_few_for_the_level(count, level):
    y = np.arange(1.0, count + 2)
    conformal = calibration.conformal_intervals()
    arrays = 0 * y, 0 * y + 1, y
    few = [x[:count] for x in arrays]
    with pytest.raises(ValueError, match=f"{count} held-out .* at least {count + 1}"):
        conformal.fit(*few, level=level)
    assert conformal.fit(*arrays, level=level) == count + 1  # one more is enough
    # under jit the promise is kept by infinite intervals
    run = jax.jit(functools.partial(conformal.fit, level=level))
    assert run(*few) == np.inf
    lower, upper = conformal.predict(jnp.inf, few[0], few[1])
    assert np.all(lower == -np.inf) and np.all(upper == np.inf)


def test_adaptive_scores_by_hand():
    p = np.array([[0.2, 0.5, 0.3], [0.4, 0.2, 0.4]])
    np.testing.assert_allclose(FIXED(p), [[1, 0.5, 0.8], [0.4, 1, 0.8]], rtol=1e-12)
    key = jax.random.key(3)
    many = np.broadcast_to(p[:, None], (2, 4000, 3)).reshape(-1, 3)
    drawn = np.asarray(jax.jit(calibration.adaptive)(many, key)).reshape(2, 4000, 3)
    # one u an example: its share is the same of every class
    u = drawn[0, :, 1] / 0.5
    expected = np.stack([0.8 + 0.2 * u, 0.5 * u, 0.5 + 0.3 * u], -1)
    np.testing.assert_allclose(drawn[0], expected, rtol=1e-6, atol=1e-9)
    assert stats.kstest(u, "uniform").pvalue > 1e-3
    # of two equally probable classes either is first half of the time
    first = (drawn[1, :, 0] < drawn[1, :, 2]).mean()
    assert abs(first - 0.5) < 4 * 0.5 / np.sqrt(4000)


@pytest.fixture(scope="module")
def simulation():
    """Coverage over many draws of held-out and new examples, and what is exact."""
    # (n + 1) level is not whole, so that n level would have another rank
    level, repeats, held_out, new = 0.81, 800, 19, 20
    sets = {
        "least ambiguous": calibration.conformal_sets(),
        "adaptive": calibration.conformal_sets(calibration.adaptive),
    }
    intervals = calibration.conformal_intervals()

    def one(key):
        keys = jax.random.split(key, 6)
        truth = jax.random.normal(keys[0], (held_out + new, 4))
        labels = jax.random.categorical(keys[1], truth)
        p = jax.nn.softmax(3 * truth)  # an overconfident model
        coverage, size = {}, {}
        for name, conformal in sets.items():
            old = p[:held_out], labels[:held_out]
            threshold = conformal.fit(*old, level=level, key=keys[2])
            chosen = conformal.predict(threshold, p[held_out:], key=keys[3])
            coverage[name] = metrics.set_coverage(chosen, labels[held_out:])
            size[name] = metrics.set_size(chosen)
        x, noise = jax.random.normal(keys[4], (2, held_out + new))
        spread = jnp.exp(x)
        y = spread * noise**3  # heavy tails
        wrong = jnp.full_like(y, 0.3)
        std = 0.01 * spread
        old = (c[:held_out] for c in (wrong, std, y))
        factor = intervals.fit(*old, level=level)
        ends = intervals.predict(factor, wrong[held_out:], std[held_out:])
        coverage["intervals"] = metrics.interval_coverage(*ends, y[held_out:])
        return coverage, size

    keys = jax.random.split(jax.random.key(0), repeats)
    coverage, size = jax.jit(jax.vmap(one))(keys)
    rank = int(np.ceil((held_out + 1) * level))
    exact = rank / (held_out + 1)
    # given the held-out data, coverage ~ Beta(rank, n + 1 - rank), then binomial
    beta = stats.beta(rank, held_out + 1 - rank)
    variance = beta.var() + (exact * (1 - exact) - beta.var()) / new
    return coverage, size, exact, variance


@pytest.mark.parametrize("name", ["least ambiguous", "adaptive", "intervals"])
def test_coverage(simulation, name):
    coverage, _, exact, variance = simulation
    coverage = np.asarray(coverage[name])
    # 4 standard errors of the mean, and 6 of a variance as of a normal's
    error = np.sqrt(variance / len(coverage))
    assert abs(coverage.mean() - exact) < 4 * error
    assert abs(coverage.var() / variance - 1) < 6 * np.sqrt(2 / len(coverage))


def test_the_least_ambiguous_sets_are_the_smallest(simulation):
    _, size, _, _ = simulation
    assert 1 < size["least ambiguous"].mean() < size["adaptive"].mean() < 4


def test_padding_is_not_read():
    rng = np.random.default_rng(2)
    p, labels = rng.dirichlet(np.ones(3), 30), rng.integers(0, 3, 30)
    mask = np.arange(30) % 3 > 0
    padded = np.where(mask[:, None], p, np.nan), np.where(mask, labels, -1)
    conformal = calibration.conformal_sets()
    run = jax.jit(functools.partial(conformal.fit, level=0.7))
    scores = np.sort(1 - p[np.arange(30), labels][mask])
    expected = scores[int(np.ceil(21 * 0.7)) - 1]
    np.testing.assert_allclose(run(*padded, mask=mask), expected, rtol=1e-12)
    narrow = run(jnp.asarray(p, jnp.bfloat16), labels.astype(np.int32))
    assert narrow.dtype == jnp.float32
    assert np.isnan(run(p, np.where(mask, labels, 3)))


def test_bad_input():
    p, labels = np.full((9, 3), 1 / 3), np.zeros(9, int)
    conformal = calibration.conformal_sets(calibration.adaptive)
    for level in (0, 1, 1.5, float("nan")):
        with pytest.raises(ValueError, match=r"level must be .* \(0, 1\)"):
            conformal.fit(p, labels, level=level, key=0)
    with pytest.raises(ValueError, match="adaptive scores are random: give a key"):
        conformal.fit(p, labels, level=0.5)
    with pytest.raises(ValueError, match="adaptive scores are random: give a key"):
        conformal.predict(0.5, p)
    with pytest.raises(ValueError, match=r"one an example.*got shape \(9, 1\)"):
        conformal.fit(p[:, None], labels[:, None], level=0.5, key=0)
    with pytest.raises(ValueError, match=r"probabilities must be \(n, C\)"):
        conformal.fit(p[:, 0], labels, level=0.5, key=0)
    with pytest.raises(ValueError, match=r"labels .* from 0 to 2; row 0 has 3"):
        conformal.fit(p, labels + 3, level=0.5, key=0)
    intervals = calibration.conformal_intervals()
    y = np.ones(9)
    with pytest.raises(ValueError, match="std must be positive"):
        intervals.fit(y, 0 * y, y, level=0.5)
    with pytest.raises(ValueError, match=r"got shape \(3, 3\)"):
        intervals.fit(*(x.reshape(3, 3) for x in (y, y, y)), level=0.5)
    with pytest.raises(ValueError, match=r"one shape; got \(9,\) and \(8,\)"):
        intervals.predict(1.0, y, y[1:])
