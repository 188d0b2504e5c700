"""`ff.estimators.rule`: estimators of one's own, and those of the package."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fisherflow_jax as ff

POISSON = ff.likelihoods.poisson()
PARAMS = np.array([[0.3], [-0.2]])
X, Y = np.array([[1.0, 2.0], [0.5, -1.0], [2.0, 0.0]]), np.array([3.0, 0.0, 1.0])
WEIGHTS = np.array([1.0, 2.0, 0.0])


def apply_fn(params, x):
    return jnp.tanh(x @ params)[:, 0]


def absolute(likelihood, outputs, targets, key):
    assert outputs.shape == targets.shape == (1,)
    assert key is None
    residual = targets - likelihood.mean(outputs)
    return jnp.stack([jnp.sqrt(jnp.abs(residual)), 2 * residual])


def test_what_a_rule_pulls_back_is_squared_and_weighted():
    rule = ff.estimators.rule(absolute, needs_targets=True)
    estimator = rule(apply_fn, POISSON, ff.structures.full())
    outputs = apply_fn(PARAMS, X)
    jacobian = np.asarray(jax.jit(jax.jacrev(apply_fn))(PARAMS, X)).reshape((3, 2))
    residual = Y - np.exp(outputs)
    factor = WEIGHTS * (np.abs(residual) + 4 * residual**2)
    expected = jacobian.T @ (factor[:, None] * jacobian)
    found = estimator(PARAMS, (X, Y, WEIGHTS))
    np.testing.assert_allclose(ff.information.to_dense(found), expected, rtol=1e-5)
    chunked = ff.estimators.bind(
        rule, apply_fn, POISSON, ff.structures.full(), chunk_size=1
    )
    np.testing.assert_allclose(
        chunked(PARAMS, (X, Y, WEIGHTS)).rows, found.rows, rtol=1e-5
    )
    diagonal = estimator.with_structure(ff.structures.diagonal())
    np.testing.assert_allclose(
        diagonal(PARAMS, (X, Y, WEIGHTS)).entries.ravel(), np.diag(expected), rtol=1e-5
    )


def data_scores(likelihood, outputs, targets, key):
    return jax.grad(lambda z: jnp.sum(likelihood.log_prob(z, targets)))(outputs)[None]


@pytest.mark.parametrize("structure", [ff.structures.full(), ff.structures.diagonal()])
def test_the_empirical_fisher_is_a_rule(structure):
    rule = ff.estimators.rule(data_scores, needs_targets=True)
    one = rule(apply_fn, POISSON, structure)(PARAMS, (X, Y, WEIGHTS))
    other = ff.estimators.empirical(apply_fn, POISSON, structure)(
        PARAMS, (X, Y, WEIGHTS)
    )
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_a_rule_that_draws_and_sums_over_groups():
    def probed(likelihood, outputs, targets, key):
        probes = ff.estimators.rademacher(key, outputs.shape, outputs.dtype)
        return likelihood.root(outputs, probes, None)[None]

    rule = ff.estimators.rule(probed, name="probed", random=True, groups=1)
    estimator = rule(apply_fn, POISSON, ff.structures.full())
    assert (estimator.random, estimator.vectors_a_batch) == (True, 1)
    with pytest.raises(ValueError, match=r"estimators\.probed draws at random"):
        estimator(PARAMS, (X, None))
    found = ff.information.to_dense(estimator(PARAMS, (X, None), key=3))
    assert np.linalg.matrix_rank(found, tol=1e-6) == 1
    flow = ff.fisher_flow(
        apply_fn,
        POISSON,
        structure=ff.structures.full(),
        memory=ff.memories.stationary(),
        estimator=rule,
    )
    state, _ = flow.update(flow.init(PARAMS, key=0), (X, Y))
    assert np.isfinite(state.mean).all()


def test_rules_compare_by_what_they_do_and_read_as_they_are_called():
    rule = ff.estimators.rule(absolute, needs_targets=True)
    assert repr(rule) == "rule(cotangents=absolute)"
    again = ff.estimators.rule(absolute, needs_targets=True)
    assert (rule, hash(rule)) == (again, hash(again))
    assert rule != ff.estimators.rule(absolute)
    with pytest.raises(ValueError, match=r"estimators\.absolute needs targets"):
        rule(apply_fn, POISSON, ff.structures.full())(PARAMS, (X, None))
    for options in ({"num_columns": 0}, {"groups": 1.5}, {"chunk_size": 0}):
        with pytest.raises(ValueError, match="must be a positive whole number"):
            ff.estimators.rule(absolute, **options)
