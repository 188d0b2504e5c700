"""Symmetric matrices as one triangle."""

import jax.numpy as jnp
import numpy as np
import pytest

from fisherflow_jax._ground import triangles


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7, 8])
def test_every_entry_is_kept_once_and_found_again(size):
    rows, columns = np.triu_indices(size)
    # no two entries of a triangle are equal
    half = np.zeros((2, 3, size, size))
    half[..., rows, columns] = 1 + np.arange(6 * len(rows)).reshape(2, 3, -1)
    whole = half + np.swapaxes(np.triu(half, 1), -1, -2)
    found = triangles.packed(jnp.asarray(whole))
    assert found.shape[-2] == (size + 1) // 2 and found[0, 0].size == len(rows)
    kept = np.sort(np.asarray(found).reshape(6, -1))
    np.testing.assert_array_equal(kept, half[..., rows, columns].reshape(6, -1))
    np.testing.assert_array_equal(triangles.unpacked(found), whole)
