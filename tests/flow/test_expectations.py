"""A flow averaged over its belief: a variational Gaussian, against its equations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import scipy.special
import scipy.stats

import fisherflow_jax as ff
import streams
from fisherflow_jax import expectations
from fisherflow_jax.expectations import Expectation

MANY = 30  # refreshes, after which the spread has settled to rounding
RULES = {
    "cubature": expectations.cubature(),
    "sigma_points": expectations.sigma_points(),
    "scaled": expectations.sigma_points(0.5),
    "hermite": expectations.hermite(3),
    "monte_carlo": expectations.monte_carlo(8),
    "outputs": expectations.outputs(),
    "fine": expectations.outputs(60),
}
POINTS, SHARES = np.polynomial.hermite_e.hermegauss(40)
SHARES = SHARES / SHARES.sum()


def flow(*names, expectation="outputs", **options):
    rule = expectation and RULES[expectation]
    return streams.flow(*names, **{"num_steps": 10, "expectation": rule} | options)


@functools.cache
def scanned(*names, **options):
    """A flow's states over a stream of six batches, by one compiled program."""
    built = flow(*names, **options)
    stack = [np.stack(part) for part in zip(*streams.batches(4, names[2]), strict=True)]
    start = streams.start(built, key=3)

    def step(state, batch):
        after, info = built.update(state, batch)
        return after, (state, after, info)

    _, found = jax.jit(lambda b: jax.lax.scan(step, start, b))(tuple(stack))
    assert not np.any(found[2].skipped)
    return found


# ---- where the model is linear and the errors are normal, nothing is averaged away


def some(names, *quick):
    """Parameters of a test, of which the quick suite runs some."""
    slow = pytest.mark.slow
    return [name if name in quick else pytest.param(name, marks=slow) for name in names]


@pytest.mark.slow_cases
@pytest.mark.parametrize("name", some(RULES, "cubature", "outputs", "monte_carlo"))
def test_linear_gaussian_is_the_kalman_filter(name):
    _, after, info = scanned("full", "stationary", "gaussian", expectation=name)
    evidence = 0.0
    covariance, mean = np.eye(3) / streams.PRECISION, streams.ORIGIN
    for k, (x, y, w) in enumerate(streams.batches()):
        x, y, w = x[w > 0], y[w > 0], w[w > 0]
        noise = np.diag(streams.SCALE**2 / w)
        predicted = x @ covariance @ x.T + noise
        gain = np.linalg.solve(predicted, x @ covariance).T
        residual = y - x @ mean
        mean, covariance = mean + gain @ residual, covariance - gain @ x @ covariance
        state = jax.tree.map(lambda leaf, k=k: leaf[k], after)
        np.testing.assert_allclose(streams.flat(state.mean), mean, rtol=1e-10)
        found = np.linalg.inv(streams.dense(state.information))
        np.testing.assert_allclose(found, covariance, rtol=0, atol=1e-10)
        # a row of weight w is w rows, whose likelihood is that of their mean, and more
        own = scipy.stats.multivariate_normal.logpdf(residual, cov=predicted)
        whole = np.sum((1 - w) / 2 * np.log(2 * np.pi * streams.SCALE**2))
        evidence += own + whole - np.sum(np.log(w)) / 2
        if not RULES[name].random:  # whose second moments are not those of a normal
            np.testing.assert_allclose(state.log_evidence, evidence, rtol=1e-10)


@pytest.mark.parametrize(
    ("structure", "memory", "name"),
    [
        ("scalar", "stationary", "hermite"),
        ("diagonal", "exponential", "cubature"),
        ("low_rank", "stationary", "cubature"),
        ("full", "random_walk", "monte_carlo"),
        pytest.param("rank_3", "windowed", "outputs", marks=pytest.mark.slow),
        pytest.param("block", "windowed", "outputs", marks=pytest.mark.slow),
        pytest.param("full", "adaptive", "outputs", marks=pytest.mark.slow),
        pytest.param("units", "random_walk", "cubature", marks=pytest.mark.slow),
        pytest.param("low_rank", "exponential", "outputs", marks=pytest.mark.slow),
    ],
)
@pytest.mark.slow
def test_linear_gaussian_under_every_memory(structure, memory, name):
    names = structure, memory, "gaussian"
    # by a scalar's or a diagonal's curvature steps shrink slowly
    steps = {"num_steps": 1000, "num_refreshes": 2}
    found, plain = (
        scanned(*names, expectation=rule, **steps)[1] for rule in (name, None)
    )
    for state in (found, plain):
        assert np.all(state.step == np.arange(1, 7))
    # a search by another matrix than the Hessian ends 3e-6 standard errors away
    tolerance = 1e-9 if structure in ("full", "rank_3") else 1e-5
    assert_close(found.mean, plain.mean, tolerance)
    dense = jax.vmap(streams._dense)
    assert_close(dense(found.information), dense(plain.information), 1e-9)


