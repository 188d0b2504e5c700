"""Sums of informations: of one structure, of a richer and a simpler one, or refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fisherflow_jax as ff
import structure_cases as cases
from fisherflow_jax.structures import Compensated
from structure_cases import CASES, NAMED

EXACT = {"rtol": 1e-12, "atol": 1e-12}
SIMPLER = ["scalar", "diagonal"]
HOLDS = {  # what each structure can take in beside its own kind
    "diagonal": ["scalar"],
    "units": SIMPLER,
    "block-names": SIMPLER,
    "low_rank-4": SIMPLER,
    "full": [*SIMPLER, "units", "block-names", "low_rank-4"],
}
PAIRS = [(rich, simple) for rich, others in HOLDS.items() for simple in others]
REFUSED = [
    ("units", "block-names"),
    ("units", "low_rank-4"),
    ("block-names", "low_rank-4"),
    ("compensated-scalar", "diagonal"),
    ("compensated-diagonal", "full"),
    ("compensated-units", "block-names"),
]


@jax.jit
def both_orders(left, right):
    return ff.information.add(left, right), ff.information.add(right, left)


@pytest.mark.slow_cases
@pytest.mark.parametrize("case", CASES, ids=repr)
def test_equal_structures_add(case):
    left, right = cases.information(case, 3), cases.information(case, 1, seed=1)
    total, _ = both_orders(left, right)
    assert jax.tree.structure(total) == jax.tree.structure(left)
    if case.name != "low_rank-4":  # 3 + 1 vectors fit, but its prior is not isotropic
        expected = cases.matrix(case, 3) + cases.matrix(case, 1, seed=1)
        np.testing.assert_allclose(cases.dense(total), expected, **EXACT)


@pytest.mark.parametrize(("rich", "simple"), PAIRS)
def test_a_richer_structure_holds_a_simpler_one(rich, simple):
    left, right = cases.information(NAMED[rich]), cases.information(NAMED[simple], 5)
    expected = cases.matrix(NAMED[rich]) + cases.matrix(NAMED[simple], 5)
    for total in both_orders(left, right):
        assert jax.tree.structure(total) == jax.tree.structure(left)
        np.testing.assert_allclose(cases.dense(total), expected, **EXACT)


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("scalar", "scalar"),
        ("diagonal", "scalar"),
        ("units", "units"),
        ("units", "diagonal"),
        ("full", "full"),
        ("full", "low_rank-4"),
    ],
)
def test_a_compensated_sum_takes_in_plain_informations(name, plain):
    left = cases.information(NAMED[f"compensated-{name}"])
    right = cases.information(NAMED[plain], 5)
    expected = cases.matrix(NAMED[name]) + cases.matrix(NAMED[plain], 5)
    for total in both_orders(left, right):
        assert isinstance(total, Compensated)
        assert jax.tree.structure(total) == jax.tree.structure(left)
        np.testing.assert_allclose(cases.dense(total), expected, **EXACT)


def test_a_compensated_full_holds_a_compensated_diagonal():
    left, right = NAMED["compensated-full"], NAMED["compensated-diagonal"]
    expected = cases.matrix(left) + cases.matrix(right)
    for total in both_orders(cases.information(left), cases.information(right)):
        np.testing.assert_allclose(cases.dense(total), expected, **EXACT)


@pytest.mark.parametrize(("left", "right"), REFUSED)
def test_structures_that_cannot_hold_each_other_are_refused(left, right):
    pair = cases.information(NAMED[left]), cases.information(NAMED[right])
    for first, second in (pair, pair[::-1]):
        with pytest.raises(TypeError, match=r"do not add|add only when"):
            ff.information.add(first, second)


def test_the_operands_order_is_kept_for_equal_structures():
    # Adam to the last bit needs increment + remembered, in that order; only NaN
    # payloads and fused operations can tell, so the jaxpr is read
    one, two = (ff.structures.Diagonal(jnp.ones(2)) for _ in range(2))
    jaxpr = jax.make_jaxpr(ff.information.add)(one, two)
    (equation,) = jaxpr.eqns
    assert equation.primitive.name == "add"
    assert list(equation.invars) == jaxpr.jaxpr.invars


@pytest.mark.parametrize("case", CASES, ids=repr)
def test_total_is_the_weighted_sum_of_a_stack(case):
    parts = [cases.information(case, 2, seed) for seed in range(3)]
    weights = np.array([1.0, 0.0, 0.25])

    stacked = jax.tree.map(lambda *x: np.stack(x), *parts)
    total = jax.jit(ff.information.total)(stacked, weights)
    references = [cases.matrix(case, 2, seed) for seed in range(3)]
    expected = np.tensordot(weights, np.stack(references), 1)
    np.testing.assert_allclose(cases.dense(total), expected, **EXACT)
