"""Why data do not determine a direction, on data made by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

import fisherflow_jax as ff

RNG = np.random.default_rng(3)
PRIOR = 1e-6


def linear(params, x):
    return x @ params


def state_at_mode(slopes, likelihood_of, prior=PRIOR):
    """By Newton's method in numpy; `likelihood_of(outputs)`: score and information."""
    count = slopes.shape[-1]
    design, mean = slopes.reshape(-1, count), np.zeros(count)
    for _ in range(60):
        score, information = likelihood_of((design @ mean).reshape(slopes.shape[:-1]))
        matrix = np.einsum("ncd,nce,nef->df", slopes, information, slopes)
        slope = design.T @ score.ravel() - prior * mean
        step = np.linalg.solve(matrix + prior * np.eye(count), slope)
        mean = mean + step / max(1.0, np.abs(design @ step).max())
    kept = ff.structures.Full(jnp.asarray(matrix))
    return ff.posterior(jnp.asarray(mean), kept, prior_precision=prior)


def of_classes(labels):
    def both(outputs):
        p = np.exp(outputs - outputs.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        return np.eye(p.shape[1])[labels] - p, (
            p[:, :, None] * np.eye(p.shape[1]) - p[:, :, None] * p[:, None]
        )

    return both


def of_counts(counts):
    def both(outputs):
        rates = np.exp(outputs)
        return counts[:, None] - rates, rates[:, :, None]

    return both


def kinds(state, *with_data):
    found = ff.diagnostics.undetermined(state, *with_data)
    return {direction.name: direction.reason for direction in found}


@pytest.fixture(scope="module")
def logistic():
    """A group of one outcome, a column of zeros, and one that is there twice."""
    x = np.column_stack([np.ones(80), RNG.normal(size=80), np.arange(80) < 15])
    x = np.column_stack([x, np.zeros(80), x[:, 1]])
    y = np.where(x[:, 2] == 1, 1.0, RNG.random(80) < 0.5)
    slopes = np.stack([0 * x, x], 1)
    return state_at_mode(slopes, of_classes(y.astype(int))), x, y


def test_separation_zeros_and_columns_that_are_there_twice(logistic):
    state, x, y = logistic
    model = linear, ff.likelihoods.bernoulli()
    expected = {
        "theta[3]": "no output responds",
        "theta[1] - theta[4]": "collinear",
        "theta[2]": "separation",
    }
    assert kinds(state, *model, (x, y)) == expected
    halves = [(x[::2], y[::2]), (x[1::2], y[1::2])]
    assert kinds(state, *model, halves) == expected
    # by the state alone: a share, and no reason
    assert kinds(state)["theta[2]"].startswith("little data")
    # one row of the group that contradicts the others, and it is but little data
    y = np.where(np.arange(80) == 0, 0.0, y)
    assert kinds(state, *model, (x, y))["theta[2]"].startswith("little data")
    # it does not count
    seen = (x, y, np.arange(80) != 0)
    assert kinds(state, *model, seen)["theta[2]"] == "separation"


def test_the_table_prints_them(logistic):
    state, x, y = logistic
    model = linear, ff.likelihoods.bernoulli()
    found = ff.diagnostics.undetermined(state, *model, (x, y))
    with pytest.warns(ff.DataWarning, match="separation"):
        table = ff.summary(state, undetermined=found)
    assert "theta[2] (separation)" in str(table).splitlines()[-1]


def test_separation_is_that_of_a_combination():
    """Complete, by a line that is no column's: no parameter is then determined."""
    x = RNG.normal(size=(40, 2))
    margin = x @ [1.0, 1.0]
    x = x + 0.3 * np.sign(margin)[:, None]
    y = (margin > 0).astype(float)
    assert any(len(set(y[x[:, k] > 0])) == 2 for k in (0, 1))
    state = state_at_mode(np.stack([0 * x, x], 1), of_classes(y.astype(int)))
    found = kinds(state, linear, ff.likelihoods.bernoulli(), (x, y))
    assert found and set(found.values()) == {"separation"}


def test_an_empty_cell_and_one_of_few_counts():
    cells = np.eye(3)[np.arange(60) % 3]
    counts = np.where(cells[:, 1] == 1, 0.0, RNG.poisson(3.0, 60))
    state = state_at_mode(cells[:, None], of_counts(counts))
    data = linear, ff.likelihoods.poisson(), (cells, counts)
    assert kinds(state, *data) == {
        "theta[1]": "an empty cell: 20 rows, all of them zero"
    }
    one = np.where((cells[:, 0] == 1) & (np.arange(60) > 0), 0.0, counts)
    state = state_at_mode(cells[:, None], of_counts(one), prior=2.0)
    found = kinds(state, *data[:2], (cells, one))
    assert found["theta[0]"].startswith("little data")


@pytest.mark.parametrize("seen", [3, 2])
def test_a_class_that_is_never_seen(seen):
    """Without a reference class a constant added to all logits changes nothing."""
    x = np.column_stack([np.ones(60), RNG.normal(size=60)])
    labels = RNG.integers(0, seen, 60)
    slopes = np.einsum("ni,cj->ncij", x, np.eye(3)).reshape(60, 3, 6)
    state = state_at_mode(slopes, of_classes(labels))

    def model(params, x):
        return x @ params.reshape(2, 3)

    found = kinds(state, model, ff.likelihoods.categorical(), (x, labels))
    if seen == 3:
        names = [f"theta[{k}] + theta[{k + 1}] + theta[{k + 2}]" for k in (0, 3)]
        assert found == dict.fromkeys(names, "collinear")
    else:
        assert {"theta[2]", "theta[5]"} < set(found)
        assert set(found.values()) == {"class 2 is never seen"}


@pytest.mark.slow
def test_errors_say_what_is_missing(logistic):
    state, x, y = logistic
    model = linear, ff.likelihoods.bernoulli()
    with pytest.raises(ValueError, match="give apply_fn, likelihood and batches"):
        ff.diagnostics.undetermined(state, *model)
    with pytest.raises(TypeError, match="likelihood stands after apply_fn"):
        ff.diagnostics.undetermined(state, linear, None, (x, y))
