"""K-FAC under Optax's wrappers: its state has names, not leaves, and a static table."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import fisherflow_jax as ff
import transform_cases as cases
from fisherflow_jax.transforms import get_information

LIKELIHOOD = ff.likelihoods.categorical()
BATCH = cases.draw(12, 2, seed=5), np.arange(12) % 3
LATER = cases.draw(12, 2, seed=6), np.arange(12) % 3
STATIC = ("apply_fn", "likelihood", "layers", "estimator", "decay")


def network(params, x):
    hidden = x @ params["first"]["w"] + params["first"]["b"]
    return params["scale"] * (jnp.tanh(hidden) @ params["last"])


PARAMS = {
    "first": {"b": cases.draw(4, seed=1), "w": cases.draw(2, 4, seed=2)},
    "last": cases.draw(4, 3, seed=3),
    "scale": np.asarray([1.3]),
}
PARAMS = jax.tree.map(jnp.asarray, PARAMS)
GRADIENT = jax.tree.map(lambda x: jnp.sin(7 * x), PARAMS)
LAYERS = ff.layers.find_layers(network, PARAMS, BATCH[0])
FACTORS = ("first.w", "last")


def stacked(*batches):
    return jax.tree.map(lambda *x: jnp.stack(x), *batches)


def kfac(**options):
    # a bound that no step meets, so that wrappers can be compared
    options = {
        "estimator": ff.estimators.exact,
        "damping": 0.1,
        "max_kl": 1e3,
    } | options
    return ff.kfac(0.5, network, LIKELIHOOD, LAYERS, **options)


def shown(tree, holed):
    """Which leaves a wrapper shows: those of the first layer and the scale."""
    return {"first": tree, "last": holed, "scale": tree}


INJECTED = optax.inject_hyperparams(ff.kfac, static_args=STATIC)(
    learning_rate=0.5,
    apply_fn=network,
    likelihood=LIKELIHOOD,
    layers=LAYERS,
    estimator=ff.estimators.exact,
    damping=0.1,
    momentum=0.9,
    max_kl=1e3,
)
WRAPPED = {
    "plain": kfac(),
    "injected": INJECTED,
    "masked": optax.masked(kfac(), shown(True, False)),
    "partition": optax.partition(
        {"curved": kfac(), "also curved": kfac(damping=0.4)},
        shown("curved", "also curved"),
    ),
    "multi_steps": optax.MultiSteps(kfac(), every_k_schedule=2),
    "apply_if_finite": optax.apply_if_finite(kfac(), 3),
    "other_damping": kfac(damping=0.4),
}


@cases.compiled
def twice(batches):
    """Two updates by each of them, in one program."""
    unknown = {"value": 0.5, "anything": None}

    def step(carry, batch):
        found = {}
        for name, optimizer in WRAPPED.items():
            found[name] = optimizer.update(
                GRADIENT,
                carry[name][1],
                PARAMS,
                batch=batch,
                model_params=PARAMS,
                **unknown,
            )
        return found, None

    start = {
        name: (GRADIENT, optimizer.init(PARAMS)) for name, optimizer in WRAPPED.items()
    }
    return jax.lax.scan(step, start, batches)[0]


@functools.cache
def results():
    return twice(stacked(BATCH, LATER))


def assert_close(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-7), left, right)


@pytest.mark.slow
def test_a_wrapper_that_shows_all_changes_nothing():
    updates, state = results()["plain"]
    for name in ("injected", "apply_if_finite"):
        found, inside = results()[name]
        assert_close(found, updates)
        assert_close(get_information(inside, 12), get_information(state, 12))


@pytest.mark.slow
def test_masked_solves_the_layers_that_are_shown_with_all_of_the_model():
    updates, state = results()["masked"]
    plain, _ = results()["plain"]
    # K-FAC has no block between layers: what is held changes nothing of the others
    assert_close(shown_part(updates), shown_part(plain))
    assert_close(updates["last"], GRADIENT["last"])
    assert tuple(get_information(state, 12).input_factors) == FACTORS


def test_a_posterior_of_what_masked_shows_leaves_out_what_is_held():
    held = {**PARAMS, "last": optax.MaskedNode()}

    @cases.compiled
    def found(information):
        posterior = ff.posterior(held, information, prior_precision=1.0)
        logdet, trace = (
            operation(posterior.information, held)
            for operation in (ff.information.logdet, ff.information.trace)
        )
        dense = ff.information.to_dense(posterior.information, held)
        return dense, logdet, trace, ff.sample(posterior, jax.random.key(0), (3,))

    information = get_information(results()["masked"][1], 12)
    dense, logdet, trace, drawn = found(information)
    assert dense.shape == (13, 13)  # of 25 parameters
    np.testing.assert_allclose(logdet, np.linalg.slogdet(dense)[1], rtol=1e-6)
    np.testing.assert_allclose(trace, np.trace(dense), rtol=1e-6)
    assert jax.tree.structure(drawn) == jax.tree.structure(held)
    assert drawn["first"]["w"].shape == (3, 2, 4)


def test_partition_of_two_optimizers_one_for_each_layer():
    updates, state = results()["partition"]
    assert_close(shown_part(updates), shown_part(results()["plain"][0]))
    assert_close(updates["last"], results()["other_damping"][0]["last"])
    with pytest.raises(ValueError, match=r"2 states .*\['also curved'\].*\['curved'\]"):
        get_information(state, 12)
    parts = state.inner_states
    left, right = (get_information(parts[name], 12) for name in sorted(parts))
    assert_close(left, right)  # of the whole model, in each


def shown_part(tree):
    return {"first": tree["first"], "scale": tree["scale"]}


@pytest.mark.parametrize("name", ["masked", "partition"])
def test_holes_without_the_whole_model_are_named(name):
    optimizer = WRAPPED[name]
    state = jax.eval_shape(optimizer.init, PARAMS)
    with pytest.raises(ValueError, match=r"holes, .* model_params=params"):
        jax.eval_shape(
            lambda state: optimizer.update(GRADIENT, state, PARAMS, batch=BATCH), state
        )


def test_a_kernel_is_not_parted_from_its_bias():
    mask = {"first": {"w": True, "b": False}, "last": True, "scale": True}
    optimizer = optax.masked(kfac(), mask)
    state = jax.eval_shape(optimizer.init, PARAMS)
    with pytest.raises(
        ValueError, match=r"kernel and bias .* of one layer go together"
    ):
        jax.eval_shape(
            lambda state: optimizer.update(
                GRADIENT, state, PARAMS, batch=BATCH, model_params=PARAMS
            ),
            state,
        )


@pytest.mark.slow
def test_multi_steps_loses_a_curvature_that_one_large_batch_keeps():
    # the trap: of two mini-batches only the factors of the last are kept
    _, state = results()["multi_steps"]
    kept = optax.tree.get(state, "input_factors")[FACTORS[0]][0]

    def factor(*batches):
        x = np.concatenate([inputs for inputs, _ in batches])
        rows = np.concatenate([x, np.ones((len(x), 1))], axis=1)
        return rows.T @ rows / len(x)

    share = 1 - 0.95  # of one batch in the moving average
    np.testing.assert_allclose(kept, share * factor(LATER), rtol=1e-9)

    # the way: gradients are accumulated by a scan, and the factors are of both
    loss, optimizer = ff.negative_log_likelihood(network, LIKELIHOOD), kfac()

    @cases.compiled
    def accumulated(parts):
        def add(total, part):
            return jax.tree.map(jnp.add, total, jax.grad(loss)(PARAMS, part)), None

        total, _ = jax.lax.scan(add, optax.tree.zeros_like(PARAMS), parts)
        gradient = optax.tree.scale(1 / len(parts[1]), total)
        whole = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), parts)
        state = optimizer.init(PARAMS)
        return optimizer.update(gradient, state, PARAMS, batch=whole), whole

    parts = stacked(BATCH, LATER)
    (updates, state), whole = accumulated(parts)
    kept = optax.tree.get(state, "input_factors")[FACTORS[0]][0]
    np.testing.assert_allclose(kept, share * factor(BATCH, LATER), rtol=1e-9)
    alone, _ = cases.compiled(
        lambda batch: optimizer.update(
            jax.grad(loss)(PARAMS, batch), optimizer.init(PARAMS), PARAMS, batch=batch
        )
    )(whole)
    assert_close(updates, alone)


def test_an_overflow_moves_nothing_and_is_counted():
    spoiled = BATCH[0] * np.where(np.arange(12) == 3, 1e200, 1)[:, None], BATCH[1]
    found = twice(stacked(spoiled, LATER))  # compiled for the tests above
    _, state = found["plain"]
    assert optax.tree.get(state, "num_skipped") == 1
    assert optax.tree.get(state, "num_batches") == 1
    for updates, state in found.values():
        for leaf in jax.tree.leaves((updates, state)):
            assert bool(jnp.all(jnp.isfinite(leaf)))
    # the update is zero, which is finite: the wrapper has nothing left to refuse
    assert found["apply_if_finite"][1].total_notfinite == 0


# ---- states: their leaves, types and layouts

KINDS = {
    "factors": {"inverse_period": 2, "max_kl": 0.1},
    "corrected": {"inverse_period": 2, "max_kl": 0.1, "eigenvalue_correction": True},
}


@pytest.mark.parametrize("kind", KINDS)
def test_init_needs_no_arrays_and_map_params_sees_only_momentum(kind):
    optimizer = kfac(estimator=ff.estimators.monte_carlo, key=0, **KINDS[kind])
    state = optimizer.init(PARAMS)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), PARAMS)
    types = jax.tree.map(jax.typeof, state)
    assert jax.tree.map(jax.typeof, optimizer.init(shapes)) == types
    evaluated = jax.eval_shape(optimizer.init, PARAMS)
    assert jax.tree.structure(evaluated) == jax.tree.structure(state)
    mapped = optax.tree.map_params(optimizer, lambda x: x + 1, state)
    trace = optax.tree.get(mapped, "trace")
    np.testing.assert_array_equal(trace["last"], np.ones((4, 3)))
    expected = optax.tree.set(state, trace=trace)
    chex.assert_trees_all_equal(mapped, expected)


def test_init_on_the_state_of_a_flax_module():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.first, self.last = (nnx.Linear(2, 2, rngs=rngs) for _ in range(2))

        def __call__(self, x):
            return self.last(jnp.tanh(self.first(x)))

    graph, params = nnx.split(nnx.eval_shape(lambda: Model(nnx.Rngs(0))))

    def apply_fn(params, x):
        return nnx.merge(graph, params)(x)

    x = jax.ShapeDtypeStruct((5, 2), jnp.float32)
    layers = ff.layers.find_layers(apply_fn, params, x)
    state = ff.kfac(0.1, apply_fn, LIKELIHOOD, layers, key=0).init(params)
    factors = optax.tree.get(state, "output_factors")
    assert [x.shape for x in factors.values()] == [(2, 2, 2)]  # both layers


@pytest.mark.slow_cases
@pytest.mark.parametrize(
    ("dtype", "kind"),
    [
        ("float16", "factors"),
        ("bfloat16", "corrected"),
        ("float32", "corrected"),
        ("float64", "factors"),
    ],
)
def test_types_are_stable_through_a_conditional_and_compiled_once(dtype, kind):
    optimizer = kfac(estimator=ff.estimators.monte_carlo, key=0, **KINDS[kind])
    params = jax.tree.map(lambda x: x.astype(dtype), PARAMS)
    batch = jnp.asarray(BATCH[0], dtype), BATCH[1]
    state = optimizer.init(params)
    wide = jnp.float64 if dtype == "float64" else jnp.float32
    assert optax.tree.get(state, "input_factors")[FACTORS[0]].dtype == wide

    # a donated state: none of its arrays is used twice, nor after the step
    @functools.partial(cases.compiled, donate_argnums=1)
    def step(params, state, take):
        def update():
            return optimizer.update(params, state, params, batch=batch)

        def skip():
            return optax.tree.zeros_like(params), state

        updates, state = jax.lax.cond(take, update, skip)
        return optax.apply_updates(params, updates), state

    types = jax.tree.map(jax.typeof, (params, state))
    for _ in range(3):
        params, state = step(params, state, True)
        assert jax.tree.map(jax.typeof, (params, state)) == types
    assert step._cache_size() == 1
    assert optax.tree.get(state, "num_skipped") == 0
    assert all(bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves(params))


@pytest.mark.slow
def test_a_vmap_of_scans_is_each_run_alone():
    optimizer = kfac(inverse_period=2, max_kl=0.1)

    def run(params):
        def step(carry, _):
            params, state = carry
            updates, state = optimizer.update(GRADIENT, state, params, batch=BATCH)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, optimizer.init(params)), length=3)[0]

    other = jax.tree.map(lambda x: 1.5 * x, PARAMS)
    both = stacked(PARAMS, other)
    together, alone = cases.compiled(lambda both: (jax.vmap(run)(both), run(other)))(
        both
    )
    assert_close(jax.tree.map(lambda x: x[1], together), alone)
