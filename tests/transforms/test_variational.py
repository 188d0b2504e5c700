"""Variational training against the bound's own optimum, and closed forms."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.optimize
from scipy.special import expit

import fisherflow_jax as ff
import transform_cases as cases
from fisherflow_jax.transforms import get_posterior, variational

ROWS, SIZE, PRIOR = 60, 3, 0.1
X = np.concatenate([np.ones((ROWS, 1)), cases.draw(ROWS, SIZE - 1, seed=1)], 1)
CHANCES = expit(X @ np.array([-1.0, 1.5, -0.5]))
Y = (np.random.default_rng(1).random(ROWS) < CHANCES).astype(float)
BATCH = jnp.asarray(X), jnp.asarray(Y)
MODEL = lambda params, x: x @ params, ff.likelihoods.bernoulli()
LOSS = ff.negative_log_likelihood(*MODEL)
FULL, DIAGONAL = ff.structures.full(), ff.structures.diagonal()
METHODS = {
    "VOGN, full": ff.estimators.exact(*MODEL, FULL),
    "VOGN, low rank": ff.estimators.exact(*MODEL, ff.structures.low_rank(SIZE)),
    "VON, full": ff.estimators.observed(*MODEL, FULL),
    "VON, diagonal": ff.estimators.observed(*MODEL, DIAGONAL),
    "Stein, diagonal": None,
}


def gradients_at(drawn, num_samples=1, loss=LOSS, batch=BATCH):
    one = jax.grad(loss)
    if num_samples == 1:
        return one(drawn, batch)
    return jax.vmap(one, (0, None))(drawn, batch)


# ---- the bound, in numpy and scipy alone

NODES, WEIGHTS = np.polynomial.hermite_e.hermegauss(40)
WEIGHTS = WEIGHTS / WEIGHTS.sum()


def bound(flat, diagonal):
    """E_q of the log-likelihood by quadrature at the outputs, less the divergence."""
    mean = flat[:SIZE]
    if diagonal:
        root = np.diag(np.exp(flat[SIZE:]))
    else:
        root = np.zeros((SIZE, SIZE))
        root[np.tril_indices(SIZE)] = flat[SIZE:]
    outputs = (X @ mean)[:, None] + np.linalg.norm(X @ root, axis=1)[:, None] * NODES
    fit = (Y[:, None] * outputs - np.logaddexp(0, outputs)) @ WEIGHTS
    logdet = 2 * np.sum(np.log(np.abs(np.diag(root))))
    quadratic = PRIOR * (np.sum(root**2) + mean @ mean)
    return fit.sum() - 0.5 * (quadratic - SIZE * np.log(PRIOR) - SIZE - logdet)


@functools.cache
def optimum(diagonal):
    """By BFGS with numerical gradients: the value, the mean, the covariance."""
    spread = np.full(SIZE, -1.0) if diagonal else 0.4 * np.eye(SIZE)
    spread = spread if diagonal else spread[np.tril_indices(SIZE)]
    start = np.concatenate([np.zeros(SIZE), spread])
    found = scipy.optimize.minimize(
        lambda flat: -bound(flat, diagonal), start, options={"gtol": 1e-6}
    )
    return -found.fun, found.x


@cases.compiled
def trained(params):
    """Averages over the second half of each method's run, one draw a step."""
    found = {}
    for name, estimator in METHODS.items():
        measure = estimator or ff.estimators.exact(*MODEL, DIAGONAL)
        optimizer = variational(
            0.01,
            estimator,
            num_observations=ROWS,
            information=measure(params, BATCH),
            prior_precision=PRIOR,
            b2=0.99 if estimator else 0.998,
        )

        def step(carry, key, optimizer=optimizer):
            params, state = carry
            drawn = ff.sample(get_posterior(state, params), key)
            updates, state = optimizer.update(
                gradients_at(drawn), state, params, drawn=drawn, batch=BATCH
            )
            params = optax.apply_updates(params, updates)
            information = get_posterior(state, params).information
            return (params, state), (params, ff.information.to_dense(information))

        start = params, optimizer.init(params)
        keys = jax.random.split(jax.random.key(0), 12_000)
        _, history = jax.lax.scan(step, start, keys)
        found[name] = jax.tree.map(lambda x: jnp.mean(x[6_000:], 0), history)
    return found


