"""Squares of sums over micro-batches: sampled labels, signed labels and probes."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import estimator_cases as cases
import fisherflow_jax as ff
from estimator_cases import COUNT, NAMED, STRUCTURES, WEIGHTS
from fisherflow_jax.estimators import _squares as squares
from program_size import largest
from sign_enumeration import KEY, example_keys, lookup, signs

EXACT = {"rtol": 1e-10, "atol": 1e-12}
FULL, DIAGONAL = STRUCTURES["full"], STRUCTURES["diagonal"]


def build(name, structure=DIAGONAL, model="categorical", **options):
    model = NAMED[model]
    factory = getattr(ff.estimators, name)
    return factory(model.apply_fn, model.likelihood, structure, **options)


def padded(model="categorical", count=8):
    """The model's batch with rows of weight zero that hold NaN."""
    model = NAMED[model]
    inputs = np.full((count, *model.inputs.shape[1:]), np.nan)
    inputs[:COUNT] = model.inputs
    targets = np.zeros((count, *model.targets.shape[1:]), model.targets.dtype)
    targets[:COUNT] = model.targets
    weights = np.zeros(count)
    weights[:COUNT] = WEIGHTS
    return inputs, targets, weights


def close(left, right, **tolerance):
    tolerance = tolerance or EXACT
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, **tolerance), left, right
    )


# ---- the mean over all outcomes


def test_sampled_labels_squared_per_batch_have_the_mean_of_the_information():
    model, count = NAMED["categorical"], 3
    labels = np.array(list(itertools.product(range(3), repeat=count)))
    keys = jax.vmap(lambda key: jax.random.split(key, 1)[0])(example_keys(count))
    batch = model.inputs[:count], None

    @jax.jit
    @jax.vmap
    def outcome(drawn):
        find = lookup(keys, drawn)
        likelihood = model.likelihood._replace(
            sample=lambda key, outputs: find(key).astype(jnp.int32)[None]
        )
        estimator = ff.estimators.monte_carlo(
            model.apply_fn, likelihood, FULL, groups=1
        )
        return ff.information.to_dense(estimator(model.params, batch, KEY))

    outputs, jacobians = cases.jacobian("categorical")
    probabilities = cases.softmax(outputs)[np.arange(count)[None], labels].prod(1)
    mean = np.einsum("l,lde->de", probabilities, np.asarray(outcome(labels)))
    inner = cases.categorical_fisher(outputs[:count])
    jacobians = jacobians[:count]
    expected = np.einsum("nad,nab,nbe->de", jacobians, inner, jacobians)
    np.testing.assert_allclose(mean, expected, **EXACT)


def test_data_labels_with_random_signs_have_the_mean_of_the_empirical_fisher(
    monkeypatch,
):
    model, count = NAMED["categorical"], 4
    batch = model.inputs[:count], model.targets[:count], np.array([1.0, 0.0, 2.5, 0.5])

    @jax.jit
    @jax.vmap
    def outcome(pattern):
        find = lookup(example_keys(count), pattern)
        with monkeypatch.context() as patch:
            patch.setattr(
                squares, "rademacher", lambda key, shape, dtype: find(key).astype(dtype)
            )
            estimator = build("empirical", FULL, groups=2)
            return ff.information.to_dense(estimator(model.params, batch, KEY))

    found = np.asarray(outcome(signs(count)))
    rows = cases.scores("categorical")[:count]
    expected = np.einsum("n,nd,ne->de", batch[2], rows, rows)
    np.testing.assert_allclose(found.mean(0), expected, **EXACT)
    assert np.abs(found - expected).max() > 0.01 * np.abs(expected).max()


# ---- groups are sums of examples, chunks are not seen


@pytest.mark.slow_cases
@pytest.mark.parametrize("name", ["hutchinson", "monte_carlo"])
@pytest.mark.parametrize("structure", ["diagonal", "full"])
def test_a_group_for_each_example_is_the_square_of_each_example(name, structure):
    found, expected = (
        jax.jit(build(name, STRUCTURES[structure], groups=groups))(
            NAMED["categorical"].params, NAMED["categorical"].batch, KEY
        )
        for groups in (COUNT, None)
    )
    close(found, expected)


def test_groups_are_squares_of_sums_over_their_examples():
    model = NAMED["tokens"]
    params, count = model.params, 6
    batch = model.inputs[:count], model.targets[:count]
    whole = build("monte_carlo", FULL, "tokens", groups=3)
    found = jax.jit(whole)(params, batch, KEY).rows

    # the same labels, drawn from the same keys
    @jax.jit
    def rows_of(params):
        outputs = model.apply_fn(params, batch[0])
        keys = jax.vmap(lambda key: jax.random.split(key, 1)[0])(example_keys(count))
        labels = jax.vmap(lambda key, z: jax.random.categorical(key, z[None])[0])(
            keys, outputs
        )

        def log_probs(params):
            z = model.apply_fn(params, batch[0])
            return model.likelihood.log_prob(z, labels).reshape((3, -1)).sum(1)

        return jax.jacrev(log_probs)(params)

    rows = rows_of(params)
    flat = np.concatenate([x.reshape((3, -1)) for x in jax.tree.leaves(rows)], 1)
    np.testing.assert_allclose(
        ff.information.to_dense(ff.structures.Full(found)), flat.T @ flat, **EXACT
    )


