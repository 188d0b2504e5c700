"""Exact damping below what rounding knows of a layer's eigenvalues."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fisherflow_jax as ff
import transform_cases as cases

LIKELIHOOD = ff.likelihoods.categorical()
# by turns a factorisation is kept, and renewed by parts
KINDS = {
    "EK-FAC": {"eigenvalue_correction": True, "spread_inverses": True},
    "exact": {"factorise": ff.transforms.factorise, "spread_inverses": True},
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


@pytest.mark.slow_cases
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("EK-FAC", "float32"), ("EK-FAC", "float64"), ("exact", "float32")],
)
def test_a_step_is_no_longer_than_rounding_allows_and_is_counted(kind, dtype):
    params, batch = start(dtype)
    loss = ff.negative_log_likelihood(network, LIKELIHOOD)
    options = {"max_kl": None, "momentum": None, "key": 0} | KINDS[kind]

    @cases.compiled
    def run(damping):
        gradients = jax.grad(loss)(params, batch)
        tx = ff.kfac(
            1.0, network, LIKELIHOOD, inputs=batch[0], damping=damping, **options
        )

        def step(state, _):
            updates, state = tx.update(gradients, state, params, batch=batch)
            return state, updates

        state, updates = jax.lax.scan(step, tx.init(params), length=2)
        return jax.tree.map(lambda x: x[-1], updates), state, gradients

    lengths = []
    for damping in (1e-30, 1e-15, 0.0):
        updates, state, gradients = run(jnp.asarray(damping, dtype))
        values = ff.information.spectral(ff.get_information(state, 1)).values
        largest = min(float(jnp.max(values[name])) for name in ("w", "h"))
        bound = optax.tree.norm(gradients) / (np.finfo(dtype).eps * largest)
        lengths.append(optax.tree.norm(updates))
        assert 0 < lengths[-1] < 1.001 * bound
        assert optax.tree.get(state, "num_skipped") == 0
        if damping < 1e-20 or dtype == "float32":
            assert optax.tree.get(state, "num_floored") == 2
    np.testing.assert_allclose(lengths[0], lengths[2], rtol=1e-6)


def test_ordinary_damping_is_as_before_to_the_bit():
    params, batch = start("float32")
    layers = ff.layers.find_layers(network, params, batch[0])
    vector, damping = jax.tree.map(jnp.sin, params), jnp.float32(1e-3)

    @cases.compiled
    def both(params):
        factored = ff.estimators.exact(
            network, LIKELIHOOD, ff.structures.kronecker(layers)
        )(params, batch)
        corrected = ff.structures.kronecker(layers, eigenvalue_correction=factored)
        corrected = ff.estimators.exact(network, LIKELIHOOD, corrected)(params, batch)
        pairs = []
        for information in (factored, corrected):
            made = ff.transforms.factorise(information, damping)
            spectrum = ff.information.spectral(information)
            before = spectrum.map(lambda values: values + damping)
            after = ff.transforms.apply(made, vector)
            pairs.append((after, before.divide(vector), made.raised))
        return pairs

    for after, before, raised in both(params):
        jax.tree.map(np.testing.assert_array_equal, after, before)
        assert raised == {"h": False, "w": False}


@pytest.mark.slow
def test_with_its_defaults_a_tiny_damping_does_not_raise_the_loss():
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
