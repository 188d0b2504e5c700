"""The exponential map: Christoffel symbols, boundaries, gradients, curvature."""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fisherflow_jax as ff

geo, likelihoods = ff.geometry, ff.likelihoods
NORMAL = geo.metric(likelihoods.gaussian_location_scale())


def by_scale(x):
    return jnp.diag(jnp.array([1.0, 2.0])) / x[1] ** 2


def by_chances(p):
    """Three classes, by two of their probabilities."""
    return jnp.diag(1 / p) + 1 / (1 - p.sum())


def by_logits(z):
    return geo.pullback(by_chances, lambda z: jax.nn.softmax(jnp.append(z, 0.0))[:2])(z)


def christoffel(metric, x):
    """The second kind, [k, i, j], by the whole array of derivatives."""
    d = jax.jacfwd(metric)(x)
    first = 0.5 * (d.transpose(2, 0, 1) + d.transpose(0, 2, 1) - d)
    return jnp.einsum("kl,ijl->kij", jnp.linalg.inv(metric(x)), first)


def sectional(metric, x, u, v):
    gamma = christoffel(metric, x)
    slopes = jax.jacfwd(lambda y: christoffel(metric, y))(x)  # [l, j, k, i]
    moved = jnp.einsum("ljki->lkij", slopes) + jnp.einsum("lim,mjk->lkij", gamma, gamma)
    tensor = moved - jnp.swapaxes(moved, 2, 3)
    g = metric(x)
    top = jnp.einsum("lkij,i,j,k,lm,m->", tensor, u, v, v, g, u)
    return top / ((u @ g @ u) * (v @ g @ v) - (u @ g @ v) ** 2)


@pytest.mark.slow
def test_acceleration_is_that_of_the_christoffel_symbols():
    rng = np.random.default_rng(0)
    roots = jnp.asarray(rng.normal(size=(3, 3, 3)))

    def metric(x):  # of no family
        root = jnp.eye(3) + jnp.einsum("ijk,k->ij", jnp.sin(roots), jnp.tanh(x))
        return root @ root.T

    x, v = jnp.asarray(rng.normal(size=(2, 3)))
    expected = -jnp.einsum("kij,i,j->k", christoffel(metric, x), v, v)
    found = jax.jit(functools.partial(geo.acceleration, metric))(x, v)
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    # a tree is the vector of its leaves
    tree = {"a": x[:1], "b": x[1:]}
    found = geo.acceleration(
        lambda p: metric(jnp.concatenate([p["a"], p["b"]])),
        tree,
        {"a": v[:1], "b": v[1:]},
    )
    np.testing.assert_allclose(jnp.concatenate([*found.values()]), expected, rtol=1e-12)


@pytest.mark.slow
def test_curvature():
    """-1/2 of the normal, 1/4 of classes, in any coordinates."""
    u, v = jnp.array([1.0, 0.0]), jnp.array([0.3, 1.0])
    x = jnp.array([0.3, 0.8])
    for metric in (by_scale, NORMAL):
        np.testing.assert_allclose(sectional(metric, x, u, v), -0.5, rtol=1e-8)
    p = jnp.array([0.2, 0.3])
    for metric, at in ((by_chances, p), (by_logits, x)):
        np.testing.assert_allclose(sectional(metric, at, u, v), 0.25, rtol=1e-8)


@functools.cache
def rates():
    """The exponential map of a Poisson rate, whose boundary is at a distance."""
    metric = geo.pullback(geo.metric(likelihoods.poisson()), jnp.log)
    return jax.jit(functools.partial(geo.exp, metric))


@pytest.mark.slow
def test_boundary():
    """(sqrt l + v / (2 sqrt l))^2 up to the rate 0, and nothing beyond it."""
    rate = jnp.array(4.0)
    for velocity in (-7.9, -7.0, -5.0, 2.0, 30.0):
        found = rates()(rate, jnp.array(velocity))
        assert found.converged
        np.testing.assert_allclose(found.params, (2 + velocity / 4) ** 2, rtol=1e-8)
    for velocity in (-8.0001, -8.5, -9.0, -20.0):
        beyond = rates()(rate, jnp.array(velocity))
        assert not beyond.converged
        assert jnp.isnan(beyond.params)
    with pytest.raises(ValueError, match="leaves the domain"):
        geo.exp(lambda r: 1 / r[None], jnp.array([4.0]), jnp.array([-9.0]))


