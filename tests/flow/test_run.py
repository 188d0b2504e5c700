"""Streams through `ff.run`: against a plain loop, interrupted, resumed, in error."""

import shutil
import warnings
from operator import itemgetter

import grain
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

import fisherflow_jax as ff

ROWS, SIZE, DIMENSION = 150, 16, 3  # the last of ten batches is shorter
RNG = np.random.default_rng(0)
X = RNG.normal(size=(ROWS, DIMENSION)).astype(np.float32)
Y = (RNG.random(ROWS) < 1 / (1 + np.exp(-X[:, 0]))).astype(np.float32)
LOADER = [(X[i : i + SIZE], Y[i : i + SIZE]) for i in range(0, ROWS, SIZE)]


def linear(params, x):
    return x @ params


def made(likelihood=None, **options):
    return ff.fisher_flow(linear, likelihood or ff.likelihoods.bernoulli(), **options)


FLOW, FADING = made(), made(memory=ff.memories.exponential(0.9))
DRAWING = made(structure=ff.structures.diagonal(), estimator=ff.estimators.hutchinson)
BANK = ff.bank([FLOW, FADING])


def begun(flow=FLOW, dimension=DIMENSION):
    return flow.init(np.zeros(dimension, np.float32), key=3)


def looped(flow, state, loader=LOADER):
    for batch in loader:
        state, _ = flow.update(state, batch)
    return state


def assert_equal(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, one, other)


def manager(folder, every=1, keep=None):
    options = ocp.CheckpointManagerOptions(save_interval_steps=every, max_to_keep=keep)
    return ocp.CheckpointManager(folder, options=options)


class Interrupted(Exception):
    pass


# ---- what it is


@pytest.mark.slow_cases
@pytest.mark.parametrize("flow", [FLOW, FADING, DRAWING, BANK])
def test_it_is_a_loop_over_updates(flow):
    state = begun(flow)
    after = ff.run(flow, state, LOADER)
    expected = looped(flow, state)
    assert jax.tree.structure(after) == jax.tree.structure(expected)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-4, atol=1e-5),
        (after.mean, ff.standard_error(after)),
        (expected.mean, ff.standard_error(expected)),
    )
    assert_equal(state, begun(flow))  # what was given is there still


def test_a_ragged_stream_is_one_program():
    traced = []

    def noting(params, x):
        traced.append(x.shape)
        return x @ params

    flow = ff.fisher_flow(noting, ff.likelihoods.bernoulli())
    state = flow.init(np.zeros(DIMENSION, np.float32))
    ff.run(flow, state, LOADER[:1])
    count = len(traced)
    ragged = [LOADER[0], LOADER[-1], (X[:3], Y[:3]), LOADER[1]]
    after = ff.run(flow, state, ragged)
    assert len(traced) == count
    assert after.count == 2 * SIZE + len(LOADER[-1][1]) + 3
    # another flow of equal choices compiles nothing either
    again = ff.fisher_flow(noting, ff.likelihoods.bernoulli())
    ff.run(again, state, ragged)
    assert len(traced) == count


def test_a_stack_in_a_file_and_other_loaders(tmp_path):
    count = ROWS // SIZE * SIZE
    np.save(tmp_path / "x.npy", X[:count].reshape(-1, SIZE, DIMENSION))
    x = np.load(tmp_path / "x.npy", mmap_mode="r")
    stacked = ff.Stacked(x, Y[:count].reshape(-1, SIZE))
    after = ff.run(FLOW, begun(), stacked)
    assert_equal(after, ff.run(FLOW, begun(), LOADER[:-1]))
    assert_equal(after, ff.run(FLOW, begun(), iter(LOADER[:-1])))
    items = [{"x": x, "y": y} for x, y in LOADER[:-1]]
    pairs = ff.run(FLOW, begun(), items, to_batch=itemgetter("x", "y"))
    assert_equal(after, pairs)


def aligned(shape):
    """Memory that JAX takes over without a copy, where it may."""
    raw = np.zeros(4 * np.prod(shape) + 64, np.uint8)
    start = -raw.__array_interface__["data"][0] % 64
    return raw[start : start + 4 * np.prod(shape)].view(np.float32).reshape(shape)


