"""With an unknown dispersion: residuals, dispersion and evidence, in every memory."""

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, stats

import fisherflow_jax as ff
import streams

CASES = [
    ("stationary", {}),
    ("stationary", {"num_steps": 4}),
    ("exponential", {}),
    ("unfloored", {}),
    ("windowed", {}),
]
every_case = pytest.mark.parametrize(
    ("memory", "options"), CASES, ids=[f"{m}-{'-'.join(o)}" for m, o in CASES]
)


def penalised_squares(memory, last, time=None):
    """The least value of the weighted, penalised sum of squares."""
    squares, offset, prior, information, count = parts(memory, last, time)
    return squares + prior * offset @ offset, information, count


def parts(memory, last, time=None):
    """The data's own squares at the mean, how far that is from the prior's, the prior
    precision that is left, the information, the count."""
    time = last if time is None else time
    prior, faded = streams.memory_weights(memory, last, time)
    mean, information = streams.fit(memory, last, time, scale=1.0)
    rows = slice(0, 4 * (last + 1))
    errors = streams.TARGETS[rows] - streams.INPUTS[rows] @ mean
    weights = streams.WEIGHTS[rows] * np.repeat(faded, 4)
    squares = weights @ errors**2
    offset = mean - streams.ORIGIN
    return squares, offset, prior * streams.PRECISION, information, weights.sum()


def estimate(squares, offset, prior, information, count):
    """The dispersion and its degrees of freedom, by the guide's formula."""
    held = prior * np.linalg.inv(information)
    spare = count - len(offset) + np.trace(held @ held)
    squares = squares - prior * offset @ held @ offset
    return (squares / spare if spare > 0 else np.nan), spare


@pytest.mark.slow_cases
@every_case
def test_mean_and_information_are_in_units_of_the_dispersion(memory, options):
    states = streams.history(memory, "unknown", **options)
    for time, state in enumerate(states):
        mean, information = streams.fit(memory, time, scale=1.0)
        np.testing.assert_allclose(streams.flat(state.mean), mean, rtol=1e-10)
        np.testing.assert_allclose(
            streams.dense(state.information), information, rtol=1e-10, atol=1e-10
        )


@every_case
def test_the_residual_is_the_penalised_sum_of_squares(memory, options):
    states = streams.history(memory, "unknown", **options)
    for time, state in enumerate(states):
        squares, information, count = penalised_squares(memory, time)
        np.testing.assert_allclose(state.residual, squares, rtol=1e-10)
        own, offset, prior, _, _ = parts(memory, time)
        np.testing.assert_allclose(state.own_residual, own, rtol=1e-10)
        expected, spare = estimate(own, offset, prior, information, count)
        np.testing.assert_allclose(state.degrees_of_freedom, spare, rtol=1e-10)
        np.testing.assert_allclose(state.dispersion, expected, rtol=1e-10)
        # the one of former versions, as the changelog has it
        used = ff.information.effective(
            state.information, state.prior.precision, state.mean
        )
        held = prior * np.trace(np.linalg.inv(information))
        former = squares / (count - 3 + held)
        np.testing.assert_allclose(state.residual / (state.count - used), former)


@pytest.mark.slow_cases
@every_case
def test_the_evidence_integrates_over_the_dispersion(memory, options):
    """By quadrature of the definition, batch by batch."""
    states = streams.history(memory, "unknown", **options)

    def joint(log_dispersion, time, upto):
        """log p(data remembered, dispersion), at a dispersion, prior 1 / dispersion."""
        dispersion = np.exp(log_dispersion)
        if upto < 0:
            return 0.0
        squares, information, count = penalised_squares(memory, upto, time)
        return -0.5 * (count * log_dispersion + squares / dispersion)

    def log_integral(time, upto):
        if upto < 0:
            return 0.0
        peak = max(joint(z, time, upto) for z in np.linspace(-8, 8, 401))
        value, _ = integrate.quad(
            lambda z: np.exp(joint(z, time, upto) - peak), -25, 25, limit=400
        )
        return peak + np.log(value)

    total = 0.0
    for time, state in enumerate(states):
        weight = streams.WEIGHTS[4 * time : 4 * time + 4].sum()
        before = streams.predict(memory, time, scale=1.0)[1]
        after = streams.fit(memory, time, scale=1.0)[1]
        total += log_integral(time, time) - log_integral(time, time - 1)
        total += 0.5 * (np.linalg.slogdet(before)[1] - np.linalg.slogdet(after)[1])
        total -= 0.5 * weight * np.log(2 * np.pi)
        np.testing.assert_allclose(state.log_evidence, total, rtol=1e-7)


