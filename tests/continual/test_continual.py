"""Tasks in sequence: the penalty, its transformation, and what is kept after a task."""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fisherflow_jax as ff
import streams

continual = ff.continual
LOSS = ff.negative_log_likelihood(
    *(MODEL := (streams.linear, ff.likelihoods.bernoulli()))
)
NEAR = streams.tree(np.array([0.3, -0.2, 0.5]))
# one block of all is held as two are
NAMES = [x for x in streams.STRUCTURES if x != "all"]
PAIRS = ["diagonal", "block", "rank_3", "kronecker", "full"]
SIMPLER = [("diagonal", "block"), ("diagonal", "rank_3")]


def structure(name):
    if name != "kronecker":
        return streams.STRUCTURES[name]
    layers = ff.layers.find_layers(streams.linear, NEAR, streams.INPUTS)
    return ff.structures.kronecker(layers)


@functools.cache
def believed(name, prior_precision=0.7):
    estimator = ff.estimators.exact(*MODEL, structure(name))
    batch = streams.INPUTS[:8], streams.LABELS[:8]
    centre = streams.tree(np.array([0.1, 0.4, -0.3]))

    @jax.jit
    def run(centre, tau):
        information = estimator(NEAR, batch)
        return ff.posterior(centre, information, prior_precision=tau)

    return run(centre, prior_precision)


@pytest.mark.slow_cases
@pytest.mark.parametrize("name", [*NAMES, "kronecker"])
def test_the_transformation_adds_the_gradient_of_the_penalty(name):
    state = believed(name)
    matrix = streams.dense(state.information)
    move = streams.flat(NEAR) - streams.flat(state.mean)
    numbers = {"num_observations": 5, "strength": 3.0}

    def penalty(params):
        return continual.elastic_penalty(state, params, **numbers)

    added = continual.add_elastic_penalty(**numbers)
    updates = streams.tree(np.array([1.0, 2.0, 3.0]))

    @jax.jit
    def found(params):
        changed, _ = added.update(updates, added.init(params), params, anchor=state)
        return *jax.value_and_grad(penalty)(params), changed

    value, gradient, changed = found(NEAR)
    np.testing.assert_allclose(value, 0.3 * move @ matrix @ move, rtol=1e-10)
    np.testing.assert_allclose(
        streams.flat(gradient), 0.6 * matrix @ move, rtol=1e-9, atol=1e-12
    )
    expected = optax.tree.add(updates, gradient)
    chex.assert_trees_all_close(changed, expected, rtol=1e-9)


@pytest.mark.slow_cases
@pytest.mark.parametrize("name", [x for x in NAMES if x != "rank_3"])
def test_an_update_ends_where_loss_and_penalty_are_least(name):
    flow = streams.flow(name, "exponential", "bernoulli", num_steps=50)
    first, second = streams.batches(12, "bernoulli")
    state = streams.run(flow, streams.start(flow), [first])[0]
    count = second[2].sum()

    @jax.jit
    def missed(state, after):
        anchor = flow.advance(state)

        def objective(params):
            penalty = continual.elastic_penalty(anchor, params, num_observations=count)
            return LOSS(params, second) + penalty

        step = ff.information.solve(after.information, jax.grad(objective)(after.mean))
        return ff.information.quadratic_form(after.information, step)

    assert missed(state, flow.update(state, second)[0]) < 1e-10 / count**2


