"""What the likelihood leaves unknown is estimated beside the parameters."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.optimize
import scipy.stats

import fisherflow_jax as ff

_rng = np.random.default_rng(6)
INPUTS = np.column_stack([np.ones(600), _rng.normal(size=(600, 2))])
MEANS = np.exp(INPUTS @ [0.8, 0.3, -0.2])
COUNTS = _rng.negative_binomial(1.7, 1.7 / (1.7 + MEANS)).astype(float)
REALS = 50 + 3 * (INPUTS @ [1.0, 0.5, -1.0] + _rng.standard_t(4.0, size=600))
LIKELIHOODS = {
    "concentration": ff.likelihoods.negative_binomial(None),
    "df and scale": ff.likelihoods.student_t(None, None),
    "df": ff.likelihoods.student_t(None, 3.0),
}
MEMORIES = {
    "stationary": ff.memories.stationary(),
    "exponential": ff.memories.exponential(0.9),
    "windowed": ff.memories.windowed(4),
    "random_walk": ff.memories.random_walk(1e-6),
    "adaptive": ff.memories.adaptive(500),
}
# the priors of the logarithms: mean, standard deviation
PRIORS = {"concentration": (0, 2), "df": (np.log(5), 2), "scale": (0, 100)}


def linear(params, inputs):
    return inputs @ params


@functools.cache
def flow_of(name, memory="stationary"):
    return ff.fisher_flow(
        linear, LIKELIHOODS[name], memory=MEMORIES[memory], prior_precision=1e-10
    )


@functools.cache
def update_of(name, memory="stationary"):
    """One program for eager calls and those under `jit`."""
    return jax.jit(flow_of(name, memory).update)


def batch_of(name, rows=slice(None)):
    """These rows; the others are padding, so that one compiled update does for all."""
    weights = np.zeros(600)
    weights[rows] = 1
    return INPUTS, COUNTS if name == "concentration" else REALS, weights


@functools.cache
def after_all(name):
    flow = flow_of(name)
    return update_of(name)(flow.init(jnp.zeros(3)), batch_of(name))[0]


def stream(name, memory="stationary", rows=slice(None), state=None):
    flow = flow_of(name, memory)
    state = flow.init(jnp.zeros(3)) if state is None else state
    rows = np.arange(600)[rows]
    for first in range(0, len(rows), 60):
        batch = batch_of(name, rows[first : first + 60])
        state, _ = update_of(name, memory)(state, batch)
    return state


@functools.cache
def optimum(name):
    """The joint optimum of parameters and logarithms, by scipy alone."""
    names = list(LIKELIHOODS[name].nuisance.names)
    inputs, targets, _ = batch_of(name)

    def loss(point):
        values = {"df": 4.0, "scale": 3.0} | dict(
            zip(names, np.exp(point[3:]), strict=True)
        )
        outputs = inputs @ point[:3]
        if name == "concentration":
            r = values["concentration"]
            logs = scipy.stats.nbinom.logpmf(targets, r, r / (r + np.exp(outputs)))
        else:
            logs = scipy.stats.t.logpdf(targets, values["df"], outputs, values["scale"])
        centers, spreads = np.array([PRIORS[n] for n in names]).T
        return -logs.sum() + 0.5 * np.sum(((point[3:] - centers) / spreads) ** 2)

    point = np.concatenate([after_all(name).mean, np.full(len(names), 0.5)])
    for _ in range(4):
        point = scipy.optimize.minimize(loss, point, method="BFGS", tol=1e-9).x
    return point


def logs_of(state):
    return np.array(list(state.nuisance.mean.values()))


@pytest.mark.slow_cases
@pytest.mark.parametrize("name", LIKELIHOODS)
def test_one_update_ends_at_the_joint_optimum(name):
    state, expected = after_all(name), optimum(name)
    error = np.array(ff.standard_error(state))
    assert np.max(np.abs(state.mean - expected[:3]) / error) < 1e-3
    np.testing.assert_allclose(logs_of(state), expected[3:], atol=1e-4)


@pytest.mark.parametrize("name", ["concentration", "df and scale"])
def test_a_stream_ends_near_it_and_its_errors_are_of_the_right_size(name):
    state, whole = stream(name), after_all(name)
    errors = np.array(list(ff.standard_error(whole.nuisance).values()))
    assert np.max(np.abs(logs_of(state) - logs_of(whole)) / errors) < 1
    assert np.max(np.abs(state.mean - whole.mean) / ff.standard_error(whole)) < 1
    own = np.array(list(ff.standard_error(state.nuisance).values()))
    np.testing.assert_allclose(own, errors, rtol=0.2)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["concentration", pytest.param("df and scale", marks=pytest.mark.slow)]
)
def test_a_stream_in_float32_ends_as_in_float64(name):
    wide = stream(name)
    start = flow_of(name).init(jnp.zeros(3, jnp.float32))
    state = stream(name, state=start)
    assert (
        state.num_skipped == 0
        and state.nuisance.mean.keys() == wide.nuisance.mean.keys()
    )
    pairs = [(state.mean, wide.mean, ff.standard_error(wide))]
    errors = np.array(list(ff.standard_error(wide.nuisance).values()))
    pairs.append((logs_of(state), logs_of(wide), errors))
    for found, expected, error in pairs:
        assert found.dtype == jnp.float32
        assert np.max(np.abs(np.asarray(found, float) - expected) / error) < 0.02


@pytest.mark.slow
def test_randhie():
    """Source: R's MASS, by statsmodels: negative binomial of 20,190 rows."""
    sm = pytest.importorskip("statsmodels.api")
    data = sm.datasets.randhie.load_pandas()
    inputs = np.column_stack([data.exog.to_numpy(float), np.ones(len(data.exog))])
    targets = data.endog.to_numpy(float)
    start = np.append(sm.Poisson(targets, inputs).fit(disp=0).params, 0.5)
    fit = sm.NegativeBinomial(targets, inputs).fit(
        disp=0, method="newton", start_params=start, tol=1e-12
    )
    alpha, error = fit.params[-1], fit.bse[-1]
    flow = flow_of("concentration")
    start = flow.init(jnp.zeros(10))
    state, _ = flow.update(start, (inputs, targets))
    found = np.exp(-state.nuisance.mean["concentration"])
    np.testing.assert_allclose(found, alpha, rtol=1e-4)
    own = ff.standard_error(state.nuisance)["concentration"]
    np.testing.assert_allclose(own, error / alpha, rtol=1e-3)
    gap = np.abs(state.mean - fit.params[:-1]) / fit.bse[:-1]
    assert np.max(gap) < 1e-4

    @jax.jit
    def run(order):
        batches = jnp.asarray(inputs)[order], jnp.asarray(targets)[order]
        state, _ = jax.lax.scan(flow.update, start, batches)
        return jnp.exp(-state.nuisance.mean["concentration"])

    # the second order meets an indicator's few rows after hundreds without
    for seed in (0, 1, 2):
        order = np.random.default_rng(seed).permutation(20_190)[:20_100]
        assert abs(run(order.reshape(-1, 100)) - alpha) < error


