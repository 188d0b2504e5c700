"""Damping after Levenberg and Marquardt, on a parabola where all is in closed form."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fisherflow_jax as ff
from fisherflow_jax.estimators import Estimator
from fisherflow_jax.transforms import adapt_damping

CURVATURE, THETA, DAMPING = 2.0, 1.5, 0.3


def loss(params, batch):
    return CURVATURE / 2 * jnp.sum(jnp.square(params)) + 0 * jnp.sum(batch[0])


def believing(params, batch, key):
    """An information `c H` whose c is what the inputs say."""
    del key
    factor = jnp.mean(batch.inputs)
    return ff.structures.Full(
        jnp.reshape(factor * CURVATURE * jnp.sum(batch.weights), (1, 1))
    )


ESTIMATOR = Estimator("believing", believing, ff.structures.full())


def descent(damping=DAMPING):
    return ff.natural_gradient(
        1.0, ESTIMATOR, memory=ff.memories.windowed(1), damping=damping
    )


def stepped(factor, *, damping=DAMPING, steps=1, gradient=None, **options):
    """The state after updates at one point, of a model that believes `c H`."""
    optimizer = adapt_damping(descent(damping), loss, **({"period": 1} | options))
    params = jnp.array([THETA])
    batch = jnp.full((4, 1), factor), None
    found = jax.grad(loss)(params, batch) if gradient is None else gradient
    state = optimizer.init(params)
    for _ in range(steps):
        updates, state = optimizer.update(found, state, params, batch=batch)
    return updates, state


one_step = jax.jit(stepped)


@pytest.mark.parametrize(
    ("factor", "change"), [(1.0, 0.95), (0.5, 1.0), (0.3, 1 / 0.95), (0.1, 1 / 0.95)]
)
def test_damping_falls_where_the_model_holds_and_rises_where_it_promised_too_much(
    factor, change
):
    updates, state = one_step(factor)
    gradient, believed = CURVATURE * THETA, factor * CURVATURE
    step = -gradient / (believed + DAMPING)
    actual = CURVATURE / 2 * (THETA**2 - (THETA + step) ** 2)
    predicted = -gradient * step - believed / 2 * step**2
    np.testing.assert_allclose(updates, [step], rtol=1e-12)
    np.testing.assert_allclose(state.reduction_ratio, actual / predicted, rtol=1e-12)
    ratio = actual / predicted
    assert change == (1 / 0.95 if ratio < 0.25 else 0.95 if ratio > 0.75 else 1.0)
    damping = optax.tree.get(state, "damping")
    np.testing.assert_allclose(damping, DAMPING * change, rtol=1e-12)


def test_the_next_step_is_made_with_the_new_damping():
    updates, _ = jax.jit(lambda: stepped(1.0, steps=2))()
    step = -CURVATURE * THETA / (CURVATURE + 0.95 * DAMPING)
    np.testing.assert_allclose(updates, [step], rtol=1e-12)


def test_it_compares_once_a_period_and_keeps_to_its_bounds():
    optimizer = adapt_damping(descent(), loss, period=2, rate=0.5, smallest=0.05)
    params, batch = jnp.array([THETA]), (jnp.ones((4, 1)), None)

    def step(state, _):
        gradient = jax.grad(loss)(params, batch)
        _, state = optimizer.update(gradient, state, params, batch=batch)
        return state, optax.tree.get(state, "damping")

    found = jax.jit(lambda: jax.lax.scan(step, optimizer.init(params), length=5)[1])()
    np.testing.assert_allclose(found, [0.3, 0.075, 0.075, 0.05, 0.05])


def test_a_step_up_hill_is_a_broken_promise_and_a_skipped_one_is_none():
    # no reduction is predicted where the gradient points the wrong way
    away = jnp.array([-CURVATURE * THETA])
    wrong = adapt_damping(optax.chain(descent(), optax.scale(-1.0)), loss, period=1)
    params, batch = jnp.array([THETA]), (jnp.ones((4, 1)), None)

    @jax.jit
    def run(gradient):
        return wrong.update(gradient, wrong.init(params), params, batch=batch)[1]

    damping = functools.partial(optax.tree.get, key="damping")
    np.testing.assert_allclose(damping(run(-away)), DAMPING / 0.95)
    skipped = run(away * jnp.nan)
    assert optax.tree.get(skipped, "num_skipped") == 1
    np.testing.assert_allclose(damping(skipped), DAMPING)
    assert np.isnan(skipped.reduction_ratio)


def test_a_loss_that_is_not_finite_after_the_step_raises_the_damping():
    def walled(params, batch):
        return jnp.where(jnp.all(params > 1), loss(params, batch), jnp.nan)

    optimizer = adapt_damping(descent(), walled, period=1)
    params, batch = jnp.array([THETA]), (jnp.ones((4, 1)), None)

    @jax.jit
    def run(params):
        gradient = jax.grad(loss)(params, batch)
        return optimizer.update(gradient, optimizer.init(params), params, batch=batch)[
            1
        ]

    state = run(params)
    np.testing.assert_allclose(optax.tree.get(state, "damping"), DAMPING / 0.95)
    # and one that was not finite before it says nothing
    state = run(jnp.array([0.5]))
    np.testing.assert_allclose(optax.tree.get(state, "damping"), DAMPING)


def test_updates_that_only_accumulate_are_not_judged():
    steps = optax.MultiSteps(descent(), 3)
    with pytest.raises(ValueError, match=r"gets no batch: .*\(steps.init, steps.upd"):
        adapt_damping(steps, loss)
    inner = optax.GradientTransformationExtraArgs(steps.init, steps.update)
    optimizer = adapt_damping(inner, loss, period=1)
    params, batch = jnp.array([THETA]), (jnp.ones((4, 1)), None)

    def step(state, _):
        gradient = jax.grad(loss)(params, batch)
        _, state = optimizer.update(gradient, state, params, batch=batch)
        return state, optax.tree.get(state, "damping")

    found = jax.jit(lambda: jax.lax.scan(step, optimizer.init(params), length=6)[1])()
    np.testing.assert_allclose(
        found / DAMPING, [1, 1, 0.95, 0.95, 0.95, 0.95**2], rtol=1e-12
    )


def test_within_a_chain_a_mask_and_a_scan():
    def apply_fn(params, x):
        return x @ params["w"] + params["b"]

    likelihood = ff.likelihoods.gaussian()
    value = ff.negative_log_likelihood(apply_fn, likelihood)
    estimator = ff.estimators.exact(apply_fn, likelihood, ff.structures.full())
    inner = adapt_damping(
        ff.natural_gradient(1.0, estimator, damping=1.0), value, period=1
    )
    optimizer = optax.chain(optax.masked(inner, {"w": True, "b": False}))
    params = {"w": jnp.zeros(2), "b": jnp.zeros(())}
    x = jnp.asarray(np.random.default_rng(0).normal(size=(6, 2)))
    batch = x, x @ jnp.array([1.0, -2.0])

    @jax.jit
    def run(params):
        def step(carry, _):
            params, state = carry
            gradients = jax.grad(value)(params, batch)
            gradients["b"] = jnp.zeros(())
            updates, state = optimizer.update(
                gradients, state, params, batch=batch, model_params=params
            )
            return (optax.apply_updates(params, updates), state), None

        carry = params, optimizer.init(params)
        return jax.lax.scan(step, carry, length=8)[0]

    params, state = run(params)
    assert params["b"] == 0 and params["w"][1] < -1
    np.testing.assert_allclose(optax.tree.get(state, "damping"), 0.95**8, rtol=1e-12)
    np.testing.assert_allclose(optax.tree.get(state, "reduction_ratio"), 1.0, rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"period": 0}, "period must be a positive whole number of steps; got 0"),
        ({"rate": 1.0}, r"rate must be in \(0, 1\); got 1\.0"),
        ({"low": 0.8}, r"low must not exceed high; got 0\.8 and 0\.75"),
        ({"smallest": -1.0}, r"smallest must be finite and not negative; got -1\.0"),
        ({"largest": 0.0}, "smallest must not exceed largest; got 1e-08 and 0"),
    ],
)
def test_options_are_checked_when_built(options, message):
    with pytest.raises(ValueError, match=message):
        adapt_damping(descent(), loss, **options)
    with pytest.raises(ValueError, match=r"loss is a function of \(params, batch\)"):
        adapt_damping(descent(), 0.5)


def test_a_batch_and_a_fisher_state_are_needed():
    params, batch = jnp.array([THETA]), (jnp.ones((4, 1)), None)
    optimizer = adapt_damping(descent(), loss)
    state = optimizer.init(params)
    with pytest.raises(ValueError, match="adapt_damping compares losses: call update"):
        optimizer.update(params, state, params)
    plain = adapt_damping(optax.sgd(0.1), loss)
    with pytest.raises(ValueError, match=r"no state of ff\.scale_by_fisher"):
        plain.update(params, plain.init(params), params, batch=batch)


@pytest.mark.parametrize(
    ("damping", "kind"),
    [(lambda step: 0.1, "a schedule"), (jnp.float64(0.1), r"an array of shape \(\)")],
)
def test_a_damping_that_is_asked_anew_cannot_be_adapted(damping, kind):
    params, batch = jnp.array([THETA]), (jnp.ones((4, 1)), None)
    model = ff.likelihoods.gaussian(), ff.layers.find_layers(product, params, batch[0])
    for inner in (
        descent(damping),
        optax.apply_if_finite(descent(damping), 3),
        ff.kfac(0.1, product, *model, damping=damping, key=0),
    ):
        optimizer = adapt_damping(inner, loss)
        state = optimizer.init(params)
        with pytest.raises(ValueError, match=f"it is {kind}.* Give a Python number"):
            optimizer.update(params, state, params, batch=batch)


def product(params, x):
    return x * params
