"""A likelihood from a distribution: its information, what is refused, and a flow."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
import scipy.linalg
import scipy.optimize
import scipy.stats
from scipy.special import polygamma, softmax

import fisherflow_jax as ff
from fisherflow_jax import expectations, likelihoods

# Its functions mix types, and its own arguments are Python's.
pytestmark = pytest.mark.standard_promotion

EULER = float(np.euler_gamma)
M, S, A, B = 0.7, 1.3, 2.5, 1.7


class Weibull:
    """numpyro's, with the quantile function that it lacks."""

    def __init__(self, scale, shape):
        self.scale, self.shape = scale, shape

    def log_prob(self, y):
        return dist.Weibull(self.scale, self.shape).log_prob(y)

    def sample(self, key, shape=()):
        return self.icdf(jax.random.uniform(key, shape))

    def icdf(self, u):
        return self.scale * (-jnp.log1p(-u)) ** (1 / self.shape)


def trigamma(x):
    return float(polygamma(1, x))


def location_scale(*entries):
    return np.diag(entries) / S**2


GUMBEL = np.array([[1, EULER - 1], [EULER - 1, np.pi**2 / 6 + (1 - EULER) ** 2]])
WEIBULL = np.array(
    [
        [(1.5 / 2) ** 2, (EULER - 1) / 2],
        [(EULER - 1) / 2, GUMBEL[1, 1] / 1.5**2],
    ]
)
BETA = np.diag([trigamma(A), trigamma(B)]) - trigamma(A + B)
LOGITS = np.array([0.3, -0.2, 0.5])
P = softmax(LOGITS)
SPLIT = expectations.quantiles(200, breaks=(0.5,))

# make, outputs of one target, information in closed form, its rule
FAMILIES = {
    "normal": (
        lambda z: dist.Normal(z[0], z[1]),
        [M, S],
        location_scale(1, 2),
        None,
    ),
    "exponential": (lambda z: dist.Exponential(z), B, [[1 / B**2]], None),
    "gamma": (
        lambda z: dist.Gamma(z[0], z[1]),
        [A, B],
        [[trigamma(A), -1 / B], [-1 / B, A / B**2]],
        None,
    ),
    "beta": (lambda z: dist.Beta(z[0], z[1]), [A, B], BETA, None),
    "laplace": (
        lambda z: dist.Laplace(z[0], z[1]),
        [M, S],
        location_scale(1, 1),
        SPLIT,
    ),
    "logistic": (
        lambda z: dist.Logistic(z[0], z[1]),
        [M, S],
        location_scale(1 / 3, (3 + np.pi**2) / 9),
        None,
    ),
    "cauchy": (
        lambda z: dist.Cauchy(z[0], z[1]),
        [M, S],
        location_scale(1 / 2, 1 / 2),
        None,
    ),
    "student_t": (
        lambda z: dist.StudentT(5.0, z[0], z[1]),
        [M, S],
        location_scale(6 / 8, 10 / 8),
        None,
    ),
    "gumbel": (lambda z: dist.Gumbel(z[0], z[1]), [M, S], GUMBEL / S**2, None),
    "lognormal": (
        lambda z: dist.LogNormal(z[0], z[1]),
        [M, S],
        location_scale(1, 2),
        None,
    ),
    "weibull": (lambda z: Weibull(z[0], z[1]), [2.0, 1.5], WEIBULL, None),
    "poisson": (lambda z: dist.Poisson(z), 4.0, [[1 / 4]], None),
    "many": (lambda z: dist.Poisson(z), 1e6, [[1e-6]], None),
    "bernoulli": (lambda z: dist.BernoulliProbs(z), 0.3, [[1 / 0.21]], None),
    "binomial": (lambda z: dist.BinomialProbs(z, 10), 0.3, [[10 / 0.21]], None),
    "geometric": (lambda z: dist.GeometricProbs(z), 0.3, [[1 / (0.09 * 0.7)]], None),
    "categorical": (
        lambda z: dist.CategoricalLogits(z),
        LOGITS,
        np.diag(P) - np.outer(P, P),
        None,
    ),
    "two_normals": (
        lambda z: dist.Normal(z, jnp.array([1.0, 2.0])).to_event(1),
        [M, S],
        np.diag([1, 1 / 4]),
        None,
    ),
}
# Every k-th count in the place of k, where they are many.
LOOSER = {"many": 1e-6}


