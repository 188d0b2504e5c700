"""The prior: its mean is not the start of the search, and it comes in many forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fisherflow_jax as ff
import streams

ENTRIES = np.array([0.5, 2.0, 4.0])
MATRIX = np.array([[2.0, 0.3, 0.0], [0.3, 1.0, 0.5], [0.0, 0.5, 3.0]])
INNER = np.array([[1.0, 0.5], [0.5, 3.0]])


def full_information(matrix):
    rows = jax.vmap(streams.tree)(jnp.asarray(np.linalg.cholesky(matrix).T))
    return ff.structures.full().reduce(rows)


def block_information():
    root = np.zeros((3, 3))
    root[0, 0], root[1:, 1:] = np.sqrt(2.0), np.linalg.cholesky(INNER)
    return streams.STRUCTURES["block"].reduce(
        jax.vmap(streams.tree)(jnp.asarray(root.T))
    )


BLOCK = np.zeros((3, 3))
BLOCK[0, 0], BLOCK[1:, 1:] = 2.0, INNER

FORMS = {
    "number": (1.5, 1.5 * np.eye(3)),
    "prefix": ({"level": 0.5, "slope": 2}, np.diag([0.5, 2.0, 2.0])),
    "entries": (streams.tree(ENTRIES), np.diag(ENTRIES)),
    "Scalar": (ff.structures.Scalar(jnp.asarray(1.5)), 1.5 * np.eye(3)),
    "Diagonal": (ff.structures.Diagonal(streams.tree(ENTRIES)), np.diag(ENTRIES)),
    "Full": (full_information(MATRIX), MATRIX),
    "Block": (block_information(), BLOCK),
}


@pytest.mark.slow_cases
@pytest.mark.parametrize("form", FORMS)
def test_the_posterior_is_that_of_the_prior_given(form):
    given, precision = FORMS[form]
    flow = streams.flow()
    state = streams.start_with(given)
    np.testing.assert_allclose(streams.dense(state.information), precision, rtol=1e-12)
    if form not in ("number", "entries", "Full"):
        return  # the same computation from here on
    batch = streams.INPUTS, streams.TARGETS, streams.WEIGHTS
    state, _ = flow.update(state, batch)
    weighted = streams.INPUTS.T * streams.WEIGHTS / streams.SCALE**2
    information = precision + weighted @ streams.INPUTS
    shift = precision @ streams.ORIGIN + weighted @ streams.TARGETS
    np.testing.assert_allclose(streams.dense(state.information), information)
    mean = np.linalg.solve(information, shift)
    np.testing.assert_allclose(streams.flat(state.mean), mean, rtol=1e-10)


@pytest.mark.parametrize("num_steps", [1, 4])
def test_linear_the_start_of_the_search_does_not_matter(num_steps):
    flow = streams.flow("full", "stationary", num_steps=num_steps)
    batches = streams.batches(4)
    for guess in (np.zeros(3), np.array([100.0, -50.0, 3.0])):
        state = flow.init(streams.tree(guess), streams.tree(streams.ORIGIN))
        np.testing.assert_array_equal(streams.flat(state.mean), guess)
        state = streams.run(flow, state, batches)[-1]
        mean, _ = streams.fit("stationary", 5)
        np.testing.assert_allclose(streams.flat(state.mean), mean, rtol=1e-10)


def test_one_step_linearises_at_the_start_of_the_search():
    """A Poisson model's first step, in numpy: the prior pulls, the start linearises."""
    flow = streams.flow("full", "stationary", "poisson")
    guess = np.array([0.2, 0.1, -0.1])
    state = flow.init(streams.tree(guess), streams.tree(streams.ORIGIN))
    inputs, counts, weights = streams.batches(4, "poisson")[0]
    state, _ = flow.update(state, (inputs, counts, weights))
    rate = np.exp(inputs @ guess)
    information = (inputs.T * weights * rate) @ inputs
    information += streams.PRECISION * np.eye(3)
    gradient = inputs.T @ (weights * (counts - rate))
    gradient -= streams.PRECISION * (guess - streams.ORIGIN)
    expected = guess + np.linalg.solve(information, gradient)
    np.testing.assert_allclose(streams.flat(state.mean), expected, rtol=1e-10)
    np.testing.assert_allclose(streams.dense(state.information), information)


def test_left_out_the_prior_mean_is_where_the_search_starts():
    flow = streams.flow()
    state = flow.init(streams.tree(streams.ORIGIN))
    state = streams.run(flow, state, streams.batches(4))[-1]
    mean, _ = streams.fit("stationary", 5)
    np.testing.assert_allclose(streams.flat(state.mean), mean, rtol=1e-10)


def test_a_prior_mean_in_another_float_type_takes_that_of_the_parameters():
    flow = streams.flow()
    params = jax.tree.map(lambda x: x.astype(jnp.float32), streams.tree(np.zeros(3)))
    state = flow.init(params, streams.tree(streams.ORIGIN))
    assert {x.dtype for x in jax.tree.leaves(state.prior)} == {jnp.dtype(jnp.float32)}
