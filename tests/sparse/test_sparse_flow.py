"""The sparse flow against the dense one on the same rows, and against numpy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fisherflow_jax as ff

pytestmark = pytest.mark.filterwarnings("ignore::fisherflow_jax.DataWarning")

TIMES, COUNT, WIDTH, FEATURES = 12, 5, 4, 30
rng = np.random.default_rng(7)
INDICES = np.stack(
    [
        [rng.choice(FEATURES, WIDTH, replace=False) for _ in range(COUNT)]
        for _ in range(TIMES)
    ]
).astype(np.int32)
VALUES = rng.normal(size=INDICES.shape)
INDICES[rng.uniform(size=INDICES.shape) < 0.2] = FEATURES  # padding, values and all
DENSE = np.zeros((TIMES, COUNT, FEATURES + 1))
np.put_along_axis(DENSE, INDICES, VALUES, 2)
DENSE = DENSE[..., :FEATURES]
LINE = DENSE @ rng.normal(size=FEATURES)
WEIGHTS = rng.choice([0.0, 1.0, 2.0], (TIMES, COUNT))
LIKELIHOODS = {
    "bernoulli": (ff.likelihoods.bernoulli(), 1.0 * (LINE > 0)),
    "poisson": (ff.likelihoods.poisson(), rng.poisson(np.exp(0.3 * LINE)) * 1.0),
    "gaussian": (ff.likelihoods.gaussian(0.7), LINE),
    "gamma": (ff.likelihoods.gamma(2.0), rng.gamma(2.0, np.exp(0.3 * LINE) / 2)),
}
MEMORIES = {
    "stationary": ff.memories.stationary(),
    "exponential": ff.memories.exponential(0.8),
    # of which the scale becomes too small for a number: e^-55
    "short": ff.memories.exponential(0.01),
}
EACH = np.linspace(0.5, 3.0, FEATURES)
ORIGIN = 0.1 * rng.normal(size=FEATURES)


def rows_of(times):
    return ff.sparse.Rows(jnp.asarray(INDICES[times]), jnp.asarray(VALUES[times]))


ALL = slice(None)


@pytest.mark.slow_cases
@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("name", LIKELIHOODS)
def test_equal_to_the_dense_flow(name, memory):
    likelihood, targets = LIKELIHOODS[name]
    choices = {"memory": MEMORIES[memory], "prior_precision": EACH}
    sparse = ff.sparse.flow(likelihood, FEATURES, normalise=False, **choices)
    dense = ff.fisher_flow(
        lambda params, x: x @ params,
        likelihood,
        structure=ff.structures.diagonal(),
        num_steps=1,
        **choices,
    )
    batches = rows_of(ALL), targets, WEIGHTS
    found, info = jax.lax.scan(sparse.update, sparse.init(ORIGIN), batches)
    wanted, told = jax.lax.scan(
        dense.update, dense.init(jnp.asarray(ORIGIN)), (DENSE, *batches[1:])
    )
    close = functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-11)
    close(found.mean, wanted.mean)
    close(found.information.entries, wanted.information.entries)
    close(found.count, wanted.count)
    close(info.log_likelihood, told.log_likelihood)
    close(ff.standard_error(found), ff.standard_error(wanted))
    np.testing.assert_array_equal(info.missing, told.missing)
    model = dense.recipe.apply_fn, likelihood
    of_rows = jax.jit(sparse.predict)(found, rows_of(0))
    for one, other in zip(of_rows, ff.predict(wanted, *model, DENSE[0]), strict=True):
        close(one, other)


@pytest.mark.slow
def test_in_float32():
    likelihood, targets = LIKELIHOODS["bernoulli"]
    flow = ff.sparse.flow(likelihood, FEATURES, memory=MEMORIES["exponential"])
    exact, _ = jax.lax.scan(flow.update, flow.init(), (rows_of(ALL), targets, WEIGHTS))
    with jax.enable_x64(False):
        batches = rows_of(ALL), jnp.asarray(targets), jnp.asarray(WEIGHTS)
        found, _ = jax.lax.scan(flow.update, flow.init(), batches)
        assert found.mean.dtype == jnp.float32
    np.testing.assert_allclose(found.mean, exact.mean, rtol=1e-5, atol=1e-6)


def test_the_denominator():
    """Of one row at a time it is the exact update's, projected on the diagonal."""
    likelihood, targets = LIKELIHOODS["gaussian"]
    flow = ff.sparse.flow(likelihood, FEATURES, prior_precision=2.0)
    state = flow.init()
    mean, information = np.zeros(FEATURES), np.full(FEATURES, 2.0)
    for time in range(3):
        x, y = DENSE[time, 0], targets[time, 0]
        batch = jax.tree.map(lambda part: part[:1], (rows_of(time), targets[time]))
        state, info = flow.update(state, batch)
        spread = x @ (x / information)
        np.testing.assert_allclose(info.output, x @ mean, atol=1e-12)
        np.testing.assert_allclose(info.variance, spread, atol=1e-12)
        score = x * (y - x @ mean) / 0.7**2 / (1 + spread / 0.7**2)
        information = information + np.square(x) / 0.7**2
        mean = mean + score / information
        np.testing.assert_allclose(state.mean, mean, atol=1e-12)