@pytest.mark.slow_cases
@pytest.mark.parametrize("name", FAMILIES)
def test_information_is_that_of_the_closed_form(name):
    make, outputs, expected, rule = FAMILIES[name]
    outputs, expected = np.asarray(outputs, float), np.asarray(expected, float)
    found = likelihoods.output_information(make, jnp.asarray(outputs)[None], rule)
    size = np.max(np.abs(expected))
    np.testing.assert_allclose(
        found.information[0], expected, rtol=0, atol=LOOSER.get(name, 1e-8) * size
    )
    assert found.standard_error is None
    if found.mean_score is not None:
        units = np.sqrt(np.diag(expected))
        assert np.all(np.abs(found.mean_score[0]) <= 1e-8 * max(1, units.max()))
        assert abs(found.mass[0] - 1) <= 1e-8


@pytest.mark.parametrize("name", ["normal", "gamma", "beta", "two_normals"])
def test_a_registered_divergence_has_the_information_as_its_hessian(name):
    make, outputs, expected, _ = FAMILIES[name]
    found = likelihoods.output_information(make, jnp.asarray(outputs)[None])
    assert found.mean_score is None  # by no points
    np.testing.assert_allclose(found.information[0], expected, rtol=1e-12, atol=1e-14)


@pytest.mark.slow
def test_a_covariance_is_a_parameter_like_others():
    """Of a normal with Cholesky factor L(z): tr(S^-1 dS S^-1 dS) / 2."""
    below = np.tril_indices(2)

    def factor(z):
        return jnp.zeros((2, 2)).at[below].set(z[2:])

    z = jnp.array([0.2, -0.3, 1.5, 0.4, 0.8])
    found = likelihoods.output_information(
        lambda z: dist.MultivariateNormal(z[:2], scale_tril=factor(z)), z[None]
    )
    inverse = np.linalg.inv(factor(z) @ factor(z).T)
    slopes = np.moveaxis(jax.jacobian(lambda z: factor(z) @ factor(z).T)(z), -1, 0)[2:]
    scale = [
        [np.trace(inverse @ one @ inverse @ two) / 2 for two in slopes]
        for one in slopes
    ]
    expected = scipy.linalg.block_diag(inverse, np.array(scale))
    np.testing.assert_allclose(found.information[0], expected, rtol=1e-12, atol=1e-13)


@pytest.mark.slow
def test_draws_come_with_their_standard_error():
    make, outputs, expected, _ = FAMILIES["gamma"]
    found = likelihoods.output_information(
        make, jnp.asarray(outputs)[None], expectations.draws(20_000), jax.random.key(0)
    )
    away = np.abs(found.information - np.asarray(expected)) / found.standard_error
    assert np.all(away < 4) and np.any(away > 0.1)
    assert np.all(found.standard_error < 0.05)


def test_the_negative_binomial_of_numpyro_is_off_and_told():
    """Its probabilities sum to 1 - 1.5e-7 (0.22); this package's own are exact."""
    found = likelihoods.output_information(
        lambda z: dist.NegativeBinomial2(z, 3.0), jnp.array([4.0])
    )
    np.testing.assert_allclose(
        found.information, np.reshape(1 / (4 + 16 / 3), (1, 1, 1)), rtol=1e-6
    )
    assert abs(found.mass[0] - 1) < 1e-6


@pytest.mark.parametrize(
    "make",
    [
        lambda z: dist.Uniform(0.0, jnp.exp(z)),
        lambda z: dist.Pareto(jnp.exp(z), 3.0),
        lambda z: dist.Uniform(0.0, z),
    ],
)
def test_families_that_are_not_regular_are_refused(make):
    with pytest.raises(ValueError, match="mean score of output"):
        likelihoods.from_distribution(make)