@functools.cache
def results():
    return jax.tree.map(np.asarray, trained(jnp.zeros(SIZE)))


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.slow
def test_the_optimum_of_the_bound_is_that_of_another_optimiser(name):
    mean, information = results()[name]
    diagonal = name.endswith("diagonal")
    value, flat = optimum(diagonal)
    if diagonal:
        spread = -0.5 * np.log(np.diag(information))
    else:
        spread = np.linalg.cholesky(np.linalg.inv(information))
        spread = spread[np.tril_indices(SIZE)]
    found = bound(np.concatenate([mean, spread]), diagonal)
    # the noise of 6,000 correlated draws, .02 of a standard deviation
    assert -1e-9 < value - found < 1e-3
    # what stays where the optimum is that of the mean alone
    laplace = scipy.optimize.minimize(
        lambda m: np.sum(np.logaddexp(0, X @ m) - Y * (X @ m)) + PRIOR / 2 * m @ m,
        np.zeros(SIZE),
    ).x
    chances = expit(X @ laplace)
    hessian = X.T @ (X * (chances * (1 - chances))[:, None]) + PRIOR * np.eye(SIZE)
    if diagonal:
        spread = -0.5 * np.log(np.diag(hessian))
    else:
        spread = np.linalg.cholesky(np.linalg.inv(hessian))[np.tril_indices(SIZE)]
    assert value - bound(np.concatenate([laplace, spread]), diagonal) > 0.02
    if diagonal:
        sd = np.exp(flat[SIZE:])
        np.testing.assert_allclose(np.diag(information) ** -0.5, sd, rtol=0.02)
        assert np.max(np.abs(mean - flat[:SIZE]) / sd) < 0.05


def test_with_the_same_draws_steins_rest_is_the_optimum_of_their_average():
    """Without noise: draws of fixed quantiles, a bound averaged over the same."""
    count = 16
    noise = cases.draw(count, SIZE, seed=3)

    def average(flat):
        mean, log_sd = flat[:SIZE], flat[SIZE:]
        outputs = (mean + noise * np.exp(log_sd)) @ X.T
        fit = np.mean(np.sum(Y * outputs - np.logaddexp(0, outputs), 1))
        spread = np.exp(2 * log_sd)
        divergence = PRIOR * (np.sum(spread) + mean @ mean) - 2 * np.sum(log_sd)
        return 0.5 * divergence - fit

    start = np.concatenate([np.zeros(SIZE), np.full(SIZE, -1.0)])
    expected = scipy.optimize.minimize(average, start, options={"gtol": 1e-9}).x
    optimizer = variational(
        0.2,
        None,
        count,
        num_observations=ROWS,
        information=5.0,
        prior_precision=PRIOR,
        b1=0.0,
        b2=0.9,
    )

    def step(_, carry):
        params, state = carry
        precision = state[0].information.entries
        drawn = params + noise / jnp.sqrt(precision)
        updates, state = optimizer.update(
            gradients_at(drawn, count), state, params, drawn=drawn
        )
        return optax.apply_updates(params, updates), state

    params = jnp.zeros(SIZE)
    params, state = cases.compiled(lambda c: jax.lax.fori_loop(0, 400, step, c))(
        (params, optimizer.init(params))
    )
    np.testing.assert_allclose(params, expected[:SIZE], atol=1e-5)
    sd = state[0].information.entries ** -0.5
    np.testing.assert_allclose(sd, np.exp(expected[SIZE:]), rtol=1e-5)


# ---- a linear model: Bayes' rule in one step


