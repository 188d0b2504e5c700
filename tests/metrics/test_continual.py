"""Average accuracy, transfer and forgetting, against loops over their definitions."""

import jax
import numpy as np
import pytest

from fisherflow_jax import metrics


def test_the_definitions():
    rng = np.random.default_rng(0)
    table, untrained = rng.uniform(size=(4, 4)), rng.uniform(size=4)
    found = jax.jit(metrics.continual)(table, untrained)
    backward = [table[3, j] - table[j, j] for j in range(3)]
    forward = [table[j - 1, j] - untrained[j] for j in range(1, 4)]
    forgotten = [max(table[:, j]) - table[3, j] for j in range(3)]
    expected = map(np.mean, (table[3], backward, forward, forgotten))
    np.testing.assert_allclose(found, list(expected), rtol=1e-12)
    assert metrics.continual(table).forward_transfer is None


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (1, 1)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(ValueError, match=r"two of them or more; got shape"):
        metrics.continual(np.ones(shape))


def test_untrained_has_an_accuracy_a_task():
    with pytest.raises(ValueError, match=r"each of 2 tasks; got shape \(3,\)"):
        metrics.continual(np.eye(2), np.ones(3))