@pytest.mark.slow
def test_one_that_is_not_regular_for_some_outputs():
    """Normal errors about a location, and exponential ones from it on."""

    class Shifted:
        def __init__(self, z):
            self.z, self.own = z, dist.Exponential(1.0)
            self.far = z > 2.0

        def log_prob(self, y):
            smooth = dist.Normal(self.z, 1.0).log_prob(y)
            return jnp.where(self.far, self.own.log_prob(y - self.z), smooth)

        def icdf(self, u):
            smooth = dist.Normal(self.z, 1.0).icdf(u)
            return jnp.where(self.far, self.z - jnp.log1p(-u), smooth)

        def sample(self, key, shape=()):
            return self.icdf(jax.random.uniform(key, shape))

    likelihood = likelihoods.from_distribution(Shifted)
    outputs, probes = jnp.array([0.0, 3.0]), jnp.ones(2)
    with pytest.raises(ValueError, match=r"mean score of output \(1,\)"):
        likelihood.root(outputs, probes)
    root = jax.jit(likelihood.root)(outputs, probes)
    np.testing.assert_allclose(root, [1.0, np.nan], atol=1e-8)

    flow = ff.fisher_flow(lambda params, x: x * params, likelihood)
    batch = jnp.ones(4), jnp.full(4, 9.0)
    with pytest.raises(ValueError, match="mean score of output"):
        flow.update(flow.init(jnp.array(5.0)), batch)


@pytest.mark.slow
def test_what_make_may_be():
    for make, wrong in (
        (lambda z: dist.Normal(z[:2], 1.0), "to_event"),
        (lambda z: z, "log_prob"),
    ):
        with pytest.raises(ValueError, match=wrong):
            likelihoods.from_distribution(make)
    together = likelihoods.from_distribution(
        lambda z: dist.MultivariateNormal(z, jnp.eye(3))
    )
    assert not together.random_root and not together.diagonal
    assert together.log_prob(jnp.zeros((4, 3)), jnp.zeros((4, 3))).shape == (4,)
    with pytest.raises(ValueError, match="an event's"):
        together.check(jnp.zeros((4, 3)), jnp.zeros(4))
    weibull = likelihoods.from_distribution(
        lambda z: dist.Weibull(jnp.exp(z[0]), jnp.exp(z[1]))
    )
    assert weibull.random_root  # numpyro has neither its quantiles nor a divergence
    with pytest.raises(ValueError, match="needs a key"):
        weibull.root(jnp.zeros((4, 2)), jnp.ones((4, 2)))
    with pytest.raises(ValueError, match=r"got \(0.5, 0.2\)"):
        expectations.quantiles(10, breaks=(0.5, 0.2))
    with pytest.raises(TypeError, match="quantiles"):
        likelihoods.output_information(
            lambda z: dist.Normal(z, 1.0), jnp.zeros(1), expectations.enumeration()
        )


@pytest.mark.slow
def test_counts_have_the_root_of_this_package():
    ours, theirs = (
        likelihoods.poisson(),
        likelihoods.from_distribution(lambda z: dist.Poisson(jnp.exp(z))),
    )
    outputs, targets = jnp.array([-1.0, 0.5, 3.0]), np.array([0, 2, 19])
    for name in ("mean", "variance"):
        np.testing.assert_allclose(
            getattr(theirs, name)(outputs), getattr(ours, name)(outputs), rtol=1e-12
        )
    np.testing.assert_allclose(
        theirs.log_prob(outputs, targets), ours.log_prob(outputs, targets), rtol=1e-12
    )
    both = [
        jax.value_and_grad(lambda z, x=x: jnp.sum(x.root(z, jnp.ones(3))))(outputs)
        for x in (ours, theirs)
    ]
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-7), *both)
    assert np.all(theirs.support(np.array([0, 3])))
    assert not np.any(theirs.support(np.array([-1.0, 0.5, np.nan])))
    keyed = theirs.sample(jax.random.key(0), jnp.full(2000, 1.0))
    assert abs(np.mean(keyed) - np.e) < 5 * np.sqrt(np.e / 2000)


