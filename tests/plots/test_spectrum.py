"""The eigenvalues of every structure are those of its dense matrix."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fisherflow_jax import information as ops
from fisherflow_jax import plots, structures
from fisherflow_jax.structures._compensated import compensate

PARAMS = {"w": jnp.zeros((3, 2)), "b": jnp.zeros(2)}
FACTORIES = [
    structures.scalar(),
    structures.diagonal(),
    structures.block(),
    structures.block(lambda path: path),
    structures.full(),
    structures.low_rank(2),
]


@pytest.fixture(scope="module")
def stack():
    rng = np.random.default_rng(0)
    return {k: jnp.asarray(rng.normal(size=(12, *x.shape))) for k, x in PARAMS.items()}


@pytest.mark.slow_cases
@pytest.mark.parametrize("structure", FACTORIES, ids=lambda s: s.name)
def test_eigenvalues(structure, stack):
    information = structure.reduce(stack)
    matrix = np.asarray(ops.to_dense(information, PARAMS))
    expected = np.linalg.eigvalsh(matrix)[::-1]
    for held in (information, compensate(information)):
        values = plots.eigenvalues(held, PARAMS)
        assert values.dtype == float
        np.testing.assert_allclose(values, expected, rtol=1e-9)


def test_the_curve():
    entries = {"w": jnp.full((3, 2), 4.0), "b": jnp.asarray([0.0, 9.0])}
    information = structures.Diagonal(entries)
    ax = plots.information_spectrum(information, floor=1.0, label="diagonal")
    np.testing.assert_array_equal(ax.lines[0].get_ydata(), [9] + 6 * [4])
    np.testing.assert_array_equal(ax.lines[0].get_xdata(), np.arange(1, 8))
    assert ax.get_yscale() == "log"
    assert [text.get_text() for text in ax.texts] == ["1 not positive"]
    np.testing.assert_array_equal(ax.lines[1].get_ydata(), [1, 1])
    assert plots.information_spectrum(information, ax=ax) is ax


def test_nothing_to_draw():
    with pytest.raises(
        ValueError, match=r"no eigenvalue .* positive; the largest is 0"
    ):
        plots.information_spectrum(structures.Diagonal(jnp.zeros(3)))
    with pytest.raises(ValueError, match="give like="):
        plots.information_spectrum(structures.Scalar(jnp.ones(())))


def test_large():
    many = structures.Diagonal(jnp.arange(1.0, 10_001))
    assert plots.eigenvalues(many)[0] == 10_000
    # shapes alone: the matrix is never made
    wide = structures.LowRank(jnp.arange(1.0, 5001), jnp.ones((1, 5000)))
    with pytest.raises(
        ValueError,
        match=r"eigenvalues of a LowRank information of 5000 .* 200,000,000 bytes",
    ):
        plots.eigenvalues(wide)
    assert jax.eval_shape(lambda i: ops.diagonal(i), wide).shape == (5000,)
