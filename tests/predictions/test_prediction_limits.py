"""Predictions of banks, in float32, their memory, and what they refuse."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats

import fisherflow_jax as ff

INPUTS = np.random.default_rng(4).normal(size=(7, 3))


def linear(params, x):
    return x @ params


@pytest.fixture
def state(belief):
    return belief(jnp.array([0.3, -0.2, 0.5]), ff.structures.Scalar(jnp.asarray(4.0)))


def test_bank_by_hand(belief):
    means, spreads = np.array([0.5, 2.0]), np.array([0.3, 0.1])
    weights, dispersions = np.array([0.25, 0.75]), np.array([2.0, 0.5])
    members = tuple(
        belief(
            jnp.asarray(mean),
            ff.structures.Scalar(jnp.asarray(1 / spread**2)),
            dispersion=jnp.asarray(dispersion),
            degrees_of_freedom=jnp.asarray(9.0),
            count=jnp.asarray(10.0),
        )
        for mean, spread, dispersion in zip(means, spreads, dispersions, strict=True)
    )
    bank = ff.BankState(members, jnp.log(weights))
    x = np.array([-1.0, 0.5, 3.0])
    likelihood = ff.likelihoods.gamma(shape=None)
    result = ff.predict(bank, lambda params, x: x * params, likelihood, x)
    etas = x[:, None] * means
    eta = etas @ weights
    within = dispersions * (x[:, None] * spreads) ** 2
    spread = np.sqrt((within + (etas - eta[:, None]) ** 2) @ weights)
    noise = (dispersions * np.exp(2 * etas)) @ weights
    reach = stats.norm.ppf(0.975) * spread
    rates = np.exp(etas)
    rate = rates @ weights
    within = within * rates**2
    std = np.sqrt((within + (rates - rate[:, None]) ** 2) @ weights)
    expected = ff.Prediction(
        rate,
        std,
        np.sqrt(std**2 + noise),
        np.exp(eta - reach),
        np.exp(eta + reach),
    )
    for value, wanted in zip(result, expected, strict=True):
        np.testing.assert_allclose(value, wanted, rtol=1e-12)


def test_a_list_of_states_is_a_mixture_of_equal_weights(belief, state):
    other = belief(2 * state.mean, ff.structures.Scalar(jnp.asarray(9.0)))
    bank = ff.BankState((state, other), jnp.log(jnp.array([0.5, 0.5])))
    likelihood = ff.likelihoods.poisson()
    for states in ([state, other], (state, other)):
        for value, wanted in zip(
            ff.predict(states, linear, likelihood, INPUTS),
            ff.predict(bank, linear, likelihood, INPUTS),
            strict=True,
        ):
            np.testing.assert_allclose(value, wanted, rtol=1e-12)


def test_the_mean_of_disagreeing_members_is_a_distribution(belief):
    members = tuple(
        belief(jnp.asarray(mean), ff.structures.Scalar(jnp.asarray(1.0)))
        for mean in (9.0, -9.0)
    )
    bank = ff.BankState(members, jnp.log(jnp.array([0.5, 0.5])))
    likelihood = ff.likelihoods.categorical()
    result = ff.predict(
        bank, lambda p, x: p * x, likelihood, jnp.array([[1.0, 0.0, -1.0]])
    )
    np.testing.assert_allclose(jnp.sum(result.mean), 1.0, rtol=1e-12)
    np.testing.assert_allclose(result.mean[0], [0.5, 0.0, 0.5], atol=1e-3)


def arrays_of(jaxpr: Any) -> list:
    """Every array computed anywhere in a jaxpr."""
    found = []
    for eqn in jaxpr.eqns:
        found += [variable.aval for variable in eqn.outvars]
        for value in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                found += arrays_of(inner)
    return found


@pytest.mark.parametrize("structure", ["diagonal", "low_rank", "full"])
def test_never_all_examples_times_all_parameters(belief, structure):
    rows, d, chunk = 300, 40, 4
    frequencies = jnp.arange(1.0, d + 1)

    def apply_fn(params, x):
        waves = jnp.sin(x[:, None] * frequencies) @ params
        return jnp.stack([waves, waves**2, jnp.cos(waves)], 1)

    make = {
        "diagonal": ff.structures.diagonal(),
        "low_rank": ff.structures.low_rank(2),
        "full": ff.structures.full(),
    }[structure]
    state = belief(jnp.ones(d), make.isotropic(jnp.ones(d), 2.0))
    poisson = ff.likelihoods.poisson()

    def function(state, x):
        return ff.predict(state, apply_fn, poisson, x, chunk_size=chunk)

    closed = jax.make_jaxpr(function)(state, jnp.ones(rows))
    sizes = [aval.size for aval in arrays_of(closed.jaxpr) if hasattr(aval, "size")]
    # a diagonal needs only what enters the layer
    gradients = chunk * d * (1 if structure == "diagonal" else 3)
    allowed = max(gradients, rows * 3, d * d if structure == "full" else 0)
    assert gradients in sizes  # the walk does see the inside of the loop
    assert max(sizes) <= allowed < rows * d


@pytest.mark.parametrize("name", ["bernoulli", "categorical"])
def test_saturated_logits_in_float32(belief, name):
    scales = jnp.array([1e-3, 1.0, 20.0, 100.0, 1e4, -1e4, -100.0], jnp.float32)
    state = belief(
        jnp.ones((), jnp.float32), ff.structures.Scalar(jnp.asarray(4.0, jnp.float32))
    )

    def apply_fn(params, x):
        logit = x * params
        if name == "bernoulli":
            return logit
        return jnp.stack([logit, jnp.zeros_like(logit), -logit], 1)

    likelihood = getattr(ff.likelihoods, name)()
    results = jax.jit(
        lambda state, x: [
            ff.predict(state, apply_fn, likelihood, x, link=link)
            for link in (None, ff.predictions.plug_in())
        ]
    )(state, scales)
    for result in results:
        for field in result:
            assert field.dtype == jnp.float32
            assert np.all(np.isfinite(field)) and np.all((field >= 0) & (field <= 1))
        assert np.all(result.std <= result.observation_std)
    # the last: an average counts the tails that an interval leaves out
    assert np.all((result.lower <= result.mean) & (result.mean <= result.upper))
    # std(logit) = 10 at logit 20: the interval still says how unsure that is
    lower = result.lower[2] if name == "bernoulli" else result.lower[2, 0]
    expected = special.expit(20.0 - 1.959964 * 10.0)
    np.testing.assert_allclose(lower, expected, rtol=1e-4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_models_predict_in_float32(belief, dtype):
    state = belief(
        jnp.ones((), jnp.float32), ff.structures.Scalar(jnp.asarray(4.0, jnp.float32))
    )

    def apply_fn(params, x):
        return (x * params).astype(dtype)

    x = jnp.array([0.5, -1.0], jnp.float32)
    model = apply_fn, ff.likelihoods.bernoulli()
    result = ff.predict(state, *model, x, link=ff.predictions.plug_in())
    assert {field.dtype for field in result} == {jnp.dtype("float32")}
    p = special.expit(np.asarray(x))
    np.testing.assert_allclose(result.std, p * (1 - p) * np.abs(x) / 2, rtol=1e-2)


def test_an_infinite_variance_stays_infinite(state):
    result = ff.predict(state, linear, ff.likelihoods.student_t(2.0, 1.0), INPUTS)
    assert np.all(np.isinf(result.observation_std)) and np.all(np.isfinite(result.std))


def test_an_unknown_dispersion_that_the_state_does_not_estimate(state):
    unknown = ff.likelihoods.gaussian(scale=None)
    with pytest.raises(ValueError, match="dispersion of gaussian is unknown"):
        ff.predict(state, linear, unknown, INPUTS)
    ff.predict(state, linear, unknown.with_dispersion(2.0), INPUTS)


def test_a_likelihood_without_a_mean(state):
    bare = ff.likelihoods.from_log_prob(lambda z, y: -((z - y) ** 2), lambda k, z: z)
    with pytest.raises(ValueError, match="no mean was given"):
        ff.predict(state, linear, bare, INPUTS)


@pytest.mark.parametrize(
    "inputs, message",
    [
        (np.zeros((0, 3)), "n = 0"),
        ((np.zeros((2, 3)), np.zeros(4)), "leading axis"),
        (np.zeros(()), "leading example axis"),
        (ff.Shared(np.zeros(3)), "at least one array"),
    ],
)
def test_wrong_inputs(state, inputs, message):
    with pytest.raises(ValueError, match=message):
        ff.predict(state, linear, ff.likelihoods.poisson(), inputs)


@pytest.mark.parametrize("chunk_size", [0, -1, 2.5])
def test_wrong_chunk_size(state, chunk_size):
    with pytest.raises(ValueError, match="chunk_size"):
        ff.predict(
            state, linear, ff.likelihoods.poisson(), INPUTS, chunk_size=chunk_size
        )
