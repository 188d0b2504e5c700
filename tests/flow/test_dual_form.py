"""With fewer rows than parameters low rank is the dual form: exact, without d x d."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fisherflow_jax as ff

ROWS, SIZE = 24, 60
rng = np.random.default_rng(0)
INPUTS, TARGETS = rng.normal(size=(ROWS, SIZE)), rng.normal(size=ROWS)
NEW = rng.normal(size=(5, SIZE))
LIKELIHOODS = {
    "gaussian": (ff.likelihoods.gaussian(0.3), TARGETS),
    "bernoulli": (ff.likelihoods.bernoulli(), 1.0 * (TARGETS > 0)),
    "unknown": (ff.likelihoods.gaussian(scale=None), TARGETS),
}

pytestmark = pytest.mark.filterwarnings("ignore::fisherflow_jax.DataWarning")


def linear(params, inputs):
    return inputs @ params


def fitted(structure, likelihood, targets, cuts=3):
    flow = ff.fisher_flow(linear, likelihood, structure=structure, prior_precision=0.7)
    state = flow.init(jnp.zeros(SIZE))
    for batch in zip(np.split(INPUTS, cuts), np.split(targets, cuts), strict=True):
        state, _ = flow.update(state, batch)
    return state


@pytest.mark.slow
@pytest.mark.parametrize("name", LIKELIHOODS)
def test_equal_to_the_primal_form(name):
    likelihood, targets = LIKELIHOODS[name]
    dual = fitted(ff.structures.low_rank(ROWS), likelihood, targets)
    primal = fitted(ff.structures.full(), likelihood, targets)
    found, wanted = (
        (
            state.mean,
            ff.standard_error(state),
            state.log_evidence,
            ff.predict(state, linear, likelihood, NEW),
            ff.wald_test(state, NEW[0]).standard_error,
            ff.predictions.joint(state, linear, NEW).covariance,
        )
        for state in (dual, primal)
    )
    # the quantiles of a few hundredths of a degree of freedom are of size 1e71
    digits = 1e-8 if name == "unknown" else 1e-10
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=digits, atol=digits),
        found,
        wanted,
    )


def test_it_is_kernel_ridge_regression():
    likelihood, targets = LIKELIHOODS["gaussian"]
    state = fitted(ff.structures.low_rank(ROWS), likelihood, targets)
    prior = INPUTS @ INPUTS.T / 0.7
    across = NEW @ INPUTS.T / 0.7
    spread = prior + 0.3**2 * np.eye(ROWS)
    found = ff.predict(state, linear, likelihood, NEW)
    mean = across @ np.linalg.solve(spread, targets)
    np.testing.assert_allclose(found.mean, mean, rtol=1e-10)
    variance = np.sum(NEW**2, 1) / 0.7 - np.sum(
        across * np.linalg.solve(spread, across.T).T, 1
    )
    np.testing.assert_allclose(found.std, np.sqrt(variance), rtol=1e-10)


def test_nothing_is_of_the_size_of_the_matrix():
    count = 30_000
    structure = ff.structures.low_rank(8)
    flow = ff.fisher_flow(linear, ff.likelihoods.gaussian(1.0), structure=structure)
    rows = jax.ShapeDtypeStruct((8, count), float), jax.ShapeDtypeStruct((8,), float)

    def both(batch):
        state, _ = flow.update(flow.init(jnp.zeros(count)), batch)
        return ff.predict(state, linear, ff.likelihoods.gaussian(1.0), batch[0])

    memory = jax.jit(both).lower(rows).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 400 * 8 * count  # of the matrix 30,000
