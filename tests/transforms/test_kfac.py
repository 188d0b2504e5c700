"""K-FAC as an Optax transformation: damping factor by factor, and whole steps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fisherflow_jax as ff
import transform_cases as cases
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
    assert sizes[0] - sizes[1] == 6 * sum(x.size for x in kept)
    for options in ({"store": "int8"}, {"store": 2, "eigenvalue_correction": True}):
        with pytest.raises(ValueError, match="store is None or a floating-point type"):
            run(**options)
    with pytest.raises(ValueError, match="store is for inverses"):
        run(store="bfloat16", eigenvalue_correction=True)
