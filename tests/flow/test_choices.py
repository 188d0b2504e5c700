"""Equal choices are one flow: compiled once, traced once a shape, let go in the end."""

import functools
import gc
import logging
import weakref

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fisherflow_jax as ff
from fisherflow_jax.flow import Events

X = np.random.default_rng(0).normal(size=(6, 2))
Y = np.array([0, 1, 1, 0, 1, 0])


def linear(params, x):
    return x @ params


def other_linear(params, x):
    return x @ params


@pytest.fixture
def compilations(caplog):
    """The names of the programs compiled since the last call."""
    jax.config.update("jax_log_compiles", True)

    def since() -> list[str]:
        messages = [record.getMessage() for record in caplog.records]
        caplog.clear()
        return [m for m in messages if m.startswith("Finished XLA compilation of")]

    with caplog.at_level(logging.WARNING):
        yield since
    jax.config.update("jax_log_compiles", False)


OPTIONS = {
    "defaults": dict,
    "factories": lambda: {
        "structure": ff.structures.diagonal(),
        "memory": ff.memories.exponential(0.9),
        "estimator": ff.estimators.hutchinson(num_probes=8),
        "num_steps": 1,
    },
    "arrays, a partial": lambda: {
        "estimator": functools.partial(ff.estimators.exact, chunk_size=2),
        "prior_precision": np.array([2.0, 3.0]),
        "memory": ff.memories.random_walk(np.eye(2)),
        "num_steps": 1,
    },
    "a window, robust": lambda: {"memory": ff.memories.windowed(3), "robust": True},
    "a marginal": lambda: {"structure": ff.structures.diagonal(), "marginal": True},
}


@pytest.mark.slow_cases
@pytest.mark.parametrize("name", list(OPTIONS))
def test_a_second_flow_of_equal_choices_compiles_nothing(name, compilations):
    traces = []
    chex.clear_trace_counter()

    # of the batch and of one example, each once an update and once an evaluation
    @chex.assert_max_traces(n=4)
    def apply_fn(params, x):
        traces.append(jnp.shape(x))
        return x @ params

    def run():
        flow = ff.fisher_flow(apply_fn, ff.likelihoods.bernoulli(), **OPTIONS[name]())
        state = flow.init(jnp.zeros(2), key=0)
        state, info = flow.update(state, (X, Y))
        return flow.evaluate(state.mean, (X, Y), key=0), state, info

    first = run()
    assert compilations()
    traces.clear()
    second = run()
    assert compilations() == []
    assert traces == []
    chex.assert_trees_all_equal(first, second)


def test_other_choices_are_other_flows():
    def number(**options):
        flow = ff.fisher_flow(linear, ff.likelihoods.bernoulli(), **options)
        return id(flow.init.args[0])

    ways = [
        {},
        {"prior_precision": 2.0},
        {"prior_precision": np.array([1.0, 2.0])},
        {"prior_precision": np.array([1.0, 3.0])},
        {"num_steps": 1},
        {"robust": True},
        {"memory": ff.memories.exponential(0.9)},
        {"memory": ff.memories.exponential(0.8)},
        {"estimator": ff.estimators.exact(chunk_size=2)},
    ]
    kept = [ff.fisher_flow(linear, ff.likelihoods.bernoulli(), **way) for way in ways]
    assert len({number(**way) for way in ways}) == len(ways) == len(kept)


def test_a_model_and_a_likelihood_are_enough():
    flow = ff.fisher_flow(linear, ff.likelihoods.bernoulli())
    explicit = ff.fisher_flow(
        linear,
        ff.likelihoods.bernoulli(),
        structure=ff.structures.full(),
        memory=ff.memories.stationary(),
    )
    assert flow.update.args[0] is explicit.update.args[0]
    state, _ = flow.update(flow.init(jnp.zeros(2)), (X, Y))
    assert isinstance(state.information, ff.structures.Full)


def test_a_flow_prints_its_choices():
    flow = ff.fisher_flow(
        linear, ff.likelihoods.bernoulli(), memory=ff.memories.exponential(0.99)
    )
    assert repr(flow).startswith("fisher_flow(linear, ")
    assert repr(flow).endswith("memory=exponential(0.99))")
    memories = [
        ff.memories.stationary(),
        ff.memories.windowed(3),
        ff.memories.random_walk(0.1),
        ff.memories.adaptive(1000),
    ]
    assert str(memories) == (
        "[stationary(), windowed(3), random_walk(0.1), adaptive(1000)]"
    )


def test_a_bound_estimator_is_of_this_flow_or_refused_by_name():
    likelihood, full = ff.likelihoods.bernoulli(), ff.structures.full()
    own = ff.estimators.exact(linear, likelihood, full)
    flow = ff.fisher_flow(linear, likelihood, estimator=own)
    plain = ff.fisher_flow(linear, likelihood)
    results = [f.update(f.init(jnp.zeros(2)), (X, Y))[0].mean for f in (flow, plain)]
    np.testing.assert_array_equal(*results)
    for apply_fn, given, structure, what in (
        (other_linear, likelihood, full, "apply_fn, linear, than the one here"),
        (
            linear,
            ff.likelihoods.poisson(),
            full,
            "exact is bound to another likelihood",
        ),
        (linear, likelihood, ff.structures.diagonal(), "to another structure"),
    ):
        with pytest.raises(ValueError, match=what):
            ff.fisher_flow(apply_fn, given, structure=structure, estimator=own)


