"""Kernels that are used both ways, against explicit Jacobians."""

import pytest

from fisherflow_jax.layers import find_layers
from layer_cases import treatments
from layer_gradients import compare
from layer_tied import TIED


@pytest.mark.usefixtures("strict_promotion")
@pytest.mark.parametrize("name", TIED)
def test_both_ways_are_found_and_make_the_gradient(name):
    apply_fn, params, inputs, expected = TIED[name]
    found = find_layers(apply_fn, params, inputs)
    assert treatments(found) == expected
    compare(apply_fn, params, inputs)