def gumbel_regression():
    rng = np.random.default_rng(0)
    x = np.stack([np.ones(1000), rng.normal(size=1000)], 1)
    y = 0.5 + x[:, 1] + np.exp(-0.3) * rng.gumbel(size=1000)
    make = lambda z: dist.Gumbel(z[0], jnp.exp(z[1]))  # noqa: E731
    likelihood = likelihoods.from_distribution(make)

    def apply_fn(params, x):
        scale = jnp.broadcast_to(params["scale"], x.shape[:1])
        return jnp.stack([x @ params["w"], scale], -1)

    model = apply_fn, likelihood
    return SimpleNamespace(x=x, y=y, model=model, batch=(jnp.asarray(x), y))


def test_gumbel_regression_has_the_information_of_the_closed_form():
    given = gumbel_regression()
    params = {"w": jnp.array([0.5, 1.0]), "scale": jnp.array(-0.3)}
    exact = ff.estimators.exact(*given.model, ff.structures.full())
    found = ff.information.to_dense(exact(params, given.batch), params)
    gap, b = EULER - 1, np.exp(-0.3)
    cross = gap * given.x.sum(0)[None] / b  # leaves are sorted: scale, w
    expected = np.block(
        [
            [np.full((1, 1), 1000 * GUMBEL[1, 1]), cross],
            [cross.T, given.x.T @ given.x / b**2],
        ]
    )
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_a_flow_of_gumbel_targets_is_the_maximum_likelihood_fit():
    given = gumbel_regression()
    flow = ff.fisher_flow(*given.model, prior_precision=1e-6)
    start = flow.init({"w": jnp.zeros(2), "scale": jnp.zeros(())})
    state = ff.warm_start(flow, start, given.batch)

    def loss(v):
        scale = np.exp(v[0])
        return -np.sum(scipy.stats.gumbel_r.logpdf(given.y, given.x @ v[1:], scale))

    fit = scipy.optimize.minimize(loss, np.zeros(3), method="BFGS")
    mean = np.append(state.mean["scale"], state.mean["w"])
    np.testing.assert_allclose(mean, fit.x, atol=1e-4)
    step, units = 1e-4, np.eye(3)
    hessian = [
        [
            sum(
                s * t * loss(fit.x + step * (s * one + t * two))
                for s in (-1, 1)
                for t in (-1, 1)
            )
            / (4 * step**2)
            for two in units
        ]
        for one in units
    ]
    observed = np.sqrt(np.diag(np.linalg.inv(hessian)))
    error = ff.standard_error(state)
    error = np.append(error["scale"], error["w"])
    np.testing.assert_allclose(error, observed, rtol=0.05)


@pytest.mark.parametrize("outputs", [0.0, -0.0])
def test_logits_of_zero_where_a_flow_begins(outputs):
    """There numpyro's log-probability of logits has a bend in its derivatives."""
    own = likelihoods.bernoulli()
    taken = likelihoods.from_distribution(lambda z: dist.Bernoulli(logits=z))
    outputs, targets = jnp.full(4, outputs), jnp.array([0.0, 1.0, 1.0, 0.0])
    for name, values in (("root", jnp.ones(4)), ("log_prob", targets)):
        found, expected = (getattr(x, name)(outputs, values) for x in (taken, own))
        np.testing.assert_allclose(found, expected, rtol=1e-6)
    scores = (
        jax.grad(lambda z, x=x: jnp.sum(x.log_prob(z, targets)))(outputs)
        for x in (taken, own)
    )
    np.testing.assert_allclose(*scores, rtol=1e-6)


def test_a_rule_of_another_kind_is_told_and_a_key_is_as_anywhere():
    for rule in ("draws", expectations.outputs(), expectations.draws):
        with pytest.raises(TypeError, match=r"rule comes from a call such as ff\."):
            likelihoods.from_distribution(lambda z: dist.Normal(z, 1.0), rule)
    given = (lambda z: dist.Normal(z, 1.0)), jnp.zeros(2), expectations.draws(10)
    one, other = (
        likelihoods.output_information(*given, key) for key in (0, jax.random.key(0))
    )
    np.testing.assert_array_equal(one.information, other.information)
