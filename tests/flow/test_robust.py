"""The middle of a sandwich: clusters in every memory, kinds of weights, refusals."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fisherflow_jax as ff
import streams

pytestmark = pytest.mark.usefixtures("strict_promotion")

NUMBER = 5  # the last of which has no row
IDS = np.arange(24) * 7 % 4
MEMORIES = ["stationary", "exponential", "unfloored", "windowed"]


def clustered(structure="full", memory="stationary", likelihood="gaussian", **options):
    options = {"robust": True, "num_clusters": NUMBER} | options
    return streams.flow(structure, memory, likelihood, **options)


def batches(size=4, likelihood="gaussian"):
    rows = np.split(IDS, range(size, 24, size))
    pairs = zip(streams.batches(size, likelihood), rows, strict=True)
    return [ff.Batch(*batch, clusters=own) for batch, own in pairs]


def by_cluster(scores):
    """Sums of rows' scores, `(NUMBER, d)`."""
    sums = np.zeros((NUMBER, scores.shape[1]))
    np.add.at(sums, IDS[: len(scores)], scores)
    return sums


def matrix(scores):
    """The leaves of summed scores as `(NUMBER, d)`."""
    return np.asarray(jax.vmap(lambda x: jnp.concatenate(flat(x)))(scores))


def flat(tree):
    return [jnp.ravel(tree["level"]), jnp.ravel(tree["slope"])]


def scores_at(mean, rows):
    residual = streams.TARGETS[rows] - streams.INPUTS[rows] @ mean
    weights = streams.WEIGHTS[rows] / streams.SCALE**2
    return streams.INPUTS[rows] * (weights * residual)[:, None]


def prequential_scores(memory, last):
    """Scores of rows: the first batch's at its solution, later ones' before them."""
    parts = []
    for index in range(last + 1):
        at = streams.fit(memory, 0) if index == 0 else streams.predict(memory, index)
        parts.append(scores_at(at[0], slice(4 * index, 4 * index + 4)))
    return np.concatenate(parts)


@functools.cache
def states(memory):
    flow = clustered(memory=memory)
    return streams.run(flow, streams.start(flow), batches())


@pytest.mark.slow_cases
@pytest.mark.parametrize("memory", MEMORIES)
def test_cluster_sums_fade_like_the_information(memory):
    for time, state in enumerate(states(memory)):
        weights = streams.memory_weights(memory, time, time)[1]
        faded = np.repeat(weights, 4)[:, None]
        expected = by_cluster(faded * prequential_scores(memory, time))
        np.testing.assert_allclose(
            matrix(state.clusters.scores), expected, rtol=1e-9, atol=1e-9
        )
        seen = by_cluster(
            (streams.WEIGHTS[: 4 * time + 4] * np.repeat(weights, 4))[:, None]
        )
        np.testing.assert_allclose(state.clusters.weights, seen[:, 0], rtol=1e-12)


def sandwich(state, factor=1.0):
    inverse = np.linalg.inv(streams.dense(state.information))
    sums = matrix(state.clusters.scores)
    return factor * inverse @ sums.T @ sums @ inverse


@pytest.mark.parametrize("memory", MEMORIES)
def test_errors_are_those_of_the_summed_scores(memory):
    state = states(memory)[-1]
    expected = np.sqrt(np.diag(sandwich(state, 4 / 3)))
    for robust in (True, "HC0"):
        found = streams.flat(ff.standard_error(state, robust=robust))
        np.testing.assert_allclose(found, expected, rtol=1e-9)
    count = float(state.count)
    factor = np.sqrt((count - 1) / (count - 3))
    found = streams.flat(ff.standard_error(state, robust="HC1"))
    np.testing.assert_allclose(found, factor * expected, rtol=1e-9)


