"""States are weighted Gaussians, whatever they are made of."""

import inspect
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import fisherflow_jax as ff
from fisherflow_jax.posteriors import Gaussian, gaussian, gaussians

MEANS = [np.array([0.0, 1.0]), np.array([2.0, -1.0])]


class Mixture(NamedTuple):
    """A mixture that nobody here knows of."""

    members: tuple
    weights: Any


class Pair(NamedTuple):
    first: Any
    second: Any


def state(mean):
    information = ff.structures.Diagonal(jnp.array([3.0, 15.0]))
    return ff.posterior(jnp.asarray(mean, jnp.float32), information, prior_precision=1)


MEMBERS = tuple(map(state, MEANS))


def test_a_state_is_one_gaussian():
    weights, (one,) = gaussians(MEMBERS[0])
    np.testing.assert_array_equal(weights, [1.0])
    assert one.mean is MEMBERS[0].mean
    assert one.information == MEMBERS[0].information
    assert one[2:-1] == (None,) * 5
    assert one.prior_precision == ff.structures.Scalar(1.0)
    # which is itself a state
    assert gaussian(one).mean is one.mean


def test_a_bank_an_ensemble_and_another_mixture_are_the_same_mixture():
    bank = ff.BankState(MEMBERS, jnp.log(jnp.array([0.5, 0.5])))
    for mixture in (bank, MEMBERS, list(MEMBERS), Mixture(MEMBERS, [0.5, 0.5])):
        weights, members = gaussians(mixture)
        np.testing.assert_allclose(weights, [0.5, 0.5], rtol=1e-6)
        np.testing.assert_array_equal([one.mean for one in members], MEANS)
        # variance within, 1 / 4 and 1 / 16, and between
        np.testing.assert_allclose(
            ff.standard_error(mixture), np.sqrt([1.25, 1.0625]), rtol=1e-6
        )
        lower, upper = ff.confidence_interval(mixture)
        np.testing.assert_allclose((lower + upper) / 2, [1.0, 0.0], atol=1e-6)
        drawn = ff.sample(mixture, 0, (7,))
        np.testing.assert_array_equal(drawn, ff.sample(bank, 0, (7,)))
        np.testing.assert_array_equal(ff.summary(mixture).estimate, [1.0, 0.0])


def test_mixtures_of_mixtures_are_flattened():
    inner = Mixture(MEMBERS, jnp.array([0.25, 0.75]))
    weights, members = gaussians(Mixture((inner, MEMBERS[0]), jnp.array([0.5, 0.5])))
    np.testing.assert_allclose(weights, [0.125, 0.375, 0.5])
    np.testing.assert_array_equal([one.mean for one in members], [*MEANS, MEANS[0]])


def test_the_moments_of_a_flow_s_state_are_read_in_one_place():
    flow = ff.fisher_flow(
        lambda params, x: x @ params,
        ff.likelihoods.gaussian(scale=None),
        structure=ff.structures.full(),
        memory=ff.memories.stationary(),
        robust=True,
    )
    x = np.random.default_rng(0).normal(size=(9, 2)).astype(np.float32)
    found, _ = flow.update(flow.init(jnp.zeros(2)), (x, x[:, 0] + x[:, 1] ** 2))
    one = gaussian(found)
    assert one.num_observations == 9
    assert one.dispersion == found.dispersion
    assert one.degrees_of_freedom == found.degrees_of_freedom
    jax.tree.map(np.testing.assert_array_equal, one.meat, found.meat)
    # the sandwich has the dispersion in it
    assert gaussian(found, robust=True).dispersion is None


@pytest.mark.parametrize(
    "function",
    [
        ff.standard_error,
        ff.confidence_interval,
        ff.summary,
        lambda state: ff.sample(state, 0),
        lambda state: ff.delta_method(state, jnp.sum),
        lambda state: ff.wald_test(state, jnp.ones(2)),
        lambda state: ff.log_density(state, jnp.ones(2)),
    ],
)
@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (jnp.ones(2), "ArrayImpl"),
        (None, "NoneType"),
        ((), "tuple"),
        ({"w": jnp.ones(2)}, "dict"),
        (ff.posterior, "posterior"),
        ([MEMBERS[0], 1.0], "float"),
    ],
)
def test_one_place_says_what_is_no_state(function, value, kind):
    with pytest.raises(TypeError, match=rf"has \.mean and \.information.*got {kind}"):
        function(value)


def test_reprs_are_short():
    assert repr(MEMBERS[0]) == (
        "posterior(mean: 2 parameters, information: Diagonal, temperature 1.0)"
    )
    one = Gaussian(jnp.zeros(1), ff.structures.Scalar(jnp.ones(())))
    assert repr(one) == "Gaussian(mean: 1 parameter, information: Scalar)"
    # of trees of anything, as jax.tree.map makes them, and under a trace
    assert "Diagonal" in repr(jax.tree.map(lambda x: x.dtype, MEMBERS[0]))
    shown = []
    jax.jit(lambda state: shown.append(repr(state)))(MEMBERS[0])
    assert "2 parameters" in shown[0]


def test_fields_are_documented():
    for kind in (ff.Posterior, ff.Estimate, ff.WaldTest):
        described = inspect.getdoc(kind)
        assert all(f"\n  {field}: " in described for field in kind._fields), kind
    for field in ff.Summary.__dataclass_fields__:
        assert field in ff.Summary.__doc__


def test_tails_are_those_of_scipy_stats():
    precise = ff.posterior(
        jnp.array([0.5, -4.0, 12.0]),
        ff.structures.Scalar(jnp.ones(())),
        prior_precision=1.0,
    )
    table = ff.summary(precise)
    expected = 2 * stats.norm.sf(np.abs(table.statistic))
    np.testing.assert_allclose(table.p_value, expected, rtol=1e-13)
    test = ff.wald_test(precise, lambda params: params)
    np.testing.assert_allclose(
        test.p_value, stats.chi2.sf(test.statistic, 3), rtol=1e-13
    )
    estimated = Gaussian(
        *precise[:2], dispersion=jnp.ones(()), degrees_of_freedom=jnp.array(4.5)
    )
    table, test = ff.summary(estimated), ff.wald_test(estimated, lambda params: params)
    expected = 2 * stats.t.sf(np.abs(table.statistic), 4.5)
    np.testing.assert_allclose(table.p_value, expected, rtol=1e-13)
    np.testing.assert_allclose(
        test.p_value, stats.f.sf(test.statistic, 3, 4.5), rtol=1e-13
    )


def test_a_result_that_has_a_state_says_where():
    x, y = jnp.ones((3, 1)), jnp.arange(3.0)
    found = ff.laplace(
        lambda p, x: x @ p, ff.likelihoods.gaussian(), jnp.zeros(1), [(x, y)]
    )
    with pytest.raises(TypeError, match=r"Laplace is no state, but has one: \.state\."):
        ff.standard_error(found)
    assert len(gaussians(Pair(*MEMBERS))[1]) == 2  # a mixture
