"""What is no array of numbers is refused in words that say what to do."""

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from jax.experimental import sparse
from scipy.sparse import csr_matrix

import fisherflow_jax as ff
from together import together

ROWS, TARGETS = np.ones((4, 2)), np.array([0.0, 1.0, 0.0, 1.0])
TABLE = pd.DataFrame({"dose": np.arange(4.0), "age": np.arange(4)})
TEXT = np.array(list("abab"))
PLACES = np.stack(np.indices((4, 2)).reshape(2, -1), axis=1)
SPARSE = sparse.BCOO((ROWS.ravel(), PLACES), shape=(4, 2))
LOSS = ff.negative_log_likelihood(lambda w, x: x @ w, ff.likelihoods.bernoulli())
FLOW = ff.fisher_flow(lambda w, x: x @ w, ff.likelihoods.bernoulli())


@together
@pytest.mark.parametrize(
    ("inputs", "targets", "message"),
    [
        (ROWS, TEXT, "targets are not numbers but <U1: code labels as numpy.unique"),
        (ROWS, TEXT.astype(object), "targets are not numbers but object"),
        (ROWS, list("abab"), "targets are a list.*numpy.asarray"),
        (ROWS, "abab", "targets are not numbers but <U4"),
        (ROWS, np.array(["2020-01-01"] * 4, "M8[D]"), r"not numbers but datetime64\[D"),
        (ROWS.tolist(), TARGETS, "inputs are a list, .* numpy.asarray"),
        (TABLE.assign(age=True), TARGETS, r"columns .*numbers: 'age' \(bool\). Code"),
        (TABLE.assign(sex=TEXT), TARGETS, r"columns .*numbers: 'sex' \(.*get_dummies"),
        (TABLE.assign(day=pd.Timestamp(0)), TARGETS, r"'day' \(datetime64.*of days"),
        (TABLE.astype("Int64"), TARGETS, r"'dose' \(Int64\), 'age' \(Int64\)"),
        ({"x": csr_matrix(ROWS)}, TARGETS, r"sparse matrix \(csr_matrix\).*toarray"),
        (SPARSE, TARGETS, r"sparse matrix \(BCOO\).*todense"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_no_array_of_numbers(inputs, targets, message):
    with pytest.raises(TypeError, match=f"the batch's .*{message}"):
        LOSS(jnp.zeros(2), (inputs, targets))


@pytest.mark.slow
@together
@pytest.mark.parametrize(
    "inputs",
    [TABLE, TABLE > 1, ff.Shared(SPARSE), [ROWS, ROWS]],
    ids=["table", "table of truth values", "sparse and shared", "list of arrays"],
)
def test_what_is_one_passes(inputs):
    loss = ff.negative_log_likelihood(
        lambda w, x: jnp.zeros(4) + jnp.sum(w), ff.likelihoods.bernoulli()
    )
    assert np.isfinite(loss(jnp.zeros(2), (inputs, TARGETS)))


@pytest.mark.parametrize(
    "run", [FLOW.update, jax.jit(FLOW.update)], ids=["eager", "jit"]
)
def test_an_error_of_the_model_tells_the_shapes(run):
    state = FLOW.init(jnp.zeros(2))
    with pytest.raises(TypeError, match="contracting") as raised:
        run(state, (np.ones((4, 3)), TARGETS))
    told = (
        "apply_fn(params, inputs) with params of shapes (2,) and inputs of shapes (4,"
    )
    assert str(raised.value).startswith(told)
