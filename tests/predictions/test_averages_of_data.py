"""Default predictions of trained networks against 100,000 draws of their outputs.

Wine, digits and a network of one logit, at the prior of their training.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import special
from sklearn.datasets import load_breast_cancer, load_digits, load_wine

import fisherflow_jax as ff

pytestmark = [pytest.mark.slow, pytest.mark.standard_promotion]
DATA = {"wine": load_wine, "digits": load_digits, "two classes": load_breast_cancer}
NUM_DRAWS = 100_000


def network(params, x):
    return jnp.tanh(x @ params["w"] + params["b"]) @ params["v"] + params["c"]


def one_logit(params, x):
    return network(params, x)[:, 0]


@functools.partial(jax.jit, static_argnums=0)
def train(model, params, batch):
    """Nearly the maximum a posteriori for prior precision 1, by Adam."""
    loss = ff.negative_log_likelihood(*model)
    optimizer = optax.adam(optax.cosine_decay_schedule(0.03, 300))

    def objective(params):
        squares = optax.tree.norm(params, squared=True)
        return loss(params, batch) + squares / 2 / len(batch[1])

    def step(carry, _):
        params, state = carry
        updates, state = optimizer.update(jax.grad(objective)(params), state)
        return (optax.apply_updates(params, updates), state), None

    start = params, optimizer.init(params)
    return jax.lax.scan(step, start, length=300)[0][0]


@functools.cache
def trained(name):
    """The model, its parameters, what it learnt from, and a hundred other rows."""
    x, y = DATA[name](return_X_y=True)
    rng = np.random.default_rng(0)
    order = rng.permutation(len(y))
    x = (x - x.mean(0)) / np.where(x.std(0) > 0, x.std(0), 1)
    rest, learnt = order[:100], order[100:500]
    classes, width, hidden = int(y.max()) + 1, x.shape[1], 16
    model = network, ff.likelihoods.categorical()
    if classes == 2:
        model, classes = (one_logit, ff.likelihoods.bernoulli()), 1
    params = {
        "w": rng.normal(size=(width, hidden)) * width**-0.5,
        "b": np.zeros(hidden),
        "v": rng.normal(size=(hidden, classes)) * hidden**-0.5,
        "c": np.zeros(classes),
    }
    batch, others = ((jnp.asarray(x[i]), jnp.asarray(y[i])) for i in (learnt, rest))
    return model, train(model, jax.tree.map(jnp.asarray, params), batch), batch, others


def drawn(outputs):
    """Mean and standard deviation of the probabilities, a row at a time."""
    mean, rng = np.asarray(outputs.mean), np.random.default_rng(1)
    mean = mean.reshape(len(mean), -1)
    z = rng.standard_normal((mean.shape[1], NUM_DRAWS), np.float32)
    values, basis = np.linalg.eigh(outputs.covariance)
    root = basis * np.sqrt(np.maximum(values, 0))[:, None]
    moments = []
    for center, factor in zip(mean, root.astype(np.float32), strict=True):
        logits = center.astype(np.float32)[:, None] + factor @ z
        one = len(logits) == 1
        share = special.expit(logits) if one else special.softmax(logits, 0)
        moments.append((share.mean(1), share.std(1)))
    return np.moveaxis(moments, 1, 0)


@pytest.mark.parametrize("structure", ["kronecker", "diagonal", "full"])
@pytest.mark.parametrize("name", list(DATA))
def test_predictions_and_the_loss_that_calibrate_reports(name, structure):
    model, params, batch, (x, y) = trained(name)
    make = getattr(ff.structures, structure)
    layers = ff.layers.find_layers(model[0], params, x)
    kind = make(layers) if structure == "kronecker" else make()
    information = jax.jit(ff.estimators.exact(*model, kind))(params, batch)
    state = ff.posterior(params, information, prior_precision=1.0)
    outputs = ff.predictions.linearized_outputs(state, model[0], x, covariance=True)
    mean, std = drawn(outputs)
    found = ff.predict(state, *model, x)
    own_mean, own_std = (np.reshape(part, mean.shape) for part in found[:2])
    assert np.max(np.abs(own_mean - mean)) < 0.02
    some = std > 0.05
    assert np.sum(some) > 40
    assert np.quantile(np.abs(own_std[some] / std[some] - 1), 0.9) < 0.2

    calibrated = ff.calibrate(state, *model, (x, y))
    share = np.asarray(ff.predict(calibrated.posterior, *model, x).mean)
    if share.ndim == 1:
        share = np.stack([1 - share, share], 1)
    loss = -np.mean(np.log(share[np.arange(len(y)), y]))
    assert abs(loss - calibrated.after) < 1e-3
    assert calibrated.after <= min(calibrated.before, calibrated.mean_only) + 1e-6
