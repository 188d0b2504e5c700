"""With chunks, no array of n x d numbers is ever made for a diagonal or a block."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fisherflow_jax as ff
from fisherflow_jax.estimators import _plan as plans
from program_size import largest

COUNT, INPUTS, HIDDEN = 64, 3, 40
PARAMS = {"w": np.zeros((INPUTS, HIDDEN)), "v": np.zeros(HIDDEN)}
SIZE = (INPUTS + 1) * HIDDEN
BATCH = np.zeros((COUNT, INPUTS)), np.zeros(COUNT)


def apply_fn(params, x):
    return jnp.tanh(x @ params["w"]) @ params["v"]


def peak(name="exact", structure=None, **options):
    structure = ff.structures.diagonal() if structure is None else structure
    estimator = getattr(ff.estimators, name)(
        apply_fn, ff.likelihoods.gaussian(), structure, **options
    )
    key = jax.random.key(0) if estimator.random else None
    closed = jax.make_jaxpr(lambda p, b: estimator(p, b, key))(PARAMS, BATCH)
    return largest(closed.jaxpr)


@pytest.mark.parametrize("name", ["exact", "empirical", "monte_carlo"])
@pytest.mark.parametrize("chunk_size", [1, 4])
@pytest.mark.parametrize("fast_squares", [True, False])
def test_memory_is_that_of_a_chunk(name, chunk_size, fast_squares):
    # activations of the whole batch are not held either: one chunk's vectors, or the
    # batch itself, are the largest
    bound = max(chunk_size * SIZE, COUNT * INPUTS)
    assert peak(name, chunk_size=chunk_size, fast_squares=fast_squares) <= bound


def test_without_chunks_all_vectors_are_held():
    # the control: what the other tests would find if chunks did nothing
    found = peak(chunk_size=COUNT, fast_squares=False)
    assert found >= COUNT * PARAMS["w"].size


def test_by_default_the_chunk_is_bounded(monkeypatch):
    monkeypatch.setattr(plans, "CHUNK_ENTRIES", 5 * SIZE)
    assert peak(fast_squares=False) <= 5 * SIZE


def test_a_block_structure_holds_its_blocks_and_a_chunk():
    blocks = HIDDEN * INPUTS**2 + HIDDEN
    found = peak(structure=ff.structures.block(), chunk_size=2)
    assert found <= max(blocks, 2 * SIZE)


def test_the_observed_diagonal_multiplies_a_few_vectors_at_a_time():
    found = peak("observed", chunk_size=4)
    assert found < COUNT * SIZE
