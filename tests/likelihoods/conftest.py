"""One case for each likelihood with a closed form: reference, outputs, quadrature."""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import scipy.special
import scipy.stats

from fisherflow_jax import expectations, likelihoods


class Case(NamedTuple):
    """A likelihood, where to look at it, and independent references in numpy."""

    name: str
    likelihood: likelihoods.Likelihood
    outputs: np.ndarray  # (n, ...)
    targets: np.ndarray  # (n,)
    log_prob: Callable  # (outputs, targets) -> (n,), from scipy
    nodes: Callable  # outputs of one example -> targets and weights of an expectation
    impossible: tuple  # targets outside the support


def softmax_log_prob(outputs, targets):
    p = scipy.special.softmax(outputs, axis=-1)
    return np.array(
        [
            scipy.stats.multinomial.logpmf(np.eye(len(row))[target], 1, row)
            for row, target in zip(p, targets, strict=True)
        ]
    )


def normal_nodes(location, scale):
    x, weights = np.polynomial.hermite_e.hermegauss(30)
    return location + scale * x, weights / np.sqrt(2 * np.pi)


def student_t_nodes(location, scale, df):
    x, weights = np.polynomial.legendre.leggauss(200)
    angle = 0.5 * np.pi * x
    unit = np.sqrt(df) * np.tan(angle)
    jacobian = 0.5 * np.pi * np.sqrt(df) / np.cos(angle) ** 2
    return location + scale * unit, weights * jacobian * scipy.stats.t.pdf(unit, df)


def gamma_nodes(log_mean, shape):
    x, weights = scipy.special.roots_genlaguerre(40, shape - 1)
    return np.exp(log_mean) * x / shape, weights / scipy.special.gamma(shape)


def negative_binomial_of(log_mean, concentration):
    p = concentration / (concentration + np.exp(log_mean))
    return scipy.stats.nbinom(concentration, p)


def counts_nodes(distribution):
    counts = np.arange(400)
    return counts, distribution.pmf(counts)


def gumbel_nodes(location, scale):
    """A trapezoid, exact to rounding for what falls off at both ends."""
    x, step = np.linspace(-6, 60, 3000, retstep=True)
    return location + scale * x, step * scipy.stats.gumbel_r.pdf(x)


LOGITS = np.array([[0.3, -1.2, 2.0], [0.0, 0.0, 0.0], [4.0, 4.0, -3.0], [-7.0, 1.0, 0]])
REALS = np.array([-2.3, -0.4, 0.0, 0.7, 1.9])
REAL_TARGETS = np.array([-1.1, 0.6, 5.3, 0.7, -3.0])

CASES = [
    Case(
        "categorical",
        likelihoods.categorical(),
        LOGITS,
        np.array([0, 2, 1, 0]),
        softmax_log_prob,
        lambda z: (np.arange(3), scipy.special.softmax(z)),
        (-1, 3, -128, 127),
    ),
    Case(
        "bernoulli",
        likelihoods.bernoulli(),
        REALS,
        np.array([1, 0, 1, 1, 0]),
        lambda z, y: scipy.stats.bernoulli.logpmf(y, scipy.special.expit(z)),
        lambda z: (np.arange(2), scipy.special.expit(np.array([-z, z]))),
        (-1, 2, -0.01, 1.01, np.nan),
    ),
    Case(
        "gaussian",
        likelihoods.gaussian(scale=1.7),
        REALS,
        REAL_TARGETS,
        lambda z, y: scipy.stats.norm.logpdf(y, z, 1.7),
        lambda z: normal_nodes(z, 1.7),
        (np.nan, np.inf, -np.inf),
    ),
    Case(
        "gaussian_location_scale",
        likelihoods.gaussian_location_scale(),
        np.stack([REALS, REALS[::-1] / 2], -1),
        REAL_TARGETS,
        lambda z, y: scipy.stats.norm.logpdf(y, z[:, 0], np.exp(z[:, 1])),
        lambda z: normal_nodes(z[0], np.exp(z[1])),
        (np.nan, np.inf, -np.inf),
    ),
    Case(
        "student_t",
        likelihoods.student_t(df=9.0, scale=0.6),
        REALS,
        REAL_TARGETS,
        lambda z, y: scipy.stats.t.logpdf(y, 9.0, z, 0.6),
        lambda z: student_t_nodes(z, 0.6, 9.0),
        (np.nan, np.inf, -np.inf),
    ),
    Case(
        "gamma",
        likelihoods.gamma(shape=2.5),
        REALS,
        np.array([0.1, 0.6, 5.3, 0.7, 3.0]),
        lambda z, y: scipy.stats.gamma.logpdf(y, 2.5, scale=np.exp(z) / 2.5),
        lambda z: gamma_nodes(z, 2.5),
        (0, -1, 0.0, -0.5, np.nan, np.inf),
    ),
    Case(
        "poisson",
        likelihoods.poisson(),
        REALS,
        np.array([0, 1, 0, 3, 11]),
        lambda z, y: scipy.stats.poisson.logpmf(y, np.exp(z)),
        lambda z: counts_nodes(scipy.stats.poisson(np.exp(z))),
        (-1, -0.5, np.nan, np.inf),
    ),
    Case(
        "negative_binomial",
        likelihoods.negative_binomial(concentration=2.5),
        REALS,
        np.array([0, 1, 0, 3, 11]),
        lambda z, y: negative_binomial_of(z, 2.5).logpmf(y),
        lambda z: counts_nodes(negative_binomial_of(z, 2.5)),
        (-1, -0.5, np.nan, np.inf),
    ),
    Case(
        "gumbel",
        likelihoods.from_distribution(
            lambda z: dist.Gumbel(z[0], jnp.exp(z[1])), expectations.quantiles(200)
        ),
        np.stack([REALS, REALS[::-1] / 2], -1),
        REAL_TARGETS,
        lambda z, y: scipy.stats.gumbel_r.logpdf(y, z[:, 0], np.exp(z[:, 1])),
        lambda z: gumbel_nodes(z[0], np.exp(z[1])),
        (np.nan, np.inf, -np.inf),
    ),
]


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        metafunc.parametrize("case", CASES, ids=[case.name for case in CASES])