def assert_close(found, expected, tolerance):
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(
            x, y, rtol=tolerance, atol=tolerance * np.max(np.abs(y))
        ),
        found,
        expected,
    )


def test_at_the_mean_it_is_the_flow_as_it_was():
    built = flow("full", "stationary", "poisson", expectation=None)
    asked = streams.flow(
        "full",
        "stationary",
        "poisson",
        num_steps=10,
        expectation=expectations.at_mean(),
    )
    assert asked.recipe == built.recipe
    batch = streams.batches(4, "poisson")[0]
    both = [each.update(streams.start(each), batch) for each in (built, asked)]
    jax.tree.map(np.testing.assert_array_equal, *both)


# ---- elsewhere it solves its own equations, and reaches the optimum of its bound


def averages(x, mean, covariance, likelihood):
    """Of each row, E mu and E of the variance function, eta ~ N(x m, x V x')."""
    spread = np.einsum("ni,ij,nj->n", x, covariance, x)
    if likelihood == "poisson":
        rate = np.exp(x @ mean + spread / 2)
        return rate, rate
    p = scipy.special.expit((x @ mean)[:, None] + np.sqrt(spread)[:, None] * POINTS)
    return p @ SHARES, (p * (1 - p)) @ SHARES


@pytest.mark.slow
@pytest.mark.parametrize(
    ("structure", "memory", "likelihood"),
    [
        ("full", "exponential", "bernoulli"),
        pytest.param("diagonal", "windowed", "poisson", marks=pytest.mark.slow),
        pytest.param("block", "stationary", "bernoulli", marks=pytest.mark.slow),
        pytest.param("rank_3", "windowed", "bernoulli", marks=pytest.mark.slow),
        pytest.param("scalar", "exponential", "poisson", marks=pytest.mark.slow),
        pytest.param("full", "random_walk", "poisson", marks=pytest.mark.slow),
    ],
)
def test_an_update_is_the_fixed_point(structure, memory, likelihood):
    """I = I^- + E_q F in the structure, and I^- (m - m^-) = E_q of the score."""
    names = structure, memory, likelihood
    options = {"expectation": "fine", "num_refreshes": MANY, "num_steps": 100}
    built = flow(*names, **options)
    before, after, info = scanned(*names, **options)
    kept = streams.STRUCTURES[structure]
    given = streams.batches(4, likelihood)
    for k in (0, 3):
        start, end = (
            jax.tree.map(lambda leaf, k=k: leaf[k], states)
            for states in (before, after)
        )
        ahead = built.advance(start)
        x, y, w = given[k]
        mean, own = streams.flat(end.mean), streams.dense(end.information)
        mu, variance = averages(x, mean, np.linalg.inv(own), likelihood)
        rows = np.sqrt(w * variance)[:, None] * x
        site = kept.reduce(jax.vmap(streams.tree)(jnp.asarray(rows)))
        prior = streams.dense(ahead.information)
        np.testing.assert_allclose(own - prior, streams.dense(site), atol=1e-6)
        pull = prior @ (mean - streams.flat(ahead.mean))
        np.testing.assert_allclose(x.T @ (w * (y - mu)), pull, atol=1e-6)


def logistic(num_rows, seed):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(num_rows, 3))
    x[:, 0] = 1
    chance = scipy.special.expit(x @ np.array([-1.0, 1.5, -0.5]))
    return jnp.asarray(x), jnp.asarray((rng.random(num_rows) < chance).astype(float))


def linear(params, x):
    return x @ params


PRIOR = 0.1


