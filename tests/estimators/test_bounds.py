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


def dense(*roots, apply_fn=MODEL.apply_fn):
    """With each root, by one program."""
    estimators = [
        ff.estimators.exact(
            apply_fn, MODEL.likelihood, FULL, **({} if root is None else {"root": root})
        )
        for root in roots
    ]

    @jax.jit
    def run(params):
        found = [estimator(params, (MODEL.inputs, None)) for estimator in estimators]
        return [ff.information.to_dense(x) for x in found]

    return map(np.asarray, run(WIDE))


ITERATIONS = (None, 0, 3, 30)
RANKS = [(k, n) for n in ITERATIONS for k in (1, 2)] + [(3, None), (4, None)]


@functools.cache
def found():
    """Of the exact information, of an equal root, of the upper and the lower bounds."""
    roots = None, lambda likelihood: likelihood, ff.likelihoods.diagonal_root
    names = ["exact", "own", "upper", *RANKS]
    return dict(zip(names, dense(*roots, *(rank(*x) for x in RANKS)), strict=True))


def exact():
    return found()["exact"]


def of_rank(k, num_iterations=None):
    return found()[k, num_iterations]


def smallest(matrix):
    return np.linalg.eigvalsh(matrix).min()


@pytest.mark.slow
def test_all_roots_are_roots_of_the_same():
    own = found()["own"]
    np.testing.assert_allclose(exact(), own, **EXACT)
    np.testing.assert_allclose(of_rank(CLASSES - 1), own, **EXACT)


@pytest.mark.slow
def test_classes_may_be_permuted():
    order = np.array([3, 0, 4, 1, 2])
    (permuted,) = dense(None, apply_fn=lambda p, x: MODEL.apply_fn(p, x)[:, order])
    np.testing.assert_allclose(permuted, exact(), **EXACT)


def shifted(params, x):
    logits = MODEL.apply_fn(params, x)
    return logits + 3.0 * jnp.sum(jnp.square(params["hidden"]["w"]))


@pytest.mark.slow
def test_one_number_added_to_all_logits_is_not_seen_but_by_the_upper_bound():
    seen, upper = dense(None, ff.likelihoods.diagonal_root, apply_fn=shifted)
    np.testing.assert_allclose(seen, exact(), **EXACT)
    assert np.trace(upper) > 5 * np.trace(found()["upper"])


def test_the_upper_bound_exceeds_by_the_mean_gradients():
    upper = found()["upper"]

    def flat_outputs(params):
        return MODEL.apply_fn(params, MODEL.inputs)

    both = jax.jit(lambda p: (flat_outputs(p), jax.jacrev(flat_outputs)(p)))
    logits, jacobian = both(WIDE)
    rows = np.concatenate(
        [np.reshape(x, (*logits.shape, -1)) for x in jax.tree.leaves(jacobian)], -1
    )
    means = np.einsum("nc,ncd->nd", cases.softmax(np.asarray(logits)), rows)
    np.testing.assert_allclose(upper - exact(), means.T @ means, **EXACT)


@pytest.mark.parametrize("num_iterations", ITERATIONS)
def test_lower_bounds_are_certified_at_any_number_of_iterations(num_iterations):
    for k in (1, 2):
        assert smallest(exact() - of_rank(k, num_iterations)) > -1e-10
        assert np.all(np.diag(of_rank(k, num_iterations)) <= np.diag(exact()) + 1e-12)


def test_lower_bounds_grow_with_the_rank_to_the_information():
    for k in range(1, CLASSES - 1):
        assert smallest(of_rank(k + 1) - of_rank(k)) > -1e-10
        assert np.trace(of_rank(k + 1)) > np.trace(of_rank(k))


@pytest.mark.slow_cases
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
    one = ff.estimators.exact(
        MODEL.apply_fn, MODEL.likelihood, ff.structures.diagonal(), root=root
    )
    batch = MODEL.inputs[:1], None
    both = jax.jit(lambda p: (estimator(p, batch, 0).entries, one(p, batch).entries))
    for x, y in zip(*map(jax.tree.leaves, both(WIDE)), strict=True):
        # a relative deviation of at most sqrt(2 / 4000), five times
        np.testing.assert_allclose(x, y, rtol=5 * np.sqrt(2 / 4000), atol=1e-12)