@pytest.mark.slow_cases
@pytest.mark.parametrize(
    ("groups", "sizes"), [(1, (None, 1, 3, 4)), (2, (None, 3)), (4, (None, 1))]
)
def test_chunks_and_padding_change_nothing(groups, sizes):
    model = NAMED["categorical"]
    run = [
        jax.jit(build("hutchinson", groups=groups, chunk_size=size)) for size in sizes
    ]
    results = [f(model.params, padded(), KEY) for f in run]
    for other in results[1:]:
        close(other, results[0])
    # what padding holds does not matter, nor that it is there
    if groups == 1:
        batch = model.inputs, model.targets, WEIGHTS
        close(run[0](model.params, batch, KEY), results[0])


def test_groups_of_missing_examples_add_nothing():
    def reciprocal(params, x):
        return (params / (x - 1.0))[:, None] * jnp.array([[1.0, 2.0]])

    estimator = ff.estimators.hutchinson(
        reciprocal, ff.likelihoods.categorical(), DIAGONAL, groups=2
    )
    # a blanked row is made of ones, of which this model makes no finite number
    batch = np.array([3.0, 2.0, 1.0, 1.0]), None, np.zeros(4)
    assert estimator(jnp.asarray(0.5), batch, KEY).entries == 0


@pytest.mark.parametrize("name", ["observed", "squared_gradient", "empirical"])
def test_a_missing_batch_adds_nothing_to_any_estimator(name):
    def reciprocal(params, x):
        return params / (x - 1.0)

    estimator = getattr(ff.estimators, name)(
        reciprocal, ff.likelihoods.poisson(), DIAGONAL
    )
    batch = np.array([3.0, 1.0]), np.ones(2), np.zeros(2)
    assert jax.jit(estimator)(jnp.asarray(0.5), batch).entries == 0


def test_arrays_that_a_traced_function_closes_over_may_be_checked():
    model = NAMED["poisson"]
    estimator = build("exact", model="poisson")
    batch = (*map(jnp.asarray, model.batch), jnp.asarray(WEIGHTS))
    found = jax.jit(lambda params: estimator(params, batch))(model.params)
    close(found, jax.jit(estimator)(model.params, batch))
    flow = ff.fisher_flow(
        model.apply_fn,
        model.likelihood,
        structure=DIAGONAL,
        memory=ff.memories.stationary(),
    )
    state = flow.init(model.params)
    jax.eval_shape(lambda state: flow.update(state, batch), state)
    with pytest.raises(ValueError, match="weights must be finite"):
        estimator(model.params, (*batch[:2], -batch[2]))


def test_examples_that_interact_are_pulled_back_together():
    def normalised(params, x):
        hidden = x @ params
        return hidden / jnp.sqrt(jnp.mean(jnp.square(hidden), 0))[None]

    inputs, params = cases.draw(4, 3, seed=1), cases.draw(3, 2, seed=2)
    estimator = ff.estimators.hutchinson(
        normalised,
        ff.likelihoods.gaussian(),
        FULL,
        probe=lambda key, shape, dtype: jnp.ones(shape, dtype),
    )
    found = jax.jit(estimator)(params, (inputs, None), KEY)
    total = lambda p: jnp.sum(normalised(p, inputs))  # noqa: E731
    vector = np.ravel(jax.jit(jax.grad(total))(params))
    np.testing.assert_allclose(
        ff.information.to_dense(found), np.outer(vector, vector), **EXACT
    )


# ---- transformations and kinds of parameters


def test_eager_jit_and_vmap_over_keys_agree():
    model = NAMED["labels"]
    estimator = build("hutchinson", model="labels", num_probes=2)
    keys = jax.random.split(jax.random.key(5), 3)
    batched = jax.jit(jax.vmap(estimator, in_axes=(None, None, 0)))(
        model.params, model.batch, keys
    )
    one = estimator(model.params, model.batch, keys[1])
    close(jax.tree.map(lambda x: x[1], batched), one)
    data = jax.random.key_data(keys[1])
    close(jax.jit(estimator)(model.params, model.batch, data), one)


@pytest.mark.parametrize("groups", [1, None])
def test_frozen_leaves_have_no_information(groups):
    model = NAMED["categorical"]

    def frozen(params, x):
        hidden = jax.lax.stop_gradient(params["hidden"])
        return model.apply_fn({**params, "hidden": hidden}, x)

    estimator = ff.estimators.hutchinson(
        frozen, model.likelihood, DIAGONAL, groups=groups
    )
    found = jax.jit(estimator)(model.params, model.batch, KEY).entries
    assert all(np.all(x == 0) for x in jax.tree.leaves(found["hidden"]))
    assert np.all(np.asarray(found["out"]) > 0)


