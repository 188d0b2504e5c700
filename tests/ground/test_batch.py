"""Batches: what is accepted, how padding is blanked, and how chunks are parts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fisherflow_jax as ff
from fisherflow_jax._ground import batch as batches
from fisherflow_jax._ground.batch import Batch, Shared
from fisherflow_jax._ground.checks import is_concrete
from fisherflow_jax._ground.chunks import cut

X = np.arange(10.0).reshape((5, 2))
Y = np.arange(5)
WEIGHTS = np.array([0.0, 2.0, 0.0, 1.0, 0.5])


@pytest.mark.parametrize("kind", [tuple, list])
def test_two_or_three_parts(kind):
    two, three = batches.as_batch(kind((X, Y))), batches.as_batch(kind((X, Y, WEIGHTS)))
    np.testing.assert_array_equal(two.weights, np.ones(5))
    np.testing.assert_array_equal(three.weights, WEIGHTS)
    assert isinstance(two, Batch)
    assert batches.num_examples(two) == 5


def test_a_batch_is_checked_again_and_stays_the_same():
    batch = batches.as_batch((X, Y, WEIGHTS))
    again = batches.as_batch(batch)
    jax.tree.map(np.testing.assert_array_equal, again, batch)
    with pytest.raises(ValueError, match="not be empty"):
        batches.as_batch(batches.Batch(X[:0], Y[:0], WEIGHTS[:0]))


@pytest.mark.parametrize("dtype", [bool, np.int32, np.float16, np.float64])
def test_weights_become_floating_point(dtype):
    batch = batches.as_batch(Batch(X, Y, np.ones(5, dtype)))
    assert batch.weights.dtype == jnp.result_type(float)


@pytest.mark.parametrize("task", [np.zeros(5, int), [0, 1, 1, 0, 0], jnp.arange(5)])
def test_a_third_entry_of_integers_is_refused(task):
    with pytest.raises(ValueError, match=r"task ids.*ff\.Batch\(inputs, targets"):
        batches.as_batch((X, Y, task))
    with pytest.raises(ValueError, match="task ids"):
        jax.jit(batches.as_batch)((X, Y, jnp.asarray(task)))
    mask = np.asarray(task) > 0
    np.testing.assert_array_equal(batches.as_batch((X, Y, mask)).weights, mask)


def test_padding_holds_the_first_used_row():
    x = np.where(WEIGHTS[:, None] > 0, X, np.nan)
    y = np.where(WEIGHTS > 0, Y, -7)
    batch = jax.jit(batches.as_batch)((x, y, WEIGHTS))
    rows = [1, 1, 1, 3, 4]
    np.testing.assert_array_equal(batch.inputs, X[rows])
    np.testing.assert_array_equal(batch.targets, Y[rows])
    assert batch.targets.dtype == Y.dtype
    np.testing.assert_array_equal(batch.weights, WEIGHTS)


def test_a_batch_of_arrays_compiles_one_program_or_none(caplog):
    plain = np.arange(21.0, dtype=np.float32).reshape((7, 3))
    weights = np.arange(7.0)
    on_device = jnp.asarray(weights + 0.5)
    with jax.log_compiles():
        batches.as_batch((plain, plain[:, 0]))
        batches.as_batch((plain, plain[:, 0], weights + 0.5))
        batches.as_batch((plain, plain[:, 0], on_device))
        assert "Finished XLA compilation" not in caplog.text
        batches.as_batch((plain, plain[:, 0], weights))
    assert caplog.text.count("Finished XLA compilation") == 1


def test_weights_that_a_trace_closes_over_are_checked():
    with pytest.raises(ValueError, match="weights must be finite and not negative"):
        jax.jit(lambda x: batches.as_batch((x, Y, -WEIGHTS)))(X)


def test_a_batch_of_padding_alone_holds_possible_targets():
    batch = batches.as_batch((X * np.nan, Y * np.nan, np.zeros(5)))
    assert np.isfinite(batch.inputs).all()
    for name in ("bernoulli", "gaussian", "poisson", "gamma"):
        likelihood = getattr(ff.likelihoods, name)()
        assert np.all(likelihood.support(batch.targets))


def test_without_weights_nothing_is_touched():
    x = np.where(X == 3, np.nan, X)
    np.testing.assert_array_equal(batches.as_batch((x, Y)).inputs, x)


def test_shared_parts_are_neither_cut_nor_blanked_nor_converted():
    table = {"rows": np.full((5, 2), np.nan), "name": "a static thing"}
    inputs = {"x": X, "more": [Shared(table), X[:, 0]]}
    batch = batches.as_batch((inputs, Y, WEIGHTS))
    assert batch.inputs["more"][0].tree is table
    parts, _ = cut(batch, 2)
    assert parts.inputs["more"][0].tree is table
    assert parts.inputs["more"][1].shape == (3, 2)
    seen = batches.unshare(batch.inputs)
    assert seen["more"][0] is table
    np.testing.assert_array_equal(seen["x"], batch.inputs["x"])


def test_split_and_rebuild():
    inputs = {"a": X, "b": (Shared(Y), Y)}
    parts, rebuild = batches.split(inputs)
    assert [part.shape for part in parts] == [(5, 2), (5,)]
    rebuilt = rebuild([part + 1 for part in parts])
    np.testing.assert_array_equal(rebuilt["a"], X + 1)
    np.testing.assert_array_equal(rebuilt["b"][1], Y + 1)
    assert rebuilt["b"][0] is inputs["b"][0]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 9])
def test_chunks_hold_every_row_once_and_padding_of_weight_zero(size):
    batch = batches.as_batch((X + 1, Y + 1))
    parts, number = cut(batch, size)
    assert parts.weights.shape == parts.targets.shape
    assert parts.weights.shape[0] == number
    assert parts.weights.shape[1] <= size
    flat = jax.tree.map(lambda x: np.asarray(x).reshape((-1, *x.shape[2:])), parts)
    np.testing.assert_array_equal(flat.inputs[:5], X + 1)
    np.testing.assert_array_equal(flat.targets[:5], Y + 1)
    np.testing.assert_array_equal(flat.weights, (np.arange(len(flat.weights)) < 5))
    # filled with rows that a model has seen, not with zeros
    assert np.all(flat.inputs > 0)


def test_chunks_are_even():
    # 5 rows by at most 4: 3 and 3, not 4 and 4
    batch = batches.as_batch((X, Y))
    assert cut(batch, 4)[0].weights.shape == (2, 3)


def test_targets_may_be_missing_or_a_tree():
    assert batches.as_batch((X, None)).targets is None
    tree = batches.as_batch((X, {"a": Y, "b": X})).targets
    assert tree["b"].shape == (5, 2)


@pytest.mark.parametrize(
    ("part", "value"),
    [("inputs", np.nan), ("targets", np.inf), ("weights", np.nan), ("weights", -1.0)],
)
def test_is_finite_looks_at_every_part(part, value):
    batch = Batch(jnp.asarray(X), jnp.asarray(Y * 1.0), jnp.ones(5))
    assert batches.is_finite(batch)
    spoiled = getattr(batch, part).at[2].set(value)
    assert not batches.is_finite(batch._replace(**{part: spoiled}))


def test_is_finite_passes_over_integers_and_shared_parts():
    batch = batches.as_batch(({"x": X, "s": Shared(np.array([np.nan]))}, Y))
    assert batches.is_finite(batch)


def test_is_finite_after_negative_weights_under_jit():
    check = jax.jit(lambda batch: batches.is_finite(batches.as_batch(batch)))
    assert check((X, Y, WEIGHTS))
    assert not check((X, Y, -WEIGHTS))


def test_is_concrete():
    assert is_concrete((X, Y, None))
    seen = []
    jax.jit(lambda x: seen.append(is_concrete((x, Y))))(X)
    assert seen == [False]


def test_a_stream_of_batches_is_scanned():
    stack = np.stack([X, 2 * X]), np.stack([Y, Y]), np.stack([WEIGHTS, 0 * WEIGHTS])

    def body(total, batch):
        batch = batches.as_batch(batch)
        return total + jnp.sum(batch.weights[:, None] * batch.inputs), None

    total, _ = jax.lax.scan(body, jnp.zeros(()), stack)
    np.testing.assert_allclose(total, (WEIGHTS[:, None] * X).sum())


CLUSTERS = np.array([3, 3, 1, 0, 1])


def test_a_named_batch_is_a_batch_and_carries_its_clusters():
    named = batches.as_batch(Batch(X, Y, clusters=CLUSTERS))
    jax.tree.map(np.testing.assert_array_equal, named[:3], batches.as_batch((X, Y))[:3])
    np.testing.assert_array_equal(named.clusters, CLUSTERS)
    blanked = jax.jit(batches.as_batch)(Batch(X, Y, WEIGHTS, CLUSTERS))
    np.testing.assert_array_equal(blanked.clusters, CLUSTERS)
    parts, _ = cut(blanked, 2)
    np.testing.assert_array_equal(np.ravel(parts.clusters)[:5], CLUSTERS)


def test_a_stack_of_named_batches_is_scanned():
    stack = jax.tree.map(
        lambda x: jnp.stack([x, x]), Batch(X, Y, clusters=jnp.asarray(CLUSTERS))
    )

    def body(total, batch):
        return total + jnp.sum(batches.as_batch(batch).clusters), None

    total, _ = jax.lax.scan(body, jnp.zeros((), CLUSTERS.dtype), stack)
    assert total == 2 * CLUSTERS.sum()


@pytest.mark.parametrize("clusters", [CLUSTERS[:3], CLUSTERS * 1.0, CLUSTERS[:, None]])
def test_clusters_are_integers_one_an_example(clusters):
    with pytest.raises(ValueError, match="clusters must be integers of shape"):
        batches.as_batch(Batch(X, Y, clusters=clusters))