LINEAR = lambda params, x: x @ params["w"] + params["b"], ff.likelihoods.gaussian()
ROWS_X, ROWS_Y = cases.draw(20, 2, seed=4), cases.draw(20, 3, seed=5)
PAIR = jnp.asarray(ROWS_X), jnp.asarray(ROWS_Y)
ZERO = {"b": jnp.zeros(3), "w": jnp.zeros((2, 3))}
TABLE = ff.layers.find_layers(LINEAR[0], ZERO, PAIR[0])


BLOCK = ff.structures.block(lambda path: "all")
EXACT = {
    "full": ff.estimators.exact(*LINEAR, FULL),
    "kronecker": ff.estimators.exact(*LINEAR, ff.structures.kronecker(TABLE)),
    "low_rank": ff.estimators.exact(*LINEAR, ff.structures.low_rank(9)),
    "block": ff.estimators.exact(*LINEAR, BLOCK),
    "full, Hessian": ff.estimators.observed(*LINEAR, FULL),
    "block, Hessian": ff.estimators.observed(*LINEAR, BLOCK),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", EXACT)
def test_one_newton_step_on_a_linear_model_is_bayes_rule(kind):
    estimator = EXACT[kind]
    anchor = {"b": jnp.full(3, 0.5), "w": jnp.full((2, 3), -0.3)}
    optimizer = variational(
        1.0,
        estimator,
        2,
        num_observations=20,
        information=estimator(ZERO, PAIR),
        prior_precision=2.0,
        prior_mean=anchor,
        b1=0.0,
        b2=0.5,
    )

    @cases.compiled
    def run(params):
        state = optimizer.init(params)
        posterior = get_posterior(state, params)
        offset = jax.tree.map(
            lambda x, m: x - m, ff.sample(posterior, 0), posterior.mean
        )
        # a pair of draws whose mean is the mean
        drawn = jax.tree.map(
            lambda m, x: jnp.stack([m + x, m - x]), posterior.mean, offset
        )
        gradients = gradients_at(drawn, 2, ff.negative_log_likelihood(*LINEAR), PAIR)
        updates, state = optimizer.update(
            gradients, state, params, drawn=drawn, batch=PAIR
        )
        after = get_posterior(state, optax.apply_updates(params, updates))
        return after.mean, ff.information.to_dense(after.information, params)

    mean, information = run(ZERO)
    design = np.concatenate([np.ones((20, 1)), ROWS_X], 1)
    gram = design.T @ design + 2 * np.eye(3)
    prior = np.concatenate([np.full((1, 3), 0.5), np.full((2, 3), -0.3)])
    expected = np.linalg.solve(gram, design.T @ ROWS_Y + 2 * prior)
    found = np.concatenate([mean["b"][None], mean["w"]])
    np.testing.assert_allclose(found, expected, rtol=1e-9)
    np.testing.assert_allclose(information, np.kron(gram, np.eye(3)), atol=1e-9)


def test_batches_are_scaled_to_the_data_set_and_weights_count():
    """Two halves and a padded batch: the precision is that of all rows."""
    estimator = ff.estimators.exact(*MODEL, FULL)
    params = jnp.asarray([0.3, -0.2, 0.1])
    whole = ff.information.to_dense(estimator(params, BATCH))
    optimizer = variational(
        0.1,
        estimator,
        num_observations=ROWS,
        information=1.0,
        prior_precision=PRIOR,
        b2=0.0,
    )
    state = optimizer.init(params)
    weights = np.where(np.arange(ROWS) < 30, 2.0, 0.0)
    found = []
    for batch in ((*BATCH, weights), (BATCH[0][:30], BATCH[1][:30])):
        _, after = optimizer.update(params, state, params, drawn=params, batch=batch)
        found.append(after[0].information.rows)
    np.testing.assert_allclose(found[0], found[1], rtol=1e-9)
    half = ff.information.to_dense(estimator(params, (BATCH[0][:30], BATCH[1][:30])))
    np.testing.assert_allclose(found[0], 2 * half + PRIOR * np.eye(SIZE), rtol=1e-9)
    assert np.max(np.abs(2 * half - whole)) > 0.1
    # a batch without an observation says nothing of the precision
    nothing = (*BATCH, np.zeros(ROWS))
    _, after = optimizer.update(params, state, params, drawn=params, batch=nothing)
    np.testing.assert_array_equal(after[0].information.rows, state[0].information.rows)
    assert (after[0].step, after[0].num_skipped) == (1, 0)


# ---- the cone


def curved(params, x):
    return jnp.tanh(x @ params[:4].reshape(2, 2)) @ params[4:]


CURVED = curved, ff.likelihoods.gaussian(0.3)
HESSIANS = {
    "Stein, diagonal": None,
    "VON, diagonal": ff.estimators.observed(*CURVED, DIAGONAL),
    "VON, full": ff.estimators.observed(*CURVED, FULL),
}
RATES = np.array([0.95, 0.6, 0.0])


@pytest.mark.slow
@pytest.mark.parametrize("name", HESSIANS)
def test_the_precision_stays_positive_whatever_the_rate(name):
    """A loss with negative curvature, where the step without its square leaves."""
    estimator, loss = HESSIANS[name], ff.negative_log_likelihood(*CURVED)
    batch = jnp.asarray(X[:8, 1:], jnp.float32), jnp.asarray(Y[:8], jnp.float32)

    def run(b2, params):
        options = {"num_observations": 8, "information": 1.0, "b2": b2}
        optimizer = variational(0.001, estimator, **options)

        def step(carry, key):
            params, state = carry
            posterior = get_posterior(state, params)
            drawn = ff.sample(posterior, key)
            gradients = jax.grad(loss)(drawn, batch)
            updates, state = optimizer.update(
                gradients, state, params, drawn=drawn, batch=batch
            )
            after = get_posterior(state, params).information
            # what the same step would be without its square
            dense = functools.partial(ff.information.to_dense, like=params)
            before = posterior.information
            if estimator is None:
                measured = jnp.diag(8 * (drawn - params) * gradients * before.entries)
            else:
                measured = dense(estimator.compute(drawn, ff_batch, None))
            plain = b2 * dense(before) + (1 - b2) * (measured + jnp.eye(6))
            least = jax.vmap(jnp.linalg.eigvalsh)(jnp.stack([dense(after), plain]))
            params = optax.apply_updates(params, updates)
            return (params, state), jnp.min(least, 1)

        start = params, optimizer.init(params)
        keys = jax.random.split(jax.random.key(1), 600)
        (_, state), least = jax.lax.scan(step, start, keys)
        return state[0].num_skipped, least

    ff_batch = ff.Batch(*batch, jnp.ones(8, jnp.float32))
    params = jnp.asarray(cases.draw(6, seed=7), jnp.float32)
    skipped, least = cases.compiled(jax.vmap(run, (0, None)))(RATES, params)
    assert not np.any(skipped)
    assert np.all(least[..., 0] > 0)
    assert np.all(np.any(least[1:, :, 1] < 0, 1))


def test_a_gradient_of_any_size_leaves_the_precision_positive():
    optimizer = variational(
        0.1, num_observations=1000, information=1e-3, prior_precision=1e-3, b2=0.5
    )
    params = jnp.zeros(4, jnp.float32)
    state = optimizer.init(params)
    gradients = jnp.asarray([1e8, -1e8, 1e-30, 0.0], jnp.float32)
    for sign in (1.0, -1.0, 1.0):
        drawn = sign * jnp.asarray([1e3, 1e3, 1e3, 0.0], jnp.float32)
        _, state = optimizer.update(gradients, state, params, drawn=drawn)
    entries = state[0].information.entries
    assert state[0].num_skipped + state[0].step == 3
    assert np.all(np.isfinite(entries)) and np.all(entries > 0)
