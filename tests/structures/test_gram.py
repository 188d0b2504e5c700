"""The whole matrix from outer products, against the vectors themselves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fisherflow_jax as ff

LIKELIHOOD = ff.likelihoods.categorical()


def two_layers(params, x):
    hidden = jnp.tanh(x @ params["kernel"].T + params["shift"][None])
    hidden = hidden * params["gain"][None]
    return jnp.einsum("ni,iab->nab", hidden, params["heads"]).reshape((-1, 6))


def parameters():
    keys = jax.random.split(jax.random.key(1), 4)
    return {
        "gain": 1 + jax.random.normal(keys[0], (4,)) / 4,
        "heads": jax.random.normal(keys[1], (4, 2, 3)),  # two axes of outputs
        "kernel": jax.random.normal(keys[2], (4, 5)),  # outputs first
        "shift": jax.random.normal(keys[3], (4,)),
    }


@pytest.mark.slow_cases
@pytest.mark.parametrize(
    "kind, chunk_size", [("exact", None), ("exact", 3), ("hutchinson", None)]
)
def test_products_equal_vectors(kind, chunk_size):
    x = jax.random.normal(jax.random.key(0), (7, 5))
    weights = jnp.array([1.0, 2.0, 0.0, 1.0, 0.5, 1.0, 3.0])
    batch = ff.Batch(x, None, weights)
    options = {} if kind == "exact" else {"num_probes": 3}

    def measure(fast):
        make = getattr(ff.estimators, kind)
        estimator = make(
            two_layers,
            LIKELIHOOD,
            ff.structures.full(),
            fast_squares=fast,
            chunk_size=chunk_size,
            **options,
        )
        return jax.jit(estimator.compute)(parameters(), batch, jax.random.key(3))

    found, expected = measure(True), measure(False)
    assert jax.tree.map(jnp.shape, found) == jax.tree.map(jnp.shape, expected)
    found, expected = ff.information.to_dense(found), ff.information.to_dense(expected)
    assert jnp.linalg.norm(expected) > 1
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-12)


def test_where_an_example_has_several_vectors_it_is_cheaper():
    x, paths = jnp.ones((32, 12)), set()

    def cost(likelihood, outputs, fast):
        def apply_fn(params, x):
            made = jnp.tanh(x @ params["kernel"]) @ params["head"]
            return made if outputs > 1 else made[:, 0]

        estimator = ff.estimators.exact(
            apply_fn, likelihood, ff.structures.full(), fast_squares=fast
        )
        params = {"kernel": jnp.ones((12, 10)), "head": jnp.ones((10, outputs))}
        paths.add(estimator.paths(params, (x, None)).split("  ")[-1])
        compiled = jax.jit(lambda p: estimator(p, (x, None))).lower(params).compile()
        return compiled.cost_analysis()["flops"]

    assert cost(LIKELIHOOD, 6, True) < cost(LIKELIHOOD, 6, False) / 2
    products = "products of inputs times products of gradients"
    whole = "a gradient for each example (full() reduces whole vectors)"
    assert paths == {products, whole}
    one = ff.likelihoods.bernoulli()
    assert cost(one, 1, True) == cost(one, 1, False)