def elbo(x, y, mean, factor):
    """The bound of N(mean, factor factor'), whose constant is the prior's too."""
    spread = jnp.linalg.norm(x @ factor, axis=1)
    z = (x @ mean)[:, None] + spread[:, None] * POINTS
    fit = jnp.sum((y[:, None] * z - jnp.logaddexp(0.0, z)) @ SHARES)
    distance = PRIOR * (mean @ mean + jnp.sum(factor**2)) - 3 - 3 * jnp.log(PRIOR)
    return fit - distance / 2 + jnp.sum(jnp.log(jnp.abs(jnp.diag(factor))))


@pytest.mark.slow
@pytest.mark.parametrize("structure", some(["full", "diagonal"], "full"))
def test_the_optimum_of_the_bound_is_reached(structure):
    """By BFGS on mean and factor; within 1e-5 nats, the quadrature's own error."""
    x, y = logistic(20, 0)
    below = np.tril_indices(3) if structure == "full" else np.diag_indices(3)

    @jax.jit
    @jax.value_and_grad
    def loss(v):
        return -elbo(x, y, v[:3], jnp.zeros((3, 3)).at[below].set(v[3:]))

    best = scipy.optimize.minimize(
        loss,
        np.r_[np.zeros(3), np.eye(3)[below]],
        jac=True,
        method="BFGS",
        options={"gtol": 1e-9},
    ).fun
    gaps = {}
    for rule in (None, expectations.hermite(7), expectations.outputs(40)):
        built = ff.fisher_flow(
            linear,
            ff.likelihoods.bernoulli(),
            structure=getattr(ff.structures, structure)(),
            prior_precision=PRIOR,
            expectation=rule,
        )
        state, info = built.update(built.init(jnp.zeros(3)), (x, y))
        matrix = ff.information.to_dense(state.information, state.mean)
        factor = np.linalg.cholesky(np.linalg.inv(matrix))
        bound = elbo(x, y, state.mean, jnp.asarray(factor))
        gaps[rule] = -float(bound) - best
        if rule is not None:
            assert gaps[rule] < 1e-5
            np.testing.assert_allclose(info.log_evidence, bound, atol=2e-5)
    assert gaps[None] > 0.1


@pytest.mark.slow
def test_the_order_of_the_nodes_does_not_matter():
    rule, batch = expectations.hermite(3), logistic(20, 1)
    shuffled = np.random.default_rng(0).permutation(27)

    def nodes(size, key):
        points, weights = rule.nodes(size, key)
        return points[shuffled], weights[shuffled]

    found = []
    for each in (rule, Expectation("shuffled", nodes)):
        built = ff.fisher_flow(
            linear, ff.likelihoods.bernoulli(), expectation=each, num_refreshes=2
        )
        state, _ = built.update(built.init(jnp.zeros(3)), batch)
        found.append((state.mean, state.information.rows, state.log_evidence))
    assert_close(*found, 1e-12)


@pytest.mark.slow
def test_refining_goes_to_the_variational_posterior_of_all_data():
    x, y = logistic(60, 1)
    built = ff.fisher_flow(
        linear,
        ff.likelihoods.bernoulli(),
        prior_precision=PRIOR,
        expectation=expectations.outputs(),
        num_refreshes=MANY,
    )
    start = built.init(jnp.zeros(3))
    whole, _ = built.update(start, (x, y))
    stack = x.reshape(3, 20, 3), y.reshape(3, 20)
    state = jax.lax.scan(built.update, start, stack)[0]
    away = [jnp.max(jnp.abs(state.mean - whole.mean) / ff.standard_error(whole))]
    for _ in range(12):
        state = ff.refine(built, state, stack)
        away.append(jnp.max(jnp.abs(state.mean - whole.mean)))
    assert away[0] > 0.02 and away[-1] < 1e-6
    np.testing.assert_allclose(
        state.information.rows, whole.information.rows, rtol=1e-6
    )
    np.testing.assert_allclose(state.log_evidence, whole.log_evidence, rtol=1e-6)


# ---- outputs of several numbers, and models that are not linear


def doubled(params, x):
    return x * params


def scaled(params, x):
    return jnp.exp(x[:, 0]) * params


