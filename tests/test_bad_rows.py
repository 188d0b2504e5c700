"""Rows that are no data, wherever a batch is given: as at weight 0, or told by name."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fisherflow_jax as ff
from together import together

RNG = np.random.default_rng(0)
X = RNG.normal(size=(8, 3))
LABELS = RNG.integers(0, 3, (8, 2))
PARAMS = {"w": RNG.normal(size=(3, 6)) / 2}
CATEGORICAL = ff.likelihoods.categorical()


def apply_fn(params, x):
    return (x @ params["w"]).reshape((-1, 2, 3))


MODEL = apply_fn, CATEGORICAL


def spoilt():
    """A bad input in row 1, a bad target in row 4, two in row 6."""
    x, labels, weights = X.copy(), LABELS.copy(), np.ones((8, 2))
    x[1, 2], labels[4, 0], labels[6] = np.nan, 3, -1
    weights[1], weights[4, 0], weights[6] = 0, 0, 0
    return (x, labels), weights


BAD, SEEN = spoilt()
# the example stays the observation: one mask for its targets, one weight for it
MASKED = ff.Batch(X, LABELS, SEEN.any(1), mask=SEEN > 0)
CLOSE = functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-12)


def close(left, right):
    jax.tree.map(CLOSE, left, right)


@pytest.mark.slow
def test_losses_and_scores():
    loss = ff.negative_log_likelihood(*MODEL)
    values = -jax.jit(CATEGORICAL.log_prob)(apply_fn(PARAMS, X), LABELS)
    expected = np.sum(values * SEEN) / 6  # two of eight examples have no target left
    CLOSE(jax.jit(loss)(PARAMS, BAD), expected)
    dropping = ff.negative_log_likelihood(*MODEL, bad_rows="drop")
    CLOSE(dropping(PARAMS, BAD), expected)
    gradient = jax.jit(jax.grad(loss))(PARAMS, BAD)
    close(gradient, jax.jit(jax.grad(loss))(PARAMS, MASKED))
    assert np.all(np.isfinite(gradient["w"]))
    scores = np.asarray(ff.scores(*MODEL, PARAMS, BAD, bad_rows="drop")["w"])
    assert not np.any(scores[[1, 6]]) and np.any(scores[4])
    CLOSE(scores.sum(0), -6 * gradient["w"])
    compiled = jax.jit(lambda p, b: ff.scores(*MODEL, p, b))(PARAMS, BAD)
    CLOSE(compiled["w"], scores)


@pytest.mark.slow
@pytest.mark.parametrize("structure", ["diagonal", "full"])
def test_an_accumulation_and_a_flow_count_alike(structure):
    kept = getattr(ff.structures, structure)()
    estimator = ff.estimators.exact(*MODEL, kept)
    state = ff.accumulate(estimator, PARAMS, [BAD, BAD], bad_rows="drop")
    assert (state.count, state.rows_skipped, state.num_skipped) == (12, 6, 0)
    expected = estimator(PARAMS, MASKED)
    close(state.information, ff.information.scale(expected, 2.0))
    flow = ff.fisher_flow(*MODEL, structure=kept, bad_rows="drop")
    after, info = flow.update(flow.init(PARAMS), BAD)
    assert (after.count, after.events.rows_skipped, info.rows_skipped) == (6, 3, 3)
    by_hand, _ = flow.update(flow.init(PARAMS), MASKED)
    close((after.mean, after.information), (by_hand.mean, by_hand.information))
    refined = ff.refine(flow, after, [BAD])
    assert refined.count == 6
    close(refined.mean, ff.refine(flow, by_hand, [MASKED]).mean)


@functools.cache
def optimizer(bad_rows="raise", **options):
    layers = ff.layers.find_layers(apply_fn, PARAMS, X)
    options = {"estimator": ff.estimators.exact, "max_kl": 0.1} | options
    return ff.kfac(0.1, *MODEL, layers, bad_rows=bad_rows, **options)


@pytest.mark.slow
def test_a_step_of_kfac():
    loss = ff.negative_log_likelihood(*MODEL)

    @jax.jit
    def step(batch):
        transformation = optimizer()
        gradients = jax.grad(loss)(PARAMS, batch)
        start = transformation.init(PARAMS)
        return transformation.update(gradients, start, PARAMS, batch=batch)

    updates, state = step(BAD)
    expected, of_masked = step(MASKED)
    close(updates, expected)
    counts = [
        (optax.tree.get(s, "rows_skipped"), optax.tree.get(s, "num_skipped"))
        for s in (state, of_masked)
    ]
    assert counts == [(3, 0), (0, 0)]
    assert optax.tree.get(state, "observations") == optax.tree.get(
        of_masked, "observations"
    )
    dropping = optimizer("drop")
    gradients = jax.tree.map(jnp.ones_like, PARAMS)
    _, state = dropping.update(gradients, dropping.init(PARAMS), PARAMS, batch=BAD)
    assert optax.tree.get(state, "rows_skipped") == 3


def test_models_whose_examples_interact_are_refused_whole():
    def centred(params, x):
        return apply_fn(params, x - x.mean(0))

    model = centred, CATEGORICAL
    assert np.isnan(jax.jit(ff.negative_log_likelihood(*model))(PARAMS, BAD))
    estimator = ff.estimators.exact(*model, ff.structures.diagonal())
    gather = ff.accumulator(estimator)
    state = jax.jit(gather.update)(gather.init(PARAMS), PARAMS, BAD)
    assert (state.num_skipped, state.rows_skipped, state.count) == (1, 0, 0)
    descent = ff.natural_gradient(0.1, estimator)
    gradients = jax.tree.map(jnp.ones_like, PARAMS)
    updates, state = jax.jit(descent.update)(
        gradients, descent.init(PARAMS), PARAMS, batch=BAD
    )
    assert not np.any(updates["w"]) and optax.tree.get(state, "num_skipped") == 1


def update_of(transformation, batch):
    gradients, start = jax.tree.map(jnp.ones_like, PARAMS), transformation.init(PARAMS)
    return transformation.update(gradients, start, PARAMS, batch=batch)


EXACT = ff.estimators.exact(*MODEL, ff.structures.diagonal())
WAYS = {
    "loss": lambda b: ff.negative_log_likelihood(*MODEL)(PARAMS, b),
    "its gradient": lambda b: jax.grad(ff.negative_log_likelihood(*MODEL))(PARAMS, b),
    "closed over": lambda b: jax.jit(
        lambda p: ff.negative_log_likelihood(*MODEL)(p, b)
    )(PARAMS),
    "scores": lambda b: ff.scores(*MODEL, PARAMS, b),
    "estimator": lambda b: EXACT(PARAMS, b),
    "accumulate": lambda b: ff.accumulate(EXACT, PARAMS, [b]),
    "stacked": lambda b: ff.accumulate(
        EXACT, PARAMS, ff.Stacked(*(part[None] for part in b))
    ),
    "accumulator": lambda b: ff.accumulator(EXACT).update(
        ff.accumulator(EXACT).init(PARAMS), PARAMS, b
    ),
    "kfac": lambda b: update_of(optimizer(), b),
    "natural_gradient": lambda b: update_of(ff.natural_gradient(0.1, EXACT), b),
    "flow": lambda b: ff.fisher_flow(*MODEL).update(
        ff.fisher_flow(*MODEL).init(PARAMS), b
    ),
    "evaluate": lambda b: ff.fisher_flow(*MODEL).evaluate(PARAMS, b),
}
# Of these a batch of other shapes costs seconds of compiling, and all of them refuse it
# by one function, whatever its fault.
COMPILED = "accumulate", "stacked", "kfac", "natural_gradient", "flow", "evaluate"
CASES = {
    "input": (
        BAD,
        r"row 1 .*inputs\[1, 2\] = nan, which is not finite, and .* rows 4, 6",
    ),
    "class": (
        (X, np.where(np.arange(16).reshape((8, 2)) == 9, 7, LABELS)),
        r"row 4 .*targets\[4, 1\] = 7, which is none of the model's 3 classes\. Mend",
    ),
    "weight": (
        (X, LABELS, np.where(np.arange(8) == 5, np.inf, 1.0)),
        r"row 5 .*weights\[5\] = inf, which is no multiplicity",
    ),
    "weight of a target": (
        (X, LABELS, np.where(np.arange(16).reshape((8, 2)) == 9, -1.0, 1.0)),
        r"row 4 .*weights\[4, 1\] = -1.0, which is no multiplicity",
    ),
}


@pytest.mark.slow
@together
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", CASES)
def test_where_values_are_at_hand_they_raise(way, case):
    batch, message = CASES[case]
    if way in COMPILED and case == "weight of a target":
        return
    if way == "estimator" and case.startswith("weight"):
        message = "weights must be finite and not negative"
    with pytest.raises(ValueError, match=message):
        WAYS[way](batch)


def test_a_leaf_is_named_and_shared_parts_are_not_looked_at():
    def shifted(params, inputs):
        return inputs["x"] @ params["w"] - 0 * jnp.nan_to_num(inputs["table"]).sum()

    loss = ff.negative_log_likelihood(shifted, ff.likelihoods.gaussian())
    inputs = {"x": X.copy(), "table": ff.Shared(np.full(2, np.nan))}
    assert np.isfinite(loss(PARAMS, (inputs, np.zeros((8, 6)))))
    inputs["x"][2, 0] = -np.inf
    with pytest.raises(ValueError, match=r"row 2 .*inputs\.x\[2, 0\] = -inf"):
        loss(PARAMS, (inputs, np.zeros((8, 6))))


def test_a_target_of_several_numbers_is_bad_if_one_is():
    def log_prob(outputs, targets):  # of a value and its precision
        return -0.5 * (targets[..., 0] - outputs) ** 2 * targets[..., 1]

    likelihood = ff.likelihoods.from_log_prob(log_prob, lambda key, z: z[..., None])
    targets = np.random.default_rng(1).normal(size=(8, 2)) ** 2
    loss = ff.negative_log_likelihood(lambda w, x: x @ w, likelihood, bad_rows="drop")
    whole = loss(np.zeros(3), (X, targets, np.arange(8) != 3))
    targets[3, 1] = np.nan
    CLOSE(loss(np.zeros(3), (X, targets)), whole)


@pytest.mark.slow
def test_the_old_behaviour_of_a_flow():
    """A batch with a bad row counts for nothing: its weights times whether it has."""
    flow = ff.fisher_flow(*MODEL)

    @jax.jit
    def update(state, batch):
        x, labels = batch
        sound = jnp.all(jnp.isfinite(x)) & jnp.all((labels >= 0) & (labels < 3))
        return flow.update(state, (x, labels, jnp.full(8, sound.astype(float))))

    start = flow.init(PARAMS)
    after, info = update(start, BAD)
    assert info.missing and after.count == 0
    close(after.mean, PARAMS)
    assert update(start, (X, LABELS))[0].count == 8