@pytest.mark.parametrize("df", [2.0, 4.0, 30.0])
def test_the_information_of_student_t_is_that_of_its_scores(df):
    expected = LIKELIHOODS["df and scale"].nuisance.expected
    logs = {"df": jnp.log(df), "scale": jnp.log(3.0)}

    def score(y):
        def log_prob(logs):
            known = LIKELIHOODS["df and scale"].nuisance.known(logs)
            return known.log_prob(jnp.zeros(1), jnp.array([y]))[0]

        return jnp.stack(list(jax.grad(log_prob)(logs).values()))

    score = jax.jit(score)
    angles, weights = np.polynomial.legendre.leggauss(400)
    targets = 3 * df**0.5 * np.tan(np.pi / 2 * angles)
    slopes = 3 * df**0.5 * np.pi / 2 / np.cos(np.pi / 2 * angles) ** 2
    weights = weights * slopes * scipy.stats.t.pdf(targets, df, 0, 3)
    scores = np.stack([score(y) for y in targets])
    np.testing.assert_allclose(
        expected(logs), (scores.T * weights) @ scores, rtol=2e-3, atol=1e-5
    )


@pytest.mark.slow
@pytest.mark.parametrize("memory", ["exponential", "windowed"])
def test_memories_forget(memory):
    """One update of all rows, each with what is left of its weight."""
    name, age = "df and scale", np.arange(10)[::-1]
    state = stream(name, memory)
    weights = 0.9**age if memory == "exponential" else (age < 4).astype(float)
    flow, (*batch, _) = flow_of(name), batch_of(name)
    batch = (*batch, np.repeat(weights, 60))
    whole, _ = update_of(name)(flow.init(jnp.zeros(3)), batch)
    error = np.array(list(ff.standard_error(whole.nuisance).values()))
    assert np.max(np.abs(logs_of(state) - logs_of(whole)) / error) < 0.5
    own = np.array(list(ff.standard_error(state.nuisance).values()))
    np.testing.assert_allclose(own, error, rtol=0.2)


@pytest.mark.parametrize("memory", ["random_walk", "adaptive"])
def test_memories_of_the_structure_are_of_the_parameters_alone(memory):
    state = flow_of("df and scale", memory).init(jnp.zeros(3))
    assert type(state.nuisance.memory).__name__ == "Stationary"


def test_workers_merge():
    start = stream("concentration", rows=slice(0, 240))
    workers = [
        stream("concentration", rows=rows, state=start)
        for rows in (slice(240, 420), slice(420, 600))
    ]
    merged, machine = ff.merge(workers, start), stream("concentration")
    error = ff.standard_error(machine.nuisance)["concentration"]
    assert np.abs(logs_of(merged) - logs_of(machine))[0] < 0.1 * error
    np.testing.assert_allclose(
        ff.standard_error(merged.nuisance)["concentration"], error, rtol=0.05
    )
    jax.tree.map(lambda x, y: x.dtype == y.dtype, merged, machine)
    update_of("concentration")(merged, batch_of("concentration", slice(0, 60)))