RNG = np.random.default_rng(2)
COVARIANCE = np.array([[2.0, 1.0], [1.0, 1.0]])
SEVERAL = {
    "classes": (doubled, ff.likelihoods.categorical(), RNG.integers(0, 2, (5, 2))),
    "a scale": (
        doubled,
        ff.likelihoods.gaussian_location_scale(),
        RNG.normal(size=(5, 2)),
    ),
    "errors that go together": (
        scaled,
        ff.likelihoods.gaussian(covariance=COVARIANCE),
        RNG.normal(size=(5, 2)),
    ),
}


@pytest.mark.parametrize("name", some(SEVERAL, "classes"))
@pytest.mark.slow
def test_the_outputs_of_a_target_are_averaged_together(name):
    """Of linear models the outputs' nodes and the parameters' say the same."""
    apply_fn, likelihood, y = SEVERAL[name]
    x = jnp.asarray(np.random.default_rng(3).normal(size=(5, 2, 1)))
    found = []
    for rule in (expectations.hermite(16), expectations.outputs(20)):
        built = ff.fisher_flow(apply_fn, likelihood, expectation=rule)
        state, _ = built.update(built.init(jnp.zeros(2)), (x, y))
        found.append((state.mean, state.information.rows, state.log_evidence))
    assert_close(*found, 1e-5)


def network(params, x):
    return jnp.tanh(x @ params["in"]) @ params["out"]


def network_case():
    rng = np.random.default_rng(5)
    x = jnp.asarray(rng.normal(size=(12, 2)))
    y = jnp.asarray((rng.random(12) < scipy.special.expit(2 * x[:, 0])).astype(float))
    params = {
        "in": jnp.asarray(rng.normal(size=(2, 3))),
        "out": jnp.asarray(rng.normal(size=3)),
    }
    return x, y, params


@pytest.mark.slow
@pytest.mark.parametrize("name", some(["cubature", "fine"], "cubature"))
def test_of_a_network_it_is_the_fixed_point_too(name):
    """I = I_0 + diag E J' W J and I_0 (m - m_0) = E J' (y - mu), by explicit Jacobians.

    At the outputs J is that of the mean.
    """
    x, y, params = network_case()
    built = ff.fisher_flow(
        network,
        ff.likelihoods.bernoulli(),
        structure=ff.structures.diagonal(),
        expectation=RULES[name],
        num_steps=100,
        num_refreshes=60,
    )
    state, _ = built.update(built.init(params), (x, y))
    mean, unravel = jax.flatten_util.ravel_pytree(state.mean)
    first = jax.flatten_util.ravel_pytree(params)[0]
    own = jax.flatten_util.ravel_pytree(state.information.entries)[0]

    def at(flat):
        return network(unravel(flat), x)

    slopes = jax.jit(jax.jacobian(at))
    if name == "fine":
        jacobian = slopes(mean)
        spread = jnp.sqrt(jnp.sum(jacobian**2 / own, 1))
        p = jax.nn.sigmoid(at(mean)[:, None] + spread[:, None] * POINTS)
        score = jacobian.T @ (y - p @ SHARES)
        information = (jacobian**2).T @ ((p * (1 - p)) @ SHARES)
    else:
        size = len(mean)
        score = information = 0
        for sign in (1, -1):
            for k in range(size):
                node = mean.at[k].add(sign * jnp.sqrt(size / own[k]))
                jacobian, p = slopes(node), jax.nn.sigmoid(at(node))
                score += jacobian.T @ (y - p) / (2 * size)
                information += (jacobian**2).T @ (p * (1 - p)) / (2 * size)
    np.testing.assert_allclose(own - 1, information, atol=1e-4)
    np.testing.assert_allclose(mean - first, score, atol=1e-4)


@pytest.mark.parametrize("name", some(["cubature", "outputs"], "outputs"))
@pytest.mark.slow
def test_layers_in_kronecker_structure(name):
    """A linear layer of two targets: as at the mean."""
    rng = np.random.default_rng(6)
    x, y = rng.normal(size=(2, 8, 3))
    params = {"weight": jnp.zeros((3, 3)), "bias": jnp.zeros(3)}

    def layer(params, x):
        return x @ params["weight"] + params["bias"]

    structure = ff.structures.kronecker(ff.layers.find_layers(layer, params, x))
    states = []
    for rule in (None, RULES[name]):
        built = ff.fisher_flow(
            layer,
            ff.likelihoods.gaussian(0.5),
            structure=structure,
            expectation=rule,
            num_steps=500,
            num_refreshes=2,
        )
        states.append(built.update(built.init(params), (x, y))[0])
    assert_close(*(state.mean for state in states), 1e-8)
    assert_close(*(state.information for state in states), 1e-8)