@pytest.mark.slow_cases
@pytest.mark.parametrize("structure", ["scalar", "diagonal", "block"])
def test_every_structure_keeps_its_part_of_the_middle(structure):
    flow = clustered(structure)
    state = streams.run(flow, streams.start(flow), batches(12))[-1]
    sums = matrix(state.clusters.scores)
    middle = np.diag(sums.T @ sums)
    if structure == "scalar":
        middle = np.full(3, middle.mean())
    inverse = np.linalg.inv(streams.dense(state.information))
    if structure == "block":
        variances = np.diag(sandwich(state))
    else:
        variances = np.diag(inverse) ** 2 * middle
    found = streams.flat(ff.standard_error(state, robust=True))
    np.testing.assert_allclose(found**2, 4 / 3 * variances, rtol=1e-9)


@pytest.mark.slow
def test_a_marginal_flow_turns_the_sums_of_scores():
    flow = clustered("diagonal", marginal=True)
    state = streams.run(flow, streams.start(flow), batches(12))[-1]
    expected, mean = 0.0, streams.ORIGIN
    for index in range(2):
        rows = slice(12 * index, 12 * index + 12)
        inputs, weights = streams.INPUTS[rows], streams.WEIGHTS[rows]
        own = np.linalg.inv((inputs.T * weights) @ inputs / streams.SCALE**2)
        at = streams.fit("stationary", 2)[0] if index == 0 else mean
        scores = np.zeros((24, 3))
        scores[rows] = scores_at(at, rows)
        expected = expected + by_cluster(scores) @ own / np.diag(own)
        mean = streams.flat(state_after_first(flow).mean)
    np.testing.assert_allclose(matrix(state.clusters.scores), expected, rtol=1e-8)
    refined = ff.refine(flow, state, batches(12))
    mean, information = streams.fit("stationary", 5)
    sums = by_cluster(scores_at(mean, slice(0, 24)))
    inverse = np.linalg.inv(information)
    expected = 4 / 3 * np.diag(inverse @ sums.T @ sums @ inverse)
    found = streams.flat(ff.standard_error(refined, robust=True))
    np.testing.assert_allclose(found**2, expected, rtol=1e-7)


def state_after_first(flow):
    return streams.run(flow, streams.start(flow), batches(12)[:1])[0]


@pytest.mark.parametrize("size", [4, 12])
def test_refined_sums_do_not_depend_on_the_cut(size):
    flow = clustered()
    state = streams.run(flow, streams.start(flow), batches(size))[-1]
    state = ff.refine(flow, state, batches(size))
    mean = streams.fit("stationary", 5)[0]
    expected = by_cluster(scores_at(mean, slice(0, 24)))
    np.testing.assert_allclose(
        matrix(state.clusters.scores), expected, rtol=1e-8, atol=1e-9
    )


@pytest.mark.parametrize("memory", ["stationary", "exponential"])
def test_workers_sums_are_merged(memory):
    flow = clustered(memory=memory)
    start = states(memory)[0]
    workers = [flow.update(start, batch)[0] for batch in batches()[1:4]]
    merged = ff.merge(workers, start)
    keep = streams.DECAY if memory == "exponential" else 1.0
    aged = keep * matrix(start.clusters.scores)
    added = [matrix(w.clusters.scores) - aged for w in workers]
    np.testing.assert_allclose(
        matrix(merged.clusters.scores), aged + sum(added), rtol=1e-12, atol=1e-12
    )


def test_a_bank_of_clustered_flows():
    bank = ff.bank([clustered(memory=memory) for memory in ("stationary", "windowed")])
    state = bank.init(streams.tree(np.zeros(3)), streams.tree(streams.ORIGIN))
    for batch in batches():
        state, _ = bank.update(state, batch)
    members = [states("stationary")[-1], states("windowed")[-1]]
    weights = np.asarray(state.weights)
    means = [streams.flat(one.mean) for one in members]
    errors = [streams.flat(ff.standard_error(one, robust=True)) for one in members]
    mean = weights @ means
    expected = weights @ (np.square(errors) + np.square(means - mean))
    found = streams.flat(ff.standard_error(state, robust=True))
    np.testing.assert_allclose(found**2, expected, rtol=1e-9)


