"""`ff.kfac` as it comes: it descends, finds its layers, asks for its key in time."""

import functools
import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import serialization

import fisherflow_jax as ff
import transform_cases as cases

PARAMS, BATCH, MODEL = cases.network_params(), cases.NETWORK_BATCH, cases.MODEL
LAYERS = ff.layers.find_layers(cases.network, PARAMS, BATCH[0])
GRADIENT = jax.tree.map(jnp.ones_like, PARAMS)
FOUND = ff.kfac(0.1, *MODEL, inputs=BATCH[0], key=0)
GIVEN = ff.kfac(0.1, *MODEL, LAYERS, key=0)


# ---- it descends


def draws(seed, *shapes):
    """Kernels of unit variance at their outputs, float32."""
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    return [
        jax.random.normal(key, shape, jnp.float32) / np.sqrt(shape[0])
        for key, shape in zip(keys, shapes, strict=True)
    ]


def transformer(params, tokens):
    """Two blocks without normalisation, as one writes them first."""
    embedding, position, blocks, head = params
    x = embedding[tokens] + position
    for q, k, v, up, down in blocks:
        scores = jnp.einsum("btd,bsd->bts", x @ q, x @ k) / np.sqrt(8)
        x = x + jax.nn.softmax(scores) @ (x @ v)
        x = x + jax.nn.gelu(x @ up) @ down
    return x @ head


def transformer_problem():
    square, wide = (8, 8), (8, 32)
    blocks = [draws(s, square, square, square, wide, wide[::-1]) for s in (1, 2)]
    embedding, position, head = draws(3, (7, 8), (6, 8), (8, 7))
    params = [embedding * np.sqrt(7), position * np.sqrt(6), blocks, head]
    tokens = jax.random.randint(jax.random.key(4), (48, 7), 0, 7)
    tokens = jnp.where(tokens == 0, 1, jnp.roll(tokens, 1, 1))
    return (
        transformer,
        ff.likelihoods.categorical(),
        params,
        (tokens[:, :6], tokens[:, 1:]),
    )


def linear(params, x):
    return x @ params["w"]


def regression_problem():
    """Of condition 1e4."""
    x, truth = draws(7, (64, 6), (6,))
    x = x * 8 * jnp.logspace(0, -2, 6, dtype=jnp.float32)
    y = 300 * x @ truth
    return linear, ff.likelihoods.gaussian(), {"w": jnp.zeros(6, jnp.float32)}, (x, y)


PROBLEMS = {
    "transformer": transformer_problem,
    "regression": regression_problem,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PROBLEMS)
def test_the_loss_falls_at_all_rates_and_no_step_is_refused(name):
    apply_fn, likelihood, params, batch = PROBLEMS[name]()
    loss = ff.negative_log_likelihood(apply_fn, likelihood)

    @cases.compiled
    def run(rate, bound):
        tx = ff.kfac(rate, apply_fn, likelihood, inputs=batch[0], max_kl=bound, key=0)

        def step(carry, _):
            params, state = carry
            gradients = jax.grad(loss)(params, batch)
            updates, state = tx.update(gradients, state, params, batch=batch)
            return (optax.apply_updates(params, updates), state), None

        start = params, tx.init(params)
        (last, state), _ = jax.lax.scan(step, start, length=25)
        refused = [optax.tree.get(state, f"num_{x}") for x in ("skipped", "unmeasured")]
        return loss(last, batch), jnp.stack(refused)

    start, bound = float(loss(params, batch)), np.float32(default_of("max_kl"))
    for rate in (0.03, 0.1, 0.3):
        last, refused = run(np.float32(rate), bound)
        assert last < 0.9 * start, rate
        np.testing.assert_array_equal(refused, 0)
    if name == "transformer":  # the bound is what does it
        assert not run(np.float32(0.03), np.float32(1e30))[0] < start


def default_of(option):
    return inspect.signature(ff.kfac).parameters[option].default


def test_without_a_bound_it_is_natural_gradient_descent_to_the_bit():
    options = {"estimator": ff.estimators.exact, "max_kl": None}
    plain = ff.kfac(0.1, *MODEL, LAYERS, **options)
    descent = ff.natural_gradient(
        0.1,
        ff.estimators.exact,
        *MODEL,
        structure=ff.structures.kronecker(LAYERS),
        memory=ff.memories.exponential(0.95),
        momentum=0.9,
        inverse_period=10,
        factorise=ff.transforms.factored_damping,
    )
    update = cases.compiled(lambda: [scanned(tx) for tx in (plain, descent)])
    chex.assert_trees_all_equal(*update())