@pytest.mark.parametrize("l1", [0.0, 0.4])
def test_ftrl_proximal(l1):
    """McMahan's algorithm, row by row."""
    alpha, beta, l2 = 0.3, 1.0, 0.5
    _, targets = LIKELIHOODS["bernoulli"]
    flow = ff.sparse.flow(
        ff.likelihoods.bernoulli(),
        FEATURES,
        prior_precision=beta / alpha + l2,
        l1=l1,
        rate=alpha,
        normalise=False,
    )
    every = jax.tree.map(
        lambda x: jnp.asarray(x).reshape(TIMES * COUNT, 1, *x.shape[2:]),
        (rows_of(ALL), targets),
    )
    state, info = jax.lax.scan(flow.update, flow.init(), every)
    z, n, lines = np.zeros(FEATURES), np.zeros(FEATURES), []
    for x, y in zip(DENSE.reshape(-1, FEATURES), targets.ravel(), strict=True):
        w = np.where(
            np.abs(z) <= l1,
            0.0,
            -(z - np.sign(z) * l1) / ((beta + np.sqrt(n)) / alpha + l2),
        )
        lines.append(x @ w)
        g = (1 / (1 + np.exp(-x @ w)) - y) * x
        z = z + g - (np.sqrt(n + g**2) - np.sqrt(n)) / alpha * w
        n = n + g**2
    np.testing.assert_allclose(info.output[:, 0], lines, atol=1e-12)
    np.testing.assert_allclose(state.curvature, n, atol=1e-12)
    np.testing.assert_allclose(state.shift, -z, atol=1e-12)
    assert np.any(np.asarray(state.mean) == 0) == (l1 > 0)
    for asked in (flow.predict, functools.partial(flow.sample, key=0)):
        with pytest.raises(ValueError, match="no information"):
            asked(state, rows_of(0))
    with pytest.raises(ValueError, match="no information"):
        ff.standard_error(state)


def test_ftrl_with_a_feature_in_several_rows_of_a_batch():
    """The root is of the sum of all its squares, and the mean moves by its scores."""
    flow = ff.sparse.flow(
        ff.likelihoods.gaussian(1.0), 2, rate=0.5, normalise=False, prior_precision=3.0
    )
    rows = ff.sparse.Rows(jnp.array([[0], [0], [2]]), jnp.array([[1.0], [2.0], [9.0]]))
    state, _ = flow.update(flow.init(1.0), (rows, jnp.array([3.0, 1.0, 0.0])))
    scores = np.array([2.0, -2.0])
    np.testing.assert_allclose(state.curvature, [np.sum(scores**2), 0], atol=1e-12)
    moved = np.sum(scores) / (3.0 + np.sqrt(np.sum(scores**2)) / 0.5)
    np.testing.assert_allclose(state.mean, [1.0 + moved, 1.0], atol=1e-12)


@pytest.mark.parametrize("choices", [{}, {"rate": 0.3}, {"rate": 0.3, "l1": 0.1}])
def test_a_weight_is_how_often_a_row_came(choices):
    likelihood, targets = LIKELIHOODS["bernoulli"]
    flow = ff.sparse.flow(likelihood, FEATURES, **choices)
    rows = rows_of(0)
    wanted, _ = flow.update(
        flow.init(), jax.tree.map(lambda x: jnp.repeat(x, 3, 0), (rows, targets[0]))
    )
    found, _ = flow.update(flow.init(), (rows, targets[0], jnp.full(COUNT, 3.0)))
    np.testing.assert_allclose(found.curvature, wanted.curvature, atol=1e-12)
    np.testing.assert_allclose(found.mean, wanted.mean, atol=1e-12)


