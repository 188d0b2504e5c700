"""The printed table and its names; its numbers are in test_regressions."""

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import fisherflow_jax as ff


@pytest.fixture
def state(belief):
    mean = {"a": jnp.asarray(1.0), "b": {"w": jnp.array([[-0.25, 20.0]])}}
    precision = {"a": jnp.asarray(4.0), "b": {"w": jnp.array([[100.0, 0.04]])}}
    return belief(mean, ff.structures.Diagonal(precision), count=jnp.asarray(12.0))


@pytest.fixture
def unknown(state):
    return state._replace(
        dispersion=jnp.asarray(2.25),
        degrees_of_freedom=jnp.asarray(4.5),
        meat=state.information,
    )


def test_printed_table(state):
    expected = """\
          estimate  std. error       z  P>|z|  90% lower  90% upper
-------------------------------------------------------------------
a           1.0000      0.5000   2.000  0.046     0.1776     1.8224
b.w[0,0]   -0.2500      0.1000  -2.500  0.012    -0.4145    -0.0855
b.w[0,1]   20.0000      5.0000   4.000  0.000    11.7757    28.2243
-------------------------------------------------------------------
observations 12"""
    table = ff.summary(state, level=0.9)
    assert str(table) == repr(table) == expected


def test_printed_table_with_an_unknown_dispersion(unknown):
    expected = """\
   estimate  std. error       t  P>|t|  95% lower  95% upper
------------------------------------------------------------
a    1.0000      0.7500   1.333  0.246    -0.9942     2.9942
b   -0.2500      0.1500  -1.667  0.163    -0.6488     0.1488
c   20.0000      7.5000   2.667  0.050     0.0582    39.9418
------------------------------------------------------------
observations 12, dispersion 2.25 on 4.5 df"""
    assert str(ff.summary(unknown, names=["a", "b", "c"])) == expected


def test_small_and_large_numbers_keep_their_digits(belief):
    mean = jnp.array([1.23456e-5, 7654321.0, 0.0])
    state = belief(mean, ff.structures.Diagonal(jnp.array([1e12, 1e-8, 1.0])))
    lines = str(ff.summary(state)).splitlines()
    assert lines[2].split()[:3] == ["theta[0]", "1.235e-05", "1e-06"]
    assert lines[3].split()[:3] == ["theta[1]", "7.654e+06", "10000.0000"]
    assert lines[4].split()[:3] == ["theta[2]", "0.0000", "1.0000"]
    assert lines[-1] == "-" * len(lines[0])  # no notes: nothing is known of the data


@pytest.mark.parametrize(
    "count, printed", [(7.0, "7"), (1234567.0, "1234567"), (49.3837, "49.4")]
)
def test_counts_are_printed_in_full(state, count, printed):
    table = ff.summary(state._replace(count=jnp.asarray(count)))
    assert table.notes == [f"observations {printed}"]


def test_notes_say_robust(unknown):
    note = (
        "observations 12, dispersion 2.25 on 4.5 df, robust (sandwich) standard errors"
    )
    assert ff.summary(unknown, robust=True).notes == [note]


@pytest.mark.parametrize(
    "names",
    [
        ["x", "y", "z"],
        ("x", "y", "z"),
        np.array(["x", "y", "z"]),  # as feature_names of scikit-learn
        {"a": "x", "b": {"w": [["y", "z"]]}},
        {"a": "x", "b": {"w": np.array([["y", "z"]])}},
    ],
    ids=["list", "tuple", "array", "pytree", "pytree of arrays"],
)
def test_names(state, names):
    table = ff.summary(state, names)
    assert table.names == ["x", "y", "z"]
    assert [line.split()[0] for line in str(table).splitlines()[2:5]] == table.names


def test_names_of_pandas_columns(state):
    pandas = pytest.importorskip("pandas")
    assert ff.summary(state, pandas.Index(["x", "y", "z"])).names == ["x", "y", "z"]


def test_default_names(state, belief):
    assert ff.summary(state).names == ["a", "b.w[0,0]", "b.w[0,1]"]
    pair = belief((jnp.zeros(1), jnp.asarray(0.0)), ff.structures.Scalar(jnp.ones(())))
    assert ff.summary(pair).names == ["0[0]", "1"]


@pytest.mark.parametrize("names", [["x"], ["x"] * 4, "xyz", []])
def test_wrong_number_of_names(state, names):
    count = 1 if isinstance(names, str) else len(names)
    with pytest.raises(ValueError, match=rf"one a parameter \(3\); got {count}"):
        ff.summary(state, names)


def test_columns_of_a_bank(state):
    other = state._replace(mean={"a": jnp.asarray(3.0), "b": state.mean["b"]})
    bank = ff.BankState((state, other), jnp.log(jnp.array([0.5, 0.5])))
    table = ff.summary(bank)
    np.testing.assert_allclose(table.estimate, [2.0, -0.25, 20.0])
    error = np.array([np.sqrt(0.25 + 1.0), 0.1, 5.0])
    np.testing.assert_allclose(table.standard_error, error)
    p_value = 2 * stats.norm.sf(np.abs(table.estimate / error))
    np.testing.assert_allclose(table.p_value, p_value)
    assert table.statistic_name == "z" and table.notes == []