def test_tasks_of_a_linear_model_end_at_the_fit_of_all_rows():
    state = ff.posterior(
        streams.tree(streams.ORIGIN), ff.structures.full(), prior_precision=0.3
    )
    likelihood = ff.likelihoods.gaussian(streams.SCALE)
    loss = ff.negative_log_likelihood(streams.linear, likelihood)
    estimator = ff.estimators.exact(streams.linear, likelihood, ff.structures.full())

    @jax.jit
    def learn(state, batch):
        def objective(flat):
            params = streams.tree(flat)
            penalty = continual.elastic_penalty(state, params, num_observations=8)
            return loss(params, batch) + penalty

        start = jnp.zeros(3)  # a quadratic: one Newton step is its least
        step = jnp.linalg.solve(
            jax.hessian(objective)(start), jax.grad(objective)(start)
        )
        mean = streams.tree(start - step)
        return continual.consolidate(state, mean, estimator(mean, batch))

    for rows in (slice(0, 8), slice(8, 16), slice(16, 24)):
        batch = streams.INPUTS[rows], streams.TARGETS[rows]
        after = learn(state, batch)
        # the quadratic of later tasks is not forgotten to be one
        pull = continual.elastic_penalty(state, after.mean, num_observations=1)
        assert pull > 1e-3
        state = after
    x, y = streams.INPUTS, streams.TARGETS
    matrix = x.T @ x / streams.SCALE**2 + 0.3 * np.eye(3)
    shift = x.T @ y / streams.SCALE**2 + 0.3 * streams.ORIGIN
    np.testing.assert_allclose(streams.dense(state.information), matrix, rtol=1e-9)
    mean = np.linalg.solve(matrix, shift)
    np.testing.assert_allclose(streams.flat(state.mean), mean, rtol=1e-9)


@pytest.mark.parametrize("name", ["diagonal", "block", "full"])
def test_what_is_kept_of_earlier_tasks(name):
    """Faded to the prior, as by a flow with exponential memory."""
    state = believed(name)
    new = believed(name, 1e-9).information
    consolidate = functools.partial(continual.consolidate, decay=0.9)
    found = jax.jit(consolidate)(state, NEAR, new)
    old, add = (streams.dense(x) for x in (state.information, new))
    expected = 0.9 * (old - 0.7 * np.eye(3)) + 0.7 * np.eye(3) + add
    dense = streams.dense(found.information)
    np.testing.assert_allclose(dense, expected, rtol=1e-9, atol=1e-12)
    chex.assert_trees_all_equal(found.mean, NEAR)


@pytest.mark.parametrize("names", [*itertools.permutations(PAIRS, 2)], ids="-".join)
def test_a_task_measured_in_another_structure(names):
    """A richer structure holds the sum; else both are named, and the way out."""
    state, task = (believed(name) for name in names)
    both = sum(streams.dense(x.information) for x in (state, task))
    try:
        found = continual.consolidate(state, NEAR, task.information)
    except (TypeError, ValueError) as error:
        text = str(error)
        assert "full" not in names and len(text) < 400
        assert all(type(x.information).__name__ in text for x in (state, task))
        assert "do not add" in text and "Measure both with one structure" in text
    else:
        assert "full" in names or names in SIMPLER or names[::-1] in SIMPLER
        np.testing.assert_allclose(streams.dense(found.information), both, rtol=1e-9)


def test_a_tempered_posterior_stays_in_its_units():
    one, two = (
        ff.structures.Diagonal(streams.tree(np.array(x)))
        for x in ([1.0, 2.0, 3.0], [4.0, 4.0, 5.0])
    )
    state = ff.posterior(NEAR, one, prior_precision=0.5, temperature=2.0)
    found = continual.consolidate(state, NEAR, two)
    both = ff.information.add(one, two)
    expected = ff.posterior(NEAR, both, prior_precision=0.5, temperature=2.0)
    chex.assert_trees_all_close(found, expected, rtol=1e-12)


def test_a_next_task_compiles_nothing():
    optimizer = optax.chain(
        continual.add_elastic_penalty(8, strength=2.0), optax.adam(0.1)
    )

    @jax.jit
    @chex.assert_max_traces(1)
    def step(params, opt_state, anchor, batch):
        gradient = jax.grad(LOSS)(params, batch)
        updates, opt_state = optimizer.update(
            gradient, opt_state, params, anchor=anchor
        )
        return optax.apply_updates(params, updates), opt_state

    state = ff.posterior(NEAR, ff.structures.diagonal(), prior_precision=1.0)
    params, opt_state = NEAR, optimizer.init(NEAR)
    for count, rows in ((8, slice(0, 8)), (4, slice(8, 16))):
        batch = streams.INPUTS[rows], streams.LABELS[rows]
        opt_state = optax.tree.set(
            opt_state, num_observations=jnp.asarray(float(count))
        )
        params, opt_state = step(params, opt_state, state, batch)
        task = ff.structures.Diagonal(jax.tree.map(jnp.ones_like, params))
        state = continual.consolidate(state, params, task)


