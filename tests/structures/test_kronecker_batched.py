"""Whole batches: equal where examples do not interact, right in the mean where not."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import fisherflow_jax as ff

EXACT = {"rtol": 1e-10, "atol": 1e-12}
# most of the time goes into compiling, and tiny arrays gain nothing from it
FAST = {"xla_backend_optimization_level": 0}
jit = functools.partial(jax.jit, compiler_options=FAST)
CATEGORICAL = ff.likelihoods.categorical()
WEIGHTS = np.array([1.0, 2.0, 1.0, 0.5])


def draw(*shape, seed):
    return np.random.default_rng(seed).normal(size=shape)


def network(params, x, *, normalise):
    h = x @ params["w"] + params["b"][None]
    if normalise:
        h = h - jnp.mean(h, 0, keepdims=True)
        h = h * lax.rsqrt(jnp.mean(jnp.square(h), 0, keepdims=True) + 0.1)
    h = jnp.tanh(h * params["scale"][None] + params["shift"][None])
    return h @ params["v"]


PARAMS = {
    "b": draw(3, seed=1),
    "scale": draw(3, seed=2),
    "shift": draw(3, seed=3),
    "v": draw(3, 3, seed=4),
    "w": draw(2, 3, seed=5),
}
X, Y = draw(4, 2, seed=6), np.array([0, 2, 1, 0])
SEPARATE = functools.partial(network, normalise=False)
TOGETHER = functools.partial(network, normalise=True)
LAYERS = ff.layers.find_layers(TOGETHER, PARAMS, X)
ESTIMATORS = {
    "exact": ff.estimators.exact,
    "empirical": ff.estimators.empirical,
    "monte_carlo": functools.partial(ff.estimators.monte_carlo, num_samples=2),
    "hutchinson": functools.partial(ff.estimators.hutchinson, groups=None),
}


def close(left, right):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **EXACT), left, right)


@pytest.mark.slow_cases
@pytest.mark.parametrize(
    ("name", "make"),
    [(name, ff.structures.kronecker) for name in ESTIMATORS]
    + [("exact", ff.structures.diagonal)],
)
def test_equal_to_single_examples_where_they_do_not_interact(name, make):
    found = [
        ff.layers.find_layers(SEPARATE, PARAMS, X, batched=batched)
        for batched in (True, False)
    ]
    assert [layers.batched for layers in found] == [True, False]

    @jit
    def run(params, key):
        return [
            ESTIMATORS[name](SEPARATE, CATEGORICAL, make(layers))(
                params, (X, Y, WEIGHTS), key
            )
            for layers in found
        ]

    batched, single = run(PARAMS, jax.random.key(0))
    if make is ff.structures.kronecker:
        assert batched.layers == found[0] and found[0].summed == ()
        batched = batched._replace(layers=found[1])
    close(batched, single)


@functools.cache
def rows_of_the_first_layer():
    """(n, n, C, O): of every output with respect to every row."""
    p = PARAMS

    def after(h):
        centred = h - h.mean(0, keepdims=True)
        centred = centred / jnp.sqrt(jnp.square(centred).mean(0, keepdims=True) + 0.1)
        hidden = jnp.tanh(centred * p["scale"][None] + p["shift"][None])
        return hidden @ p["v"]

    hidden = X @ p["w"] + p["b"]
    both = jit(lambda h: (jax.jacobian(after)(h), after(h)))
    jacobian, outputs = map(np.asarray, both(hidden))
    return np.moveaxis(jacobian, 2, 1), outputs


def output_fisher(outputs):
    p = np.asarray(jax.nn.softmax(outputs))
    return p[:, :, None] * np.eye(3) - p[:, :, None] * p[:, None, :]


@functools.cache
def every_outcome(name="exact"):
    """Over all signs of the examples, each once: a common sign changes nothing."""
    structure = ff.structures.kronecker(LAYERS)
    estimator = ESTIMATORS[name](TOGETHER, CATEGORICAL, structure)
    keys = jax.random.split(jax.random.key(0), 64)
    drawn = jit(jax.vmap(lambda key: estimator(PARAMS, (X, Y), key)))(keys)
    factor = np.asarray(drawn.output_factors["w"]).reshape((64, -1))
    _, first = np.unique(factor.round(9), axis=0, return_index=True)
    assert len(first) == 2 ** (len(X) - 1)
    return jax.tree.map(lambda x: np.asarray(x)[first].mean(0), drawn)


def test_the_mean_over_signs_holds_the_interaction():
    jacobian, outputs = rows_of_the_first_layer()
    fisher = output_fisher(outputs)
    expected = np.einsum("jico,jcd,jidp->op", jacobian, fisher, jacobian)
    found = every_outcome()
    np.testing.assert_allclose(found.output_factors["w"][0], expected, rtol=1e-8)
    # not those of the rows' own outputs alone
    own = np.einsum("iico,icd,iidp->op", jacobian, fisher, jacobian)
    assert np.abs(own / expected - 1).max() > 0.05


def test_parameters_of_the_normalisation_are_squared_row_by_row():
    _, outputs = rows_of_the_first_layer()
    p, h = PARAMS, X @ PARAMS["w"] + PARAMS["b"]
    h = (h - h.mean(0)) / np.sqrt(np.square(h - h.mean(0)).mean(0) + 0.1)
    slope = 1 - np.tanh(h * p["scale"] + p["shift"]) ** 2
    bilinear = np.einsum("oc,icd,od->io", p["v"], output_fisher(outputs), p["v"])
    found = every_outcome().other_entries
    np.testing.assert_allclose(found["shift"], (slope**2 * bilinear).sum(0), rtol=1e-8)
    expected = ((h * slope) ** 2 * bilinear).sum(0)
    np.testing.assert_allclose(found["scale"], expected, rtol=1e-8)


@pytest.mark.parametrize("name", ["monte_carlo", "hutchinson"])
def test_random_estimators_have_the_same_mean(name):
    estimator = ESTIMATORS[name](TOGETHER, CATEGORICAL, ff.structures.kronecker(LAYERS))

    @jit
    def moments(keys):
        drawn = jax.vmap(lambda key: estimator(PARAMS, (X, None), key))(keys)
        factor = drawn.output_factors["w"]
        return factor.mean(0), factor.std(0)

    mean, deviation = moments(jax.random.split(jax.random.key(1), 2000))
    expected = every_outcome().output_factors["w"]
    assert np.abs((mean - expected) / (deviation / np.sqrt(2000))).max() < 4.5


def test_empirical_rows_of_interacting_examples():
    jacobian, outputs = rows_of_the_first_layer()
    residual = np.eye(3)[Y] - np.asarray(jax.nn.softmax(outputs))
    rows = np.einsum("jico,jc->jio", jacobian, residual)
    found = every_outcome("empirical").output_factors
    np.testing.assert_allclose(
        found["w"][0], np.einsum("jio,jip->op", rows, rows), rtol=1e-8
    )


def test_the_correction_runs_whole_batches_too():
    estimator = ff.estimators.exact(
        TOGETHER, CATEGORICAL, ff.structures.kronecker(LAYERS)
    )

    @jit
    def run(params, key):
        plain = estimator(params, (X, None), key)
        structure = ff.structures.kronecker(LAYERS, eigenvalue_correction=plain)
        corrected = ff.estimators.exact(TOGETHER, CATEGORICAL, structure)
        return plain, corrected(params, (X, None), key)

    plain, corrected = run(PARAMS, jax.random.key(2))
    # the trace of sum_i (a_i a_i^T) x (g_i g_i^T) does not depend on the basis
    assert corrected.eigenvalues["w"].shape == (1, 3, 3)
    close(corrected.num_observations, plain.num_observations)


def test_padding_adds_nothing_of_its_own():
    """Rows of weight zero are part of the batch, and of no factor."""
    padded = np.concatenate([X, np.full((2, 2), np.nan)])
    filled = np.concatenate([X, X[:1], X[:1]])
    weights = np.r_[np.ones(4), 0, 0]
    structure = ff.structures.kronecker(LAYERS)
    estimator = jit(ff.estimators.exact(TOGETHER, CATEGORICAL, structure))
    found = estimator(PARAMS, (padded, None, weights), jax.random.key(0))
    h = np.concatenate([X, np.ones((4, 1))], 1)
    np.testing.assert_allclose(found.input_factors["w"][0], h.T @ h, **EXACT)
    close(found, estimator(PARAMS, (filled, None, weights), jax.random.key(0)))
    assert found.num_observations == 4


def test_in_a_flow():
    flow = ff.fisher_flow(
        TOGETHER,
        CATEGORICAL,
        structure=ff.structures.kronecker(LAYERS),
        memory=ff.memories.stationary(),
        num_steps=1,
    )
    with pytest.raises(ValueError, match="key"):
        flow.init(PARAMS)
    state = flow.init(PARAMS, key=0)
    _, score, information = jit(flow.evaluate)(state.mean, (X, Y), jax.random.key(0))
    assert information.layers.batched and np.isfinite(score["w"]).all()


def test_parts_of_a_batch_are_refused():
    for structure in (
        ff.structures.kronecker(LAYERS),
        ff.structures.diagonal(LAYERS),
    ):
        for options in ({"chunk_size": 2}, {"fast_squares": False}, {"groups": 2}):
            factory = ff.estimators.empirical if "groups" in options else None
            factory = factory or ff.estimators.exact
            ((name, value),) = options.items()
            with pytest.raises(ValueError, match=rf"{name} must be .* got {value}"):
                factory(TOGETHER, CATEGORICAL, structure, **options)
        with pytest.raises(ValueError, match="draws at random: give it a key"):
            ff.estimators.exact(TOGETHER, CATEGORICAL, structure)(PARAMS, (X, None))


def test_the_table_of_paths():
    estimator = ff.estimators.exact(
        TOGETHER, CATEGORICAL, ff.structures.diagonal(LAYERS)
    )
    lines = estimator.paths(PARAMS, (X, None)).splitlines()
    assert lines[2].endswith("a gradient for each example (used in mul)")
    assert lines[5].endswith("squares of inputs times squares of gradients")


def test_one_square_of_the_whole_batch():
    """Elsewhere than in layers or entry by entry: unbiased, one draw a batch."""

    def bent(params, x):
        return TOGETHER(PARAMS | {"v": jnp.cbrt(params["v"])}, x)

    params = {"v": PARAMS["v"]}
    layers = ff.layers.find_layers(bent, params, X)
    assert layers.summed == (0,)
    estimator = ff.estimators.exact(bent, CATEGORICAL, ff.structures.diagonal(layers))
    keys = jax.random.split(jax.random.key(0), 64)
    drawn = jit(jax.vmap(lambda key: estimator(params, (X, None), key)))(keys)
    drawn = np.asarray(drawn.entries["v"])
    _, first = np.unique(drawn.reshape((64, -1)).round(9), axis=0, return_index=True)
    assert len(first) == 8
    of_v = lambda v: bent({"v": v}, X)  # noqa: E731
    both = jit(lambda v: (jax.jacobian(of_v)(v), of_v(v)))
    jacobian, outputs = map(np.asarray, both(params["v"]))
    fisher = output_fisher(outputs)
    want = np.einsum("icvo,icd,idvo->vo", jacobian, fisher, jacobian)
    np.testing.assert_allclose(drawn[first].mean(0), want, rtol=1e-8)
