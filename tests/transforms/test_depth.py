"""Layers that are alike: one stack, each one's numbers, and a program that is small."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fisherflow_jax as ff
import transform_cases as cases
from program_size import equations

EXACT = {"rtol": 1e-9, "atol": 1e-11}
GAUSSIAN = ff.likelihoods.gaussian()
DAMPING = 0.1


def draw(*shape, seed):
    return np.random.default_rng(seed).normal(size=shape)


# ---- the numbers, by hand


def network(params, x):
    """Three layers of one shape, and one without a bias."""
    h = jnp.tanh(x @ params["a"]["w"] + params["a"]["b"])
    h = jnp.tanh(h @ params["b"]["w"] + params["b"]["b"])
    h = jnp.tanh(h @ params["c"]["w"] + params["c"]["b"])
    return params["scale"] * (h @ params["d"])


SHAPES = {"w": (2, 2), "b": (2,)}
PARAMS = {
    name: {k: draw(*shape, seed=seed) for k, shape in SHAPES.items()}
    for seed, name in enumerate("abc")
} | {"d": draw(2, 2, seed=4), "scale": np.asarray(1.3)}
X = draw(5, 2, seed=6)
BATCH = X, draw(5, 2, seed=7)
GRADIENT = jax.tree.map(lambda x: draw(*np.shape(x), seed=8), PARAMS)
LAYERS = ff.layers.find_layers(network, PARAMS, X)
NAMES = ["a.w", "b.w", "c.w"]
POOL = ff.structures.sharing.pool
LOSS = ff.negative_log_likelihood(network, GAUSSIAN)
HELD = {**PARAMS, "b": optax.MaskedNode(), "scale": optax.MaskedNode()}


def by_hand():
    """A and G of each layer in numpy, and the diagonal of the scale."""
    h, inputs, slopes = X, [], []
    for name in "abc":
        inputs.append(np.concatenate([h, np.ones((5, 1))], 1))
        h = np.tanh(h @ PARAMS[name]["w"] + PARAMS[name]["b"])
        slopes.append(1 - h**2)
    back = np.broadcast_to(PARAMS["scale"] * np.eye(2), (5, 2, 2))  # (n, O, outputs)
    factors = {"d": (h.T @ h, np.einsum("nor,npr->op", back, back))}
    kernels = [PARAMS["b"]["w"], PARAMS["c"]["w"], PARAMS["d"]]
    for i in (2, 1, 0):
        back = slopes[i][:, :, None] * np.einsum("io,nor->nir", kernels[i], back)
        a, g = inputs[i].T @ inputs[i], np.einsum("nor,npr->op", back, back)
        factors[NAMES[i]] = a, g
    return factors, np.sum((h @ PARAMS["d"]) ** 2)


@functools.cache
def information():
    structure = ff.structures.kronecker(LAYERS)
    return cases.compiled(ff.estimators.exact(network, GAUSSIAN, structure))(
        PARAMS, BATCH
    )


def test_layers_that_are_alike_are_one_stack():
    found, (factors, scale) = information(), by_hand()
    assert list(found.input_factors) == ["a.w", "d"]
    for i, name in enumerate(NAMES):
        assert LAYERS.places[name] == ("a.w", slice(i, i + 1))
        a, g = factors[name]
        np.testing.assert_allclose(found.input_factors["a.w"][i], a, **EXACT)
        np.testing.assert_allclose(found.output_factors["a.w"][i], g, **EXACT)
    np.testing.assert_allclose(found.input_factors["d"][0], factors["d"][0], **EXACT)
    np.testing.assert_allclose(found.other_entries["scale"], scale, **EXACT)


def dense_by_hand(shift):
    """The matrix, in the order of the ravelled parameters: a bias before its kernel."""
    factors, scale = by_hand()
    matrix, start = np.zeros((23, 23)), 0
    for name in (*NAMES, "d"):
        a, g = factors[name]
        block, size = np.kron(a, g) / 5, len(a) * len(g)
        order = np.roll(np.arange(size), 2) if len(a) == 3 else np.arange(size)
        place = slice(start, start + size)
        matrix[place, place] = block[np.ix_(order, order)]
        start += size
    matrix[-1, -1] = scale
    return matrix + shift * np.eye(23)


def flat(tree):
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


@pytest.mark.parametrize("held", [False, True])
def test_operations_are_those_of_the_matrix(held):
    """Of all layers, and where one within the stack is held."""
    like = HELD if held else PARAMS
    shown = np.ones(23, bool)
    if held:
        shown[6:12] = shown[-1] = False

    @cases.compiled
    def run(alone, vector):
        ops = ff.information
        found = ops.add(alone, ff.structures.Scalar(jnp.asarray(0.5)))
        posterior = ff.posterior(like, alone, prior_precision=0.5)
        return {
            "matvec": ops.matvec(found, vector),
            "solve": ops.solve(found, vector),
            "logdet": ops.logdet(found, like),
            "trace": ops.trace(found, like),
            "diagonal": ops.diagonal(found, like),
            "inverse_diagonal": ops.inverse_diagonal(found, like),
            "standard_error": ff.standard_error(posterior),
        }

    vector = jax.tree.map(lambda x: draw(*np.shape(x), seed=9), like)
    found = run(information(), vector)
    matrix, v = dense_by_hand(0.5)[np.ix_(shown, shown)], flat(vector)
    inverse = np.linalg.inv(matrix)
    expected = {
        "matvec": matrix @ v,
        "solve": inverse @ v,
        "logdet": [np.linalg.slogdet(matrix)[1]],
        "trace": [np.trace(matrix)],
        "diagonal": np.diag(matrix),
        "inverse_diagonal": np.diag(inverse),
        "standard_error": np.sqrt(np.diag(inverse)),
    }
    for name, value in expected.items():
        np.testing.assert_allclose(flat(found[name]), value, err_msg=name, **EXACT)


def solved_by_hand(name, kernel, bias=None):
    """Factors damped and inverted one by one."""
    factors, _ = by_hand()
    a, g = (factor / 5 for factor in factors[name])
    pi = np.sqrt(np.trace(a) / len(a) / (np.trace(g) / len(g)))
    a = a + pi * np.sqrt(DAMPING) * np.eye(len(a))
    g = g + np.sqrt(DAMPING) / pi * np.eye(len(g))
    rows = kernel if bias is None else np.concatenate([kernel, bias[None]])
    return np.linalg.solve(a, rows) @ np.linalg.inv(g)


OPTIONS = {
    "together": {},
    "by turns": {"spread_inverses": True, "inverse_period": 3},
    "masked": {},
}


@functools.cache
def updates():
    """Of a first step, and the layers that the state is about."""

    def first(name):
        options = {"momentum": None, "max_kl": None, "damping": DAMPING}
        optimizer = ff.kfac(
            -1.0, network, GAUSSIAN, LAYERS, estimator=ff.estimators.exact,
            **options, **OPTIONS[name],
        )  # fmt: skip
        if name == "masked":
            shown = {"a": True, "b": False, "c": True, "d": True, "scale": True}
            optimizer = optax.masked(optimizer, shown)
        state = optimizer.init(PARAMS)
        return optimizer.update(
            GRADIENT, state, PARAMS, batch=BATCH, model_params=PARAMS
        )

    return cases.compiled(lambda: {name: first(name) for name in OPTIONS})()


@pytest.mark.parametrize("name", OPTIONS)
def test_an_update_is_that_of_each_layer(name):
    found = updates()[name][0]
    for kernel in NAMES:
        layer = kernel[0]
        part = GRADIENT[layer]
        expected = solved_by_hand(kernel, part["w"], part["b"])
        if name == "masked" and layer == "b":
            expected = np.concatenate([part["w"], part["b"][None]])
        result = np.concatenate([found[layer]["w"], found[layer]["b"][None]])
        np.testing.assert_allclose(result, expected, **EXACT)
    np.testing.assert_allclose(found["d"], solved_by_hand("d", GRADIENT["d"]), **EXACT)


@pytest.mark.slow
def test_momentum_and_bound_of_a_stack_are_those_of_layers_apart():
    """With decayed weights, over five steps; another convention keeps them apart."""

    def run(sharing):
        structure = ff.structures.kronecker(LAYERS, sharing=sharing)
        optimizer = ff.natural_gradient(
            0.3, ff.estimators.exact, network, GAUSSIAN, structure=structure,
            momentum=0.9, weight_decay=1e-2, damping=DAMPING,
            factorise=ff.transforms.factored_damping,
        )  # fmt: skip
        clip = ff.clip_by_kl(network, GAUSSIAN, 1e-3)
        optimizer = optax.chain(optimizer, clip)

        def step(carry, _):
            params, state = carry
            gradient = jax.grad(LOSS)(params, BATCH)
            updates, state = optimizer.update(gradient, state, params, batch=BATCH)
            return (optax.apply_updates(params, updates), state), updates

        return jax.lax.scan(step, (PARAMS, optimizer.init(PARAMS)), length=5)[1]

    together, apart = cases.compiled(lambda: (run({}), run({"b.w": POOL})))()
    for found, expected in zip(*map(jax.tree.leaves, (together, apart)), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-13)
        assert np.abs(found).max() > 1e-4


def test_layers_that_take_turns_are_not_stacked():
    factors = optax.tree.get(updates()["by turns"][1], "input_factors")
    assert {name: x.shape for name, x in factors.items()} == {
        **dict.fromkeys(NAMES, (1, 3, 3)),
        "d": (1, 2, 2),
    }
    kept = optax.tree.get(updates()["by turns"][1], "factorisation")
    assert {name for name, _ in ff.information.parts(kept)} == {*NAMES, "d", "scale"}


def test_conventions_that_differ_are_not_stacked():
    structure = ff.structures.kronecker(LAYERS, sharing={"b.w": POOL})
    assert list(structure.empty(PARAMS).input_factors) == [*NAMES, "d"]


# ---- the size of the program


def residual(count):
    """Residual layers of two kernels, and a step of K-FAC with its defaults."""
    shapes = {"b": (4,), "c": (4,), "v": (4, 4), "w": (4, 4)}
    params = {
        f"layer {i}": {k: np.ones(shape, np.float32) for k, shape in shapes.items()}
        for i in range(count)
    }

    def apply_fn(params, x):
        for layer in params.values():
            x = x + jnp.tanh(x @ layer["w"] + layer["b"]) @ layer["v"] + layer["c"]
        return x

    x = np.ones((3, 4), np.float32)
    batch, likelihood = (x, np.zeros(3, int)), ff.likelihoods.categorical()
    loss = jax.value_and_grad(ff.negative_log_likelihood(apply_fn, likelihood))
    optimizer = ff.kfac(0.1, apply_fn, likelihood, inputs=x, key=0)
    state = optimizer.init(params)

    def update(gradient, state, params):
        return optimizer.update(gradient, state, params, batch=batch)

    return (
        equations(jax.make_jaxpr(loss)(params, batch).jaxpr),
        equations(jax.make_jaxpr(update)(params, state, params).jaxpr),
    )


@pytest.mark.slow
def test_the_program_grows_by_at_most_four_gradients():
    gradient, update = np.diff([residual(count) for count in (2, 4, 6)], axis=0).T
    assert gradient[0] == gradient[1] > 0 and update[0] == update[1]
    assert update[0] <= 4 * gradient[0]
