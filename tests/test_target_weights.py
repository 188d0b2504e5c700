"""Weights of the targets' shape: a target is an observation, against rows of their own.

The model is run token by token, so that `(n, T)` targets with weights are the same data
as `(n T,)` rows with these weights, in sums, means, counts, steps and evidence.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fisherflow_jax as ff
from together import together

COUNT, TOKENS, CLASSES = 4, 3, 3
CLOSE = {"rtol": 1e-9, "atol": 1e-11}


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


X = draw(COUNT, TOKENS, 2, seed=1)
CATEGORICAL, PARAMS = ff.likelihoods.categorical(), {"w": draw(2, CLASSES, seed=2)}
LABELS = np.random.default_rng(3).integers(0, CLASSES, (COUNT, TOKENS))
WEIGHTS = np.array([[1.0, 0, 0], [1, 2, 0.5], [0, 0, 0], [3, 1, 1]])
# what has weight zero may hold anything
HOLES = np.where(WEIGHTS > 0, LABELS, -100)
TOKENWISE = X, HOLES, WEIGHTS
ROWS = X.reshape((-1, 2)), LABELS.ravel(), WEIGHTS.ravel()


def apply_fn(params, x):
    return x @ params["w"]


def network(params, x):
    return jnp.tanh(x @ params["v"]) @ params["w"]


NETWORK = {"v": draw(2, 2, seed=4), "w": draw(2, CLASSES, seed=5)}
STRUCTURES = {
    "diagonal": ff.structures.diagonal(),
    "scalar": ff.structures.scalar(),
    "block": ff.structures.block(),
    "full": ff.structures.full(),
    "low_rank": ff.structures.low_rank(9),
}


@functools.cache
def as_rows(factory, name, **options):
    """An estimate token by token, and of rows."""
    built = factory(apply_fn, CATEGORICAL, STRUCTURES[name], **options)
    dense = jax.jit(lambda p, b: ff.information.to_dense(built(p, b), p))
    return dense(PARAMS, TOKENWISE), dense(PARAMS, ROWS)


@pytest.mark.slow
@together
@pytest.mark.parametrize("name", STRUCTURES)
def test_exact_information_of_every_structure(name):
    mine, rows = as_rows(ff.estimators.exact, name, chunk_size=3)
    np.testing.assert_allclose(mine, rows, **CLOSE)


@pytest.mark.slow
def test_observed_information_and_squared_gradients():
    for factory in (ff.estimators.observed, ff.estimators.squared_gradient):
        mine, rows = as_rows(factory, "full")
        np.testing.assert_allclose(mine, rows, **CLOSE)


def scores_of_tokens():
    def one(x, y):
        value = lambda w: jax.nn.log_softmax(x @ w)[y]  # noqa: E731
        return jax.grad(value)(PARAMS["w"])

    each = jax.jit(jax.vmap(jax.vmap(one)))(X, LABELS)
    return np.asarray(each).reshape((COUNT, TOKENS, -1))


def test_scores_and_their_squares():
    each, roots = scores_of_tokens(), np.sqrt(WEIGHTS)[..., None]
    scores = ff.scores(apply_fn, CATEGORICAL, PARAMS, TOKENWISE)["w"]
    expected = np.sum(WEIGHTS[..., None] * each, axis=1)
    np.testing.assert_allclose(scores.reshape((COUNT, -1)), expected, **CLOSE)
    empirical = ff.estimators.empirical(apply_fn, CATEGORICAL, STRUCTURES["full"])
    found = ff.information.to_dense(empirical(PARAMS, TOKENWISE))
    summed = np.sum(roots * each, axis=1)
    np.testing.assert_allclose(found, summed.T @ summed, **CLOSE)


@pytest.mark.slow_cases
@pytest.mark.parametrize(
    "choice",
    [
        ff.estimators.monte_carlo(),
        ff.estimators.monte_carlo(groups=1),
        ff.estimators.hutchinson(),
        ff.estimators.hutchinson(groups=None),
    ],
    ids=["monte_carlo", "a group", "hutchinson", "each example"],
)
def test_what_is_drawn_has_the_mean_of_the_rows(choice):
    estimator = choice(apply_fn, CATEGORICAL, STRUCTURES["full"])
    draws = 4000

    @jax.jit
    def drawn(keys):
        dense = lambda key: ff.information.to_dense(  # noqa: E731
            estimator(PARAMS, TOKENWISE, key)
        )
        return jax.vmap(dense)(keys)

    found = drawn(jax.random.split(jax.random.key(0), draws))
    exact = as_rows(ff.estimators.exact, "full", chunk_size=3)[1]
    error = np.abs(np.mean(found, 0) - exact) / (np.std(found, 0) / np.sqrt(draws))
    assert np.max(error) < 4  # of 36 entries, some equal


@pytest.mark.slow
@together
@pytest.mark.parametrize("sharing", ["expand", "pool"])
@pytest.mark.parametrize("batched", [False, True])
def test_kronecker_factors(sharing, batched):
    """Expanded positions are rows; pooled, ones are the factors of no weights."""
    layers = ff.layers.find_layers(network, NETWORK, X, batched=batched)
    structure = ff.structures.kronecker(
        layers, sharing=getattr(ff.structures.sharing, sharing)
    )
    # the batch is pulled back as one with random signs: from one key for each example
    found = ff.estimators.exact(network, CATEGORICAL, structure)
    key = jax.random.key(0) if batched else None
    dense = jax.jit(lambda *batch: ff.information.to_dense(found(NETWORK, batch, key)))
    ones = dense(X, LABELS, np.ones((COUNT, TOKENS)))
    np.testing.assert_allclose(ones, dense(X, LABELS), **CLOSE)
    if sharing == "expand" and not batched:
        flat = ff.structures.kronecker(ff.layers.find_layers(network, NETWORK, ROWS[0]))
        rows = ff.estimators.exact(network, CATEGORICAL, flat)
        expected = jax.jit(lambda *b: ff.information.to_dense(rows(NETWORK, b)))(*ROWS)
        np.testing.assert_allclose(dense(*TOKENWISE), expected, **CLOSE)


@functools.cache
def flow(kind):
    likelihood = {
        "categorical": CATEGORICAL,
        "dispersion": ff.likelihoods.gaussian(None),
    }[kind]
    return ff.fisher_flow(
        apply_fn if kind == "categorical" else lambda w, x: x @ w, likelihood
    )


@pytest.mark.slow_cases
@pytest.mark.parametrize("kind", ["categorical", "dispersion"])
def test_a_flow_of_targets_is_a_flow_of_rows(kind):
    here, start = flow(kind), {"categorical": PARAMS, "dispersion": np.zeros(2)}[kind]
    told = LABELS if kind == "categorical" else 1 + 2.0 * LABELS
    states = []
    for x, y, weights in ((X, told, WEIGHTS), (ROWS[0], told.ravel(), ROWS[2])):
        state = here.init(start)
        for order in (slice(None), slice(None, None, -1)):
            state, info = here.update(state, (x[order], y[order], weights[order]))
        states.append((state, info))
    (mine, info), (rows, of_rows) = states
    for name in ("mean", "count", "log_evidence", "residual"):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, **CLOSE),
            getattr(mine, name),
            getattr(rows, name),
        )
    assert mine.count == 2 * WEIGHTS.sum()
    np.testing.assert_allclose(info.log_likelihood, of_rows.log_likelihood, **CLOSE)


@pytest.mark.slow
def test_ones_give_the_same_sums_and_a_count_as_many_times_as_large():
    here, ones = flow("categorical"), np.ones((COUNT, TOKENS))
    start = here.init(PARAMS)
    targets, _ = here.update(start, (X, LABELS, ones))
    examples, _ = here.update(start, (X, LABELS))
    np.testing.assert_allclose(targets.mean["w"], examples.mean["w"], **CLOSE)
    assert (targets.count, examples.count) == (COUNT * TOKENS, COUNT)
    loss = ff.negative_log_likelihood(apply_fn, CATEGORICAL)
    np.testing.assert_allclose(
        loss(PARAMS, (X, LABELS, ones)), loss(PARAMS, (X, LABELS)) / TOKENS, **CLOSE
    )


def test_the_mean_loss_and_its_gradient():
    loss = jax.value_and_grad(ff.negative_log_likelihood(apply_fn, CATEGORICAL))
    mine, rows = jax.jit(loss)(PARAMS, TOKENWISE), jax.jit(loss)(PARAMS, ROWS)
    np.testing.assert_allclose(mine[0], rows[0], **CLOSE)
    np.testing.assert_allclose(mine[1]["w"], rows[1]["w"], **CLOSE)


@pytest.mark.slow
def test_accumulated_and_as_a_preconditioner():
    estimator = ff.estimators.exact(apply_fn, CATEGORICAL, STRUCTURES["full"])
    mine, rows = (
        ff.accumulate(estimator, PARAMS, [batch] * 3) for batch in (TOKENWISE, ROWS)
    )
    stack = ff.Stacked(*(np.stack([a, a, a]) for a in TOKENWISE))
    stacked = ff.accumulate(estimator, PARAMS, stack)
    assert mine.count == rows.count == stacked.count == 3 * WEIGHTS.sum()
    for other in (mine, stacked):
        np.testing.assert_allclose(
            ff.information.to_dense(other.information),
            ff.information.to_dense(rows.information),
            **CLOSE,
        )
    optimizer = ff.natural_gradient(0.1, estimator)
    start = optimizer.init(PARAMS)
    steps = [
        optimizer.update(PARAMS, start, PARAMS, batch=batch)
        for batch in (TOKENWISE, ROWS)
    ]
    np.testing.assert_allclose(steps[0][0]["w"], steps[1][0]["w"], **CLOSE)


def test_the_region_of_a_step():
    clip = ff.clip_by_kl(apply_fn, CATEGORICAL, max_kl=1e-3)
    state = clip.init(PARAMS)
    steps = [
        clip.update(PARAMS, state, PARAMS, batch=batch)[1].kl
        for batch in (TOKENWISE, ROWS)
    ]
    np.testing.assert_allclose(*steps, **CLOSE)


@pytest.mark.slow
def test_calibrated_and_judged():
    exact = ff.estimators.exact(apply_fn, CATEGORICAL, STRUCTURES["full"])
    state = ff.posterior(PARAMS, exact(PARAMS, ROWS), prior_precision=0.5)
    found = [
        ff.calibrate(state, apply_fn, CATEGORICAL, batch) for batch in (TOKENWISE, ROWS)
    ]
    for name in ("scale", "before", "after"):
        left, right = (getattr(one, name) for one in found)
        np.testing.assert_allclose(left, right, rtol=1e-8)
    diagonal = ff.estimators.exact(apply_fn, CATEGORICAL, STRUCTURES["diagonal"])
    errors = [
        ff.diagnostics.relative_error(
            diagonal(PARAMS, batch), *(apply_fn, CATEGORICAL, PARAMS, batch), 0
        )
        for batch in (TOKENWISE, ROWS)
    ]
    jax.tree.map(functools.partial(np.testing.assert_allclose, **CLOSE), *errors)


def test_shapes_that_do_not_fit_are_refused():
    exact = ff.estimators.exact(apply_fn, CATEGORICAL, STRUCTURES["full"])
    with pytest.raises(ValueError, match=r"got \(4, 2\) for targets \[\(4, 3\)\]"):
        exact(PARAMS, (X, LABELS, np.ones((COUNT, 2))))
    with pytest.raises(ValueError, match=r"\(4, 2\): give one an example, \(4,\)"):
        exact(PARAMS, (X, None, np.ones((COUNT, 2))))
    # without labels the outputs tell what a target is
    found = exact(PARAMS, (X, None, WEIGHTS))
    np.testing.assert_allclose(found.rows["w"], exact(PARAMS, TOKENWISE).rows["w"])
