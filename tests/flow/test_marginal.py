"""Batches solved in full, their marginals kept: inverse-variance weighting."""

import jax
import numpy as np
import pytest

import fisherflow_jax as ff

D, N, PRECISION, SCALE = 4, 100, 0.2, 0.7
ORIGIN = np.array([1.0, 0.0, -1.0, 2.0])
GROUPS = {"scalar": None, "diagonal": [[0], [1], [2], [3]], "block": [[0, 1], [2, 3]]}
_rng = np.random.default_rng(0)
_root = np.linalg.cholesky(0.1 * np.eye(D) + 0.9)  # correlation .9
BATCHES = []
for _ in range(5):
    inputs = _rng.normal(size=(N, D)) @ _root.T
    BATCHES.append((inputs, inputs @ [1.0, 2, 3, 4] + SCALE * _rng.normal(size=N)))


def names(path):
    return "first" if path in ("a", "b") else "second"


STRUCTURES = {
    "scalar": ff.structures.scalar(),
    "diagonal": ff.structures.diagonal(),
    "block": ff.structures.block(names),
}


def tree(flat):
    return dict(zip("abcd", np.asarray(flat, float), strict=True))


def flat(params):
    return np.array([params[name] for name in "abcd"])


def build(structure, num_steps=1):
    return ff.fisher_flow(
        lambda p, x: x @ jax.numpy.stack([p[name] for name in "abcd"]),
        ff.likelihoods.gaussian(SCALE),
        structure=STRUCTURES[structure],
        memory=ff.memories.stationary(),
        prior_precision=PRECISION,
        num_steps=num_steps,
        marginal=True,
        robust=True,
    )


def marginal_precision(structure, covariance):
    if structure == "scalar":
        return np.eye(D) / np.mean(np.diag(covariance))
    kept = np.zeros((D, D))
    for group in GROUPS[structure]:
        block = np.ix_(group, group)
        kept[block] = np.linalg.inv(covariance[block])
    return kept


@pytest.mark.slow_cases
@pytest.mark.parametrize(
    ("structure", "num_steps"), [("scalar", 1), ("diagonal", 4), ("block", 1)]
)
def test_the_mean_is_the_precision_weighted_average_of_the_batches(
    structure, num_steps
):
    flow = build(structure, num_steps)
    state = flow.init(tree(np.zeros(D)), tree(ORIGIN))
    information = PRECISION * np.eye(D)
    moment = information @ ORIGIN
    meat = np.zeros((D, D))
    mean = None
    for inputs, targets in BATCHES:
        state, info = flow.update(state, (inputs, targets))
        own = np.linalg.inv(inputs.T @ inputs / SCALE**2)
        solution = own @ inputs.T @ targets / SCALE**2
        weight = marginal_precision(structure, own)
        at = solution_of_first(inputs, targets) if mean is None else mean
        scores = inputs * ((targets - inputs @ at) / SCALE**2)[:, None]
        spread = own @ scores.T @ scores @ own
        meat += weight @ kept_part(structure, spread) @ weight
        information = information + weight
        moment = moment + weight @ solution
        mean = np.linalg.solve(information, moment)
        np.testing.assert_allclose(flat(state.mean), mean, rtol=1e-8)
        like = tree(ORIGIN)
        np.testing.assert_allclose(
            ff.information.to_dense(state.information, like), information, rtol=1e-8
        )
        np.testing.assert_allclose(
            ff.information.to_dense(state.meat, like), meat, rtol=1e-6, atol=1e-9
        )


def solution_of_first(inputs, targets):
    """Where the first batch's scores are taken: its mode under the prior."""
    information = inputs.T @ inputs / SCALE**2 + PRECISION * np.eye(D)
    moment = inputs.T @ targets / SCALE**2 + PRECISION * ORIGIN
    return np.linalg.solve(information, moment)


def kept_part(structure, matrix):
    if structure == "scalar":
        return np.eye(D) * np.mean(np.diag(matrix))
    kept = np.zeros((D, D))
    for group in GROUPS[structure]:
        block = np.ix_(group, group)
        kept[block] = matrix[block]
    return kept


def test_a_batch_of_too_few_rows_says_next_to_nothing():
    flow = build("diagonal", 4)
    start = flow.init(tree(np.zeros(D)), tree(ORIGIN))
    inputs, targets = BATCHES[0]
    state, info = flow.update(start, (inputs[:2], targets[:2]))
    assert not info.skipped
    np.testing.assert_allclose(flat(state.mean), ORIGIN, atol=1e-3)
    np.testing.assert_allclose(flat(state.information.entries), PRECISION, rtol=1e-3)


def test_a_missing_batch_adds_nothing():
    flow = build("diagonal", 4)
    start = flow.init(tree(np.zeros(D)), tree(ORIGIN))
    state, info = flow.update(start, (*BATCHES[0], np.zeros(N)))
    assert info.missing and not info.skipped
    np.testing.assert_array_equal(flat(state.information.entries), PRECISION)
    np.testing.assert_array_equal(flat(state.mean), ORIGIN)
