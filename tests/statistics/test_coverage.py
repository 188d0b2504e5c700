"""Intervals cover as often as they say, and as often as the batch fit's own.

The reference is a maximum-likelihood fit of the same data, written here: damped Fisher
scoring with its own intervals.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import fisherflow_jax as ff

LEVELS = (0.90, 0.95, 0.99)
TRUTH = jnp.array([0.3, 0.5, -0.4, 0.2, 0.0])
ROWS, SIZE, WARM, REPLICATIONS = 2000, 20, 100, 1000


class Family(NamedTuple):
    """A regression as its textbook writes it, independently of the package."""

    likelihood: ff.likelihoods.Likelihood
    draw: Callable  # (key, linear predictor, inputs, departure) -> targets
    log_prob: Callable  # (linear predictor, target), constants dropped, dispersion 1
    weight: Callable  # linear predictor -> expected information, dispersion 1
    dispersion: float | None = 1.0  # None: unknown, Pearson's estimate
    departures: tuple = (0.0,)  # from the model: 0 none, 1 a wrong variance


def _normal(key, eta, inputs, departure):
    deviation = 0.5 * jnp.exp(0.5 * departure * inputs[:, 1])
    return eta + deviation * jax.random.normal(key, eta.shape)


def _poisson(key, eta, inputs, departure):
    """Negative binomial with concentration 2 where the model is departed from."""
    first, second = jax.random.split(key)
    rate = jnp.log(jax.random.gamma(first, 2.0, eta.shape) / 2.0)
    mean = jnp.exp(eta + departure * rate)
    return jax.random.poisson(second, mean).astype(eta.dtype)


def _gamma(key, eta, inputs, departure):
    return jax.random.gamma(key, 2.0, eta.shape) / 2.0 * jnp.exp(eta)


def _bernoulli(key, eta, inputs, departure):
    return jax.random.bernoulli(key, jax.nn.sigmoid(eta)).astype(eta.dtype)


def _linear(**options):
    return Family(
        draw=_normal,
        log_prob=lambda eta, y: -0.5 * (y - eta) ** 2,
        weight=jnp.ones_like,
        **options,
    )


FAMILIES = {
    "linear": _linear(likelihood=ff.likelihoods.gaussian(scale=0.5), dispersion=0.25),
    "linear, unknown scale": _linear(
        likelihood=ff.likelihoods.gaussian(scale=None),
        dispersion=None,
        departures=(0.0, 1.0),
    ),
    "logistic": Family(
        ff.likelihoods.bernoulli(),
        _bernoulli,
        lambda eta, y: y * eta - jax.nn.softplus(eta),
        lambda eta: jax.nn.sigmoid(eta) * jax.nn.sigmoid(-eta),
    ),
    "poisson": Family(
        ff.likelihoods.poisson(),
        _poisson,
        lambda eta, y: y * eta - jnp.exp(eta),
        jnp.exp,
        departures=(0.0, 1.0),
    ),
    "gamma": Family(
        ff.likelihoods.gamma(shape=2.0),
        _gamma,
        lambda eta, y: -y * jnp.exp(-eta) - eta,
        jnp.ones_like,
        0.5,
    ),
}


def batch_fit(family, inputs, targets):
    """The maximum-likelihood fit: estimate, information and robust variances."""

    def value(params):
        return jnp.sum(family.log_prob(inputs @ params, targets))

    def scoring_step(params, _):
        information = (inputs.T * family.weight(inputs @ params)) @ inputs
        direction = jnp.linalg.solve(information, jax.grad(value)(params))
        trials = params + 0.5 ** jnp.arange(8.0)[:, None] * direction
        return trials[jnp.argmax(jax.vmap(value)(trials))], None

    start = jnp.zeros(inputs.shape[1])
    params = jax.lax.scan(scoring_step, start, None, length=12)[0]
    eta = inputs @ params
    covariance = jnp.linalg.inv((inputs.T * family.weight(eta)) @ inputs)
    score = jax.vmap(jax.grad(family.log_prob))(eta, targets)
    middle = (inputs.T * score**2) @ inputs
    if family.dispersion is None:
        spare = inputs.shape[0] - inputs.shape[1]
        dispersion = jnp.sum((targets - eta) ** 2) / spare
    else:
        dispersion = family.dispersion
    variance = dispersion * jnp.diag(covariance)
    return params, variance, jnp.diag(covariance @ middle @ covariance)


class Comparison(NamedTuple):
    """Of a flow with the batch fit; coverage is (levels, 2): model-based, robust."""

    covered: np.ndarray
    reference: np.ndarray
    ratio: float  # of the mean squared errors


@functools.cache
def compare(simulation, name, *, warm=WARM, num_steps=4, number=REPLICATIONS):
    """One comparison for each of the family's departures from the model."""
    family = FAMILIES[name]
    robust = len(family.departures) > 1
    flow = ff.fisher_flow(
        simulation.linear,
        family.likelihood,
        structure=ff.structures.full(),
        memory=ff.memories.stationary(),
        prior_precision=1e-3,
        num_steps=num_steps,
        robust=robust,
    )
    spare = ROWS - len(TRUTH) if family.dispersion is None else np.inf
    quantiles = stats.t.isf((1 - np.array(LEVELS)) / 2, spare)[:, None, None]

    def one(part):
        key, departure = part
        of_inputs, of_targets = jax.random.split(key)
        inputs = jax.random.normal(of_inputs, (ROWS, len(TRUTH))).at[:, 0].set(1.0)
        targets = family.draw(of_targets, inputs @ TRUTH, inputs, departure)
        state = simulation.stream(flow, inputs, targets, SIZE, warm)

        def covers(level, kind):
            lower, upper = ff.confidence_interval(state, level, kind)
            return jnp.mean((lower < TRUTH) & (upper > TRUTH))

        fit, *variances = batch_fit(family, inputs, targets)
        deviations = jnp.abs(fit - TRUTH) / jnp.sqrt(jnp.stack(variances))
        kinds = (False, robust)
        return (
            jnp.array([[covers(level, kind) for kind in kinds] for level in LEVELS]),
            jnp.mean(deviations < quantiles, axis=-1),
            jnp.sum((state.mean - TRUTH) ** 2),
            jnp.sum((fit - TRUTH) ** 2),
        )

    comparisons = []
    simulate = simulation.compiled(one)
    for departure in family.departures:
        keys = jax.random.split(jax.random.key(1), number)
        results = simulate((keys, jnp.full(number, departure)))
        covered, reference, error, least = (np.mean(x, axis=0) for x in results)
        comparisons.append(Comparison(covered, reference, error / least))
    return comparisons


