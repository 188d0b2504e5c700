"""What R, Stata and NIST printed for public data sets, by one update of all rows.

The numbers are those that statsmodels ships with its tests. R stops its
iterations early (deviance changed by less than 1e-8 of it), so each fit is also held
against statsmodels' own, which goes on until nothing changes; `printed` says how far a
published table is from that, where it is further than 1e-5.
"""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
import statsmodels.api as sm
from statsmodels.discrete.tests.results import results_count_robust_cluster as counts
from statsmodels.discrete.tests.results import results_discrete as discrete
from statsmodels.genmod import families
from statsmodels.genmod.tests.results import results_glm as glm
from statsmodels.genmod.tests.results import results_glm_poisson_weights as stata
from statsmodels.regression.tests.results import results_regression
from statsmodels.tsa.statespace.tests import results as filters

import fisherflow_jax as ff

L = ff.likelihoods
standard_error = jax.jit(ff.standard_error)
PRIOR_PRECISION = 1e-10
WEIGHTS = np.array([1, 1, 1, 2, 2, 2, 3, 3, 3, 1, 1, 1, 2, 2, 2, 3, 3.0])


class Data(NamedTuple):
    """Rows of a generalised linear model."""

    inputs: np.ndarray
    targets: np.ndarray
    weights: Any = 1.0
    offset: Any = 0.0


def linear(params, inputs):
    x, offset = inputs
    return x @ params + offset


def classes(params, inputs):
    """Logits of classes of which the first's is zero."""
    x, _ = inputs
    return jnp.pad(x @ params, ((0, 0), (1, 0)))


# ---- data


def with_constant(columns):
    return sm.add_constant(np.asarray(columns, float), prepend=False)


def lbw():
    data = glm.Lbw()
    return Data(np.array(data.exog, float), np.array(data.endog, float))


def star98():
    """Successes of n are a share, of weight n."""
    data = sm.datasets.star98.load_pandas()
    successes = np.array(data.endog, float)
    number = successes.sum(axis=1)
    return Data(with_constant(data.exog), successes[:, 0] / number, number)


def cpunish(weights=1.0):
    data = sm.datasets.cpunish.load_pandas()
    columns = np.array(data.exog, float)
    columns[:, 3] = np.log(columns[:, 3])
    return Data(with_constant(columns), np.array(data.endog, float), weights)


def ships():
    """Accidents per month of service: the exposure's logarithm is an offset."""
    data = pd.read_csv(Path(counts.__file__).with_name("ships.csv")).dropna()
    inputs = with_constant(data[["yr_con", "op_75_79"]])
    exposure = data["service"].to_numpy(float)
    return Data(inputs, data["accident"].to_numpy(float), offset=np.log(exposure))


def cancer():
    data = glm.CancerLog()
    return Data(np.array(data.exog, float), np.array(data.endog, float))


def committee():
    data = sm.datasets.committee.load_pandas()
    columns = np.array(data.exog, float)
    columns[:, 2] = np.log(columns[:, 2])
    columns = np.column_stack([columns, columns[:, 2] * columns[:, 1]])
    return Data(with_constant(columns), np.array(data.endog, float))


def randhie():
    data = sm.datasets.randhie.load_pandas()
    return Data(with_constant(data.exog), np.array(data.endog, float))


# ---- fits


def filled(data):
    """Inputs with their offset, targets, weights."""
    number = len(data.targets)
    offset, weights = (
        np.broadcast_to(np.asarray(x, float), number)
        for x in (data.offset, data.weights)
    )
    return (data.inputs, offset), data.targets, weights


def flow_of(likelihood, apply_fn=linear, **options):
    return ff.fisher_flow(
        apply_fn, likelihood, prior_precision=PRIOR_PRECISION, **options
    )


def updated(flow, data, start=None):
    """The state after one update of all rows."""
    start = jnp.zeros(data.inputs.shape[1]) if start is None else start
    return flow.update(flow.init(start), filled(data))[0]


