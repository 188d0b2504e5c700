"""Greedy choice of rows, against dense matrices recomputed at each choice."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fisherflow_jax as ff
import selection_cases as cases
from fisherflow_jax import selection

FEW = [
    ("scalar", "categorical"),
    ("diagonal", "bernoulli"),
    ("block", "gaussian"),
    ("kronecker", "categorical"),
    ("full", "categorical"),
    ("low_rank", "gaussian"),
]
ALL = [(s, own) for s in cases.STRUCTURES for own in cases.LIKELIHOODS]
REST = [pytest.param(*c, marks=pytest.mark.slow) for c in ALL if c not in FEW]


def chosen(structure, likelihood, count, pool=cases.POOL, **options):
    state, own = cases.state(structure, likelihood), cases.LIKELIHOODS[likelihood]
    return selection.greedy(state, cases.apply_fn, own, pool, count, **options)


@pytest.mark.slow_cases
@pytest.mark.parametrize(("structure", "likelihood"), [*FEW, *REST])
@pytest.mark.parametrize("criterion", ["gain", "variance"])
def test_picks_and_gains_are_those_of_dense_matrices(structure, likelihood, criterion):
    state, middle, options = cases.state(structure, likelihood), None, {}
    if criterion == "variance":
        target = cases.target(likelihood)
        middle = cases.dense(target, state.mean)
        options["acquisition"] = selection.variance_reduction(target)
    found = chosen(structure, likelihood, 8, **options)
    base = cases.dense(state.information, state.mean)
    added = cases.informations(likelihood)
    picks, gains, rest = cases.brute_force(base, added, 8, middle)
    assert found.indices.tolist() == picks
    np.testing.assert_allclose(found.gains, gains, rtol=1e-10)
    np.testing.assert_allclose(found.remaining, rest, rtol=1e-8, atol=1e-10)
    if criterion == "gain":
        whole = np.linalg.slogdet(base + added[picks].sum(0))[1]
        whole = (whole - np.linalg.slogdet(base)[1]) / 2
        np.testing.assert_allclose(found.gains.sum(), whole, rtol=1e-10)


@pytest.mark.slow_cases
@pytest.mark.parametrize("structure", ["kronecker", "full"])
def test_variances_of_all_parameters_and_of_one_contrast(structure):
    state, added = cases.state(structure, "gaussian"), cases.informations("gaussian")
    base = cases.dense(state.information, state.mean)
    contrast = jax.tree.map(lambda x: jnp.cos(x) + 1, state.mean)
    flat = np.concatenate([np.ravel(x) for x in jax.tree.leaves(contrast)])
    for target, middle in (
        (None, np.eye(len(flat))),
        (contrast, np.outer(flat, flat)),
    ):
        found = chosen(
            structure,
            "gaussian",
            4,
            acquisition=selection.variance_reduction(target),
        )
        picks, gains, rest = cases.brute_force(base, added, 4, middle)
        assert found.indices.tolist() == picks
        np.testing.assert_allclose(found.gains, gains, rtol=1e-10)
        np.testing.assert_allclose(found.remaining, rest, rtol=1e-8, atol=1e-10)


@pytest.mark.slow_cases
@pytest.mark.parametrize("structure", ["kronecker", "diagonal"])
def test_a_duplicate_has_the_gain_of_the_dense_formula(structure):
    """And not that of a structure to which the row was added."""
    state = cases.state(structure, "categorical")
    found = chosen(structure, "categorical", 1)
    first = int(found.indices[0])
    base, added = (
        cases.dense(state.information, state.mean),
        cases.informations("categorical"),
    )
    once, twice = (np.linalg.slogdet(base + k * added[first])[1] / 2 for k in (1, 2))
    np.testing.assert_allclose(found.remaining[first], twice - once, rtol=1e-10)
    pool = jnp.concatenate([cases.POOL, cases.POOL[first][None]])
    again = chosen(structure, "categorical", 2, pool)
    assert again.indices[0] == first  # a tie, to the lowest index
    np.testing.assert_allclose(again.remaining[-1], again.remaining[first], rtol=1e-9)


@pytest.mark.slow
def test_excluded_rows_costs_and_repeated_rows():
    state = cases.state("full", "categorical")
    base, added = (
        cases.dense(state.information, state.mean),
        cases.informations("categorical"),
    )
    costs = np.linspace(1, 3, len(added))
    plain = chosen("full", "categorical", 3)
    excluded = np.zeros(len(added), bool)
    excluded[np.asarray(plain.indices)] = True
    # one program for both
    options = {"replace": True}
    found = chosen("full", "categorical", 3, costs=costs, **options)
    picks, gains, _ = cases.brute_force(base, added, 3, costs=costs, replace=True)
    assert found.indices.tolist() == picks
    np.testing.assert_allclose(found.gains, gains, rtol=1e-10)
    rest = chosen("full", "categorical", 3, excluded=excluded, **options)
    assert not set(rest.indices.tolist()) & set(plain.indices.tolist())
    one = ~np.eye(len(added), dtype=bool)[4]
    same = chosen("full", "categorical", 3, excluded=one, **options)
    assert same.indices.tolist() == [4, 4, 4]
    assert np.all(np.diff(same.gains) < 0)


@pytest.mark.slow
@pytest.mark.parametrize("structure", ["kronecker", "full"])
def test_chunks_rows_made_anew_and_jit_choose_the_same(structure, monkeypatch):
    acquisition = selection.variance_reduction(cases.target("categorical"))
    options = {"acquisition": acquisition}
    whole = chosen(structure, "categorical", 5, **options)
    chunks = chosen(structure, "categorical", 5, chunk_size=7, **options)
    state = cases.state(structure, "categorical")
    model = cases.apply_fn, cases.LIKELIHOODS["categorical"]
    monkeypatch.setattr("fisherflow_jax.selection._greedy._KEPT", 0)

    @jax.jit  # rows are made anew for each choice
    def run(state, pool, acquisition):
        return selection.greedy(
            state, *model, pool, 5, acquisition=acquisition, chunk_size=8
        )

    traced = run(state, cases.POOL, acquisition)
    for other in (chunks, traced):
        assert other.indices.tolist() == whole.indices.tolist()
        np.testing.assert_allclose(other.gains, whole.gains, rtol=1e-10)


@pytest.mark.slow
def test_a_lower_rank_is_a_lower_bound():
    whole, leading = (
        chosen("full", "categorical", 1),
        chosen("full", "categorical", 1, rank=1),
    )
    state = cases.state("full", "categorical")
    model = cases.apply_fn, cases.LIKELIHOODS["categorical"]
    gain = selection.information_gain()
    all_, some = (
        selection.values(state, *model, cases.POOL, gain, rank=k) for k in (None, 1)
    )
    assert np.all(some < all_)
    assert whole.gains[0] == pytest.approx(float(all_.max()), rel=1e-12)
    assert leading.gains[0] == pytest.approx(float(some.max()), rel=1e-12)


def test_variances_have_the_scale_of_the_dispersion(belief):
    state = cases.state("full", "gaussian")
    known = belief(
        state.mean,
        state.information,
        dispersion=jnp.asarray(2.5),
        degrees_of_freedom=jnp.asarray(9.0),
    )
    model = cases.apply_fn, ff.likelihoods.gaussian(scale=None)
    for acquisition, factor in (
        (selection.variance_reduction(), 2.5),
        (selection.information_gain(), 1.0),
    ):
        found, unit = (
            selection.values(x, *model, cases.POOL, acquisition) for x in (known, state)
        )
        np.testing.assert_allclose(found, factor * unit, rtol=1e-12)


@pytest.mark.slow
def test_single_precision_over_many_picks():
    rng = np.random.default_rng(3)
    x = rng.normal(size=(300, 20))
    model = lambda p, x: x @ p, ff.likelihoods.categorical()
    params = rng.normal(size=(20, 4)) / 4
    found = []
    for dtype in (jnp.float32, jnp.float64):
        at, pool = jnp.asarray(params, dtype), jnp.asarray(x, dtype)
        state = ff.posterior(at, ff.structures.full(), prior_precision=1e-2)
        found.append(selection.greedy(state, *model, pool, 200))
    single, double = found
    # the same batch, up to gains that are equal to single precision
    np.testing.assert_allclose(single.gains, double.gains, rtol=1e-3)
    same = np.intersect1d(single.indices, double.indices)
    assert len(same) >= 195
    np.testing.assert_allclose(single.gains.sum(), double.gains.sum(), rtol=1e-5)
