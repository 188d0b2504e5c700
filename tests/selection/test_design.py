"""Designs: textbook optima, certificates, exact ones by exchange."""

import jax.numpy as jnp
import numpy as np
import pytest

import fisherflow_jax as ff
from fisherflow_jax import selection

GRID = jnp.linspace(-1, 1, 201)
FULL = ff.structures.full()


def parabola(params, x):
    return params[0] + params[1] * x + params[2] * x**2


def line(params, x):
    return params[0] + params[1] * x


MODEL = parabola, ff.likelihoods.gaussian()
MOMENTS = np.array([[1, 0, 1 / 3], [0, 1 / 3, 0], [1 / 3, 0, 1 / 5]])
LAST = jnp.array([0.0, 0.0, 1.0])
# the criterion, its optimum, the weights at -1, 0 and 1
PARABOLA = {
    "D": (selection.information_gain(), np.log(4 / 27), (1 / 3, 1 / 3, 1 / 3)),
    "A": (selection.variance_reduction(), 8.0, (0.25, 0.5, 0.25)),
    "I": (
        selection.variance_reduction(ff.structures.Full(jnp.asarray(MOMENTS))),
        32 / 15,
        (0.25, 0.5, 0.25),
    ),
    "c": (selection.variance_reduction(LAST), 4.0, (0.25, 0.5, 0.25)),
}


def state_of(size, precision=1.0):
    return ff.posterior(jnp.zeros(size), FULL, prior_precision=precision)


@pytest.mark.slow_cases
@pytest.mark.parametrize("name", PARABOLA)
def test_the_known_optima_of_a_parabola(name):
    criterion, value, weights = PARABOLA[name]
    found = selection.design(
        state_of(3), *MODEL, GRID, criterion=criterion, tolerance=2e-4
    )
    assert found.efficiency >= 0.9998
    if name == "D":  # of the determinant
        found, value = found._replace(value=jnp.exp(found.value)), 4 / 27
    np.testing.assert_allclose(found.value, value, rtol=1e-3)
    near = [np.abs(GRID - at) < 0.1 for at in (-1, 0, 1)]
    masses = [found.weights[own].sum() for own in near]
    np.testing.assert_allclose(masses, weights, atol=0.02)


def test_the_known_optimum_of_a_logistic_line():
    grid = jnp.linspace(-4, 4, 161)
    state = ff.posterior(jnp.array([0.0, 1.0]), FULL, prior_precision=1.0)
    found = selection.design(state, line, ff.likelihoods.bernoulli(), grid)
    for side in (grid < 0, grid > 0):
        own = jnp.where(side, found.weights, 0)
        assert jnp.abs(jnp.sum(own * grid) / jnp.sum(own)) == pytest.approx(
            1.5434, abs=0.05
        )
        assert jnp.sum(own) == pytest.approx(0.5, abs=1e-3)


def optimum(rows, prior, count, target):
    """By many steps of another rule, exact along lines between weights: numpy."""
    weights = np.full(len(rows), 1 / len(rows))

    def value(weights):
        matrix = prior + count * np.einsum("n,nrd,nre->de", weights, rows, rows)
        if target is None:
            return np.linalg.slogdet(matrix)[1]
        return -np.trace(target @ np.linalg.inv(matrix))

    for step in range(1500):
        matrix = prior + count * np.einsum("n,nrd,nre->de", weights, rows, rows)
        inverse = np.linalg.inv(matrix)
        middle = inverse if target is None else inverse @ target @ inverse
        slopes = np.einsum("nrd,de,nre->n", rows, middle, rows)
        towards = np.eye(len(rows))[np.argmax(slopes)]
        shares = 2 / (step + 2) * np.array([0.03, 0.1, 0.3, 1.0, 2.0])
        weights = max(
            [weights] + [(1 - a) * weights + a * towards for a in shares if a < 1],
            key=value,
        )
    return value(weights)