@pytest.mark.slow
def test_refine_takes_a_step_of_both():
    name = "concentration"
    state, whole = stream(name), after_all(name)
    batches = [batch_of(name, slice(k, k + 60)) for k in range(0, 600, 60)]
    found = ff.refine(flow_of(name), state, batches)
    error = ff.standard_error(whole.nuisance)["concentration"]
    before, after = (np.abs(logs_of(s) - logs_of(whole))[0] for s in (state, found))
    assert after < 0.1 * before < 0.1 * error
    np.testing.assert_allclose(
        ff.standard_error(found.nuisance)["concentration"], error, rtol=1e-2
    )


def test_the_evidence_is_laplaces_over_both():
    """Beside the known values' own, differing by the integral over the logarithms."""
    name = "df and scale"
    flow, batch = flow_of(name), batch_of(name)
    state = after_all(name)
    known = LIKELIHOODS[name].nuisance.known(state.nuisance.mean)
    given = ff.fisher_flow(linear, known, prior_precision=1e-10)
    start = given.init(state.mean, prior_mean=jnp.zeros(3))
    alone, _ = given.update(start, batch)
    spreads = np.array([PRIORS[n][1] for n in ("df", "scale")])
    centers = np.array([PRIORS[n][0] for n in ("df", "scale")])
    distance = np.sum(((logs_of(state) - centers) / spreads) ** 2)
    held = ff.information.to_dense(state.nuisance.information)
    gain = -0.5 * (distance + np.linalg.slogdet(held)[1] + 2 * np.log(spreads).sum())
    np.testing.assert_allclose(state.log_evidence, alone.log_evidence + gain, rtol=1e-6)
    assert flow.init(jnp.zeros(3)).log_evidence == 0


def test_predictions_and_summaries_read_the_state():
    state, likelihood = after_all("concentration"), LIKELIHOODS["concentration"]
    known = likelihood.nuisance.known(state.nuisance.mean)
    found = ff.predict(state, linear, likelihood, INPUTS[:3])
    expected = ff.predict(state, linear, known, INPUTS[:3])
    np.testing.assert_allclose(found.observation_std, expected.observation_std)
    assert "concentration 2.03" in str(ff.summary(state))
    interval = ff.confidence_interval(state.nuisance)
    assert interval[0]["concentration"] < np.log(1.7) < interval[1]["concentration"]
    with pytest.raises(ValueError, match="concentration of negative_binomial is unkn"):
        ff.predict(
            ff.posterior(state.mean, state.information, prior_precision=1.0),
            linear,
            likelihood,
            INPUTS[:3],
        )


def test_what_cannot_be_known_is_refused_by_name():
    unknown = LIKELIHOODS["concentration"]
    with pytest.raises(ValueError, match="concentration of negative_binomial is esti"):
        unknown.log_prob(jnp.zeros(2), jnp.ones(2))
    loss = ff.negative_log_likelihood(linear, LIKELIHOODS["df and scale"])
    with pytest.raises(ValueError, match="df and scale of student_t is estimated by"):
        loss(jnp.zeros(3), batch_of("df"))
    with pytest.raises(ValueError, match="both a concentration and a dispersion"):
        ff.likelihoods.negative_binomial(None, dispersion=None)
    bound = ff.estimators.exact(linear, unknown, ff.structures.full())
    with pytest.raises(ValueError, match=r"give estimators\.exact with options alone"):
        ff.fisher_flow(linear, unknown, estimator=bound)


def test_a_missing_batch_and_a_bad_one_move_nothing():
    update, state = update_of("df and scale"), after_all("df and scale")
    inputs, targets, weights = batch_of("df", slice(0, 60))
    missing, _ = update(state, (inputs, targets, 0 * weights))
    for name, value in missing.nuisance.mean.items():
        np.testing.assert_allclose(value, state.nuisance.mean[name], rtol=1e-12)
    bad, _ = update(state, (inputs, np.nan * targets, weights))
    jax.tree.map(np.testing.assert_array_equal, bad.nuisance, state.nuisance)


@pytest.mark.slow
def test_weights_of_targets_weigh_each():
    flow, update = flow_of("concentration"), update_of("concentration")
    inputs, targets = INPUTS[:40], COUNTS[:40]
    weights = np.tile([1.0, 0.0, 2.0, 1.0], 10)
    padded = np.concatenate([weights, np.zeros(560)])
    rows, _ = update(flow.init(jnp.zeros(3)), (INPUTS, COUNTS, padded))
    pairs = (x.reshape(20, 2, *x.shape[1:]) for x in (inputs, targets, weights))
    together, _ = update(flow.init(jnp.zeros(3)), tuple(pairs))
    assert together.count == rows.count
    np.testing.assert_allclose(together.mean, rows.mean, rtol=1e-8)
