"""The structure of docs/own_structure.md passes every public function.

Its page's code is run as it stands. What is known of it is also known as a `Diagonal`:
wherever a state or an information goes in, both must give the same.
"""

import doctest
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fisherflow_jax as ff

pytestmark = pytest.mark.standard_promotion

PAGE = Path(__file__).parents[2] / "docs" / "own_structure.md"


def written_by_the_page() -> dict[str, Any]:
    text, room = PAGE.read_text().split("## Check it")[0], {}
    for example in doctest.DocTestParser().get_examples(text):
        exec(compile(example.source, str(PAGE), "exec"), room)
    return room


ROOM = written_by_the_page()
OWN = ROOM["row_scalar"]()
ops = ff.information


def draw(*shape, seed):
    return np.random.default_rng(seed).normal(size=shape)


def apply_fn(params, x):
    return params["gain"] * (x @ params["w"] + params["b"])


PARAMS = {"w": draw(3, 2, seed=0), "b": draw(2, seed=1), "gain": np.asarray(1.2)}
X = draw(12, 3, seed=2)
BATCH = X, draw(12, 2, seed=3)
CLASSES = X, np.random.default_rng(4).integers(0, 2, 12)
GAUSSIAN = apply_fn, ff.likelihoods.gaussian()
CATEGORICAL = apply_fn, ff.likelihoods.categorical()
HALF = {"w": True, "b": False, "gain": True}
KEY = jax.random.key(0)


def exact(structure=OWN, model=GAUSSIAN):
    return ff.estimators.exact(*model, structure)


@functools.cache
def informations():
    """Of the batch: in the own structure, and the same as a `Diagonal`."""
    information = jax.jit(exact())(PARAMS, BATCH)
    return information, jax.jit(ROOM["as_diagonal"])(information, PARAMS)


def states():
    for information in informations():
        yield ff.posterior(PARAMS, information, prior_precision=0.5)


def numbers(tree):
    leaves = map(np.asarray, jax.tree.leaves(tree))
    return [x for x in leaves if np.issubdtype(x.dtype, np.number)]


def check_finite(tree):
    found = numbers(tree)
    assert found
    for x in found:
        assert np.all(np.isfinite(x)), x


def check_equal(left, right):
    for x, y in zip(numbers(left), numbers(right), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-8, atol=1e-10)


# ---- states: what the own structure gives is what the diagonal gives

OF_A_STATE = {
    "standard_error": ff.standard_error,
    "confidence_interval": ff.confidence_interval,
    "summary": lambda s: [ff.summary(s).standard_error, ff.summary(s).p_value],
    "wald_test": lambda s: ff.wald_test(s, lambda p: p["w"][0]),
    "delta_method": lambda s: ff.delta_method(s, lambda p: p["w"] * p["gain"]),
    "sample": lambda s: ff.sample(s, KEY, (3,)),
    "log_density": lambda s: ff.log_density(s, PARAMS),
    "predict": lambda s: ff.predict(s, *GAUSSIAN, X),
    "predict classes": lambda s: ff.predict(s, *CATEGORICAL, X),
    "probit": lambda s: ff.predict(s, *CATEGORICAL, X, link=ff.predictions.probit()),
    "output_samples": lambda s: ff.predict(
        s, *CATEGORICAL, X, link=ff.predictions.output_samples(KEY, 16)
    ),
    "linearized_outputs": lambda s: ff.predictions.linearized_outputs(
        s, apply_fn, X, covariance=True
    ),
    "joint": lambda s: ff.predictions.joint(s, apply_fn, X),
    "top_tokens": lambda s: ff.predictions.top_tokens(s, *CATEGORICAL, X, 2),
    "weight_samples": lambda s: ff.predictions.weight_samples(s, *GAUSSIAN, X, KEY, 5),
    "saliency": lambda s: ff.compression.saliency(s),
    "prune": lambda s: ff.compression.prune(
        s, jax.tree.map(lambda x: np.abs(x) > 0.4, PARAMS)
    ),
    "round_to_grid": lambda s: ff.compression.round_to_grid(s, 3),
    "allocate_bits": lambda s: (
        ff.compression.allocate_bits(s, (2, 3), 3.0).predicted_rise
    ),
    "calibrate": lambda s: ff.calibrate(s, *CATEGORICAL, CLASSES).scale,
    "calibrate and its noise": lambda s: (
        ff.calibrate(s, *GAUSSIAN, BATCH).posterior.mean
    ),
}


