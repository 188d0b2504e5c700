"""Pytrees seen as vectors: their order, their types, prefixes and keys."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import structure_cases as cases
from fisherflow_jax._ground import trees
from fisherflow_jax._ground.keys import key_data, typed_key

VECTOR = cases.tree(np.arange(15.0))


def test_the_order_is_that_of_jax():
    np.testing.assert_array_equal(trees.ravel(VECTOR), ravel_pytree(VECTOR)[0])
    assert trees.size(VECTOR) == 15


@pytest.mark.parametrize("batch", [(), (4,), (2, 3)])
def test_unravel_is_the_inverse_of_ravel(batch):
    flat = np.random.default_rng(0).normal(size=(*batch, 15))
    tree = trees.unravel(jnp.asarray(flat), cases.PARAMS)
    assert tree["kernel"].shape == (*batch, 3, 2)
    np.testing.assert_array_equal(trees.ravel(tree, len(batch)), flat)


def test_dot_is_the_inner_product():
    other = cases.tree(np.arange(15.0)[::-1])
    assert trees.dot(VECTOR, other) == np.arange(15) @ np.arange(15)[::-1]
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), VECTOR)
    assert trees.dot(narrow, narrow).dtype == jnp.float32


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
    assert trees.wide_dtype(*map(jnp.dtype, dtypes)) == jnp.dtype(expected)


def test_a_tree_without_leaves_is_the_empty_vector():
    assert trees.size({}) == 0
    assert trees.ravel({}).shape == (0,)
    assert trees.unravel(jnp.zeros(0), {"a": ()}) == {"a": ()}
    assert trees.dot((), ()) == 0
    assert trees.widen(()) == ()


@pytest.mark.parametrize(
    "prefix",
    [
        2.0,
        {"conv": 2.0, "deep": 2.0, "kernel": 2.0},
        {"conv": np.full((2, 1, 3), 2.0), "deep": (2.0, 2.0), "kernel": 2.0},
    ],
)
def test_a_prefix_is_filled_in(prefix):
    filled = trees.broadcast_prefix(prefix, cases.PARAMS, "prior")
    assert jax.tree.map(np.shape, filled) == jax.tree.map(np.shape, cases.PARAMS)
    np.testing.assert_array_equal(trees.ravel(filled), np.full(15, 2.0))


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
        trees.broadcast_prefix(prefix, cases.PARAMS, "prior")


KEY = jax.random.key(7)


@pytest.mark.parametrize(
    "key",
    [7, np.int32(7), KEY, np.array([0, 7], np.uint32)],
    ids=["int", "int32", "typed", "data"],
)
def test_a_key_in_any_form_is_the_same_key(key):
    np.testing.assert_array_equal(key_data(key), jax.random.key_data(KEY))
    assert typed_key(key) == KEY


def test_the_generator_of_a_key_is_kept():
    key = jax.random.key(7, impl="rbg")
    drawn = jax.random.normal(typed_key(key))
    assert drawn == jax.random.normal(key)
    assert typed_key(key_data(key)) == key


def test_a_key_may_be_traced():
    kept = jax.jit(lambda key: typed_key(key_data(key)))(KEY)
    assert kept == KEY


@pytest.mark.parametrize("key", [1.5, True, np.zeros(2), "seed"])
def test_what_is_no_key_is_refused(key):
    with pytest.raises((ValueError, TypeError)):
        key_data(key)


def test_no_key_is_none_and_asked_for_where_it_is_needed():
    assert key_data(None) is None
    with pytest.raises(ValueError, match="a key is needed"):
        typed_key(None)


NAMED = {"head": [np.zeros(2), np.zeros(())], "w": np.zeros(3), "none": ()}


def test_a_parameter_has_one_name():
    names = [name for name, _ in trees.named_leaves(NAMED)]
    assert names == ["head.0", "head.1", "w"]
    assert trees.named_leaves(jnp.zeros(2))[0][0] == "theta"
    assert trees.named_leaves({}) == []
    variable = (jax.tree_util.DictKey("a"), jax.tree_util.GetAttrKey("value"))
    assert trees.parameter_name(variable) == "a"
    with pytest.raises(ValueError, match=r"two parameters have the name 'a\.b'"):
        trees.named_leaves({"a.b": 1.0, "a": {"b": 2.0}})


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        (lambda name: name.endswith("1"), [False, True, False]),
        (["head"], [True, True, False]),
        (("head.1", "w"), [False, True, True]),
        ("w", [False, False, True]),
        ({"head": True, "w": False, "none": ()}, [True, True, False]),
        ({"head": [np.bool_(0), True], "w": False, "none": ()}, [False, True, False]),
        (True, [True, True, True]),
    ],
)
def test_parameters_are_chosen_in_four_ways(chosen, expected):
    mask = trees.chosen(NAMED, chosen)
    assert trees.same_structure(mask, NAMED)
    assert jax.tree.leaves(mask) == expected


def test_what_is_printed_is_accepted():
    for name, _ in trees.named_leaves(NAMED):
        assert sum(jax.tree.leaves(trees.chosen(NAMED, [name]))) == 1
    assert trees.chosen(jnp.zeros(2), ["theta"]) is True


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        (lambda name: False, "no parameter is chosen"),
        ([], "no parameter is chosen"),
        (False, "no parameter is chosen"),
        (["hea"], "no parameter has the name 'hea'"),
        ({"head": True}, "chosen must be a predicate"),
        ({"head": 2.0, "w": True, "none": ()}, r"chosen must hold booleans; got 2\.0"),
    ],
)
def test_errors_of_a_choice_list_the_names(chosen, message):
    with pytest.raises(ValueError, match=f"{message}(.|\n)*names are .*'head.0'"):
        trees.chosen(NAMED, chosen)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_is_seen_wherever_it_stands(value):
    assert trees.all_finite(NAMED)
    assert trees.all_finite({})
    for place in range(3):
        leaves = jax.tree.leaves(NAMED)
        leaves[place] = leaves[place] + value
        assert not jax.jit(trees.all_finite)(leaves)
    assert trees.all_finite({"places": jnp.arange(3)})
    numbers = [jnp.ones(())] * 20
    assert trees.all_finite(numbers)
    assert not trees.all_finite([*numbers, jnp.asarray(value)])


def test_a_check_of_many_leaves_is_not_fused_into_every_select():
    def checked(leaves):
        sound = trees.all_finite(leaves)
        return [jnp.where(sound, x * 2, x) for x in leaves]

    def instructions(count):
        compiled = jax.jit(checked).lower([jnp.ones(3)] * count).compile()
        return sum(" = " in line for line in compiled.as_text().splitlines())

    # in proportion to the leaves, and not to their square
    assert instructions(64) < 3 * instructions(32)


def test_leaves_that_are_not_real_are_named():
    with pytest.raises(ValueError, match=r"params must be .*; b\.1 has dtype int"):
        trees.real_arrays({"a": 1.0, "b": (2.0, 3)}, "params")
    arrays = trees.real_arrays({"a": 1.0, "b": np.ones(2, np.float16)}, "params")
    assert arrays["b"].dtype == jnp.float16


@pytest.mark.parametrize(
    "value",
    [np.arange(3), np.arange(3.0), np.float16(2), np.array(True), 2.0, [1, 2], jnp.e],
)
def test_arrays_are_those_of_jax(value):
    ours, theirs = trees.as_array(value), jnp.asarray(value)
    np.testing.assert_array_equal(ours, theirs)
    assert ours.aval == theirs.aval


def test_arrays_do_not_share_memory():
    # large ones, which jax takes as they are where they are aligned
    for _ in range(8):
        given = np.zeros(100_000, np.float32)
        taken = trees.as_array(given)
        given[:] = 1
        assert taken[0] == 0


@pytest.mark.parametrize("sound", [None, True, False])
def test_rows_of_a_stack(sound):
    stack = np.arange(24.0).reshape(4, 3, 2)
    flag = None if sound is None else jnp.array(sound)
    found = np.stack(jax.jit(trees.cut)(jnp.asarray(stack), flag))
    expected = np.roll(stack, -1, axis=0) if sound is False else stack
    np.testing.assert_array_equal(found, expected)


def test_a_row_more_is_no_kernel_more():
    @jax.jit
    def moved(stack, leaves, sound):
        rows = trees.cut(stack, sound)
        return [2 * x + row for x, row in zip(leaves, rows, strict=True)]

    given = jnp.ones((6, 3, 2)), [jnp.ones((3, 2))] * 6, jnp.array(True)
    text = moved.lower(*given).compile().as_text()
    # of rows at known places, which are slices, no two are one kernel
    assert text.count(" dynamic-slice(") >= 6
    assert " slice(" not in text