def test_a_loader_may_write_over_its_own_memory():
    def overwriting():
        x, y = aligned(X[:SIZE].shape), aligned((SIZE,))
        for own, labels in LOADER[:-1]:
            x[:], y[:] = own, labels
            yield x, y
        x[:], y[:] = np.nan, np.nan

    state = ff.run(FLOW, begun(), overwriting())
    assert_equal(state, ff.run(FLOW, begun(), LOADER[:-1]))


def test_one_update_is_in_flight_when_the_loader_is_asked(monkeypatch):
    """By the order of events: a batch is heard of after the next is sent."""
    from fisherflow_jax.accumulation import drive

    events = []

    def loader():
        for number in range(4):
            events.append(f"read {number}")
            yield ff.Batch(np.zeros(1), None)

    def step(state, batch):
        events.append(f"sent {state}")
        return state + 1, state

    drive(step, 0, loader(), lambda number, *_: events.append(f"heard {number}"))
    expected = ["read 0", "sent 0"]
    for number in range(1, 4):
        expected += [f"read {number}", f"sent {number}", f"heard {number - 1}"]
    assert events == [*expected, "heard 3"]


def test_reports_are_told_in_order():
    infos = []
    after = ff.run(FLOW, begun(), LOADER, report=infos.append)
    assert len(infos) == len(LOADER)
    total = sum(float(info.log_evidence) for info in infos)
    np.testing.assert_allclose(total, after.log_evidence, rtol=1e-5)
    assert isinstance(infos[0].log_evidence, np.ndarray | np.generic)


@pytest.mark.slow
def test_over_a_mesh():
    mesh = jax.make_mesh((4,), ("data",))
    state = ff.run(FLOW, begun(), LOADER, mesh=mesh)
    assert len(state.mean.sharding.device_set) == 4
    alone = ff.run(FLOW, begun(), LOADER)
    np.testing.assert_allclose(state.mean, alone.mean, rtol=1e-5, atol=1e-6)


# ---- interrupted and resumed


class Torchlike:
    """Says itself where it stands, in what JSON does not keep; of its end it says that
    it begins anew, as torchdata's StatefulDataLoader."""

    def __init__(self):
        self.at = 0

    def __iter__(self):
        for index in range(self.at, len(LOADER)):
            self.at = index + 1
            yield LOADER[index]
        self.at = 0

    def __len__(self):
        return len(LOADER)

    def state_dict(self):
        return {0: (self.at, b"")}

    def load_state_dict(self, state):
        self.at = state[0][0]


def shuffled():
    order = grain.MapDataset.range(ROWS).shuffle(seed=5)
    rows = order.map(lambda i: (X[i], Y[i]))
    return rows.batch(SIZE).to_iter_dataset()


KINDS = {
    "list": lambda: LOADER,
    "generator": lambda: (batch for batch in LOADER),
    "grain": shuffled,
    "its iterator": lambda: iter(shuffled()),
    "torchdata": Torchlike,
}


def interrupted(number):
    """A `to_batch` that fails at its call of this number."""
    calls = []

    def to_batch(item):
        calls.append(item)
        if len(calls) > number:
            raise Interrupted
        return item

    return to_batch


@pytest.mark.slow_cases
@pytest.mark.parametrize("kind", KINDS)
def test_interrupted_and_resumed_is_one_run_bit_for_bit(kind, tmp_path):
    flow = DRAWING
    whole = ff.run(flow, begun(flow), KINDS[kind]())
    rng = np.random.default_rng(len(kind))
    for trial in range(2):  # of five kinds: ten interruptions
        folder, stop = tmp_path / str(trial), int(rng.integers(1, len(LOADER)))
        for number in (stop, 0):  # and at once again
            kept = manager(folder, every=int(rng.integers(1, 4)), keep=2)
            with pytest.raises(Interrupted):
                ff.run(
                    flow,
                    begun(flow),
                    KINDS[kind](),
                    checkpoint=kept,
                    to_batch=interrupted(number),
                )
        kept = manager(folder)
        resumed = ff.run(flow, begun(flow), KINDS[kind](), checkpoint=kept)
        assert_equal(resumed, whole)
        assert kept.latest_step() == len(LOADER)
        again = ff.run(flow, begun(flow), KINDS[kind](), checkpoint=manager(folder))
        assert_equal(again, whole)  # it was at its end