def after_two(tx):
    state = tx.init(PARAMS)
    for _ in range(2):
        updates, state = tx.update(GRADIENT, state, PARAMS, batch=BATCH)
    return updates, state


def scanned(tx):
    """The same, with one update in the program."""

    def step(carry, _):
        return tx.update(GRADIENT, carry[1], PARAMS, batch=BATCH), None

    return jax.lax.scan(step, (GRADIENT, tx.init(PARAMS)), length=2)[0]


def test_momentum_remembers_steps_as_they_were_taken():
    """In numpy: each is shortened to the bound, and 0.9 of it goes into the next."""
    x = cases.draw(9, 3, seed=1)
    params, likelihood = {"w": jnp.zeros((3, 2))}, ff.likelihoods.gaussian()
    layers = ff.layers.find_layers(linear, params, x)
    model = linear, likelihood, layers
    options = {"estimator": ff.estimators.exact}
    bounded = ff.kfac(0.5, *model, max_kl=0.02, **options)
    free = ff.kfac(0.5, *model, max_kl=None, momentum=None, **options)
    gradients = [{"w": cases.draw(3, 2, seed=seed)} for seed in (2, 3, 4)]
    gradients[2]["w"] *= -1e-3  # the last is not shortened

    @cases.compiled
    def run(gradients):
        states = [tx.init(params) for tx in (bounded, free)]
        found = []
        for gradient in gradients:
            pair = [
                tx.update(gradient, state, params, batch=(x, None))
                for tx, state in zip((bounded, free), states, strict=True)
            ]
            states = [state for _, state in pair]
            found.append([updates["w"] for updates, _ in pair])
        return found

    taken, shortened = np.zeros((3, 2)), []
    for ours, plain in run(gradients):
        taken = 0.9 * taken + np.asarray(plain)
        kl = np.mean(np.sum((x @ taken) ** 2, 1)) / 2
        shortened.append(kl > 0.02)
        taken = taken * min(1, np.sqrt(0.02 / kl))
        np.testing.assert_allclose(ours, taken, rtol=1e-9)
    assert shortened == [True, True, False]


# ---- layers that init finds


@pytest.mark.slow
def test_layers_found_by_init_give_the_same_numbers_to_the_bit():
    found, given = FOUND.init(PARAMS), GIVEN.init(PARAMS)
    chex.assert_trees_all_equal(found, given)
    evaluated = jax.eval_shape(FOUND.init, PARAMS)
    assert jax.tree.structure(evaluated) == jax.tree.structure(given)
    # compiled, with init in the program; and eagerly, what the recipe has compiled
    compiled = [cases.compiled(lambda tx=tx: scanned(tx))() for tx in (FOUND, GIVEN)]
    chex.assert_trees_all_equal(*compiled)
    chex.assert_trees_all_equal(after_two(FOUND), after_two(GIVEN))


def test_the_table_is_in_the_state_and_goes_through_wrappers_and_checkpoints():
    state = FOUND.init(PARAMS)
    tables = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, ff.layers.Layers))
    assert LAYERS in [x for x in tables if isinstance(x, ff.layers.Layers)]
    mapped = optax.tree.map_params(FOUND, lambda x: x + 1, state)
    expected = optax.tree.map_params(GIVEN, lambda x: x + 1, state)
    chex.assert_trees_all_equal(mapped, expected)
    later = after_two(FOUND)[1]
    written = serialization.to_bytes(later)
    # another optimiser, as of another process, reads its table in the state
    other = ff.kfac(0.1, *MODEL, inputs=jax.ShapeDtypeStruct((5, 2), "float32"), key=0)
    restored = serialization.from_bytes(other.init(PARAMS), written)
    chex.assert_trees_all_equal(restored, later)
    updates = [
        tx.update(GRADIENT, restored, PARAMS, batch=BATCH) for tx in (other, GIVEN)
    ]
    chex.assert_trees_all_equal(*updates)
    wrapped = optax.apply_if_finite(FOUND, 3)
    once, _ = wrapped.update(GRADIENT, wrapped.init(PARAMS), PARAMS, batch=BATCH)
    expected = GIVEN.update(GRADIENT, GIVEN.init(PARAMS), PARAMS, batch=BATCH)[0]
    chex.assert_trees_all_equal(once, expected)


def test_layers_are_found_of_examples_that_interact_and_beside_shared_inputs():
    def apply_fn(params, inputs):
        h = inputs["x"] @ params["w"]
        return inputs["scale"] * (h - h.mean(0))

    inputs = {"x": BATCH[0], "scale": ff.Shared(np.float32(2))}
    params = {"w": jnp.ones((2, 3))}
    layers = ff.layers.find_layers(apply_fn, params, inputs)
    assert layers.batched
    tx = ff.kfac(0.1, apply_fn, ff.likelihoods.gaussian(), inputs=inputs, key=0)
    state = jax.eval_shape(tx.init, params)
    assert state[0].information.layers == layers


