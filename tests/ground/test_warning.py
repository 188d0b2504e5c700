"""One warning, once a state, that names the line of the caller."""

import gc
import warnings

import jax
import jax.numpy as jnp
import pytest

import fisherflow_jax as ff
from fisherflow_jax._ground.warning import warn_once


def messages(call) -> list:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return caught


def test_once_a_state_and_message():
    state = {"mean": jnp.zeros(2), "information": jnp.ones(2)}
    (first,) = messages(lambda: warn_once(state, "rows were left out"))
    assert first.category is ff.DataWarning and issubclass(ff.DataWarning, UserWarning)
    assert str(first.message) == "rows were left out"
    assert first.filename == __file__  # the caller's line, not one of the package
    assert messages(lambda: warn_once(dict(state), "rows were left out")) == []
    assert len(messages(lambda: warn_once(state, "another thing"))) == 1
    another = {**state, "information": jnp.ones(2)}
    assert len(messages(lambda: warn_once(another, "rows were left out"))) == 1


@pytest.mark.slow
def test_nothing_is_kept_of_a_state_that_is_gone():
    for _ in range(3):  # a later state may take the same places in memory
        state = [jnp.zeros(1000), jnp.zeros(1000)]
        assert len(messages(lambda s=state: warn_once(s, "said"))) == 1
        del state
        gc.collect()


def test_a_state_of_numbers_alone_is_warned_of_each_time():
    for _ in range(2):
        assert len(messages(lambda: warn_once((1.0, 2.0), "said"))) == 1


def test_nothing_is_said_under_jit():
    @jax.jit
    def traced(state):
        warn_once(state, "said")
        return state

    assert messages(lambda: traced(jnp.zeros(2))) == []
    assert messages(lambda: jax.vmap(traced)(jnp.zeros(2))) == []


def test_it_can_be_made_an_error():
    with warnings.catch_warnings():
        warnings.simplefilter("error", ff.DataWarning)
        with pytest.raises(ff.DataWarning, match="left out"):
            warn_once(jnp.zeros(2), "rows were left out")
