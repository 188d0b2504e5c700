"""Randomness: only where it is asked for, from an explicit key, the same every time."""

import functools

import jax
import numpy as np
import pytest

import fisherflow_jax as ff
import streams


@functools.cache
def drawing(num_samples=2):
    return ff.fisher_flow(
        streams.linear,
        ff.likelihoods.bernoulli(),
        structure=ff.structures.diagonal(),
        memory=ff.memories.stationary(),
        estimator=functools.partial(ff.estimators.monte_carlo, num_samples=num_samples),
        num_steps=1,
    )


def stream(key, update=None):
    state = streams.start(drawing(), key)
    for batch in streams.batches(8, "bernoulli"):
        state, _ = (update or drawing().update)(state, batch)
    return state


def information(state):
    return np.diag(streams.dense(state.information))


@pytest.mark.slow
def test_the_same_key_gives_the_same_numbers():
    first = stream(7)
    for key in (7, np.int64(7), jax.random.key(7), jax.random.PRNGKey(7)):
        jax.tree.map(np.testing.assert_array_equal, stream(key), first)
    assert not np.allclose(information(stream(8)), information(first))


@pytest.mark.slow
def test_eager_jit_and_scan_draw_the_same():
    first = stream(7)
    stacked = jax.tree.map(lambda *x: np.stack(x), *streams.batches(8, "bernoulli"))
    scanned, _ = jax.lax.scan(drawing().update, streams.start(drawing(), 7), stacked)
    np.testing.assert_allclose(information(scanned), information(first), rtol=1e-12)
    compiled = stream(7, jax.jit(drawing().update))
    np.testing.assert_allclose(information(compiled), information(first), rtol=1e-12)


def test_each_update_draws_anew():
    # away from zero: there a logistic score's square does not depend on its label
    state = drawing().init(streams.tree(streams.ORIGIN), key=7)
    batch, gains = streams.batches(8, "bernoulli")[0], []
    for _ in range(3):
        before = information(state)
        # at one and the same point, so that only the draws differ
        moved, _ = drawing().update(state, batch)
        gains.append(information(moved) - before)
        state = state._replace(step=moved.step)
    assert not np.allclose(gains[0], gains[1]) and not np.allclose(gains[1], gains[2])


def test_draws_average_to_the_exact_information():
    many, batch = drawing(4000), streams.batches(8, "bernoulli")[0]
    state, _ = many.update(many.init(streams.tree(streams.ORIGIN), key=0), batch)
    inputs, _, weights = batch
    odds = np.exp(inputs @ streams.ORIGIN)
    expected = 1.0 + (weights * odds / (1 + odds) ** 2) @ inputs**2
    np.testing.assert_allclose(information(state), expected, rtol=0.05)


def test_without_a_key_init_says_that_one_is_needed():
    with pytest.raises(
        ValueError, match=r"monte_carlo draws at random: give flow.init"
    ):
        drawing().init(streams.tree(np.zeros(3)))


def test_a_likelihood_whose_root_is_sampled_needs_a_key_too():
    flow = ff.fisher_flow(
        streams.linear,
        ff.likelihoods.from_log_prob(
            lambda outputs, targets: -0.5 * (targets - outputs) ** 2,
            sample=lambda key, outputs: outputs + jax.random.normal(key, outputs.shape),
        ),
        structure=ff.structures.diagonal(),
        memory=ff.memories.stationary(),
    )
    with pytest.raises(
        ValueError, match=r"exact draws at random: give flow.init a key"
    ):
        flow.init(streams.tree(np.zeros(3)))


def test_where_nothing_is_drawn_no_key_is_kept():
    assert streams.start(streams.flow(), key=3).key is None


def test_what_is_no_key_is_refused():
    with pytest.raises(
        ValueError, match=r"key must be an int, a key of jax.random.key"
    ):
        streams.start(drawing(), np.zeros(2))


@pytest.mark.slow
def test_members_of_a_bank_draw_apart():
    bank = ff.bank([drawing(), drawing()])
    state = bank.init(streams.tree(np.zeros(3)), key=3)
    assert not np.array_equal(*(member.key for member in state.members))