def test_the_implicit_step_is_met_at_its_end():
    state, rate = believed("full"), 10.0
    added = continual.add_elastic_penalty(2, strength=3.0, implicit_rate=rate)
    optimizer = optax.chain(added, optax.sgd(rate))
    gradient = streams.tree(np.array([1.0, -2.0, 0.5]))
    updates, _ = optimizer.update(gradient, optimizer.init(NEAR), NEAR, anchor=state)
    matrix = 1.5 * streams.dense(state.information)
    pull = matrix @ (streams.flat(NEAR) - streams.flat(state.mean))
    expected = -np.linalg.solve(
        np.eye(3) / rate + matrix, streams.flat(gradient) + pull
    )
    np.testing.assert_allclose(streams.flat(updates), expected, rtol=1e-9)
    free = optax.tree.set(added.init(NEAR), strength=jnp.zeros(()))
    found, _ = added.update(gradient, free, NEAR, anchor=state)
    chex.assert_trees_all_close(found, gradient, rtol=1e-12)


def test_part_of_the_parameters_and_their_types():
    state = believed("diagonal")
    added = continual.add_elastic_penalty(5)
    masked = optax.masked(added, {"level": True, "slope": False})
    updates = optax.tree.zeros_like(NEAR)
    found, _ = masked.update(
        updates, masked.init(NEAR), NEAR, anchor=state, model_params=NEAR
    )
    whole, _ = added.update(updates, added.init(NEAR), NEAR, anchor=state)
    np.testing.assert_allclose(found["level"], whole["level"], rtol=1e-12)
    np.testing.assert_array_equal(found["slope"], 0.0)
    half = optax.tree.cast(NEAR, jnp.bfloat16)
    found, _ = added.update(
        optax.tree.zeros_like(half), added.init(half), half, anchor=state
    )
    assert found["slope"].dtype == jnp.bfloat16


def test_what_is_refused():
    state, added = believed("diagonal"), continual.add_elastic_penalty(5)
    for wrong in (
        lambda: continual.elastic_penalty(state, NEAR, num_observations=0),
        lambda: continual.add_elastic_penalty(-1),
    ):
        with pytest.raises(ValueError, match="num_observations must be positive"):
            wrong()
    with pytest.raises(ValueError, match="strength must be finite and not negative"):
        continual.elastic_penalty(state, NEAR, num_observations=1, strength=-1.0)
    with pytest.raises(ValueError, match="params must be like the mean of the state"):
        continual.elastic_penalty(state, {"level": 0.0}, num_observations=1)
    with pytest.raises(TypeError, match="mixture"):
        continual.elastic_penalty([state, state], NEAR, num_observations=1)
    with pytest.raises(ValueError, match="add_elastic_penalty needs anchor"):
        added.update(NEAR, added.init(NEAR), NEAR)
    with pytest.raises(ValueError, match="add_elastic_penalty needs params"):
        added.update(NEAR, added.init(NEAR), anchor=state)
    task = state.information
    with pytest.raises(ValueError, match=r"decay must be in \[0, 1\]"):
        continual.consolidate(state, NEAR, task, decay=1.5)
    with pytest.raises(ValueError, match="parameter level is not"):
        continual.consolidate(state, NEAR | {"level": np.nan}, task)
    bare = state._replace(prior_precision=None)
    with pytest.raises(ValueError, match="does not say what its prior is"):
        continual.consolidate(bare, NEAR, task, decay=0.9)
    unknown = streams.history(likelihood="unknown")[-1]
    with pytest.raises(ValueError, match="dispersion is estimated"):
        continual.consolidate(unknown, NEAR, unknown.information)