@pytest.mark.slow_cases
@pytest.mark.parametrize("name", ["hutchinson", "hutchinson_dg", "monte_carlo"])
@pytest.mark.parametrize("groups", [1, None])
def test_half_precision_gives_a_finite_float32_information(name, groups):
    model = NAMED["categorical"]
    params, inputs = jax.tree.map(
        lambda x: np.asarray(x).astype(jnp.bfloat16), (model.params, model.inputs)
    )
    estimator = build(name, groups=groups)
    found = jax.jit(estimator)(params, (inputs, None), KEY).entries
    for x in jax.tree.leaves(found):
        assert x.dtype == jnp.float32 and np.all(np.isfinite(x))


@pytest.mark.slow_cases
@pytest.mark.parametrize(
    "logits", [[0.0, 0.0, 0.0], [5.0, 5.0, -5.0], [1e4, 0.0, -1e4], [0.0, 0.0], [3.0]]
)
def test_uniform_tied_saturated_and_few_classes(logits):
    likelihood = ff.likelihoods.categorical()
    classes = len(logits)
    p = cases.softmax(np.array([logits]))
    expected = np.diag(cases.categorical_fisher(np.array([logits]))[0])
    batch = jnp.ones((2, 1), jnp.float32), None

    def apply_fn(bias, x):
        return x * bias[None]

    names = ["hutchinson", "hutchinson_dg", "exact"]
    if classes > 1:
        names.append("hutchinson_rank1")
    for name in names:
        estimator = getattr(ff.estimators, name)(apply_fn, likelihood, DIAGONAL)
        found = jax.jit(estimator)(jnp.asarray(logits, jnp.float32), batch, 0).entries
        assert np.all(np.isfinite(found)), name
        if name == "exact":
            np.testing.assert_allclose(found, 2 * expected, rtol=1e-5, atol=1e-30)
        if classes == 2 and name == "hutchinson_rank1":
            # rank one is all there is; the cross term of two examples is one sign
            assert np.all(
                np.isclose(found, 0, atol=1e-6) | np.isclose(found, 4 * expected)
            )
    assert np.all(np.isfinite(p))


# ---- errors


def test_groups_must_divide_the_batch():
    model = NAMED["categorical"]
    with pytest.raises(ValueError, match=r"groups = 3 must divide .* n = 7"):
        build("hutchinson", groups=3)(model.params, model.batch, KEY)


@pytest.mark.parametrize("groups", [0, -1, 2.0])
def test_groups_are_a_positive_whole_number(groups):
    with pytest.raises(ValueError, match="groups must be a positive whole number"):
        build("monte_carlo", groups=groups)


def test_the_number_of_probes_is_a_positive_whole_number():
    with pytest.raises(ValueError, match="num_probes must be a positive whole number"):
        build("hutchinson", num_probes=0)


@pytest.mark.parametrize(
    "name, options",
    [
        ("hutchinson", {}),
        ("hutchinson_dg", {}),
        ("hutchinson_rank1", {}),
        ("empirical", {"groups": 1}),
        ("monte_carlo", {"groups": 1}),
    ],
)
def test_what_draws_needs_a_key(name, options):
    model = NAMED["categorical"]
    with pytest.raises(ValueError, match="draws at random: give it a key"):
        build(name, **options)(model.params, model.batch)


def test_the_rank_is_below_the_number_of_classes():
    model = NAMED["categorical"]
    with pytest.raises(ValueError, match="3"):
        build("hutchinson_rankk", k=3)(model.params, model.batch, KEY)


# ---- large outputs


@pytest.mark.parametrize(
    "name, options, factor",
    [
        ("hutchinson", {}, 1),
        ("hutchinson", {"groups": 4}, 1),
        ("hutchinson", {"root": ff.likelihoods.cholesky_root}, 3),
        ("hutchinson_dg", {}, 1),
        ("hutchinson_rankk", {"k": 2}, 2),
        ("monte_carlo", {"groups": 1}, 1),
        ("empirical", {"groups": 1}, 1),
    ],
)
def test_a_large_vocabulary_costs_its_size_for_each_token(name, options, factor):
    classes, tokens = 50_000, 8
    params = {"embed": jnp.zeros((3, 2)), "head": jnp.zeros((2, classes))}

    def apply_fn(params, ids):
        return params["embed"][ids] @ params["head"]

    estimator = getattr(ff.estimators, name)(
        apply_fn, ff.likelihoods.categorical(), DIAGONAL, chunk_size=4, **options
    )
    ids = jnp.zeros((tokens,), jnp.int32)
    traced = jax.make_jaxpr(lambda p, b: estimator(p, b, 0))(params, (ids, ids))
    # four tokens at a time, whatever the batch; packed bits round up to a word
    assert largest(traced.jaxpr) <= 4 * factor * (classes + 32)