@pytest.mark.slow
def test_faces_of_the_simplex():
    """Great circles of a sphere of radius 2, until a class has no chance."""
    p = jnp.array([0.2, 0.3])
    roots = jnp.sqrt(jnp.append(p, 0.5))

    @jax.jit
    def run(v):
        return geo.exp(by_chances, p, v)

    for velocity, inside in (([-0.3, 0.05], True), ([-0.5, 0.2], False)):
        v = jnp.asarray(velocity)
        way = jnp.append(v, -v.sum()) / (2 * roots)
        angle = jnp.linalg.norm(way)
        end = jnp.cos(angle) * roots + jnp.sin(angle) * way / angle
        found = run(v)
        assert bool(jnp.all(end > 0)) is inside
        assert bool(found.converged) is inside
        if inside:
            np.testing.assert_allclose(found.params, end[:2] ** 2, rtol=1e-7)


def on_the_normal(params):
    return NORMAL(jnp.stack([params["m"], params["s"]]))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "error"),
    [("float64", 1e-7), pytest.param("float32", 1e-4, marks=pytest.mark.slow)],
)
def test_times_trees_and_precision(dtype, error):
    """m = sqrt 2 tanh u, s = sech u is a geodesic of the normal; backwards too."""

    def at(u):
        return {"m": 2**0.5 * jnp.tanh(u), "s": -jnp.log(jnp.cosh(u))}

    times = jnp.linspace(0.0, 2.0, 5)
    start = jax.jvp(at, (jnp.array(-0.7),), (jnp.array(1.0),))
    start = jax.tree.map(lambda x: x.astype(dtype), start)
    found = geo.exp(on_the_normal, *start, times=times)
    expected = jax.vmap(at)(times - 0.7)
    for name in "ms":
        assert found.params[name].dtype == dtype
        np.testing.assert_allclose(found.params[name], expected[name], atol=error)
    assert found.error < error


def test_a_velocity_is_like_the_parameters():
    params = {"m": jnp.zeros(()), "s": jnp.zeros(())}
    with pytest.raises(ValueError, match="velocity is a tree like the parameters"):
        geo.exp(on_the_normal, params, params | {"m": jnp.zeros(2)})


@pytest.mark.slow
def test_equal_calls_trace_once():
    traced = []

    def metric(params):
        traced.append(1)
        return by_scale(params["x"])

    counts: list[int] = []
    for step in (0.1, 0.2):
        start = {"x": jnp.array([0.3, 0.8])}
        geo.exp(metric, start, {"x": jnp.array([step, 0.1])})
        counts = [*counts, len(traced)]
    assert counts[0] == counts[1] > 0


@pytest.mark.slow
def test_derivatives_of_exp():
    """Forward and backward, against the closed form; vmapped."""
    metric = geo.pullback(geo.metric(likelihoods.poisson()), jnp.log)

    def end(rate, v):
        return geo.exp(metric, rate, v).params

    def closed(rate, v):
        return (jnp.sqrt(rate) + v / (2 * jnp.sqrt(rate))) ** 2

    at = jnp.array([4.0, 2.0]), jnp.array([1.5, -0.5])
    for transform in (jax.jacfwd, jax.grad):
        found = jax.jit(jax.vmap(transform(end, (0, 1))))(*at)
        expected = jax.vmap(transform(closed, (0, 1)))(*at)
        np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_without_diffrax(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffrax", None)
    with pytest.raises(ImportError, match=r"pip install 'fisherflow-jax\[geometry\]'"):
        geo.exp(by_scale, jnp.ones(2), jnp.ones(2))


@pytest.mark.parametrize("times", [[1.0, 0.5], [-1.0, 1.0], [], 0.5, [jnp.inf]])
def test_times_and_numbers_out_of_range(times):
    ends = jnp.array([0.3, 0.8]), jnp.ones(2)
    with pytest.raises(ValueError, match="times are an array"):
        geo.exp(by_scale, *ends, times=times)
    with pytest.raises(ValueError, match="a relative tolerance must be positive"):
        geo.exp(by_scale, *ends, tolerance=-1.0)
    for call in (geo.exp, geo.log):
        with pytest.raises(ValueError, match="max_steps must be a positive whole"):
            call(by_scale, *ends, max_steps=0)


@pytest.mark.slow
def test_times_that_a_compiled_function_holds():
    times = jnp.linspace(0.0, 1.0, 3)
    metric = ff.geometry.metric(ff.likelihoods.gaussian_location_scale())

    def path(velocity):
        return ff.geometry.exp(metric, jnp.zeros(2), velocity, times=times).params

    found = jax.jit(path)(jnp.ones(2))
    np.testing.assert_allclose(found, path(jnp.ones(2)), rtol=1e-10, atol=1e-12)
