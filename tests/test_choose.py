"""Choosing among flows: the judge, the rounds, and what a person reads."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import fisherflow_jax as ff

SIZE, ROWS, TIMES, SCALE = 8, 8, 150, 1.0
MODEL = (lambda params, x: x @ params), ff.likelihoods.gaussian(SCALE)
CHOICES = {
    "full": ("full", ff.memories.stationary()),
    "full .97": ("full", ff.memories.exponential(0.97)),
    "full .9": ("full", ff.memories.exponential(0.9)),
    "full .7": ("full", ff.memories.exponential(0.7)),
    "full walk": ("full", ff.memories.random_walk(1e-2)),
    "diagonal": ("diagonal", ff.memories.stationary()),
    "diagonal .9": ("diagonal", ff.memories.exponential(0.9)),
    "scalar": ("scalar", ff.memories.stationary()),
    "low rank": ("low_rank", ff.memories.stationary()),
}
STRUCTURES = {
    "full": ff.structures.full(),
    "diagonal": ff.structures.diagonal(),
    "scalar": ff.structures.scalar(),
    "low_rank": ff.structures.low_rank(2),
}
FLOWS = {
    name: ff.fisher_flow(*MODEL, structure=STRUCTURES[kind], memory=memory, num_steps=4)
    for name, (kind, memory) in CHOICES.items()
}


def path(key, drift=0.0, times=TIMES, jumps=False):
    """Coefficients that may wander, or be drawn anew twice."""
    _, start, moves, _ = jax.random.split(key, 4)
    if jumps:
        return jnp.repeat(jax.random.normal(moves, (3, SIZE)), times // 3, 0)
    steps = drift * jax.random.normal(moves, (times, SIZE))
    return jax.random.normal(start, (SIZE,)) + jnp.cumsum(steps, 0)


def around(key, truth, correlated=True):
    """A stream of these coefficients: columns and errors."""
    columns, _, _, noise = jax.random.split(key, 4)
    share = 0.8 if correlated else 0.0
    root = jnp.linalg.cholesky((1 - share) * jnp.eye(SIZE) + share)
    x = jax.random.normal(columns, (len(truth), ROWS, SIZE)) @ root.T
    y = jnp.einsum("tbd,td->tb", x, truth)
    return x, y + SCALE * jax.random.normal(noise, y.shape)


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def stream(key, drift=0.0, times=TIMES, correlated=True, jumps=False):
    return around(key, path(key, drift, times, jumps), correlated)


def chosen(flows, batches, **options):
    return ff.choose(flows, jnp.zeros(SIZE), ff.Stacked(*batches), **options)


@pytest.mark.slow
def test_the_log_score_is_the_predictive_density():
    """Of full structure in closed form; of classes, counts by draws; of a mixture."""
    x, y = stream(jax.random.key(0), times=2)
    flow = FLOWS["full"]
    state, _ = flow.update(flow.init(jnp.zeros(SIZE)), (x[0], y[0]))
    covariance = np.linalg.inv(ff.information.to_dense(state.information))
    spread = np.sqrt(np.einsum("bi,ij,bj->b", x[1], covariance, x[1]) + SCALE**2)
    wanted = stats.norm.logpdf(y[1], x[1] @ np.asarray(state.mean), spread)
    found = ff.calibration.log_score(state, *MODEL, (x[1], y[1]))
    np.testing.assert_allclose(found, wanted, rtol=1e-10)
    other, _ = flow.update(flow.init(jnp.ones(SIZE)), (x[0], y[0] + 1))
    each = ff.calibration.log_score(other, *MODEL, (x[1], y[1]))
    both = ff.calibration.log_score([state, other], *MODEL, (x[1], y[1]))
    np.testing.assert_allclose(both, np.logaddexp(found, each) - np.log(2), rtol=1e-10)
    for likelihood, targets in (
        (ff.likelihoods.bernoulli(), 1.0 * (y[1] > 0)),
        (ff.likelihoods.poisson(), jnp.floor(jnp.exp(0.3 * y[1]))),
    ):
        model = (lambda params, x: 0.3 * x @ params), likelihood
        score = ff.calibration.log_score(state, *model, (x[1], targets))
        draws = ff.sample(state, 0, (20_000,))
        line = 0.3 * x[1] @ draws.T
        wide = jnp.broadcast_to(targets[:, None], line.shape)
        chances = np.exp(likelihood.log_prob(line, wide))
        error = chances.std(1) / np.sqrt(chances.shape[1])
        assert np.max(np.abs(np.exp(score) - chances.mean(1)) / error) < 4.5


@pytest.mark.slow
def test_scores_by_hand():
    """The score of each row before it is learnt from, of what the memory predicts."""
    batches = stream(jax.random.key(1), times=4)
    names = ["full", "full walk", "diagonal .9"]
    ranking = chosen({name: FLOWS[name] for name in names}, batches, num_rounds=1)
    for name in names:
        flow, total, hits = FLOWS[name], 0.0, 0.0
        state = flow.init(jnp.zeros(SIZE))
        for batch in zip(*batches, strict=True):
            ahead = flow.advance(state)
            total += float(ff.calibration.log_score(ahead, *MODEL, batch).sum())
            prediction = ff.predict(ahead, *MODEL, batch[0])
            away = np.abs(batch[1] - prediction.mean) / prediction.observation_std
            hits += float(np.sum(away < stats.norm.ppf(0.95)))
            state, _ = flow.update(state, batch)
        one = ranking.table[name]
        np.testing.assert_allclose(one.log_score, total / 32, rtol=1e-8)
        np.testing.assert_allclose(one.coverage, hits / 32, rtol=1e-8)
        np.testing.assert_allclose(one.log_evidence, state.log_evidence / 32, rtol=1e-8)
        assert one.num_batches == 4
    best = max(names, key=lambda name: ranking.table[name].log_score)
    assert ranking.best == best == next(iter(ranking.table))
    scores = {name: 32 * ranking.table[name].log_score for name in names}
    below = [ranking.table[name].below_best for name in names]
    np.testing.assert_allclose(
        below, [scores[best] - scores[n] for n in names], atol=1e-8
    )


@pytest.mark.slow
def test_rounds_drop_the_worse_half_but_none_that_is_near():
    batches = stream(jax.random.key(2), drift=0.5, times=32)
    names = ["full", "full .9", "full walk", "diagonal"]
    flows = {name: FLOWS[name] for name in names}
    ranking = chosen(flows, batches)
    assert ranking.best == "full walk"
    ends = {name: one.num_batches for name, one in ranking.table.items()}
    assert ends["full walk"] == 32
    assert ends["full"] < 32
    assert set(ends.values()) <= {8, 16, 32}
    whole = chosen(flows, batches, num_rounds=1)
    best = whole.table["full walk"]
    assert best._replace(seconds=0.0) == ranking.table["full walk"]._replace(
        seconds=0.0
    )
    jax.tree.map(np.testing.assert_array_equal, ranking.state, whole.state)
    seen = chosen(flows, tuple(x[:8] for x in batches), num_rounds=1).table
    gaps = {name: one.below_best for name, one in list(seen.items())[2:]}
    assert 3 + np.log(4) < min(gaps.values()) < 30
    far = {name for name, gap in gaps.items() if gap > 3 + np.log(4)}
    assert far == {name for name, end in ends.items() if end == 8}
    end = ends["full"]  # on the rows that it was run on
    early = chosen(flows, tuple(x[:end] for x in batches), num_rounds=1)
    np.testing.assert_allclose(
        ranking.table["full"].below_best, early.table["full"].below_best, rtol=1e-8
    )
    alike = {"one": FLOWS["full"], "two": FLOWS["full .97"], "three": FLOWS["full"]}
    near = chosen(alike, stream(jax.random.key(3), times=8))
    assert {one.num_batches for one in near.table.values()} == {8}
    lines = str(ranking).splitlines()
    assert lines[0].split("  ")[0] == "flow"
    assert "dropped at" in lines[0]
    assert lines[2].startswith("full walk")


SMALL = {
    name: ff.fisher_flow(*MODEL, structure=structure, num_steps=1)
    for name, structure in STRUCTURES.items()
}


def as_told(state, apply_fn, likelihood, batch):
    """The score of each structure, as a row's columns have it."""
    kinds = [type(SMALL[name].init(jnp.zeros(SIZE)).information) for name in SMALL]
    place = [isinstance(state.information, kind) for kind in kinds].index(True)
    found = batch.inputs[:, place]
    return jnp.where(found < -1e6, -jnp.inf, found)


