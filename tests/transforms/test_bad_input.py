"""What a preconditioner refuses, and the words in which it does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fisherflow_jax as ff
import transform_cases as cases
from fisherflow_jax.transforms import scale_by_fisher
from together import together

ESTIMATOR = cases.given(ff.structures.diagonal())
OPTIONS = {"memory": ff.memories.stationary(), "damping": 0.1}
PARAMS = jax.tree.map(jnp.asarray, cases.PARAMS)


@together
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"damping": -0.1}, r"damping must be finite and not negative; got -0\.1"),
        ({"damping": float("nan")}, "damping must be finite and not negative; got nan"),
        ({"damping": np.ones(2)}, r"damping is one number; got shape \(2,\)"),
        (
            {"root_damping": -1.0},
            r"root_damping must be finite and not negative; got -1\.0",
        ),
        ({"period": 0}, "period must be a positive whole number of steps; got 0"),
        ({"period": 2.0}, r"period must be a positive whole number of steps; got 2\.0"),
        ({"inverse_period": -1}, "inverse_period must be a positive whole .*; got -1"),
        ({"power": 1}, "power is a number of at most 0, such as -1; got 1"),
        ({"memory": ff.memories.adaptive()}, "adaptive.* a preconditioner has none"),
        ({"memory": "stationary"}, "memory comes from a call .*got 'stationary'"),
        ({"momentum": 0.9}, r"momentum is a transformation .* got 0\.9"),
        ({"key": 0}, "given draws nothing; it takes no key"),
    ],
)
def test_options_are_checked_when_built(options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        scale_by_fisher(ESTIMATOR, **(OPTIONS | options))


def test_a_factory_is_no_estimator():
    with pytest.raises(ValueError, match=r"estimator is what a factory .* returns"):
        scale_by_fisher(ff.estimators.exact, **OPTIONS)


PROBED = {
    "probes": lambda s, n: ff.estimators.hutchinson(*cases.MODEL, s, num_probes=n),
    "groups": lambda s, n: ff.estimators.monte_carlo(*cases.MODEL, s, groups=n),
}


@pytest.mark.parametrize("kind", PROBED)
def test_an_inverse_of_a_few_random_vectors_is_refused(kind):
    def init(structure, count):
        estimator = PROBED[kind](structure, count)
        optimizer = scale_by_fisher(estimator, **OPTIONS, key=0)
        return jax.eval_shape(optimizer.init, cases.network_params())

    for structure in (ff.structures.full(), ff.structures.block()):
        with pytest.raises(ValueError, match=r"squares 31 random .* at least 32 \("):
            init(structure, 31)
        init(structure, 32)
        # as many as examples
        init(structure, None) if kind == "groups" else None
    init(ff.structures.diagonal(), 1)


def test_a_structure_without_a_random_walk_says_so():
    estimator = cases.given(ff.structures.low_rank(2))
    with pytest.raises(ValueError, match=r"low_rank\(2\) does not go with random_walk"):
        scale_by_fisher(estimator, memory=ff.memories.random_walk(0.1), damping=0.1)


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.complex64])
def test_parameters_are_real(dtype):
    params = {"a": jnp.ones(2), "b": jnp.ones(2, dtype)}
    with pytest.raises(ValueError, match=r"arrays; b has dtype"):
        scale_by_fisher(ESTIMATOR, **OPTIONS).init(params)


@pytest.mark.parametrize(
    "make", [lambda: scale_by_fisher(ESTIMATOR, **OPTIONS), lambda: ff.soap(0.1)]
)
@pytest.mark.parametrize(("leaf", "told"), [(jax.nn.relu, "is "), (False, "has ")])
def test_a_module_that_is_not_filtered(make, leaf, told):
    params = {"body": jnp.ones(2), "drop": {"inference": leaf}}
    way = r"split off what is no array.*eqx.partition\(model, eqx.is_inexact_array\)"
    with pytest.raises(ValueError, match=f"drop.inference {told}.*{way}"):
        make().init(params)


def update(updates, params=PARAMS, batch=cases.FIRST, **extra):
    optimizer = scale_by_fisher(ESTIMATOR, **OPTIONS)
    state = optimizer.init(PARAMS)
    return optimizer.update(updates, state, params, batch=batch, **extra)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch": None}, r"given needs the batch: .*TrainState\.apply_gradients"),
        ({"params": None}, "given runs the model: call update"),
        (
            {"params": {"a": jnp.ones(2)}},
            r"updates and params must be one tree; at b there is \(2, 2\) in one "
            "and nothing in the other",
        ),
        (
            {"params": {"a": jnp.ones(3), "b": jnp.ones((2, 2))}},
            r"must be one tree; at a there is \(2,\) in one and \(3,\)",
        ),
        ({"batch": (np.ones((0, 6)), None)}, "a batch must not be empty"),
        ({"batch": np.ones((2, 6))}, r"a batch is \(inputs, targets\)"),
    ],
)
def test_updates_are_checked_when_traced(arguments, message):
    with pytest.raises(ValueError, match=message):
        update(PARAMS, **arguments)


def test_a_state_of_another_tree():
    other = {"a": jnp.ones(2)}
    with pytest.raises(ValueError, match="initialised with another tree than params"):
        update(other, params=other)


@pytest.mark.parametrize("damping", [-0.1, float("nan")])
def test_a_traced_damping_that_makes_no_sense_is_a_skipped_update(damping):
    @jax.jit
    def run(value):
        optimizer = scale_by_fisher(
            ESTIMATOR, memory=ff.memories.stationary(), damping=value
        )
        state = optimizer.init(PARAMS)
        return optimizer.update(PARAMS, state, PARAMS, batch=cases.FIRST)

    updates, state = run(damping)
    assert not np.any(cases.flat(updates))
    assert (state.num_skipped, state.num_batches) == (1, 0)
    _, state = run(0.1)
    assert (state.num_skipped, state.num_batches) == (0, 1)
