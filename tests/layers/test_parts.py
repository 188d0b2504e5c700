"""Slices and concatenations of kernels: what is found, and its gradients."""

import pytest

from fisherflow_jax.layers import find_layers
from layer_cases import treatments
from layer_gradients import compare
from layer_parts import PARTS


@pytest.mark.usefixtures("strict_promotion")
@pytest.mark.parametrize("name", PARTS)
def test_parts_are_found_and_make_the_gradient(name):
    apply_fn, params, inputs, expected = PARTS[name]
    assert treatments(find_layers(apply_fn, params, inputs)) == expected
    compare(apply_fn, params, inputs)
