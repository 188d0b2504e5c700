"""Compensated sums: in float32 they lose nothing where plain sums lose everything."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fisherflow_jax as ff
from fisherflow_jax.structures import Compensated
from fisherflow_jax.structures._compensated import compensate

ADDITIONS = 100_000
STRUCTURES = {
    "scalar": ff.structures.scalar(),
    "diagonal": ff.structures.diagonal(),
    "units": ff.structures.block(),
    "full": ff.structures.full(),
}
every_structure = pytest.mark.parametrize("name", STRUCTURES)


@jax.jit
def accumulate(start, vectors):
    name = {"Scalar": "scalar", "Diagonal": "diagonal", "UnitBlock": "units"}
    plain = start.high if isinstance(start, Compensated) else start
    structure = STRUCTURES[name.get(type(plain).__name__, "full")]

    def body(total, vector):
        return ff.information.add(total, structure.reduce(vector[None])), None

    return jax.lax.scan(body, start, vectors)[0]


def exact(information):
    """The pair's sum in float64."""
    parts = [jax.tree.map(lambda x: np.asarray(x, np.float64), i) for i in information]
    return jax.tree.map(np.add, *parts)


@every_structure
def test_small_increments_to_a_large_sum_are_kept(name):
    # 2^24 + 1 is not a float32: a plain sum stands still
    start = STRUCTURES[name].isotropic(jnp.zeros((2, 1), jnp.float32), 2.0**24)
    vectors = jnp.ones((ADDITIONS, 2, 1), jnp.float32)
    plain = accumulate(start, vectors)
    pair = exact(accumulate(compensate(start), vectors))
    like = jnp.zeros((2, 1))
    stuck = ff.information.diagonal(plain, like)
    np.testing.assert_array_equal(stuck, np.full((2, 1), 2.0**24))
    kept = ff.information.diagonal(pair, like)
    np.testing.assert_array_equal(kept, np.full((2, 1), 2.0**24 + ADDITIONS))


def test_a_long_sum_of_any_numbers_is_that_of_float64():
    vectors = np.random.default_rng(0).normal(size=(ADDITIONS, 2, 1))
    vectors = vectors.astype(np.float32)
    start = STRUCTURES["full"].isotropic(jnp.zeros((2, 1), jnp.float32), 1.0)
    # every product rounded to float32 first, as reduce does
    products = np.einsum("nai,nbj->nab", vectors, vectors)
    reference = products.astype(np.float64).sum(0) + np.eye(2)
    pair = exact(accumulate(compensate(start), vectors))
    plain = accumulate(start, vectors)

    def error(information):
        dense = np.asarray(ff.information.to_dense(information), np.float64)
        return np.abs(dense - reference).max() / reference.max()

    assert error(pair) < 1e-9  # 2^-48 at each addition, were all to err one way
    assert error(plain) > 100 * error(pair)


@every_structure
def test_pairs_add_with_their_low_parts(name):
    structure = STRUCTURES[name]
    params = jnp.zeros((2, 1), jnp.float32)
    big, small = structure.isotropic(params, 2.0**30), structure.isotropic(params, 1.0)
    pair = ff.information.add(compensate(big), small)
    twice = ff.information.add(pair, pair)
    like = jnp.zeros((2, 1))
    for information, expected in ((pair, 2.0**30 + 1), (twice, 2.0**31 + 2)):
        total = ff.information.diagonal(exact(information), like)
        np.testing.assert_array_equal(total, np.full((2, 1), expected))
    halved = ff.information.diagonal(exact(ff.information.scale(pair, 0.5)), like)
    np.testing.assert_array_equal(halved, np.full((2, 1), 2.0**29 + 0.5))


def test_value_rounds_the_pair_to_its_structure():
    information = Compensated(
        *(ff.structures.Diagonal(jnp.array(x)) for x in ([1.0], [0.25]))
    )
    np.testing.assert_array_equal(information.value.entries, [1.25])
