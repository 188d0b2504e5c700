"""Where few numbers are seen the covariance is kept: the same numbers, no inverses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fisherflow_jax as ff
from fisherflow_jax.structures import Inverted

TIMES, STATES = 9, 5
rng = np.random.default_rng(1)
ROOT = rng.normal(size=(STATES, STATES))
NOISE = 0.05 * ROOT @ ROOT.T
MOVE = 0.9 * np.linalg.qr(ROOT)[0]
PARAMS = {"level": jnp.zeros(2), "rest": jnp.zeros((3, 1))}
INPUTS = rng.normal(size=(TIMES, 2, STATES))
TARGETS = rng.normal(size=(TIMES, 2))
WEIGHTS = np.ones((TIMES, 2))
WEIGHTS[3] = 0  # a missing observation
WEIGHTS[5, 0], WEIGHTS[6, 1] = 0, 2.5


def linear(params, inputs):
    return inputs @ jnp.concatenate([params["level"], params["rest"][:, 0]])


def curved(params, inputs):
    return jnp.tanh(linear(params, inputs)) + 0.1 * jnp.square(linear(params, inputs))


def two(params, inputs):
    return jnp.stack([linear(params, inputs), curved(params, inputs)], -1)


COVARIANCE = np.array([[0.3, 0.1], [0.1, 0.2]])
CASES = {
    "gaussian": (linear, ff.likelihoods.gaussian(0.5), TARGETS),
    "curved": (curved, ff.likelihoods.gaussian(0.5), TARGETS),
    "counts": (linear, ff.likelihoods.poisson(), np.round(np.exp(TARGETS))),
    "two outputs": (
        two,
        ff.likelihoods.gaussian(covariance=COVARIANCE),
        np.stack([TARGETS, TARGETS[:, ::-1]], -1),
    ),
}


def build(apply_fn, likelihood, move=MOVE, noise=NOISE, **options):
    memory = ff.memories.random_walk(noise, move)
    return ff.fisher_flow(
        apply_fn, likelihood, memory=memory, **{"num_steps": 1} | options
    )


def through(flow, batches, first=None):
    mean = jax.tree.map(lambda x: x + 0.2, PARAMS)
    first = flow.init(PARAMS, prior_mean=mean) if first is None else first
    return jax.lax.scan(
        lambda state, batch: (lambda s, i: (s, (s, i)))(*flow.update(state, batch)),
        first,
        batches,
    )[1]


def told(states, infos):
    """All that both forms say, without what stores it."""
    dense = jax.vmap(ff.information.to_dense)(states.information)
    said = states.mean, dense, states.log_evidence, states.count
    return said, infos._replace(memory=None)


def close(found, wanted, tolerance):
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance),
        found,
        wanted,
    )


@pytest.mark.slow_cases
@pytest.mark.parametrize("prior_is", ["previous", "predicted"])
@pytest.mark.parametrize("case", CASES)
def test_equal_to_the_information_form(case, prior_is):
    """From a start that is not the prior mean; of a compensated flow, which inverts."""
    apply_fn, likelihood, targets = CASES[case]
    batches = INPUTS, targets, WEIGHTS
    flow = build(apply_fn, likelihood, prior_is=prior_is)
    other = build(apply_fn, likelihood, prior_is=prior_is, compensated=True)
    states, infos = through(flow, batches)
    wanted = through(other, batches)
    assert isinstance(states.information, Inverted)
    assert not isinstance(wanted[0].information, Inverted)
    close(told(states, infos), told(*wanted), 1e-10)
    close(
        jax.vmap(ff.standard_error)(states), jax.vmap(ff.standard_error)(wanted[0]),
        1e-10,
    )  # fmt: skip


@pytest.mark.slow
def test_many_rows_are_added_as_information():
    """As many as there are parameters: the same state, another way to it."""
    batches = np.tile(INPUTS, (1, 3, 1)), np.tile(TARGETS, (1, 3))
    flows = [build(*CASES["curved"][:2], compensated=c) for c in (None, True)]
    states, wanted = (through(flow, batches) for flow in flows)
    assert isinstance(states[0].information, Inverted)
    close(told(*states), told(*wanted), 1e-10)


def test_no_matrix_of_the_parameters_is_factorised():
    flow = build(*CASES["gaussian"][:2])
    one = INPUTS[:, :1], TARGETS[:, :1]
    run = jax.jit(lambda first: through(flow, one, first)[0])
    program = run.lower(flow.init(PARAMS)).compile().as_text()
    for call in ("potrf", "trsm", "getrf"):
        assert call not in program
    other = build(*CASES["gaussian"][:2], compensated=True)
    run = jax.jit(lambda first: through(other, one, first)[0])
    assert "potrf" in run.lower(other.init(PARAMS)).compile().as_text()


@pytest.mark.slow
def test_derivatives_of_the_evidence():
    """In noise, transition and scale: those of the information form, and by steps."""

    def evidence(numbers, compensated):
        flow = build(
            curved, ff.likelihoods.gaussian(numbers[0]), numbers[1] * MOVE,
            numbers[2] * NOISE, compensated=compensated,
        )  # fmt: skip
        batches = INPUTS[:, :1], TARGETS[:, :1]
        return through(flow, batches)[0].log_evidence[-1]

    at = jnp.array([0.5, 0.95, 1.3])
    found, wanted = (
        jax.jit(jax.grad(evidence), static_argnums=1)(at, c) for c in (None, True)
    )
    close(found, wanted, 1e-8)
    step = 1e-5 * np.eye(3)
    both = jax.jit(jax.vmap(lambda x: evidence(x, None)))
    close(found, (both(at + step) - both(at - step)) / 2e-5, 1e-5)


@pytest.mark.slow
def test_a_refused_update_moves_nothing():
    flow = build(*CASES["gaussian"][:2])
    state = jax.tree.map(lambda x: x[-1], through(flow, (INPUTS, TARGETS))[0])
    step = jax.jit(flow.update)
    spoilt = np.full_like(INPUTS[0], 1e200)
    after, info = step(state, (spoilt, TARGETS[0]))
    assert info.skipped
    assert after.num_skipped == 1
    close(after._replace(num_skipped=state.num_skipped), state, 0)
    with pytest.raises(ValueError, match="not finite"):
        flow.update(state, (spoilt, TARGETS[0]))


@pytest.mark.slow
def test_what_else_a_state_can_do():
    """Forecasts, what a training loop found, and draws: as of the information form."""
    flows = [build(*CASES["gaussian"][:2], compensated=c) for c in (None, True)]
    batches = INPUTS, TARGETS, WEIGHTS
    found = []
    for flow in flows:
        states, _ = through(flow, batches)
        last = jax.tree.map(lambda x: x[-1], states)
        ahead = flow.advance(last, steps=3)
        _, _, own = flow.evaluate(last.mean, (INPUTS[0], TARGETS[0]))
        taken = flow.absorb(last, last.mean, own, 2.0, log_likelihood=-1.0)
        ones = jax.tree.map(jnp.ones_like, PARAMS)
        found.append((
            ff.standard_error(ahead), ff.information.to_dense(taken.information),
            taken.log_evidence, ff.sample(ahead, 0, (3,)), ff.log_density(last, PARAMS),
            ff.information.logdet(last.information), ff.wald_test(last, ones).p_value,
        ))  # fmt: skip
    close(*found, 1e-9)
    states, _ = through(flows[0], batches)
    smoothed = ff.smooth(flows[0], states)
    other = ff.smooth(flows[1], through(flows[1], batches)[0])
    close(smoothed.mean, other.mean, 1e-10)
    close(*(jax.vmap(ff.standard_error)(s) for s in (smoothed, other)), 1e-10)


@pytest.mark.slow
def test_a_vague_prior_and_exact_looks():
    """Rounding leaves variances positive, and what was seen is met."""
    flow = build(linear, ff.likelihoods.gaussian(1e-4), 1.0, 1e-6, prior_precision=1e-6)
    inputs, targets = np.repeat(INPUTS, 4, 0), np.repeat(TARGETS, 4, 0)
    batches = inputs[:, :1], np.sum(inputs[:, :1], -1) + 0 * targets[:, :1]
    states, infos = through(flow, batches)
    assert not np.any(infos.skipped)
    errors = jax.vmap(ff.standard_error)(states)
    assert all(np.all(leaf > 0) for leaf in jax.tree.leaves(errors))
    last = jax.tree.map(lambda x: x[-1], states)
    np.testing.assert_allclose(
        linear(last.mean, inputs[-1, :1]), batches[1][-1], atol=1e-3
    )
