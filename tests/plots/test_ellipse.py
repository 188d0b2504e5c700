"""The ellipse of two parameters, against scipy's quantiles and explicit inverses."""

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import fisherflow_jax as ff
from fisherflow_jax import plots

ROOT = np.random.default_rng(0).normal(size=(4, 4))
MATRIX = ROOT @ ROOT.T + np.eye(4)
LIKE = {"b": jnp.asarray(0.5), "w": jnp.asarray([1.0, -2.0, 0.3])}


def full(matrix):
    structure = ff.structures.full()
    root = np.linalg.cholesky(matrix).T
    return structure.reduce(
        {"b": jnp.asarray(root[:, 0]), "w": jnp.asarray(root[:, 1:])}
    )


def squared_radius(ax, middle, covariance):
    points = ax.lines[0].get_xydata() - middle
    return np.einsum("ni,ij,nj->n", points, np.linalg.inv(covariance), points)


@pytest.mark.parametrize("level", [0.5, 0.95, None])
def test_the_others_are_free_and_the_level_is_that_of_chi_square(level):
    information = full(MATRIX - np.eye(4))
    state = ff.posterior(LIKE, information, prior_precision=1.0)
    ax = plots.information_ellipse(state, ["w[2]", "b"], level=level, label="both")
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("w[2]", "b")
    covariance = np.linalg.inv(MATRIX)[np.ix_([3, 0], [3, 0])]
    expected = 1.0 if level is None else stats.chi2.ppf(level, 2)
    found = squared_radius(ax, [0.3, 0.5], covariance)
    np.testing.assert_allclose(found, np.full(201, expected), rtol=1e-9)
    np.testing.assert_allclose(ax.lines[1].get_xydata(), [[0.3, 0.5]])


@pytest.mark.slow
def test_of_an_estimated_dispersion_it_is_twice_f():
    x, y = np.random.default_rng(1).normal(size=(2, 12))
    x = np.stack([np.ones(12), x], 1)
    flow = ff.fisher_flow(
        lambda params, x: x @ params,
        ff.likelihoods.gaussian(scale=None),
        prior_precision=1e-9,
    )
    state, _ = flow.update(flow.init(jnp.zeros(2)), (jnp.asarray(x), jnp.asarray(y)))
    ax = plots.information_ellipse(state, level=0.9)
    mean = np.linalg.lstsq(x, y, rcond=None)[0]
    variance = np.sum((y - x @ mean) ** 2) / 10
    found = squared_radius(ax, mean, variance * np.linalg.inv(x.T @ x))
    np.testing.assert_allclose(found, 2 * stats.f.ppf(0.9, 2, 10), rtol=1e-6)


def test_a_metric_is_drawn_around_zero():
    metric = ff.structures.Full(jnp.asarray([[3.0, 1.0], [1.0, 1.5]]))
    ax = plots.information_ellipse(metric, level=None)
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("theta[0]", "theta[1]")
    found = squared_radius(ax, [0, 0], np.linalg.inv(metric.rows))
    np.testing.assert_allclose(found, np.ones(201), rtol=1e-9)


def test_what_has_no_ellipse():
    information = full(MATRIX)
    for names, got in (
        (None, "'b'"),
        ("w[0]", r"'w\[0\]'\]"),
        (["b", "b"], "'b', 'b'"),
    ):
        with pytest.raises(ValueError, match=rf"two of \['b', 'w\[0\]'.* got \[{got}"):
            plots.information_ellipse(information, names)
    with pytest.raises(ValueError, match=r"got \['b', 'v'\]"):
        plots.information_ellipse(information, ["b", "v"])
    with pytest.raises(ValueError, match=r"level must be in \(0, 1\); got 95"):
        plots.information_ellipse(information, ["b", "w[0]"], level=95)
    singular = full(np.diag([1.0, 1.0, 1.0, 1e-300]))
    with pytest.raises(ValueError, match=r"covariance of w\[2\] and b is not positive"):
        plots.information_ellipse(ff.information.scale(singular, 1e-20), ["w[2]", "b"])
    with pytest.raises((TypeError, ValueError)):
        plots.information_ellipse(ff.structures.Scalar(jnp.asarray(1.0)))
