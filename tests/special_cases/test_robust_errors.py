"""Robust standard errors as Stata and R printed them; statsmodels ships the numbers.

Stata's `glm` and `poisson` take `n / (n - 1)` for rows and `G / (G - 1)` for clusters,
its `regress` the factors of "HC1".
"""

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
    options = {"robust": True} | options
    return ff.fisher_flow(
        linear, likelihood, prior_precision=1e-10, num_steps=50, **options
    )


def start(flow, batch):
    return flow.init(jnp.zeros(batch.inputs[0].shape[1]))


def updated(flow, batch):
    return flow.update(start(flow, batch), batch)[0]


def cut(batch, sizes):
    """The batch in parts, in order."""
    ends = np.cumsum(sizes)
    for first, end in zip([0, *ends], [*ends, len(batch.targets)], strict=True):
        yield jax.tree.map(lambda x: x[first:end], batch)


def check(state, published, robust, factor=1.0, tolerance=1e-6):
    error = np.asarray(ff.standard_error(state, robust=robust)) * np.sqrt(factor)
    gap = np.abs(np.asarray(state.mean) - published.params) / published.bse
    np.testing.assert_array_less(gap, 2e-6)
    np.testing.assert_allclose(error, published.bse, rtol=tolerance)


@pytest.mark.parametrize("weights", KINDS)
def test_counts_by_kind_of_weight(weights):
    flow = flow_of(POISSON, weights_are=KINDS[weights])
    state = updated(flow, cpunish(weights))
    n = float(state.count)
    assert n == (WEIGHTS.sum() if weights == "fweight" else 17)
    published = getattr(stata, f"results_poisson_{weights}_hc1")
    check(state, published, True, n / (n - 1))
    check(state, published, "HC1", (n - 7) / (n - 1))


@pytest.mark.parametrize("weights", KINDS)
def test_counts_in_clusters_by_kind_of_weight(weights):
    flow = flow_of(POISSON, weights_are=KINDS[weights], num_clusters=10)
    state = updated(flow, cpunish(weights, PAIRS))
    # the tenth cluster has no row, and counts for none
    check(state, getattr(stata, f"results_poisson_{weights}_clu1"), True)


@pytest.mark.parametrize("exposure", [True, False])
def test_ships(exposure):
    data = ships(exposure)
    published = "exposure_" * exposure
    flow = flow_of(POISSON, num_clusters=5)
    clustered = getattr(counts, f"results_poisson_{published}clu")
    check(updated(flow, data), clustered, True)
    # one pass and a refinement, in any cut of the rows
    for sizes in ([12, 9], [20, 1, 5, 4]):
        parts = list(cut(data, sizes))
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


@pytest.mark.parametrize("name", WLS)
def test_weighted_least_squares(name):
    weights, clusters = WLS[name]
    number = None if clusters is None else 9
    flow = flow_of(GAUSSIAN, weights_are=KINDS[weights], num_clusters=number)
    state = updated(flow, cpunish(weights, clusters))
    check(state, getattr(stata, name), "HC1")