def told(scores, **options):
    """Chosen where the flows' scores of each batch are these, `(times, 4)`."""
    x = jnp.zeros((len(scores), 1, SIZE)).at[:, 0, :4].set(jnp.asarray(scores))
    batches = ff.Stacked(x, jnp.zeros((len(scores), 1)))
    return ff.choose(SMALL, jnp.zeros(SIZE), batches, judge=as_told, **options)


@pytest.mark.slow
def test_an_approximation_is_better_where_chance_does_not_make_it_so():
    """Paired, by Student's t of the batches' differences; else whoever keeps more."""
    gaps = np.random.default_rng(0).normal(size=16)
    gaps = (gaps - gaps.mean()) / gaps.std(ddof=1)  # a mean has error 1 / 4
    scores = np.full((16, 4), -9.0)
    scores[:, 0] = -1.0
    border = stats.t.ppf(0.975, 15) / 4
    for shift, wanted in (-0.1, "full"), (0.99 * border, "full"), (1.01 * border, None):
        scores[:, 2] = -1.0 + gaps + shift
        ranking = told(scores, num_rounds=1)
        assert ranking.best == next(iter(ranking.table)) == (wanted or "scalar")
        other = ranking.table["scalar" if wanted else "full"]
        below = -16 * shift if wanted else 16 * shift
        np.testing.assert_allclose(other.below_best, below, rtol=1e-6)
        np.testing.assert_allclose(other.standard_error, 4.0, rtol=1e-6)
        assert ranking.table[ranking.best].standard_error == 0
    scores[:, 0] = -1e7  # minus infinity: of no finite difference nothing is near
    assert told(scores, num_rounds=1).best == "scalar"
    assert told(scores[:1], num_rounds=1).best == "low_rank"
    scores[:, 0] = -1.0  # one batch tells nothing apart
    assert told(scores[:1], num_rounds=1).best == "full"


