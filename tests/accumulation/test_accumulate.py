"""Sums and averages over batches: against one call, by hand, stopped and resumed."""

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import estimator_cases as cases
import fisherflow_jax as ff
from estimator_cases import NAMED, fisher, network_params
from fisherflow_jax.accumulation import Accumulation, Stacked, accumulate, accumulator

MODEL = NAMED["categorical"]
PARAMS, (X, Y) = MODEL.params, MODEL.batch
COUNT = len(Y)
TRACES = []


def counted(params, x):
    TRACES.append(x.shape)
    return MODEL.apply_fn(params, x)


@functools.cache
def estimator(name, structure="diagonal", apply_fn=MODEL.apply_fn):
    factory = getattr(ff.estimators, name)
    return factory(apply_fn, MODEL.likelihood, getattr(ff.structures, structure)())


EXACT, DRAWN = estimator("exact"), estimator("hutchinson")
drawn, add = jax.jit(DRAWN), jax.jit(ff.information.add)


def is_tuple(x):
    return isinstance(x, tuple)


def exact_diagonal(multiplicities):
    """From explicit Jacobians, like the parameters."""
    flat, leaves = np.diag(fisher("categorical", multiplicities)), []
    shapes, tree = jax.tree.flatten(jax.tree.map(np.shape, PARAMS), is_tuple)
    for shape in shapes:
        size = math.prod(shape)
        leaves.append(flat[:size].reshape(shape))
        flat = flat[size:]
    return jax.tree.unflatten(tree, leaves)


def of_rows(rows):
    return np.bincount(np.concatenate(rows), minlength=COUNT)


def cut(*ends):
    """The examples as a list of batches that end there."""
    return [(X[a:b], Y[a:b]) for a, b in itertools.pairwise((0, *ends))]


def stacked(rows=3, weights=None):
    order = np.arange(2 * rows) % COUNT
    shape = 2, rows
    part = X[order].reshape((*shape, -1)), Y[order].reshape(shape)
    return Stacked(*part, weights), [(part[0][i], part[1][i]) for i in range(2)]


def assert_equal(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    jax.tree.map(np.testing.assert_array_equal, left, right)


def assert_close(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-10, atol=1e-13),
        left,
        right,
    )


# ---- sums


@pytest.mark.slow_cases
@pytest.mark.parametrize("structure", ["scalar", "diagonal", "full"])
def test_a_sum_over_batches_is_the_information_of_all_examples(structure):
    state = accumulate(estimator("exact", structure), PARAMS, cut(3, 6, COUNT))
    dense = cases.dense(state.information, PARAMS)
    expected = fisher("categorical")
    if structure == "scalar":
        expected = np.eye(len(dense)) * np.trace(expected) / len(dense)
    elif structure == "diagonal":
        expected = np.diag(np.diag(expected))
    np.testing.assert_allclose(dense, expected, rtol=1e-9, atol=1e-12)
    assert (state.count, state.num_batches, state.num_skipped) == (COUNT, 3, 0)


def test_weights_are_multiplicities_and_zero_is_padding():
    weights = np.array([2.0, 0.0, 1.0])
    spoiled = np.where(weights[:, None] > 0, X[:3], np.nan)
    weighed = accumulate(EXACT, PARAMS, [(spoiled, Y[:3], weights), cut(3, 6)[1]])
    expected = exact_diagonal([2, 0, 1, 1, 1, 1, 0])
    assert_close(weighed.information.entries, expected)
    assert weighed.count == 6


def test_the_average_is_taken_after_squaring():
    state = accumulate(DRAWN, PARAMS, cut(3, 5), key=3)
    assert_close(
        state.average.entries,
        jax.tree.map(lambda x: np.asarray(x) / 5, state.information.entries),
    )


# ---- keys