@pytest.mark.slow
def test_derivatives_by_prior_and_decay():
    likelihood, targets = LIKELIHOODS["poisson"]

    @jax.jit
    def loss(numbers):
        prior, decay = numbers  # of 12 updates the scale becomes too small: e^-48
        memory = ff.memories.exponential(decay)
        flow = ff.sparse.flow(
            likelihood, FEATURES, memory=memory, prior_precision=prior
        )
        batches = rows_of(ALL), targets
        return jnp.sum(jax.lax.scan(flow.update, flow.init(), batches)[1].output ** 2)

    at, small = jnp.array([2.0, 0.018]), 1e-6
    wanted = [(loss(at + d) - loss(at - d)) / (2 * small) for d in small * np.eye(2)]
    np.testing.assert_allclose(jax.grad(loss)(at), wanted, rtol=1e-6)


LARGE = 100_003  # a number that stands nowhere else


@pytest.mark.slow_cases
@pytest.mark.parametrize(
    "choices",
    [
        {},
        {"memory": ff.memories.exponential(0.999)},
        {"prior_precision": jnp.ones(LARGE), "l1": 0.1},
        {"rate": 0.1, "normalise": False},
    ],
    ids=["plain", "exponential", "priors", "ftrl"],
)
def test_nothing_of_the_size_of_the_state_is_copied(choices):
    likelihood, targets = LIKELIHOODS["bernoulli"]
    flow = ff.sparse.flow(likelihood, LARGE, **choices)
    state = jax.eval_shape(flow.init)
    batches = rows_of(ALL), jnp.asarray(targets)
    one = jax.tree.map(lambda x: x[0], batches)

    def scanned(state, batches):
        return jax.lax.scan(flow.update, state, batches)

    for function, given in ((scanned, batches), (flow.update, one)):
        compiled = jax.jit(function, donate_argnums=0).lower(state, given).compile()
        lines = [x for x in compiled.as_text().splitlines() if f"[{LARGE}]" in x]
        assert any("scatter" in line for line in lines)
        assert [line for line in lines if " copy(" in line] == []


def test_one_draw_is_of_all_features_at_once():
    likelihood, targets = LIKELIHOODS["bernoulli"]
    flow = ff.sparse.flow(likelihood, FEATURES)
    state, _ = flow.update(flow.init(), (rows_of(0), targets[0]))
    rows = rows_of(1)
    twice = jax.tree.map(lambda x: jnp.concatenate([x, x]), rows)
    keys = jax.random.split(jax.random.key(0), 4000)
    draws = jax.vmap(lambda key: flow.sample(state, twice, key))(keys)
    np.testing.assert_array_equal(draws[:, :COUNT], draws[:, COUNT:])
    error = np.asarray(ff.standard_error(state))
    covariance = (DENSE[1] * error**2) @ DENSE[1].T
    spread = np.sqrt(np.diag(covariance))
    mean = DENSE[1] @ np.asarray(state.mean)
    z = (np.mean(draws[:, :COUNT], 0) - mean) / spread * np.sqrt(len(keys))
    assert np.abs(z).max() < 4
    found = np.cov(draws[:, :COUNT].T)
    scale = np.outer(spread, spread)
    np.testing.assert_allclose(
        found / scale, covariance / scale, atol=5 / len(keys) ** 0.5
    )


SPOILT = {
    "index too large": (
        lambda b: (at(b[0], "indices", 31), *b[1:]),
        r"indices\[1, 0\] = 31",
    ),
    "index below zero": (
        lambda b: (at(b[0], "indices", -1), *b[1:]),
        r"indices\[1, 0\] = -1",
    ),
    "value": (
        lambda b: (at(b[0], "values", np.nan), *b[1:]),
        "nan, which is not finite",
    ),
    "target": (lambda b: (b[0], b[1].at[1].set(-1.0), b[2]), "cannot produce"),
    "weight": (lambda b: (b[0], b[1], b[2].at[1].set(-1.0)), "is no multiplicity"),
}


def at(rows, field, value):
    return rows._replace(**{field: getattr(rows, field).at[1, 0].set(value)})


@pytest.mark.parametrize("spoilt", SPOILT)
def test_a_bad_row_costs_that_row(spoilt):
    spoil, message = SPOILT[spoilt]
    likelihood, targets = LIKELIHOODS["poisson"]
    flow = ff.sparse.flow(likelihood, FEATURES)
    rows = rows_of(0)._replace(indices=jnp.arange(20).reshape(5, 4))
    batch = rows, jnp.asarray(targets[0]), jnp.ones(COUNT)
    without = (*batch[:2], batch[2].at[1].set(0.0))
    wanted, _ = flow.update(flow.init(), without)
    with pytest.raises(ValueError, match=message):
        flow.update(flow.init(), spoil(batch))
    lenient = ff.sparse.flow(likelihood, FEATURES, bad_rows="drop")
    for update in (jax.jit(flow.update), lenient.update):
        found, info = update(flow.init(), spoil(batch))
        assert found.rows_skipped == info.rows_skipped == 1
        np.testing.assert_array_equal(found.mean, wanted.mean)
        np.testing.assert_array_equal(found.shift, wanted.shift)


