"""Roots of the output Fisher seen through a model: equal ones, and bounds."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import estimator_cases as cases
import fisherflow_jax as ff
from estimator_cases import NAMED

EXACT = {"rtol": 1e-10, "atol": 1e-12}
MODEL = NAMED["categorical"]
FULL = ff.structures.full()
CLASSES = 5
WIDE = {**MODEL.params, "out": cases.draw(2, CLASSES, seed=30)}


def rank(k, num_iterations=None):
    return functools.partial(
        ff.likelihoods.rank_root, k=k, num_iterations=num_iterations
    )


def dense(root=None, apply_fn=MODEL.apply_fn, params=WIDE):
    options = {} if root is None else {"root": root}
    estimator = ff.estimators.exact(apply_fn, MODEL.likelihood, FULL, **options)
    run = jax.jit(lambda p: ff.information.to_dense(estimator(p, (MODEL.inputs, None))))
    return np.asarray(run(params))


@functools.cache
def exact():
    return dense()


@functools.cache
def of_rank(k, num_iterations=None):
    return dense(rank(k, num_iterations))


def smallest(matrix):
    return np.linalg.eigvalsh(matrix).min()


def test_all_roots_are_roots_of_the_same():
    own = dense(lambda likelihood: likelihood)
    np.testing.assert_allclose(exact(), own, **EXACT)
    np.testing.assert_allclose(of_rank(CLASSES - 1), own, **EXACT)


def test_classes_may_be_permuted():
    order = np.array([3, 0, 4, 1, 2])
    permuted = dense(apply_fn=lambda p, x: MODEL.apply_fn(p, x)[:, order])
    np.testing.assert_allclose(permuted, exact(), **EXACT)


def shifted(params, x):
    logits = MODEL.apply_fn(params, x)
    return logits + 3.0 * jnp.sum(jnp.square(params["hidden"]["w"]))


def test_one_number_added_to_all_logits_is_not_seen_but_by_the_upper_bound():
    np.testing.assert_allclose(dense(apply_fn=shifted), exact(), **EXACT)
    bounds = [dense(ff.likelihoods.diagonal_root, f) for f in (MODEL.apply_fn, shifted)]
    assert np.trace(bounds[1]) > 5 * np.trace(bounds[0])


def test_the_upper_bound_exceeds_by_the_mean_gradients():
    upper = dense(ff.likelihoods.diagonal_root)

    def flat_outputs(params):
        return MODEL.apply_fn(params, MODEL.inputs)

    logits, jacobian = flat_outputs(WIDE), jax.jit(jax.jacrev(flat_outputs))(WIDE)
    rows = np.concatenate(
        [np.reshape(x, (*logits.shape, -1)) for x in jax.tree.leaves(jacobian)], -1
    )
    means = np.einsum("nc,ncd->nd", cases.softmax(np.asarray(logits)), rows)
    np.testing.assert_allclose(upper - exact(), means.T @ means, **EXACT)


@pytest.mark.parametrize("num_iterations", [None, 0, 3, 30])
def test_lower_bounds_are_certified_at_any_number_of_iterations(num_iterations):
    for k in (1, 2):
        assert smallest(exact() - of_rank(k, num_iterations)) > -1e-10
        assert np.all(np.diag(of_rank(k, num_iterations)) <= np.diag(exact()) + 1e-12)


def test_lower_bounds_grow_with_the_rank_to_the_information():
    for k in range(1, CLASSES - 1):
        assert smallest(of_rank(k + 1) - of_rank(k)) > -1e-10
        assert np.trace(of_rank(k + 1)) > np.trace(of_rank(k))


@pytest.mark.parametrize(
    "name, root",
    [
        ("hutchinson_dg", ff.likelihoods.diagonal_root),
        ("hutchinson_rank1", rank(1)),
        ("hutchinson_rankk", rank(2)),
    ],
)
def test_the_random_bounds_have_the_exact_ones_for_mean(name, root):
    estimator = getattr(ff.estimators, name)(
        MODEL.apply_fn, MODEL.likelihood, ff.structures.diagonal(), num_probes=4000
    )
    found = jax.jit(estimator)(WIDE, (MODEL.inputs[:1], None), 0).entries
    one = ff.estimators.exact(
        MODEL.apply_fn, MODEL.likelihood, ff.structures.diagonal(), root=root
    )
    expected = jax.jit(one)(WIDE, (MODEL.inputs[:1], None)).entries
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        # a relative deviation of at most sqrt(2 / 4000), five times
        np.testing.assert_allclose(x, y, rtol=5 * np.sqrt(2 / 4000), atol=1e-12)
