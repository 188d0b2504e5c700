"""Standard errors and intervals of every structure against dense linear algebra."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import fisherflow_jax as ff
import structure_cases as cases
from structure_cases import COMPENSATED, STRUCTURES
from together import together

MEAN = np.linspace(-1.0, 2.0, cases.SIZE)
EXACT = {"rtol": 1e-9}


def asks(state):
    """Every function that takes a state and an option `robust`."""
    likelihood = ff.likelihoods.gaussian()
    inputs = jnp.ones((2, 1))

    def apply_fn(params, x):
        return x[:, 0] * params["deep"][0]

    return {
        "standard_error": lambda **o: ff.standard_error(state, **o),
        "confidence_interval": lambda **o: ff.confidence_interval(state, **o),
        "summary": lambda **o: ff.summary(state, **o),
        "delta_method": lambda **o: ff.delta_method(state, lambda p: p["conv"], **o),
        "wald_test": lambda **o: ff.wald_test(state, lambda p: p["conv"], **o),
        "predict": lambda **o: ff.predict(state, apply_fn, likelihood, inputs, **o),
    }


NAMES = sorted(asks(None))
# their operations have tests of their own: here one of each kind
SOME = [c for c in STRUCTURES if c.name in ("scalar", "diagonal", "units", "full")]
LOW_RANK = [c for c in STRUCTURES if c.name == "low_rank-4"]


@functools.partial(jax.jit, static_argnums=(1, 2))
def both(state, level, robust):
    interval = ff.confidence_interval(state, level, robust)
    return ff.standard_error(state, robust), interval


@pytest.fixture
def full(belief):
    case = next(case for case in STRUCTURES if case.name == "full")
    return belief(cases.tree(MEAN), cases.information(case))


@pytest.mark.slow_cases
@pytest.mark.parametrize("case", SOME + LOW_RANK + COMPENSATED[-1:], ids=repr)
def test_every_structure(belief, case):
    state = belief(cases.tree(MEAN), cases.information(case))
    expected = np.sqrt(np.diag(np.linalg.inv(cases.matrix(case))))
    error, (lower, upper) = both(state, 0.9, False)
    assert jax.tree.map(jnp.shape, error) == jax.tree.map(jnp.shape, state.mean)
    np.testing.assert_allclose(cases.flat(error), expected, **EXACT)
    reach = stats.norm.ppf(0.95) * expected
    np.testing.assert_allclose(cases.flat(lower), MEAN - reach, **EXACT)
    np.testing.assert_allclose(cases.flat(upper), MEAN + reach, **EXACT)


@pytest.mark.parametrize("case", SOME + COMPENSATED[-1:], ids=repr)
def test_robust_is_the_sandwich(belief, case):
    meat = cases.information(case, seed=1)
    state = belief(cases.tree(MEAN), cases.information(case), meat)
    inverse = np.linalg.inv(cases.matrix(case))
    sandwich = inverse @ cases.matrix(case, seed=1) @ inverse
    error, (lower, upper) = both(state, 0.8, True)
    expected = np.sqrt(np.diag(sandwich))
    np.testing.assert_allclose(cases.flat(error), expected, **EXACT)
    reach = stats.norm.ppf(0.9) * expected
    np.testing.assert_allclose(cases.flat(upper), MEAN + reach, **EXACT)
    np.testing.assert_allclose(cases.flat(lower), MEAN - reach, **EXACT)


def test_unknown_dispersion_scales_the_error_and_widens_the_quantile(belief, full):
    unknown = full._replace(
        dispersion=jnp.asarray(4.0),
        degrees_of_freedom=jnp.asarray(3.5),
        count=jnp.asarray(18.5),
    )
    known, _ = both(full, 0.9, False)
    scaled, (_, upper) = both(unknown, 0.99, False)
    np.testing.assert_allclose(cases.flat(scaled), 2 * cases.flat(known), **EXACT)
    reach = stats.t.ppf(0.995, 3.5) * cases.flat(scaled)
    np.testing.assert_allclose(cases.flat(upper), MEAN + reach, **EXACT)


def test_robust_error_does_not_depend_on_the_dispersion(full):
    robust = full._replace(meat=full.information)
    unknown = robust._replace(
        dispersion=jnp.asarray(4.0), degrees_of_freedom=jnp.asarray(3.0)
    )
    np.testing.assert_array_equal(
        cases.flat(both(unknown, 0.9, True)[0]), cases.flat(both(robust, 0.9, True)[0])
    )


@together
@pytest.mark.parametrize("level", [0.0, 1.0, -0.5, 95])
@pytest.mark.parametrize(
    "name", ["confidence_interval", "delta_method", "predict", "summary"]
)
def test_level_outside(full, name, level):
    with pytest.raises(ValueError, match=rf"level must be in \(0, 1\); got {level}"):
        asks(full)[name](level=level)


@pytest.mark.parametrize("name", NAMES)
def test_robust_without_the_scores(full, name):
    with pytest.raises(ValueError, match=r"fisher_flow\(\.\.\., robust=True\)"):
        asks(full)[name](robust=True)


@together
@pytest.mark.parametrize("robust", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_too_few_observations_for_the_dispersion(full, name, robust):
    state = full._replace(
        meat=full.information,
        dispersion=jnp.asarray(jnp.nan),
        degrees_of_freedom=jnp.asarray(0.0),
        count=jnp.asarray(15.0),
    )
    if (name, robust) == ("standard_error", True):
        ff.standard_error(state, robust=True)  # the sandwich needs no dispersion
        return
    with pytest.raises(ValueError, match=r"cannot be estimated: 15 observations"):
        asks(state)[name](robust=robust)


@pytest.mark.slow
def test_too_few_observations_in_a_flow_eager_and_compiled():
    flow = ff.fisher_flow(
        lambda params, x: x @ params,
        ff.likelihoods.gaussian(scale=None),
        structure=ff.structures.full(),
        memory=ff.memories.stationary(),
        prior_precision=1e-6,
        num_steps=1,
    )
    state = flow.init(jnp.zeros(3))
    with pytest.raises(ValueError, match="0 observations"):
        ff.standard_error(state)
    # as many effective parameters as observations, up to rounding of either sign
    batch = (jnp.array([[1.0, 0.5, 0.2], [0.3, 1.0, 0.7]]), jnp.array([1.0, 2.0]))
    state, _ = jax.jit(flow.update)(state, batch)
    assert np.isnan(state.dispersion)
    with pytest.raises(ValueError, match="2 observations leave no degree of freedom"):
        ff.confidence_interval(state)
    lower, upper = jax.jit(ff.confidence_interval)(state)
    assert np.isnan(lower).all() and np.isnan(upper).all()


def test_jit_and_vmap_over_states(belief):
    states = [
        belief(
            {"a": jnp.array([1.0, -scale]), "b": jnp.asarray(scale)},
            ff.structures.Diagonal({"a": jnp.array([1.0, 4.0]), "b": jnp.asarray(2.0)}),
            ff.structures.Diagonal({"a": jnp.array([2.0, 0.5]), "b": jnp.asarray(1.0)}),
            jnp.asarray(scale),
            jnp.asarray(2.0 + seed),
            jnp.asarray(20.0),
        )
        for seed, scale in enumerate((1.0, 2.0, 0.3))
    ]

    def function(state):
        return [ff.confidence_interval(state, 0.9, robust=r) for r in (False, True)]

    stacked = jax.tree.map(lambda *x: jnp.stack(x), *states)
    together = jax.jit(jax.vmap(function))(stacked)
    compiled = jax.jit(function)
    for index, state in enumerate(states):
        row = jax.tree.map(lambda x, i=index: x[i], together)
        for alone in (function(state), compiled(state)):
            np.testing.assert_allclose(cases.flat(row), cases.flat(alone), rtol=1e-10)


def test_bank_by_hand(belief):
    means = np.array([[0.0, 1.0], [2.0, 0.0], [5.0, 3.0]])
    variances = np.array([[1.0, 0.5], [0.25, 2.0], [4.0, 0.1]])
    meats = np.array([[2.0, 1.0], [1.0, 1.0], [0.5, 3.0]])
    weights = np.array([0.2, 0.5, 0.3])
    members = tuple(
        belief(
            {"a": jnp.asarray(m)},
            ff.structures.Diagonal({"a": jnp.asarray(1 / v)}),
            ff.structures.Diagonal({"a": jnp.asarray(q)}),
        )
        for m, v, q in zip(means, variances, meats, strict=True)
    )
    bank = ff.BankState(members, jnp.log(weights))
    center = weights @ means
    np.testing.assert_allclose(bank.mean["a"], center)
    for robust in (False, True):
        inner = variances**2 * meats if robust else variances
        error = np.sqrt(weights @ (inner + (means - center) ** 2))
        result = ff.standard_error(bank, robust)["a"]
        np.testing.assert_allclose(result, error, rtol=1e-12)
        lower, upper = ff.confidence_interval(bank, 0.95, robust)
        reach = stats.norm.ppf(0.975) * error
        np.testing.assert_allclose(lower["a"], center - reach, rtol=1e-12)
        np.testing.assert_allclose(upper["a"], center + reach, rtol=1e-12)


def test_float32_stays_float32(full):
    state = jax.tree.map(lambda x: x.astype(jnp.float32), full)
    result = both(state, 0.9, False)
    assert {x.dtype for x in jax.tree.leaves(result)} == {jnp.dtype("float32")}
    expected = both(full, 0.9, False)[0]
    np.testing.assert_allclose(cases.flat(result[0]), cases.flat(expected), rtol=1e-5)
