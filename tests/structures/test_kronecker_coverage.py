"""Layers that are more than a product with a parameter: exact where K-FAC is."""

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
GAUSSIAN = ff.likelihoods.gaussian()


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def drawn(**shapes):
    return {
        name: draw(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())
    }


X = draw(3, 4, seed=9)


def adapted(p, x):
    """A low-rank update, and stacks of them over a fixed kernel, transposed."""
    h = jnp.tanh(x @ (p["w"] + 0.5 * (p["left"] @ p["right"])) + p["b"][None])

    def body(h, layer):
        kernel = np.eye(4) - (layer["down"] @ layer["up"]).T
        return jnp.tanh(kernel @ h), layer

    stacks = {name: p[name] for name in ("down", "up")}
    return jax.vmap(lambda h: lax.scan(jax.checkpoint(body), h, stacks)[0])(h)


MODELS = {
    "adapters": (
        adapted,
        drawn(
            w=(4, 4), b=(4,), left=(4, 2), right=(2, 4), down=(2, 4, 1), up=(2, 1, 4)
        ),
        X,
    ),
}


def blocks(layers, params):
    """For each entry of the parameters the number of its block: of one kernel."""
    leaves = [np.zeros(shape, int) for shape in layers.shapes]
    start = 1
    for layer in layers.layers:
        of_stacks = start + np.arange(layer.num_stacked)
        kernel = np.broadcast_to(of_stacks[:, None, None], layer.kernel_layout.shape)
        leaves[layer.kernel] = np.asarray(layer.kernel_layout.to_leaf(kernel))
        if layer.bias is not None:
            bias = np.broadcast_to(of_stacks[:, None], layer.bias_layout.shape)
            leaves[layer.bias] = np.asarray(layer.bias_layout.to_leaf(bias))
        start += layer.num_stacked
    for leaf, _ in layers.fallback:
        size = leaves[leaf].size
        leaves[leaf] = (start + np.arange(size)).reshape(leaves[leaf].shape)
        start += size
    return np.concatenate([leaf.ravel() for leaf in leaves])


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_blocks_of_one_example_are_exact(name):
    apply_fn, params, inputs = MODELS[name]
    layers = ff.layers.find_layers(apply_fn, params, inputs)
    assert layers.fallback == ()
    estimator = ff.estimators.exact(apply_fn, GAUSSIAN, ff.structures.kronecker(layers))

    def both(params, x):
        information = estimator(params, (x, None))
        dense = ff.information.to_dense(information, params)
        return dense, jax.jacrev(lambda p: apply_fn(p, x).ravel())(params)

    compiled = jax.jit(both, compiler_options=FAST)
    found, jacobian = compiled(params, inputs[:1])
    columns = [x.reshape(len(x), -1) for x in jax.tree.leaves(jacobian)]
    jacobian = np.concatenate(columns, axis=1)
    own = blocks(layers, params)
    expected = np.where(own[:, None] == own, jacobian.T @ jacobian, 0)
    assert np.trace(expected) > 1
    np.testing.assert_allclose(found, expected, **EXACT)


def test_an_adapter_is_the_same_in_both_spellings():
    def merged(p, x):
        return jnp.tanh(x @ (p["w"] + 0.5 * (p["left"] @ p["right"]))) @ p["head"]

    def apart(p, x):
        h = x @ p["w"] + 0.5 * ((x @ p["left"]) @ p["right"])
        return jnp.tanh(h) @ p["head"]

    params = drawn(w=(4, 3), left=(4, 2), right=(2, 3), head=(3, 2))
    estimators = [
        ff.estimators.exact(f, GAUSSIAN, ff.structures.kronecker(layers))
        for f in (merged, apart)
        for layers in [ff.layers.find_layers(f, params, X)]
    ]

    @functools.partial(jax.jit, compiler_options=FAST)
    def run(params):
        found = [estimator(params, (X, None)) for estimator in estimators]
        return [ff.information.to_dense(x, params) for x in found], found[0]

    dense, found = run(params)
    np.testing.assert_allclose(*dense, **EXACT)
    passed = 0.5 * X @ params["left"]
    left, right = found.input_factors["right"], found.output_factors
    np.testing.assert_allclose(left[0], passed.T @ passed, **EXACT)
    turned = params["right"] @ right["w"][0] @ params["right"].T
    np.testing.assert_allclose(right["left"][0], turned, **EXACT)


NEAR = np.array([[1.0, 0.5, 0.0], [0.5, 1.0, 0.3], [0.0, 0.3, 1.0]])


def graph(p, x):
    return NEAR @ jnp.tanh(NEAR @ jnp.tanh(x @ p["u"]) @ p["w"]) @ p["v"]


