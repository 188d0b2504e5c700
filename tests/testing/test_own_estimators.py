"""Our own estimators hold the laws that others' are checked for."""

import functools

import pytest

import fisherflow_jax as ff

E, ROOTS = ff.estimators, ff.likelihoods
bound = functools.partial
CASES = {
    "exact": (E.exact, E.exact),
    "empirical": (E.empirical, None),
    "monte_carlo": (E.monte_carlo, E.exact),
    "monte_carlo of groups": (bound(E.monte_carlo, groups=2), E.exact),
    "empirical of groups": (bound(E.empirical, groups=1), E.empirical),
    "hutchinson": (E.hutchinson, E.exact),
    "hutchinson_dg": (E.hutchinson_dg, bound(E.exact, root=ROOTS.diagonal_root)),
    "hutchinson_rank1": (
        E.hutchinson_rank1,
        bound(E.exact, root=bound(ROOTS.rank_root, k=1)),
    ),
}
IN_THE_MEAN = {"sums over parts", "sizes", "order", "weights"}


@pytest.mark.slow_cases
@pytest.mark.parametrize("name", CASES)
def test_sums_of_squares(name):
    factory, reference = CASES[name]
    report = ff.testing.check_estimator(factory, reference=reference)
    drawn = "keys" in report.checked
    assert set(report.not_applicable) == (
        (IN_THE_MEAN if drawn else {"keys"}) | (set() if reference else {"reference"})
    )


@pytest.mark.slow
def test_observed():
    report = ff.testing.check_estimator(
        E.observed, skip={"positive": "a Hessian may be indefinite"}
    )
    assert "sums over parts" in report.checked


def test_squared_gradient_is_no_sum():
    with pytest.raises(AssertionError, match="sums over parts"):
        ff.testing.check_estimator(E.squared_gradient)
    why = "a batch counts as one observation"
    skip = dict.fromkeys(["sums over parts", "sizes", "weights"], why)
    report = ff.testing.check_estimator(E.squared_gradient, skip=skip)
    assert report.not_applicable["sizes"] == why


@pytest.mark.slow_cases
@pytest.mark.parametrize("structure", [ff.structures.diagonal(), ff.structures.block()])
def test_other_structures(structure):
    report = ff.testing.check_estimator(E.exact, structure=structure)
    assert "of the structure" in report.checked
