"""The printed table: one row a parameter, with the reason where it is no layer's."""

import jax.numpy as jnp

from fisherflow_jax import layers
from layer_cases import FOUND
from layer_near_misses import NEAR_MISSES


def rows(name):
    apply_fn, params, inputs, _ = (FOUND | NEAR_MISSES)[name]
    return str(layers.find_layers(apply_fn, params, inputs)).splitlines()


def test_a_row_for_each_parameter_with_its_numbers():
    header, *lines = rows("experts")
    assert header.split() == [
        "parameter",
        "shape",
        "treatment",
        "inputs",
        "outputs",
        "stacked",
        "shared",
    ]
    assert [line.split() for line in lines] == [
        ["b", "(2,", "2)", "bias", "of", "v", "1", "2", "2", "1"],
        ["v", "(2,", "3,", "2)", "dense", "3", "2", "2", "1"],
        ["w", "(2,", "4,", "3)", "dense", "4", "6", "1", "5"],
    ]


def test_columns_are_aligned():
    header, *lines = rows("transformer")
    place = header.index("treatment")
    assert len(lines) == 12
    for line in lines:
        assert line[place - 2 : place] == "  " and line[place] != " "


def test_reasons_are_told():
    header, *lines = rows("broadcast kernel")
    assert [line.split("  ")[-1].strip() for line in lines[1:]] == [
        "no layer: broadcast before dot_general",
        "no layer: unused",
    ]


def test_parameters_that_are_one_array():
    found = layers.find_layers(lambda w, x: x @ w, jnp.ones((3, 2)), jnp.ones((1, 3)))
    assert "theta      (3, 2)  dense" in str(found)
    assert "parameter" in str(layers.find_layers(lambda p, x: x, (), jnp.ones((1, 3))))
