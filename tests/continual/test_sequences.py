"""What a sequence of tasks adds up to, however its rows are cut."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fisherflow_jax as ff
import streams

continual, ops = ff.continual, ff.information
RNG = np.random.default_rng(9)
ROWS = RNG.normal(size=(64, 3)), RNG.integers(0, 2, 64).astype(float)
NEAR = streams.tree(np.array([0.3, -0.2, 0.5]))
MODEL = streams.linear, ff.likelihoods.bernoulli()


def structure(name):
    if name != "kronecker":
        return streams.STRUCTURES[name]
    layers = ff.layers.find_layers(streams.linear, NEAR, ROWS[0])
    return ff.structures.kronecker(layers)


ESTIMATORS = {
    "diagonal": "empirical",
    "units": "exact",
    "rank_3": "exact",
    "kronecker": "exact",
}


@functools.cache
def measures():
    """The information of a batch in each structure, added to what was there."""
    estimators = {
        name: getattr(ff.estimators, kind)(*MODEL, structure(name))
        for name, kind in ESTIMATORS.items()
    }

    @jax.jit
    def measure(batch):
        return {name: estimator(NEAR, batch) for name, estimator in estimators.items()}

    def add(found, part):
        return {name: ops.add(found[name], part[name]) for name in found}

    return measure, jax.jit(add)


@functools.cache
def of_all(size):
    measure, add = measures()
    found = None
    for start in range(0, 64, size):
        rows = [np.zeros((size, *x.shape[1:])) for x in ROWS]
        weights = np.zeros(size)
        for full, x in zip((*rows, weights), (*ROWS, np.ones(64)), strict=True):
            part = x[start : start + size]
            full[: len(part)] = part  # the last is padded by rows of weight 0
        part = measure((*rows, weights))
        found = part if found is None else add(found, part)
    return {name: streams.dense(x) for name, x in found.items()}


@pytest.mark.parametrize("name", ESTIMATORS)
def test_information_does_not_depend_on_how_rows_are_cut(name):
    whole = of_all(64)[name]
    assert np.abs(whole).max() > 1
    for size in (1, 7):
        np.testing.assert_allclose(of_all(size)[name], whole, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["low_rank", "kronecker"])
def test_a_scan_over_tasks_in_which_each_holds_the_next(name):
    """In one program; and no task finds the penalty to be zero."""
    kept, loss = structure(name), ff.negative_log_likelihood(*MODEL)
    estimator = ff.estimators.exact(*MODEL, kept)

    def learn(belief, task):
        count = len(task[1])

        def objective(params, strength=1.0):
            penalty = continual.elastic_penalty(
                belief, params, num_observations=count, strength=strength
            )
            return loss(params, task) + penalty

        params, _ = jax.lax.scan(
            lambda p, _: (
                jax.tree.map(lambda a, g: a - 0.3 * g, p, jax.grad(objective)(p)),
                None,
            ),
            belief.mean,
            length=60,
        )
        found = continual.consolidate(belief, params, estimator(params, task))
        pulled = objective(params) - objective(params, 0.0)
        return found, (pulled, ops.trace(found.information, params))

    tasks = jax.tree.map(lambda x: jnp.asarray(x).reshape(4, 16, *x.shape[1:]), ROWS)
    start = ff.posterior(NEAR, kept, prior_precision=0.1)
    _, (pulled, traces) = jax.jit(lambda t: jax.lax.scan(learn, start, t))(tasks)
    assert np.all(pulled > 1e-5), pulled
    assert np.all(np.diff(traces) > 0.1)


def test_an_update_with_kronecker_factors_ends_where_loss_and_penalty_are_least():
    flow = ff.fisher_flow(
        *MODEL, structure=structure("kronecker"), prior_precision=0.3, num_steps=200
    )
    state, _ = flow.update(flow.init(NEAR), (ROWS[0][:32], ROWS[1][:32]))
    batch = ROWS[0][32:], ROWS[1][32:]
    after, _ = flow.update(state, batch)
    loss = ff.negative_log_likelihood(*MODEL)

    @jax.jit
    def step(after):
        def objective(params):
            penalty = continual.elastic_penalty(state, params, num_observations=32)
            return loss(params, batch) + penalty

        slope = jax.tree.map(lambda g: 32 * g, jax.grad(objective)(after.mean))
        return ops.solve(after.information, slope)

    assert np.abs(streams.flat(step(after))).max() < 1e-5


def test_values_that_are_not_finite_are_refused():
    state = ff.posterior(NEAR, structure("diagonal"), prior_precision=1.0)
    bad = ff.structures.Diagonal(streams.tree(np.array([1.0, np.nan, 1.0])))
    with pytest.raises(ValueError, match="finite and not negative; that of parameter"):
        continual.consolidate(state, NEAR, bad)
    other = ff.structures.Diagonal({"level": jnp.ones(())})
    with pytest.raises(ValueError, match="about another tree than the mean"):
        continual.consolidate(state, NEAR, other)
    with pytest.raises(ValueError, match="strength must be finite and not negative"):
        continual.add_elastic_penalty(1, strength=-2.0)
    with pytest.raises(ValueError, match="params must be like the mean of the state"):
        added = continual.add_elastic_penalty(1)
        wide = {"level": jnp.zeros(()), "slope": jnp.zeros(5)}
        added.update(wide, added.init(wide), wide, anchor=state)