@pytest.mark.slow_cases
@pytest.mark.parametrize("name", OF_A_STATE)
def test_of_a_state(name):
    own, twin = map(OF_A_STATE[name], states())
    check_finite(own)
    check_equal(own, twin)


# ---- informations

OF_AN_INFORMATION = {
    "log_marginal_likelihood": lambda i: ff.calibration.log_marginal_likelihood(
        PARAMS, i, -2.0, 0.7
    ),
    "its derivative": lambda i: jax.grad(
        lambda p: ff.calibration.log_marginal_likelihood(PARAMS, i, -2.0, p)
    )(0.7),
    "maximize_marginal_likelihood": lambda i: (
        ff.calibration.maximize_marginal_likelihood(GAUSSIAN[1], PARAMS, i, -2.0)
    ),
    "effective": lambda i: ops.effective(
        ops.add(i, ff.structures.Scalar(jnp.asarray(1.0))),
        ff.structures.Scalar(jnp.asarray(1.0)),
        PARAMS,
    ),
    "effective_parameters": lambda i: ff.diagnostics.effective_parameters(
        i, 1.0, PARAMS
    ),
    "effective_rank": lambda i: ff.diagnostics.effective_rank(i, PARAMS),
    "eigenvalues": lambda i: ff.diagnostics.eigenvalues(i, PARAMS),
    "relative_error": lambda i: ff.diagnostics.relative_error(
        i, *GAUSSIAN, PARAMS, BATCH, KEY
    ),
    "table": lambda i: [
        row.effective_parameters
        for row in ff.diagnostics.table({"own": i}, *GAUSSIAN, PARAMS, BATCH, KEY).rows
    ],
    "spectral": lambda i: ops.spectral(i, PARAMS).times(PARAMS),
    "factorise": lambda i: ff.transforms.apply(
        ff.transforms.factorise(i, jnp.asarray(0.1)), PARAMS
    ),
    "a prior that is an information": lambda i: ff.standard_error(
        ff.posterior(PARAMS, i, prior_precision=i)
    ),
}


@pytest.mark.slow_cases
@pytest.mark.parametrize("name", OF_AN_INFORMATION)
def test_of_an_information(name):
    own, twin = map(OF_AN_INFORMATION[name], informations())
    check_finite(own)
    check_equal(own, twin)


# ---- flows

MEMORIES = {
    "stationary": ff.memories.stationary(),
    "windowed": ff.memories.windowed(2),
    "exponential": ff.memories.exponential(0.9),
}


def flow(memory=None, **options):
    memory = memory or ff.memories.stationary()
    return ff.fisher_flow(*GAUSSIAN, structure=OWN, memory=memory, **options)


@pytest.mark.slow_cases
@pytest.mark.parametrize("name", MEMORIES)
def test_a_flow(name):
    made = flow(MEMORIES[name])
    state = made.init(PARAMS)
    for _ in range(3):
        state, info = made.update(state, BATCH)
    check_finite((state.mean, state.information, info.log_evidence))
    assert state.num_skipped == 0
    stacked = jax.tree.map(lambda *x: jnp.stack(x), BATCH, BATCH)
    state, _ = jax.lax.scan(made.update, state, stacked)
    check_finite(ff.summary(state).standard_error)


@pytest.mark.slow
def test_around_a_flow():
    made = flow()
    state = ff.warm_start(made, made.init(PARAMS), BATCH)
    refined = ff.refine(made, state, [BATCH])
    check_finite((state.mean, refined.mean, refined.information))
    several = [made.update(state, BATCH)[0] for _ in range(2)]
    check_finite(ff.merge(several, state).information)
    made.evaluate(PARAMS, BATCH, None)


def test_a_bank():
    made = ff.bank([flow(), flow(prior_precision=2.0)])
    state, info = made.update(made.init(PARAMS), BATCH)
    check_finite((info.log_evidence, ff.predict(state, *GAUSSIAN, X)))


# ---- estimators and accumulation

ESTIMATORS = {
    "exact": ff.estimators.exact,
    "monte_carlo": ff.estimators.monte_carlo,
    "empirical": ff.estimators.empirical,
    "hutchinson": ff.estimators.hutchinson,
    "squared_gradient": ff.estimators.squared_gradient,
}


