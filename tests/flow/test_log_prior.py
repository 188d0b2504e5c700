"""A log-prior beside the Gaussian one: in a warm start and in a refinement."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import firth
import fisherflow_jax as ff

X, Y = firth.rows(40, np.array([-1.0, 1.5, -0.5]), seed=3)


def jeffreys(x):
    """Half the log-determinant of a logistic model's information."""

    def log_prior(theta):
        p = jax.nn.sigmoid(x @ theta)
        matrix = (x * (p * (1 - p))[:, None]).T @ x
        return 0.5 * jnp.linalg.slogdet(matrix)[1]

    return log_prior


def flow(**options):
    return ff.fisher_flow(*firth.MODEL, **{"prior_precision": 1e-10, **options})


@pytest.mark.slow
def test_a_warm_start_ends_at_firths_estimate():
    own = flow()
    state = ff.warm_start(own, own.init(np.zeros(3)), (X, Y), log_prior=jeffreys(X))
    expected = firth.firth(X, Y)
    np.testing.assert_allclose(state.mean, expected, atol=1e-6)
    # the information is that of the data alone, there
    found = ff.information.to_dense(state.information)
    np.testing.assert_allclose(found, firth.information(X, expected), rtol=1e-5)
    # and another estimate than the likelihood's
    plain = ff.warm_start(own, own.init(np.zeros(3)), (X, Y))
    assert np.abs(np.asarray(plain.mean) - expected).max() > 0.05


def test_separated_rows_have_a_finite_estimate():
    own, (x, y) = flow(), firth.separated()
    state = ff.warm_start(own, own.init(np.zeros(2)), (x, y), log_prior=jeffreys(x))
    np.testing.assert_allclose(state.mean, firth.firth(x, y), atol=1e-5)


@pytest.mark.parametrize("cells", [(3, 5, 7, 2), (0, 6, 5, 0)])
def test_a_two_by_two_table_is_fitted_with_half_a_count_more_in_each_cell(cells):
    # of a saturated model Jeffreys' prior is half an observation of each outcome
    table = np.array(cells, float)
    x = np.array([[1.0, 0], [1, 0], [1, 1], [1, 1]])
    y, own = np.array([0.0, 1, 0, 1]), flow()

    def log_prior(theta):
        p = jax.nn.sigmoid(x @ theta)
        each = p * (1 - p) * jnp.repeat(table.reshape((2, 2)).sum(1), 2) / 2
        return 0.5 * jnp.linalg.slogdet((x * each[:, None]).T @ x)[1]

    batch = x, y, table
    state = ff.warm_start(own, own.init(np.zeros(2)), batch, log_prior=log_prior)
    half = np.log((table + 0.5)[1::2] / (table + 0.5)[::2])
    np.testing.assert_allclose(state.mean, [half[0], half[1] - half[0]], atol=1e-5)


@pytest.mark.slow
def test_a_refinement_steps_to_firths_estimate():
    own, expected = flow(prior_precision=1e-8), firth.firth(X, Y)
    batches = [(X[:20], Y[:20]), (X[20:], Y[20:])]
    state = ff.warm_start(own, own.init(np.zeros(3)), batches[0])
    state, _ = own.update(state, batches[1])
    errors = []
    for _ in range(4):
        state = ff.refine(own, state, batches, log_prior=jeffreys(X))
        deviations = (state.mean - expected) / ff.standard_error(state)
        errors.append(float(jnp.abs(deviations).max()))
    assert errors[0] < 0.1 and errors[-1] < 1e-3
    assert all(after < before for before, after in itertools.pairwise(errors))


def test_one_refinement_is_one_step_of_scoring_and_the_evidence_leaves_the_prior_out():
    own, start = flow(prior_precision=0.5), np.array([-0.5, 1.0, 0.0])
    found = ff.refine(own, own.init(start), [(X, Y)], log_prior=jeffreys(X))
    total = firth.information(X, start) + 0.5 * np.eye(3)
    step = np.linalg.solve(total, firth.firth_score(X, Y, start))
    np.testing.assert_allclose(found.mean, start + step, rtol=1e-9)
    # of the quadratic model of the likelihood and the Gaussian prior alone
    eta = X @ start
    score = X.T @ (Y - 1 / (1 + np.exp(-eta)))
    gain = score @ step - 0.5 * step @ total @ step
    value = np.sum(Y * eta - np.logaddexp(0, eta)) + gain
    expected = value + 0.5 * (3 * np.log(0.5) - np.linalg.slogdet(total)[1])
    np.testing.assert_allclose(found.log_evidence, expected, rtol=1e-9)