def percent(values):
    return " ".join(f"{100 * x:.2f}" for x in values)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_intervals_cover_as_stated(simulation, name):
    covered, reference, ratio = compare(simulation, name)[0]
    print(
        f"\n{name}: 90/95/99 % cover {percent(covered[:, 0])}, the batch fit's "
        f"{percent(reference[:, 0])}; MSE ratio {ratio:.4f}"
    )
    np.testing.assert_allclose(covered[:, 0], LEVELS, rtol=0, atol=0.015)
    np.testing.assert_allclose(covered[:, 0], reference[:, 0], rtol=0, atol=0.01)
    assert abs(ratio - 1) < 0.03


@pytest.mark.slow
@pytest.mark.parametrize("name", ["linear, unknown scale", "poisson"])
def test_robust_intervals_cover_where_the_variance_is_wrong(simulation, name):
    """Heteroscedastic errors, overdispersed counts; and they cost nothing elsewhere."""
    right, wrong = compare(simulation, name)
    for label, (covered, reference, ratio) in (("right", right), ("wrong", wrong)):
        print(
            f"\n{name}, variance {label}: sandwich {percent(covered[:, 1])}, the batch "
            f"fit's {percent(reference[:, 1])}; model-based {percent(covered[:, 0])}; "
            f"MSE ratio {ratio:.4f}",
            end="",
        )
        np.testing.assert_allclose(covered[:, 1], LEVELS, rtol=0, atol=0.015)
        np.testing.assert_allclose(covered[:, 1], reference[:, 1], rtol=0, atol=0.01)
        assert abs(ratio - 1) < 0.03
    print()
    # the intervals that trust the model do not cover, or this test would show nothing
    assert np.all(wrong.covered[:2, 0] < np.array(LEVELS[:2]) - 0.02)


@pytest.mark.slow
def test_one_step_from_a_cold_start_would_not_cover(simulation):
    """The measure has teeth: it rejects what a warm start is there to prevent."""
    covered, reference, ratio = compare(
        simulation, "poisson", num_steps=1, warm=0, number=200
    )[0]
    print(
        f"\npoisson, one step and no warm start: 90/95/99 % cover "
        f"{percent(covered[:, 0])}, the batch fit's {percent(reference[:, 0])}; MSE "
        f"ratio {ratio:.1f}"
    )
    assert covered[1, 0] < 0.9
    assert reference[1, 0] > 0.93
    assert ratio > 2
