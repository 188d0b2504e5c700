"""Equal choices are one object, and print as what they are."""

import re

import jax.numpy as jnp
import numpy as np
import pytest

import fisherflow_jax as ff

structures = ff.structures
LAYERS = ff.layers.find_layers(
    lambda params, x: x @ params["w"], {"w": jnp.zeros((2, 2))}, jnp.ones((1, 2))
)
FACTORS = structures.kronecker(LAYERS).isotropic({"w": jnp.zeros((2, 2))}, 1.0)


def corrected(scale=1.0):
    factors = {"num_observations": jnp.asarray(scale)}
    return structures.kronecker(
        LAYERS, eigenvalue_correction=FACTORS._replace(**factors)
    )


def by_layer(name):
    return name


@pytest.mark.parametrize(
    ("make", "printed"),
    [
        (structures.scalar, "scalar()"),
        (structures.diagonal, "diagonal()"),
        (structures.full, "full()"),
        (structures.block, "block()"),
        (lambda: structures.block({"w": "a", "b": "a"}), "block({'b': 'a', 'w': 'a'})"),
        (lambda: structures.block(by_layer), "block(by_layer)"),
        (lambda: structures.low_rank(3), "low_rank(3)"),
        (lambda: structures.kronecker(LAYERS), "kronecker(layers)"),
        (corrected, "kronecker(layers, eigenvalue_correction=Kronecker:"),
    ],
)
def test_equal_choices_are_one_object(make, printed):
    assert make() is make()
    text = repr(make())
    # of many numbers a digest
    assert text == printed or re.fullmatch(re.escape(printed) + r"[0-9a-f]{12}\)", text)


def test_other_choices_are_others():
    assert structures.low_rank(2) != structures.low_rank(3)
    assert structures.block({"w": "a"}) != structures.block({"w": "b"})
    assert structures.kronecker(LAYERS, widest=1) != structures.kronecker(LAYERS)
    assert corrected(1.0) is not corrected(2.0)
    with pytest.raises(ValueError, match="rank"):
        structures.low_rank(np.float32(2))
