"""What Optax and its wrappers require of a state and of an update."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fisherflow_jax as ff
import transform_cases as cases
from fisherflow_jax.transforms import (
    adam,
    clip_by_kl,
    get_information,
    natural_gradient,
    scale_by_fisher,
)

OPTIONS = {"memory": ff.memories.exponential(0.9), "damping": 0.1}
BATCH, GRADIENT = cases.SECOND, cases.tree(cases.GRADIENT)
PARAMS = cases.tree(cases.flat(cases.PARAMS))


def linear(params, x):
    return x[:, :2] @ params["b"] + params["a"]


def fisher(**options):
    estimator = cases.given(ff.structures.diagonal())
    return scale_by_fisher(estimator, **(OPTIONS | options))


def once(optimizer, **extra):
    """One update, compiled."""

    @cases.compiled
    def run(params):
        state = optimizer.init(params)
        return optimizer.update(GRADIENT, state, params, batch=BATCH, **extra)

    return run(PARAMS)


@functools.cache
def plain():
    """One update without any wrapper."""
    return once(fisher())


def assert_close(left, right):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), left, right)


def test_unknown_extra_arguments_are_swallowed():
    optimizer = optax.chain(
        adam(0.1),
        fisher(),
        clip_by_kl(linear, ff.likelihoods.gaussian(), 0.1),
        optax.scale(-1.0),
    )
    updates, _ = once(optimizer, value=1.0, grad=None, anything="else")
    assert set(updates) == {"a", "b"}


def test_inject_hyperparams_with_static_args():
    injected = optax.inject_hyperparams(
        scale_by_fisher,
        static_args=("estimator", "memory", "period", "power"),
    )(cases.given(ff.structures.diagonal()), **OPTIONS)
    updates, state = once(injected)
    assert_close(updates, plain()[0])
    # an injected number is an array, and what changes there reaches the update
    state.hyperparams["damping"] = jnp.asarray(100.0)
    damped, state = injected.update(GRADIENT, state, PARAMS, batch=BATCH)
    assert float(optax.tree.norm(damped)) < 0.1 * float(optax.tree.norm(updates))
    assert optax.tree.get(state.inner_state, "damping") == 100.0
    with pytest.raises(
        ValueError, match=r"period must be a positive whole .*static_args"
    ):
        optax.inject_hyperparams(scale_by_fisher, static_args=("estimator", "memory"))(
            cases.given(ff.structures.diagonal()), **OPTIONS, period=2
        ).init(PARAMS)


@pytest.mark.slow_cases
@pytest.mark.parametrize("structure", [*cases.STRUCTURES, "one group"])
def test_masked_preconditions_the_shown_part_of_the_whole_model(structure):
    one_group = ff.structures.block(lambda path: "all")
    estimator = cases.given(cases.STRUCTURES.get(structure, one_group))
    masked = optax.masked(
        scale_by_fisher(estimator, memory=ff.memories.windowed(1), damping=0.3),
        {"a": False, "b": True},
    )
    params, gradient = map(cases.tree, (cases.flat(cases.PARAMS), cases.GRADIENT))
    state = masked.init(params)
    with pytest.raises(ValueError, match=r"holes, .* model_params=params"):
        masked.update(gradient, state, params, batch=cases.SECOND)
    update = cases.compiled(masked.update)
    updates, state = update(
        gradient, state, params, batch=cases.SECOND, model_params=params
    )
    total, count = cases.sums(cases.SECOND)
    shown = cases.kept(structure, total / count)[2:, 2:]
    expected = cases.power_of(shown, -1, 0.3) @ cases.GRADIENT[2:]
    np.testing.assert_allclose(np.ravel(updates["b"]), expected, rtol=1e-9)
    np.testing.assert_array_equal(updates["a"], gradient["a"])
    if structure != "scalar":
        information, like = get_information(state, count), {"b": params["b"]}
        found = ff.information.to_dense(information, like)
        np.testing.assert_allclose(found, shown * count, rtol=1e-9)


def test_partition_runs_each_part_with_the_whole_model():
    optimizer = optax.partition(
        {"curved": fisher(), "plain": optax.scale(2.0)}, {"a": "plain", "b": "curved"}
    )
    updates, state = once(optimizer, model_params=PARAMS)
    assert_close(updates["b"], plain()[0]["b"])  # a diagonal does not see the others
    assert_close(updates["a"], 2 * GRADIENT["a"])
    entries = get_information(state, 10).entries
    assert entries["a"] == optax.MaskedNode()
    assert entries["b"].shape == (2, 2)


def test_multi_steps_keeps_the_last_mini_batch_and_one_large_batch_keeps_all():
    estimator = cases.given(ff.structures.diagonal())
    optimizer = scale_by_fisher(estimator, memory=ff.memories.stationary(), damping=0.0)
    params, gradient = map(cases.tree, (cases.flat(cases.PARAMS), cases.GRADIENT))
    first, second = cases.FIRST[0][:8], cases.SECOND[0]

    # the trap: of two mini-batches only the curvature of the last is kept
    wrapped = optax.MultiSteps(optimizer, every_k_schedule=2)
    state = wrapped.init(params)
    for rows in (first, second):
        _, state = wrapped.update(gradient, state, params, batch=(rows, None))
    kept = cases.flat(optax.tree.get(state, "information").entries)
    np.testing.assert_allclose(kept, (second**2).sum(0))

    # the way: accumulate gradients, and call update once with the whole batch
    rows = np.concatenate([first, second])
    state = optimizer.init(params)
    _, state = optimizer.update(gradient, state, params, batch=(rows, None))
    np.testing.assert_allclose(cases.flat(state.information.entries), (rows**2).sum(0))


def test_apply_if_finite():
    wrapped = optax.apply_if_finite(fisher(), 3)
    updates, state = once(wrapped)
    assert_close(updates, plain()[0])
    assert get_information(state, 12).entries["b"].shape == (2, 2)


@pytest.mark.parametrize("structure", cases.STRUCTURES)
def test_map_params_sees_the_leaves_that_are_like_parameters(structure):
    optimizer = optax.chain(
        scale_by_fisher(
            cases.given(cases.STRUCTURES[structure]),
            memory=ff.memories.windowed(2),
            damping=0.1,
            inverse_period=2,
            momentum=optax.ema(0.9),
        ),
        optax.scale(-1.0),
    )
    params = cases.tree(cases.flat(cases.PARAMS))
    state = optimizer.init(params)
    mapped = optax.tree.map_params(optimizer, lambda x: x + 1, state)
    np.testing.assert_array_equal(mapped[0].momentum.ema["a"], [1.0, 1.0])
    assert mapped[0].step == 0
    if structure == "diagonal":
        np.testing.assert_array_equal(mapped[0].information.entries["a"], [1.0, 1.0])


@pytest.mark.parametrize("structure", cases.STRUCTURES)
def test_init_on_shapes_gives_the_state_of_arrays(structure):
    optimizer = scale_by_fisher(
        cases.given(cases.STRUCTURES[structure]),
        **OPTIONS,
        inverse_period=3,
        momentum=optax.ema(0.9),
    )
    params = cases.tree(cases.flat(cases.PARAMS))
    state = optimizer.init(params)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    from_shapes = optimizer.init(shapes)
    evaluated = jax.eval_shape(optimizer.init, params)
    assert jax.tree.map(jax.typeof, from_shapes) == jax.tree.map(jax.typeof, state)
    assert jax.tree.structure(evaluated) == jax.tree.structure(state)


@pytest.mark.slow_cases
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_types_are_stable_through_a_conditional_and_compiled_once(dtype):
    optimizer = optax.chain(
        scale_by_fisher(
            cases.given(ff.structures.full()),
            **OPTIONS,
            period=2,
            momentum=optax.ema(0.9),
        ),
        clip_by_kl(linear, ff.likelihoods.gaussian(), 0.1),
        optax.scale_by_learning_rate(0.1),
    )
    params = cases.tree(cases.flat(cases.PARAMS), dtype)
    batch = jnp.asarray(cases.SECOND[0], dtype), None
    state = optimizer.init(params)
    wide = jnp.float64 if dtype == "float64" else jnp.float32
    assert state[0].information.rows["b"].dtype == wide

    @cases.compiled
    def step(params, state, take):
        def update():
            return optimizer.update(params, state, params, batch=batch)

        def skip():
            return optax.tree.zeros_like(params), state

        updates, after = jax.lax.cond(take, update, skip)
        return optax.apply_updates(params, updates), after

    for _ in range(3):
        before = params, state
        params, state = step(params, state, True)
        assert jax.tree.map(jax.typeof, (params, state)) == jax.tree.map(
            jax.typeof, before
        )
    assert step._cache_size() == 1
    assert state[0].num_skipped == 0
    assert all(bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves(params))


def test_a_donated_state_and_a_scan_and_a_vmap():
    optimizer = fisher(momentum=optax.ema(0.9), inverse_period=2)

    def step(carry, _):
        params, state = carry
        updates, state = optimizer.update(params, state, params, batch=BATCH)
        return (optax.apply_updates(params, updates), state), None

    start = jax.tree.map(jnp.copy, PARAMS), optimizer.init(PARAMS)
    twice = jax.tree.map(lambda x: jnp.stack([x, x]), start)
    mapped, _ = cases.compiled(jax.vmap(lambda c: jax.lax.scan(step, c, length=3)))(
        twice
    )
    donating = cases.compiled(lambda c: step(c, None)[0], donate_argnums=0)
    carry = start
    for _ in range(3):
        carry = donating(carry)
    for x, y in zip(jax.tree.leaves(mapped), jax.tree.leaves(carry), strict=True):
        np.testing.assert_allclose(x[1], y, rtol=1e-5, atol=1e-6)


def test_field_names_are_unique():
    optimizer = scale_by_fisher(
        cases.given(ff.structures.full(), random=True),
        memory=ff.memories.windowed(2),
        damping=0.1,
        inverse_period=2,
        momentum=optax.ema(0.9),
        key=0,
    )
    state = optimizer.init(cases.tree(cases.flat(cases.PARAMS)))
    for name in state._fields:
        assert optax.tree.get(state, name) is not None


def test_natural_gradient_is_a_chain():
    optimizer = natural_gradient(
        0.5,
        cases.given(ff.structures.diagonal()),
        **OPTIONS,
        momentum=0.9,
        weight_decay=0.01,
        mask={"a": False, "b": True},
        period=1,
    )
    state = optimizer.init(PARAMS)
    update = cases.compiled(optimizer.update)
    for _ in range(2):  # the mean over equal batches stays
        updates, state = update(GRADIENT, state, PARAMS, batch=BATCH)
    expected, _ = plain()
    assert_close(updates["a"], -0.5 * 1.9 * expected["a"])
    assert_close(updates["b"], -0.5 * (1.9 * expected["b"] + 0.01 * PARAMS["b"]))


def test_natural_gradient_takes_an_estimator_without_a_model():
    model, structure = (cases.network, cases.MODEL[1]), ff.structures.full()
    params = cases.network_params()
    chosen = ff.estimators.exact(chunk_size=6)
    bound = ff.estimators.exact(*model, structure, chunk_size=6)

    @cases.compiled
    def run(params):
        found = []
        for optimizer in (
            natural_gradient(0.5, chosen, *model, structure=structure),
            natural_gradient(0.5, bound),
            natural_gradient(0.5, bound, *model, structure=structure),
        ):
            state = optimizer.init(params)
            found.append(
                optimizer.update(params, state, params, batch=cases.NETWORK_BATCH)[0]
            )
        return found

    first, *others = run(params)
    for other in others:
        chex.assert_trees_all_equal(first, other)
    with pytest.raises(ValueError, match=r"with its model and structure; got exact"):
        natural_gradient(0.5, chosen)
    with pytest.raises(ValueError, match="exact is bound to another structure"):
        natural_gradient(0.5, bound, *model, structure=ff.structures.diagonal())


@pytest.mark.slow
def test_empty_leaves_scalars_and_none_change_nothing():
    """Of squares of gradients, with them and without."""
    bare = {"w": jnp.asarray(cases.draw(2, 3, seed=1))}
    bare["v"] = jnp.sin(3 * bare["w"][0])
    more = bare | {"empty": jnp.zeros((0, 3)), "held": None}
    alone = bare | {"s": jnp.asarray(0.7)}
    kinds = cases.STRUCTURES | {"two_sided": ff.structures.two_sided()}

    @cases.compiled
    def run(tree):
        found = {}
        for name, structure in kinds.items():
            estimator = ff.estimators.squared_gradient(structure=structure)
            optimizer = scale_by_fisher(estimator, **OPTIONS, power=-0.5)
            found[name], _ = optimizer.update(tree, optimizer.init(tree), tree)
        found["soap"] = twice(ff.soap(0.1, inverse_period=1), tree)
        found["shampoo"] = twice(ff.shampoo(0.1), tree)
        return found

    expected, found, scalar = run(bare), run(more), run(alone)
    for name, updates in found.items():
        assert updates.pop("empty").shape == (0, 3)
        assert updates.pop("held") is None
        assert_close(updates, expected[name])
        assert np.isfinite(scalar[name]["s"])


def twice(optimizer, tree):
    _, state = optimizer.update(tree, optimizer.init(tree), tree)
    return optimizer.update(jax.tree.map(jnp.cos, tree), state, tree)[0]