def test_batch_t_draws_from_its_own_key():
    state = accumulate(DRAWN, PARAMS, cut(3, 6), key=11)
    parts = [
        drawn(PARAMS, batch, jax.random.fold_in(jax.random.key(11), t))
        for t, batch in enumerate(cut(3, 6))
    ]
    assert_close(state.information, add(*parts))


@pytest.mark.parametrize("name", ["exact", "hutchinson"])
def test_stopped_and_resumed_is_one_run_bit_for_bit(name, tmp_path):
    key = None if name == "exact" else jax.random.key(5)
    batches = cut(3, 6, COUNT)
    whole = accumulate(estimator(name), PARAMS, batches, key, decay=0.9)
    part = accumulate(estimator(name), PARAMS, batches[:1], key, decay=0.9)
    # through a file, as a run that was interrupted
    leaves, tree = jax.tree.flatten(part)
    np.savez(tmp_path / "state.npz", *leaves)
    with np.load(tmp_path / "state.npz") as saved:
        restored = jax.tree.unflatten(tree, [saved[name] for name in saved.files])
    resumed = accumulate(
        estimator(name), PARAMS, iter(batches[1:]), decay=0.9, state=restored
    )
    assert_equal(resumed, whole)
    assert whole.num_batches == 3


def test_orbax_saves_and_restores_it(tmp_path):
    checkpoint = pytest.importorskip("orbax.checkpoint")
    state = accumulate(DRAWN, PARAMS, cut(3), key=0)
    with checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        like = accumulator(DRAWN).init(PARAMS, 1)
        assert_equal(checkpointer.restore(tmp_path / "state", like), state)


# ---- one program


def test_ragged_batches_compile_nothing_anew():
    rows = [np.arange(n) for n in (5, 5, 3, 1, 5)]
    batches = [(X[r], Y[r]) for r in rows]
    counting = estimator("exact", apply_fn=counted)
    TRACES.clear()
    state = accumulate(counting, PARAMS, batches)
    traced = len(TRACES)
    assert {shape[0] for shape in TRACES} <= {1, 5}
    assert state.count == 19
    accumulate(counting, PARAMS, batches)  # nor does another run
    assert len(TRACES) == traced
    assert_close(state.information.entries, exact_diagonal(of_rows(rows)))


@pytest.mark.parametrize("name", ["exact", "hutchinson"])
def test_stacked_batches_equal_a_loader(name):
    key = None if name == "exact" else 7
    weights = np.array([[1.0, 0.5, 1.0], [2.0, 1.0, 0.0]])
    stack, batches = stacked(weights=weights)
    scanned = accumulate(estimator(name), PARAMS, stack, key)
    looped = accumulate(
        estimator(name),
        PARAMS,
        [(*batch, w) for batch, w in zip(batches, weights, strict=True)],
        key,
    )
    assert_close(scanned, looped)
    assert scanned.count == weights.sum()


def test_shared_parts_stay_whole_in_stack_loader_and_mesh():
    def apply_fn(params, inputs):
        return MODEL.apply_fn(params, inputs["x"] - inputs["center"])

    shared = ff.estimators.exact(apply_fn, MODEL.likelihood, ff.structures.diagonal())
    center = np.array([0.5, -0.5, 0.25])
    stack, batches = stacked()

    def inputs(x):
        return {"x": x, "center": ff.Shared(center)}

    mesh = jax.make_mesh((3,), ("data",), devices=jax.devices()[:3])
    expected = accumulate(EXACT, PARAMS, [(x - center, y) for x, y in batches])
    loader = [(inputs(x), y) for x, y in batches]
    whole = Stacked(inputs(stack.inputs), stack.targets)
    for devices, source in {None: loader, mesh: whole}.items():
        state = accumulate(shared, PARAMS, source, mesh=devices)
        assert_close(state.information, expected.information)


