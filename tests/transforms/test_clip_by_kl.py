"""A step's divergence, against closed forms and finite steps."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fisherflow_jax as ff
import transform_cases as cases
from fisherflow_jax.layers._compat import has_tangents
from fisherflow_jax.transforms import clip_by_kl, scale_by_fisher

X = cases.draw(5, 2, seed=3)
WEIGHTS = np.array([1.0, 0.0, 2.0, 0.5, 1.0])
PARAMS = {"w": cases.draw(2, 3, seed=1)}
STEP = {"w": cases.draw(2, 3, seed=2)}


def linear(params, x):
    return x @ params["w"]


def divergence(likelihood, step, batch=(X, None, WEIGHTS), max_kl=1e9, **extra):
    clip = clip_by_kl(linear, likelihood, max_kl)
    state = clip.init(PARAMS)
    return jax.jit(lambda s: clip.update(s, state, PARAMS, batch=batch, **extra))(step)


def mean(values):
    return (WEIGHTS * values).sum() / WEIGHTS.sum()


def test_of_gaussian_outputs_it_is_exact():
    updates, state = divergence(ff.likelihoods.gaussian(scale=0.5), STEP)
    expected = mean(((X @ STEP["w"]) ** 2).sum(1) / (2 * 0.25))
    np.testing.assert_allclose(state.kl, expected, rtol=1e-12)
    np.testing.assert_array_equal(updates["w"], STEP["w"])  # within the bound


def test_of_classes_it_is_that_of_a_small_step():
    small = {"w": 1e-4 * STEP["w"]}
    _, state = divergence(ff.likelihoods.categorical(), small)
    before = jax.nn.log_softmax(X @ PARAMS["w"])
    after = jax.nn.log_softmax(X @ (PARAMS["w"] + small["w"]))
    exact = mean(np.asarray((jnp.exp(before) * (before - after)).sum(1)))
    np.testing.assert_allclose(state.kl, exact, rtol=1e-3)


def test_a_longer_step_is_brought_to_the_bound():
    updates, state = divergence(ff.likelihoods.poisson(), STEP, max_kl=0.01)
    assert state.kl > 0.1
    ratio = updates["w"] / STEP["w"]
    np.testing.assert_allclose(ratio, np.sqrt(0.01 / state.kl), rtol=1e-12)
    _, again = divergence(ff.likelihoods.poisson(), updates, max_kl=0.01)
    np.testing.assert_allclose(again.kl, 0.01, rtol=1e-12)


def test_an_update_without_a_finite_divergence_becomes_zero_and_is_counted():
    bad = {"w": STEP["w"] * np.inf}
    updates, state = divergence(ff.likelihoods.poisson(), bad)
    assert not np.any(updates["w"])
    assert state.num_unmeasured == 1
    assert state.kl == 0


def test_within_masked_the_held_parameters_do_not_move():
    def apply_fn(params, x):
        return x @ params["w"] + params["held"]

    params = {"held": jnp.ones(3), "w": PARAMS["w"]}
    clip = clip_by_kl(apply_fn, ff.likelihoods.gaussian(), 1e9)
    masked = optax.masked(clip, {"held": False, "w": True})
    updates = {"held": 100 * jnp.ones(3), "w": jnp.asarray(STEP["w"])}
    state = masked.init(params)
    with pytest.raises(ValueError, match=r"holes, .*model_params=params"):
        masked.update(updates, state, params, batch=(X, None, WEIGHTS))
    _, state = masked.update(
        updates, state, params, batch=(X, None, WEIGHTS), model_params=params
    )
    expected = mean(((X @ STEP["w"]) ** 2).sum(1) / 2)
    np.testing.assert_allclose(state.inner_state.kl, expected, rtol=1e-12)


def test_a_sampled_root_needs_a_key():
    likelihood = ff.likelihoods.from_log_prob(
        lambda outputs, targets: -jnp.square(targets - outputs).sum(-1) / 2,
        lambda key, outputs: outputs + jax.random.normal(key, outputs.shape),
        num_samples=2000,
    )
    with pytest.raises(ValueError, match="samples its root: give each update a key"):
        divergence(likelihood, STEP)
    _, state = divergence(likelihood, STEP, key=0)
    expected = mean(((X @ STEP["w"]) ** 2).sum(1) / 2)
    np.testing.assert_allclose(state.kl, expected, rtol=0.2)


def test_after_a_natural_gradient_the_divergence_is_that_of_the_information():
    model = linear, ff.likelihoods.categorical()
    estimator = ff.estimators.exact(*model, ff.structures.full())
    optimizer = optax.chain(
        scale_by_fisher(estimator, memory=ff.memories.windowed(1), damping=0.1),
        clip_by_kl(*model, max_kl=1e9),
    )
    batch = X, np.array([0, 1, 2, 0, 1]), WEIGHTS
    params = jax.tree.map(jnp.asarray, PARAMS)

    @jax.jit
    def run():
        state = optimizer.init(params)
        updates, state = optimizer.update(STEP, state, params, batch=batch)
        information = ff.information.scale(estimator(params, batch), 1 / WEIGHTS.sum())
        return state, ff.information.quadratic_form(information, updates) / 2

    state, expected = run()
    np.testing.assert_allclose(state[1].kl, expected, rtol=1e-9)


@jax.custom_vjp
def act(x):
    return jnp.tanh(x)


act.defvjp(lambda x: (act(x), act(x)), lambda y, g: (g * (1 - y * y),))
# where a rule may stand: by itself, and within other programs
PLACES = {
    "itself": lambda f: f,
    "jit": jax.jit,
    "checkpoint": jax.checkpoint,
    "scan": lambda f: lambda x: jax.lax.scan(lambda c, _: (f(c), None), x, length=1)[0],
    "cond": lambda f: lambda x: jax.lax.cond(x[0, 0] > 9, lambda x: x, f, x),
    "vmap": jax.vmap,
}


@pytest.mark.slow
def test_a_model_without_a_tangent_is_measured_by_two_forward_passes():
    likelihood = ff.likelihoods.categorical()
    batch = X, np.array([0, 1, 2, 0, 1]), WEIGHTS
    long = jax.tree.map(lambda x: 40 * x, STEP)  # no difference of outputs so far apart

    def measured(function, dtype):
        params, *steps = jax.tree.map(
            lambda x: jnp.asarray(x, dtype), (PARAMS, STEP, long)
        )
        clip = clip_by_kl(lambda p, x: function(x @ p["w"]), likelihood, 1e-3)
        state = clip.init(params)
        given = jnp.asarray(X, dtype), *batch[1:]
        found = [clip.update(step, state, params, batch=given) for step in steps]
        return found, clip.update(
            jax.tree.map(jnp.zeros_like, params), state, params, batch=given
        )

    exact = jax.jit(lambda: measured(jnp.tanh, "float64"))()
    wrong = []
    for place, put in PLACES.items():
        for dtype, rtol in (("float64", 1e-6), ("float32", 1e-2)):
            if dtype == "float32" and place != "itself":
                continue
            found = jax.jit(lambda put=put, dtype=dtype: measured(put(act), dtype))()
            pairs = zip(*map(jax.tree.leaves, (found, exact)), strict=True)
            if not all(np.allclose(x, y, rtol=rtol, atol=1e-12) for x, y in pairs):
                wrong.append((place, dtype))
    assert wrong == []


def test_rules_that_have_tangents_are_no_reason_for_differences():
    def tangents(function):
        return has_tangents(jax.make_jaxpr(function)(X))

    assert all(tangents(put(jnp.tanh)) for put in PLACES.values())
    assert tangents(jax.nn.relu) and tangents(jax.nn.gelu)  # of custom_jvp
    assert not any(tangents(put(act)) for put in PLACES.values())


@pytest.mark.parametrize("bound", [0.0, -1.0, float("nan"), np.ones(2)])
def test_the_bound_is_one_positive_number(bound):
    with pytest.raises(ValueError, match="max_kl is one positive number; got"):
        clip_by_kl(linear, ff.likelihoods.gaussian(), bound)


def test_batch_and_parameters_are_needed():
    clip = clip_by_kl(linear, ff.likelihoods.gaussian(), 1.0)
    state = clip.init(PARAMS)
    with pytest.raises(ValueError, match="clip_by_kl needs batch"):
        clip.update(STEP, state, PARAMS)
    with pytest.raises(ValueError, match="clip_by_kl needs params"):
        clip.update(STEP, state, batch=(X, None))