@pytest.mark.slow_cases
@pytest.mark.parametrize(
    ("memory", "kind"), [*((m, "sampling") for m in MEMORIES), ("windowed", "variance")]
)
def test_the_middle_has_squared_weights_unless_they_are_frequencies(memory, kind):
    flow = streams.flow("full", memory, robust=True, weights_are=kind)
    state = streams.run(flow, streams.start(flow), streams.batches())[-1]
    faded = np.repeat(streams.memory_weights(memory, 5, 5)[1], 4)
    scores = faded[:, None] * prequential_scores(memory, 5)
    np.testing.assert_allclose(streams.dense(state.meat), scores.T @ scores, rtol=1e-9)
    np.testing.assert_allclose(state.count, faded @ (streams.WEIGHTS > 0))


@pytest.mark.slow
def test_variance_weights_are_rows_times_their_root():
    flow = streams.flow("full", "stationary", "unknown", weights_are="variance")
    start, halves = streams.start(flow), streams.batches(12, "unknown")
    state = streams.run(flow, start, halves)[-1]
    merged = ff.merge([flow.update(start, half)[0] for half in halves], start)
    scaled = streams.flow("full", "stationary", "unknown")
    other, used = streams.start(scaled), streams.WEIGHTS > 0
    for half in np.split(np.arange(24), 2):
        rows = half[used[half]]
        root = np.sqrt(streams.WEIGHTS[rows])
        batch = streams.INPUTS[rows] * root[:, None], streams.TARGETS[rows] * root
        other, _ = scaled.update(other, batch)
    for name in ("count", "residual", "dispersion", "degrees_of_freedom"):
        for one in (state, merged):
            found, expected = getattr(one, name), getattr(other, name)
            np.testing.assert_allclose(found, expected, rtol=1e-9)
    # the density of a target is that of the scaled one, times the root
    logs = 0.5 * np.sum(np.log(streams.WEIGHTS[used]))
    np.testing.assert_allclose(state.log_evidence, other.log_evidence + logs)


def test_what_is_refused():
    def refused(message, function):
        with pytest.raises(ValueError, match=message):
            function()

    def built(**options):
        return lambda: ff.fisher_flow(
            streams.linear, ff.likelihoods.poisson(), **options
        )

    refused("num_clusters is for robust=True", built(num_clusters=3))
    refused("num_clusters must be a positive", built(robust=True, num_clusters=0))
    refused("needs robust=True", built(weights_are="sampling"))
    refused("'variance'; got 'importance'", built(weights_are="importance"))
    adaptive = streams.MEMORIES["adaptive"]
    refused(
        r"memory adaptive.* does not go with num_clusters",
        built(robust=True, num_clusters=3, memory=adaptive),
    )
    flow, batch = clustered(), batches()[0]
    start = streams.start(flow)
    refused("clusters=ids", lambda: flow.update(start, batch[:3]))
    refused("clusters=ids", lambda: ff.refine(flow, start, [batch[:3]]))
    for wrong in (-1, NUMBER):
        ids = np.array([0, 1, wrong, 2])
        refused(
            rf"0 to 4 \(num_clusters=5\); got {wrong} in row 2",
            lambda ids=ids: flow.update(start, batch._replace(clusters=ids)),
        )
    rows = streams.flow("full", "stationary", robust=True)
    refused("does not use", lambda: rows.update(streams.start(rows), batch))

    one, _ = flow.update(start, batch._replace(clusters=np.zeros(4, int)))
    refused("clusters need two", lambda: ff.standard_error(one, robust=True))
    state = states("stationary")[-1]
    few = state._replace(count=jnp.asarray(3.0))
    refused(
        "more observations than the 3", lambda: ff.standard_error(few, robust="HC1")
    )
    refused("got 'HC3'", lambda: ff.standard_error(state, robust="HC3"))