# ---- how it runs


@pytest.mark.slow
def test_the_widest_outputs_are_told():
    x, y = logistic(20, 0)
    weights = jnp.ones(20).at[3].set(0.0)
    x = x.at[3].set(100.0)  # of a row that does not count
    built = ff.fisher_flow(
        linear, ff.likelihoods.bernoulli(), expectation=expectations.outputs()
    )
    state, info = built.update(built.init(jnp.zeros(3)), (x, y, weights))
    covariance = np.linalg.inv(state.information.rows)
    spread = np.sqrt(np.einsum("ni,ij,nj->n", x, covariance, x))
    expected = np.max(np.delete(spread, 3))
    np.testing.assert_allclose(info.output_deviation, expected, rtol=1e-3)


@pytest.mark.slow
def test_streams_run_under_vmap_and_in_float32():
    built = flow("full", "stationary", "bernoulli")
    stack = [
        np.stack(part) for part in zip(*streams.batches(4, "bernoulli"), strict=True)
    ]
    _, expected, _ = scanned("full", "stationary", "bernoulli")
    run = jax.jit(
        jax.vmap(lambda start, b: jax.lax.scan(built.update, start, b)[0], (0, None))
    )
    starts = jax.tree.map(lambda x: jnp.stack([x, x]), streams.start(built))
    state = run(starts, tuple(stack))
    last = jax.tree.map(lambda x: x[-1], expected)
    assert_close(jax.tree.map(lambda x: x[1], state.mean), last.mean, 1e-9)

    narrow = jax.tree.map(
        lambda x: jnp.asarray(x, jnp.float32), (streams.tree(np.zeros(3)), tuple(stack))
    )
    origin = jax.tree.map(jnp.float32, streams.tree(streams.ORIGIN))
    start = built.init(narrow[0], origin)
    single = jax.lax.scan(built.update, start, narrow[1])[0]
    assert single.mean["level"].dtype == jnp.float32
    assert_close(single.mean, last.mean, 1e-3)


@pytest.mark.slow
def test_draws_are_those_of_the_key():
    names = "full", "stationary", "bernoulli"
    built = flow(*names, expectation="monte_carlo", num_refreshes=2)
    batch = streams.batches(4, "bernoulli")[0]
    means = [
        streams.flat(built.update(streams.start(built, key), batch)[0].mean)
        for key in (0, 0, 1)
    ]
    np.testing.assert_array_equal(means[0], means[1])
    assert not np.allclose(means[0], means[2])
    with pytest.raises(ValueError, match=r"monte_carlo\(8\) draws at random.*key"):
        streams.start(built)


@pytest.mark.slow
def test_derivatives_are_those_of_the_solution():
    x, y = logistic(20, 2)
    built = ff.fisher_flow(
        linear,
        ff.likelihoods.bernoulli(),
        expectation=expectations.outputs(),
        num_refreshes=12,
    )

    @jax.jit
    def found(shift):
        state, info = built.update(built.init(jnp.zeros(3)), (x + shift, y))
        return jnp.sum(state.mean) + info.log_evidence

    step = 1e-4
    expected = (found(step) - found(-step)) / (2 * step)
    np.testing.assert_allclose(jax.grad(found)(0.0), expected, rtol=1e-5)


