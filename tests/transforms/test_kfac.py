"""K-FAC as an Optax transformation: damping factor by factor, and whole steps."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fisherflow_jax as ff
import transform_cases as cases
from fisherflow_jax._ground import trees
from fisherflow_jax.transforms import apply, factored_damping, kfac

EXACT = {"rtol": 1e-9, "atol": 1e-11}


def draw(*shape, seed):
    return np.random.default_rng(seed).normal(size=shape)


def network(params, x):
    hidden = jnp.tanh(x @ params["first"]["w"] + params["first"]["b"])
    return params["scale"] * (hidden @ params["last"])


PARAMS = {
    "first": {"b": draw(4, seed=1), "w": draw(3, 4, seed=2)},
    "last": draw(4, 3, seed=3),
    "scale": np.asarray(1.3),
}
INPUTS = draw(12, 3, seed=4)
BATCH = INPUTS, np.arange(12) % 3
LIKELIHOOD = ff.likelihoods.categorical()
LAYERS = ff.layers.find_layers(network, PARAMS, INPUTS)
LOSS = ff.negative_log_likelihood(network, LIKELIHOOD)
DAMPING = 0.1


@functools.cache
def mean_information():
    estimator = ff.estimators.exact(
        network, LIKELIHOOD, ff.structures.kronecker(LAYERS)
    )

    @cases.compiled
    def run(params):
        return ff.information.scale(estimator(params, BATCH), 1 / 12)

    return run(PARAMS)


def by_hand(gradients):
    """Factors inverted one by one, in numpy."""
    found = mean_information()

    def solve(name, matrix):
        a = np.asarray(found.input_factors[name][0]) / float(found.num_observations)
        g = np.asarray(found.output_factors[name][0])
        pi = np.sqrt((np.trace(a) / len(a)) / (np.trace(g) / len(g)))
        a = a + pi * np.sqrt(DAMPING) * np.eye(len(a))
        g = g + np.sqrt(DAMPING) / pi * np.eye(len(g))
        return np.linalg.solve(a, matrix) @ np.linalg.inv(g)

    first, last = "first.w", "last"
    stacked = np.concatenate([gradients["first"]["w"], gradients["first"]["b"][None]])
    stacked = solve(first, stacked)
    return {
        "first": {"b": stacked[-1], "w": stacked[:-1]},
        "last": solve(last, np.asarray(gradients["last"])),
        "scale": gradients["scale"]
        / (np.asarray(found.other_entries["scale"]) + DAMPING),
    }


def close(left, right):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **EXACT), left, right)


def test_factored_damping_inverts_each_factor():
    gradients = jax.tree.map(np.asarray, cases.compiled(jax.grad(LOSS))(PARAMS, BATCH))

    @cases.compiled
    def run(information, gradients):
        made = factored_damping(information, jnp.asarray(DAMPING))
        return apply(made, gradients)

    close(run(mean_information(), gradients), by_hand(gradients))


@pytest.mark.parametrize("place", [(1, 1), (2, 1)])
@pytest.mark.parametrize("value", [0.1, np.nan, np.inf, -50.0])
def test_diagonals_tell_whether_inverses_are_finite(value, place):
    @cases.compiled
    def run(information, value):
        sides = information.input_factors
        changed = sides["first.w"].at[(0, *place)].set(value)
        changed = changed.at[(0, *place[::-1])].set(value)
        sides = sides | {"first.w": changed}
        made = factored_damping(
            information._replace(input_factors=sides), jnp.asarray(DAMPING)
        )
        return trees.all_finite(made), trees.all_finite(made.telling)

    whole, told = run(mean_information(), value)
    assert whole == told == (value == 0.1)


def test_a_step_is_the_gradient_times_the_inverses():
    optimizer = kfac(
        0.5,
        network,
        LIKELIHOOD,
        LAYERS,
        estimator=ff.estimators.exact,
        damping=DAMPING,
        momentum=None,
        max_kl=None,
    )

    @cases.compiled
    def step(params, state):
        gradients = jax.grad(LOSS)(params, BATCH)
        return optimizer.update(gradients, state, params, batch=BATCH)[0], gradients

    updates, gradients = step(PARAMS, optimizer.init(PARAMS))
    expected = jax.tree.map(lambda x: -0.5 * x, by_hand(gradients))
    close(updates, expected)


@pytest.mark.slow_cases
@pytest.mark.parametrize("options", [{}, {"max_kl": 0.05}])
def test_it_trains_with_sampled_labels(options):
    optimizer = kfac(0.2, network, LIKELIHOOD, LAYERS, key=0, **options)

    @cases.compiled
    def run(params):
        def step(carry, _):
            params, state = carry
            value, gradients = jax.value_and_grad(LOSS)(params, BATCH)
            updates, state = optimizer.update(gradients, state, params, batch=BATCH)
            return (optax.apply_updates(params, updates), state), value

        return jax.lax.scan(step, (params, optimizer.init(params)), length=60)[1]

    losses = np.asarray(run(PARAMS))
    assert np.all(np.isfinite(losses)) and losses[-1] < 0.6 * losses[0]


def test_factored_damping_is_for_kronecker_factors():
    diagonal = ff.structures.Diagonal(jax.tree.map(np.ones_like, PARAMS))
    with pytest.raises(ValueError, match="Diagonal"):
        factored_damping(diagonal, jnp.asarray(DAMPING))
    with pytest.raises(ValueError, match=r"power -0\.5"):
        factored_damping(mean_information(), jnp.asarray(DAMPING), power=-0.5)


@pytest.mark.parametrize("widest", [0, 3])
def test_wider_sides_keep_a_diagonal(widest):
    optimizer = kfac(0.2, network, LIKELIHOOD, LAYERS, key=0, widest=widest)
    state = jax.eval_shape(optimizer.init, PARAMS)
    structure = ff.structures.kronecker(LAYERS, widest=widest)
    expected = jax.eval_shape(lambda params: structure.isotropic(params, 1.0), PARAMS)
    for name in ("input_factors", "output_factors"):
        (found,) = {
            str(jax.tree.map(jnp.shape, kept))
            for _, kept in optax.tree.get_all_with_path(state, name)
        }
        assert found == str(jax.tree.map(jnp.shape, getattr(expected, name)))


@pytest.mark.parametrize("options", [{}, {"eigenvalue_correction": True}])
def test_an_update_runs_the_model_once_a_shape(options):
    shapes = []

    def counting(params, x):
        shapes.append(x.shape)
        return network(params, x)

    optimizer = kfac(0.2, counting, LIKELIHOOD, LAYERS, key=0, **options)
    state = jax.eval_shape(optimizer.init, PARAMS)
    jax.eval_shape(
        lambda state: optimizer.update(PARAMS, state, PARAMS, batch=BATCH), state
    )
    assert sorted(shapes) == sorted(set(shapes))


@pytest.mark.slow
def test_inverses_are_kept_in_a_narrower_type():
    def run(**options):
        optimizer = ff.kfac(
            0.1, network, LIKELIHOOD, LAYERS, damping=DAMPING, key=0, **options
        )

        @jax.jit
        def steps(params):
            state = optimizer.init(params)
            for _ in range(3):
                gradients = jax.grad(LOSS)(params, BATCH)
                updates, state = optimizer.update(gradients, state, params, batch=BATCH)
            return updates, state

        return optimizer, *steps(PARAMS)

    whole, updates, _ = run()
    narrow, close_by, state = run(store="bfloat16", spread_inverses=True)
    for x, y in zip(jax.tree.leaves(close_by), jax.tree.leaves(updates), strict=True):
        np.testing.assert_allclose(x, y, rtol=0.05, atol=1e-3 * np.abs(y).max())
    kept = jax.tree.leaves(state[0].factorisation)
    assert {x.dtype for x in kept} == {jnp.dtype("bfloat16")}
    assert jax.tree.leaves(state[0].information)[0].dtype != jnp.bfloat16
    sizes = [ff.transforms.bytes_per_device(x, PARAMS) for x in (whole, narrow)]
    # of 8 bytes a number of the inverses 2 are left; of D^2 in a factor (D + 1) D / 2
    spared = 8 * sum(d * (d - 1) // 2 for d in (4, 4, 4, 3))
    assert sizes[0] - sizes[1] == 6 * sum(x.size for x in kept) + spared
    for options in ({"store": "int8"}, {"store": 2, "eigenvalue_correction": True}):
        with pytest.raises(ValueError, match="store is None or a floating-point type"):
            run(**options)
    with pytest.raises(ValueError, match="store is for inverses"):
        run(store="bfloat16", eigenvalue_correction=True)


@pytest.mark.slow_cases
@pytest.mark.parametrize("options", [{"widest": 3}, {"max_kl": None, "period": 2}])
def test_factors_kept_as_triangles_are_those_kept_whole_to_the_bit(options):
    def run(store):
        optimizer = ff.kfac(
            *(0.1, network, LIKELIHOOD, LAYERS),
            **{"damping": DAMPING, "key": 0, "store": store, **options},
        )
        step = cases.compiled(
            lambda state, gradients, batch: optimizer.update(
                gradients, state, PARAMS, batch=batch
            )
        )
        state, updates = optimizer.init(PARAMS), []
        for scale in (1.0, 0.5, np.nan, 2.0):  # one step is refused
            gradients = jax.tree.map(lambda x, s=scale: s * x, PARAMS)
            update, state = step(state, gradients, BATCH)
            updates.append(update)
        return updates, state

    (expected, whole), (found, kept) = run(None), run("float64")
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert int(optax.tree.get(kept, "num_skipped")) == 1
    factors = optax.tree.get(kept, "input_factors")
    last = (4,) if options.get("widest", 9) < 4 else (2, 5)
    assert {x.shape[1:] for x in factors.values()} == {(2, 5), last}
    informations = [ff.get_information(state, 12) for state in (whole, kept)]
    assert isinstance(informations[1], ff.structures.Kronecker)
    jax.tree.map(np.testing.assert_array_equal, *informations)


def attention(params, x):
    """One head, and a gate: three kernels that one array enters, and two."""
    q, v = x @ params["q"], x @ params["v"]
    k = jnp.einsum("nsd,de->nse", x, params["k"])
    weights = jax.nn.softmax(jnp.einsum("nsd,ntd->nst", q, k))
    h = jnp.einsum("nst,ntd->nsd", weights, v) @ params["o"]
    return jnp.tanh(h @ params["gate"]) * (h @ params["up"]) @ params["head"]


@pytest.mark.slow
def test_layers_that_one_array_enters_have_one_factor_of_it():
    square = {name: draw(4, 4, seed=i) for i, name in enumerate("qkvo")}
    wide = {"up": draw(4, 6, seed=5), "gate": draw(4, 6, seed=6)}
    params = {**square, **wide, "head": draw(6, 3, seed=7)}
    x = draw(5, 2, 4, seed=8)
    batch = x, np.arange(10).reshape(5, 2) % 3
    layers = ff.layers.find_layers(attention, params, x)
    assert "dense, input shared with k " in str(layers)
    same = {name: list(rows) for name, rows in layers.same_inputs.items()}
    assert same == {"gate": [0, 0], "head": [0], "k": [0, 1, 0, 0]}  # k, o, q, v
    alone = dataclasses.replace(layers, entered=())

    def after(layers, **options):
        optimizer = ff.kfac(
            0.1, attention, LIKELIHOOD, layers, key=0, max_kl=None, **options
        )

        @cases.compiled
        def steps(params):
            state = optimizer.init(params)
            for _ in range(2):
                updates, state = optimizer.update(params, state, params, batch=batch)
            return updates, state

        return steps(params)

    (expected, _), (found, state) = after(alone), after(layers, store="float64")
    close = functools.partial(np.testing.assert_allclose, **EXACT)
    jax.tree.map(close, found, expected)
    held = optax.tree.get(state, "input_factors")
    assert {name: x.shape for name, x in held.items()} == {
        "gate": (1, 2, 5),
        "head": (1, 3, 7),
        "k": (2, 2, 5),
    }
    factors = ff.get_information(state, 10).input_factors["k"]
    assert factors.shape == (4, 4, 4) and bool((factors[0] == factors[3]).all())