def check(mean, error, params, bse, tolerance=1e-5):
    """Estimates within `tolerance` standard errors, standard errors relative."""
    bse = np.asarray(bse)
    np.testing.assert_array_less(np.abs(np.asarray(mean) - params) / bse, tolerance)
    np.testing.assert_allclose(error, bse, rtol=tolerance)


NB2 = discrete.RandHIE.negativebinomial_nb2_bfgs


class OfSlopes(NamedTuple):
    """A table without its last row, that of the concentration."""

    params: Any
    bse: Any


class Case(NamedTuple):
    likelihood: Any
    family: Any  # statsmodels
    data: Any
    published: Any
    printed: float = 1e-5


CASES = {
    "lbw": Case(L.bernoulli(), families.Binomial(), lbw, glm.Lbw(), 2e-5),
    "star98": Case(L.bernoulli(), families.Binomial(), star98, glm.Star98()),
    "cpunish": Case(L.poisson(), families.Poisson(), cpunish, glm.Cpunish()),
    "cpunish, frequency weights": Case(
        L.poisson(),
        families.Poisson(),
        lambda: cpunish(WEIGHTS),
        stata.results_poisson_fweight_nonrobust,
    ),
    "ships with exposure": Case(
        L.poisson(),
        families.Poisson(),
        ships,
        counts.results_poisson_exposure_nonrobust,
    ),
    "randhie, its concentration known": Case(
        L.negative_binomial(1 / NB2.params[-1]),
        families.NegativeBinomial(alpha=NB2.params[-1]),
        randhie,
        OfSlopes(NB2.params[:-1], NB2.bse[:-1]),
    ),
    "cancer": Case(
        L.gamma(shape=None),
        families.Gamma(families.links.Log()),
        cancer,
        glm.CancerLog(),
        1e-4,
    ),
}


@pytest.mark.slow_cases
@pytest.mark.parametrize("name", CASES)
def test_generalised_linear_models(name):
    case = CASES[name]
    data = case.data()
    state = updated(flow_of(case.likelihood), data)
    error = standard_error(state)
    check(state.mean, error, case.published.params, case.published.bse, case.printed)
    (inputs, offset), targets, weights = filled(data)
    model = sm.GLM(
        targets, inputs, family=case.family, freq_weights=weights, offset=offset
    )
    fit = model.fit(tol=1e-14)
    check(state.mean, error, fit.params, fit.bse)
    if state.dispersion is not None:
        np.testing.assert_allclose(state.dispersion, fit.scale, rtol=1e-5)


QUASI = {
    "cpunish": (L.poisson, families.Poisson(), cpunish),
    "star98, each share one row": (
        L.bernoulli,
        families.Binomial(),
        lambda: star98()._replace(weights=1.0),
    ),
    "committee": (
        lambda dispersion: L.negative_binomial(1.0, dispersion),
        families.NegativeBinomial(alpha=1.0),
        committee,
    ),
}


@pytest.mark.slow_cases
@pytest.mark.parametrize("name", QUASI)
def test_quasi_dispersion(name):
    """Pearson's; a dispersion that is given divides the information."""
    likelihood, family, data = QUASI[name]
    state = updated(flow_of(likelihood(dispersion=None)), data())
    (inputs, offset), targets, weights = filled(data())
    model = sm.GLM(targets, inputs, family=family, freq_weights=weights, offset=offset)
    fit = model.fit(tol=1e-14, scale="X2")
    np.testing.assert_allclose(state.dispersion, fit.scale, rtol=1e-5)
    np.testing.assert_allclose(state.degrees_of_freedom, fit.df_resid, rtol=1e-6)
    # scoring of a link that is not canonical ends a little before the optimum
    near = 1e-5
    check(state.mean, standard_error(state), fit.params, fit.bse, near)
    if name == "committee":  # R's
        published = glm.Committee()
        np.testing.assert_allclose(state.dispersion, published.scale, rtol=1e-4)
        error = standard_error(state)
        check(state.mean, error, published.params, published.bse, 3e-4)
    known = updated(flow_of(likelihood(dispersion=float(state.dispersion))), data())
    check(known.mean, standard_error(known), fit.params, fit.bse, near)


