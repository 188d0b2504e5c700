"""What a one-pass estimate depends on: the order of rows, their batches, their number.

Distances are in standard errors of the batch fit of the same rows.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fisherflow_jax as ff

TRUTH = jnp.array([0.3, 0.6, -0.4, 0.2, 0.0])


@pytest.fixture(scope="module")
def flow(simulation):
    return ff.fisher_flow(
        simulation.linear,
        ff.likelihoods.bernoulli(),
        structure=ff.structures.full(),
        memory=ff.memories.stationary(),
        prior_precision=1e-3,
    )


def draw(key, number):
    of_inputs, of_targets = jax.random.split(key)
    inputs = jax.random.normal(of_inputs, (number, len(TRUTH))).at[:, 0].set(1.0)
    chance = jax.nn.sigmoid(inputs @ TRUTH)
    return inputs, jax.random.bernoulli(of_targets, chance).astype(float)


def batch_fit(inputs, targets, weights=1.0):
    """Newton's method, written out: estimate and standard errors."""

    def step(params, _):
        chance = jax.nn.sigmoid(inputs @ params)
        information = (inputs.T * (weights * chance * (1 - chance))) @ inputs
        score = inputs.T @ (weights * (targets - chance))
        return params + jnp.linalg.solve(information, score), information

    params, information = jax.lax.scan(step, jnp.zeros(len(TRUTH)), None, length=8)
    return params, jnp.sqrt(jnp.diag(jnp.linalg.inv(information[-1])))


@pytest.mark.slow
def test_order_of_rows(simulation, flow):
    inputs, targets = draw(jax.random.key(14), 4000)

    def one(key):
        order = jax.random.permutation(key, len(targets))
        return simulation.stream(flow, inputs[order], targets[order], 20, 100).mean

    means = simulation.replicate(one, 15, 50)
    fit, error = batch_fit(inputs, targets)
    spread = np.std(means, axis=0) / error
    gaps = np.abs(means - fit) / error
    print(
        f"\n50 orders of 4000 rows: spread {spread.min():.3f} to {spread.max():.3f} "
        f"standard errors, median gap to the batch fit {np.median(gaps):.3f}"
    )
    assert spread.max() < 0.1
    assert np.median(gaps) < 0.1


@pytest.mark.slow
def test_split_into_batches(simulation, flow):
    inputs, targets = draw(jax.random.key(16), 4100)
    sizes = (1, 20, 100)
    means = np.stack(
        [
            jax.jit(simulation.stream, static_argnums=(0, 3, 4))(
                flow, inputs, targets, size, 100
            ).mean
            for size in sizes
        ]
    )
    _, error = batch_fit(inputs, targets)
    distances = np.abs(means[:, None] - means[None]) / error
    print(
        f"\n4100 rows in batches of {sizes}: at most {distances.max():.3f} standard "
        f"errors apart"
    )
    assert distances.max() < 0.1


@pytest.mark.slow
def test_gap_to_the_batch_fit_closes(simulation, flow):
    """As the stream grows it meets the batch fit, as log n / sqrt n in theory."""
    numbers = np.array([200, 800, 3200, 12800])
    size = 20

    def one(key):
        inputs, targets = draw(key, numbers[-1])
        batches = jax.tree.map(
            lambda x: x.reshape((-1, size, *x.shape[1:])), (inputs, targets)
        )

        def step(state, batch):
            state, _ = flow.update(state, batch)
            return state, state.mean

        means = jax.lax.scan(step, flow.init(jnp.zeros(len(TRUTH))), batches)[1]
        gaps = []
        for number in numbers:
            used = (jnp.arange(numbers[-1]) < number).astype(float)
            fit, error = batch_fit(inputs, targets, used)
            gaps.append(jnp.abs(means[number // size - 1] - fit) / error)
        return jnp.stack(gaps)

    gaps = np.asarray(simulation.replicate(one, 17, 100))
    typical = np.median(gaps, axis=(0, 2))
    rare = np.quantile(gaps, 0.95, axis=(0, 2))
    slope = np.polyfit(np.log(numbers), np.log(typical), 1)[0]
    print(
        f"\nrows {numbers}: median gap {typical.round(3)} standard errors, 95 % below "
        f"{rare.round(3)}, as n to the power {slope:.2f}"
    )
    assert np.all(np.diff(typical) < 0)
    assert typical[-1] < 0.1
    assert slope < -0.2