def test_it_goes_on_among_long_batches_after_a_short_one(tmp_path):
    """Resumed at a batch that is shorter than the longest, it is padded as before."""
    rows = []

    def noting(params, x):
        rows.append(len(x))
        return x @ params

    flow = ff.fisher_flow(noting, ff.likelihoods.bernoulli())
    loader = [LOADER[0], (X[:7], Y[:7]), (X[7:14], Y[7:14])]
    whole = ff.run(flow, begun(flow), loader)
    ff.run(flow, begun(flow), loader[:2], checkpoint=manager(tmp_path / "a"))
    resumed = ff.run(flow, begun(flow), loader, checkpoint=manager(tmp_path / "a"))
    assert_equal(resumed, whole)
    assert 7 not in rows


@pytest.mark.slow
def test_a_bank_is_resumed(tmp_path):
    ff.run(BANK, begun(BANK), LOADER[:4], checkpoint=manager(tmp_path / "a"))
    resumed = ff.run(BANK, begun(BANK), LOADER, checkpoint=manager(tmp_path / "a"))
    assert_equal(resumed, ff.run(BANK, begun(BANK), LOADER))


# ---- errors


def test_checkpoints_of_another_run_are_refused(tmp_path):
    folder = tmp_path / "a"
    ff.run(FLOW, begun(), LOADER[:3], checkpoint=manager(folder))
    for flow, state, words in (
        (FLOW, begun(dimension=4), r"its mean is float32\[3\].*float32\[4\]"),
        (FADING, begun(FADING), "memory"),
        (made(ff.likelihoods.poisson()), None, "bernoulli.*this one's is poisson"),
        (made(prior_precision=7.0), None, "prior_precision is 1.0, and .* is 7.0"),
        (made(num_steps=1), None, "num_steps is 10, and .* is 1"),
        (FLOW, looped(FLOW, begun()), "with 0 updates.*one with 10"),
    ):
        with pytest.raises(ValueError, match=words):
            ff.run(
                flow,
                begun(flow) if state is None else state,
                LOADER,
                checkpoint=manager(folder),
            )
    with pytest.raises(ValueError, match="ended after 2 of the 3 batches"):
        ff.run(FLOW, begun(), LOADER[:2], checkpoint=manager(folder))
    other = manager(tmp_path / "b")
    other.save(0, args=ocp.args.Composite(x=ocp.args.JsonSave({"a": 1})))
    with pytest.raises(ValueError, match=r"no checkpoint of ff\.run"):
        ff.run(FLOW, begun(), LOADER, checkpoint=other)
    with pytest.raises(TypeError, match="CheckpointManager"):
        ff.run(FLOW, begun(), LOADER, checkpoint=str(folder))


@pytest.mark.slow_cases
@pytest.mark.parametrize("lost", ["run", "state", "loader"])
def test_a_step_that_is_not_whole_is_told(tmp_path, lost):
    ff.run(FLOW, begun(), LOADER[:2], checkpoint=manager(tmp_path / "a"))
    shutil.rmtree(tmp_path / "a" / "2" / lost)
    words = "step 2 in .*something is lost.*delete .*2 to go on from the step before"
    with pytest.raises(ValueError, match=words):
        ff.run(FLOW, begun(), LOADER, checkpoint=manager(tmp_path / "a"))
    shutil.rmtree(tmp_path / "a" / "2")
    resumed = ff.run(FLOW, begun(), LOADER, checkpoint=manager(tmp_path / "a"))
    assert resumed.count == ROWS


@pytest.mark.slow
def test_a_run_can_be_differentiated_and_keeps_nothing_under_a_trace(tmp_path):
    def end(precision, run=ff.run, **options):
        flow = made(prior_precision=precision)
        return jnp.sum(run(flow, begun(flow), LOADER[:2], **options).mean)

    found, expected = jax.grad(end)(2.0), jax.grad(end)(2.0, looped)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    with pytest.raises(ValueError, match=r"outside of jax\.jit"):
        jax.grad(end)(2.0, checkpoint=manager(tmp_path / "a"))


