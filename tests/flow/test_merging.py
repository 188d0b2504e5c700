"""Workers merge into the state of one machine, to 1e-12 (linear-Gaussian, full)."""

import functools
from operator import itemgetter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fisherflow_jax as ff
import streams

pytestmark = pytest.mark.usefixtures("strict_promotion")

CASES = [
    ("gaussian", "stationary", {}),
    ("gaussian", "stationary", {"compensated": True}),
    ("unknown", "stationary", {}),
    ("gaussian", "exponential", {}),
    ("unknown", "exponential", {}),
    ("gaussian", "unfloored", {}),
]
every_case = pytest.mark.parametrize(
    ("likelihood", "memory", "options"), CASES, ids=[f"{c[0]}-{c[1]}" for c in CASES]
)
PARTS = [slice(k, 24, 4) for k in range(4)]  # four workers, six rows each


def flow_of(likelihood, memory, options):
    return streams.flow("full", memory, likelihood, robust=True, **options)


def rows(part, step, size=3):
    """Batch `step` of a worker: `size` of its rows."""
    own = np.arange(24)[part][step * size : (step + 1) * size]
    return streams.INPUTS[own], streams.TARGETS[own], streams.WEIGHTS[own]


@functools.cache
def seen(likelihood, memory, options):
    """The start, four workers of two batches each, and one machine on the same data."""
    flow = flow_of(likelihood, memory, dict(options))
    # the common start has itself seen data
    start = streams.run(flow, streams.start(flow), [rows(slice(0, 24), 2)])[0]
    workers = [streams.run(flow, start, [rows(p, 0), rows(p, 1)])[-1] for p in PARTS]
    if memory == "stationary":
        batches = [rows(p, step) for step in (0, 1) for p in PARTS]
    else:  # parallel time: what arrives together is one batch
        batches = [
            tuple(map(np.concatenate, zip(*(rows(p, s) for p in PARTS), strict=True)))
            for s in (0, 1)
        ]
    return start, workers, streams.run(flow, start, batches)[-1]


def states_of(likelihood, memory, options):
    return seen(likelihood, memory, tuple(options.items()))


def check(state, expected, *names, rtol=1e-12):
    for name in names:
        x, y = getattr(state, name), getattr(expected, name)
        if name in ("information", "meat"):
            assert type(x) is type(y)
            x, y = streams.dense(x), streams.dense(y)
        elif name == "mean":
            x, y = streams.flat(x), streams.flat(y)
        np.testing.assert_allclose(x, y, rtol=rtol, atol=1e-12, err_msg=name)


@pytest.mark.slow_cases
@every_case
def test_four_workers_are_one_machine(likelihood, memory, options):
    start, workers, machine = states_of(likelihood, memory, options)
    merged = ff.merge(workers, start)
    check(merged, machine, "mean", "information", "count")
    if likelihood == "unknown":
        check(merged, machine, "residual", "dispersion", "degrees_of_freedom")
    if memory == "stationary":
        check(merged, machine, "log_evidence")
    jax.tree.map(lambda x, y: _same_aval(x, y), merged, machine)


def _same_aval(value, like):
    assert (value.shape, value.dtype) == (like.shape, like.dtype)


@every_case
def test_the_meat_is_the_sum_of_the_workers_own(likelihood, memory, options):
    start, workers, _ = states_of(likelihood, memory, options)
    keep = streams.DECAY**4 if memory != "stationary" else 1.0  # two updates, squared
    aged = keep * streams.dense(start.meat)
    added = [streams.dense(w.meat) - aged for w in workers]
    merged = ff.merge(workers, start)
    np.testing.assert_allclose(streams.dense(merged.meat), aged + sum(added))


def test_the_evidence_of_parallel_sites_integrates_over_all_of_them():
    """Exponential: the evidence of the workers' gains, taken from the aged start."""
    start, workers, _ = states_of("gaussian", "unfloored", {})
    merged = ff.merge(workers, start)
    # unfloored and at one common mean: each worker adds a Gaussian factor in theta
    aged = streams.DECAY**2 * streams.dense(start.information)
    center = streams.flat(start.mean)

    def log_gain(state):
        return float(state.log_evidence - start.log_evidence)

    # the factor's integral against the aged start is its gain: rebuild the product
    information, shift, constant = aged, np.zeros(3), 0.0
    for worker in workers:
        own = streams.dense(worker.information)
        move = streams.flat(worker.mean) - center
        information = information + own - aged
        shift = shift + own @ move
        constant += log_gain(worker) - 0.5 * move @ own @ move
        constant += 0.5 * (np.linalg.slogdet(own)[1] - np.linalg.slogdet(aged)[1])
    total = constant + 0.5 * shift @ np.linalg.solve(information, shift)
    total += 0.5 * (np.linalg.slogdet(aged)[1] - np.linalg.slogdet(information)[1])
    np.testing.assert_allclose(log_gain(merged), total, rtol=1e-10)


@pytest.mark.slow_cases
@every_case
def test_one_worker_is_itself(likelihood, memory, options):
    start, workers, _ = states_of(likelihood, memory, options)
    merged = ff.merge(workers[:1], start)
    check(merged, workers[0], "mean", "information", "count", "meat", "log_evidence")
    assert merged.step == workers[0].step


