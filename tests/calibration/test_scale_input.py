"""What ff.calibrate refuses, and what it says."""

import numpy as np
import pytest

import fisherflow_jax as ff
from together import together

X = np.arange(12.0).reshape(6, 2) / 10
STATE = ff.Posterior(
    np.ones((2, 3)), ff.structures.Diagonal(np.ones((2, 3))), np.ones(())
)
LABELS = np.array([0, 1, 2, 0, 1, 2])


def changed(array, place, value):
    array = array.copy()
    array[place] = value
    return array


def apply_fn(params, x):
    return x @ params


@together
@pytest.mark.parametrize(
    "data, text",
    [
        ((X[:0], LABELS[:0]), "must not be empty"),
        ([], "no batches"),
        ((X, LABELS, np.zeros(6)), "the weight of every example is zero"),
        ((X, changed(LABELS, 2, 3)), "batch 0 holds targets that categorical cannot"),
        ((X, changed(LABELS, 2, -1)), "targets that categorical cannot produce"),
        ((changed(X, (1, 0), np.nan), LABELS), "NaN or an infinite value"),
        ((changed(X, (1, 0), np.inf), LABELS), "NaN or an infinite value"),
        ((X, None), "needs targets"),
        ((X, LABELS[:4]), "agree in their leading axis"),
        ((X, LABELS.astype(float)), "targets must be integer classes"),
        (X, "a list or another iterable of batches"),
    ],
)
def test_data(data, text):
    with pytest.raises(ValueError, match=text):
        ff.calibrate(STATE, apply_fn, ff.likelihoods.categorical(), data)


def test_outputs_that_are_not_finite():
    singular = STATE._replace(information=ff.structures.Diagonal(np.zeros((2, 3))))
    with pytest.raises(ValueError, match="not finite"):
        ff.calibrate(singular, apply_fn, ff.likelihoods.categorical(), (X, LABELS))


def test_no_noise():
    targets = apply_fn(STATE.mean, X)
    with pytest.raises(ValueError, match="predicts every validation target exactly"):
        ff.calibrate(STATE, apply_fn, ff.likelihoods.gaussian(), (X, targets))


def test_a_bank():
    bank = ff.bank(
        [
            ff.fisher_flow(
                apply_fn,
                ff.likelihoods.categorical(),
                structure=ff.structures.diagonal(),
                memory=ff.memories.stationary(),
            )
        ]
        * 2
    )
    state = bank.init(STATE.mean)
    with pytest.raises(TypeError, match=r"one of state\.members"):
        ff.calibrate(state, apply_fn, ff.likelihoods.categorical(), (X, LABELS))


@pytest.mark.slow
def test_a_batch_of_padding_alone():
    """What stands in for its rows need not be finite in every model."""

    def singular(params, x):
        return apply_fn(params, x) / (x[:, :1] - 1)

    likelihood, rows = ff.likelihoods.categorical(), X / 2
    padding = (rows, LABELS, np.zeros(6))
    alone = ff.calibrate(STATE, singular, likelihood, (rows, LABELS))
    found = ff.calibrate(STATE, singular, likelihood, [(rows, LABELS), padding])
    assert abs(found.after - alone.after) < 1e-12
    assert abs(found.scale / alone.scale - 1) < 1e-6
