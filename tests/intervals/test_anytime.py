"""Always-valid intervals and e-values: closed forms, Bayes factors, false alarms."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fisherflow_jax as ff

TAU, SCALE = 0.3, 1.7
rng = np.random.default_rng(3)
INPUTS = np.column_stack([np.ones(60), rng.integers(0, 2, 60), rng.normal(size=60)])
TARGETS = INPUTS @ [0.5, 0.2, -1.0] + SCALE * rng.normal(size=60)


def linear(params, inputs):
    return inputs @ params


def build(likelihood, prior=1e-8, **options):
    return ff.fisher_flow(linear, likelihood, prior_precision=prior, **options)


def stream(flow, inputs=INPUTS, targets=TARGETS, size=10):
    batches = inputs.reshape(-1, size, inputs.shape[1]), targets.reshape(-1, size)
    return jax.lax.scan(flow.update, flow.init(jnp.zeros(inputs.shape[1])), batches)[0]


def radius(error, scale=TAU, miss=0.05):
    variance = error**2
    odds = np.log(1 + scale**2 / variance) + 2 * np.log(1 / miss)
    return np.sqrt(variance * (1 + variance / scale**2) * odds)


@pytest.mark.slow_cases
@pytest.mark.parametrize("prior", [1e-8, 2.0, np.array([0.5, 3.0, 1e-3])], ids=str)
def test_the_closed_form_without_the_priors_pull(prior):
    """Whatever the prior, the numbers are those of least squares."""
    state = stream(build(ff.likelihoods.gaussian(SCALE), prior=prior))
    precision = INPUTS.T @ INPUTS / SCALE**2
    estimate = np.linalg.solve(precision, INPUTS.T @ TARGETS / SCALE**2)
    error = np.sqrt(np.diag(np.linalg.inv(precision)))
    lower, upper = ff.intervals.anytime(state, TAU)
    np.testing.assert_allclose((lower + upper) / 2, estimate, atol=1e-8)
    np.testing.assert_allclose((upper - lower) / 2, radius(error), rtol=1e-8)
    each = ff.intervals.anytime(state, np.array([0.1, 0.3, 2.0]), level=0.9)
    wanted = radius(error, np.array([0.1, 0.3, 2.0]), 0.1)
    np.testing.assert_allclose((each[1] - each[0]) / 2, wanted, rtol=1e-8)
    contrast = np.array([0.0, 1.0, 2.0])
    found = ff.intervals.e_value(state, contrast, TAU, null=-1.5)
    np.testing.assert_allclose(found.estimate, contrast @ estimate, atol=1e-8)
    own = contrast @ np.linalg.solve(precision, contrast)
    np.testing.assert_allclose(found.standard_error, np.sqrt(own), rtol=1e-8)
    same = ff.intervals.e_value(state, lambda p: contrast @ p, TAU, null=-1.5)
    np.testing.assert_allclose(same, found, rtol=1e-10)


@pytest.mark.slow
def test_it_is_the_bayes_factor_of_two_flows():
    """Of an effect from N(0, tau^2) over none, the other parameters alike in both."""
    vague = 1e-9
    likelihood = ff.likelihoods.gaussian(SCALE)
    with_effect = stream(build(likelihood, np.array([vague, TAU**-2, vague])))
    without = stream(build(likelihood, vague), inputs=INPUTS[:, [0, 2]])
    wanted = with_effect.log_evidence - without.log_evidence
    for prior in (vague, 2.0):
        state = stream(build(likelihood, prior))
        found = ff.intervals.e_value(state, np.array([0.0, 1.0, 0.0]), TAU)
        np.testing.assert_allclose(found.log_e_value, wanted, atol=1e-5)
        np.testing.assert_allclose(found.p_value, min(1, np.exp(-wanted)), rtol=1e-5)


def test_the_interval_holds_what_the_e_value_does_not_refute():
    state = stream(build(ff.likelihoods.gaussian(SCALE)))
    lower, upper = ff.intervals.anytime(state, TAU, level=0.95)
    for end in (lower[1], upper[1]):
        found = ff.intervals.e_value(state, np.array([0.0, 1.0, 0.0]), TAU, null=end)
        np.testing.assert_allclose(found.log_e_value, np.log(20), rtol=1e-10)


@pytest.mark.slow
def test_an_unknown_dispersion_and_the_sandwich():
    state = stream(build(ff.likelihoods.gaussian(scale=None), robust=True))
    for robust in (False, True, "HC1"):
        error = np.asarray(ff.standard_error(state, robust=robust))
        lower, upper = ff.intervals.anytime(state, TAU, robust=robust)
        np.testing.assert_allclose((upper - lower) / 2, radius(error), rtol=1e-6)


@pytest.mark.slow
def test_what_the_data_do_not_determine_has_no_interval():
    twice = np.column_stack([INPUTS, INPUTS[:, 1]])
    state = stream(build(ff.likelihoods.gaussian(SCALE), 0.1), inputs=twice)
    lower, upper = ff.intervals.anytime(state, TAU)
    np.testing.assert_array_equal(np.isinf(upper - lower), [False, True, False, True])
    found = ff.intervals.e_value(state, np.array([0.0, 1.0, 0.0, 0.0]), TAU)
    assert (float(found.log_e_value), float(found.p_value)) == (0.0, 1.0)
    total = ff.intervals.e_value(state, np.array([0.0, 1.0, 0.0, 1.0]), TAU)
    alone = stream(build(ff.likelihoods.gaussian(SCALE), 0.1))
    wanted = ff.intervals.e_value(alone, np.array([0.0, 1.0, 0.0]), TAU)
    np.testing.assert_allclose(total, wanted, rtol=1e-6)
    before = build(ff.likelihoods.gaussian(SCALE)).init(jnp.zeros(3))
    assert np.all(np.isinf(ff.intervals.anytime(before, TAU)))


def test_a_flat_contrast_says_nothing():
    state = stream(build(ff.likelihoods.gaussian(SCALE)))
    for contrast in (np.zeros(3), lambda p: 0 * p[0] + 7.0):
        found = ff.intervals.e_value(state, contrast, TAU)
        assert (float(found.log_e_value), float(found.p_value)) == (0.0, 1.0)


@pytest.mark.slow
def test_the_sandwich_and_the_dispersion_are_without_the_priors_pull():
    """Those of least squares, as well under a prior that is strong."""
    prior = np.array([2.0, 5.0, 1.0])
    state = stream(build(ff.likelihoods.gaussian(SCALE), prior, robust=True))
    precision = INPUTS.T @ INPUTS / SCALE**2
    bread = np.linalg.inv(precision)
    meat = np.asarray(ff.information.to_dense(state.meat))
    lower, upper = ff.intervals.anytime(state, TAU, robust=True)
    wanted = radius(np.sqrt(np.diag(bread @ meat @ bread)))
    np.testing.assert_allclose((upper - lower) / 2, wanted, rtol=1e-8)
    unknown = stream(build(ff.likelihoods.gaussian(scale=None), prior))
    lower, upper = ff.intervals.anytime(unknown, TAU)
    bread = np.linalg.inv(INPUTS.T @ INPUTS) * float(unknown.dispersion)
    wanted = radius(np.sqrt(np.diag(bread)))
    np.testing.assert_allclose((upper - lower) / 2, wanted, rtol=1e-8)


def test_columns_of_the_summary():
    state = stream(build(ff.likelihoods.gaussian(SCALE)))
    table = ff.summary(state, ["one", "group", "age"], effect_scale=TAU)
    lower, upper = ff.intervals.anytime(state, TAU)
    np.testing.assert_allclose(table.anytime[:2], [lower, upper])
    found = ff.intervals.e_value(state, np.array([0.0, 0.0, 1.0]), TAU)
    np.testing.assert_allclose(table.anytime[2][2], found.log_e_value)
    head = str(table).splitlines()[0]
    assert head.endswith("any time lower  any time upper   e-value")
    assert ff.summary(state).anytime is None


@pytest.mark.slow
def test_under_jit_and_vmap_in_float32():
    with jax.enable_x64(False):
        flow = build(ff.likelihoods.gaussian(SCALE))
        state = stream(flow, INPUTS.astype(np.float32), TARGETS.astype(np.float32))
        ends = jax.jit(ff.intervals.anytime)(state, jnp.float32(TAU))
        assert ends[0].dtype == jnp.float32
        twice = jax.tree.map(lambda x: jnp.stack([x, x]), state)
        contrast = jnp.array([0.0, 1.0, 0.0])
        ask = functools.partial(
            ff.intervals.e_value, contrast=contrast, effect_scale=TAU
        )
        both = jax.vmap(ask)(twice).log_e_value
    exact = stream(build(ff.likelihoods.gaussian(SCALE)))
    np.testing.assert_allclose(ends, ff.intervals.anytime(exact, TAU), rtol=1e-4)
    wanted = ff.intervals.e_value(exact, np.array(contrast), TAU).log_e_value
    np.testing.assert_allclose(both, [wanted, wanted], atol=1e-3)


@pytest.mark.slow_cases
@pytest.mark.parametrize(
    ("structure", "shape"),
    [
        (ff.structures.block(), (3, 1)),
        (ff.structures.block(lambda name: "all"), (3,)),
    ],
    ids=["a block an output", "a group of all"],
)
def test_one_block_of_all_parameters_is_full(structure, shape):
    def apply_fn(params, inputs):
        return inputs @ params.reshape(-1)

    flow = ff.fisher_flow(
        apply_fn, ff.likelihoods.gaussian(SCALE), structure=structure,
        prior_precision=1e-8,
    )  # fmt: skip
    state, _ = flow.update(flow.init(jnp.zeros(shape)), (INPUTS, TARGETS))
    full = stream(build(ff.likelihoods.gaussian(SCALE)))
    found, wanted = (ff.intervals.anytime(s, TAU) for s in (state, full))
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(np.ravel(one), other, rtol=1e-7)
    two = ff.fisher_flow(
        apply_fn, ff.likelihoods.gaussian(SCALE), structure=ff.structures.block()
    )
    state, _ = two.update(two.init(jnp.zeros(3)), (INPUTS, TARGETS))
    with pytest.raises(ValueError, match="covariances between all"):
        ff.intervals.anytime(state, TAU)


@pytest.mark.slow
def test_refusals():
    gaussian = ff.likelihoods.gaussian(SCALE)
    state = stream(build(gaussian))
    for wrong in (0.0, -1.0, np.nan, np.array([0.1, 0.0, 1.0])):
        with pytest.raises(ValueError, match="effect_scale must be positive"):
            ff.intervals.anytime(state, wrong)
    contrast = np.array([0.0, 1.0, 0.0])
    with pytest.raises(ValueError, match="effect_scale must be positive"):
        ff.intervals.e_value(state, contrast, 0.0)
    with pytest.raises(ValueError, match=r"one number; got shape \(3,\)"):
        ff.intervals.e_value(state, contrast, np.ones(3))
    with pytest.raises(ValueError, match=r"null is one number; got shape \(2,\)"):
        ff.intervals.e_value(state, contrast, TAU, null=np.ones(2))
    with pytest.raises(ValueError, match="level"):
        ff.intervals.anytime(state, TAU, level=1.5)
    with pytest.raises(ValueError, match="a contrast is"):
        ff.intervals.e_value(state, np.ones(2), TAU)
    moving = ff.memories.exponential(0.9), ff.memories.random_walk(0.1)
    for memory in (*moving, ff.memories.windowed(3), ff.memories.adaptive(1e6)):
        with pytest.raises(ValueError, match="stand still"):
            ff.intervals.anytime(stream(build(gaussian, memory=memory)), TAU)
    for structure in (ff.structures.diagonal(), ff.structures.low_rank(1)):
        with pytest.raises(ValueError, match="covariances between all"):
            ff.intervals.anytime(stream(build(gaussian, structure=structure)), TAU)
    with pytest.raises(ValueError, match=r"scores|robust=True"):
        ff.intervals.anytime(state, TAU, robust=True)
    with pytest.raises(ValueError, match="a flow's state"):
        ff.intervals.anytime(
            ff.posterior(jnp.zeros(3), ff.structures.full(), prior_precision=1.0), TAU
        )


# ---- false alarms in 200 looks, for 1,000 nulls

LOOKS, ROWS, NULLS = 200, 20, 1_000
CASES = {
    "gaussian": (ff.likelihoods.gaussian(1.0), False, 1),
    "bernoulli": (ff.likelihoods.bernoulli(), False, 2),
    "poisson": (ff.likelihoods.poisson(), False, 2),
    "overdispersed": (ff.likelihoods.poisson(), True, 20),
}


def drawn(name, key, effect):
    """An A/B test: an intercept and an arm, rows at random in either."""
    arm, noise, mixed = jax.random.split(key, 3)
    arms = jax.random.bernoulli(arm, 0.5, (LOOKS, ROWS)).astype(float)
    line = effect * arms
    if name == "gaussian":
        targets = line + jax.random.normal(noise, arms.shape)
    elif name == "bernoulli":
        targets = jax.random.bernoulli(noise, jax.nn.sigmoid(line)).astype(float)
    else:
        rate = jnp.exp(1.0 + line)
        if name == "overdispersed":  # a variance of the mean and its square over 2
            rate = rate * jax.random.gamma(mixed, 2.0, arms.shape) / 2.0
        targets = jax.random.poisson(noise, rate).astype(float)
    return jnp.stack([jnp.ones_like(arms), arms], -1), targets


@functools.partial(jax.jit, static_argnums=0)
def alarms(name, keys, effect):
    """Whether an e-value of 20 came up at any look, in each experiment."""
    likelihood, robust, first = CASES[name]
    flow = build(likelihood, 1e-2, robust=robust)

    def one(key):
        def look(state, batch):
            state, _ = flow.update(state, batch)
            found = ff.intervals.e_value(
                state, jnp.array([0.0, 1.0]), 0.25, robust=robust
            )
            return state, found.log_e_value

        batches = drawn(name, key, effect)
        logs = jax.lax.scan(look, flow.init(jnp.zeros(2)), batches)[1]
        return jnp.max(logs[first - 1 :]) > jnp.log(20.0)

    return jax.vmap(one)(keys)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if count < 2 else pytest.mark.long)
        for count, name in enumerate(CASES)
    ],
)
def test_false_alarms_at_any_time(name, record_property):
    """At most .05, with two binomial standard errors; and effects are found."""
    keys = jax.random.split(jax.random.key(1), NULLS)
    rate = float(np.mean(alarms(name, keys, 0.0)))
    power = float(np.mean(alarms(name, keys[:100], 0.25)))
    record_property("false alarms, power at .25", f"{rate:.3f}, {power:.2f}")
    assert rate <= 0.05 + 2 * np.sqrt(0.05 * 0.95 / NULLS)
    assert power > 0.5
