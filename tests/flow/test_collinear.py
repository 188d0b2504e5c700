"""Redundant columns in float32: all that the data determine is as in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fisherflow_jax as ff

RNG = np.random.default_rng(0)
NUMBER, ROWS, DECAY = 12, 10, 0.8
ONE, GROUP = np.ones(NUMBER * ROWS), np.arange(NUMBER * ROWS) % 3
X = RNG.normal(size=(NUMBER * ROWS, 2))
# a dummy trap, a column twice, a sum of columns, large and small units
DESIGNS = {
    "trap": np.column_stack([ONE, *(k == GROUP for k in range(3)), X[:, 0]]),
    "twice": np.column_stack([ONE, X, X[:, 0], X[:, 0] ** 2]),
    "sum": np.column_stack([ONE, X, X[:, 0] + X[:, 1], X[:, 0] ** 2]),
    "units": np.column_stack([ONE, 1e5 * X, 1e5 * X[:, 0], 1e-3 * X[:, 1] ** 2]),
}
TARGETS = X[:, 0] + RNG.normal(size=NUMBER * ROWS)
MEMORIES = {
    "stationary": ff.memories.stationary(),
    "windowed": ff.memories.windowed(2),
    "exponential": ff.memories.exponential(DECAY),
}
STRUCTURES = {
    "full": ff.structures.full(),
    "block": ff.structures.block(lambda path: "all"),
}
DETERMINED = {"trap": [4], "twice": [0, 2, 4], "sum": [0, 4], "units": [0, 2, 4]}


def linear(params, inputs):
    return inputs @ params


@functools.cache
def flow_of(memory, structure):
    return ff.fisher_flow(
        linear,
        ff.likelihoods.gaussian(None),
        memory=MEMORIES[memory],
        structure=STRUCTURES[structure],
        prior_precision=1e-9,
        robust=True,
    )


def cut(dtype, name=None):
    """Batches of one design, or of all."""
    chosen = list(DESIGNS.values()) if name is None else [DESIGNS[name]]
    inputs = np.stack(chosen).reshape(len(chosen), NUMBER, ROWS, -1)
    targets = np.broadcast_to(TARGETS.reshape(NUMBER, ROWS), inputs.shape[:3])
    pair = jnp.asarray(inputs, dtype), jnp.asarray(targets, dtype)
    return pair if name is None else jax.tree.map(lambda x: x[0], pair)


@functools.cache
def ended(memory, structure, dtype):
    flow = flow_of(memory, structure)

    def run(batches):
        return jax.lax.scan(flow.update, flow.init(jnp.zeros(5, dtype)), batches)[0]

    states = jax.jit(functools.partial(jax.lax.map, run))(cut(dtype))
    return {
        name: jax.tree.map(lambda x, i=i: x[i], states)
        for i, name in enumerate(DESIGNS)
    }


def least_squares(name, memory, rows=slice(None)):
    """Dispersion, and standard errors of what is determined, in numpy."""
    age = np.repeat(np.arange(NUMBER)[::-1], ROWS)
    weights = {"windowed": (age < 2) * 1.0, "exponential": DECAY**age}.get(memory, ONE)
    inputs, weights = DESIGNS[name][rows], weights[rows]
    length = np.linalg.norm(inputs, axis=0)
    scaled = inputs / length * np.sqrt(weights)[:, None]
    solution, _, rank, _ = np.linalg.lstsq(
        scaled, TARGETS[rows] * np.sqrt(weights), rcond=1e-10
    )
    left = TARGETS[rows] * np.sqrt(weights) - scaled @ solution
    dispersion = left @ left / (weights.sum() - rank)
    inverse = np.linalg.pinv(scaled.T @ scaled, rcond=1e-10)
    return dispersion, np.sqrt(dispersion * np.diag(inverse)) / length


@pytest.mark.slow
@pytest.mark.parametrize(
    ("memory", "structure"),
    [("stationary", "full"), ("windowed", "block"), ("exponential", "full")],
)
def test_dispersion_and_errors_of_what_is_determined(memory, structure):
    for name, state in ended(memory, structure, jnp.float32).items():
        dispersion, errors = least_squares(name, memory)
        np.testing.assert_allclose(state.dispersion, dispersion, 1e-2, err_msg=name)
        assert (state.num_skipped, state.events.searches_unfinished) == (0, 0)
        with pytest.warns(ff.DataWarning, match="collinear in float32"):
            found = np.asarray(ff.standard_error(state))
        at = DETERMINED[name]
        np.testing.assert_allclose(found[at], errors[at], 1e-2, err_msg=name)
        assert np.flatnonzero(np.isfinite(found)).tolist() == at, name
        robust = np.asarray(ff.standard_error(state, robust=True))
        assert np.flatnonzero(np.isfinite(robust)).tolist() == at, name
        wide = ended(memory, structure, jnp.float64)[name]
        np.testing.assert_allclose(wide.dispersion, dispersion, 1e-4, err_msg=name)
        expected = np.asarray(ff.standard_error(wide, robust=True))
        np.testing.assert_allclose(robust[at], expected[at], 2e-2, err_msg=name)


@pytest.mark.slow_cases
@pytest.mark.parametrize("name", ["trap", "sum"])
def test_eager_as_compiled_and_a_state_merged_or_refined_goes_on(name):
    flow, batches = flow_of("stationary", "full"), cut(jnp.float32, name)
    start = flow.init(jnp.zeros(5, jnp.float32))
    states = []
    for half in (0, 1):
        state = start
        for index in range(half, NUMBER, 2):
            state, _ = flow.update(state, jax.tree.map(lambda x: x[index], batches))  # noqa: B023
        states.append(state)
    merged = ff.merge(states, start)
    dispersion = least_squares(name, "stationary")[0]
    machine = ended("stationary", "full", jnp.float32)[name]
    for found in (merged, ff.refine(flow, merged, batches)):
        np.testing.assert_allclose(found.dispersion, dispersion, rtol=1e-2)
        at = np.array(DETERMINED[name])
        errors = [ff.standard_error(one)[at] for one in (found, machine)]
        np.testing.assert_allclose(*errors, rtol=1e-2)
        np.testing.assert_allclose(found.mean[at], machine.mean[at], atol=1e-3)
        # it goes on: nothing is refused after
        after, info = flow.update(found, jax.tree.map(lambda x: x[0], batches))
        assert not info.skipped and after.count == found.count + ROWS


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_a_dispersion_has_a_derivative_where_directions_are_hidden(dtype):
    state = ended("stationary", "full", dtype)["units"]

    def dispersion(prior):
        left = ff.structures.Scalar(prior)
        return state._replace(prior=state.prior._replace(precision=left)).dispersion

    assert np.isfinite(jax.jit(jax.grad(dispersion))(jnp.asarray(1e-9, dtype)))
