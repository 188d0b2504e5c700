"""Optimisers of equal choices share what is compiled of them."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fisherflow_jax as ff
import transform_cases as cases

PARAMS, BATCH = cases.network_params(), cases.NETWORK_BATCH
PROGRAMS: list[str] = []


def _listen(event, duration, **_):
    if event == "/jax/core/compile/backend_compile_duration":
        PROGRAMS.append(event)


jax.monitoring.register_event_duration_secs_listener(_listen)


def kfac(**options):
    layers = ff.layers.find_layers(cases.network, PARAMS, BATCH[0])
    return ff.kfac(0.1, *cases.MODEL, layers, key=0, **options)


def natural_gradient():
    return ff.natural_gradient(
        0.1,
        ff.estimators.hutchinson(num_probes=32),
        *cases.MODEL,
        structure=ff.structures.full(),
        memory=ff.memories.windowed(2),
        period=2,
        key=0,
    )


OPTIMIZERS = {
    "kfac": kfac,
    "bounded kfac": functools.partial(kfac, max_kl=0.1),
    "corrected kfac": functools.partial(
        kfac, eigenvalue_correction=True, spread_inverses=True
    ),
    "natural_gradient": natural_gradient,
    "adapt_damping": lambda: ff.transforms.adapt_damping(
        natural_gradient(), cases.LOSS, period=1
    ),
    "adam": lambda: ff.adam(0.1),
    "variational": lambda: ff.transforms.variational(
        0.1, cases.diagonal_estimator(), num_observations=12, information=3.0
    ),
}


def two_eager_steps(optimizer, params=PARAMS):
    state = optimizer.init(params)
    for _ in range(2):
        gradients = jax.tree.map(jnp.ones_like, params)
        given = {"batch": BATCH, "drawn": params}  # the latter for one of them
        updates, state = optimizer.update(gradients, state, params, **given)
        params = optax.apply_updates(params, updates)
    return params


@pytest.mark.slow_cases
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_second_optimizer_of_equal_choices_compiles_nothing(name):
    first = two_eager_steps(OPTIMIZERS[name]())
    PROGRAMS.clear()
    second = two_eager_steps(OPTIMIZERS[name]())
    assert not PROGRAMS
    chex.assert_trees_all_equal(first, second)


def test_other_choices_are_other_programs():
    steps = [two_eager_steps(kfac(damping=damping)) for damping in (0.1, 0.2)]
    assert np.any(steps[0]["w"] != steps[1]["w"])


@pytest.mark.slow
def test_eager_steps_are_those_of_a_compiled_loop():
    params = cases.network_params(jnp.float64)
    found = two_eager_steps(kfac(), params)
    expected = jax.jit(lambda: two_eager_steps(kfac(), params))()
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-9), found, expected
    )


def test_a_bad_batch_is_refused():
    optimizer = kfac()
    state = optimizer.init(PARAMS)
    weights = np.full(len(BATCH[0]), -1.0)
    with pytest.raises(ValueError, match=r"row 0 .*weights\[0\] = -1.0"):
        optimizer.update(PARAMS, state, PARAMS, batch=(*BATCH, weights))
