"""Checks of arguments: what is refused, in which words, and never when traced."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fisherflow_jax._ground import checks


@pytest.mark.parametrize("value", [0, -1, 2.0, "2", None, True, np.ones(2)])
def test_what_is_no_positive_whole_number_is_refused(value):
    with pytest.raises(ValueError, match="period must be a positive whole number of"):
        checks.whole(value, "period", of="steps")


def test_a_whole_number_is_handed_back():
    assert checks.whole(3, "k") == 3
    assert checks.whole(0, "guard", least=0) == 0
    message = r"k must be a whole number of draws, at least 2; got 1\.$"
    with pytest.raises(ValueError, match=message):
        checks.whole(1, "k", least=2, of="draws")


@pytest.mark.parametrize(
    ("check", "good", "bad", "rule"),
    [
        (checks.positive, 1e-30, 0.0, "positive and finite"),
        (checks.positive, np.ones(3), np.array([1.0, np.inf]), "positive and finite"),
        (checks.not_negative, 0, -1e-30, "finite and not negative"),
        (checks.not_negative, jnp.zeros(2), np.nan, "finite and not negative"),
        (checks.fraction, 0.5, 1.0, r"in \(0, 1\)"),
        (checks.fraction, np.float32(0.5), np.nan, r"in \(0, 1\)"),
    ],
)
def test_numbers_are_checked_where_they_are_at_hand(check, good, bad, rule):
    check(good, "x")
    with pytest.raises(ValueError, match=f"x must be {rule}; got "):
        check(bad, "x")

    def traced(value):
        check(value, "x")
        return value

    jax.jit(traced)(bad)
    closed_over = jnp.asarray(bad)
    with pytest.raises(ValueError, match=f"x must be {rule}; got "):
        jax.jit(lambda _: check(closed_over, "x"))(0.0)


def test_an_error_shows_the_ends_of_many_numbers():
    assert checks.shown(np.arange(1000.0).reshape((40, 25))) == (
        "[[ 0. ... 24.] ... [975. ... 999.]]"
    )
    assert checks.shown(jnp.array([0.5, -1.0])) == "[ 0.5 -1. ]"