def test_evidence_compares_priors_exactly():
    """The differences of log-evidence are those of the closed-form integral."""
    flow = streams.flow("full", "stationary", "unknown")
    # the closed form: a multivariate Student t of n - 0 degrees, prior 1 / dispersion
    values, expected = [], []
    for precision in (0.05, 7.0):
        state = streams.start_with(precision, "full", "stationary", "unknown")
        state = streams.run(flow, state, streams.batches(4))[-1]
        values.append(float(state.log_evidence))
        often = streams.WEIGHTS.astype(int)
        inputs = np.repeat(streams.INPUTS, often, axis=0)
        targets = np.repeat(streams.TARGETS, often)
        shape = np.eye(len(targets)) + inputs @ inputs.T / precision
        error = targets - inputs @ streams.ORIGIN
        form = error @ np.linalg.solve(shape, error)
        half = len(targets) / 2
        expected.append(-0.5 * np.linalg.slogdet(shape)[1] - half * np.log(form))
    np.testing.assert_allclose(
        values[0] - values[1], expected[0] - expected[1], rtol=1e-10
    )


@pytest.mark.parametrize("memory", ["stationary", "exponential", "windowed"])
def test_under_a_diffuse_prior_the_dispersion_is_rss_over_n_minus_d(memory):
    flow = streams.flow("full", memory, "unknown")
    state = streams.start_with(1e-13, "full", memory, "unknown")
    state = streams.run(flow, state, streams.batches(4))[-1]
    weights = streams.WEIGHTS * np.repeat(streams.memory_weights(memory, 5, 5)[1], 4)
    root = np.sqrt(weights)
    _, squares, _, _ = np.linalg.lstsq(
        streams.INPUTS * root[:, None], streams.TARGETS * root
    )
    expected = squares[0] / (weights.sum() - 3)
    np.testing.assert_allclose(state.dispersion, expected, rtol=1e-9)
    # and intervals are those of Student's t
    error = np.sqrt(
        expected * np.diag(np.linalg.inv((streams.INPUTS.T * weights) @ streams.INPUTS))
    )
    lower, upper = ff.confidence_interval(state, level=0.9)
    half = stats.t.isf(0.05, weights.sum() - 3) * error
    np.testing.assert_allclose(streams.flat(upper), streams.flat(state.mean) + half)
    np.testing.assert_allclose(streams.flat(lower), streams.flat(state.mean) - half)


def test_a_forgotten_prior_never_adds_degrees_of_freedom():
    """Without a floor what is left of the prior fades as the data do."""
    flow = streams.flow("full", "unfloored", "unknown")
    state = streams.start_with(50.0, "full", "unfloored", "unknown")
    state = streams.run(flow, state, streams.batches(4))[-1]
    assert np.trace(np.linalg.inv(streams.dense(state.information))) * 50.0 > 3
    left = 50.0 * streams.DECAY**6
    held = left * np.linalg.inv(streams.dense(state.information))
    assert np.trace(held) < 3
    spare = state.count - 3 + np.trace(held @ held)
    np.testing.assert_allclose(state.degrees_of_freedom, spare)


def test_without_spare_observations_the_dispersion_is_nan_and_says_so():
    flow = streams.flow("full", "stationary", "unknown")
    state = streams.start(flow)
    assert np.isnan(state.dispersion)
    with pytest.raises(ValueError, match="dispersion is unknown and cannot"):
        ff.standard_error(state)


@pytest.mark.slow
def test_each_target_of_an_example_is_an_observation_of_the_dispersion():
    noise = np.random.default_rng(4).normal(size=(60, 3))
    flow = ff.fisher_flow(
        lambda params, x: x[:, None] * params[None],
        ff.likelihoods.gaussian(scale=None),
        structure=ff.structures.full(),
        memory=ff.memories.stationary(),
        prior_precision=1e-10,
    )
    batch = (jnp.ones(60), jnp.asarray(2.0 * noise))
    state, _ = flow.update(flow.init(jnp.zeros(3)), batch)
    squares = np.sum((2.0 * (noise - noise.mean(0))) ** 2)
    np.testing.assert_allclose(state.dispersion, squares / (180 - 3), rtol=1e-8)
    refined = ff.refine(flow, state, [batch])
    np.testing.assert_allclose(refined.dispersion, state.dispersion, rtol=1e-8)
