"""Posteriors of the last layer alone: closed form, many classes, no backward pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import fisherflow_jax as ff
from fisherflow_jax.predictions._last_layer import is_last_layer
from fisherflow_jax.structures import EigenKronecker
from program_size import largest

RNG = np.random.default_rng(0)
CATEGORICAL = ff.likelihoods.categorical()
X = RNG.normal(size=(4, 6))


def network(params, x):
    return jnp.tanh(x @ params["hidden"]) @ params["head"] + params["bias"]


def last(classes, features=3, dtype=float):
    params = {
        "hidden": np.asarray(RNG.normal(size=(6, features)), dtype),
        "head": np.asarray(6 * RNG.normal(size=(features, classes)), dtype),
        "bias": np.asarray(RNG.normal(size=classes), dtype),
    }
    return ff.only(network, params, lambda path: "hidden" not in path)


def eigen(apply_fn, params, classes, features=3):
    layers = ff.layers.find_layers(apply_fn, params, X)
    name = "head"
    turn = [np.linalg.qr(RNG.normal(size=(n, n)))[0] for n in (features + 1, classes)]
    return ff.Posterior(
        params,
        EigenKronecker(
            {name: RNG.uniform(1, 9, size=(1, features + 1, classes))},
            {name: turn[0][None]},
            {name: turn[1][None]},
            {name: np.array([0.5])},
            {},
            jnp.asarray(1.0),
            layers,
        ),
        jnp.asarray(1.0),
    )


def explicit(function, posterior):
    """`J Cov J^T`, the whole of each row's."""
    flat, unravel = ravel_pytree(posterior.mean)
    rows = np.asarray(jax.jit(jax.jacrev(lambda p: function(unravel(p))))(flat))
    dense = jax.jit(ff.information.to_dense)(posterior.information, posterior.mean)
    return np.einsum("nid,de,nje->nij", rows, np.linalg.inv(dense), rows)


@pytest.mark.parametrize("structure", ["eigen", "diagonal"])
def test_many_classes_in_closed_form(structure):
    apply_fn, params = last(5)
    if structure == "eigen":
        posterior = eigen(apply_fn, params, 5)
    else:
        entries = jax.tree.map(np.exp, params)
        posterior = ff.Posterior(
            params, ff.structures.Diagonal(entries), jnp.asarray(1.0)
        )
    x = X * np.array([[1.0], [1.0], [1.0], [30.0]])

    @jax.jit
    def found(posterior):
        return (
            ff.predictions.linearized_outputs(posterior, apply_fn, x, covariance=True),
            ff.predict(
                posterior, apply_fn, CATEGORICAL, x, link=ff.predictions.plug_in()
            ),
        )

    outputs, prediction = found(posterior)
    expected = explicit(lambda p: apply_fn(p, x), posterior)
    np.testing.assert_allclose(outputs.covariance, expected, rtol=1e-9, atol=1e-11)
    diagonal = np.diagonal(expected, axis1=-2, axis2=-1)
    np.testing.assert_allclose(outputs.variance, diagonal, rtol=1e-10)
    line = explicit(lambda p: CATEGORICAL.line(apply_fn(p, x)), posterior)
    std = np.sqrt(np.diagonal(line, axis1=-2, axis2=-1))
    slope = prediction.mean * (1 - prediction.mean)
    assert np.max(prediction.mean) > 0.99
    np.testing.assert_allclose(prediction.std, slope * std, rtol=1e-7)


def is_last(apply_fn, params):
    layers = ff.layers.find_layers(apply_fn, params, X)
    return is_last_layer(apply_fn, params, X, layers)


def test_what_is_a_last_layer():
    apply_fn, params = last(3)
    whole = {"hidden": jnp.ones((6, 3)), "head": jnp.ones((3, 3)), "bias": jnp.ones(3)}
    yes = [
        apply_fn,
        jax.jit(apply_fn),
        lambda p, x: apply_fn(p, x).reshape((-1, 1, 3))[:, 0] + x[:, :3],
        lambda p, x: apply_fn(p, x).T.T,
    ]
    no = [
        lambda p, x: 2 * apply_fn(p, x),
        lambda p, x: jnp.tanh(apply_fn(p, x)),
        lambda p, x: apply_fn(p, x)[:, ::-1],
        lambda p, x: apply_fn(p, x)[:, :2],
        lambda p, x: apply_fn(p, x) + apply_fn(p, 2 * x),
        lambda p, x: (lambda z: z + jnp.sum(z))(apply_fn(p, x)),
        lambda p, x: (lambda z: z + z)(apply_fn(p, x)),
        lambda p, x: apply_fn(p, apply_fn(p, x) @ jnp.ones((3, 6))),
        jax.jit(lambda p, x: jax.nn.relu(apply_fn(p, x))),
    ]
    assert [is_last(f, params) for f in yes] == [True] * len(yes)
    assert [is_last(f, params) for f in no] == [False] * len(no)
    assert not is_last(network, whole)


def test_no_array_of_classes_squared():
    classes = 10_000
    apply_fn, params = last(classes, dtype=jnp.float32)
    posterior = ff.Posterior(
        params,
        ff.structures.Scalar(jnp.asarray(2.0, jnp.float32)),
        jnp.asarray(1.0, jnp.float32),
    )
    link = ff.predictions.probit()
    program = jax.make_jaxpr(
        lambda posterior: ff.predict(posterior, apply_fn, CATEGORICAL, X, link=link)
    )(posterior)
    assert largest(program.jaxpr) <= 4 * classes


@pytest.mark.slow
def test_three_thousand_classes_fit_and_predict_in_40_mebibytes():
    def layer(params, x):
        return x @ params["w"] + params["b"]

    def shape(*sizes, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(sizes, dtype)

    params = {"w": shape(64, 3000), "b": shape(3000)}
    layers = ff.layers.find_layers(layer, params, shape(256, 64))
    # the default width, and labels sampled, as in ff.laplace of so many outputs
    estimator = ff.estimators.monte_carlo(
        layer, CATEGORICAL, ff.structures.kronecker(layers)
    )

    def fit(params, x, y):
        return ff.accumulate(estimator, params, ff.Stacked(x, y), 0)

    def predict(params, gathered, x):
        state = ff.posterior(params, gathered, prior_precision=1.0)
        return ff.predict(state, layer, CATEGORICAL, x)

    data = shape(4, 256, 64), shape(4, 256, dtype=jnp.int32)
    gathered = jax.eval_shape(fit, params, *data)
    programs = (fit, params, *data), (predict, params, gathered, shape(100, 64))
    for program, *arguments in programs:
        compiled = jax.jit(program).lower(*arguments).compile()
        taken = compiled.memory_analysis()
        parts = (
            taken.argument_size_in_bytes,
            taken.output_size_in_bytes,
            taken.temp_size_in_bytes,
        )
        assert sum(parts) < 40 * 2**20, (program.__name__, parts)
