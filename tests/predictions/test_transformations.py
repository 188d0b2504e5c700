"""jit, vmap and derivatives of predictions, and what their programs hold."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fisherflow_jax as ff
import prediction_cases as cases
from prediction_cases import MODELS
from program_size import largest

MODEL = MODELS["mlp"]
CATEGORICAL = ff.likelihoods.categorical()


def predict(state, inputs=MODEL.inputs, **options):
    return ff.predict(state, MODEL.apply_fn, CATEGORICAL, inputs, **options)


@pytest.mark.slow
def test_vmap_over_inputs():
    state = cases.state("mlp", "kronecker")
    alone_and_together = jax.jit(
        lambda state: (
            jax.vmap(lambda x: predict(state, x[None]))(MODEL.inputs),
            predict(state),
        )
    )
    for alone, whole in zip(*alone_and_together(state), strict=True):
        np.testing.assert_allclose(alone[:, 0], whole, rtol=1e-9)


@pytest.mark.slow_cases
@pytest.mark.parametrize("structure", ["kronecker", "full"])
def test_derivatives_by_finite_differences(structure):
    """Through the mean and the prior precision, of averaged probabilities."""
    link = ff.predictions.probit() if structure == "full" else None
    state = cases.state("mlp", structure)
    rng = np.random.default_rng(2)
    weights = jnp.asarray(rng.normal(size=(5, 3)))
    away = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape)), state.mean)
    inputs = MODEL.inputs.at[0].set(0.0)  # nothing enters the first layer

    @jax.jit
    @jax.value_and_grad
    def loss(point):
        step, prior = point
        mean = jax.tree.map(lambda m, a: m + step * a, state.mean, away)
        posterior = ff.posterior(mean, state.information, prior_precision=prior)
        found = predict(posterior, inputs, link=link)
        return jnp.sum(weights * (found.mean + found.lower + found.std))

    point, size = jnp.array([0.1, 0.5]), 1e-5
    for axis, slope in enumerate(loss(point)[1]):
        step = size * jnp.eye(2)[axis]
        values = [loss(point + sign * step)[0] for sign in (1, -1)]
        np.testing.assert_allclose(slope, (values[0] - values[1]) / 2e-5, rtol=1e-6)


@pytest.mark.parametrize("structure", ["full", "kronecker"])
def test_the_posterior_is_an_argument(structure):
    """No constant of its size: nothing for the compiler to fold."""
    state = cases.state("mlp", structure)
    program = jax.make_jaxpr(predict)(state)
    held = MODEL.inputs.size + 10
    assert all(np.size(constant) <= held for constant in program.consts)


@pytest.mark.parametrize("structure", ["scalar", "diagonal", "kronecker"])
def test_no_jacobian_of_all_parameters(structure):
    """Of a wide network: nothing as large as one example's outputs times d."""
    rng = np.random.default_rng(0)
    params = {
        "w": jnp.asarray(rng.normal(size=(30, 40)), jnp.float32),
        "v": jnp.asarray(rng.normal(size=(40, 20)), jnp.float32),
    }

    def apply_fn(params, x):
        return jnp.tanh(x @ params["w"]) @ params["v"]

    x = jnp.zeros((8, 30), jnp.float32)
    made = {
        "scalar": ff.structures.scalar(),
        "diagonal": ff.structures.diagonal(),
        "kronecker": ff.structures.kronecker(
            ff.layers.find_layers(apply_fn, params, x)
        ),
    }[structure]
    state = ff.Posterior(params, made.isotropic(params, 1.0), jnp.ones(()))
    link = ff.predictions.plug_in()  # an average holds its own 16 MiB
    program = jax.make_jaxpr(
        lambda state: ff.predict(state, apply_fn, CATEGORICAL, x, link=link)
    )(state)
    # what returns to the layers, 20 outputs at once: 8 examples, 40 + 20 units
    assert largest(program.jaxpr) <= 8 * 20 * 60 < 20 * 2000


def test_float32_stays_float32():
    exact = cases.state("mlp", "full")
    state = jax.tree.map(lambda x: x.astype(jnp.float32), exact)
    found = ff.predictions.linearized_outputs(
        state, MODEL.apply_fn, MODEL.inputs.astype(jnp.float32), covariance=True
    )
    assert {x.dtype for x in found[:3]} == {np.dtype("float32")}
    expected = cases.explicit("mlp", exact)
    np.testing.assert_allclose(found.covariance, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.slow_cases
@pytest.mark.parametrize("structure", ["full", "diagonal", "kronecker"])
def test_the_model_is_traced_once_a_shape(structure):
    posterior, traced = cases.state("mlp", structure), collections.Counter()

    def apply_fn(params, x):
        traced[x.shape] += 1
        return MODEL.apply_fn(params, x)

    bank = ff.BankState((posterior, posterior), jnp.log(jnp.array([0.5, 0.5])))
    link = ff.predictions.probit()
    calls = (
        lambda: ff.predict(posterior, apply_fn, CATEGORICAL, MODEL.inputs),
        lambda: ff.predict(bank, apply_fn, CATEGORICAL, MODEL.inputs, link=link),
        lambda: ff.predictions.top_tokens(
            posterior, apply_fn, CATEGORICAL, MODEL.inputs, 2
        ),
        lambda: ff.predictions.linearized_outputs(posterior, apply_fn, MODEL.inputs),
        lambda: ff.predictions.joint(posterior, apply_fn, MODEL.inputs),
    )
    shape = MODEL.inputs.shape
    for call in calls:
        traced.clear()
        call()
        assert traced == {shape: 1, (1, *shape[1:]): 1}
        call()  # of what is compiled
        assert traced.total() == 2