def test_it_runs_under_jit_and_vmap():
    stack, _ = stacked()

    def average(scale):
        params = jax.tree.map(lambda x: x * scale, PARAMS)
        return accumulate(DRAWN, params, stack, 3).average

    both = jax.jit(jax.vmap(average))(jnp.array([1.0, 0.5]))
    alone = accumulate(DRAWN, PARAMS, stack, 3)
    alone = jax.tree.map(lambda x: np.asarray(x) / 6, alone.information)
    assert_close(jax.tree.map(lambda x: np.asarray(x)[0], both), alone)


# ---- discounting


def test_decay_discounts_sum_and_count_alike():
    state = accumulate(EXACT, PARAMS, cut(3, 6, COUNT), decay=0.5)
    discounted = np.array([0.25, 0.25, 0.25, 0.5, 0.5, 0.5, 1])
    assert_close(state.information.entries, exact_diagonal(discounted))
    np.testing.assert_allclose(state.count, discounted.sum())


def test_the_average_of_a_constant_is_the_constant_from_the_first_step():
    gather = accumulator(EXACT, decay=0.9)
    state, rows = gather.init(PARAMS), np.zeros(3, int)
    constant = exact_diagonal([1, 0, 0, 0, 0, 0, 0])
    for weights in ([0, 1, 0], [1, 1, 1], [0.5, 0, 2]):  # batches of different size
        batch = X[rows], Y[rows], np.asarray(weights, float)
        state = gather.update(state, PARAMS, batch)
        assert_close(state.average.entries, constant)


# ---- what is not finite


@pytest.mark.parametrize("decay", [None, 0.5])
@pytest.mark.parametrize("source", ["loader", "stacked"])
def test_a_bad_row_is_left_out_and_counted(source, decay):
    stack, batches = stacked()
    spoiled = stack.inputs.copy()
    spoiled[0, 1, 2] = np.inf
    given = [(spoiled[0], stack.targets[0]), batches[1]]
    if source == "stacked":
        given = Stacked(spoiled, stack.targets)
    run = functools.partial(accumulate, DRAWN, PARAMS, given, 5, decay=decay)
    state = run(bad_rows="drop")
    assert (state.num_batches, state.num_skipped, state.rows_skipped) == (2, 0, 1)
    weights = np.array([[1.0, 0, 1], [1, 1, 1]])
    expected = accumulate(
        DRAWN, PARAMS, Stacked(stack.inputs, stack.targets, weights), 5, decay=decay
    )
    assert state.count == expected.count == 2 * (decay or 1) + 3
    assert_close(state.information, expected.information)
    with pytest.raises(ValueError, match=r"row 1 of batch 0 has inputs\[1, 2\] = inf"):
        run()


STEEP = ff.estimators.exact(
    lambda params, x: x * params, ff.likelihoods.gaussian(), ff.structures.scalar()
)


def test_a_target_that_is_not_finite_counts_though_no_label_is_read():
    batches = [(np.ones(1), np.full(1, np.nan))]
    state = accumulate(STEEP, np.ones(()), batches, bad_rows="drop")
    assert (state.information.value, state.count, state.rows_skipped) == (0, 0, 1)


def test_an_estimator_built_by_hand_may_take_rows_together():
    """Nothing says that a row can be left out: the batch is refused, and counted."""
    by_hand = dataclasses.replace(EXACT, compute=EXACT.compute)
    spoiled = X.copy()
    spoiled[2, 0] = np.nan
    batches = [(spoiled, Y), (X, Y)]
    state = accumulate(by_hand, PARAMS, batches, bad_rows="drop")
    assert (state.num_skipped, state.rows_skipped, state.count) == (1, 0, COUNT)
    with pytest.raises(ValueError, match=r"row 2 of batch 0.*inputs\[2, 0\]"):
        accumulate(by_hand, PARAMS, batches)


def test_an_estimate_that_overflows_is_skipped():
    batches = [(np.full(1, x), np.zeros(1)) for x in (1e200, 2.0)]
    state = accumulate(STEEP, np.ones(()), batches)
    assert (state.information.value, state.count, state.num_skipped) == (4, 1, 1)