@pytest.mark.slow_cases
@pytest.mark.parametrize("name", ESTIMATORS)
def test_an_estimator(name):
    estimator = ESTIMATORS[name](*GAUSSIAN, OWN)
    found = ff.accumulate(estimator, PARAMS, [BATCH, BATCH], KEY)
    assert isinstance(found.information, ROOM["RowScalar"])
    check_finite(found.information)
    check_finite(ff.posterior(PARAMS, found.information, prior_precision=1.0))


# ---- optimisers


@functools.cache
def gradient():
    return jax.jit(jax.grad(ff.negative_log_likelihood(*GAUSSIAN)))(PARAMS, BATCH)


def mean_of_a_row(x):
    return np.broadcast_to(
        np.mean(np.asarray(x), axis=tuple(range(1, np.ndim(x))), keepdims=True),
        np.shape(x),
    )


def preconditioned(power, damping=0.1):
    entries, slopes = jax.tree.map(np.asarray, (informations()[1].entries, gradient()))
    return jax.tree.map(
        lambda a, g: g * (a / len(X) + damping) ** power, entries, slopes
    )


@pytest.mark.slow_cases
@pytest.mark.parametrize("power", [-1, -0.5])
@pytest.mark.parametrize("inverse_period", [None, 2])
def test_a_preconditioner(power, inverse_period):
    optimizer = ff.scale_by_fisher(
        exact(),
        memory=ff.memories.stationary(),
        power=power,
        damping=0.1,
        inverse_period=inverse_period,
    )
    state = optimizer.init(PARAMS)
    for _ in range(2):
        updates, state = optimizer.update(gradient(), state, PARAMS, batch=BATCH)
    check_equal(updates, preconditioned(power))
    found = ff.get_information(state, len(X))
    check_finite(ff.posterior(PARAMS, found, prior_precision=1.0))


@pytest.mark.parametrize("power", [-1, -0.5])
def test_a_preconditioner_of_some_parameters(power):
    optimizer = optax.masked(
        ff.scale_by_fisher(
            exact(), memory=ff.memories.stationary(), power=power, damping=0.1
        ),
        HALF,
    )
    state = optimizer.init(PARAMS)
    updates, state = optimizer.update(
        gradient(), state, PARAMS, batch=BATCH, model_params=PARAMS
    )
    check_finite(updates)
    expected = preconditioned(power)
    for name, chosen in HALF.items():
        check_equal(updates[name], expected[name] if chosen else gradient()[name])


def test_damping_relative_to_the_mean_eigenvalue():
    optimizer = ff.scale_by_fisher(
        exact(),
        memory=ff.memories.stationary(),
        damping=0.1,
        factorise=ff.transforms.relative_to_mean_eigenvalue,
    )
    state = optimizer.init(PARAMS)
    updates, _ = optimizer.update(gradient(), state, PARAMS, batch=BATCH)
    mean = float(ops.trace(informations()[1])) / len(X) / 9
    check_equal(updates, preconditioned(-1, 0.1 * mean))


def test_recipes():
    optimizer = optax.chain(
        ff.natural_gradient(0.1, exact()), ff.clip_by_kl(*GAUSSIAN, max_kl=0.1)
    )
    updates, _ = optimizer.update(
        gradient(), optimizer.init(PARAMS), PARAMS, batch=BATCH
    )
    check_finite(updates)
    adapted = ff.transforms.adapt_damping(
        ff.scale_by_fisher(exact(), memory=ff.memories.exponential(0.9), damping=0.1),
        ff.negative_log_likelihood(*GAUSSIAN),
    )
    updates, _ = adapted.update(gradient(), adapted.init(PARAMS), PARAMS, batch=BATCH)
    check_finite(updates)


def test_what_it_cannot_do_is_refused_by_name():
    with pytest.raises(ValueError, match=r"structure row_scalar\(\) does not go with"):
        flow(ff.memories.random_walk(0.1))
    with pytest.raises(ValueError, match=r"structure row_scalar\(\) does not go with"):
        flow(robust=True)
    with pytest.raises(ValueError, match=r"structure row_scalar\(\) does not go with"):
        ff.estimators.observed(*GAUSSIAN, OWN)
    large = OWN.isotropic({"w": np.zeros(5000)}, 1.0)
    with pytest.raises(ValueError, match="200,000,000 bytes"):
        ops.spectral(large, {"w": np.zeros(5000)})