@pytest.mark.slow
def test_a_log_prior_of_traced_rows_under_jit_and_vmap():
    own = flow()

    @jax.jit
    @jax.vmap
    def fitted(x, y):
        return ff.warm_start(own, own.init(jnp.zeros(3)), (x, y), log_prior=jeffreys(x))

    pairs = [firth.rows(30, np.array([0.0, 1.0, -0.5]), seed) for seed in range(5)]
    means = fitted(*map(np.stack, zip(*pairs, strict=True))).mean
    expected = [firth.firth(*pair) for pair in pairs]
    np.testing.assert_allclose(means, expected, atol=1e-5)


@pytest.mark.slow_cases
@pytest.mark.parametrize("structure", ["diagonal", "full"])
def test_a_log_prior_in_a_marginal_flow_a_bank_and_with_an_unknown_scale(structure):
    normal = ff.likelihoods.gaussian(scale=None)
    own = ff.fisher_flow(
        firth.MODEL[0], normal, structure=getattr(ff.structures, structure)(),
        prior_precision=1e-6, marginal=structure == "diagonal",
    )  # fmt: skip
    bank = ff.bank([own, own])
    pull = lambda theta: -2.0 * jnp.sum(jnp.square(theta - 1.0))  # noqa: E731
    state = ff.warm_start(
        bank, bank.init(np.zeros(3)), (X, X @ [1.0, 2, 3]), log_prior=pull
    )
    # its gradient enters as that of a Gaussian prior does
    score, gram = X.T @ X @ [1.0, 2, 3], X.T @ X
    expected = np.linalg.solve(gram + 4 * np.eye(3), score + 4.0)
    for member in state.members:
        np.testing.assert_allclose(member.mean, expected, rtol=1e-3, atol=2e-3)


@pytest.mark.slow
def test_under_an_expectation_a_log_prior_is_taken_at_the_mean():
    likelihood = ff.likelihoods.gaussian(2.0)
    own = ff.fisher_flow(
        firth.MODEL[0], likelihood, expectation=ff.expectations.outputs()
    )
    targets = X @ [1.0, 2, 3]
    state = ff.warm_start(
        own,
        own.init(np.zeros(3)),
        (X, targets),
        log_prior=lambda theta: -2.0 * jnp.sum(jnp.square(theta - 1.0)),
    )
    matrix = X.T @ X / 4 + 5 * np.eye(3)
    expected = np.linalg.solve(matrix, X.T @ targets / 4 + 4)
    np.testing.assert_allclose(state.mean, expected, rtol=1e-5)
    refined = ff.refine(
        own,
        state,
        [(X, targets)],
        log_prior=lambda theta: -2.0 * jnp.sum(jnp.square(theta - 1.0)),
    )
    np.testing.assert_allclose(refined.mean, expected, rtol=1e-5)


def test_what_is_no_log_prior_is_refused():
    own = flow()
    state = own.init(np.zeros(3))
    with pytest.raises(TypeError, match="log_prior is a function"):
        ff.warm_start(own, state, (X, Y), log_prior=1.0)
    with pytest.raises(ValueError, match="returns a number"):
        ff.warm_start(own, state, (X, Y), log_prior=lambda theta: theta)
    with pytest.raises(ValueError, match="returns a number"):
        ff.refine(own, state, [(X, Y)], log_prior=lambda theta: theta)


@pytest.mark.slow
@pytest.mark.parametrize(
    "likelihood",
    [
        ff.likelihoods.bernoulli(),
        pytest.param(ff.likelihoods.negative_binomial(None), marks=pytest.mark.slow),
    ],
)
def test_derivatives_in_what_a_log_prior_holds(likelihood):
    own = ff.fisher_flow(firth.MODEL[0], likelihood, prior_precision=0.1)

    def mean(strength):
        def pull(theta):
            return -strength * jnp.sum(jnp.square(theta - 1.0))

        state = own.init(jnp.zeros(3))
        return ff.warm_start(own, state, (X, Y), log_prior=pull).mean

    mean, step = jax.jit(mean), 1e-3
    expected = (mean(2.0 + step) - mean(2.0 - step)) / (2 * step)
    found = jax.jit(jax.jacfwd(mean))(2.0)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-6)
    assert np.abs(expected).max() > 0.05