def test_who_was_dropped_is_taken_up_again_where_the_stream_has_changed():
    scores = np.full((16, 4), -30.0)  # full, diagonal, scalar, low rank
    scores[:, 0] = -8.0
    scores[:, 1], scores[8:, 1] = -1.0, -12.0
    scores[:, 2] = -2.0
    scores[:, 3] = -7.0
    ranking = told(scores)
    # after a quarter full and low rank are dropped, after a half scalar is not: it is
    # within log(4) + 3 nats at 4, and 8 below at 8
    assert ranking.best == "scalar"
    ends = {name: one.num_batches for name, one in ranking.table.items()}
    assert ends == {"scalar": 16, "diagonal": 16, "full": 4, "low_rank": 4}
    scores[8:, 2] = -20.0
    ends = {name: one.num_batches for name, one in told(scores).table.items()}
    assert ends == {"diagonal": 16, "scalar": 16, "full": 4, "low_rank": 4}
    scores[8:, 1] = scores[8:, 2] = -20.0
    ranking = told(scores)
    ends = {name: one.num_batches for name, one in ranking.table.items()}
    assert ranking.best == "low_rank"
    assert set(ends.values()) == {16}
    # at the pace that it was dropped with nobody is above the best of the whole stream
    for name, one in ranking.table.items():
        assert one.log_score <= ranking.table["low_rank"].log_score, name


@pytest.mark.slow
def test_ragged_lists_weights_and_other_judges():
    x, y = stream(jax.random.key(4), times=3)
    ragged = [(x[0], y[0]), (x[1], y[1]), (x[2][:3], y[2][:3])]
    flows = {"full": FLOWS["full"], "diagonal": FLOWS["diagonal"]}
    found = ff.choose(flows, jnp.zeros(SIZE), ragged, num_rounds=1)
    weights = np.ones((3, ROWS))
    weights[2, 3:] = 0
    spoilt = y.at[2, 3:].set(jnp.nan)
    same = chosen(flows, (x, spoilt, weights), num_rounds=1)
    for name in flows:
        one, other = found.table[name], same.table[name]
        np.testing.assert_allclose(one[:4], other[:4], rtol=1e-10)

    def plug_in(state, apply_fn, likelihood, batch):
        return likelihood.log_prob(apply_fn(state.mean, batch.inputs), batch.targets)

    by_mean = ff.choose(flows, jnp.zeros(SIZE), ragged, judge=plug_in, num_rounds=1)
    state = FLOWS["full"].init(jnp.zeros(SIZE))
    total = 0.0
    for batch in ragged:
        total += float(plug_in(state, *MODEL, ff.Batch(*batch)).sum())
        state, _ = FLOWS["full"].update(state, batch)
    np.testing.assert_allclose(by_mean.table["full"].log_score, total / 19, rtol=1e-8)


