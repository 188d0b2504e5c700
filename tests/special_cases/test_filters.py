"""Filters as state-space software means them: the start, gaps in time, known noise.

The flow is built within one compiled program, of whose arguments all is traced: noise,
transition and prior.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fisherflow_jax as ff
import streams

TIMES, STATES, CHANNELS = 6, 4, 2
rng = np.random.default_rng(5)
TARGETS = 3 * rng.normal(size=(TIMES, CHANNELS))
LOOKS = np.tile(np.eye(CHANNELS, STATES), (TIMES, 1, 1))
ERRORS = np.array([[0.5, 0.3], [0.3, 0.8]])
GAPS = np.array([1.0, 0.5, 2.0, 0.1, 3.0, 1.0])
SCALE = 0.7
EVERYTHING = np.ones((TIMES, CHANNELS))


def velocity(gap):
    """Positions and velocities in the plane, pushed by white noise, after a gap."""
    move, noise = np.eye(STATES), np.zeros((STATES, STATES))
    for i in range(2):
        move[i, i + 2] = gap
        noise[i, i], noise[i + 2, i + 2] = gap**3 / 3, gap
        noise[i, i + 2] = noise[i + 2, i] = gap**2 / 2
    return move, 0.1 * noise


def kalman(targets, looks, errors, moves, noises, mean, covariance):
    """The textbook filter in covariance form; `mean` and `covariance` are predicted for
    the first target, targets that are NaN are missing."""
    means, covariances, evidence = [], [], 0.0
    for time, (y, look, move, noise) in enumerate(
        zip(targets, looks, moves, noises, strict=True)
    ):
        if time > 0:
            mean, covariance = move @ mean, move @ covariance @ move.T + noise
        seen = np.isfinite(y)
        design, error = look[seen], errors[np.ix_(seen, seen)]
        spread = design @ covariance @ design.T + error
        residual = y[seen] - design @ mean
        evidence -= 0.5 * residual @ np.linalg.solve(spread, residual)
        evidence -= 0.5 * np.linalg.slogdet(2 * np.pi * spread)[1]
        gain = np.linalg.solve(spread, design @ covariance).T
        mean, covariance = (
            mean + gain @ residual,
            covariance - gain @ design @ covariance,
        )
        means.append(mean)
        covariances.append(covariance)
    return np.stack(means), np.stack(covariances), evidence


@functools.partial(jax.jit, static_argnames="prior_is")
def filtered(
    targets, errors, moves, noises, mean, covariance, weights, prior_is="predicted"
):
    flow = ff.fisher_flow(
        lambda state, inputs: inputs["look"] @ state,
        ff.likelihoods.gaussian(covariance=errors),
        structure=ff.structures.full(),
        memory=ff.memories.random_walk(
            lambda batch: batch.inputs["noise"], lambda batch: batch.inputs["move"]
        ),
        prior_precision=ff.structures.Full(jnp.linalg.inv(covariance)),
        num_steps=1,
        prior_is=prior_is,
    )
    inputs = {
        "look": jnp.asarray(LOOKS, mean.dtype)[:, None],
        # of the whole batch; scan takes their slices too
        "move": ff.Shared(moves),
        "noise": ff.Shared(noises),
    }

    def step(state, batch):
        state, info = flow.update(state, batch)
        dense = ff.information.to_dense(state.information)
        return state, (state.mean, dense, info.skipped)

    batches = inputs, targets[:, None], weights[:, None]
    state, steps = jax.lax.scan(step, flow.init(jnp.zeros_like(mean), mean), batches)
    return state.log_evidence, *steps


CONSTANT = [np.stack(x) for x in zip(*map(velocity, np.ones(TIMES)), strict=True)]
UNEVEN = [np.stack(x) for x in zip(*map(velocity, GAPS), strict=True)]
SINGULAR = np.zeros((STATES, STATES))
SINGULAR[0], SINGULAR[1, 0] = 0.4, 1.0  # an autoregression, in companion form
NOISE = np.diag([0.5, 0.1, 0.1, 0.1]) + 0.02
MODELS = {
    "constant velocity": (*CONSTANT, 100 * np.eye(STATES)),
    "gaps in time": (*UNEVEN, 100 * np.eye(STATES)),
    "singular": (
        np.tile(SINGULAR, (TIMES, 1, 1)),
        np.tile(NOISE, (TIMES, 1, 1)),
        np.diag([2.0, 1.0, 0.5, 3.0]) + 0.3,
    ),
}
MISSING = {
    "none": [],
    "the first": [0],
    "a hole": [2, 3],
    "channels": ([0, 2, 3, 3], [1, 0, 0, 1]),
}


@pytest.mark.parametrize("missing", MISSING)
@pytest.mark.parametrize("model", MODELS)
def test_a_predicted_prior_is_the_first_state_of_a_textbook_filter(model, missing):
    moves, noises, covariance = MODELS[model]
    mean = np.array([1.0, -1.0, 0.5, 0.0])
    weights, targets = EVERYTHING.copy(), TARGETS.copy()
    weights[MISSING[missing]], targets[MISSING[missing]] = 0, np.nan
    expected = kalman(targets, LOOKS, ERRORS, moves, noises, mean, covariance)
    evidence, means, informations, skipped = filtered(
        TARGETS, ERRORS, moves, noises, mean, covariance, weights
    )
    assert not skipped.any()
    np.testing.assert_allclose(means, expected[0], rtol=1e-9, atol=1e-9)
    covariances = np.linalg.inv(informations)
    np.testing.assert_allclose(covariances, expected[1], rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(evidence, expected[2], rtol=1e-9)


@pytest.mark.slow
def test_filters_side_by_side_in_float32():
    moves, noises, covariance = MODELS["gaps in time"]
    mean, weights = np.ones(STATES), np.stack([EVERYTHING] * len(MISSING))
    for own, missing in zip(weights, MISSING.values(), strict=True):
        own[missing] = 0
    given = (TARGETS, ERRORS, moves, noises, mean, covariance)
    given = [jnp.asarray(x, jnp.float32) for x in given]
    evidences, means, *_ = jax.vmap(functools.partial(filtered, *given))(
        jnp.asarray(weights, jnp.float32)
    )
    assert means.dtype == jnp.float32
    for own, evidence, path in zip(weights, evidences, means, strict=True):
        targets = np.where(own > 0, TARGETS, np.nan)
        expected = kalman(targets, LOOKS, ERRORS, moves, noises, mean, covariance)
        np.testing.assert_allclose(path, expected[0], rtol=1e-3, atol=1e-3)
        np.testing.assert_allclose(evidence, expected[2], rtol=1e-4)


@pytest.mark.slow
def test_a_predicted_prior_is_that_of_dynamax():
    dynamax = pytest.importorskip("dynamax.linear_gaussian_ssm")
    (move, *_), (noise, *_) = CONSTANT
    params = dynamax.LinearGaussianSSM(STATES, CHANNELS).initialize(
        initial_mean=jnp.ones(STATES),
        initial_covariance=100 * jnp.eye(STATES),
        dynamics_weights=jnp.asarray(move),
        dynamics_covariance=jnp.asarray(noise),
        emission_weights=jnp.asarray(LOOKS[0]),
        emission_covariance=jnp.asarray(ERRORS),
    )[0]
    theirs = jax.jit(dynamax.lgssm_filter)(params, jnp.asarray(TARGETS))
    start = np.ones(STATES), 100 * np.eye(STATES)
    evidence, means, informations, _ = filtered(
        TARGETS, ERRORS, *CONSTANT, *start, EVERYTHING
    )
    # dynamax adds 1e-9 to what it solves with
    np.testing.assert_allclose(means, theirs.filtered_means, atol=1e-7)
    covariances = np.linalg.inv(informations)
    np.testing.assert_allclose(covariances, theirs.filtered_covariances, atol=1e-6)
    np.testing.assert_allclose(evidence, theirs.marginal_loglik, rtol=1e-8)


def test_by_default_the_state_moves_before_the_first_batch():
    moves, noises = UNEVEN
    mean, covariance = np.ones(STATES), np.eye(STATES)
    evidence, means, *_ = filtered(
        TARGETS,
        ERRORS,
        moves,
        noises,
        mean,
        covariance,
        EVERYTHING,
        prior_is="previous",
    )
    predicted = moves[0] @ covariance @ moves[0].T + noises[0]
    expected = kalman(TARGETS, LOOKS, ERRORS, moves, noises, moves[0] @ mean, predicted)
    np.testing.assert_allclose(means, expected[0], rtol=1e-9)
    np.testing.assert_allclose(evidence, expected[2], rtol=1e-9)


@pytest.mark.slow
def test_the_evidence_has_a_gradient_in_both_noises():
    moves, noises = UNEVEN
    start = np.ones(STATES), np.eye(STATES)

    def textbook(q, r):
        return kalman(TARGETS, LOOKS, r * ERRORS, moves, q * noises, *start)[2]

    def evidence(q, r):
        return filtered(TARGETS, r * ERRORS, moves, q * noises, *start, EVERYTHING)[0]

    value, slopes = jax.value_and_grad(evidence, (0, 1))(jnp.array(0.8), jnp.array(1.2))
    np.testing.assert_allclose(value, textbook(0.8, 1.2), rtol=1e-10)
    step = 1e-5
    differences = [
        (textbook(0.8 + step, 1.2) - textbook(0.8 - step, 1.2)) / (2 * step),
        (textbook(0.8, 1.2 + step) - textbook(0.8, 1.2 - step)) / (2 * step),
    ]
    np.testing.assert_allclose(slopes, differences, rtol=1e-7)


def wandering(structure, noise, transition=None, **options):
    return ff.fisher_flow(
        lambda params, x: x["row"] @ params["a"] + params["b"],
        ff.likelihoods.gaussian(SCALE),
        structure=structure,
        memory=ff.memories.random_walk(noise, transition),
        num_steps=1,
        **options,
    )


BLOCK = ff.structures.block({"a": "one", "b": "two"})
JOINT = np.array([[0.3, 0.1, 0.0], [0.1, 0.2, 0.0], [0.0, 0.0, 0.4]])
STEP = np.array([[0.9, 0.2, 0.0], [0.1, 0.8, 0.0], [0.0, 0.0, 0.7]])
START = {"a": jnp.zeros(2), "b": jnp.zeros(())}
ROWS = rng.normal(size=(3, 2, 2))
STREAM = ({"row": ROWS, "gap": np.full((3, 2), 2.0)}, ROWS[..., 0])
WEIGHTS = np.array([[1.0, 1.0], [0.0, 0.0], [1.0, 0.0]])
KINDS = {
    "full": (ff.structures.full(), JOINT, STEP),
    "block": (BLOCK, JOINT, STEP),
    "diagonal": (ff.structures.diagonal(), {"a": 0.2, "b": 0.1}, {"a": 0.9, "b": 0.5}),
    "scalar": (ff.structures.scalar(), 0.2, 0.9),
}


def loop(flow):
    state = flow.init(START)
    for i in range(3):
        batch = jax.tree.map(lambda x: x[i], (*STREAM, WEIGHTS))  # noqa: B023
        state, _ = flow.update(state, batch)
    return state


def doubled(structure, noise, move):
    def noise_of(batch):
        return jax.tree.map(lambda x: batch.inputs["gap"][0] * x, noise)

    return wandering(structure, noise_of, move)


def assert_same(state, expected):
    assert state.step == 3
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-12),
        (state.mean, state.information, state.log_evidence),
        (expected.mean, expected.information, expected.log_evidence),
    )


@pytest.mark.slow_cases
@pytest.mark.parametrize("kind", KINDS)
def test_traced_and_as_functions_of_the_batch_they_are_what_they_are(kind):
    """Against the same numbers given once, an update at a time."""
    structure, noise, move = KINDS[kind]

    @jax.jit
    def scanned(noise, move):
        flow = doubled(structure, noise, move)
        batches = (*STREAM, WEIGHTS)
        return jax.lax.scan(flow.update, flow.init(START), batches)[0]

    twice = jax.tree.map(lambda x: 2 * x, noise)
    assert_same(scanned(noise, move), loop(wandering(structure, twice, move)))


def test_functions_of_the_batch_go_with_a_plain_loop():
    structure, noise, move = KINDS["diagonal"]
    twice = jax.tree.map(lambda x: 2 * x, noise)
    expected = loop(wandering(structure, twice, move))
    assert_same(loop(doubled(structure, noise, move)), expected)


BATCH = jax.tree.map(lambda x: x[0], STREAM)


@functools.partial(jax.jit, static_argnums=0)
def updated(structure, noise, transition):
    flow = wandering(structure, noise, transition)
    state = flow.init(START)
    return state, *flow.update(state, BATCH)


@pytest.mark.slow_cases
@pytest.mark.parametrize(
    ("structure", "noise", "transition"),
    [
        (ff.structures.full(), -0.1, 1.0),
        (ff.structures.full(), JOINT, STEP * np.nan),
        (ff.structures.full(), np.triu(JOINT), STEP),
        (ff.structures.diagonal(), {"a": 0.1, "b": np.nan}, None),
        (BLOCK, JOINT + 0.1, STEP),
        (BLOCK, JOINT, STEP + 0.1),
    ],
    ids=[
        "negative",
        "not finite",
        "asymmetric",
        "NaN",
        "noise couples",
        "move couples",
    ],
)
def test_what_is_no_noise_or_leaves_the_structure_moves_nothing(
    structure, noise, transition
):
    before, after, info = updated(structure, noise, transition)
    assert info.skipped
    assert after.num_skipped == 1
    jax.tree.map(np.testing.assert_array_equal, before.information, after.information)


@pytest.mark.slow
def test_an_eager_update_names_what_is_wrong():
    flow = wandering(BLOCK, lambda batch: -batch.inputs["gap"][0])
    with pytest.raises(ValueError, match=r"process_noise is a variance.*got -2"):
        flow.update(flow.init(START), BATCH)
    flow = wandering(BLOCK, 0.1, lambda batch: batch.inputs["gap"][0] * (STEP + 1))
    with pytest.raises(ValueError, match="transition couples parameters of different"):
        flow.update(flow.init(START), BATCH)


def test_a_start_that_is_no_start_is_refused():
    with pytest.raises(ValueError, match=r"'previous' or 'predicted'; got 'first'"):
        wandering(ff.structures.full(), 0.1, prior_is="first")


@pytest.mark.parametrize("memory", ["windowed", "unfloored"])
def test_every_memory_begins_at_the_first_batch(memory):
    """Also one whose storage fills, and one that forgets its prior."""
    flow = streams.flow("full", memory, prior_is="predicted")
    state = streams.run(flow, streams.start(flow), streams.batches(4))[-1]
    mean, information = streams.fit(memory, 5)
    if memory == "unfloored":  # all is one update older but the prior
        prior = streams.PRECISION * np.eye(3) * streams.DECAY**6
        younger = information + prior / streams.DECAY - prior
        shift = information @ mean + (prior / streams.DECAY - prior) @ streams.ORIGIN
        mean, information = np.linalg.solve(younger, shift), younger
    np.testing.assert_allclose(streams.flat(state.mean), mean, rtol=1e-10)
    np.testing.assert_allclose(
        streams.dense(state.information), information, rtol=1e-10
    )


def test_workers_that_begin_at_their_first_batch_share_one_prior():
    flow = streams.flow("full", "unfloored", prior_is="predicted")
    start = streams.start(flow)
    first, second = streams.batches(4)[:4], streams.batches(4)[2:]
    workers = [streams.run(flow, start, stream)[-1] for stream in (first, second)]
    prior = streams.PRECISION * np.eye(3) * streams.DECAY**3
    apart = [streams.dense(worker.information) - prior for worker in workers]
    merged = ff.merge(workers, start)
    np.testing.assert_allclose(
        streams.dense(merged.information), prior + sum(apart), rtol=1e-10
    )


@jax.jit
def local_level(noise, levels, weights):
    flow = ff.fisher_flow(
        lambda level, _: level[None],
        ff.likelihoods.gaussian(jnp.sqrt(noise["seen"])),
        memory=ff.memories.random_walk(noise["level"]),
        prior_precision=1e-7,
        num_steps=1,
        prior_is="predicted",
    )

    def step(state, batch):
        state, info = flow.update(state, batch)
        return state, (state.mean, ff.standard_error(state), info.log_evidence)

    batches = jnp.zeros_like(levels), levels, weights
    return jax.lax.scan(step, flow.init(jnp.array(0.0)), batches)[1]


@pytest.mark.slow
def test_the_level_of_the_nile():
    """Durbin, Koopman, "Time Series Analysis by State Space Methods", 2012, chapter 2:
    the likelihood's maximum, and the level through two holes of twenty years."""
    kalman_filter = pytest.importorskip("statsmodels.tsa.statespace.kalman_filter")
    nile = pytest.importorskip("statsmodels.api").datasets.nile
    levels = nile.load_pandas().data["volume"].to_numpy()
    noise = {"seen": jnp.array(15099.0), "level": jnp.array(1469.1)}
    stream, ones = jnp.asarray(levels)[:, None], np.ones((100, 1))

    def diffuse(logarithms):  # the first year only places the level
        *_, gains = local_level(jax.tree.map(jnp.exp, logarithms), stream, ones)
        return jnp.sum(gains[1:])

    value, slopes = jax.value_and_grad(diffuse)(jax.tree.map(jnp.log, noise))
    np.testing.assert_allclose(value, -632.54, atol=0.01)
    np.testing.assert_allclose([*slopes.values()], 0.0, atol=0.01)

    hole = np.zeros(100, bool)
    hole[20:40] = hole[60:80] = True
    theirs = kalman_filter.KalmanFilter(1, 1)
    theirs["design"] = theirs["transition"] = theirs["selection"] = np.eye(1)
    theirs["obs_cov"], theirs["state_cov"] = [[15099.0]], [[1469.1]]
    theirs.initialize_known(np.zeros(1), np.array([[1e7]]))
    theirs.bind(np.where(hole, np.nan, levels))
    expected = theirs.filter()
    seen = 1.0 - hole[:, None]
    means, errors, gains = local_level(noise, stream, seen)
    np.testing.assert_allclose(means, expected.filtered_state[0], rtol=1e-6)
    np.testing.assert_allclose(errors**2, expected.filtered_state_cov[0, 0], rtol=1e-6)
    np.testing.assert_allclose(jnp.sum(gains), expected.llf, rtol=1e-9)
    assert np.all(np.diff(errors[19:40]) > 0)  # what is not seen is known less and less
