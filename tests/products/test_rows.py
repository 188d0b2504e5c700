"""Rows of examples and their products, against explicit Jacobians."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fisherflow_jax as ff
import prediction_cases as cases
from fisherflow_jax import products
from fisherflow_jax.model import once
from fisherflow_jax.posteriors import gaussian
from prediction_cases import MODELS

CASES = [
    ("mlp", "scalar"),
    ("mlp", "diagonal"),
    ("mlp", "full"),
    ("mlp", "kronecker"),
    ("conv", "eigen"),
    ("tokens", "kronecker"),
    ("linear", "block"),
]


def columns(outputs):
    """Two cotangents that depend on the outputs."""
    return jnp.stack([jnp.cos(outputs), outputs**2])


def explicit(name):
    """`L^T J`, `(n, 2, d)`."""
    model, rows = MODELS[name], cases.jacobian(name)
    outputs = np.asarray(model.apply_fn(model.params, model.inputs))
    roots = np.stack([np.cos(outputs), outputs**2], 1)
    count, d = len(outputs), rows.shape[-1]
    return np.einsum(
        "nro,nod->nrd", roots.reshape(count, 2, -1), rows.reshape(count, -1, d)
    )


@pytest.mark.slow_cases
@pytest.mark.parametrize(("name", "structure"), CASES)
@pytest.mark.parametrize("sandwich", [False, True])
def test_all_products_are_those_of_the_jacobian(name, structure, sandwich):
    model, posterior = MODELS[name], cases.state(name, structure)
    covariance, rows = cases.covariance(posterior), explicit(name)
    rng = np.random.default_rng(3)
    vectors = jax.tree.map(lambda x: rng.normal(size=(2, *x.shape)), model.params)
    middle = None
    if sandwich:  # of another form than the information
        weights = jax.tree.map(lambda x: rng.uniform(size=x.shape), model.params)
        one = jax.tree.map(lambda x: rng.normal(size=x.shape), model.params)
        flat = np.concatenate([np.ravel(x) for x in jax.tree.leaves(one)])
        spread = np.concatenate([np.ravel(x) for x in jax.tree.leaves(weights)])
        covariance = covariance @ (np.diag(spread) + np.outer(flat, flat)) @ covariance

        def middle(v):
            dot = sum(
                jnp.sum(a * b)
                for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(v), strict=True)
            )
            return jax.tree.map(lambda w, a, x: w * x + a * dot, weights, one, v)

    @jax.jit
    def run(posterior, inputs, vectors):
        belief, apply_fn = gaussian(posterior), once(model.apply_fn)
        (parts, example_of) = products.one_by_one(inputs)
        rows = products.rows_of(belief, apply_fn, inputs, middle)

        def of(function, parts):
            return jax.vmap(lambda one: function(example_of(one), columns))(parts)

        left = of(rows.left, parts)
        right = of(rows.right, [x[1:3] for x in parts])
        one = jax.tree.map(lambda x: x[0], right)
        return (
            rows.pairs(left, right),
            rows.column(left, one),
            of(rows.own, parts),
            rows.along(left, vectors),
        )

    pairs, column, own, along = run(posterior, model.inputs, vectors)
    expected = np.einsum("nrd,de,mse->nrms", rows, covariance, rows)
    close = {"rtol": 1e-9, "atol": 1e-9 * np.max(np.abs(expected))}
    np.testing.assert_allclose(pairs, expected[:, :, 1:3], **close)
    np.testing.assert_allclose(column, expected[:, :, 1], **close)
    np.testing.assert_allclose(own, np.einsum("nrns->nrs", expected), **close)
    flat = np.concatenate([x.reshape((2, -1)) for x in jax.tree.leaves(vectors)], 1)
    expected = np.einsum("nrd,sd->nrs", rows, flat)
    np.testing.assert_allclose(along, expected, rtol=1e-9, atol=1e-9)


def test_a_kernel_that_is_used_once_keeps_what_enters_and_what_returns():
    model = MODELS["linear"]
    posterior = cases.state("linear", "kronecker")

    def kept(posterior, inputs):
        rows = products.rows_of(gaussian(posterior), once(model.apply_fn), inputs)
        return rows.left(inputs[:1], columns)

    shapes = jax.eval_shape(kept, posterior, model.inputs)
    assert sum(x.size for x in jax.tree.leaves(shapes)) == 5 + 2 * 3


def test_a_tied_kernel_has_gradients():
    params = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)))}
    model = lambda p, x: jnp.tanh(x @ p["w"]) @ p["w"].T  # noqa: E731
    x = jnp.asarray(np.random.default_rng(1).normal(size=(5, 4)))
    information = ff.structures.Diagonal({"w": jnp.full((4, 3), 2.0)})
    belief = gaussian(ff.posterior(params, information, prior_precision=0.5))
    rows = products.rows_of(belief, once(model), x)
    found = rows.own(x[:1], lambda z: jnp.ones((1, *z.shape)))
    jacobian = jax.jacrev(lambda p: jnp.sum(model(p, x[:1])))(params)["w"]
    np.testing.assert_allclose(found[0, 0], jnp.sum(jacobian**2) / 2.5, rtol=1e-12)


@pytest.mark.parametrize("structure", ["full", "kronecker"])
def test_factors_that_are_known_are_not_made_again(structure):
    model, belief = MODELS["mlp"], gaussian(cases.state("mlp", structure))
    example = model.inputs[:1]

    def found(factors):
        rows = products.rows_of(
            belief, once(model.apply_fn), model.inputs, factors=factors
        )
        kept = rows.left(example, columns), rows.right(example, columns)
        left, right = jax.tree.map(lambda x: x[None], kept)
        return rows.own(example, columns), rows.pairs(left, right)[0, :, 0]

    factors = jax.jit(products.factors_of)(belief)
    program = str(jax.make_jaxpr(found)(factors))
    assert [word for word in ("eigh", "cholesky") if word in program] == []
    expected = jax.jit(lambda: found(None))()
    for products_, wanted in zip(jax.jit(found)(factors), expected, strict=True):
        np.testing.assert_allclose(products_, wanted, rtol=1e-11)
