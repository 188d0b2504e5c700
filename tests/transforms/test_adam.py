"""Adam is diagonal Fisher Flow, to the last bit."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fisherflow_jax as ff
import transform_cases as cases
from fisherflow_jax.transforms import adam

STEPS = 200
SHAPES = {"b": (5,), "w": (7, 5)}


def gradients(dtype):
    return {
        name: jnp.asarray(cases.draw(STEPS, *shape, seed=len(shape)), dtype)
        for name, shape in SHAPES.items()
    }


def run(optimizer, jit, steps=STEPS, dtype=jnp.float32):
    stream = gradients(dtype)
    params = jax.tree.map(lambda x: x[-1], stream)

    def step(params, state, gradient):
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    if jit:
        step = jax.jit(step)
    state = optimizer.init(params)
    for t in range(steps):
        params, state = step(params, state, jax.tree.map(lambda x, t=t: x[t], stream))
    return params, state


@pytest.mark.slow_cases
@pytest.mark.parametrize(("jit", "steps"), [(True, STEPS), (False, STEPS)])
def test_adam_is_that_of_optax_bit_for_bit(jit, steps):
    options = {"learning_rate": 1e-2, "b1": 0.8, "b2": 0.99, "eps": 1e-6}
    expected, _ = run(optax.adam(**options), jit, steps)
    found, state = run(adam(**options), jit, steps)
    for name, leaf in found.items():
        np.testing.assert_array_equal(leaf, expected[name])
    assert state[0].num_skipped == 0


def test_adam_with_schedule_root_damping_and_narrow_momentum():
    options = {
        "learning_rate": optax.linear_schedule(1e-2, 1e-3, 100),
        "eps_root": 1e-4,
        "mu_dtype": jnp.bfloat16,
    }
    expected, _ = run(optax.adam(**options), True)
    found, state = run(adam(**options), True)
    for name, leaf in found.items():
        np.testing.assert_array_equal(leaf, expected[name])
    assert state[0].momentum.ema["w"].dtype == jnp.bfloat16


def test_the_summed_weight_is_the_bias_correction():
    _, state = run(adam(1e-2, b2=0.99), True)
    assert float(state[0].observations) == pytest.approx(1 - 0.99**STEPS, rel=1e-5)


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [("b2", value, r"in \(0, 1\)") for value in (0.0, 1.0, -0.1)]
    + [("b1", 1.0, r"in \[0, 1\)")]
    + [(name, -1e-8, "finite and not negative") for name in ("eps", "eps_root")],
)
def test_every_option_is_checked(name, value, rule):
    with pytest.raises(ValueError, match=rf"^{name} must be {rule}; got {value}"):
        adam(1e-2, **{name: value})


def test_debiasing_is_that_of_optax_under_strict_promotion():
    entries, decay = jnp.linspace(0.1, 1.0, 7), 0.95
    debias = ff.memories.exponential(decay).average.debias
    for count in (1, 2, 3, 17, 1000):
        steps = jnp.asarray(count, jnp.int32)
        expected = optax.tree.bias_correction(entries, decay, steps)
        with jax.numpy_dtype_promotion("strict"):
            np.testing.assert_array_equal(debias(entries, steps), expected)


def test_natural_gradient_with_its_default_memory_under_strict_promotion():
    model = lambda params, x: x @ params, ff.likelihoods.gaussian()
    batch = jnp.ones((3, 2)), jnp.ones(3)
    optimizer = ff.natural_gradient(
        0.1, ff.estimators.exact, *model, structure=ff.structures.diagonal()
    )
    with jax.numpy_dtype_promotion("strict"):
        params = jnp.zeros(2)
        state = optimizer.init(params)
        gradient = jnp.ones(2)
        updates, _ = optimizer.update(gradient, state, params, batch=batch)
    assert jnp.all(jnp.isfinite(updates))
