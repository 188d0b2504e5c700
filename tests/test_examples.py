"""The examples' full forms, as kept in docs/outputs; and what examples rest on."""

import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = {path.stem: path.read_text() for path in (ROOT / "examples").glob("*.py")}
KEPT = {path.stem: path.read_text() for path in (ROOT / "docs/outputs").glob("*.txt")}
FULL = {name for name, text in EXAMPLES.items() if "form.full(__doc__)" in text}
FIRST = re.compile(
    r"\d{4}-\d\d-\d\d, .*CPU.*, jax \d+\.\d+\.\d+, [\d.]+ processor min.*"
)


def pattern(node: ast.AST) -> str | None:
    """What a printed text looks like: words as they are, anything for values."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return re.escape(node.value)
    if isinstance(node, ast.JoinedStr):
        parts = [
            pattern(part) if isinstance(part, ast.Constant) else ".*?"
            for part in node.values
        ]
        return "".join(parts)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        sides = pattern(node.left), pattern(node.right)
        return None if sides == (None, None) else "".join(s or ".*?" for s in sides)
    return None


def printed(source: str) -> Iterator[str]:
    """Patterns of the texts that a program prints."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print":
            found = pattern(node.args[0])
            if found is not None:
                yield found


def unmatched(source: str, output: str) -> list[str]:
    return [each for each in printed(source) if not re.search(each, output)]


def test_full_forms_are_kept_and_nothing_else():
    programs = {"causal", "graph", "pinn", "policy_gradient", "scientific"}
    assert programs <= FULL
    assert set(KEPT) == FULL


@pytest.mark.parametrize("name", sorted(KEPT))
def test_a_kept_output_has_date_machine_and_every_heading(name):
    first, _, output = KEPT[name].partition("\n")
    assert FIRST.fullmatch(first), first
    assert len(list(printed(EXAMPLES[name]))) > 2
    assert unmatched(EXAMPLES[name], output) == []


def test_a_heading_that_has_changed_is_seen():
    source = 'print(f"{runs} runs, mean {x:.2f}")\nprint(state)\nprint("a" + f"{b} c")'
    assert unmatched(source, "20 runs, mean 0.10\n\nab c") == []
    assert unmatched(source, "20 starts, mean 0.10\n\nab c") == [
        r".*?\ runs,\ mean\ .*?"
    ]


@pytest.fixture(scope="module")
def cart():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "examples"))
        yield importlib.import_module("policy_gradient")


def energy(state):
    """Of a cart of mass 1 and a uniform pole of mass 0.1 and length 1."""
    _, speed, angle, turning = state
    across = speed + 0.5 * turning * jnp.cos(angle)
    up = -0.5 * turning * jnp.sin(angle)
    pole = 0.05 * (across**2 + up**2 + (0.5 * turning) ** 2 / 3)
    return 0.5 * speed**2 + pole + 0.1 * 9.8 * 0.5 * jnp.cos(angle)


@pytest.mark.slow
def test_the_cart_takes_up_the_power_of_its_force(cart):
    for key in jax.random.split(jax.random.key(0), 5):
        state = jax.random.normal(key, (4,))
        for force in (10.0, -10.0, 0.0):
            rates = cart.rates(state, force)
            assert rates[0] == state[1]
            assert rates[2] == state[3]
            power = jax.jvp(energy, (state,), (rates,))[1]
            np.testing.assert_allclose(power, force * state[1], rtol=1e-10, atol=1e-10)
    # and at rest, upright: momentum alone
    push = cart.rates(jnp.zeros(4), 10.0)
    np.testing.assert_allclose(1.1 * push[1] + 0.05 * push[3], 10.0, rtol=1e-12)


@pytest.mark.slow
def test_episodes_are_counted_as_they_fall(cart):
    states, _, after, up, stands = cart.play(
        cart.start(jax.random.key(1)), jax.random.key(2), 10
    )
    lengths = np.sum(up, 0)
    assert ((lengths > 7) & (lengths < 200)).all()  # nobody balances by chance
    np.testing.assert_array_equal(np.sum(stands, 0), lengths - 1)
    last = np.asarray(after)[lengths - 1, np.arange(10)]
    fallen = (abs(last[:, 0]) > 2.4) | (abs(last[:, 2]) > 12 * np.pi / 180)
    assert fallen.all()
    within = np.asarray(states)[np.asarray(up)]
    assert (abs(within[:, 2]) <= 12 * np.pi / 180).all()


@pytest.mark.slow
def test_advantages_are_sums_of_surprises(cart):
    keys = jax.random.split(jax.random.key(3))
    policy, value = map(cart.start, keys)
    value = jax.tree.map(lambda x: x + 0.1, value)
    played = cart.play(policy, keys[0], 4)
    _, _, weights, advantages, returns = cart.rows_of(value, played)
    states, _, after, up, stands = map(np.asarray, played)
    now, then = (np.asarray(cart.network(value, x)) for x in (states, after))
    expected = np.zeros(up.shape)
    for k in range(4):
        for t in range(int(up[:, k].sum())):
            for u in range(t, int(up[:, k].sum())):
                surprise = 1 + 0.99 * then[u, k] * stands[u, k] - now[u, k]
                expected[t, k] += (0.99 * 0.95) ** (u - t) * surprise
    kept = up.ravel()
    np.testing.assert_array_equal(weights, kept)
    chosen = expected.ravel()[kept]
    np.testing.assert_allclose(np.asarray(returns)[kept] - now.ravel()[kept], chosen)
    standard = (chosen - chosen.mean()) / chosen.std()
    np.testing.assert_allclose(np.asarray(advantages)[kept], standard, rtol=1e-5)


@pytest.mark.slow
def test_the_first_hundred_that_solves(cart):
    returns = np.concatenate([np.full(30, 20.0), np.full(170, 200.0)])
    # a hundred from 28 on has a mean of 196.4, from 26 on of 192.8
    episodes, least = cart.until(returns, 2)
    assert (episodes, least) == (28, 196.4)
    assert cart.until(returns, 10)[0] == 30
    assert cart.until(np.full(200, 20.0), 10) == (100, 20.0)
