"""The random walk is the Kalman filter, in every form of noise and transition."""

import numpy as np
import pytest

import fisherflow_jax as ff
import streams
from together import together

_root = np.random.default_rng(3).normal(size=(3, 3))
MATRIX = 0.1 * _root @ _root.T
MOVE = np.array([[0.9, 0.2, 0.0], [-0.1, 1.0, 0.3], [0.0, 0.1, 0.8]])
FORMS = {
    "number": (0.2, None, 0.2 * np.eye(3), np.eye(3)),
    "number-number": (0.2, 0.9, 0.2 * np.eye(3), 0.9 * np.eye(3)),
    "prefix-prefix": (
        {"level": 0.3, "slope": np.array([0.0, 0.2])},
        {"level": 0.5, "slope": 1.0},
        np.diag([0.3, 0.0, 0.2]),
        np.diag([0.5, 1.0, 1.0]),
    ),
    "matrix": (MATRIX, None, MATRIX, np.eye(3)),
    "matrix-matrix": (MATRIX, MOVE, MATRIX, MOVE),
}


def kalman(noise, move, inputs, targets, weights):
    """The textbook filter, covariance form; a weight divides the row's variance."""
    mean, covariance = streams.ORIGIN, np.eye(3) / streams.PRECISION
    beliefs, evidence = [], 0.0
    for rows in (slice(i, i + 4) for i in range(0, len(targets), 4)):
        mean, covariance = move @ mean, move @ covariance @ move.T + noise
        evidence += streams.predictive(mean, np.linalg.inv(covariance), rows)
        used = weights[rows] > 0
        design, observed = inputs[rows][used], targets[rows][used]
        errors = np.diag(streams.SCALE**2 / weights[rows][used])
        innovation = design @ covariance @ design.T + errors
        gain = np.linalg.solve(innovation, design @ covariance).T
        mean = mean + gain @ (observed - design @ mean)
        covariance = covariance - gain @ innovation @ gain.T
        beliefs.append((mean, covariance, evidence))
    return beliefs


def build(noise, transition, structure="full", **options):
    return ff.fisher_flow(
        streams.linear,
        ff.likelihoods.gaussian(streams.SCALE),
        structure=streams.STRUCTURES[structure],
        memory=ff.memories.random_walk(noise, transition),
        prior_precision=streams.PRECISION,
        **{"num_steps": 1} | options,
    )


@pytest.mark.slow_cases
@pytest.mark.parametrize(
    ("form", "options"),
    [(form, {}) for form in FORMS]
    + [("matrix-matrix", {"num_steps": 4}), ("matrix-matrix", {"compensated": True})],
    ids=str,
)
def test_mean_covariance_and_evidence_are_the_kalman_filters(form, options):
    noise, transition, *matrices = FORMS[form]
    flow = build(noise, transition, **options)
    states = streams.run(flow, streams.start(flow), streams.batches(4))
    expected = kalman(*matrices, streams.INPUTS, streams.TARGETS, streams.WEIGHTS)
    for state, (mean, covariance, evidence) in zip(states, expected, strict=True):
        np.testing.assert_allclose(streams.flat(state.mean), mean, rtol=1e-10)
        np.testing.assert_allclose(
            np.linalg.inv(streams.dense(state.information)),
            covariance,
            rtol=1e-10,
            atol=1e-11,
        )
        np.testing.assert_allclose(state.log_evidence, evidence, rtol=1e-10)


def test_without_noise_nothing_is_forgotten():
    flow = build(0.0, None)
    state = streams.run(flow, streams.start(flow), streams.batches(4))[-1]
    mean, information = streams.fit("stationary", 5)
    np.testing.assert_allclose(streams.flat(state.mean), mean, rtol=1e-10)
    np.testing.assert_allclose(
        streams.dense(state.information), information, rtol=1e-10
    )


