"""Squares of linear layers from their inputs and gradients: those of every example."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fisherflow_jax as ff
from estimator_cases import MODELS, NAMED, STRUCTURES, WEIGHTS, draw
from program_size import largest

EXACT = {"rtol": 1e-10, "atol": 1e-12}
COUNT = 5


def perceptron(params, x):
    for layer in params[:-1]:
        x = jnp.tanh(x @ layer["w"] + layer["b"][None])
    return x @ params[-1]["w"] + params[-1]["b"][None]


def tokens(params, ids):
    x = params["table"][ids] + params["position"][None]
    x = jnp.tanh(jnp.einsum("nti,hio->ntho", x, params["heads"]))
    x = x * params["scale"][None, None]
    return jnp.einsum("ntho,hoc->ntc", x, params["out"])


def pooled(params, ids):
    return tokens(params, ids).mean(1)


def image(params, x):
    x = jax.lax.conv_general_dilated(
        x, params["kernel"], (2, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    x = jnp.tanh(x + params["bias"][None, None, None])
    return x.reshape((x.shape[0], -1)) @ params["head"]


def experts(params, x):
    return jnp.einsum("ni,kio->nko", x, params["w"]).mean(1) @ params["head"]


def scanned(params, x):
    def step(x, w):
        return jnp.tanh(x @ w), None

    return jax.lax.scan(step, x, params["layers"])[0] @ params["head"]


def tied(params, x):
    return jnp.tanh(x @ params["w"]) @ params["w"] @ params["head"]


IDS = np.array([[0, 3, 3], [1, 1, 1], [2, 0, 4], [4, 3, 0], [0, 0, 2]])
FLAT = draw(COUNT, 3, seed=20)
ZOO = {
    "perceptron": (
        perceptron,
        [
            {"w": draw(3, 4, seed=1), "b": draw(4, seed=2)},
            {"w": draw(4, 3, seed=3), "b": draw(3, seed=4)},
        ],
        FLAT,
    ),
    "pooled": (
        pooled,
        {
            "table": draw(5, 3, seed=5),
            "position": draw(3, 3, seed=6),
            "heads": draw(2, 3, 2, seed=7),
            "scale": draw(2, 2, seed=8),
            "out": draw(2, 2, 3, seed=9),
        },
        IDS,
    ),
    "image": (
        image,
        {
            "kernel": draw(3, 2, 2, 3, seed=10),
            "bias": draw(3, seed=11),
            "head": draw(24, 3, seed=12),
        },
        draw(COUNT, 4, 4, 2, seed=13),
    ),
    "experts": (
        experts,
        {"w": draw(2, 3, 4, seed=14), "head": draw(4, 3, seed=15)},
        FLAT,
    ),
    "scanned": (
        scanned,
        {"layers": draw(2, 3, 3, seed=16), "head": draw(3, 3, seed=17)},
        FLAT,
    ),
    "tied": (tied, {"w": draw(3, 3, seed=18), "head": draw(3, 3, seed=19)}, FLAT),
}
LABELS = np.array([0, 2, 1, 1, 0])


def squares_by_hand(apply_fn, params, inputs, vectors_of):
    """`sum_n sum_r (J_n^T v_nr)^2` from explicit Jacobians."""
    outputs = apply_fn(params, inputs)
    columns = vectors_of(outputs)  # (R, n, C)
    jacobian = jax.jacrev(lambda p: apply_fn(p, inputs))(params)
    return jax.tree.map(
        lambda j: jnp.sum(
            jnp.square(jnp.einsum("rnc,nc...->rn...", columns, j)), (0, 1)
        ),
        jacobian,
    )


def root_columns(outputs):
    return ff.likelihoods.root_columns(ff.likelihoods.categorical(), outputs)


def data_scores(outputs):
    return (jax.nn.one_hot(LABELS, 3) - jax.nn.softmax(outputs))[None]


@pytest.mark.slow_cases
@pytest.mark.parametrize("name", ZOO)
@pytest.mark.parametrize(
    "estimator, vectors_of", [("exact", root_columns), ("empirical", data_scores)]
)
def test_squares_are_those_of_explicit_jacobians(name, estimator, vectors_of):
    apply_fn, params, inputs = ZOO[name]
    batch = inputs, LABELS

    @jax.jit
    def run(params, batch):
        factory = getattr(ff.estimators, estimator)
        found = [
            factory(apply_fn, ff.likelihoods.categorical(), structure)(params, batch)
            for structure in (STRUCTURES["diagonal"], STRUCTURES["scalar"])
        ]
        by_hand = squares_by_hand(apply_fn, params, inputs, vectors_of)
        return found, by_hand

    (diagonal, scalar), expected = run(params, batch)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, **EXACT),
        diagonal.entries,
        expected,
    )
    values = np.concatenate([np.ravel(x) for x in jax.tree.leaves(expected)])
    np.testing.assert_allclose(scalar.value, values.mean(), **EXACT)


@pytest.mark.slow_cases
@pytest.mark.parametrize("model", MODELS, ids=repr)
def test_every_likelihood_with_weights_and_chunks(model):
    estimators = [
        ff.estimators.exact(
            model.apply_fn,
            model.likelihood,
            STRUCTURES["diagonal"],
            chunk_size=3,
            fast_squares=fast,
        )
        for fast in (True, False)
    ]
    batch = (*model.batch, WEIGHTS)
    found, expected = jax.jit(lambda p, b: [e(p, b) for e in estimators])(
        model.params, batch
    )
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, **EXACT), found, expected
    )


@pytest.mark.parametrize("name", ["hutchinson", "monte_carlo"])
def test_draws_do_not_depend_on_the_path(name):
    apply_fn, params, inputs = ZOO["pooled"]
    estimators = [
        getattr(ff.estimators, name)(
            apply_fn,
            ff.likelihoods.categorical(),
            STRUCTURES["diagonal"],
            groups=None,
            fast_squares=fast,
        )
        for fast in (True, False)
    ]
    found, expected = jax.jit(lambda p, x: [e(p, (x, None), 3) for e in estimators])(
        params, inputs
    )
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, **EXACT), found, expected
    )


def agree_with_the_generic_path(apply_fn, params, inputs, **options):
    found, expected = (
        jax.jit(
            ff.estimators.exact(
                apply_fn,
                ff.likelihoods.categorical(),
                STRUCTURES["diagonal"],
                fast_squares=fast,
                **options,
            )
        )(params, (inputs, None))
        for fast in (True, False)
    )
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, **EXACT), found, expected
    )


@pytest.mark.slow_cases
@pytest.mark.parametrize("mode", ["fill", "clip", "wrap"])
def test_ids_out_of_bounds_inform_about_the_bias_alone(mode):
    params = {"table": draw(5, 3, seed=21), "bias": draw(3, seed=22)}
    options = {"fill_value": 0.0} if mode == "fill" else {}

    def looked_up(params, ids):
        rows = jnp.take(params["table"], ids, axis=0, mode=mode, **options)
        return rows + params["bias"][None]

    agree_with_the_generic_path(looked_up, params, np.array([0, 7, -2, 4]))


@pytest.mark.slow
def test_leaves_without_entries_have_no_information():
    _, params, inputs = ZOO["perceptron"]
    params = {"layers": params, "none": np.zeros((0, 2))}

    def apply_fn(params, x):
        return perceptron(params["layers"], x)

    agree_with_the_generic_path(apply_fn, params, inputs, chunk_size=2)
    for name in ("full", "scalar", "units"):
        for factory, options in (
            (ff.estimators.exact, {}),
            (ff.estimators.hutchinson, {"groups": COUNT}),
        ):
            estimator = factory(
                apply_fn, ff.likelihoods.categorical(), STRUCTURES[name], **options
            )
            jax.eval_shape(lambda p, e=estimator: e(p, (inputs, None), 0), params)


def test_padding_that_is_not_finite_adds_nothing():
    apply_fn, params, inputs = ZOO["perceptron"]
    padded = np.concatenate([inputs, np.full((2, 3), np.nan)])
    estimator = jax.jit(
        ff.estimators.exact(
            apply_fn, ff.likelihoods.categorical(), STRUCTURES["diagonal"]
        )
    )
    weights = np.r_[np.ones(COUNT), np.zeros(2)]
    found = estimator(params, (padded, None, weights))
    expected = estimator(params, (inputs, None))
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, **EXACT), found, expected
    )


def test_half_precision_squares_in_float32():
    apply_fn, params, inputs = ZOO["perceptron"]
    narrow = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), (params, inputs))
    estimator = jax.jit(
        ff.estimators.exact(
            apply_fn, ff.likelihoods.categorical(), STRUCTURES["diagonal"]
        )
    )
    found = estimator(narrow[0], (narrow[1], None)).entries
    expected = estimator(params, (inputs, None)).entries
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert x.dtype == jnp.float32
        np.testing.assert_allclose(x, y, rtol=0.05, atol=0.02 * np.max(y))


# ---- paths


def test_paths_tell_how_each_parameter_is_squared():
    def paths(name, estimator="empirical", structure="diagonal", **options):
        apply_fn, params, inputs = ZOO[name]
        built = getattr(ff.estimators, estimator)(
            apply_fn, ff.likelihoods.categorical(), STRUCTURES[structure], **options
        )
        lines = built.paths(params, (inputs, LABELS)).splitlines()[1:]
        return [line.split("  ")[-1].strip() for line in lines]

    product = "squares of inputs times squares of gradients"
    assert paths("perceptron") == ["squares of gradients", product] * 2
    assert paths("experts") == [product] * 2
    assert paths("pooled") == [
        "a gradient for each example, from inputs and gradients at 3 positions",
        "a gradient for each example, from inputs and gradients at 3 positions",
        "a gradient for each example (used in add)",
        "a gradient for each example (used in mul)",
        "gradients summed by id over 3 positions",
    ]
    whole = "a gradient for each example"
    assert paths("experts", fast_squares=False) == [whole] * 2
    assert (
        paths("experts", structure="full")
        == [f"{whole} (full() reduces whole vectors)"] * 2
    )
    assert (
        paths("experts", "monte_carlo", groups=1)
        == ["one gradient for each group of 5 examples"] * 2
    )


def test_what_squares_no_gradients_has_no_paths():
    model = NAMED["poisson"]
    estimator = ff.estimators.observed(
        model.apply_fn, model.likelihood, STRUCTURES["diagonal"]
    )
    with pytest.raises(ValueError, match=r"observed does not square gradients"):
        estimator.paths(model.params, model.batch)


# ---- what is held


def test_no_vector_of_a_linear_layer_is_formed():
    count, inputs, hidden, outputs = 32, 20, 30, 10
    params = {"w": np.zeros((inputs, hidden)), "v": np.zeros((hidden, outputs))}

    def apply_fn(params, x):
        return jnp.tanh(x @ params["w"]) @ params["v"]

    def held(**options):
        estimator = ff.estimators.exact(
            apply_fn, ff.likelihoods.gaussian(), STRUCTURES["diagonal"], **options
        )
        batch = np.zeros((count, inputs)), None
        return largest(jax.make_jaxpr(lambda p: estimator(p, batch))(params).jaxpr)

    # gradients at the hidden units, for each example and each column of the root
    assert held() <= count * outputs * hidden
    assert held(fast_squares=False) >= count * outputs * inputs * hidden


def test_an_embedding_is_squared_without_a_table_for_each_example():
    rows, width, count = 1000, 4, 6
    params = {"table": np.zeros((rows, width)), "head": np.zeros((width, 3))}

    def apply_fn(params, ids):
        return params["table"][ids].mean(1) @ params["head"]

    estimator = ff.estimators.empirical(
        apply_fn, ff.likelihoods.categorical(), STRUCTURES["diagonal"]
    )
    batch = np.zeros((count, 5), int), np.zeros(count, int)
    traced = jax.make_jaxpr(lambda p: estimator(p, batch))(params)
    assert largest(traced.jaxpr) <= rows * width