def test_bad_input():
    batches = ff.Stacked(*stream(jax.random.key(5), times=2))
    zeros = jnp.zeros(SIZE)
    with pytest.raises(ValueError, match="a dict of at least one flow"):
        ff.choose([FLOWS["full"]], zeros, batches)
    with pytest.raises(ValueError, match="a dict of at least one flow"):
        ff.choose({}, zeros, batches)
    sparse = ff.sparse.flow(ff.likelihoods.bernoulli(), 9)
    with pytest.raises(TypeError, match=r"flows\['few'\] is a sparse flow.*by them"):
        ff.choose({"full": FLOWS["full"], "few": sparse}, zeros, batches)
    with pytest.raises(TypeError, match=r"flows\[1\] is a sparse flow"):
        ff.bank([FLOWS["full"], sparse])
    other = ff.fisher_flow(MODEL[0], ff.likelihoods.gaussian(2.0))
    with pytest.raises(ValueError, match="choose among flows of one"):
        ff.choose({"one": FLOWS["full"], "two": other}, zeros, batches)
    with pytest.raises(ValueError, match="num_rounds"):
        ff.choose({"one": FLOWS["full"]}, zeros, batches, num_rounds=0)

    def nothing(state, apply_fn, likelihood, batch):
        return jnp.full(batch.targets.shape, jnp.nan)

    with pytest.raises(ValueError, match="no flow has a finite score"):
        ff.choose({"one": FLOWS["full"]}, zeros, batches, judge=nothing)


STREAMS = {
    "stands": ({}, "full"),
    "stands, uncorrelated": ({"correlated": False}, "full"),
    "drifts": ({"drift": 0.1}, "full walk"),
    "jumps": ({"jumps": True}, None),
}


@functools.cache
def mean_score(name):
    """Of a flow over streams of the same coefficients."""

    def score(key, truth):
        def step(state, batch):
            ahead = FLOWS[name].advance(state, batch)
            after, _ = FLOWS[name].update(state, batch)
            return after, ff.calibration.log_score(ahead, *MODEL, batch).sum()

        start = FLOWS[name].init(jnp.zeros(SIZE))
        return jax.lax.scan(step, start, around(key, truth))[1].sum()

    return jax.jit(lambda keys, truth: jax.vmap(score, (0, None))(keys, truth).mean())


@pytest.mark.slow
@pytest.mark.parametrize("name", STREAMS)
def test_the_truth_is_chosen(name, record_property):
    """In at least 17 of 20 streams, among all flows.

    It is the flow whose belief is the posterior of what made the stream, and which
    nothing else predicts better than on average. What jumps is made by none: there it
    is the one that predicts best on average over streams of the same coefficients.
    """
    options, wanted = STREAMS[name]
    best, right = [], []
    for key in jax.random.split(jax.random.key(6), 20):
        best.append(chosen(FLOWS, stream(key, **options)).best)
        truth = wanted
        if truth is None:
            again = (
                jax.random.split(jax.random.fold_in(key, 0), 16),
                path(key, **options),
            )
            forgetful = "full walk", "full .7", "full .9"
            truth = max(forgetful, key=lambda each: mean_score(each)(*again))
        right.append(truth == best[-1])
    told = {each: best.count(each) for each in set(best)}
    record_property("chosen", f"{sum(right)} of 20 right: {told}")
    assert sum(right) >= 17


@pytest.mark.slow
@pytest.mark.parametrize("correlated", [True, False])
def test_low_rank_beside_the_truth(correlated, record_property):
    """As good where two directions keep all of the information.

    Its evidence is higher than that of the truth, which no density can be.
    """
    keys = jax.random.split(jax.random.key(6), 20)
    pair = {name: FLOWS[name] for name in ("full", "low rank")}
    tables = [
        chosen(pair, stream(key, correlated=correlated), num_rounds=1).table
        for key in keys
    ]
    score, evidence = (
        np.array([getattr(t["full"], f) - getattr(t["low rank"], f) for t in tables])
        for f in ("log_score", "log_evidence")
    )
    told = {
        "by score": int(np.sum(score > 0)),
        "by evidence": int(np.sum(evidence > 0)),
        "nats by score": f"{np.mean(score):.2f} ({np.std(score) / np.sqrt(20):.2f})",
    }
    record_property("the truth before low rank", told)
    assert np.mean(score) > 0
    if correlated:
        assert told["by score"] > told["by evidence"]
        assert told["by evidence"] <= 8
        assert np.mean(evidence) < 0


NORMAL = ff.likelihoods.gaussian(SCALE)
PAIR = ("full", "diagonal")


def pair(likelihood, apply_fn=MODEL[0], **options):
    return {
        name: ff.fisher_flow(
            apply_fn, likelihood, structure=STRUCTURES[name], num_steps=4, **options
        )
        for name in PAIR
    }


