"""Strided layouts against arrays of positions that numpy moves."""

import jax
import numpy as np
import pytest

from fisherflow_jax.layers import _views as views
from fisherflow_jax.layers._views import NotStrided


def positions(view):
    """The flat position in the leaf of every entry of a view."""
    result = np.full(view.shape, view.offset)
    for i, axis in enumerate(view.axes):
        steps = np.zeros(1, int)
        for size, stride in axis:
            steps = (steps[:, None] + stride * np.arange(size)).ravel()
        result = result + steps.reshape((-1,) + (1,) * (len(view.axes) - i - 1))
    return result


def labels(*shape):
    return np.arange(np.prod(shape, dtype=int)).reshape(shape)


def factors(size, rng):
    """Random factors whose product is `size`, in random order, ones among them."""
    found = [1] * int(rng.integers(0, 2))
    while size > 1:
        factor = int(rng.choice([i for i in range(2, size + 1) if size % i == 0]))
        found.append(factor)
        size //= factor
    return tuple(rng.permutation(found).tolist())


def random_step(view, array, rng):
    """One operation on a view, and on the array of positions."""
    kind = rng.choice(["transpose", "reshape", "flip", "expand", "squeeze"])
    if kind == "transpose":
        order = rng.permutation(array.ndim)
        return view.transpose(order.tolist()), array.transpose(order)
    if kind == "reshape":
        shape = factors(array.size, rng)
        return view.reshape(shape), array.reshape(shape)
    if kind == "flip":
        axes = np.flatnonzero(rng.integers(0, 2, array.ndim)).tolist()
        return view.flip(axes), np.flip(array, axes)
    if kind == "expand":
        axis = int(rng.integers(0, array.ndim + 1))
        return view.expand_dims([axis]), np.expand_dims(array, axis)
    ones = [i for i, size in enumerate(array.shape) if size == 1]
    return view.squeeze(ones), array.squeeze(tuple(ones))


def random_chain(shape, rng, steps=6):
    """A view after random operations, the positions, and how many were refused."""
    view, array, refused = views.whole(shape), labels(*shape), 0
    for _ in range(steps):
        try:
            view, array = random_step(view, array, rng)
        except NotStrided:
            refused += 1
    return view, array, refused


@pytest.mark.parametrize("shape", [(), (6,), (2, 3), (4, 1, 6), (2, 3, 4), (8, 6)])
def test_random_chains_show_the_entries_that_numpy_shows(shape):
    rng, refused = np.random.default_rng(0), 0
    for _ in range(60):
        view, array, count = random_chain(shape, rng)
        refused += count
        np.testing.assert_array_equal(positions(view), array)
        assert view.is_bijection
    # reshapes across pieces are the rare exception
    assert refused < 60


@pytest.mark.parametrize("seed", range(8))
def test_to_leaf_and_from_leaf_are_exact_inverses(seed):
    rng = np.random.default_rng(seed)
    view, array, _ = random_chain((4, 3, 6), rng)
    leaf = rng.normal(size=(4, 3, 6))
    shown = view.from_leaf(jax.numpy.asarray(leaf))
    np.testing.assert_array_equal(shown, leaf.ravel()[array])
    np.testing.assert_array_equal(view.to_leaf(shown), leaf)


def test_broadcast_repeats_entries():
    view = views.whole((3, 1)).broadcast((2, 3, 5), (1, 2))
    array = np.broadcast_to(labels(3, 1)[None], (2, 3, 5))
    np.testing.assert_array_equal(positions(view), array)
    merged = view.transpose([1, 0, 2]).reshape((3, 10))
    expected = array.transpose(1, 0, 2).reshape(3, 10)
    np.testing.assert_array_equal(positions(merged), expected)
    assert not view.is_bijection
    assert [views.is_repeated(axis) for axis in merged.axes] == [False, True]


def test_a_broadcast_view_does_not_map_back():
    view = views.whole((3,)).broadcast((2, 3), (1,))
    with pytest.raises(ValueError, match=r"shape \(2, 3\) of a parameter of shape"):
        view.to_leaf(jax.numpy.ones((2, 3)))


def test_an_axis_is_not_cut_across_its_pieces():
    with pytest.raises(NotStrided):
        views.whole((2, 3)).transpose([1, 0]).reshape((2, 3))


def test_views_of_the_same_entries_are_equal():
    view = views.whole((4, 6))
    there_and_back = view.reshape((2, 2, 6, 1)).transpose([2, 3, 0, 1])
    there_and_back = there_and_back.transpose([2, 3, 0, 1]).reshape((4, 6))
    assert there_and_back == view and hash(there_and_back) == hash(view)
    assert view.transpose([1, 0]) != view
    assert view.flip([0]) != view


@pytest.mark.parametrize("seed", range(8))
def test_reordered_follows_another_view(seed):
    """By definition: where one shows p of its leaf, the result holds the other's."""
    rng = np.random.default_rng(seed)
    order, flips = rng.permutation(3).tolist(), [int(rng.integers(0, 3))]
    output = views.whole((2, 6, 4)).flip(flips).transpose(order)
    bias = views.whole((6, 2)).reshape((3, 2, 2)).transpose([2, 0, 1])
    bias = bias.reshape((2, 6)).broadcast((2, 6, 4), (0, 1)).transpose(order)
    moved = views.reordered(bias, output)
    expected = np.empty(2 * 6 * 4, int)
    expected[positions(output).ravel()] = positions(bias).ravel()
    np.testing.assert_array_equal(positions(moved), expected.reshape(2, 6, 4))