def test_numbers_may_be_injected():
    names = ("apply_fn", "likelihood", "inputs", "estimator", "decay", "key")
    injected = optax.inject_hyperparams(ff.kfac, static_args=names)(
        learning_rate=0.1,
        apply_fn=MODEL[0],
        likelihood=MODEL[1],
        inputs=BATCH[0],
        key=0,
    )
    assert "max_kl" in jax.eval_shape(injected.init, PARAMS).hyperparams


def test_what_init_cannot_find_layers_in():
    with pytest.raises(ValueError, match=r"inputs=, of which shapes .*; got neither"):
        ff.kfac(0.1, *MODEL, key=0)
    with pytest.raises(ValueError, match="got both"):
        ff.kfac(0.1, *MODEL, LAYERS, inputs=BATCH[0], key=0)
    masked = optax.masked(FOUND, jax.tree.map(lambda x: x.ndim > 1, PARAMS))
    with pytest.raises(ValueError, match=r"holes, .*layers=ff\.layers\.find_layers"):
        masked.init(PARAMS)
    with pytest.raises(ValueError, match="no layers: it is of another optimiser"):
        FOUND.update(GRADIENT, optax.adam(0.1).init(PARAMS), PARAMS, batch=BATCH)


# ---- keys


def test_a_missing_key_is_named_by_init():
    bound = {"estimator": ff.estimators.monte_carlo(*MODEL, ff.structures.diagonal())}
    makes = {
        "kfac": lambda key: ff.kfac(0.1, *MODEL, LAYERS, key=key),
        "kfac, no bound": lambda key: ff.kfac(
            0.1, *MODEL, LAYERS, max_kl=None, key=key
        ),
        "kfac, layers found": lambda key: ff.kfac(
            0.1, *MODEL, inputs=BATCH[0], key=key
        ),
        "natural_gradient": lambda key: ff.natural_gradient(0.1, **bound, key=key),
        "scale_by_fisher": lambda key: ff.scale_by_fisher(
            **bound, memory=ff.memories.windowed(1), damping=0.1, key=key
        ),
    }
    silent = []
    for name, make in makes.items():
        try:
            jax.eval_shape(make(None).init, PARAMS)
            silent.append(name)
        except ValueError as error:
            assert "draws at random: build the optimiser with a key" in str(error)
        jax.eval_shape(make(0).init, PARAMS)
    assert silent == []


def test_recipes_leave_a_key_alone_that_nothing_draws_from():
    exact = ff.estimators.exact(*MODEL, ff.structures.diagonal())
    for make in (
        functools.partial(ff.kfac, 0.1, *MODEL, LAYERS, estimator=ff.estimators.exact),
        functools.partial(ff.natural_gradient, 0.1, exact),
    ):
        states = [make(**options).init(PARAMS) for options in ({"key": 0}, {})]
        chex.assert_trees_all_equal(*states)
        assert states[0][0].key is None
    with pytest.raises(ValueError, match="exact draws nothing; it takes no key"):
        ff.scale_by_fisher(exact, memory=ff.memories.windowed(1), damping=0.1, key=0)


def test_a_root_that_is_sampled_draws_from_the_optimisers_key():
    likelihood = ff.likelihoods.from_log_prob(
        lambda outputs, targets: -jnp.square(targets - outputs).sum(-1) / 2,
        lambda key, outputs: outputs + jax.random.normal(key, outputs.shape),
        num_samples=400,
    )
    x = cases.draw(9, 3, seed=1)
    params = {"w": jnp.zeros((3, 2))}
    batch, gradient = (x, np.zeros((9, 2))), {"w": cases.draw(3, 2, seed=2)}
    make = functools.partial(ff.kfac, 0.5, linear, likelihood, inputs=x)
    for estimator in (ff.estimators.monte_carlo, ff.estimators.empirical):
        with pytest.raises(ValueError, match="draws at random: build"):
            make(estimator=estimator).init(params)
    tx = make(estimator=ff.estimators.empirical, damping=1.0, max_kl=0.02, key=0)
    update = cases.compiled(tx.update)
    updates, state = update(gradient, tx.init(params), params, batch=batch)
    kl = np.mean(np.sum((x @ np.asarray(updates["w"])) ** 2, 1)) / 2
    np.testing.assert_allclose(kl, 0.02, rtol=0.3)  # of 400 draws
    assert state[-1].kl > 0.02