def test_nothing_gathered_has_no_average():
    state = accumulator(EXACT).init(PARAMS)
    assert np.isnan(state.average.entries["out"]).all()


# ---- precision


def test_an_accumulation_keeps_float32_of_half_precision_parameters():
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), network_params(3))
    x = X.astype(jnp.bfloat16)
    with jax.enable_x64(False):
        state = accumulate(EXACT, params, [(x, Y), (x[:3], Y[:3])])
    dtypes = {leaf.dtype.name for leaf in jax.tree.leaves(state.information)}
    assert dtypes == {"float32"}
    assert isinstance(state, Accumulation)


# ---- devices


def mesh_of(*shape):
    names = "abc"[: len(shape)]
    devices = np.array(jax.devices()[: np.prod(shape)]).reshape(shape)
    return jax.sharding.Mesh(devices, tuple(names))


@pytest.mark.parametrize("structure", ["diagonal", "full"])
def test_shards_of_an_exact_information_add_to_one_device(structure):
    exact = estimator("exact", structure)
    batches = cut(3, 6, COUNT)  # padded to four rows, one a device
    one, four = (accumulate(exact, PARAMS, batches, mesh=m) for m in (None, mesh_of(4)))
    assert_close(one, four)


@pytest.mark.parametrize("explicit", [False, True])
def test_every_shard_is_squared_with_its_own_key(explicit):
    mesh = jax.make_mesh((2, 2), ("a", "b")) if explicit else mesh_of(2, 2)
    rows = np.arange(8) % COUNT
    x, y = X[rows], Y[rows]
    key = jax.random.fold_in(jax.random.key(2), 0)
    parts = [
        drawn(PARAMS, (x[s], y[s]), jax.random.fold_in(key, i))
        for i, s in enumerate(np.split(np.arange(8), 4))
    ]
    expected = functools.reduce(add, parts)
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(("a", "b")))
    for batch in ((x, y), jax.device_put((x, y), spread)):
        state = accumulate(DRAWN, PARAMS, [batch], 2, mesh=mesh)
        assert_close(state.information, expected)


def test_a_structure_that_does_not_add_by_entries_is_gathered():
    low_rank = ff.estimators.exact(
        MODEL.apply_fn, MODEL.likelihood, ff.structures.low_rank(20)
    )
    state = accumulate(low_rank, PARAMS, cut(4, COUNT), mesh=mesh_of(2))
    dense = cases.dense(state.information, PARAMS)
    np.testing.assert_allclose(dense, fisher("categorical"), rtol=1e-8, atol=1e-10)


def test_directions_of_all_devices_are_compressed_once():
    low_rank = ff.estimators.exact(
        MODEL.apply_fn, MODEL.likelihood, ff.structures.low_rank(2)
    )
    one, two = (
        cases.dense(
            accumulate(low_rank, PARAMS, cut(4, COUNT), mesh=m).information, PARAMS
        )
        for m in (None, mesh_of(2))
    )
    assert np.abs(one - fisher("categorical")).max() > 1e-2  # two directions lose some
    np.testing.assert_allclose(two, one, rtol=1e-8, atol=1e-10)


def test_several_devices_compile_once():
    counting = estimator("empirical", apply_fn=counted)
    TRACES.clear()
    accumulate(counting, PARAMS, cut(4), mesh=mesh_of(4))
    traced = len(TRACES)
    accumulate(counting, PARAMS, cut(4, 6, COUNT) * 2, mesh=mesh_of(4))
    assert len(TRACES) == traced


@pytest.mark.slow
@pytest.mark.parametrize("kind", [list, iter])
def test_a_loader_of_dicts_is_read_through_to_batch(kind):
    loader = cut(3, 6, COUNT)
    dicts = kind([{"x": x, "y": y} for x, y in loader])
    result = accumulate(
        EXACT, PARAMS, dicts, to_batch=lambda item: (item["x"], item["y"])
    )
    assert_equal(result, accumulate(EXACT, PARAMS, loader))
