"""Exact damping below what rounding knows of a layer's eigenvalues."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fisherflow_jax as ff
import transform_cases as cases

LIKELIHOOD = ff.likelihoods.categorical()
KINDS = {
    "EK-FAC": {"eigenvalue_correction": True},
    "EK-FAC by turns": {"eigenvalue_correction": True, "spread_inverses": True},
    "exact": {"factorise": ff.transforms.factorise},
    "exact by turns": {"factorise": ff.transforms.factorise, "spread_inverses": True},
}


def network(params, x):
    return jnp.tanh(x @ params["w"] + params["b"]) @ params["h"]


def start(dtype):
    params = {
        "w": cases.draw(4, 6, seed=1) / 2,
        "b": cases.draw(6, seed=2) / 2,
        "h": cases.draw(6, 3, seed=3) / 2,
    }
    batch = 2 * cases.draw(2, 4, seed=4), np.array([0, 1])  # two rows
    params, x = jax.tree.map(lambda x: jnp.asarray(x, dtype), (params, batch[0]))
    return params, (x, batch[1])


def steps(kind, dtype, dampings, num_steps=2, **options):
    """Updates, state and gradient after some steps, for each damping."""
    params, batch = start(dtype)
    loss = ff.negative_log_likelihood(network, LIKELIHOOD)
    options = {"max_kl": None, "momentum": None, "key": 0} | KINDS[kind] | options

    @cases.compiled
    def run(damping):
        tx = ff.kfac(
            1.0, network, LIKELIHOOD, inputs=batch[0], damping=damping, **options
        )
        at, state = params, tx.init(params)
        for _ in range(num_steps):
            before, gradients = at, jax.grad(loss)(at, batch)
            updates, state = tx.update(gradients, state, at, batch=batch)
            at = optax.apply_updates(at, jax.tree.map(lambda x: x * 1e-9, updates))
        return updates, state, gradients, loss(before, batch)

    return [run(jnp.asarray(damping, dtype)) for damping in dampings]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_is_no_longer_than_rounding_allows_and_is_counted(kind, dtype):
    found = steps(kind, dtype, (1e-30, 1e-15, 0.0))
    eps = np.finfo(dtype).eps
    for updates, state, gradients, _ in found:
        information = ff.get_information(state, 1)
        largest = min(
            float(jnp.max(values))
            for name, values in ff.information.spectral(information).values.items()
            if name in ("w", "h")
        )
        bound = optax.tree.norm(gradients) / (eps * largest)
        assert 0 < optax.tree.norm(updates) < 1.001 * bound
        assert optax.tree.get(state, "num_skipped") == 0
    for index in (0, 2) if dtype == "float64" else (0, 1, 2):
        assert optax.tree.get(found[index][1], "num_floored") == 2
    tiny, _, none = (optax.tree.norm(updates) for updates, *_ in found)
    np.testing.assert_allclose(tiny, none, rtol=1e-6)


@pytest.mark.parametrize("kind", ["EK-FAC", "exact"])
def test_ordinary_damping_is_as_before_to_the_bit(kind):
    (_, state, gradients, _), *_ = steps(kind, "float32", (1e-3,), num_steps=1)
    assert optax.tree.get(state, "num_floored") == 0
    information, damping = ff.get_information(state, 1), jnp.float32(1e-3)

    @cases.compiled
    def both(information, gradients):
        made = ff.transforms.factorise(information, damping)
        spectrum = ff.information.spectral(information)
        before = spectrum.map(lambda values: values + damping)
        return ff.transforms.apply(made, gradients), before.divide(gradients)

    jax.tree.map(np.testing.assert_array_equal, *both(information, gradients))


def test_with_its_defaults_a_tiny_damping_does_not_raise_the_loss():
    options = {"max_kl": 0.1, "momentum": 0.9}
    params, batch = start("float32")
    loss = ff.negative_log_likelihood(network, LIKELIHOOD)
    tx = ff.kfac(
        0.1,
        network,
        LIKELIHOOD,
        inputs=batch[0],
        damping=1e-15,
        eigenvalue_correction=True,
        key=0,
        **options,
    )

    @cases.compiled
    def run(params):
        def step(carry, _):
            params, state = carry
            value, gradients = jax.value_and_grad(loss)(params, batch)
            updates, state = tx.update(gradients, state, params, batch=batch)
            return (optax.apply_updates(params, updates), state), value

        return jax.lax.scan(step, (params, tx.init(params)), length=10)

    (_, state), losses = run(params)
    assert losses[-1] < losses[0] and np.max(losses) < 2 * losses[0]
    assert optax.tree.get(state, "num_floored") == 10


@pytest.mark.parametrize("structure", [ff.structures.block(), ff.structures.full()])
def test_other_powers_of_blocks_have_the_floor_too(structure):
    rows = cases.draw(2, cases.SIZE, seed=5).astype(np.float32)  # of rank 2
    information = structure.reduce(cases.tree(rows))
    made = ff.transforms.factorise(information, jnp.float32(0), power=-0.5)
    vector = cases.tree(np.ones(cases.SIZE, np.float32))
    largest = [np.max(x) for x in ff.information.eigenvalues(information)]
    eps = np.finfo(np.float32).eps
    bound = np.sqrt(cases.SIZE / (eps * min(largest)))
    assert 0 < optax.tree.norm(ff.transforms.apply(made, vector)) < 1.001 * bound
    assert all(np.shape(flag) == () for flag in made.raised.values())