def test_wrong_use_is_told():
    for batches, words in (
        (LOADER[0], "one batch alone goes in a list"),
        ([], "batches is empty"),
        ([{"x": X, "y": Y}], r"Take it apart, \(batch\['x'\], batch\['y'\]\).*ff.run"),
        ([(X, None)], "learns from targets"),
        ([(X, Y), (X[:, :2], Y)], "incompatible|dot_general|shapes"),
    ):
        with pytest.raises((ValueError, TypeError), match=words):
            ff.run(FLOW, begun(), batches)
    with pytest.raises(TypeError, match="a flow stands before its state"):
        ff.run(begun(), FLOW, LOADER)
    with pytest.raises(TypeError, match=r"report is a function .* got \[\]"):
        ff.run(FLOW, begun(), LOADER, report=[])
    with pytest.raises(ValueError, match=r"the state is another flow's.*Diagonal"):
        ff.run(FLOW, begun(DRAWING), LOADER)
    with pytest.raises(TypeError, match=r"a state of flow\.init; got a ndarray"):
        ff.run(FLOW, np.zeros(3), LOADER)
    with pytest.raises(TypeError, match="to be taken apart"):
        ff.run(FLOW, FLOW.update(begun(), LOADER[0]), LOADER)


def spoiled(number):
    x = LOADER[number][0].copy()
    x[5, 1] = np.nan
    return [*LOADER[:number], (x, LOADER[number][1]), *LOADER[number + 1 :]]


def test_a_bad_row_raises_before_it_is_in_a_checkpoint(tmp_path):
    kept = manager(tmp_path / "a", every=2)
    with pytest.raises(ValueError, match=r"row 5 of batch 5 has inputs\[5, 1\] = nan"):
        ff.run(FLOW, begun(), spoiled(5), checkpoint=kept)
    assert kept.latest_step() == 4
    mended = ff.run(FLOW, begun(), LOADER, checkpoint=manager(tmp_path / "a"))
    assert_equal(mended, ff.run(FLOW, begun(), LOADER))
    with pytest.raises(ValueError, match="row 5 of batch 9"):  # the last
        ff.run(FLOW, begun(), spoiled(9))


def test_rows_that_are_dropped_are_warned_of():
    flow = made(bad_rows="drop")
    with pytest.warns(ff.DataWarning, match="1 rows of 1 batches .* in batch 5"):
        state = ff.run(flow, begun(flow), spoiled(5))
    assert (state.count, state.events.rows_skipped) == (ROWS - 1, 1)


@pytest.mark.slow
def test_batches_that_move_nothing_are_warned_of():
    flow = made(ff.likelihoods.gaussian(), bad_rows="drop")
    large = (np.full_like(X[:SIZE], 1e30), Y[:SIZE])
    with pytest.warns(ff.DataWarning, match="1 batches moved nothing.*was batch 2"):
        state = ff.run(flow, begun(flow), [*LOADER[:2], large, *LOADER[3:]])
    assert (state.num_skipped, state.step) == (1, len(LOADER) - 1)
    raising = made(ff.likelihoods.gaussian())
    with pytest.raises(ValueError, match="row 0 of batch 2"):
        ff.run(raising, begun(raising), [*LOADER[:2], large, *LOADER[3:]])


class Promising(list):
    def __len__(self):
        return 20


def test_a_loader_that_ends_before_its_length_is_told():
    with pytest.warns(ff.DataWarning, match="ended after 10 of the 20 batches"):
        ff.run(FLOW, begun(), Promising(LOADER))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ff.run(FLOW, begun(), LOADER)


def test_models_that_values_must_judge():
    """Whether examples interact is decided once, as in an eager update."""

    def scanned(params, x):
        return jax.lax.fori_loop(0, 1, lambda i, y: y, x @ params)

    flow = ff.fisher_flow(scanned, ff.likelihoods.bernoulli())
    state = flow.init(jnp.zeros(DIMENSION, jnp.float32))
    assert ff.run(flow, state, LOADER).count == ROWS
