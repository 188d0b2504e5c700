"""The exact Fisher information against explicit Jacobians."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import estimator_cases as cases
import fisherflow_jax as ff
from estimator_cases import COUNT, MODELS, NAMED, STRUCTURES

EXACT = {"rtol": 1e-10, "atol": 1e-12}
FULL = ff.structures.full()


def run(model, structure, **options):
    exact, batch = ff.estimators.exact, model.batch
    return cases.dense_information(exact, model, structure, batch, **options)


@functools.cache
def in_chunks():
    return run(NAMED["categorical"], STRUCTURES, chunk_size=3)


@pytest.mark.slow_cases
@pytest.mark.parametrize("model", MODELS, ids=repr)
def test_every_likelihood(model):
    result = run(model, FULL)
    np.testing.assert_allclose(result, cases.fisher(model.name), **EXACT)


@pytest.mark.parametrize("name", STRUCTURES)
def test_every_structure_in_chunks(name):
    expected = cases.kept(name, cases.fisher("categorical"))
    np.testing.assert_allclose(in_chunks()[name], expected, **EXACT)


@pytest.mark.slow_cases
@pytest.mark.parametrize("chunk_size", [1, 4, COUNT, 100])
def test_every_chunk_size(chunk_size):
    result = run(NAMED["tokens"], STRUCTURES["diagonal"], chunk_size=chunk_size)
    expected = cases.kept("diagonal", cases.fisher("tokens"))
    np.testing.assert_allclose(result, expected, **EXACT)


def test_low_rank_of_too_few_directions_keeps_the_diagonal():
    model = NAMED["categorical"]
    for chunk_size in (None, 3):
        result = run(model, ff.structures.low_rank(2), chunk_size=chunk_size)
        expected = np.diag(cases.fisher("categorical"))
        np.testing.assert_allclose(np.diag(result), expected, **EXACT)


def test_information_is_extensive():
    model, structure = NAMED["poisson"], STRUCTURES["units"]
    estimator = jax.jit(
        ff.estimators.exact(model.apply_fn, model.likelihood, structure)
    )
    parts = [
        estimator(model.params, (model.inputs[rows], model.targets[rows]))
        for rows in (slice(0, 3), slice(3, 6))
    ]
    whole = estimator(model.params, (model.inputs[:6], model.targets[:6]))
    together = jax.jit(ff.information.add)(*parts)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, **EXACT), whole, together
    )


def test_labels_are_not_used():
    model = NAMED["labels"]
    estimator = ff.estimators.exact(model.apply_fn, model.likelihood, FULL)

    @jax.jit
    def both(params, inputs, targets):
        return [estimator(params, (inputs, y)) for y in (targets, None)]

    jax.tree.map(np.testing.assert_array_equal, *both(model.params, *model.batch))


def test_inputs_may_be_any_pytree_and_params_a_bare_array():
    x, y = cases.draw(COUNT, 2, seed=1), cases.draw(COUNT, seed=2)

    def apply_fn(params, inputs):
        return inputs["x"] @ params + inputs["more"][0]

    estimator = ff.estimators.exact(
        apply_fn, ff.likelihoods.gaussian(), FULL, chunk_size=2
    )
    information = estimator(np.ones(2), ({"x": x, "more": (y,)}, y))
    np.testing.assert_allclose(information.rows, x.T @ x, **EXACT)


@pytest.mark.parametrize("chunk_size", [None, 3])
def test_bfloat16_params_give_a_float32_information(chunk_size):
    model = NAMED["categorical"]
    params, inputs = jax.tree.map(
        lambda x: np.asarray(x).astype(jnp.bfloat16), (model.params, model.inputs)
    )
    estimator = ff.estimators.exact(
        model.apply_fn, model.likelihood, FULL, chunk_size=chunk_size
    )
    information = jax.jit(estimator)(params, (inputs, model.targets))
    assert {x.dtype for x in jax.tree.leaves(information)} == {jnp.dtype("float32")}
    expected = cases.fisher("categorical")
    result = cases.dense(information, params)
    # bfloat16 has 8 bits: a few per cent of the largest entries
    np.testing.assert_allclose(result, expected, atol=0.05 * expected.max())


def test_vmap_over_parameters_is_the_loop():
    model = NAMED["labels"]
    estimator = ff.estimators.exact(
        model.apply_fn, model.likelihood, STRUCTURES["groups"], chunk_size=3
    )
    others = jax.tree.map(lambda x: np.stack([x, 0.5 * x]), model.params)

    @jax.jit
    def both(others):
        batched = jax.vmap(estimator, in_axes=(0, None))(others, model.batch)
        return batched, estimator(jax.tree.map(lambda x: x[1], others), model.batch)

    batched, one = both(others)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x[1], y, **EXACT), batched, one
    )


@pytest.mark.slow
def test_an_operation_that_cannot_be_mapped_runs_one_by_one():
    """One expert by `lax.ragged_dot`, against the product that it is."""
    kernel, batch = cases.draw(1, 3, 3), (cases.draw(4, 3, seed=1), np.arange(4) % 3)

    def expert(kernel, x):
        return jax.lax.ragged_dot(x, kernel, jnp.full(1, x.shape[0], jnp.int32))

    def exact(apply_fn, **options):
        likelihood = ff.likelihoods.categorical()
        return ff.estimators.exact(apply_fn, likelihood, FULL, **options)(kernel, batch)

    one_by_one, expected = exact(expert, chunk_size=1), exact(lambda w, x: x @ w[0])
    np.testing.assert_allclose(one_by_one.rows, expected.rows, **EXACT)