def test_quasi_binomial_shares_of_trials():
    """R's quasibinomial: a share of n trials is one row, of variance p q / n."""
    data = star98()
    columns = data.inputs[:, :-1]
    columns = with_constant((columns - columns.mean(axis=0)) / columns.std(axis=0))
    data = data._replace(inputs=columns)
    flow = flow_of(L.bernoulli(dispersion=None), weights_are="variance")
    state = updated(flow, data)
    model = sm.GLM(
        data.targets, columns, family=families.Binomial(), var_weights=data.weights
    )
    fit = model.fit(tol=1e-14, scale="X2")
    np.testing.assert_allclose(state.dispersion, fit.scale, rtol=1e-5)
    np.testing.assert_allclose(state.degrees_of_freedom, fit.df_resid, rtol=1e-6)
    check(state.mean, standard_error(state), fit.params, fit.bse)


@pytest.mark.slow
def test_anes():
    """Seven classes; Stata's mlogit, checked by its authors against R's nnet."""
    data = sm.datasets.anes96.load_pandas()
    inputs, targets = with_constant(data.exog), np.array(data.endog, int)
    flow = flow_of(L.categorical(), classes)
    state = updated(flow, Data(inputs, targets), jnp.zeros((6, 6)))
    published = discrete.Anes.mnlogit_basezero
    check(state.mean, standard_error(state), published.params, published.bse)


@pytest.mark.slow
def test_longley():
    """NIST's certified values, which are of raw columns of condition 5e9.

    The columns are centred and scaled for the fit: a prior of 1e-10 is no small one
    for the raw constant, whose standard error is 890,420.
    """
    data = sm.datasets.longley.load_pandas()
    raw, targets = np.array(data.exog, float), np.array(data.endog, float)
    middle, width = raw.mean(axis=0), raw.std(axis=0)
    inputs = with_constant((raw - middle) / width)
    state = updated(flow_of(L.gaussian(scale=None)), Data(inputs, targets))

    def of_raw_columns(params):
        slopes = params[:-1] / width
        return jnp.append(slopes, params[-1] - slopes @ middle)

    published = results_regression.Longley()
    found = ff.delta_method(state, of_raw_columns)
    check(found.estimate, found.standard_error, published.params, published.bse)
    np.testing.assert_allclose(state.dispersion, published.scale, rtol=1e-5)
    np.testing.assert_allclose(state.degrees_of_freedom, published.df_resid, rtol=1e-6)


def test_levels_with_holes():
    """Three random walks seen with noise and gaps, beside KFAS."""
    published = pd.read_csv(Path(filters.__file__).with_name("results_smoothing_R.csv"))
    table = sm.datasets.macrodata.load_pandas().data
    levels = table[["realgdp", "realcons", "realinv"]].diff().iloc[1:].to_numpy(float)
    for channel, first, last in ((0, 0, 50), (1, 19, 70), (2, 39, 90)):
        levels[first:last, channel] = np.nan
    levels[119:130, [0, 2]] = np.nan
    flow = ff.fisher_flow(
        lambda level, inputs: inputs + level,
        L.gaussian(),
        memory=ff.memories.random_walk(1.0),
        prior_precision=1e-6,
        prior_is="predicted",
    )

    def step(state, batch):
        state, _ = flow.update(state, batch)
        return state, (state.mean, standard_error(state))

    # an observation is a target: weights of zero are those that are missing
    batches = (np.zeros_like(levels), levels, np.isfinite(levels).astype(float))
    batches = jax.tree.map(lambda x: x[:, None], batches)
    state, (mean, error) = jax.lax.scan(step, flow.init(jnp.zeros(3)), batches)
    expected = published[["a1", "a2", "a3"]].to_numpy()
    gap = np.abs(mean - expected) / np.sqrt(error**2 + 1)
    np.testing.assert_array_less(gap, 1e-5)
    predicted = np.prod(error**2 + 1, axis=1)
    np.testing.assert_allclose(predicted, published["detP"], rtol=1e-7)
    np.testing.assert_allclose(state.log_evidence, -205310.9767, rtol=1e-9)
