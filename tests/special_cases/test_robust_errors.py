"""Robust standard errors as Stata and R printed them; statsmodels ships the numbers.

Stata's `glm` and `poisson` take `n / (n - 1)` for rows and `G / (G - 1)` for clusters,
its `regress` the factors of "HC1".
"""

import operator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
import statsmodels.api as sm
from statsmodels.discrete.tests.results import results_count_robust_cluster as counts
from statsmodels.genmod.tests.results import res_R_var_weight as r
from statsmodels.genmod.tests.results import results_glm, results_glm_poisson_weights
from statsmodels.regression.tests.results import results_macro_ols_robust as macro

import fisherflow_jax as ff

L = ff.likelihoods
stata = results_glm_poisson_weights
KINDS = {"none": "frequency", "fweight": "frequency", "aweight": "variance"}
KINDS |= {"pweight": "sampling"}
WEIGHTS = np.array([1, 1, 1, 2, 2, 2, 3, 3, 3, 1, 1, 1, 2, 2, 2, 3, 3.0])
PAIRS = np.arange(1, 18) // 2  # of cpunish's rows
POISSON = L.poisson()
GAUSSIAN = L.gaussian(scale=None)


def linear(params, inputs):
    x, offset = inputs
    return x @ params + offset


def with_constant(columns):
    return sm.add_constant(np.asarray(columns, float), prepend=False)


def cpunish(weights="none", clusters=None):
    data = sm.datasets.cpunish.load_pandas()
    columns = np.array(data.exog, float)
    columns[:, 3] = np.log(columns[:, 3])
    given = None if weights == "none" else WEIGHTS
    inputs = with_constant(columns), np.zeros(17)
    return ff.Batch(inputs, np.array(data.endog, float), given, clusters)


def ships(exposure=True, clusters=True):
    data = pd.read_csv(Path(counts.__file__).with_name("ships.csv")).dropna()
    offset = np.log(data["service"].to_numpy(float))
    return ff.Batch(
        (with_constant(data[["yr_con", "op_75_79"]]), offset * exposure),
        data["accident"].to_numpy(float),
        clusters=data["ship"].to_numpy(int) - 1 if clusters else None,
    )


def flow_of(likelihood, **options):
    options = {"robust": True, "num_steps": 50} | options
    return ff.fisher_flow(linear, likelihood, prior_precision=1e-10, **options)


def start(flow, batch):
    return flow.init(jnp.zeros(batch.inputs[0].shape[1]))


def updated(flow, batch):
    return flow.update(start(flow, batch), batch)[0]


def cut(batch, sizes, length):
    """The batch in parts, in order, each filled up to a length by weights of zero."""
    parts, ends = [], np.cumsum([0, *sizes])
    for first, size in zip(ends[:-1], sizes, strict=True):
        rows = np.minimum(first + np.arange(length), len(batch.targets) - 1)
        part = jax.tree.map(operator.itemgetter(rows), batch)
        parts.append(part._replace(weights=(np.arange(length) < size).astype(float)))
    assert ends[-1] == len(batch.targets)
    return parts


def check(state, published, robust, factor=1.0, tolerance=1e-6):
    error = np.asarray(ff.standard_error(state, robust=robust)) * np.sqrt(factor)
    gap = np.abs(np.asarray(state.mean) - published.params) / published.bse
    np.testing.assert_array_less(gap, 1e-5)
    np.testing.assert_allclose(error, published.bse, rtol=tolerance)


@pytest.mark.slow_cases
@pytest.mark.parametrize("weights", KINDS)
def test_counts_by_kind_of_weight(weights):
    flow = flow_of(POISSON, weights_are=KINDS[weights])
    state = updated(flow, cpunish(weights))
    n = float(state.count)
    assert n == (WEIGHTS.sum() if weights == "fweight" else 17)
    published = getattr(stata, f"results_poisson_{weights}_hc1")
    check(state, published, True, n / (n - 1))
    check(state, published, "HC1", (n - 7) / (n - 1))