@pytest.mark.slow_cases
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("count", [None, 3.0])
def test_the_efficiency_is_never_more_than_the_true_one(seed, linear, count):
    """At every step, on random pools of several outputs, with a prior and without."""
    rng = np.random.default_rng(seed)
    d, rows = 4, rng.normal(size=(12, 2, 4))
    root = rng.normal(size=(d, d + 2))
    prior = root @ root.T / 4
    state = ff.Posterior(
        jnp.zeros(d), ff.structures.Full(jnp.asarray(prior)), jnp.ones(())
    )
    target = np.diag(rng.uniform(size=d)) if linear else None
    criterion = selection.information_gain()
    if linear:
        information = ff.structures.Full(jnp.asarray(target))
        criterion = selection.variance_reduction(information)
    model = lambda p, x: x @ p, ff.likelihoods.gaussian()
    known = prior if count else np.zeros((d, d))
    best = optimum(rows, known, count or 1.0, target)
    last = 0.0
    for num_steps in (1, 2, 5, 20, 100):
        found = selection.design(
            state,
            *model,
            jnp.asarray(rows),
            count,
            criterion=criterion,
            num_steps=num_steps,
            tolerance=1e-9,
        )
        matrix = known + (count or 1.0) * np.einsum(
            "n,nrd,nre->de", found.weights, rows, rows
        )
        value = np.linalg.slogdet(matrix)[1]
        true = np.exp((value - best) / d)
        if linear:
            value = np.trace(target @ np.linalg.inv(matrix))
            true = -best / value
        assert found.value == pytest.approx(value, rel=1e-9)
        assert found.efficiency <= true + 1e-9
        assert true >= last - 1e-9  # every step improves
        last = true
    assert found.efficiency > 0.9


@pytest.mark.slow_cases
@pytest.mark.parametrize(
    ("count", "efficiency"),
    [
        (3, 1.0),
        (4, 2 ** (1 / 3) / 4 * 3),
        (6, 1.0),
        (7, 12 ** (1 / 3) / 7 * 3),
    ],
)
def test_exact_designs_of_a_parabola(count, efficiency):
    state = state_of(3, 1e-7)
    found = selection.exchange(state, *MODEL, GRID, key=0, count=count)
    x = np.asarray(GRID)[np.asarray(found.indices)]
    rows = np.stack([np.ones_like(x), x, x**2], 1)
    reached = (np.linalg.det(rows.T @ rows) / (4 / 27)) ** (1 / 3) / count
    assert reached == pytest.approx(efficiency, abs=1e-4)
    whole = np.linalg.slogdet(rows.T @ rows + 1e-7 * np.eye(3))[1]
    whole = (whole - 3 * np.log(1e-7)) / 2
    np.testing.assert_allclose(found.gains.sum(), whole, rtol=1e-9)


@pytest.mark.slow_cases
@pytest.mark.parametrize("linear", [False, True])
def test_no_exchange_of_two_outputs_helps_any_more(linear):
    rng = np.random.default_rng(1)
    rows = rng.normal(size=(20, 2, 3))
    model = lambda p, x: x @ p, ff.likelihoods.gaussian()
    criterion = selection.information_gain()
    if linear:
        criterion = selection.variance_reduction()
    found = selection.exchange(
        state_of(3, 0.1), *model, jnp.asarray(rows), 0, 4, criterion=criterion
    )

    def worth(indices):
        matrix = 0.1 * np.eye(3) + sum(rows[i].T @ rows[i] for i in indices)
        if linear:
            return -np.trace(np.linalg.inv(matrix))
        return np.linalg.slogdet(matrix)[1] / 2

    chosen = found.indices.tolist()
    best = worth(chosen)
    np.testing.assert_allclose(found.gains.sum(), best - worth([]), rtol=1e-9)
    for place in range(4):
        for row in range(20):
            other = [*chosen[:place], row, *chosen[place + 1 :]]
            assert worth(other) <= best + 1e-9


def test_what_no_weights_determine_is_told():
    with pytest.raises(ValueError, match="undetermined"):
        selection.design(state_of(3), *MODEL, GRID[:2])
    found = selection.design(state_of(3), *MODEL, GRID[:2], 5.0)
    assert jnp.isfinite(found.value)
