"""Draws of N(0, information^-1): covariance, mean, shapes and keys."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fisherflow_jax as ff
import structure_cases as cases
from structure_cases import CASES, NAMED, SIZE

DRAWS = 20_000
# 120 entries are looked at in each case: 4.5 standard errors are passed by chance once
# in a thousand runs, and the keys are fixed.
STANDARD_ERRORS = 4.5

every_case = pytest.mark.parametrize("case", CASES, ids=repr)


@jax.jit
def draws(information):
    keys = jax.random.split(jax.random.key(11), DRAWS)
    drawn = jax.vmap(lambda k: ff.information.sample(information, k, cases.PARAMS))(
        keys
    )
    return jnp.concatenate(
        [x.reshape((DRAWS, -1)) for x in jax.tree.leaves(drawn)], axis=1
    )


@pytest.mark.slow_cases
@every_case
def test_covariance_is_the_inverse_and_the_mean_is_zero(case):
    drawn = np.asarray(draws(cases.information(case)))
    covariance = np.linalg.inv(cases.matrix(case))
    variances = np.diag(covariance)
    # Wishart: var(S_ij) = (C_ij^2 + C_ii C_jj) / n
    spread = np.sqrt((covariance**2 + np.outer(variances, variances)) / DRAWS)
    errors = (drawn.T @ drawn / DRAWS - covariance) / spread
    assert np.max(np.abs(errors)) < STANDARD_ERRORS
    means = drawn.mean(0) / np.sqrt(variances / DRAWS)
    assert np.max(np.abs(means)) < STANDARD_ERRORS


@every_case
def test_a_draw_is_shaped_like_the_parameters(case):
    drawn = jax.eval_shape(
        lambda information: ff.information.sample(
            information, jax.random.key(0), cases.PARAMS
        ),
        cases.information(case),
    )
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), drawn)
    assert shapes == jax.tree.map(lambda x: (x.shape, x.dtype), cases.PARAMS)


@pytest.mark.parametrize("name", ["low_rank-4"])
def test_the_same_key_gives_the_same_draw_eager_or_jit(name):
    information = cases.information(NAMED[name])
    eager = ff.information.sample(information, jax.random.key(3))
    draw = jax.jit(ff.information.sample)
    jitted = draw(information, jax.random.key(3))
    other = draw(information, jax.random.key(4))
    np.testing.assert_allclose(cases.flat(eager), cases.flat(jitted), rtol=1e-12)
    assert np.all(cases.flat(other) != cases.flat(jitted))
    assert cases.flat(eager).shape == (SIZE,)
