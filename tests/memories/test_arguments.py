"""Memories refuse what makes no sense, with the value that was given."""

import numpy as np
import pytest

import fisherflow_jax as ff


@pytest.mark.parametrize("decay", [0.0, -0.1, 1.1, float("nan")])
def test_a_decay_lies_between_0_and_1(decay):
    with pytest.raises(ValueError, match=rf"decay must be in \(0, 1\]; got {decay}"):
        ff.memories.exponential(decay)


@pytest.mark.parametrize("size", [0, -3, 2.0, "3"])
def test_a_window_holds_a_whole_number_of_batches(size):
    with pytest.raises(ValueError, match=r"size must be a positive whole number; got"):
        ff.memories.windowed(size)


def test_a_matrix_noise_may_be_a_jax_array():
    assert ff.memories.random_walk(np.eye(2) * 0.1).name == "random_walk"
