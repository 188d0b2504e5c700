"""`model.once`: an apply_fn that is traced once a shape, with the same equations."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fisherflow_jax as ff
from fisherflow_jax.model import once, plain

W = jnp.asarray(np.random.default_rng(0).normal(size=(3, 2)), jnp.float32)
X = jnp.asarray(np.random.default_rng(1).normal(size=(5, 3)), jnp.float32)


def dense(params, x):
    return jnp.tanh(x @ params)


@jax.custom_vjp
def clipped(x):
    return x


clipped.defvjp(lambda x: (x, None), lambda _, g: (jnp.clip(g, -0.5, 0.5),))


@jax.custom_jvp
def doubled(x):
    return x


doubled.defjvp(lambda x, t: (x[0], 2 * t[0]))


def scanned(params, x):
    return jax.lax.scan(
        lambda c, _: (jnp.tanh(c @ params @ params.T), None), x, None, 2
    )[0]


MODELS = {
    "dense": dense,
    "custom_vjp": lambda params, x: clipped(x @ params),
    "custom_jvp": lambda params, x: doubled(x @ params),
    "checkpoint": jax.checkpoint(dense),
    "jit": jax.jit(dense),
    "scan": scanned,
    "flag": lambda params, x: dense(params, x),
}


def every_way(apply_fn, params, x):
    """The model under the transformations that an update may put around it."""

    def total(params):
        return jnp.sum(apply_fn(params, x))

    def row(r):
        return apply_fn(params, r[None])[0]

    looped = jax.lax.while_loop(
        lambda s: s[0] < 3, lambda s: (s[0] + 1, s[1] + total(params)), (0, 0.0)
    )
    scanned = jax.lax.scan(lambda c, r: (c + jnp.sum(row(r)), None), 0.0, x)
    outputs, vjp = jax.vjp(lambda p: apply_fn(p, x), params)
    return (
        apply_fn(params, x),
        jax.vmap(row)(x),
        jax.vmap(jax.vmap(row))(x[None]),
        jax.grad(total)(params),
        jax.vmap(lambda c: vjp(c)[0])(jnp.stack([outputs, outputs])),
        looped,
        scanned,
    )


@pytest.mark.slow_cases
@pytest.mark.parametrize("name", MODELS)
def test_equations_and_numbers_are_those_of_the_model(name):
    model, count = MODELS[name], [0]

    def counted(params, x):
        count[0] += 1
        return model(params, x)

    def by(wrap):
        return lambda params, x: every_way(wrap(counted), params, x)

    expected = jax.make_jaxpr(by(lambda f: f))(W, X)
    several, count[0] = count[0], 0
    found = jax.make_jaxpr(by(once))(W, X)
    assert count[0] == 2 < several  # of a row, and of all
    assert list(equations(found)) == list(equations(expected))
    for one, other in zip(
        jax.tree.leaves(by(once)(W, X)),
        jax.tree.leaves(by(lambda f: f)(W, X)),
        strict=True,
    ):
        np.testing.assert_array_equal(one, other)


def equations(jaxpr):
    """What is done to which shapes, bodies included, whatever they are called."""
    for eqn in jaxpr.eqns:
        yield eqn.primitive.name, [str(v.aval) for v in (*eqn.invars, *eqn.outvars)]
        for value in jax.tree.leaves(list(eqn.params.values())):
            if hasattr(value, "eqns"):
                yield from equations(value)


def test_second_derivatives_and_forward_mode():
    def hessian(wrap):
        apply_fn = wrap(dense)
        loss = lambda p: jnp.sum(apply_fn(p, X) ** 2)  # noqa: E731
        return jax.jit(lambda p: jax.jvp(jax.grad(loss), (p,), (p,)))(W)

    jax.tree.map(np.testing.assert_array_equal, hessian(once), hessian(lambda f: f))


def test_tracers_that_a_model_closes_over_stay_in_their_trace():
    def update(wrap, gain, params, x):
        return every_way(wrap(lambda p, x: gain * dense(p, x)), params, x)

    gain = jnp.asarray(2.0)
    with jax.check_tracer_leaks():
        found = jax.make_jaxpr(functools.partial(update, once))(gain, W, X)
    expected = jax.make_jaxpr(functools.partial(update, lambda f: f))(gain, W, X)
    assert str(found) == str(expected)
    gradient = jax.grad(lambda g: jnp.sum(update(once, g, W, X)[0]))(gain)
    np.testing.assert_allclose(gradient, jnp.sum(dense(W, X)), rtol=1e-6)


def test_layers_are_found_through_it():
    params = {"w": W, "b": jnp.zeros(2), "gain": jnp.ones(2)}

    def apply_fn(p, x):
        return p["gain"] * jnp.tanh(x @ p["w"] + p["b"])

    found = ff.layers.find_layers(once(apply_fn), params, X)
    assert found == ff.layers.find_layers(apply_fn, params, X)
    assert "dense" in str(found)


def test_what_is_no_array_is_part_of_the_program():
    def apply_fn(params, inputs):
        x, train = inputs
        return x @ params if train is True else -(x @ params)

    model = once(apply_fn)
    for train in (True, False, "no", True):
        np.testing.assert_array_equal(
            model(W, (X, train)), apply_fn(W, (X, train)), str(train)
        )


def test_types_and_sizes_are_told_apart():
    model, count = [], [0]

    def apply_fn(params, x):
        count[0] += 1
        return x @ params

    model = once(apply_fn)
    for x in (X, X[:2], X, X.astype(jnp.bfloat16).astype(jnp.float32), X[:2]):
        np.testing.assert_array_equal(model(W, x), x @ W)
    assert count[0] == 2
    assert model(W.astype(jnp.bfloat16), X.astype(jnp.bfloat16)).dtype == jnp.bfloat16
    assert count[0] == 3


def test_once_of_once_is_itself():
    model = once(dense)
    assert once(model) is model
    assert plain(model) is dense
    assert plain(dense) is dense


def test_on_a_mesh_of_explicit_axes():
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(mesh):
        x = jax.device_put(X, jax.sharding.PartitionSpec("data", None))
        found = jax.jit(lambda w, x: once(dense)(w, x))(W, x)
    np.testing.assert_allclose(found, dense(W, X), rtol=1e-6)


@pytest.mark.slow
def test_a_model_without_a_hash_goes_everywhere():
    @dataclasses.dataclass  # equal by its fields, and so without a hash
    class Line:
        slope: float

        def __call__(self, params, x):
            return x @ params * self.slope

    inputs, likelihood = jnp.eye(3), ff.likelihoods.gaussian()
    information = ff.structures.Diagonal(jnp.ones(3))
    state = ff.posterior(jnp.ones(3), information, prior_precision=1.0)
    model = Line(2.0), likelihood
    batch = inputs, jnp.ones(3)
    means = [
        ff.predict(state, *model, inputs).mean,
        ff.predictions.linearized_outputs(state, model[0], inputs).mean,
        ff.predictions.joint(state, model[0], inputs).mean,
    ]
    np.testing.assert_allclose(means, np.full((3, 3), 2.0))
    drawn = ff.predictions.weight_samples(state, *model, inputs, 0, 4)
    assert drawn.mean.shape == (3,)
    assert np.isfinite(ff.calibrate(state, *model, batch).scale)
    error = ff.diagnostics.relative_error(information, *model, state.mean, [batch], 0)
    assert np.isfinite(error.value)
