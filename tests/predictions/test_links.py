"""Links against formulas, simulations and limits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats

import fisherflow_jax as ff
import prediction_cases as cases
from prediction_cases import MODELS

CATEGORICAL = ff.likelihoods.categorical()
BERNOULLI = ff.likelihoods.bernoulli()
RNG = np.random.default_rng(3)
MEAN = RNG.normal(size=(3, 2, 4))  # three inputs of two positions, four classes
ROOT = 0.4 * RNG.normal(size=(3, 2, 4, 6))
COVARIANCE = np.einsum("...iq,...jq->...ij", ROOT, ROOT)


def outputs(scale=1.0):
    covariance = scale * COVARIANCE
    variance = np.diagonal(covariance, axis1=-2, axis2=-1)
    return ff.predictions.Outputs(*map(jnp.asarray, (MEAN, variance, covariance)))


@functools.partial(jax.jit, static_argnums=(1, 2))
def averaged(given, link, likelihood):
    return link(given, likelihood)


def average(link, likelihood, scale=1.0):
    return averaged(outputs(scale), link, likelihood)


DRAWS = 20_000
PROBIT, SAMPLES = ff.predictions.probit(), ff.predictions.output_samples(0, DRAWS)


def test_probit_by_its_formula():
    variance = np.diagonal(COVARIANCE, axis1=-2, axis2=-1)
    shrunk = MEAN / np.sqrt(1 + np.pi * variance / 8)
    found = average(PROBIT, CATEGORICAL).mean
    np.testing.assert_allclose(found, special.softmax(shrunk, -1), rtol=1e-12)
    found = average(PROBIT, BERNOULLI).mean
    np.testing.assert_allclose(found, special.expit(shrunk), rtol=1e-12)


def test_probit_is_close_to_the_integral_of_a_sigmoid():
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    variance = np.diagonal(COVARIANCE, axis1=-2, axis2=-1)
    at = MEAN[..., None] + np.sqrt(variance)[..., None] * nodes
    exact = special.expit(at) @ weights / weights.sum()
    found = average(PROBIT, BERNOULLI).mean
    np.testing.assert_allclose(found, exact, atol=0.01)


@pytest.mark.parametrize("link", [PROBIT, SAMPLES])
def test_no_uncertainty_is_the_softmax(link):
    found = average(link, CATEGORICAL, scale=1e-20)
    np.testing.assert_allclose(found.mean, special.softmax(MEAN, -1), rtol=1e-8)


def test_output_samples_are_draws_of_the_correlated_logits():
    found = average(SAMPLES, CATEGORICAL)
    rng = np.random.default_rng(0)
    draws = MEAN + np.einsum(
        "...iq,s...q->s...i", ROOT, rng.normal(size=(DRAWS, 3, 2, 6))
    )
    shares = special.softmax(draws, -1)
    error = np.sqrt(2 * shares.var(0) / DRAWS)
    assert np.all(np.abs(found.mean - shares.mean(0)) < 5 * error)
    np.testing.assert_allclose(found.std, shares.std(0), rtol=0.05)
    own = (shares * (1 - shares)).mean(0)
    np.testing.assert_allclose(found.noise, own, rtol=0.05)
    np.testing.assert_allclose(np.sum(found.mean, -1), 1, rtol=1e-12)


def test_probit_and_output_samples_are_close():
    samples = average(SAMPLES, CATEGORICAL).mean
    probit = average(PROBIT, CATEGORICAL).mean
    assert np.max(np.abs(samples - probit)) < 0.07
    plain = special.softmax(MEAN, -1)
    assert np.max(np.abs(samples - probit)) < 0.7 * np.max(np.abs(samples - plain))


def dirichlet(mean, variances, normalized):
    """The bridge of one input whose logits sum to zero, by its formula."""
    classes = len(mean)
    if normalized:
        size = variances.mean() / np.sqrt(classes / 2)
        mean, variances = mean / np.sqrt(size), variances / size
    top = 1 - 2 / classes + np.exp(mean) / classes**2 * np.exp(-mean).sum()
    alpha = top / variances
    return alpha / alpha.sum(), np.sqrt(stats.dirichlet(alpha).var())


@pytest.mark.parametrize("normalized", [False, True])
def test_the_bridge_input_by_input(normalized):
    found = average(ff.predictions.laplace_bridge(normalized), CATEGORICAL)
    for place in np.ndindex(3, 2):
        row = COVARIANCE[place].sum(0)
        center = MEAN[place] - row * MEAN[place].sum() / row.sum()
        variances = np.diag(COVARIANCE[place]) - row**2 / row.sum()
        mean, std = dirichlet(center, variances, normalized)
        np.testing.assert_allclose(found.mean[place], mean, rtol=1e-10)
        np.testing.assert_allclose(found.std[place], std, rtol=1e-10)


def test_the_bridge_of_a_bernoulli_is_that_of_two_classes():
    link = ff.predictions.laplace_bridge(normalized=True)
    given = ff.predictions.Outputs(jnp.array([1.5]), jnp.array([0.7]))
    found = averaged(given, link, BERNOULLI)
    # logits (z / 2, -z / 2)
    mean, std = dirichlet(np.array([0.75, -0.75]), np.full(2, 0.175), normalized=True)
    np.testing.assert_allclose(found.mean, mean[:1], rtol=1e-10)
    np.testing.assert_allclose(found.std, std[:1], rtol=1e-10)


def test_the_bridge_of_saturated_logits_in_float32():
    mean = jnp.array([[200.0, 0.0, -200.0], [1e4, -1e4, 0.0]], jnp.float32)
    covariance = jnp.broadcast_to(jnp.eye(3, dtype=jnp.float32), (2, 3, 3))
    given = ff.predictions.Outputs(mean, jnp.ones_like(mean), covariance)
    link = ff.predictions.laplace_bridge()
    found = averaged(given, link, CATEGORICAL)
    for values in found:
        assert values.dtype == jnp.float32 and np.all(np.isfinite(values))
    np.testing.assert_allclose(found.mean, [[1, 0, 0], [1, 0, 0]], atol=1e-6)


def test_log_normal():
    mean, variance = np.array([0.3, -1.0]), np.array([0.2, 0.9])
    given = ff.predictions.Outputs(jnp.asarray(mean), jnp.asarray(variance))
    link = ff.predictions.log_normal()
    exact = stats.lognorm(np.sqrt(variance), scale=np.exp(mean))
    likelihood = ff.likelihoods.negative_binomial(concentration=2.0)
    found = averaged(given, link, likelihood)
    np.testing.assert_allclose(found.mean, exact.mean(), rtol=1e-12)
    np.testing.assert_allclose(found.std, exact.std(), rtol=1e-10)
    second = exact.var() + exact.mean() ** 2
    np.testing.assert_allclose(found.noise, exact.mean() + second / 2, rtol=1e-8)


LINKS = [
    ff.predictions.quadrature(),
    ff.predictions.output_samples(1, 16),
    lambda given, _: ff.predictions.Averaged(jax.nn.softmax(given.mean / 2)),
]
MODEL = MODELS["mlp"]


@jax.jit
def predictions(state):
    """Without a link, and with each."""
    return [
        ff.predict(state, MODEL.apply_fn, CATEGORICAL, MODEL.inputs, link=link)
        for link in (None, *LINKS)
    ]


@jax.jit
def averages(state):
    """What each link makes of the outputs."""
    given = ff.predictions.linearized_outputs(
        state, MODEL.apply_fn, MODEL.inputs, covariance=True
    )
    return [link(given, CATEGORICAL) for link in LINKS]


@pytest.mark.slow
def test_predict_with_links():
    posterior = cases.state("mlp", "diagonal")
    plain, *all_found = predictions(posterior)
    for value, wanted in zip(plain, all_found[0], strict=True):
        np.testing.assert_array_equal(value, wanted)  # the default of classes
    for wanted, found in zip(averages(posterior), all_found, strict=True):
        np.testing.assert_allclose(found.mean, wanted.mean, rtol=1e-9)
        np.testing.assert_allclose(np.sum(found.mean, -1), 1, rtol=1e-9)
        # a new target is 0 or 1 with the averaged probability
        own = np.sqrt(found.mean * (1 - found.mean))
        np.testing.assert_allclose(found.observation_std, own, rtol=1e-9)
        assert np.all(found.std <= own * (1 + 1e-9))
        np.testing.assert_allclose(found.lower, plain.lower, rtol=1e-9)
        np.testing.assert_allclose(found.upper, plain.upper, rtol=1e-9)


def test_a_certain_posterior_predicts_as_its_mean():
    posterior = cases.state("mlp", "diagonal")
    certain = posterior._replace(
        information=ff.information.scale(posterior.information, 1e18)
    )
    plain, *found = predictions(certain)
    share = special.softmax(MODEL.apply_fn(MODEL.params, MODEL.inputs), -1)
    for one in (plain, *found[:2]):
        np.testing.assert_allclose(one.mean, share, rtol=1e-7)
        assert np.max(one.std) < 1e-7


def test_banks_mix_what_links_average():
    posterior = cases.state("mlp", "diagonal")
    other = posterior._replace(mean=jax.tree.map(jnp.sin, posterior.mean))
    bank = ff.BankState((posterior, other), jnp.log(jnp.array([0.3, 0.7])))
    link = LINKS[0]
    found = jax.jit(
        lambda bank: ff.predict(
            bank, MODEL.apply_fn, CATEGORICAL, MODEL.inputs, link=link
        )
    )(bank)
    means = [predictions(one)[1].mean for one in bank.members]
    mean = 0.3 * means[0] + 0.7 * means[1]
    np.testing.assert_allclose(found.mean, mean, rtol=1e-12)
    own = np.sqrt(mean * (1 - mean))
    np.testing.assert_allclose(found.observation_std, own, rtol=1e-9)


def test_links_refuse_what_they_are_not_for():
    given = outputs()
    for link in (ff.predictions.probit(), ff.predictions.laplace_bridge()):
        with pytest.raises(ValueError, match=r"for class probabilities.*got gaussian"):
            link(given, ff.likelihoods.gaussian())
    with pytest.raises(ValueError, match=r"log means.*got categorical"):
        ff.predictions.log_normal()(given, CATEGORICAL)
    bare = given._replace(covariance=None)
    for link in (
        ff.predictions.laplace_bridge(),
        ff.predictions.output_samples(0, 8),
    ):
        with pytest.raises(ValueError, match="needs the covariance of the outputs"):
            link(bare, CATEGORICAL)
    with pytest.raises(
        ValueError,
        match="num_samples must be a whole number of draws, at least 2; got 1",
    ):
        ff.predictions.output_samples(0, 1)