@pytest.mark.slow
def test_an_unknown_dispersion_is_judged_from_the_first_batch_that_is_predicted():
    batches = stream(jax.random.key(7), times=4)
    likelihood = ff.likelihoods.gaussian(None)
    flows, scores = pair(likelihood), {}

    @jax.jit
    def judge(state, batch):  # NaN where nothing is predicted yet
        return ff.calibration.log_score(state, MODEL[0], likelihood, batch).sum()

    for name, flow in flows.items():
        state, scores[name] = flow.init(jnp.zeros(SIZE)), []
        for batch in zip(*batches, strict=True):
            scores[name].append(float(judge(state, batch)))
            state, _ = flow.update(state, batch)
    first = max(int(np.isnan(each).sum()) for each in scores.values())
    assert first > 0
    ranking = chosen(flows, batches)
    for name, each in scores.items():
        mean = np.mean(each[first:]) / ROWS
        np.testing.assert_allclose(ranking.table[name].log_score, mean, rtol=1e-8)
        assert 0.7 < ranking.table[name].coverage <= 1


@pytest.mark.slow
def test_a_bad_row_is_left_out_of_scores_and_told():
    x, y = stream(jax.random.key(8), times=4)
    spoilt, weights = y.at[2, 3].set(jnp.nan), np.ones((4, ROWS))
    weights[2, 3] = 0
    wanted = chosen(pair(NORMAL), (x, y, weights))
    with pytest.warns(ff.DataWarning, match="1 rows were left out"):
        found = chosen(pair(NORMAL), (x, spoilt))
    silent = chosen(pair(NORMAL, bad_rows="drop"), (x, spoilt))
    for name in PAIR:
        for one in (found, silent):
            np.testing.assert_allclose(
                one.table[name][:4], wanted.table[name][:4], rtol=1e-10
            )


@pytest.mark.slow
def test_errors_that_go_together_are_scored_together():
    """Of what is there of an example, and covered by its share of targets."""
    x, y = stream(jax.random.key(9), times=3)
    noise = jnp.array([[1.0, 0.6], [0.6, 1.0]])
    likelihood = ff.likelihoods.gaussian(covariance=noise)

    def apply_fn(params, x):
        return jnp.stack([x @ params, x @ params[::-1]], -1)

    flow = pair(likelihood, apply_fn)["full"]
    targets = jnp.stack([y, y[:, ::-1]], -1).at[1, 0, 1].set(jnp.nan)
    targets = targets.at[2, 4].set(jnp.nan)
    with pytest.warns(ff.DataWarning, match="2 rows were left out"):
        ranking = chosen({"one": flow}, (x, targets))
    state, total, inside, rows = flow.init(jnp.zeros(SIZE)), 0.0, 0.0, 0
    for inputs, seen in zip(x, targets, strict=True):
        covariance = np.linalg.inv(ff.information.to_dense(state.information))
        for row, target in zip(inputs, seen, strict=True):
            there = np.isfinite(target)
            if not np.any(there):
                continue
            rows += 1
            slopes = np.stack([row, row[::-1]])[there]
            spread = slopes @ covariance @ slopes.T + np.array(noise)[there][:, there]
            away = np.asarray(target)[there] - slopes @ np.asarray(state.mean)
            total += stats.multivariate_normal.logpdf(away, cov=spread)
            inside += np.mean(np.abs(away) < 1.6448536 * np.sqrt(np.diag(spread)))
        batch = ff.Batch(inputs, seen, mask=jnp.isfinite(seen))
        state, _ = flow.update(
            state, batch._replace(targets=jnp.where(batch.mask, seen, 0.0))
        )
    np.testing.assert_allclose(ranking.table["one"].log_score, total / rows, rtol=1e-8)
    np.testing.assert_allclose(ranking.table["one"].coverage, inside / rows, rtol=1e-8)


def test_a_log_score_is_of_targets_such_as_the_likelihood_has():
    x, y = stream(jax.random.key(10), times=1)
    state = FLOWS["full"].init(jnp.zeros(SIZE))
    with pytest.raises(ValueError, match="drop it"):
        ff.calibration.log_score(state, *MODEL, (x[0], y[0][:, None]))
    with pytest.raises(ValueError, match="batch's are None"):
        ff.calibration.log_score(state, *MODEL, (x[0], None))


def test_nothing_to_judge():
    x, y = stream(jax.random.key(11), times=1)
    with pytest.raises(ValueError, match="rows that have a weight"):
        chosen(pair(NORMAL), (x, y, np.zeros((1, ROWS))))
