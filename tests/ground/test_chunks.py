"""Leading axes taken a part at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fisherflow_jax._ground import chunks


@pytest.mark.parametrize("size", [1, 3, 4, 7, 10, 11])
def test_slices_are_those_of_the_whole(size):
    x, y = jnp.arange(10.0), jnp.arange(20).reshape(10, 2)
    lengths = []

    def function(parts):
        x, y = parts
        lengths.append(len(x))
        return {"sum": x + y[:, 0].astype(x.dtype), "y": y * 2}

    found = chunks.map_slices(function, (x, y), size)
    np.testing.assert_array_equal(found["sum"], x + y[:, 0])
    np.testing.assert_array_equal(found["y"], 2 * y)
    assert max(lengths) <= size


def test_slices_have_derivatives():
    def total(x):
        return jnp.sum(chunks.map_slices(jnp.square, x, 3))

    x = jnp.arange(8.0)
    np.testing.assert_array_equal(jax.grad(total)(x), 2 * x)
