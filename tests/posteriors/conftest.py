"""Beliefs made by hand, and regressions fitted by us and by statsmodels."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import statsmodels.api as sm

import fisherflow_jax as ff
from beliefs import Belief


class Fit(NamedTuple):
    """One data set, fitted by a flow and by statsmodels."""

    state: ff.FlowState
    model: Any  # statsmodels, not fitted yet
    likelihood: ff.likelihoods.Likelihood

    def reference(self, robust: bool = False) -> Any:
        """The fit of statsmodels: t statistics where the dispersion is estimated."""
        options: dict = {"use_t": self.state.residual is not None}
        if robust:
            options["cov_type"] = "HC0"
        if isinstance(self.model, sm.GLM):
            options |= {"tol": 1e-13, "maxiter": 200}
        return self.model.fit(**options)


def linear(params: jax.Array, inputs: jax.Array) -> jax.Array:
    return inputs @ params


def design(rows: int, seed: int) -> tuple[np.ndarray, np.random.Generator]:
    rng = np.random.default_rng(seed)
    return sm.add_constant(rng.normal(size=(rows, 3)) * [1.0, 2.0, 1.0]), rng


def logit_data() -> tuple:
    x, rng = design(60, 1)
    return x, (rng.logistic(size=60) < x @ [-0.2, 0.8, 0.3, 0.0]).astype(float)


def poisson_data() -> tuple:  # overdispersed
    x, rng = design(60, 2)
    rate = np.exp(x @ [0.7, 0.3, -0.2, 0.1]) * rng.gamma(1.5, 1 / 1.5, size=60)
    return x, rng.poisson(rate).astype(float)


def scotland_data() -> tuple:
    data = sm.datasets.scotland.load_pandas()
    x = data.exog.to_numpy(float)
    scaled = (x - x.mean(0)) / x.std(0)
    return sm.add_constant(scaled), data.endog.to_numpy(float)


def stackloss_data() -> tuple:
    data = sm.datasets.stackloss.load_pandas()
    return sm.add_constant(data.exog.to_numpy(float)), data.endog.to_numpy(float)


def glm(family: Any) -> Callable:
    return functools.partial(sm.GLM, family=family)


REGRESSIONS = {
    "stackloss": (stackloss_data, ff.likelihoods.gaussian(scale=None), sm.OLS),
    "logit": (logit_data, ff.likelihoods.bernoulli(), glm(sm.families.Binomial())),
    "poisson": (poisson_data, ff.likelihoods.poisson(), glm(sm.families.Poisson())),
    "scotland": (
        scotland_data,
        ff.likelihoods.gamma(shape=None),
        glm(sm.families.Gamma(sm.families.links.Log())),
    ),
}


@functools.cache
def fitted(name: str) -> Fit:
    data, likelihood, model = REGRESSIONS[name]
    x, y = data()
    flow = ff.fisher_flow(
        linear,
        likelihood,
        structure=ff.structures.full(),
        memory=ff.memories.stationary(),
        prior_precision=1e-9,
        robust=True,
    )

    @jax.jit
    def solve(x: jax.Array, y: jax.Array) -> ff.FlowState:
        return ff.warm_start(flow, flow.init(jnp.zeros(x.shape[1])), (x, y))

    return Fit(solve(jnp.asarray(x), jnp.asarray(y)), model(y, x), likelihood)


@pytest.fixture(scope="session")
def belief() -> type[Belief]:
    return Belief


@pytest.fixture(scope="session")
def fit() -> Callable[[str], Fit]:
    return fitted
