"""Fisher-Rao distances in closed form, against textbooks, integrals and geodesics."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as nd
import pytest
from scipy.special import expit, softmax

import fisherflow_jax as ff

geo, likelihoods = ff.geometry, ff.likelihoods


def by_means(z):
    return np.arcsinh(np.exp(z / 2) / 3**0.5)


# name: likelihood, its textbook distance of two outputs in numpy
LINES = {
    "gaussian": (likelihoods.gaussian(1.7), lambda z, w: abs(z - w) / 1.7),
    "student_t": (
        likelihoods.student_t(3.0, 0.5),
        lambda z, w: abs(z - w) * (4 / 6) ** 0.5 / 0.5,
    ),
    "gamma": (likelihoods.gamma(2.5), lambda z, w: 2.5**0.5 * abs(z - w)),
    "poisson": (
        likelihoods.poisson(),
        lambda z, w: 2 * abs(np.exp(z / 2) - np.exp(w / 2)),
    ),
    "negative_binomial": (
        likelihoods.negative_binomial(3.0),
        lambda z, w: (
            2
            * 3**0.5
            * abs(
                np.arcsinh(np.exp(z / 2) / 3**0.5) - np.arcsinh(np.exp(w / 2) / 3**0.5)
            )
        ),
    ),
    "bernoulli": (
        likelihoods.bernoulli(),
        lambda z, w: 2 * abs(np.arcsin(expit(z) ** 0.5) - np.arcsin(expit(w) ** 0.5)),
    ),
}


def of_normals(z, w):
    """By arccosh, of (mean, log scale)."""
    (m, s), (n, t) = (z[0], np.exp(z[1])), (w[0], np.exp(w[1]))
    inner = 1 + ((m - n) ** 2 / 2 + (s - t) ** 2) / (2 * s * t)
    return 2**0.5 * np.arccosh(inner)


def of_classes(z, w):
    return 2 * np.arccos(np.sum(np.sqrt(softmax(z) * softmax(w))))


PLANES = {
    "gaussian_location_scale": (likelihoods.gaussian_location_scale(), of_normals),
    "categorical": (likelihoods.categorical(), of_classes),
    "gaussian(covariance)": (
        likelihoods.gaussian(covariance=np.array([[2.0, 0.6], [0.6, 1.0]])),
        lambda z, w: (
            ((w - z) @ np.linalg.solve([[2.0, 0.6], [0.6, 1.0]], w - z)) ** 0.5
        ),
    ),
}
FAMILIES = LINES | PLANES


def outputs(name, seed):
    shape = (7,) if name in LINES else (7, 3 if name == "categorical" else 2)
    return np.random.default_rng(seed).normal(size=shape)


@pytest.mark.slow_cases
@pytest.mark.parametrize("name", FAMILIES)
def test_closed_forms(name):
    likelihood, textbook = FAMILIES[name]
    z, w, u = (outputs(name, seed) for seed in range(3))
    distance = functools.partial(geo.distance, likelihood)
    found = jax.jit(distance)(z, w)
    expected = [textbook(*pair) for pair in zip(z, w, strict=True)]
    np.testing.assert_allclose(found, expected, rtol=1e-10)
    np.testing.assert_allclose(found, distance(w, z), rtol=1e-14)
    assert np.all(found <= distance(z, u) + distance(u, w) + 1e-12)
    np.testing.assert_array_equal(distance(z, z), 0)
    # near points keep their digits: the length of the step in the metric
    near = z + 1e-7 * (w - z)
    matrices = jax.vmap(geo.metric(likelihood))(jnp.asarray((z + near) / 2))
    step = (near - z).reshape(7, -1)
    expected = np.sqrt(np.einsum("ni,nij,nj->n", step, matrices, step))
    np.testing.assert_allclose(distance(z, near), expected, rtol=1e-7)
    slopes = jax.grad(lambda z: jnp.sum(distance(z, z)))(jnp.asarray(z))
    np.testing.assert_array_equal(slopes, 0)


@pytest.mark.parametrize("name", LINES)
def test_on_a_line_it_is_the_length(name):
    likelihood, _ = LINES[name]
    ends = jnp.array([-1.3, 0.9])
    found = geo.length(geo.metric(likelihood), ends, num_nodes=40)
    expected = geo.distance(likelihood, ends[:1], ends[1:])[0]
    np.testing.assert_allclose(found, expected, rtol=1e-12)


@pytest.mark.slow
def test_far_points_in_float32():
    z = jnp.array([-300.0, 300.0, -300.0, 80.0], jnp.float32)
    w = jnp.array([300.0, 301.0, -301.0, -80.0], jnp.float32)
    found = geo.distance(likelihoods.bernoulli(), z, w)
    np.testing.assert_allclose(found, [np.pi, 0, 0, np.pi], atol=1e-6)
    found = geo.distance(likelihoods.negative_binomial(2.0), z[3:], w[3:])
    expected = 2 * 2**0.5 * np.arcsinh(np.exp(40.0) / 2**0.5)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    slopes = jax.grad(lambda z: geo.distance(likelihoods.bernoulli(), z, w).sum())(z)
    assert np.all(np.isfinite(slopes))


def test_targets_of_an_example_are_a_product():
    rng = np.random.default_rng(3)
    z, w = rng.normal(size=(2, 4, 5, 2))
    likelihood = likelihoods.gaussian_location_scale()
    pairs = zip(z.reshape(20, 2), w.reshape(20, 2), strict=True)
    each = np.array([of_normals(*pair) for pair in pairs]).reshape(4, 5)
    expected = np.sqrt(np.sum(np.square(each), 1))
    np.testing.assert_allclose(geo.distance(likelihood, z, w), expected, rtol=1e-12)


@pytest.mark.slow
def test_dispersion_and_known_noise():
    z, w = jnp.array([0.3, -1.0]), jnp.array([0.5, 0.2])
    for family in (likelihoods.poisson, likelihoods.bernoulli):
        expected = geo.distance(family(), z, w) / 2.5**0.5
        np.testing.assert_allclose(geo.distance(family(2.5), z, w), expected)
    given = likelihoods.gaussian("given")
    pair = [jnp.stack([x, jnp.array([0.5, 2.0])], -1) for x in (z, w)]
    found = geo.distance(given, *pair)
    np.testing.assert_allclose(found, np.abs(z - w) / np.array([0.5, 2.0]))
    with pytest.raises(ValueError, match="example 1 has no distance"):
        geo.distance(given, pair[0], pair[1] + jnp.array([[0.0, 0.0], [0.0, 1.0]]))
    many = likelihoods.gaussian(covariance="given")
    noise = jnp.array([[2.0, 0.6, 0.6, 1.0]] * 3)
    z, w = (outputs("gaussian(covariance)", seed)[:3] for seed in (0, 1))
    known, _ = PLANES["gaussian(covariance)"]
    pair = [jnp.concatenate([x, noise], 1) for x in (z, w)]
    expected = geo.distance(known, z, w)
    np.testing.assert_allclose(geo.distance(many, *pair), expected, rtol=1e-12)
    used = jnp.array([[1.0, 0.0]] * 3)
    alone = np.abs(z - w)[:, 0] / 2**0.5
    found = geo.distance(known.observing(used), z, w)
    np.testing.assert_allclose(found, alone, rtol=1e-12)


# ---- against geodesics


def product(x):
    """The product manifold of eight families, of d = 10."""
    lines = [geo.metric(family) for family, _ in LINES.values()]
    classes = geo.pullback(geo.metric(likelihoods.categorical()), two_logits)
    blocks = [line(x[k]) for k, line in enumerate(lines)]
    normal = geo.metric(likelihoods.gaussian_location_scale())
    return jax.scipy.linalg.block_diag(*blocks, normal(x[6:8]), classes(x[8:]))


def two_logits(z):
    return jnp.append(z, 0.0)


def closed(x, y):
    """The eight distances."""
    lines = [
        geo.distance(family, x[k, None], y[k, None])
        for k, (family, _) in enumerate(LINES.values())
    ]
    normals = likelihoods.gaussian_location_scale(), x[None, 6:8], y[None, 6:8]
    classes = [two_logits(z[8:])[None] for z in (x, y)]
    last = [geo.distance(*normals), geo.distance(likelihoods.categorical(), *classes)]
    return jnp.concatenate([*lines, *last])


def lengths(x, v):
    """Of the eight parts of a velocity."""
    squares = v * (product(x) @ v)
    return jnp.sqrt(jnp.append(squares[:6], squares[6:].reshape(2, 2).sum(1)))


START = jnp.array([0.2, -0.4, 0.3, 1.2, 0.7, -0.5, 0.3, -0.2, 0.4, -0.3])
VELOCITY = jnp.array([0.8, -0.6, 0.4, -0.5, 0.6, 0.7, 0.9, -0.5, -0.4, 0.6])


@pytest.mark.slow
def test_exp_goes_as_far_as_its_velocity():
    end = jax.jit(lambda x, v: geo.exp(product, x, v))(START, VELOCITY)
    assert end.converged
    assert end.error < 1e-8
    found = closed(START, end.params)
    np.testing.assert_allclose(found, lengths(START, VELOCITY), rtol=1e-7)


@pytest.mark.slow
def test_log_is_as_long_as_the_distance():
    found = jax.jit(lambda x, y: geo.log(product, x, y))(START, START + VELOCITY)
    assert found.converged
    expected = closed(START, START + VELOCITY)
    np.testing.assert_allclose(lengths(START, found.velocity), expected, rtol=1e-6)
    total = geo.distance(product, START, START + VELOCITY)
    np.testing.assert_allclose(total, jnp.sqrt(jnp.sum(expected**2)), rtol=1e-6)


def by_scale(x):
    """The normal in (mean, scale)."""
    return jnp.diag(jnp.array([1.0, 2.0])) / x[1] ** 2


@functools.cache
def shot():
    return jax.jit(lambda x, y: geo.log(by_scale, x, y))


@pytest.mark.slow
def test_continuation_and_failure():
    start, far = jnp.array([0.3, 0.8]), jnp.array([30.0, 0.8])
    found = shot()(start, far)
    assert found.converged
    assert found.num_steps > 15  # one shot alone does not arrive
    length = jnp.sqrt(found.velocity @ by_scale(start) @ found.velocity)
    logs = [jnp.array([[x[0], jnp.log(x[1])]]) for x in (start, far)]
    expected = geo.distance(likelihoods.gaussian_location_scale(), *logs)[0]
    np.testing.assert_allclose(length, expected, rtol=1e-6)
    lost = shot()(start, jnp.array([300.0, 0.8]))
    assert not lost.converged


@pytest.mark.slow
def test_unconverged_shooting_raises():
    start, far = jnp.array([0.3, 0.8]), jnp.array([300.0, 0.8])
    options = {"max_steps": 2, "num_stages": 1}
    with pytest.raises(ValueError, match="shooting did not arrive for 1 of 1 pairs"):
        geo.distance(by_scale, start, far, **options)
    found = jax.jit(lambda x, y: geo.distance(by_scale, x, y, **options))(start, far)
    assert jnp.isnan(found)


@pytest.mark.slow
def test_a_likelihood_without_a_closed_form():
    """By shooting in the metric of its root, an example at a time, with gradients."""
    family = likelihoods.gaussian_location_scale()
    own = family._replace(distance=None)
    z, w = (outputs("gaussian_location_scale", seed)[:3] for seed in (0, 1))

    def sums(likelihood):
        total = lambda z, w: jnp.sum(geo.distance(likelihood, z, w))  # noqa: E731
        return jax.jit(jax.value_and_grad(total, (0, 1)))(z, w)

    for found, expected in zip(
        jax.tree.leaves(sums(own)), jax.tree.leaves(sums(family)), strict=True
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-6)
    drawn = likelihoods.from_log_prob(
        lambda z, y: -jnp.abs(y - z), lambda key, z: jax.random.laplace(key, z.shape)
    )
    with pytest.raises(ValueError, match="no Fisher-Rao distance in closed form"):
        geo.distance(drawn, jnp.zeros(3), jnp.ones(3))


@pytest.mark.slow
def test_of_a_distribution():
    """The Gumbel distribution, a half plane after a shear."""
    make = lambda z: nd.Gumbel(z[0], jnp.exp(z[1]))  # noqa: E731
    own = likelihoods.from_distribution(make, ff.expectations.quantiles(100))
    z, w = (outputs("gaussian_location_scale", seed)[:2] for seed in (0, 1))
    found = geo.distance(own, z, w)

    def sheared(x):
        location = x[:, 0] - (1 - np.euler_gamma) * np.exp(x[:, 1])
        return np.stack([location, np.exp(x[:, 1])], 1)

    (m, s), (n, t) = sheared(z).T, sheared(w).T
    b = np.pi**2 / 6
    inner = 1 + ((m - n) ** 2 / b + (s - t) ** 2) / (2 * s * t)
    np.testing.assert_allclose(found, b**0.5 * np.arccosh(inner), rtol=1e-6)


# ---- lengths


@pytest.mark.slow
def test_lengths_of_paths():
    metric = geo.metric(likelihoods.gaussian_location_scale())

    # a geodesic of the half plane: m = sqrt 2 tanh u, s = sech u, of speed sqrt 2
    def geodesic(t):
        u = 3 * t - 1
        return jnp.stack([2**0.5 * jnp.tanh(u), -jnp.log(jnp.cosh(u))])

    found = jax.jit(lambda: geo.length(metric, geodesic, num_nodes=30))()
    np.testing.assert_allclose(found, 3 * 2**0.5, rtol=1e-10)
    # straight lines between its points are longer than the chords, and come to it
    points = jax.vmap(geodesic)(jnp.linspace(0, 1, 9))
    lines = geo.length(metric, points)
    chords = geo.distance(
        likelihoods.gaussian_location_scale(), points[:-1], points[1:]
    )
    assert 3 * 2**0.5 <= jnp.sum(chords) + 1e-12 < lines < 1.01 * 3 * 2**0.5
    with pytest.raises(ValueError, match="two or more points"):
        geo.length(metric, points[:1])


def test_pairs_that_are_none():
    given = likelihoods.gaussian("given")
    z = jnp.ones((2, 2))
    with pytest.raises(ValueError, match="example 0 has no distance"):
        jax.grad(lambda w: geo.distance(given, z, w).sum())(z + 1)
    for of in (geo.distance, geo.kl):
        with pytest.raises(ValueError, match=r"one shape, \(n, \.\.\.\); got \(\)"):
            of(likelihoods.poisson(), 1.0, 2.0)
    none = jnp.zeros((0, 2))
    assert geo.distance(likelihoods.poisson(), none, none).shape == (0,)
