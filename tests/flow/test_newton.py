"""The search for an update's solution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fisherflow_jax as ff
from fisherflow_jax.flow import _newton as newton


def counts(num_steps, **options):
    return ff.fisher_flow(
        lambda params, x: x * params,
        ff.likelihoods.poisson(),
        structure=ff.structures.full(),
        memory=ff.memories.stationary(),
        prior_precision=1e-4,
        num_steps=num_steps,
        **options,
    )


ONE_COUNT = (jnp.ones(1), jnp.array([5.0]))


def test_a_direction_thousands_of_times_too_long_is_shortened_enough():
    # where the rate was tiny, a count of five sends Newton's step to infinity
    state, info = counts(20).update(counts(20).init(jnp.array(-20.0)), ONE_COUNT)
    np.testing.assert_allclose(jnp.exp(state.mean), 5.0, rtol=1e-2)
    assert float(info.decrement) < 1e-6


@pytest.mark.slow
def test_an_unfinished_search_is_reported():
    flow = counts(2)
    # the first update goes on until it is done
    state, info = flow.update(flow.init(jnp.array(-20.0)), ONE_COUNT)
    assert float(info.decrement) < 1e-6
    # no rate suits both, and a step that suits the second is short for the first
    _, info = flow.update(state, (jnp.array([1.0, 10.0]), jnp.array([5e6, 5e6])))
    assert float(info.decrement) > 1.0


def test_a_warm_start_that_does_not_converge_warns():
    # on a diagonal, strongly correlated regressors are approached step by small step
    rows = jax.random.normal(jax.random.key(0), (200, 1)) + 1e-3 * jax.random.normal(
        jax.random.key(1), (200, 8)
    )
    flow = ff.fisher_flow(
        lambda params, x: x @ params,
        ff.likelihoods.gaussian(1e-3),
        structure=ff.structures.diagonal(),
        memory=ff.memories.stationary(),
        prior_precision=1e-6,
    )
    targets = rows @ jnp.arange(8.0)
    with pytest.warns(UserWarning, match="warm_start did not converge"):
        ff.warm_start(flow, flow.init(jnp.zeros(8)), (rows, targets))


@pytest.mark.slow
def test_data_of_a_wider_type_leave_the_types_of_the_state():
    flow = ff.fisher_flow(lambda params, x: x * params, ff.likelihoods.gaussian(None))
    start = flow.init(jnp.array(0.0, jnp.float32))
    batches = jnp.ones((2, 3)), jnp.array([[1.0, 2.0, 3.0], [2.0, 3.0, 4.0]])
    assert batches[0].dtype == jnp.float64
    state, _ = jax.lax.scan(flow.update, start, batches)
    np.testing.assert_allclose(state.mean, 15 / 7, rtol=1e-6)
    assert state.log_evidence.dtype == jnp.float32


def test_an_update_is_written_once():
    """A factorisation for all steps and sizes, and one at the solution."""
    flow = counts(4)
    program = jax.make_jaxpr(flow.update)(flow.init(jnp.array(0.0)), ONE_COUNT)
    assert str(program).count("name=steady_cholesky") == 2


@pytest.mark.slow
def test_a_search_of_many_parameters_is_written_out_once_with_the_same_numbers(
    monkeypatch,
):
    def found():
        flow = counts(2)
        start = flow.init(jnp.array(-20.0))
        first = flow.update(start, ONE_COUNT)
        far = jnp.array([1.0, 10.0]), jnp.array([5e6, 5e6])
        program = jax.make_jaxpr(flow.update)(start, ONE_COUNT)
        factorisations = str(program).count("name=steady_cholesky")
        return (first, flow.update(first[0], far)), factorisations

    expected, twice = found()
    monkeypatch.setattr(newton, "MANY", 1)
    same, once = found()
    assert (twice, once) == (2, 1)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-12), same, expected
    )


def test_a_step_whose_length_overflows_is_not_taken():
    """From there the search went on without end."""
    one, infinity = jnp.ones(()), jnp.full((), jnp.inf)
    walk = newton._Walk(
        mean=one,
        objective=one,
        gradient=infinity,
        direction=one,
        length=one,
        before=infinity,
        size=one,
        short=0 * one,
        long=infinity,
        last=jnp.zeros((), bool),
    )
    assert walk.goes_on and not walk._replace(length=infinity).goes_on
