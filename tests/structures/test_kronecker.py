"""Kronecker factors: where they are exact, and every operation against its matrix."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fisherflow_jax as ff
from fisherflow_jax.structures import sharing as of_positions

EXACT = {"rtol": 1e-9, "atol": 1e-11}
CATEGORICAL, GAUSSIAN = ff.likelihoods.categorical(), ff.likelihoods.gaussian()
FULL = ff.structures.full()


def draw(*shape, seed):
    return np.random.default_rng(seed).normal(size=shape)


def network(params, x):
    hidden = jnp.tanh(x @ params["first"]["w"] + params["first"]["b"][None])
    return params["scale"] * (hidden @ params["last"])


PARAMS = {
    "first": {"b": draw(4, seed=1), "w": draw(3, 4, seed=2)},
    "last": draw(4, 3, seed=3),
    "scale": np.asarray(1.3),
}
INPUTS = draw(6, 3, seed=4)
LAYERS = ff.layers.find_layers(network, PARAMS, INPUTS)
# in ravelled order: the first bias and kernel, the last kernel, the scale
BLOCKS = [slice(0, 16), slice(16, 28), slice(28, 29)]


def block_diagonal(matrix):
    result = np.zeros_like(matrix)
    for place in BLOCKS:
        result[place, place] = matrix[place, place]
    return result


@functools.cache
def information(kind="kronecker", count=6):
    def compute(params, inputs):
        structure = ff.structures.kronecker(LAYERS)
        if kind == "corrected":
            plain = ff.estimators.exact(network, CATEGORICAL, structure)
            structure = ff.structures.kronecker(
                LAYERS, eigenvalue_correction=plain(params, (inputs, None))
            )
        estimator = ff.estimators.exact(network, CATEGORICAL, structure)
        return estimator(params, (inputs, None))

    return jax.jit(compute)(PARAMS, INPUTS[:count])


@functools.cache
def exact(count=6):
    estimator = ff.estimators.exact(network, CATEGORICAL, FULL)
    found = jax.jit(estimator)(PARAMS, (INPUTS[:count], None))
    return np.asarray(ff.information.to_dense(found))


def dense(value):
    return np.asarray(jax.jit(ff.information.to_dense)(value))


# ---- where it is exact


@pytest.mark.parametrize("kind", ["kronecker", "corrected"])
def test_one_example_is_exact(kind):
    found = dense(information(kind, 1))
    np.testing.assert_allclose(found, block_diagonal(exact(1)), **EXACT)


def test_a_linear_model_with_gaussian_noise_is_exact_for_any_number():
    def linear(params, x):
        return x @ params["w"] + params["b"][None]

    params = {"b": draw(2, seed=5), "w": draw(3, 2, seed=6)}
    batch = INPUTS, None, np.array([1.0, 2.0, 0.0, 1.0, 0.5, 1.0])
    layers = ff.layers.find_layers(linear, params, INPUTS)
    found, expected = jax.jit(
        lambda p, b: [
            ff.information.to_dense(
                ff.estimators.exact(linear, GAUSSIAN, structure)(p, b)
            )
            for structure in (ff.structures.kronecker(layers), FULL)
        ]
    )(params, batch)
    np.testing.assert_allclose(found, expected, **EXACT)


def deep_linear(params, x, *, pool):
    outputs = (x @ params["a"]) @ params["b"]
    return outputs.mean(1) if pool else outputs


@pytest.mark.parametrize(
    "sharing, pool, is_exact",
    [
        (of_positions.expand, False, True),
        (of_positions.pool, True, True),
        (of_positions.expand, True, False),
    ],
)
def test_sharing_is_exact_where_it_should_be(sharing, pool, is_exact):
    params = {"a": draw(3, 2, seed=7), "b": draw(2, 2, seed=8)}
    inputs = draw(5, 4, 3, seed=9)
    apply_fn = functools.partial(deep_linear, pool=pool)
    layers = ff.layers.find_layers(apply_fn, params, inputs)
    structures = (
        ff.structures.kronecker(layers, sharing={"a": sharing, "b": sharing}),
        FULL,
    )
    found, expected = jax.jit(
        lambda p: [
            ff.information.to_dense(
                ff.estimators.exact(apply_fn, GAUSSIAN, s)(p, (inputs, None))
            )
            for s in structures
        ]
    )(params)
    blocks = np.zeros_like(expected)
    for place in (slice(0, 6), slice(6, 10)):
        blocks[place, place] = expected[place, place]
    close = np.allclose(found, blocks, **EXACT)
    assert close == is_exact


def test_other_parameters_keep_the_exact_diagonal():
    np.testing.assert_allclose(dense(information())[-1, -1], exact()[-1, -1], **EXACT)


def test_the_correction_is_the_diagonal_in_the_eigenbasis_and_never_worse():
    expected = block_diagonal(exact())
    plain, corrected = dense(information()), dense(information("corrected"))
    assert np.linalg.norm(corrected - expected) < np.linalg.norm(plain - expected)
    found = information("corrected")
    name = "last"
    basis = np.kron(found.input_bases[name][0], found.output_bases[name][0])
    rotated = basis.T @ exact()[BLOCKS[1], BLOCKS[1]] @ basis
    np.testing.assert_allclose(
        found.eigenvalues[name].ravel(), np.diag(rotated), **EXACT
    )


def test_the_columns_of_a_label_at_a_time_are_the_exact_factors():
    probabilities = jax.nn.softmax(network(PARAMS, INPUTS))
    structure = ff.structures.kronecker(LAYERS)

    @jax.jit
    def weighted(label):
        estimator = ff.estimators.empirical(network, CATEGORICAL, structure)
        batch = INPUTS, jnp.full((6,), label), probabilities[:, label]
        return estimator(PARAMS, batch).output_factors

    parts = [weighted(label) for label in range(3)]
    summed = jax.tree.map(lambda *x: sum(x), *parts)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, **EXACT),
        summed,
        information().output_factors,
    )


# ---- operations against the dense matrix


PRIOR = 0.7


@pytest.fixture(scope="module", params=["kronecker", "corrected"])
def proper(request):
    found = information(request.param)
    return ff.information.add(found, ff.structures.Scalar(jnp.asarray(PRIOR)))


def flat(tree):
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


def test_a_prior_is_added_exactly(proper):
    without = ff.information.add(proper, ff.structures.Scalar(jnp.asarray(-PRIOR)))
    difference = dense(proper) - dense(without)
    np.testing.assert_allclose(difference, PRIOR * np.eye(29), **EXACT)


def test_operations_are_those_of_the_matrix(proper):
    vector = jax.tree.map(lambda x: jnp.asarray(draw(*np.shape(x), seed=11)), PARAMS)

    @jax.jit
    def run(proper, vector):
        ops = ff.information
        return {
            "matvec": ops.matvec(proper, vector),
            "solve": ops.solve(proper, vector),
            "damped": ops.solve(proper, vector, damping=0.3),
            "logdet": ops.logdet(proper),
            "trace": ops.trace(proper),
            "diagonal": ops.diagonal(proper, PARAMS),
            "inverse_diagonal": ops.inverse_diagonal(proper),
            "quadratic_form": ops.quadratic_form(proper, vector),
            "scale": ops.to_dense(ops.scale(proper, 2.5)),
        }

    found, matrix, v = run(proper, vector), dense(proper), flat(vector)
    expected = {
        "matvec": matrix @ v,
        "solve": np.linalg.solve(matrix, v),
        "damped": np.linalg.solve(matrix + 0.3 * np.eye(29), v),
        "logdet": np.linalg.slogdet(matrix)[1],
        "trace": np.trace(matrix),
        "diagonal": np.diag(matrix),
        "inverse_diagonal": np.diag(np.linalg.inv(matrix)),
        "quadratic_form": v @ matrix @ v,
        "scale": 2.5 * matrix,
    }
    for name, value in expected.items():
        result = found[name] if np.ndim(value) == 2 else np.squeeze(flat(found[name]))
        np.testing.assert_allclose(result, value, err_msg=name, **EXACT)


def test_samples_have_the_inverse_for_covariance(proper):
    # the draw is linear in its normal numbers: their matrix is a root of the inverse
    keys = jax.random.split(jax.random.key(0), 20_000)
    samples = jax.jit(jax.vmap(lambda key: ff.information.sample(proper, key)))(keys)
    rows = np.concatenate(
        [x.reshape((20_000, -1)) for x in jax.tree.leaves(samples)], 1
    )
    expected = np.linalg.inv(dense(proper))
    scale = np.sqrt(np.outer(np.diag(expected), np.diag(expected)))
    # entries of a correlation matrix, within 5 standard errors
    assert np.abs((rows.T @ rows / 20_000 - expected) / scale).max() < 5 * np.sqrt(
        2 / 20_000
    )


# ---- sums


def test_factors_of_batches_add_up_to_those_of_all():
    estimator = jax.jit(
        ff.estimators.exact(network, CATEGORICAL, ff.structures.kronecker(LAYERS))
    )
    parts = [estimator(PARAMS, (INPUTS[i : i + 3], None)) for i in (0, 3)]
    whole = information()
    chunked = ff.estimators.exact(
        network, CATEGORICAL, ff.structures.kronecker(LAYERS), chunk_size=4
    )
    for found in (
        ff.information.add(*parts),
        jax.jit(chunked)(PARAMS, (INPUTS, None)),
    ):
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, **EXACT), found, whole
        )


def test_corrections_in_one_basis_add_exactly():
    structure = ff.structures.kronecker(LAYERS, eigenvalue_correction=information())
    estimator = ff.estimators.exact(network, CATEGORICAL, structure)
    chunked = ff.estimators.exact(network, CATEGORICAL, structure, chunk_size=2)
    batch = INPUTS, None
    whole, found = jax.jit(lambda p: (estimator(p, batch), chunked(p, batch)))(PARAMS)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **EXACT), found, whole)


@pytest.mark.parametrize(
    "name, options", [("monte_carlo", {}), ("hutchinson", {"groups": None})]
)
def test_random_estimators_have_the_factors_for_mean(name, options):
    factory = getattr(ff.estimators, name)
    estimator = factory(
        network, CATEGORICAL, ff.structures.kronecker(LAYERS), **options
    )

    @jax.jit
    def moments(keys):
        drawn = jax.vmap(lambda key: estimator(PARAMS, (INPUTS, None), key))(keys)
        factors = drawn.output_factors["last"]
        return factors.mean(0), factors.std(0)

    mean, deviation = moments(jax.random.split(jax.random.key(1), 2000))
    expected = information().output_factors["last"]
    error = np.asarray(deviation) / np.sqrt(2000) + 1e-12
    assert np.abs((mean - expected) / error).max() < 4.5


# ---- in a flow


@pytest.mark.slow
def test_a_flow_with_one_linear_layer_is_least_squares():
    def linear(params, x):
        return x @ params["w"]

    params = {"w": jnp.zeros((3, 2))}
    weights = draw(3, 2, seed=12)
    targets = INPUTS @ weights + 0.1 * draw(6, 2, seed=13)
    layers = ff.layers.find_layers(linear, params, INPUTS)
    flow = ff.fisher_flow(
        linear,
        GAUSSIAN,
        structure=ff.structures.kronecker(layers),
        memory=ff.memories.stationary(),
        prior_precision=PRIOR,
    )
    update = jax.jit(flow.update)
    state = flow.init(params)
    state, _ = update(state, (INPUTS[:3], targets[:3]))
    state, _ = update(state, (INPUTS[3:], targets[3:]))
    normal = INPUTS.T @ INPUTS + PRIOR * np.eye(3)
    expected = np.linalg.solve(normal, INPUTS.T @ targets)
    np.testing.assert_allclose(state.mean["w"], expected, rtol=1e-6)
    error = np.sqrt(np.diag(np.linalg.inv(normal)))
    np.testing.assert_allclose(
        ff.standard_error(state)["w"], np.stack([error, error], 1), rtol=1e-9
    )


# ---- shapes and errors


def test_wide_sides_keep_a_diagonal():
    # three inputs and a bias are no wider than three
    structure = ff.structures.kronecker(LAYERS, widest=3)
    found = jax.jit(ff.estimators.exact(network, CATEGORICAL, structure))(
        PARAMS, (INPUTS, None)
    )
    shapes = jax.tree.map(jnp.shape, (found.input_factors, found.output_factors))
    assert shapes[0] == {"first.w": (1, 4, 4), "last": (1, 4)}
    assert shapes[1] == {"first.w": (1, 4), "last": (1, 3, 3)}
    whole = information()
    for of, name in ((0, "last"), (1, "first.w")):
        expected = np.diagonal(whole[of][name], axis1=1, axis2=2)
        np.testing.assert_allclose(found[of][name], expected, **EXACT)
    zero = structure.isotropic(PARAMS, 0.0)
    assert jax.tree.map(jnp.shape, zero) == jax.tree.map(jnp.shape, found)


@pytest.mark.parametrize("sharing", [of_positions.expand, of_positions.pool])
def test_an_embedding_is_a_product_with_one_hot_rows(sharing):
    def looked_up(params, ids):
        return params["table"][ids].mean(1) @ params["head"]

    def multiplied(params, ids):
        rows = jax.nn.one_hot(ids, 5, dtype=params["table"].dtype)
        return (rows @ params["table"]).mean(1) @ params["head"]

    params = {"table": draw(5, 3, seed=14), "head": draw(3, 3, seed=15)}
    ids = np.array([[0, 3, 3], [1, 1, 1], [2, 0, 4], [4, 3, 0]])

    def run(params, apply_fn):
        layers = ff.layers.find_layers(apply_fn, params, ids)
        structure = ff.structures.kronecker(
            layers, sharing=dict.fromkeys(("table", "head"), sharing)
        )
        return ff.estimators.exact(apply_fn, CATEGORICAL, structure)(
            params, (ids, None)
        )

    found, expected = jax.jit(lambda p: (run(p, looked_up), run(p, multiplied)))(params)
    rows = expected.input_factors["table"]
    np.testing.assert_allclose(
        found.input_factors["table"][0], np.diag(rows[0]), **EXACT
    )
    np.testing.assert_allclose(
        found.output_factors["table"], expected.output_factors["table"], **EXACT
    )


def test_other_layers_are_refused():
    def other(params, x):
        return x @ params["w"]

    estimator = ff.estimators.exact(other, CATEGORICAL, ff.structures.kronecker(LAYERS))
    with pytest.raises(ValueError, match=r"the layers of other parameters"):
        # errors of tracing: nothing need be computed
        jax.eval_shape(estimator, {"w": draw(3, 3, seed=16)}, (INPUTS, None))

    def other_bias(params, x):
        return network(params, x) + jnp.sum(params["first"]["b"])

    estimator = ff.estimators.exact(
        other_bias, CATEGORICAL, ff.structures.kronecker(LAYERS)
    )
    with pytest.raises(ValueError, match=r" first\.w is not the one"):
        jax.eval_shape(estimator, PARAMS, (INPUTS, None))
    for factory in (ff.estimators.hutchinson, ff.estimators.squared_gradient):
        whole = factory(network, CATEGORICAL, ff.structures.kronecker(LAYERS))
        with pytest.raises(ValueError, match="groups=None and fast_squares=True"):
            key = jax.random.key(0)
            jax.eval_shape(whole, PARAMS, (INPUTS, np.zeros(6, int)), key)
    with pytest.raises(ValueError, match="no kernels"):
        ff.structures.kronecker(LAYERS, sharing={"w": of_positions.pool})
    with pytest.raises(ValueError, match="leaves"):
        ff.information.matvec(information(), {"w": draw(3, 3, seed=16)})


def test_a_prior_of_several_numbers_in_a_layer_is_refused():
    entries = jax.tree.map(lambda x: jnp.ones(np.shape(x)), PARAMS)
    uneven = ff.structures.Diagonal({**entries, "last": jnp.arange(12.0).reshape(4, 3)})
    with pytest.raises(ValueError, match="one number a layer"):
        ff.information.add(information(), uneven)
    even = ff.structures.Diagonal({**entries, "last": jnp.full((4, 3), 2.0)})
    added = dense(ff.information.add(information(), even)) - dense(information())
    np.testing.assert_allclose(np.diag(added), np.r_[np.ones(16), 2 * np.ones(12), 1])


# ---- the correction's bases


def test_a_wider_past_corrects_in_chunks():
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), PARAMS)
    inputs = jnp.asarray(INPUTS, jnp.float32)
    structure = ff.structures.kronecker(LAYERS, eigenvalue_correction=information())
    found = jax.jit(ff.estimators.exact(network, CATEGORICAL, structure, chunk_size=1))(
        params, (inputs, None)
    )
    assert {x.dtype for x in jax.tree.leaves(found)} == {jnp.dtype(jnp.float32)}
    np.testing.assert_allclose(
        dense(found), dense(information("corrected")), rtol=1e-3, atol=1e-5
    )


def test_sums_are_seen_from_the_basis_on_the_left():
    ours = information("corrected")
    theirs = jax.tree.map(
        lambda x: x[:, ::-1, ::-1] if x.ndim == 3 and x.shape[1] == x.shape[2] else x,
        ours,
    )
    summed, stacked = jax.jit(
        lambda x, y: (
            ff.information.add(x, y),
            ff.information.total(
                jax.tree.map(lambda *z: jnp.stack(z), x, y), jnp.array([2.0, 3.0])
            ),
        )
    )(ours, theirs)
    for name in ours.eigenvalues:
        bases = [
            np.kron(x.input_bases[name][0], x.output_bases[name][0])
            for x in (ours, theirs)
        ]
        first, second = (
            np.asarray(x.eigenvalues[name]).ravel() for x in (ours, theirs)
        )
        operator = bases[1] * second @ bases[1].T
        seen = np.diag(bases[0].T @ operator @ bases[0])
        assert np.abs(seen - second).max() > 1e-3
        np.testing.assert_allclose(
            summed.eigenvalues[name].ravel(), first + seen, **EXACT
        )
        np.testing.assert_allclose(
            stacked.eigenvalues[name].ravel(), 2 * first + 3 * seen, **EXACT
        )


def test_products_and_traces_of_factors_need_no_eigenvectors():
    ops = ff.information
    for function in (ops.trace, ops.diagonal, lambda x: ops.matvec(x, PARAMS)):
        assert "eigh" not in str(jax.make_jaxpr(function)(information()))


# ---- memories and merging


def linear_flow(memory, **options):
    def linear(params, x):
        return x @ params["w"]

    layers = ff.layers.find_layers(linear, {"w": jnp.zeros((3, 2))}, INPUTS)
    return ff.fisher_flow(
        linear,
        GAUSSIAN,
        structure=ff.structures.kronecker(layers),
        memory=memory,
        prior_precision=PRIOR,
        **options,
    )


STREAM = INPUTS.reshape((3, 2, 3)), draw(3, 2, 2, seed=17)


@pytest.mark.slow_cases
@pytest.mark.parametrize(
    "memory, weights",
    [
        (ff.memories.stationary(), [1.0, 1.0, 1.0]),
        (ff.memories.windowed(2), [0.0, 1.0, 1.0]),
        (ff.memories.exponential(0.5), [0.25, 0.5, 1.0]),
    ],
)
def test_memories_discount_both_factors(memory, weights):
    flow = linear_flow(memory)
    state = flow.init({"w": jnp.zeros((3, 2))})
    state, _ = jax.jit(lambda s, b: jax.lax.scan(flow.update, s, b))(state, STREAM)
    grams = np.einsum("bni,bnj->bij", STREAM[0], STREAM[0])
    inputs = np.einsum("b,bij->ij", weights, grams)
    found = ff.information.to_dense(state.information)
    expected = np.kron(inputs + PRIOR * np.eye(3), np.eye(2))
    np.testing.assert_allclose(found, expected, **EXACT)


@pytest.mark.slow
def test_merged_workers_have_the_factors_of_all():
    flow = linear_flow(ff.memories.stationary())
    update = jax.jit(flow.update)
    start, _ = update(flow.init({"w": jnp.zeros((3, 2))}), [x[0] for x in STREAM])
    workers = [update(start, [x[i] for x in STREAM])[0] for i in (1, 2)]
    merged = ff.merge(workers, start)
    one, _ = update(start, [x[1:].reshape((4, *x.shape[2:])) for x in STREAM])
    np.testing.assert_allclose(
        ff.information.to_dense(merged.information),
        ff.information.to_dense(one.information),
        **EXACT,
    )
    np.testing.assert_allclose(merged.mean["w"], one.mean["w"], **EXACT)


@pytest.mark.parametrize(
    "memory, options, name",
    [
        (ff.memories.random_walk(0.1), {}, "random_walk"),
        (ff.memories.adaptive(500), {}, "adaptive"),
        (ff.memories.stationary(), {"robust": True}, "robust"),
    ],
)
def test_what_does_not_go_with_it_is_refused_when_built(memory, options, name):
    with pytest.raises(ValueError, match=rf"kronecker\(layers\).*{name}"):
        linear_flow(memory, **options)


@pytest.mark.parametrize("value", [np.nan, np.inf, -1e200], ids=str)
@pytest.mark.parametrize("side", ["input_factors", "output_factors"])
def test_factors_that_are_not_finite_are_told_by_their_diagonals(side, value):
    found, is_finite = information(), jax.jit(ff.information.is_finite)
    assert is_finite(found)
    (name, factor), *_ = getattr(found, side).items()
    for place in np.ndindex(2, factor.shape[-1]):
        rows = draw(2, factor.shape[-1], seed=5)
        rows[place] = value
        with np.errstate(all="ignore"):
            gram = jnp.asarray(rows.T @ rows)[None]
        assert not np.isfinite(gram).all()
        factors = getattr(found, side) | {name: gram}
        assert not is_finite(found._replace(**{side: factors}))
    with np.errstate(all="ignore"):
        entries = {"scale": jnp.asarray(np.square(value))}
    assert not is_finite(found._replace(other_entries=entries))