def test_factors_of_a_graph_whose_nodes_are_examples():
    params, weights = drawn(u=(4, 3), w=(3, 2), v=(2, 2)), np.array([1.0, 0.5, 2.0])
    layers = ff.layers.find_layers(graph, params, X)
    assert [x.mixed for x in layers.layers] == [False, True, True]
    assert "mixed rows" in str(layers)
    estimator = ff.estimators.exact(graph, GAUSSIAN, ff.structures.kronecker(layers))
    batch = X, np.zeros((3, 2)), weights

    @functools.partial(jax.jit, compiler_options=FAST)
    def run(params, keys):
        found = jax.vmap(lambda key: estimator(params, batch, key))(keys)
        return found.input_factors, found.output_factors, found.num_observations

    left, right, count = run(params, jax.random.split(jax.random.key(0), 32))
    first = np.tanh(X @ params["u"])
    second = np.tanh(NEAR @ first @ params["w"])
    np.testing.assert_allclose(count, 3.5)
    mean = np.mean(weights)
    # nodes weigh the mean where they are mixed, and what they do where they are not
    entering = {
        "u": (X, weights),
        "w": (NEAR @ first, mean),
        "v": (NEAR @ second, mean),
    }
    for name, (rows, each) in entering.items():
        expected = (rows.T * each) @ rows
        np.testing.assert_allclose(
            left[name][:, 0], expected[None].repeat(32, 0), **EXACT
        )
    # returning[j, c, r, o]: of output c of node j with respect to row r
    to_second = np.einsum("jr,oc->jcro", NEAR, params["v"]) * (1 - second**2)
    to_first = np.einsum("jcro,rs,io->jcsi", to_second, NEAR, params["w"])
    to_first *= 1 - first**2
    to_last = np.einsum("jr,oc->jcro", np.eye(3), np.eye(2))
    returning = {"u": to_first, "w": to_second, "v": to_last}
    for name, rows in returning.items():
        draws = np.asarray(right[name][:, 0])
        _, own = np.unique(draws.reshape(32, -1).round(9), axis=0, return_index=True)
        assert len(own) == (
            1 if name == "v" else 4
        )  # signs of three nodes, but for all
        expected = np.einsum("j,jcro,jcrp->op", weights, rows, rows)
        np.testing.assert_allclose(draws[own].mean(0), expected, **EXACT)


def experts_of(rows):
    """One of them gets no row."""
    return jnp.asarray([0, 2, 3])[jnp.argmax(rows[:, :3], axis=1)]


def routed(p, tokens):
    """Experts of one or two layers, over the whole batch."""
    rows = jnp.asarray(tokens).reshape(-1, 4)
    expert = experts_of(rows)
    order = jnp.argsort(expert)
    sizes = jnp.bincount(expert, length=4).astype(jnp.int32)
    rows = lax.ragged_dot(rows[order], p["w"], sizes)
    if "v" in p:
        rows = lax.ragged_dot(jnp.tanh(rows), p["v"], sizes)
    return rows[jnp.argsort(order)].reshape(*tokens.shape[:2], -1)


def masked(p, tokens):
    """The same by einsum, with zeros at the tokens of others."""
    own = jax.nn.one_hot(experts_of(tokens.reshape(-1, 4)), 4, dtype=tokens.dtype)
    own = own.reshape(*tokens.shape[:2], 4)
    for name in "wv":
        tokens = jnp.einsum("ntk,nti,kio->nto", own, tokens, p[name])
        tokens = jnp.tanh(tokens) if name == "w" else tokens
    return tokens


@pytest.mark.slow
def test_experts_are_masked_stacks():
    params, tokens = drawn(w=(4, 4, 3), v=(4, 3, 2)), draw(3, 5, 4)
    found = [ff.layers.find_layers(f, params, tokens) for f in (routed, masked)]
    assert [x.batched for x in found] == [True, False]
    assert "experts, mixed rows" in str(found[0])
    estimators = [
        ff.estimators.exact(f, GAUSSIAN, ff.structures.kronecker(layers))
        for f, layers in zip((routed, masked), found, strict=True)
    ]

    @functools.partial(jax.jit, compiler_options=FAST)
    def run(params):
        return [
            ff.information.to_dense(estimator(params, (tokens, None), key), params)
            for estimator, key in zip(estimators, (0, None), strict=True)
        ]

    np.testing.assert_allclose(*run(params), **EXACT)


def test_linear_experts_are_exact():
    """With a loss at every token, for any number of examples; one after the other."""
    params, tokens = drawn(w=(4, 4, 2)), draw(3, 5, 4)
    layers = ff.layers.find_layers(routed, params, tokens, batched=False)
    structure = ff.structures.kronecker(layers)
    estimator = ff.estimators.exact(routed, GAUSSIAN, structure)

    @functools.partial(jax.jit, compiler_options=FAST)
    def run(params):
        return ff.information.to_dense(estimator(params, (tokens, None)), params)

    rows, expected = tokens.reshape(-1, 4), np.zeros((4, 8, 4, 8))
    for k in range(4):
        own = rows[np.array([0, 2, 3])[np.argmax(rows[:, :3], axis=1)] == k]
        expected[k, :, k] = np.kron(own.T @ own, np.eye(2))
    np.testing.assert_allclose(run(params), expected.reshape(32, 32), **EXACT)


def test_mixed_rows_are_not_pooled():
    layers = ff.layers.find_layers(routed, drawn(w=(4, 4, 2)), draw(3, 5, 4))
    with pytest.raises(ValueError, match=r"sharing of w must be .*expand: .*pool"):
        ff.structures.kronecker(layers, sharing=ff.structures.sharing.pool)