def test_a_model_without_a_hash_compares_by_identity():
    class Model:
        __hash__ = None

        def __call__(self, params, x):
            return x @ params

    one, other = Model(), Model()
    likelihood = ff.likelihoods.bernoulli()
    recipes = [ff.fisher_flow(m, likelihood).init.args[0] for m in (one, one, other)]
    assert recipes[0] is recipes[1] is not recipes[2]
    own = ff.estimators.exact(one, likelihood, ff.structures.full())
    flow = ff.fisher_flow(one, likelihood, estimator=own)
    state, _ = flow.update(flow.init(jnp.zeros(2)), (X, Y))
    assert np.isfinite(state.log_evidence)


@pytest.mark.slow
def test_flows_over_closures_of_a_megabyte_are_let_go():
    class Weights:
        def __init__(self):
            self.values = np.ones((1 << 16, 2))  # 1 MB

    alive, batch = [], (X, Y * 1.0)
    for number in range(34):
        weights = Weights()
        alive.append(weakref.ref(weights))

        def apply_fn(params, x, weights=weights):
            return x @ (params * weights.values[0])

        flow = ff.fisher_flow(apply_fn, ff.likelihoods.gaussian(), num_steps=1)
        # traced, as compiling 34 programs would take long; the last 32 have to take
        # the place of the first two, no more
        if number < 2:
            jax.eval_shape(flow.update, flow.init(jnp.zeros(2)), batch)
    del weights, apply_fn, flow
    gc.collect()
    assert [one() is not None for one in alive[:2]] == [False, False]


def least_squares(what, number):
    """The same sum of the final mean, in numpy."""
    prior = number * np.eye(2) if what == "prior" else np.eye(2)
    scale = number if what == "model" else 1.0
    information, shift = prior, np.zeros(2)
    for rows in (slice(0, 3), slice(3, 6)):
        if what == "decay":
            information = number * information + (1 - number) * prior
            shift = number * shift
        elif what == "noise":
            mean = np.linalg.solve(information, shift)
            moved = np.linalg.inv(information) + number * np.eye(2)
            information = np.linalg.inv(moved)
            shift = information @ mean
        information = information + scale**2 * X[rows].T @ X[rows]
        shift = shift + scale * X[rows].T @ Y[rows]
    return np.linalg.solve(information, shift).sum()


@pytest.mark.slow_cases
@pytest.mark.parametrize("what", ["decay", "prior", "noise", "model"])
def test_a_traced_number_is_inlined_and_differentiated(what):
    def final_mean(number):
        options = {
            "decay": lambda: {"memory": ff.memories.exponential(number)},
            "prior": lambda: {"prior_precision": number},
            "noise": lambda: {"memory": ff.memories.random_walk(number)},
            "model": dict,
        }[what]()
        scale = number if what == "model" else 1.0
        flow = ff.fisher_flow(
            lambda params, x: scale * (x @ params),
            ff.likelihoods.gaussian(),
            num_steps=1,
            **options,
        )
        state = flow.init(jnp.zeros(2))
        for rows in (slice(0, 3), slice(3, 6)):
            state, _ = flow.update(state, (X[rows], 1.0 * Y[rows]))
        return state.mean.sum()

    step = 1e-5
    ends = [least_squares(what, 0.7 + move) for move in (step, -step)]
    slope = (ends[0] - ends[1]) / (2 * step)
    program = jax.jit(jax.value_and_grad(final_mean)).lower(0.7)
    value, found = program.compile()(0.7)
    np.testing.assert_allclose(value, least_squares(what, 0.7), rtol=1e-9)
    np.testing.assert_allclose(found, slope, rtol=1e-6)
    assert "take_in" not in program.as_text()  # no function apart
    if what == "model":  # eagerly too, each operation a program of its own
        np.testing.assert_allclose(jax.grad(final_mean)(0.7), slope, rtol=1e-6)


@pytest.mark.slow
def test_noise_may_depend_on_the_batch():
    def gap(batch):
        return 0.1 * batch.weights.sum()

    flows = [
        ff.fisher_flow(
            linear,
            ff.likelihoods.gaussian(),
            memory=ff.memories.random_walk(noise),
        )
        for noise in (gap, 0.6)
    ]
    means = [f.update(f.init(jnp.zeros(2)), (X, 1.0 * Y))[0].mean for f in flows]
    np.testing.assert_allclose(*means, rtol=1e-12)


def test_an_info_carries_no_information():
    flow = ff.fisher_flow(
        linear, ff.likelihoods.bernoulli(), memory=ff.memories.adaptive(100.0)
    )
    _, info = jax.eval_shape(flow.update, flow.init(jnp.zeros(2)), (X, Y))
    assert {jnp.shape(leaf) for leaf in jax.tree.leaves(info)} == {()}


@pytest.mark.slow
def test_a_state_counts_searches_that_did_not_finish():
    flow = ff.fisher_flow(linear, ff.likelihoods.poisson(), prior_precision=1e-6)
    # the first update goes on until it is done, and a later one takes two steps
    state, _ = flow.update(flow.init(jnp.zeros(2)), (X, np.ones(6)))
    assert state.events == Events(0, 0, 0)
    batch = (X, 4e6 * np.ones(6))
    short, _ = flow.update(state, batch, num_steps=2)
    assert short.events == Events(0, 0, 1)
    long, _ = flow.update(state, batch, num_steps=50)
    assert long.events == Events(0, 0, 0)
    merged = ff.merge([short, short], state)
    assert merged.events.searches_unfinished == 2
