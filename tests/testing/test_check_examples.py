"""`check_examples`: which rows of a batch are not those of single examples."""

import jax
import numpy as np
import pytest

import fisherflow_jax as ff
from interacting_models import MODELS, PARAMS, RECEIVERS, SENDERS, X

check = ff.testing.check_examples


def test_rows_that_differ_are_named():
    with pytest.raises(
        AssertionError, match=r"6 of 6 rows.*rows 0, 1, 2, 3, 4, \.\.\."
    ):
        check(MODELS["roll"].apply_fn, PARAMS, X)

    def of_two(params, x):  # the second example has a term of the first
        return x.at[1].add(x[0]) @ params["w"]

    with pytest.raises(AssertionError, match=r"1 of 6 rows.*\(rows 1\)"):
        check(of_two, PARAMS, X)


def test_what_one_example_fails_with_is_told():
    segments = MODELS["graph, segments"].apply_fn
    assert len(SENDERS) == len(RECEIVERS)
    with pytest.raises(AssertionError, match=r"outputs of shape \(6, 2\)"):
        check(segments, PARAMS, X)
    with pytest.raises(AssertionError, match="fails on one example alone"):
        check(MODELS["pairs"].apply_fn, PARAMS, X)


def test_models_of_single_examples_pass():
    shared = {"x": X, "center": ff.Shared(X.mean(0))}
    check(lambda p, x: np.tanh(1) * (x @ p["w"]), PARAMS, X)
    check(lambda p, i: (i["x"] - i["center"]) @ p["w"], PARAMS, shared)
    # a row that is not finite is the same alone
    check(lambda p, x: (x / 0) @ p["w"], PARAMS, X)


def test_what_tells_nothing_is_refused():
    def first(params, x):
        return params["w"][x - x[:1]]

    with pytest.raises(ValueError, match="are all alike"):
        check(lambda p, x: p["w"][x], PARAMS, np.zeros((3, 2), int))
    with pytest.raises(ValueError, match="two or more examples"):
        check(first, PARAMS, np.zeros((1, 2), int))
    with pytest.raises(ValueError, match="not known in jit"):
        jax.jit(lambda x: check(first, PARAMS, x))(X)
