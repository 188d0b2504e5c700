"""A posterior from an estimate and an information, in every structure."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import estimator_cases as cases
import fisherflow_jax as ff
from estimator_cases import NAMED, STRUCTURES

EXACT = {"rtol": 1e-9, "atol": 1e-11}
MODEL = NAMED["categorical"]
TAU, TEMPERATURE = 0.7, 0.5
LAYERS = ff.layers.find_layers(MODEL.apply_fn, MODEL.params, MODEL.inputs)
ALL = {**STRUCTURES, "kronecker": ff.structures.kronecker(LAYERS)}


@functools.cache
def informations():
    build = functools.partial(ff.estimators.exact, MODEL.apply_fn, MODEL.likelihood)

    @jax.jit
    def run(params, batch):
        return {name: build(kind)(params, batch) for name, kind in ALL.items()}

    return run(MODEL.params, MODEL.batch)


def information(name):
    return informations()[name]


STEP = jax.tree.map(lambda x: np.full(np.shape(x), 0.1), MODEL.params)
POINT = jax.tree.map(np.add, MODEL.params, STEP)


@functools.cache
def gaussians():
    """Of each structure the posterior, its standard errors and its density."""

    @jax.jit
    def run(params, values, point):
        found = {}
        for name, value in values.items():
            state = ff.posterior(
                params, value, prior_precision=TAU, temperature=TEMPERATURE
            )
            errors, density = ff.standard_error(state), ff.log_density(state, point)
            found[name] = state, errors, density
        return found

    return run(MODEL.params, informations(), POINT)


NOT_SINGULAR = ff.structures.Diagonal(
    jax.tree.map(lambda x: jnp.ones(np.shape(x)), MODEL.params)
)


def flat(tree):
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_every_structure_becomes_a_gaussian(name):
    state, errors, density = gaussians()[name]
    matrix = cases.dense(information(name), MODEL.params)
    matrix = matrix + TAU * np.eye(len(matrix))
    covariance = TEMPERATURE * np.linalg.inv(matrix)
    np.testing.assert_allclose(flat(errors), np.sqrt(np.diag(covariance)), **EXACT)
    gaussian = stats.multivariate_normal(flat(MODEL.params), covariance)
    np.testing.assert_allclose(density, gaussian.logpdf(flat(POINT)), rtol=1e-8)
    assert state.temperature == TEMPERATURE


@pytest.mark.parametrize("name", ["diagonal", "full", "kronecker"])
def test_a_prior_may_differ_by_leaf(name):
    prior = {"hidden": 2.0, "out": 3.0, "scale": 4.0}
    make = functools.partial(ff.posterior, prior_precision=prior)
    # Kronecker factors ask the values of several numbers
    make = make if name == "kronecker" else jax.jit(make)
    state = make(MODEL.params, information(name))
    expected = cases.dense(information(name), MODEL.params) + np.diag(
        flat(
            jax.tree.map(
                lambda tau, part: jax.tree.map(
                    lambda x: np.full(np.shape(x), tau), part
                ),
                prior,
                MODEL.params,
            )
        )
    )
    found = cases.dense(state.information, MODEL.params)
    np.testing.assert_allclose(found, expected, **EXACT)


def test_linear_gaussian_posteriors_are_ridge_regression():
    x, y = cases.draw(20, 3, seed=1), cases.draw(20, seed=2)
    apply_fn = lambda params, x: x @ params  # noqa: E731
    normal = x.T @ x + TAU * np.eye(3)
    mean = np.linalg.solve(normal, x.T @ y)
    estimator = ff.estimators.exact(
        apply_fn, ff.likelihoods.gaussian(), STRUCTURES["full"]
    )

    @jax.jit
    def run(mean):
        state = ff.posterior(mean, estimator(mean, (x, None)), prior_precision=TAU)
        prediction = ff.predict(state, apply_fn, ff.likelihoods.gaussian(), x[:4])
        return prediction.std, ff.sample(state, key=0, shape=(5,))

    deviations, draws = run(mean)
    expected = np.sqrt(np.einsum("ni,ij,nj->n", x[:4], np.linalg.inv(normal), x[:4]))
    np.testing.assert_allclose(deviations, expected, **EXACT)
    assert draws.shape == (5, 3)


def test_a_posterior_may_be_made_of_arrays_that_are_closed_over():
    value = information("full")

    @jax.jit
    def errors(tau):
        ff.posterior(MODEL.params, NOT_SINGULAR, prior_precision=NOT_SINGULAR)
        return ff.standard_error(ff.posterior(MODEL.params, value, prior_precision=tau))

    matrix = cases.dense(value, MODEL.params)
    covariance = np.linalg.inv(matrix + TAU * np.eye(len(matrix)))
    expected = np.sqrt(np.diag(covariance))
    np.testing.assert_allclose(flat(errors(TAU)), expected, **EXACT)


def test_before_any_data_a_structure_holds_the_prior_alone():
    @jax.jit
    def run(params):
        states = {
            name: ff.posterior(params, structure, prior_precision=TAU)
            for name, structure in ALL.items()
        }
        dense = ff.information.to_dense
        matrices = [dense(s.information, params) for s in states.values()]
        return states, jnp.stack(matrices)

    states, matrices = run(MODEL.params)
    expected = TAU * np.eye(matrices.shape[-1])
    np.testing.assert_allclose(matrices, np.broadcast_to(expected, matrices.shape))
    kinds = {name: type(state.information) for name, state in states.items()}
    assert kinds == {
        name: type(jax.eval_shape(lambda p, s=s: s.isotropic(p, 0.0), MODEL.params))
        for name, s in ALL.items()
    }


def test_a_structure_that_was_not_called():
    for wrong in ("full", ff.structures.full):
        with pytest.raises(TypeError, match=r"Call it: ff\.structures\.full\(\)"):
            ff.posterior(MODEL.params, wrong, prior_precision=TAU)


def test_an_accumulation_is_taken_as_its_information():
    estimator = ff.estimators.exact(MODEL.apply_fn, MODEL.likelihood, ALL["diagonal"])
    value, prior = information("diagonal"), NOT_SINGULAR
    gathered = ff.accumulator(estimator).init(MODEL.params)
    gathered = gathered._replace(information=value)
    given = ff.posterior(MODEL.params, gathered, prior_precision=prior)
    expected = ff.posterior(MODEL.params, value, prior_precision=prior)
    jax.tree.map(np.testing.assert_array_equal, given, expected)
    summed = ff.information.add(value, prior)
    full = gathered._replace(information=summed)
    given = ff.posterior(MODEL.params, value, prior_precision=full)
    expected = ff.posterior(MODEL.params, value, prior_precision=summed)
    jax.tree.map(np.testing.assert_array_equal, given, expected)


# ---- some of the parameters


@pytest.mark.parametrize(
    "chosen",
    [
        lambda path: "out" in path or "scale" in path,
        {"hidden": False, "out": True, "scale": True},
    ],
)
def test_only_some_parameters_have_the_block_of_the_whole(chosen):
    apply_fn, params = ff.only(MODEL.apply_fn, MODEL.params, chosen)
    assert params["hidden"] == {"b": None, "w": None}
    outputs = apply_fn(params, MODEL.inputs)
    np.testing.assert_array_equal(outputs, MODEL.apply_fn(MODEL.params, MODEL.inputs))
    estimator = ff.estimators.exact(apply_fn, MODEL.likelihood, STRUCTURES["full"])
    found = jax.jit(lambda *x: ff.information.to_dense(estimator(*x)))
    found = found(params, MODEL.batch)
    whole = cases.dense(information("full"), MODEL.params)
    place = slice(8, 15)  # after the hidden bias and kernel
    np.testing.assert_allclose(found, whole[place, place], **EXACT)


def test_choosing_needs_a_choice():
    with pytest.raises(ValueError, match=r"no parameter is chosen.*'out'"):
        ff.only(MODEL.apply_fn, MODEL.params, lambda path: False)
    with pytest.raises(ValueError, match="booleans like the parameters or a prefix"):
        ff.only(MODEL.apply_fn, MODEL.params, {"other": True})


# ---- bad input


@pytest.mark.parametrize("value", [0.0, -1.0, np.nan, np.inf])
def test_the_temperature_is_positive(value):
    with pytest.raises(ValueError, match="temperature must be positive"):
        ff.posterior(
            MODEL.params,
            information("diagonal"),
            prior_precision=TAU,
            temperature=value,
        )


def test_the_prior_is_positive():
    with pytest.raises(ValueError, match="prior_precision must be positive"):
        ff.posterior(MODEL.params, information("diagonal"), prior_precision=0.0)


@pytest.mark.parametrize("name", ["diagonal", "full", "kronecker"])
def test_the_information_is_about_the_mean(name):
    with pytest.raises(ValueError, match=r"another tree than the mean|is not like"):
        ff.posterior({"w": jnp.zeros(3)}, information(name), prior_precision=TAU)


@pytest.mark.parametrize("value", [np.nan, np.inf, -1.0])
def test_an_information_that_cannot_be_one_is_named(value):
    entries = jax.tree.map(np.ones_like, MODEL.params)
    broken = ff.structures.Diagonal({**entries, "scale": np.asarray(value)})
    with pytest.raises(ValueError, match=f"that of parameter scale is {value}"):
        ff.posterior(MODEL.params, broken, prior_precision=TAU)


def test_a_log_density_is_of_parameters_like_the_mean():
    state = ff.posterior(MODEL.params, information("diagonal"), prior_precision=TAU)
    with pytest.raises(ValueError, match="like the mean"):
        ff.log_density(state, {**MODEL.params, "out": jnp.zeros(())})


def test_only_an_information_will_do():
    with pytest.raises(TypeError, match=r"information\.diagonal"):
        ff.posterior(MODEL.params, np.ones(3), prior_precision=TAU)
