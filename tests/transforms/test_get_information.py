"""The information out of an optimiser's state, whatever it is wrapped in."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fisherflow_jax as ff
import transform_cases as cases
from fisherflow_jax.transforms import adam, get_information, scale_by_fisher


def fisher(memory, structure="full"):
    return scale_by_fisher(
        cases.given(cases.STRUCTURES[structure]), memory=memory, damping=0.1
    )


def after_two(optimizer):
    params, gradient = map(cases.tree, (cases.flat(cases.PARAMS), cases.GRADIENT))
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    for rows, _, *weights in (cases.FIRST, cases.SECOND):
        # padded to one shape: one program is enough
        missing = 9 - len(rows)
        weights = np.pad(weights[0] if weights else np.ones(9), (0, missing))
        rows = np.pad(rows, ((0, missing), (0, 0)))
        _, state = update(gradient, state, params, batch=(rows, None, weights))
    return state


@pytest.mark.parametrize("structure", ["scalar", "diagonal", "low_rank"])
def test_a_moving_average_is_scaled_to_the_number_of_observations(structure):
    decay = 0.6
    state = after_two(fisher(ff.memories.exponential(decay), structure))
    (first, n), (second, m) = map(cases.sums, (cases.FIRST, cases.SECOND))
    mean = (decay * first / n + second / m) / (1 + decay)
    found = ff.information.to_dense(get_information(state, 1000), cases.PARAMS)
    np.testing.assert_allclose(found, cases.kept(structure, 1000 * mean), rtol=1e-9)


WRAPPERS = {
    "chain": lambda t: optax.chain(optax.clip(1.0), optax.chain(t, optax.scale(2.0))),
    "named_chain": lambda t: optax.named_chain(("one", t), ("two", optax.scale(2.0))),
    "masked": lambda t: optax.masked(t, {"a": True, "b": True}),
    "partition": lambda t: optax.partition({"all": t}, {"a": "all", "b": "all"}),
    "inject": lambda t: optax.chain(optax.inject_hyperparams(optax.scale)(2.0), t),
    "multi_steps": lambda t: optax.MultiSteps(t, 1),
    "apply_if_finite": lambda t: optax.apply_if_finite(t, 3),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_found_in_any_wrapper(wrapper):
    memory = ff.memories.stationary()
    state = after_two(WRAPPERS[wrapper](fisher(memory, "diagonal")))
    (first, n), (second, m) = map(cases.sums, (cases.FIRST, cases.SECOND))
    found = get_information(state, 2 * (n + m))
    expected = 2 * np.diag(first + second)
    np.testing.assert_allclose(cases.flat(found.entries), expected, rtol=1e-9)


def test_two_states_are_an_error_that_lists_their_paths():
    part = fisher(ff.memories.stationary())
    state = optax.chain(part, optax.chain(optax.scale(1.0), part)).init(cases.PARAMS)
    with pytest.raises(ValueError, match=r"are 2 states .*: \[0\], \[1\]\[1\]\."):
        get_information(state, 10)


def test_no_state_and_no_information_are_errors():
    with pytest.raises(ValueError, match=r"no state of ff\.scale_by_fisher .*tuple"):
        get_information(optax.adam(0.1).init(cases.PARAMS), 10)
    optimizer = adam(0.1)
    params = jax.tree.map(jnp.asarray, cases.PARAMS)
    _, state = optimizer.update(params, optimizer.init(params))
    with pytest.raises(ValueError, match="squares of mean gradients"):
        get_information(state, 10)
    optimizer = fisher(ff.memories.stationary())
    with pytest.raises(ValueError, match="no batch has been taken in yet"):
        get_information(optimizer.init(params), 10)
    with pytest.raises(ValueError, match="must be positive; got 0"):
        get_information(after_two(optimizer), 0)
