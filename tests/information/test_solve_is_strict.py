"""A solve that rounding has made impossible says so."""

import jax
import jax.numpy as jnp
import pytest

import fisherflow_jax as ff


@pytest.mark.slow
def test_an_information_without_a_factor_is_named_by_its_direction():
    information = ff.structures.Full(jnp.array([[4.0, 4.0], [4.0, 4.0 - 1e-6]]))
    vector = jnp.array([1.0, 2.0])
    with pytest.raises(ValueError, match=r"along [+-]1 theta\[0\] [+-]1 theta\[1\]"):
        ff.information.solve(information, vector)
    assert jnp.all(jnp.isnan(jax.jit(ff.information.solve)(information, vector)))
    helped = ff.information.regularised(information, vector)
    assert jnp.all(jnp.isnan(helped.divide(vector)))
    rounded = ff.structures.Full(jnp.array([[4.0, 4.0], [4.0, 4.0 - 1e-15]]))
    helped = ff.information.regularised(rounded, vector)
    assert helped.helped == 1
    ones = jnp.ones(2)  # what the information determines is solved all the same
    found = ff.information.matvec(rounded, helped.divide(ones))
    assert jnp.all(jnp.abs(found - ones) < 1e-6)