def test_rows_of_no_cluster_are_left_out_under_jit_or_where_asked():
    flow, batch = clustered(), batches()[0]
    ids = np.array(batch.clusters)
    ids[1], weights = NUMBER, np.array(batch.weights)
    weights[1] = 0
    start, lenient = streams.start(flow), clustered(bad_rows="drop")
    expected, _ = flow.update(start, batch._replace(weights=weights))
    assert expected.events.rows_skipped == 0
    bad = batch._replace(clusters=ids)
    for update in (jax.jit(flow.update), lenient.update):
        state, info = update(start, bad)
        assert not info.skipped
        assert info.rows_skipped == state.events.rows_skipped == 1
        state = state._replace(events=expected.events)
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-12), state, expected
        )
    refined = [
        ff.refine(lenient, expected, [one])
        for one in (bad, batch._replace(weights=weights))
    ]
    assert [one.events.rows_skipped for one in refined] == [1, 0]
    refined = [one._replace(events=None) for one in refined]
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-12), *refined)


def test_targets_of_an_example_are_one_cluster():
    """Weights of targets: a row's score is the weighted sum over its targets."""
    flow = ff.fisher_flow(
        lambda w, x: x @ w, ff.likelihoods.gaussian(), robust=True, num_steps=1
    )
    rng = np.random.default_rng(2)
    x, y = rng.normal(size=(6, 2, 3)), rng.normal(size=(6, 2))
    weights = rng.uniform(size=(6, 2)) * [[0, 1], [1, 1], [0, 0], *[[1, 1]] * 3]
    state, _ = flow.update(flow.init(jnp.zeros(3)), (x, y, weights))
    scores = np.einsum("nt,ntd->nd", weights * (y - x @ np.asarray(state.mean)), x)
    np.testing.assert_allclose(state.meat.rows, scores.T @ scores, rtol=1e-9)
    grouped = ff.fisher_flow(
        lambda w, x: x @ w,
        ff.likelihoods.gaussian(),
        robust=True,
        num_clusters=6,
        num_steps=1,
    )
    batch = ff.Batch(x, y, weights, clusters=np.arange(6))
    own, _ = grouped.update(grouped.init(jnp.zeros(3)), batch)
    np.testing.assert_allclose(own.clusters.scores, scores, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(own.clusters.weights, weights.sum(axis=1))


def test_predictions_take_the_factor():
    state = states("stationary")[-1]
    likelihood = ff.likelihoods.gaussian(streams.SCALE)
    plain, corrected = (
        ff.predict(
            state, streams.linear, likelihood, streams.INPUTS[:2], robust=robust
        ).std
        for robust in (True, "HC1")
    )
    lines = streams.INPUTS[:2] @ sandwich(state, 4 / 3) @ streams.INPUTS[:2].T
    np.testing.assert_allclose(plain, np.sqrt(np.diag(lines)), rtol=1e-9)
    factor = (float(state.count) - 1) / (float(state.count) - 3)
    np.testing.assert_allclose(corrected, np.sqrt(factor) * plain, rtol=1e-9)


@pytest.mark.slow
def test_a_float32_stream_of_clusters_is_scanned_refined_and_corrected():
    flow, parts = clustered(), batches()
    narrow = jax.tree.map(
        lambda x: jnp.asarray(x, np.float32 if x.dtype == float else x.dtype), parts
    )
    stack = jax.tree.map(lambda *x: jnp.stack(x), *narrow)
    start = flow.init(
        *(
            jax.tree.map(lambda x: x.astype(np.float32), streams.tree(x))
            for x in (np.zeros(3), streams.ORIGIN)
        )
    )

    @jax.jit
    def run(start):
        state, _ = jax.lax.scan(flow.update, start, stack)
        state = ff.refine(flow, state, stack)
        return state, ff.standard_error(state, robust="HC1")

    state, error = run(start)
    jax.tree.map(lambda x, y: _same_type(x, y), state, start)
    wide = ff.refine(flow, states("stationary")[-1], parts)
    expected = ff.standard_error(wide, robust="HC1")
    np.testing.assert_allclose(streams.flat(error), streams.flat(expected), rtol=1e-4)


def _same_type(x, y):
    assert (x.shape, x.dtype) == (y.shape, y.dtype)