@pytest.mark.slow_cases
@pytest.mark.parametrize("weights", KINDS)
def test_counts_in_clusters_by_kind_of_weight(weights):
    flow = flow_of(POISSON, weights_are=KINDS[weights], num_clusters=10)
    state = updated(flow, cpunish(weights, PAIRS))
    # the tenth cluster has no row, and counts for none
    check(state, getattr(stata, f"results_poisson_{weights}_clu1"), True)


@pytest.mark.slow_cases
@pytest.mark.parametrize("exposure", [True, False])
def test_ships(exposure):
    data = ships(exposure)
    published = "exposure_" * exposure
    flow = flow_of(POISSON, num_clusters=5)
    clustered = getattr(counts, f"results_poisson_{published}clu")
    check(updated(flow, data), clustered, True)
    # one pass and refinements, in any cut of the rows
    for sizes in ([14, 14, 6], [5, 1, 14, 14]):
        parts = cut(data, sizes, 14)
        state = start(flow, data)
        for part in parts:
            state, _ = flow.update(state, part)
        for _ in range(4):
            state = ff.refine(flow, state, parts)
        check(state, clustered, True)
    state = updated(flow_of(POISSON), data._replace(clusters=None))
    n = len(data.targets)
    check(state, getattr(counts, f"results_poisson_{published}hc1"), True, n / (n - 1))


WLS = {
    "results_wls_aweight_robust": ("aweight", None),
    "results_wls_aweight_clu1": ("aweight", PAIRS),
    "results_wls_fweight_clu1": ("fweight", PAIRS),
    "results_wls_pweight_clu1": ("pweight", PAIRS),
}


@pytest.mark.slow_cases
@pytest.mark.parametrize("name", WLS)
def test_weighted_least_squares(name):
    weights, clusters = WLS[name]
    number = None if clusters is None else 9
    flow = flow_of(GAUSSIAN, weights_are=KINDS[weights], num_clusters=number)
    state = updated(flow, cpunish(weights, clusters))
    check(state, getattr(stata, name), "HC1")


def test_the_dispersion_counts_rows_of_variance_weights():
    """R's `glm`, and least squares of an unknown scale."""
    data = results_glm.CancerLog()
    weights = np.ones(len(data.endog))
    weights[::5], weights[::13] = 5, 3
    inputs = sm.add_constant(np.array(data.exog, float)[:, :-1])
    batch = ff.Batch(
        (inputs, np.zeros(len(inputs))), np.array(data.endog, float), weights
    )
    flow = flow_of(L.gamma(shape=None), weights_are="variance", robust=False)
    # R stops when the deviance changes by less than 1e-8 of it
    check(updated(flow, batch), r.results_gamma_aweights_nonrobust, False, 1, 1e-5)

    (inputs, offset), targets, weights, *_ = cpunish("aweight")
    inputs = inputs / inputs.max(axis=0)  # a prior of 1e-10 is small
    fit = sm.WLS(targets, inputs, weights).fit()
    state = updated(
        flow_of(GAUSSIAN, weights_are="variance"),
        ff.Batch((inputs, offset), targets, weights),
    )
    check(state, fit, False)
    np.testing.assert_allclose(state.dispersion, fit.scale, rtol=1e-7)


def test_a_refined_sandwich_is_that_of_the_batch_fit():
    """Greene's investment equation: 202 quarters, one pass, then Stata's numbers."""
    data = sm.datasets.macrodata.load_pandas().data
    growth = 400 * np.diff(np.log(data[["realinv", "realgdp"]].to_numpy()), axis=0)
    inputs = with_constant(np.column_stack([growth[:, 1], data["realint"][:-1]]))
    batch = ff.Batch((inputs, np.zeros(202)), growth[:, 0])
    flow = flow_of(L.gaussian(), num_steps=1)
    parts = cut(batch, [20] * 10 + [2], 20)
    state = start(flow, batch)
    for part in parts:
        state, _ = flow.update(state, part)
    hc0, hc1 = macro.results_ivhc0_large, macro.results_hc0
    streamed = np.asarray(ff.standard_error(state, robust=True))
    assert np.max(streamed / hc0.bse) > 1.05  # each batch's scores before it was fitted
    state = ff.refine(flow, state, parts)
    check(state, hc0, "HC0")
    check(state, hc1, "HC1")
