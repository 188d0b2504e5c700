"""Predictions and evidences of a trained classifier, to three digits of two peers'.

The classifier is 64-50-10 with tanh on digits, at its maximum a posteriori with prior
precision 1, found in float64 over the whole data set: nothing is drawn. laplax 0.0.2
and laplace-torch 0.3 gave the values below from the same parameters in one run of
`benchmarks/uncertainty.py`, in float64, and agreed with each other to 1e-12 where both
have the structure. The tolerance is three digits.
"""

import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from jax.flatten_util import ravel_pytree
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import fisherflow_jax as ff
from fisherflow_jax import metrics

pytestmark = pytest.mark.slow
CATEGORICAL = ff.likelihoods.categorical()
THREE_DIGITS = 1e-3

# structure: mean negative log-likelihood, calibration error, log-evidence
PEERS = {
    "last layer, full": (0.17108, 0.09722, -120.8832),
    "last layer, Kronecker": (0.19180, 0.11288, -139.5046),
    "all, diagonal": (0.75496, 0.47095, -1259.6010),
    "all, Kronecker": (0.45635, 0.30200, -750.7653),
    "all, full": (0.45728, 0.30264, -436.4279),
}


def apply_fn(params: list, inputs: jax.Array) -> jax.Array:
    """Biases are layers of their own, which see ones: laplace-torch's Kronecker blocks.

    The other structures do not see the difference.
    """
    ones = jnp.ones((inputs.shape[0], 1), inputs.dtype)
    for number, layer in enumerate(params):
        inputs = inputs @ layer["w"] + ones @ layer["b"][None]
        inputs = jnp.tanh(inputs) if number + 1 < len(params) else inputs
    return inputs


class Trained(NamedTuple):
    params: Any
    train: tuple
    test: tuple


@pytest.fixture(scope="module")
def trained() -> Trained:
    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(
        images, labels, test_size=0.2, random_state=0, stratify=labels
    )
    train, test, *labels = parts
    center, spread = train.mean(0), train.std(0)
    spread[spread == 0] = 1
    train, test = (
        (jnp.asarray((rows - center) / spread), jnp.asarray(targets))
        for rows, targets in zip((train, test), labels, strict=True)
    )
    generator = np.random.default_rng(0)
    start = [
        {"w": generator.normal(size=sizes) * sizes[0] ** -0.5, "b": np.zeros(sizes[1])}
        for sizes in itertools.pairwise((64, 50, 10))
    ]
    flat, unravel = ravel_pytree(start)

    @jax.jit
    def descent(vector: jax.Array) -> tuple[jax.Array, jax.Array]:
        def loss(vector: jax.Array) -> jax.Array:
            log_prob = CATEGORICAL.log_prob(
                apply_fn(unravel(vector), train[0]), train[1]
            )
            return 0.5 * jnp.sum(jnp.square(vector)) - jnp.sum(log_prob)

        return jax.value_and_grad(loss)(vector)

    found = scipy.optimize.minimize(
        lambda vector: [np.asarray(x) for x in descent(vector)],
        np.asarray(flat),
        jac=True,
        method="L-BFGS-B",
        options={
            "maxiter": 2000,
            "maxfun": 4000,
            "ftol": 0,
            "gtol": 1e-6,
            "maxcor": 30,
        },
    )
    assert np.max(np.abs(found.jac)) < 1e-5
    assert found.fun == pytest.approx(59.561473, abs=1e-5)
    return Trained(unravel(jnp.asarray(found.x)), train, test)


def posterior(trained: Trained, name: str) -> tuple:
    """The model of a row, its information, and its posterior at prior precision 1."""
    model, params = apply_fn, trained.params
    train = trained.train
    if name == "all, full":  # the products of its rows are the longest of all
        params, train = jax.tree.map(
            lambda x: x.astype(jnp.float32) if x.dtype == jnp.float64 else x,
            (params, train),
        )
    if name.startswith("last layer"):
        model, params = ff.only(apply_fn, params, ["1"])
    if "Kronecker" in name:
        layers = ff.layers.find_layers(model, params, train[0])
        structure = ff.structures.kronecker(layers)
    else:
        kind = name.rsplit(", ", 1)[1]
        structure = getattr(ff.structures, kind)()
    estimator = ff.estimators.exact(model, CATEGORICAL, structure)
    information = jax.jit(estimator)(params, train)
    state = ff.posterior(params, information, prior_precision=1.0)
    return model, information, state


@pytest.mark.parametrize("name", list(PEERS))
def test_equals_laplax_and_laplace_torch(trained: Trained, name: str) -> None:
    model, information, state = posterior(trained, name)
    inputs, labels = trained.test
    inputs = inputs.astype(jax.tree.leaves(state.mean)[0].dtype)
    outputs = ff.predictions.linearized_outputs(state, model, inputs)
    chances = ff.predictions.probit()(outputs, CATEGORICAL).mean
    logits = apply_fn(trained.params, trained.train[0])
    evidence = ff.calibration.log_marginal_likelihood(
        state.mean,
        information,
        jnp.sum(CATEGORICAL.log_prob(logits, trained.train[1])),
        1.0,
    )
    found = (
        metrics.negative_log_likelihood(chances, labels),
        metrics.expected_calibration_error(chances, labels),
        evidence,
    )
    np.testing.assert_allclose(found, PEERS[name], rtol=THREE_DIGITS)
    assert metrics.accuracy(chances, labels) >= 0.969


def test_mean_alone(trained: Trained) -> None:
    """The same parameters without uncertainty, so that the rows above are its doing."""
    inputs, labels = trained.test
    chances = jax.nn.softmax(apply_fn(trained.params, inputs))
    found = (
        metrics.accuracy(chances, labels),
        metrics.negative_log_likelihood(chances, labels),
        metrics.expected_calibration_error(chances, labels),
    )
    np.testing.assert_allclose(found, (0.97222, 0.09117, 0.01596), rtol=THREE_DIGITS)
