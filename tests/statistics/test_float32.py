"""Long streams in float32: a compensated information loses nothing, a plain one does.

The reference is in float64, from the same rows.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fisherflow_jax as ff

DIMENSION = 10
PRIOR_PRECISION = 1e-2


def stream_rows(simulation, likelihood, inputs, targets, dtype, *, compensated):
    """The state after single rows, one extended Kalman filter step each."""
    flow = ff.fisher_flow(
        simulation.linear,
        likelihood,
        structure=ff.structures.full(),
        memory=ff.memories.stationary(),
        prior_precision=PRIOR_PRECISION,
        num_steps=1,
        compensated=compensated,
    )

    @jax.jit
    def scan(state, inputs, targets):
        batches = inputs[:, None, :], targets[:, None]
        return jax.lax.scan(flow.update, state, batches)[0]

    start = flow.init(jnp.zeros(DIMENSION, dtype))
    state = scan(start, inputs.astype(dtype), targets.astype(dtype))
    assert {x.dtype for x in (*state.mean, state.count)} == {jnp.dtype(dtype)}
    return state


def draw(number, seed, root=None):
    of_inputs, of_noise = jax.random.split(jax.random.key(seed))
    inputs = jax.random.normal(of_inputs, (number, DIMENSION), jnp.float32)
    if root is not None:
        inputs = inputs @ jnp.asarray(root.T, jnp.float32)
    truth = jnp.linspace(-1.0, 1.0, DIMENSION, dtype=jnp.float32)
    noise = jax.random.normal(of_noise, (number,), jnp.float32)
    return inputs, inputs @ truth + noise


def closed_form(inputs, targets):
    """What the linear-Gaussian stream is in exact arithmetic, in float64."""
    inputs, targets = np.asarray(inputs, float), np.asarray(targets, float)
    information = inputs.T @ inputs + PRIOR_PRECISION * np.eye(DIMENSION)
    return np.linalg.solve(information, inputs.T @ targets), information


def errors(state, mean, information):
    """Of the mean in standard errors; of the information, relative to its largest."""
    covariance = np.linalg.inv(information)
    found = np.asarray(ff.information.to_dense(state.information), float)
    of_mean = np.abs(np.asarray(state.mean, float) - mean)
    return (
        np.max(of_mean / np.sqrt(np.diag(covariance))),
        np.max(np.abs(found - information)) / np.max(np.abs(information)),
    )


@pytest.mark.long
def test_a_million_rows(simulation):
    inputs, targets = draw(1_000_000, 9)
    likelihood = ff.likelihoods.gaussian(scale=1.0)
    found = []
    for compensated, number in ((True, len(targets)), (False, 200_000)):
        rows = inputs[:number], targets[:number]
        state = stream_rows(
            simulation, likelihood, *rows, jnp.float32, compensated=compensated
        )
        assert float(state.count) == number
        assert int(state.num_skipped) == 0
        found.append(errors(state, *closed_form(*rows)))
    (of_mean, of_information), (plain_mean, plain_information) = found
    print(
        f"\n1e6 rows in float32: compensated {of_mean:.4f} standard errors, "
        f"information {of_information:.1e}; plain, 2e5 rows: {plain_mean:.4f}, "
        f"{plain_information:.1e}"
    )
    assert of_mean < 0.05
    assert of_information < 1e-6
    assert plain_information > 1e-5


@pytest.mark.slow
def test_conditioning_of_a_million(simulation):
    """Eigenvalues from 1 to 1e-6, in directions that no scaling of columns undoes."""
    rng = np.random.default_rng(10)
    rotation = np.linalg.qr(rng.normal(size=(DIMENSION, DIMENSION)))[0]
    inputs, targets = draw(
        200_000, 11, rotation * np.logspace(0, -3, DIMENSION)[None, :]
    )
    mean, information = closed_form(inputs, targets)
    likelihood = ff.likelihoods.gaussian(scale=1.0)
    states = [
        stream_rows(
            simulation,
            likelihood,
            inputs,
            targets,
            jnp.float32,
            compensated=compensated,
        )
        for compensated in (True, False)
    ]
    kept, plain = (errors(state, mean, information) for state in states)
    expected = np.sqrt(np.diag(np.linalg.inv(information)))
    off = np.max(np.abs(np.asarray(ff.standard_error(states[0])) / expected - 1))
    print(
        f"\ncondition {np.linalg.cond(information):.0e}: compensated {kept[0]:.4f} "
        f"standard errors, which differ by {100 * off:.2f} %, information "
        f"{kept[1]:.1e}; plain {plain[0]:.3f}, {plain[1]:.1e}, "
        f"{int(states[1].num_skipped)} rows skipped"
    )
    assert int(states[0].num_skipped) == 0
    assert kept[0] < 0.05
    assert kept[1] < 1e-6
    assert off < 0.05
    assert not plain[0] < 0.25  # NaN counts


@pytest.mark.slow
def test_logistic_rows(simulation):
    """Nonlinear: float32 against the same stream in float64."""
    inputs, _ = draw(200_000, 12)
    chance = jax.nn.sigmoid(inputs @ jnp.linspace(-0.5, 0.5, DIMENSION))
    targets = jax.random.bernoulli(jax.random.key(13), chance).astype(jnp.float32)
    wide, narrow = (
        stream_rows(
            simulation,
            ff.likelihoods.bernoulli(),
            inputs,
            targets,
            dtype,
            compensated=dtype == jnp.float32,
        )
        for dtype in (jnp.float64, jnp.float32)
    )
    information = np.asarray(ff.information.to_dense(wide.information))
    of_mean, of_information = errors(narrow, np.asarray(wide.mean), information)
    print(
        f"\nlogistic, 2e5 rows in float32: {of_mean:.4f} standard errors, information "
        f"{of_information:.1e}"
    )
    assert of_mean < 0.05
    assert of_information < 1e-6
