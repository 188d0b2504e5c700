"""Gradients times powers of a damped mean information, against dense matrices."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fisherflow_jax as ff
import transform_cases as cases
from fisherflow_jax.transforms import (
    apply,
    factorise,
    relative_to_mean_eigenvalue,
    scale_by_fisher,
)

DAMPING, NOISE, DECAY = 0.3, 0.01, 0.9
MEMORIES = {
    "stationary": ff.memories.stationary(),
    "windowed": ff.memories.windowed(1),
    "exponential": ff.memories.exponential(DECAY),
    "random_walk": ff.memories.random_walk(NOISE),
}


def start(optimizer, params=cases.PARAMS):
    return optimizer.init(jax.tree.map(jnp.asarray, params))


def two_steps(optimizer):
    """The second of two updates, and the state after it."""
    params = jax.tree.map(jnp.asarray, cases.PARAMS)
    gradient, state = cases.tree(cases.GRADIENT), optimizer.init(params)
    for batch in (cases.FIRST, cases.SECOND):
        updates, state = optimizer.update(gradient, state, params, batch=batch)
    return updates, state


def mean_of(memory, structure):
    """The mean information that a memory has after the two batches."""
    (first, n), (second, m) = map(cases.sums, (cases.FIRST, cases.SECOND))
    first, second = cases.kept(structure, first), cases.kept(structure, second)
    if memory == "windowed":
        return second / m
    if memory == "exponential":
        weights = DECAY * (1 - DECAY), 1 - DECAY
        return (weights[0] * first / n + weights[1] * second / m) / sum(weights)
    if memory == "random_walk":
        first = np.linalg.inv(np.linalg.inv(first) + NOISE * np.eye(cases.SIZE))
    return (first + second) / (n + m)


@pytest.mark.slow_cases
@pytest.mark.parametrize("structure", cases.STRUCTURES)
def test_the_gradient_times_the_inverse_of_the_damped_mean(structure):
    memories = dict(MEMORIES)
    if structure == "low_rank":
        del memories["random_walk"]
    estimator = cases.given(cases.STRUCTURES[structure])

    @jax.jit
    def run():
        return {
            name: two_steps(scale_by_fisher(estimator, memory=memory, damping=DAMPING))
            for name, memory in memories.items()
        }

    for name, (updates, state) in run().items():
        mean = mean_of(name, structure)
        expected = cases.power_of(mean, -1, DAMPING) @ cases.GRADIENT
        np.testing.assert_allclose(cases.flat(updates), expected, rtol=1e-9)
        assert (state.step, state.num_batches, state.num_skipped) == (2, 2, 0)


@pytest.mark.slow_cases
@pytest.mark.parametrize("structure", cases.STRUCTURES)
def test_any_power_with_a_damping_of_its_root(structure):
    matrix = cases.kept(structure, cases.sums(cases.FIRST)[0])
    information = cases.STRUCTURES[structure].reduce(cases.tree(cases.FIRST[0]))
    gradient = cases.tree(cases.GRADIENT)
    powers = (-1, -0.5, -0.25, 0)

    @jax.jit
    def run(damping):
        made = {p: factorise(information, damping, p, 0.1) for p in powers}
        return {p: apply(f, gradient) for p, f in made.items()}

    for power, found in run(jnp.asarray(DAMPING)).items():
        expected = cases.power_of(matrix, power, DAMPING, 0.1) @ cases.GRADIENT
        np.testing.assert_allclose(cases.flat(found), expected, rtol=1e-9)


def test_a_large_low_rank_has_no_other_power_than_the_inverse():
    estimator = cases.given(ff.structures.low_rank(2))
    optimizer = scale_by_fisher(
        estimator, memory=MEMORIES["stationary"], damping=0.1, power=-0.5
    )
    message = r"power must be -1, got -0\.5: the eigenvalues of a LowRank .* 5000 .*byt"
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(optimizer.init, {"a": jnp.zeros(5000)})


@pytest.mark.parametrize("structure", ["scalar", "full"])
def test_damping_relative_to_the_mean_eigenvalue(structure):
    matrix = cases.kept(structure, cases.sums(cases.FIRST)[0])
    information = cases.STRUCTURES[structure].reduce(cases.tree(cases.FIRST[0]))
    made = relative_to_mean_eigenvalue(information, jnp.asarray(0.5))
    found = apply(made, cases.tree(cases.GRADIENT))
    damping = 0.5 * np.trace(matrix) / cases.SIZE
    expected = cases.power_of(matrix, -1, damping) @ cases.GRADIENT
    np.testing.assert_allclose(cases.flat(found), expected, rtol=1e-9)


def test_momentum_is_multiplied_while_the_curvature_sees_the_raw_gradient():
    estimator = ff.estimators.squared_gradient(structure=ff.structures.diagonal())
    optimizer = scale_by_fisher(
        estimator,
        memory=MEMORIES["stationary"],
        damping=DAMPING,
        momentum=optax.trace(0.5),
    )
    state = start(optimizer)
    gradients = cases.GRADIENT, cases.draw(cases.SIZE, seed=8)
    for gradient in gradients:  # neither parameters nor a batch are needed
        updates, state = optimizer.update(cases.tree(gradient), state)
    squares = (gradients[0] ** 2 + gradients[1] ** 2) / 2
    momentum = 0.5 * gradients[0] + gradients[1]
    expected = momentum / (squares + DAMPING)
    np.testing.assert_allclose(cases.flat(updates), expected, rtol=1e-12)


# ---- damping


def test_damping_is_a_schedule_of_the_step_or_a_number_kept_in_the_state():
    estimator = cases.given(ff.structures.full())
    mean = mean_of("stationary", "full")

    def solved(optimizer, change=lambda state: state):
        params = jax.tree.map(jnp.asarray, cases.PARAMS)
        gradient, state = cases.tree(cases.GRADIENT), optimizer.init(params)
        for batch in (cases.FIRST, cases.SECOND):
            state = change(state)
            updates, state = optimizer.update(gradient, state, params, batch=batch)
        return cases.flat(updates), state

    def build(damping):
        return scale_by_fisher(
            estimator, memory=MEMORIES["stationary"], damping=damping
        )

    expected = cases.power_of(mean, -1, 0.7) @ cases.GRADIENT
    scheduled, state = solved(build(lambda step: 0.2 + 0.5 * step))
    np.testing.assert_allclose(scheduled, expected, rtol=1e-9)
    assert state.damping == pytest.approx(0.7)
    adapted, _ = solved(build(0.1), lambda state: optax.tree.set(state, damping=0.7))
    np.testing.assert_allclose(adapted, expected, rtol=1e-9)


# ---- periods


def test_between_two_curvatures_the_model_is_not_run():
    calls = []
    estimator = cases.given(
        ff.structures.full(), on_call=lambda: calls.append(len(calls))
    )
    optimizer = scale_by_fisher(
        estimator, memory=MEMORIES["windowed"], damping=DAMPING, period=3
    )
    params, gradient = map(cases.tree, (cases.flat(cases.PARAMS), cases.GRADIENT))
    step = jax.jit(optimizer.update)
    state, results, informations = optimizer.init(params), [], []
    for index in range(5):
        rows = cases.FIRST[0] + index
        updates, state = step(gradient, state, params, batch=(rows, None))
        results.append(cases.flat(updates))
        informations.append(np.asarray(state.information.rows["a"]))
    jax.effects_barrier()
    assert len(calls) == 2
    assert state.num_batches == 2
    np.testing.assert_array_equal(informations[0], informations[2])
    np.testing.assert_array_equal(results[0], results[2])
    fresh = cases.sums((cases.FIRST[0] + 3, None))[0] / 9
    expected = cases.power_of(fresh, -1, DAMPING) @ cases.GRADIENT
    np.testing.assert_allclose(results[3], expected, rtol=1e-9)
    np.testing.assert_array_equal(results[3], results[4])


@pytest.mark.parametrize("structure", ["diagonal", "full", "low_rank"])
def test_the_factorisation_is_kept_for_its_period(structure):
    estimator = cases.given(cases.STRUCTURES[structure])
    optimizer = scale_by_fisher(
        estimator, memory=MEMORIES["windowed"], damping=DAMPING, inverse_period=2
    )
    params, gradient = map(cases.tree, (cases.flat(cases.PARAMS), cases.GRADIENT))
    state, step = optimizer.init(params), jax.jit(optimizer.update)
    for index in range(3):
        batch = cases.FIRST[0] + index, None
        updates, state = step(gradient, state, params, batch=batch)
        used = 2 * (index // 2)
        matrix = cases.sums((cases.FIRST[0] + used, None))[0] / 9
        matrix = cases.kept(structure, matrix)
        expected = cases.power_of(matrix, -1, DAMPING) @ cases.GRADIENT
        np.testing.assert_allclose(cases.flat(updates), expected, rtol=1e-8)


# ---- what is not finite, and what is missing


def test_what_is_not_finite_moves_nothing_and_is_counted():
    optimizer = scale_by_fisher(
        cases.given(ff.structures.diagonal()),
        memory=MEMORIES["exponential"],
        damping=DAMPING,
        momentum=optax.ema(0.9),
    )
    params, gradient = map(cases.tree, (cases.flat(cases.PARAMS), cases.GRADIENT))
    step = jax.jit(optimizer.update)
    _, before = step(gradient, optimizer.init(params), params, batch=cases.SECOND)
    huge = np.where(np.arange(8)[:, None] == 2, 1e200, cases.SECOND[0])
    bad_gradient = jax.tree.map(lambda x: x / 0.0, gradient)
    for g, batch in (
        (gradient, (huge, None, cases.SECOND[2])),
        (bad_gradient, cases.SECOND),
    ):
        updates, after = step(g, before, params, batch=batch)
        assert not np.any(cases.flat(updates))
        assert after.num_skipped == 1
        for x, y in zip(
            jax.tree.leaves(before),
            jax.tree.leaves(after._replace(num_skipped=before.num_skipped)),
            strict=True,
        ):
            np.testing.assert_array_equal(x, y)
    # a row of weight zero may hold anything
    padded = np.where(np.arange(8)[:, None] == 4, np.nan, cases.SECOND[0])
    clean, _ = step(gradient, before, params, batch=cases.SECOND)
    blanked, after = step(gradient, before, params, batch=(padded, *cases.SECOND[1:]))
    np.testing.assert_array_equal(cases.flat(blanked), cases.flat(clean))
    assert after.num_skipped == 0


@pytest.mark.parametrize("inverse_period", [1, 2])
def test_a_solve_that_fails_still_lets_curvature_accumulate(inverse_period):
    optimizer = scale_by_fisher(
        cases.given(ff.structures.full()),
        memory=MEMORIES["stationary"],
        damping=0.0,
        inverse_period=inverse_period,
    )
    params, gradient = map(cases.tree, (cases.flat(cases.PARAMS), cases.GRADIENT))
    state, step = optimizer.init(params), jax.jit(optimizer.update)
    few = np.eye(6)[:3], None  # a singular information
    updates, state = step(gradient, state, params, batch=few)
    assert not np.any(cases.flat(updates))
    assert (state.num_skipped, state.num_batches, state.step) == (1, 1, 0)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(state))
    rest = np.eye(6)[3:], None
    updates, state = step(gradient, state, params, batch=rest)
    np.testing.assert_allclose(cases.flat(updates), 6 * cases.GRADIENT)
    assert (state.num_skipped, state.num_batches, state.step) == (1, 2, 1)


@pytest.mark.parametrize("name", ["stationary", "exponential"])
def test_a_batch_without_weight_leaves_the_mean_as_it_is(name):
    optimizer = scale_by_fisher(
        cases.given(ff.structures.diagonal()), memory=MEMORIES[name], damping=DAMPING
    )
    params, gradient = map(cases.tree, (cases.flat(cases.PARAMS), cases.GRADIENT))
    step = jax.jit(optimizer.update)
    first, state = step(gradient, optimizer.init(params), params, batch=cases.SECOND)
    missing = cases.SECOND[0], None, np.zeros(8)
    second, state = step(gradient, state, params, batch=missing)
    np.testing.assert_allclose(cases.flat(second), cases.flat(first), rtol=1e-12)
    assert state.num_skipped == 0


# ---- keys


def test_draws_follow_from_the_key_and_the_step():
    estimator = cases.given(ff.structures.diagonal(), random=True)
    params, gradient = map(cases.tree, (cases.flat(cases.PARAMS), cases.GRADIENT))

    def run(own_key, key=None, transform=lambda update: update):
        optimizer = scale_by_fisher(
            estimator, memory=MEMORIES["windowed"], damping=DAMPING, key=own_key
        )
        update, state, found = transform(optimizer.update), optimizer.init(params), []
        for _ in range(2):
            updates, state = update(gradient, state, params, batch=cases.FIRST, key=key)
            found.append(cases.flat(updates))
        return np.array(found)

    own = run(3)
    assert not np.allclose(own[0], own[1])
    np.testing.assert_array_equal(own, run(jax.random.key(3)))
    np.testing.assert_array_equal(own, run(7, key=3))  # the update's key comes first
    np.testing.assert_allclose(own, run(3, transform=jax.jit), rtol=1e-12)
    assert not np.allclose(own, run(4))
    with pytest.raises(ValueError, match="draws at random: build the optimiser with a"):
        run(None, key=3)
