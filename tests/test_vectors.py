"""Pytrees seen as vectors: their order, their types, prefixes and keys."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import structure_cases as cases
from fisherflow_jax import vectors

VECTOR = cases.tree(np.arange(15.0))


def test_the_order_is_that_of_jax():
    np.testing.assert_array_equal(vectors.ravel(VECTOR), ravel_pytree(VECTOR)[0])
    assert vectors.size(VECTOR) == 15


@pytest.mark.parametrize("batch", [(), (4,), (2, 3)])
def test_unravel_is_the_inverse_of_ravel(batch):
    flat = np.random.default_rng(0).normal(size=(*batch, 15))
    tree = vectors.unravel(jnp.asarray(flat), cases.PARAMS)
    assert tree["kernel"].shape == (*batch, 3, 2)
    np.testing.assert_array_equal(vectors.ravel(tree, len(batch)), flat)


def test_dot_is_the_inner_product():
    other = cases.tree(np.arange(15.0)[::-1])
    assert vectors.dot(VECTOR, other) == np.arange(15) @ np.arange(15)[::-1]
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), VECTOR)
    assert vectors.dot(narrow, narrow).dtype == jnp.float32


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        ((), "float32"),
        (("bfloat16",), "float32"),
        (("float16", "bfloat16"), "float32"),
        (("float32", "bfloat16"), "float32"),
        (("float64", "float16"), "float64"),
    ],
)
def test_information_is_kept_in_float32_or_wider(dtypes, expected):
    assert vectors.wide_dtype(*map(jnp.dtype, dtypes)) == jnp.dtype(expected)


def test_a_tree_without_leaves_is_the_empty_vector():
    assert vectors.size({}) == 0
    assert vectors.ravel({}).shape == (0,)
    assert vectors.unravel(jnp.zeros(0), {"a": ()}) == {"a": ()}
    assert vectors.dot((), ()) == 0
    assert vectors.widen(()) == ()


@pytest.mark.parametrize(
    "prefix",
    [
        2.0,
        {"conv": 2.0, "deep": 2.0, "kernel": 2.0},
        {"conv": np.full((2, 1, 3), 2.0), "deep": (2.0, 2.0), "kernel": 2.0},
    ],
)
def test_a_prefix_is_filled_in(prefix):
    filled = vectors.broadcast_prefix(prefix, cases.PARAMS, "prior")
    assert jax.tree.map(np.shape, filled) == jax.tree.map(np.shape, cases.PARAMS)
    np.testing.assert_array_equal(vectors.ravel(filled), np.full(15, 2.0))


@pytest.mark.parametrize(
    ("prefix", "message"),
    [
        ({"conv": 1.0}, "prior must be a pytree prefix of the parameters"),
        ((1.0, 2.0), "prior must be a pytree prefix of the parameters"),
        (
            np.ones(3),
            r"prior must hold numbers .*\(3,\) for a parameter of .*\(2, 1, 3",
        ),
    ],
)
def test_a_prefix_that_does_not_fit_is_named(prefix, message):
    with pytest.raises(ValueError, match=message):
        vectors.broadcast_prefix(prefix, cases.PARAMS, "prior")


KEY = jax.random.key(7)


@pytest.mark.parametrize(
    "key",
    [7, np.int32(7), KEY, jax.random.key_data(KEY)],
    ids=["int", "int32", "typed", "data"],
)
def test_a_key_in_any_form_is_the_same_key(key):
    np.testing.assert_array_equal(vectors.key_data(key), jax.random.key_data(KEY))
    assert vectors.typed_key(key) == KEY


def test_the_generator_of_a_key_is_kept():
    key = jax.random.key(7, impl="rbg")
    drawn = jax.random.normal(vectors.typed_key(key))
    assert drawn == jax.random.normal(key)
    assert vectors.typed_key(vectors.key_data(key)) == key


def test_a_key_may_be_traced():
    kept = jax.jit(lambda key: vectors.typed_key(vectors.key_data(key)))(KEY)
    assert kept == KEY


@pytest.mark.parametrize("key", [1.5, True, np.zeros(2), "seed"])
def test_what_is_no_key_is_refused(key):
    with pytest.raises((ValueError, TypeError)):
        vectors.key_data(key)


def test_no_key_is_none_and_asked_for_where_it_is_needed():
    assert vectors.key_data(None) is None
    with pytest.raises(ValueError, match="a key is needed"):
        vectors.typed_key(None)


def test_leaves_that_are_not_real_are_named():
    with pytest.raises(ValueError, match=r"params\['b'\]\[1\] has dtype int"):
        vectors.real_arrays({"a": 1.0, "b": (2.0, 3)}, "params")
    arrays = vectors.real_arrays({"a": 1.0, "b": np.ones(2, np.float16)}, "params")
    assert arrays["b"].dtype == jnp.float16