def test_an_overflow_moves_nothing():
    flow = ff.sparse.flow(ff.likelihoods.poisson(), FEATURES)
    rows = rows_of(0)._replace(values=jnp.full((COUNT, WIDTH), 1e200))
    batch = rows, jnp.ones(COUNT)
    with pytest.raises(ValueError, match="not finite, for an overflow"):
        flow.update(flow.init(), batch)
    state, info = jax.jit(flow.update)(flow.init(), batch)
    assert info.skipped
    assert (int(state.num_skipped), int(state.step)) == (1, 0)
    assert not np.any(state.mean)


def test_from_csr():
    scipy_sparse = pytest.importorskip("scipy.sparse")
    matrix = scipy_sparse.csr_matrix(DENSE[0])
    rows = ff.sparse.from_csr(matrix, width=6)
    assert rows.indices.shape == (COUNT, 6)
    dense = np.zeros((COUNT, FEATURES + 1))
    np.put_along_axis(dense, np.asarray(rows.indices), np.asarray(rows.values), 1)
    np.testing.assert_array_equal(dense[:, :FEATURES], DENSE[0])
    twice = scipy_sparse.coo_matrix(([1.0, 2.0], ([0, 0], [3, 3])), (2, 5))
    rows = ff.sparse.from_csr(twice)
    assert rows.indices.tolist() == [[3], [5]]
    assert rows.values.tolist() == [[3.0], [0.0]]
    with pytest.raises(ValueError, match=r"row \d has \d entries, more than width=1"):
        ff.sparse.from_csr(matrix, width=1)
    with pytest.raises(TypeError, match="scipy sparse matrix"):
        ff.sparse.from_csr(DENSE[0])


WRONG = {
    "likelihood": ({"likelihood": ff.likelihoods.categorical()}, "several outputs"),
    "unknown": ({"likelihood": ff.likelihoods.gaussian(None)}, "something unknown"),
    "windowed": ({"memory": ff.memories.windowed(3)}, "fades all by one number"),
    "floor": ({"memory": ff.memories.exponential(0.9, floor=False)}, "keep the floor"),
    "features": ({"num_features": 0}, "num_features"),
    "prior": ({"prior_precision": 0.0}, "prior_precision must be positive"),
    "l1": ({"l1": -1.0}, "l1 must be"),
    "rate": ({"rate": -1.0}, "rate must be positive"),
    "fading rate": (
        {"rate": 0.1, "memory": ff.memories.exponential(0.9)},
        "does not fade",
    ),
    "bad_rows": ({"bad_rows": "keep"}, "bad_rows is"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_bad_options(wrong):
    options, message = WRONG[wrong]
    given = {"likelihood": ff.likelihoods.bernoulli(), "num_features": 9} | options
    with pytest.raises(ValueError, match=message):
        ff.sparse.flow(given.pop("likelihood"), given.pop("num_features"), **given)


def test_bad_batches():
    flow = ff.sparse.flow(ff.likelihoods.bernoulli(), FEATURES)
    state, rows = flow.init(), rows_of(0)
    with pytest.raises(TypeError, match=r"ff.sparse.Rows\(indices, values\)"):
        flow.update(state, (jnp.asarray(DENSE[0]), jnp.ones(COUNT)))
    with pytest.raises(ValueError, match="indices are whole numbers"):
        flow.update(state, (ff.sparse.Rows(rows.values, rows.values), jnp.ones(COUNT)))
    with pytest.raises(ValueError, match=r"both \(n, k\)"):
        flow.update(state, (rows._replace(values=rows.values[:, :1]), jnp.ones(COUNT)))
    with pytest.raises(ValueError, match=r"one a row, shape \(5,\)|weights"):
        flow.update(state, (rows, jnp.ones(COUNT), jnp.ones(4)))
    other = ff.sparse.flow(ff.likelihoods.bernoulli(), 9)
    with pytest.raises(ValueError, match="the state has 30 features, and the flow 9"):
        other.update(state, (rows, jnp.ones(COUNT)))
    with pytest.raises(TypeError, match="a state of its own init"):
        flow.update((state, None), (rows, jnp.ones(COUNT)))
    with pytest.raises(ValueError, match=r"indices\[1, 0\] = -1"):
        flow.predict(state, at(rows, "indices", -1))
    with pytest.raises(ValueError, match="prior_mean is a number or one a feature"):
        flow.init(jnp.ones(3))