OTHERS = {
    "marginal": {"structure": ff.structures.diagonal(), "marginal": True},
    "robust": {"robust": True},
    "dispersion": {"likelihood": ff.likelihoods.gaussian(scale=None)},
    "concentration": {"likelihood": ff.likelihoods.negative_binomial(None)},
    "drawn": {"estimator": ff.estimators.monte_carlo},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", some(OTHERS, "marginal"))
def test_what_else_a_flow_does(name):
    """Near to the flow at the mean, and not the same, where there are 40 rows."""
    options = {"likelihood": ff.likelihoods.poisson()} | OTHERS[name]
    rng = np.random.default_rng(3)
    x = np.column_stack([np.ones(40), rng.normal(size=40)])
    y = rng.poisson(np.exp(1 + 0.3 * x[:, 1])).astype(float)
    states = []
    for rule in (None, expectations.cubature()):
        built = ff.fisher_flow(linear, expectation=rule, **options)
        start = built.init(jnp.zeros(2), key=0)
        state, info = built.update(start, (x, y))
        assert not info.skipped and np.isfinite(info.log_evidence)
        states.append(state)
    error = ff.standard_error(states[0])
    away = np.abs(states[1].mean - states[0].mean) / error
    assert np.all(away < 0.3)
    same = np.all(away < 1e-9)
    assert same == (name == "dispersion")  # which is linear-Gaussian


def test_what_is_refused():
    model = linear, ff.likelihoods.bernoulli()
    for options, wrong in (
        ({"num_steps": 1}, "num_steps=1 would average over the belief before"),
        ({"num_refreshes": 0}, "num_refreshes must be a positive whole number"),
        ({"estimator": ff.estimators.empirical}, "made of scores"),
    ):
        with pytest.raises(ValueError, match=wrong):
            ff.fisher_flow(*model, **{"expectation": expectations.outputs()} | options)
    with pytest.raises(TypeError, match="expectation comes from a call"):
        ff.fisher_flow(*model, expectation=expectations.cubature)
    with pytest.raises(ValueError, match="kappa must be finite and not negative"):
        expectations.sigma_points(-1.0)
    with pytest.raises(ValueError, match="in pairs; got 3"):
        expectations.monte_carlo(3)
    with pytest.raises(ValueError, match=r"hermite\(9\) has 9\^20 nodes"):
        expectations.hermite(9).nodes(20, None)

    def centred(params, x):
        return (x - x.mean(0)) @ params

    built = ff.fisher_flow(*(centred, model[1]), expectation=expectations.outputs())
    with pytest.raises(ValueError, match=r"interact.*outputs\(\) gives"):
        built.update(built.init(jnp.zeros(3)), logistic(20, 0))


def test_nodes_have_the_moments_of_a_normal():
    for size in (1, 2, 5):
        for rule in RULES.values():
            if rule.nodes is None:
                points, weights = rule.output_nodes(size)
            else:
                points, weights = rule.nodes(size, jax.random.key(0))
            np.testing.assert_allclose(np.sum(weights), 1, rtol=1e-12)
            np.testing.assert_allclose(weights @ points, np.zeros(size), atol=1e-12)
            if not rule.random:
                moment = np.einsum("k,ki,kj->ij", weights, points, points)
                np.testing.assert_allclose(moment, np.eye(size), atol=1e-12)


# ---- what it is for: single rows


def coverage(num_streams, num_warm, rule, seed=0):
    """Of nominal 95%, logistic, n = 100, truth drawn from the prior N(0, 2^2)."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(num_streams, 100, 3))
    x[..., 0] = 1
    truth = 2 * rng.normal(size=(num_streams, 3))
    chance = scipy.special.expit(np.einsum("rnd,rd->rn", x, truth))
    y = (rng.random(chance.shape) < chance).astype(float)
    built = ff.fisher_flow(
        linear, ff.likelihoods.bernoulli(), prior_precision=0.25, expectation=rule
    )

    def run(x, y):
        state = built.init(jnp.zeros(3))
        if num_warm:
            state = ff.warm_start(built, state, (x[:num_warm], y[:num_warm]))
        rows = x[num_warm:, None], y[num_warm:, None]
        state = jax.lax.scan(built.update, state, rows)[0]
        return state.mean, ff.standard_error(state)

    mean, error = jax.jit(jax.vmap(run))(x, y)
    return np.mean(np.abs(mean - truth) < 1.96 * error)


@pytest.mark.slow
def test_single_rows_are_covered():
    """The sketch's numbers, on its own 400 streams; standard error .01."""
    averaged = coverage(400, 0, expectations.outputs())
    assert abs(averaged - 0.903) < 0.02
    assert averaged - coverage(400, 0, None) > 0.05


@pytest.mark.slow
def test_a_warm_start_helps_them_on():
    """Within .02 of .938, of 1,500 streams; standard error .005."""
    warm = coverage(1500, 20, expectations.outputs(), seed=7)
    assert abs(warm - 0.938) < 0.02
