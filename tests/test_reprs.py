"""What is public prints in a line or two: with its numbers, and without addresses."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fisherflow_jax as ff

E, L, M, S = ff.estimators, ff.likelihoods, ff.memories, ff.structures
X, Y = jnp.ones((4, 30)), jnp.arange(4) % 2
PARAMS = {"w": jnp.ones((30, 20)), "b": jnp.zeros(20), "h": jnp.ones((20, 2))}
NOISE = np.array([[2.0, 0.5], [0.5, 1.0]])


def network(params, x):
    return jnp.tanh(x @ params["w"] + params["b"]) @ params["h"]


def score(outputs, targets):
    return -((outputs - targets) ** 2)


def drawn(key, outputs):
    return outputs + jax.random.normal(key, outputs.shape)


LAYERS = ff.layers.find_layers(network, PARAMS, X)

# What a repr says, by the call that made it.
CHOICES = {
    "categorical()": L.categorical(),
    "bernoulli(dispersion=1.0)": L.bernoulli(),
    "bernoulli(dispersion=None)": L.bernoulli(None),
    "gaussian(scale=0.1)": L.gaussian(0.1),
    "gaussian(scale=float32(0.1))": L.gaussian(jnp.float32(0.1)),
    "gaussian(scale=None)": L.gaussian(None),
    "gaussian_location_scale()": L.gaussian_location_scale(),
    "poisson(dispersion=1.0)": L.poisson(),
    "gamma(shape=2.0)": L.gamma(2.0),
    "negative_binomial(concentration=3.0, dispersion=1.0)": L.negative_binomial(3.0),
    "student_t(df=4.0, scale=0.5)": L.student_t(4.0, 0.5),
    "covariance=float64[2, 2][2.0, 0.5, 0.5, 1.0]": L.gaussian(covariance=NOISE),
    "full()": S.full(),
    "diagonal()": S.diagonal(),
    "scalar()": S.scalar(),
    "block()": S.block(),
    "low_rank(3)": S.low_rank(3),
    "kronecker(layers)": S.kronecker(LAYERS),
    "two_sided()": S.two_sided(),
    "stationary()": M.stationary(),
    "exponential(0.9)": M.exponential(0.9),
    "exponential(float32(0.9))": M.exponential(jnp.float32(0.9)),
    "exponential(0.9, floor=False)": M.exponential(0.9, floor=False),
    "windowed(7)": M.windowed(7),
    "adaptive(200.0, size=8)": M.adaptive(200.0, size=8),
    "random_walk(0.25)": M.random_walk(0.25),
    "random_walk(float64[2, 2][2.0, 0.5, 0.5, 1.0])": M.random_walk(NOISE),
    "random_walk(0.25, transition=float64[2, 2]": M.random_walk(0.25, NOISE),
    "exact()": E.exact(),
    "monte_carlo(num_samples=3)": E.monte_carlo(num_samples=3),
    "hutchinson(num_probes=8)": E.hutchinson(num_probes=8),
    "probe=gaussian": E.hutchinson(probe=E.gaussian),
    "empirical()": E.empirical(),
    "observed()": E.observed(),
    "cubature()": ff.expectations.cubature(),
    "hermite(5)": ff.expectations.hermite(5),
    "outputs(20)": ff.expectations.outputs(),
    "quantiles(order=64": ff.expectations.quantiles(),
}
FLOW = ff.fisher_flow(network, L.categorical(), structure=S.kronecker(LAYERS))
STATE = jax.tree.map(
    lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(lambda: FLOW.init(PARAMS))
)
POSTERIOR = ff.posterior(PARAMS, STATE.information, prior_precision=1.0)
EXACT = E.exact(network, L.categorical(), S.diagonal())
OTHERS = {
    "a flow": FLOW,
    "a flow of a partial": ff.fisher_flow(functools.partial(network), L.categorical()),
    "a flow of a drawing estimator": ff.fisher_flow(
        network, L.categorical(), estimator=E.hutchinson(num_probes=8)
    ),
    "a bank": ff.bank([FLOW, FLOW]),
    "a sparse flow": ff.sparse.flow(L.bernoulli(), 5),
    "an estimator": EXACT,
    "a log-probability": L.from_log_prob(score, drawn),
    "a root": L.rank_root(L.categorical(), 2),
    "a state": STATE,
    "a bank's state": ff.BankState((STATE, STATE), jnp.zeros(2)),
    "a sparse state": ff.sparse.flow(L.bernoulli(), 50).init(),
    "a posterior": POSTERIOR,
    "an information": STATE.information,
    "a layers table": LAYERS,
    "a batch": ff.Batch(X, Y, None),
    "a calibration": ff.Calibration(POSTERIOR, L.gaussian(0.3), *[jnp.zeros(())] * 6),
    "a prediction": ff.Prediction(*[jnp.zeros((40, 10))] * 5),
    "a laplace": ff.Laplace(POSTERIOR, network, L.categorical(), None),
    "an accumulation": ff.accumulate(EXACT, PARAMS, [(X, Y)]),
    "conformal sets": ff.calibration.conformal_sets(),
    "an accumulator": ff.accumulator(EXACT),
}


@pytest.mark.parametrize("words", CHOICES)
def test_choices_print_as_their_call(words):
    text = repr(CHOICES[words])
    assert words in text
    check(text, 200)


@pytest.mark.parametrize("name", OTHERS)
def test_results_print_in_a_few_lines(name):
    check(repr(OTHERS[name]), 1200)
    check(str(OTHERS[name]), 1200)


def check(text, length):
    assert not re.search(r"0x[0-9a-f]{5,}", text), text
    assert "<function" not in text, text
    assert len(text) <= length, text


def test_other_numbers_print_otherwise():
    large = np.arange(400.0).reshape(20, 20)
    other = large.copy()
    other[10, 10] += 1e-9
    for one in (lambda q: M.random_walk(q), lambda q: L.gaussian(covariance=q)):
        spd = np.eye(20) * 1e6
        assert repr(one(spd + large + large.T)) != repr(one(spd + other + other.T))
    assert repr(M.exponential(0.9)) != repr(M.exponential(np.nextafter(0.9, 1)))
    assert repr(S.block({"w": "a", "b": "b", "h": "a"})) != repr(
        S.block({"w": "a", "b": "a", "h": "a"})
    )