@pytest.mark.slow_cases
@pytest.mark.parametrize("likelihood", ["gaussian", "unknown"])
def test_an_empty_worker_adds_nothing(likelihood):
    start, workers, _ = states_of(likelihood, "stationary", {})
    merged = ff.merge([workers[0], start, workers[1]], start)
    names = "mean", "information", "count", "meat", "log_evidence"
    check(merged, ff.merge(workers[:2], start), *names)
    check(ff.merge([start, start], start), start, *names)


@pytest.mark.slow_cases
@every_case
def test_merging_is_commutative_and_associative(likelihood, memory, options):
    start, workers, _ = states_of(likelihood, memory, options)
    names = "mean", "information", "count", "meat", "log_evidence"
    merged = ff.merge(workers, start)
    check(ff.merge(workers[::-1], start), merged, *names, rtol=1e-11)
    pairs = [ff.merge(workers[:2], start), ff.merge(workers[2:], start)]
    check(ff.merge(pairs, start), merged, *names, rtol=1e-11)
    left = ff.merge([ff.merge(workers[:3], start), workers[3]], start)
    check(left, merged, *names, rtol=1e-11)


def test_workers_that_set_out_from_the_prior_share_its_mean():
    """Before any data a state's mean is where the search starts, not what it holds."""
    flow = flow_of("gaussian", "stationary", {})
    start = streams.start(flow)
    workers = [streams.run(flow, start, [rows(p, 0), rows(p, 1)])[-1] for p in PARTS]
    machine = streams.run(
        flow, start, [rows(p, step) for p in PARTS for step in (0, 1)]
    )[-1]
    check(ff.merge(workers, start), machine, "mean", "information", "log_evidence")
    # a worker that never came to work still holds the start of the search
    check(ff.merge([*workers, start], start), machine, "mean", "log_evidence")
    check(ff.merge([start, start], start), start, "mean", "information")


def test_skipped_batches_are_counted_once_each():
    start, workers, _ = states_of("gaussian", "stationary", {})
    workers = [w._replace(num_skipped=w.num_skipped + k) for k, w in enumerate(workers)]
    assert ff.merge(workers, start).num_skipped == 0 + 1 + 2 + 3


@pytest.mark.slow_cases
@pytest.mark.parametrize("memory", ["stationary", "exponential"])
def test_a_worker_that_is_not_finite_is_left_out_and_counted(memory):
    start, workers, _ = states_of("unknown", memory, {})
    lost = workers[1]._replace(mean=jax.tree.map(lambda x: x * np.nan, start.mean))
    others = [workers[0], *workers[2:]]
    expected = ff.merge(others, start)
    with pytest.warns(ff.DataWarning, match="left out, .*: model 1"):
        merged = ff.merge([workers[0], lost, *workers[2:]], start)
    traced = jax.jit(ff.merge)([workers[0], lost, *workers[2:]], start)
    names = "mean", "information", "count", "meat", "log_evidence", "residual"
    for found in (merged, traced):
        check(found, expected, *names)
        assert found.num_skipped == 1
        assert found.step == expected.step


def test_merging_works_under_jit():
    start, workers, machine = states_of("gaussian", "exponential", {})
    merged = jax.jit(ff.merge)(workers, start)
    check(merged, machine, "mean", "information", "count")


@pytest.mark.parametrize("memory", ["windowed", "adaptive", "random_walk"])
def test_memories_whose_states_are_no_sums_refuse(memory):
    flow = streams.flow("full", memory)
    start = streams.start(flow)
    with pytest.raises(TypeError, match="states do not merge"):
        ff.merge([start, start], start)


def test_exponential_workers_out_of_step_refuse():
    flow = flow_of("gaussian", "exponential", {})
    start, workers, _ = states_of("gaussian", "exponential", {})
    late = streams.run(flow, workers[0], [rows(PARTS[0], 0)])[-1]
    with pytest.raises(
        ValueError, match=r"same number of updates; theirs are \[2, 3\]"
    ):
        ff.merge([workers[1], late], start)


def test_what_does_not_belong_together_refuses():
    start, workers, _ = states_of("gaussian", "stationary", {})
    with pytest.raises(ValueError, match="at least one worker"):
        ff.merge([], start)
    other = streams.start(streams.flow("diagonal", "stationary"))
    with pytest.raises(ValueError, match="must come from one flow"):
        ff.merge([workers[0], other], start)


@pytest.mark.slow
def test_clients_under_one_vmap_merge_in_one_program():
    """Padded with rows of weight 0; a client of none adds nothing."""
    model = (lambda p, x: x @ p), ff.likelihoods.gaussian()
    flow = ff.fisher_flow(*model, prior_precision=0.3)
    rng = np.random.default_rng(2)
    counts = [5, 3, 0]
    x, y = rng.normal(size=(3, 5, 2)), rng.normal(size=(3, 5))
    weights = (np.arange(5) < np.array(counts)[:, None]).astype(float)
    start = flow.init(jnp.zeros(2))

    @jax.jit
    def run(x, y, weights):
        stack = jax.vmap(lambda *batch: flow.update(start, batch)[0])(x, y, weights)
        states = [jax.tree.map(itemgetter(k), stack) for k in range(3)]
        return ff.merge(states, start)

    merged = run(x, y, weights)
    rows = weights.ravel() > 0
    inputs, targets = x.reshape(-1, 2)[rows], y.ravel()[rows]
    total = inputs.T @ inputs + 0.3 * np.eye(2)
    expected = np.linalg.solve(total, inputs.T @ targets)
    np.testing.assert_allclose(merged.mean, expected, rtol=1e-9)
    assert merged.count == sum(counts)