@pytest.mark.parametrize(
    ("structure", "noise", "transition", "matrices", "pattern"),
    [
        (
            "diagonal",
            {"level": 0.1, "slope": np.array([0.0, 0.4])},
            {"level": 0.5, "slope": -0.9},
            (np.diag([0.1, 0.0, 0.4]), np.diag([0.5, -0.9, -0.9])),
            np.eye(3),
        ),
        (
            "block",
            np.array([[0.2, 0, 0], [0, 0.3, 0.1], [0, 0.1, 0.2]]),
            np.array([[0.7, 0, 0], [0, 0.9, 0.2], [0, -0.2, 0.9]]),
            None,
            np.array([[1.0, 0, 0], [0, 1, 2], [0, 1, -1]]),
        ),
    ],
    ids=["diagonal", "block"],
)
def test_structures_are_exact_where_the_information_has_them(
    structure, noise, transition, matrices, pattern
):
    """Each row sees one block only, so that the true filter keeps the structure."""
    inputs = np.tile(pattern, (8, 1)) * np.linspace(0.5, 2, 24)[:, None]
    flow = build(noise, transition, structure)
    state, beliefs = streams.start(flow), []
    for i in range(0, 24, 4):
        batch = (inputs[i : i + 4], streams.TARGETS[i : i + 4])
        state, _ = flow.update(state, batch)
        beliefs.append((streams.flat(state.mean), streams.dense(state.information)))
    noise, transition = (noise, transition) if matrices is None else matrices
    expected = kalman(noise, transition, inputs, streams.TARGETS, np.ones(24))
    for (mean, information), (m, covariance, _) in zip(beliefs, expected, strict=True):
        np.testing.assert_allclose(mean, m, rtol=1e-10)
        np.testing.assert_allclose(np.linalg.inv(information), covariance, atol=1e-11)


def test_scalar_is_exact_where_the_information_is_isotropic():
    inputs = np.tile(np.eye(3), (8, 1))
    flow = build(0.2, 0.9, "scalar")
    state = streams.start(flow)
    mean, precision = streams.ORIGIN, streams.PRECISION
    for i in range(0, 24, 3):
        targets = streams.TARGETS[i : i + 3]
        state, _ = flow.update(state, (inputs[i : i + 3], targets))
        mean, predicted = 0.9 * mean, 1 / (0.81 / precision + 0.2)
        precision = predicted + 1 / streams.SCALE**2
        mean = mean + (targets - mean) / streams.SCALE**2 / precision
        np.testing.assert_allclose(streams.flat(state.mean), mean, rtol=1e-12)
        np.testing.assert_allclose(state.information.value, precision, rtol=1e-12)


def test_missing_batches_move_the_belief_also_before_any_data():
    flow = build(0.2, 0.5)
    state = streams.start(flow)
    inputs, targets, _ = streams.batches(4)[0]
    for time in (1, 2):
        state, info = flow.update(state, (inputs, targets, np.zeros(4)))
        assert info.missing
        expected = 0.5**time * streams.ORIGIN
        np.testing.assert_allclose(streams.flat(state.mean), expected)
    variance = 0.25 * (0.25 / streams.PRECISION + 0.2) + 0.2
    np.testing.assert_allclose(
        streams.dense(state.information), np.eye(3) / variance, atol=1e-12
    )


@together
@pytest.mark.parametrize(
    ("structure", "noise", "transition", "message"),
    [
        ("block", MATRIX, None, "process_noise couples parameters of different blocks"),
        ("block", 0.1, MOVE, "transition couples parameters of different blocks"),
        ("diagonal", MATRIX, None, "diagonal structure process_noise must be a number"),
        ("diagonal", 0.1, MOVE, "diagonal structure transition must be a number"),
        (
            "scalar",
            {"level": 1.0, "slope": 2.0},
            None,
            "scalar structure process_noise",
        ),
        ("scalar", 0.1, {"level": 1.0, "slope": 2.0}, "scalar structure transition"),
        ("full", np.eye(2), None, r"must be \(d, d\) = \(3, 3\)"),
        ("full", {"level": 1.0}, None, "process_noise must be a pytree prefix"),
        ("full", 0.1, {"level": np.ones(2), "slope": 1.0}, "transition must hold"),
    ],
)
def test_what_would_leave_the_structure_is_refused(
    structure, noise, transition, message
):
    flow = build(noise, transition, structure)
    with pytest.raises(ValueError, match=message):
        flow.update(streams.start(flow), streams.batches(4)[0])


@pytest.mark.parametrize(
    ("noise", "message"),
    [
        (-0.1, "at least 0"),
        (np.nan, "finite"),
        ({"level": 0.1, "slope": -1.0}, "at least 0"),
        # inside a tree an array of two axes is variances, not a matrix
        ({"kernel": np.array([[1.0, -1.0], [-1.0, 1.0]])}, "at least 0"),
        (np.array([[1.0, 0.5], [0.0, 1.0]]), "symmetric"),
        (np.array([[1.0, 2.0], [2.0, 1.0]]), "positive semi-definite"),
    ],
)
def test_a_noise_that_is_no_variance_is_refused(noise, message):
    with pytest.raises(ValueError, match=message):
        ff.memories.random_walk(noise)
