"""A table that also multiplies at the outputs, against explicit Jacobians."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fisherflow_jax as ff
from fisherflow_jax.structures import sharing as of_positions

EXACT = {"rtol": 1e-10, "atol": 1e-12}
GAUSSIAN = ff.likelihoods.gaussian()  # of identity Fisher information at the outputs
PARAMS = {
    name: jnp.asarray(np.random.default_rng(i).normal(size=shape))
    for i, (name, shape) in enumerate({"embed": (5, 3), "w": (3, 3)}.items())
}
IDS = np.array([[0, 3, 3], [1, 1, 1], [4, 0, 2]])
to_dense = jax.jit(ff.information.to_dense)
WEIGHTS = np.array([1.0, 0.0, 2.5])


def hidden(p, rows):
    """Of the first two of three positions."""
    h = jnp.tanh(rows @ p["w"] * 2.0)
    return h[..., :2, :] + 0.1 * jnp.mean(h, -2, keepdims=True)


def apply_fn(p, ids):
    return 0.5 * (hidden(p, p["embed"][ids]) @ p["embed"].T)


LAYERS = ff.layers.find_layers(apply_fn, PARAMS, IDS)


@functools.cache
def parts():
    """One-hot rows, inputs at the outputs, and gradients (n, r, ...) at both places."""
    ones = np.eye(5)[IDS]

    def at_places(rows, heads, ids):
        return 0.5 * (
            hidden(PARAMS, PARAMS["embed"][ids] + rows) @ PARAMS["embed"].T + heads
        )

    @jax.jit
    def run(rows, heads):
        jacobian = jax.vmap(jax.jacrev(at_places, (0, 1)), (None, None, 0))
        return hidden(PARAMS, PARAMS["embed"][IDS]), jacobian(rows, heads, IDS)

    inputs, both = run(np.zeros((3, 3)), np.zeros((2, 5)))
    flat = [np.asarray(x).reshape(3, -1, *x.shape[3:]) for x in both]
    return ones, np.asarray(inputs), *flat


@functools.cache
def jacobian():
    """Of all outputs with respect to the table, `(n, r, 5, 3)`."""
    of = jax.jit(jax.vmap(lambda x: jax.jacrev(apply_fn)(PARAMS, x[None])["embed"][0]))
    return np.asarray(of(IDS)).reshape(3, -1, 5, 3)


@functools.cache
def compiled(*structures):
    estimators = [ff.estimators.exact(apply_fn, GAUSSIAN, x) for x in structures]

    @jax.jit
    def run(params, weights):
        batch = IDS, None, weights
        return [estimator(params, batch) for estimator in estimators]

    return run


def estimated(*structures, count=3):
    """From the first examples: the others have no weight."""
    return compiled(*structures)(PARAMS, np.where(np.arange(3) < count, WEIGHTS, 0.0))


def shapes(structure):
    return jax.tree.map(
        jnp.shape, jax.eval_shape(lambda p: structure.isotropic(p, 0.0), PARAMS)
    )


def expected(count, sharing):
    """A and G by their definition, from the first examples."""
    ones, inputs, of_rows, of_heads = (x[:count] for x in parts())
    weights, positions = WEIGHTS[:count], 3 + 2
    if sharing is of_positions.pool:
        ones, of_heads = ones.mean(1, keepdims=True), of_heads.mean(2, keepdims=True)
        of_rows, inputs = of_rows.sum(2, keepdims=True), inputs.sum(1, keepdims=True)
        positions = 2
    # a look-up has the diagonal, also of pooled rows
    left = np.diag(np.einsum("n,nti,nti->i", weights, ones, ones))
    left += np.einsum("n,nrti,nrtj->ij", weights, of_heads, of_heads)
    right = np.einsum("n,nrti,nrtj->ij", weights, of_rows, of_rows)
    right += np.einsum("n,nti,ntj->ij", weights, inputs, inputs)
    return left, right / positions


@pytest.mark.parametrize("sharing", [of_positions.expand, of_positions.pool])
@pytest.mark.parametrize("count", [1, 3])
def test_both_factors_are_sums_over_both_uses(count, sharing):
    structure = ff.structures.kronecker(LAYERS, sharing={"embed": sharing})
    (found,) = estimated(structure, count=count)
    left, right = expected(count, sharing)
    np.testing.assert_allclose(found.input_factors["embed"][0], left, **EXACT)
    np.testing.assert_allclose(found.output_factors["embed"][0], right, **EXACT)
    assert shapes(structure) == jax.tree.map(jnp.shape, found)


def test_a_wide_table_keeps_the_diagonal_of_its_rows():
    structure = ff.structures.kronecker(LAYERS, widest=4)
    (found,) = estimated(structure)
    left, right = expected(3, of_positions.expand)
    np.testing.assert_allclose(found.input_factors["embed"][0], np.diag(left), **EXACT)
    np.testing.assert_allclose(found.output_factors["embed"][0], right, **EXACT)
    assert shapes(structure) == jax.tree.map(jnp.shape, found)


@pytest.mark.parametrize("count", [1, 3])
def test_the_diagonal_and_the_trace_are_exact(count):
    squares = np.einsum("n,nrij->ij", WEIGHTS[:count], jacobian()[:count] ** 2)
    kinds = ff.structures.diagonal(), ff.structures.full(), ff.structures.scalar()
    found, blocks, total = estimated(*kinds, count=count)
    np.testing.assert_allclose(found.entries["embed"], squares, **EXACT)
    size = PARAMS["embed"].size
    diagonal = np.diag(to_dense(blocks, PARAMS))
    np.testing.assert_allclose(diagonal[:size], squares.ravel(), **EXACT)
    trace = ff.information.trace(total, PARAMS)
    np.testing.assert_allclose(trace, diagonal.sum(), **EXACT)


@pytest.mark.parametrize("widest", [4096, 4])
def test_the_correction_is_the_diagonal_in_the_eigenbasis(widest):
    (past,) = estimated(ff.structures.kronecker(LAYERS, widest=widest))
    structure = ff.structures.kronecker(LAYERS, eigenvalue_correction=past)
    (found,) = estimated(structure)
    left, right = found.input_bases["embed"], found.output_bases["embed"][0]
    left = np.eye(5) if left is None else left[0]
    turned = np.einsum("nrij,ia,jb->nrab", jacobian(), left, right)
    squares = np.einsum("n,nrab->ab", WEIGHTS, turned**2)
    np.testing.assert_allclose(found.eigenvalues["embed"][0], squares, **EXACT)


def test_units_of_the_table_do_not_matter():
    """A table E C, whose rows are read as E and which meets h C^-T at the outputs."""
    change = np.random.default_rng(7).normal(size=(3, 3)) + 2 * np.eye(3)
    undo = np.linalg.inv(change)

    def changed(p, ids):
        h = hidden(p, p["embed"][ids] @ undo)
        return 0.5 * (h @ undo.T @ p["embed"].T)

    params = PARAMS | {"embed": PARAMS["embed"] @ change}
    layers = ff.layers.find_layers(changed, params, IDS)
    structure = ff.structures.kronecker(layers)
    estimator = jax.jit(ff.estimators.exact(changed, GAUSSIAN, structure))
    found = estimator(params, (IDS, None, WEIGHTS))
    left, right = expected(3, of_positions.expand)
    np.testing.assert_allclose(found.input_factors["embed"][0], left, **EXACT)
    right = undo @ right @ undo.T
    np.testing.assert_allclose(found.output_factors["embed"][0], right, **EXACT)
