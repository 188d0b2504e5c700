"""SOAP and Shampoo under Optax's wrappers and flax, and with bad input."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx, serialization
from flax.training import train_state

import fisherflow_jax as ff
import transform_cases as cases
from fisherflow_jax.transforms import get_information

# square and not, one side too wide, both too wide, no axes, no entries
SHAPES = {
    "bias": (4,),
    "empty": (0, 3),
    "scalar": (),
    "square": (3, 3),
    "wide": (3, 6),
    "widest": (6, 7),
}
PARAMS = {
    name: jnp.asarray(cases.draw(*shape, seed=k))
    for k, (name, shape) in enumerate(SHAPES.items())
}
STREAM = {
    name: jnp.asarray(cases.draw(4, *shape, seed=9 + k))
    for k, (name, shape) in enumerate(SHAPES.items())
}
KINDS = {
    "soap": functools.partial(ff.soap, 0.1),
    "shampoo": functools.partial(ff.shampoo, 0.1, graft="adam"),
}
SMALL = {"widest": 5, "inverse_period": 2}
SHOWN = {name: name != "square" for name in SHAPES}


def wrapped(make):
    static = ("widest", "inverse_period")
    factory = make.func
    options = {"learning_rate": 0.1, **make.keywords, **SMALL}
    frozen = {"free": make(**SMALL), "frozen": optax.set_to_zero()}
    labels = {key: "free" if shown else "frozen" for key, shown in SHOWN.items()}
    return {
        "plain": make(**SMALL),
        "injected": optax.inject_hyperparams(factory, static_args=static)(**options),
        "masked": optax.masked(make(**SMALL), SHOWN),
        "frozen": optax.partition(frozen, labels),
        "apply_if_finite": optax.apply_if_finite(make(**SMALL), 3),
        "multi_steps": optax.MultiSteps(make(**SMALL), every_k_schedule=2),
    }


ALL = {
    f"{kind}, {name}": optimizer
    for kind, make in KINDS.items()
    for name, optimizer in wrapped(make).items()
}


@cases.compiled
def run(stream):
    """Every step's updates and the last states, of all of them in one program."""

    def step(carry, gradient):
        found = {
            name: optimizer.update(gradient, carry[name], PARAMS, value=1.0, grad=None)
            for name, optimizer in ALL.items()
        }
        updates = {name: update for name, (update, _) in found.items()}
        return {name: state for name, (_, state) in found.items()}, updates

    start = {name: optimizer.init(PARAMS) for name, optimizer in ALL.items()}
    return jax.lax.scan(step, start, stream)


@functools.cache
def results():
    return run(STREAM)


def assert_close(left, right):
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-7, atol=1e-12),
        left,
        right,
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_wrappers_change_nothing_of_what_they_show(kind):
    states, updates = results()
    plain = updates[f"{kind}, plain"]
    assert all(bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves(plain))
    for name in ("injected", "apply_if_finite"):
        assert_close(updates[f"{kind}, {name}"], plain)
    for name, hidden in (
        ("masked", STREAM["square"]),
        ("frozen", jnp.zeros_like(STREAM["square"])),
    ):
        found = updates[f"{kind}, {name}"]
        assert_close(found, {**plain, "square": hidden})
    # the mean gradient of two steps, at every second
    for x, steps in zip(
        jax.tree.leaves(updates[f"{kind}, multi_steps"]),
        jax.tree.leaves(plain),
        strict=True,
    ):
        assert not np.any(x[::2]) and x.shape == steps.shape
    state = optax.tree.get(states[f"{kind}, multi_steps"], "step")
    assert state == 2


@pytest.mark.parametrize("kind", KINDS)
def test_sides_that_are_too_wide_keep_a_diagonal(kind):
    states, updates = results()
    state = states[f"{kind}, plain"][0]
    parts = state.information.squares.parts
    shapes = jax.tree.map(jnp.shape, parts["wide"])
    assert tuple(shapes) == ((1, 3, 3), (1, 6))
    assert parts["widest"].shape == (6, 7)
    # the array whose sides both are too wide has Adam
    adam = optax.adam(0.1, 0.95, 0.95)
    after, expected = adam.init(PARAMS), []
    for k in range(4):
        gradient = {name: x[k] for name, x in STREAM.items()}
        update, after = adam.update(gradient, after)
        expected.append(update["widest"])
    np.testing.assert_allclose(
        updates[f"{kind}, plain"]["widest"], np.stack(expected), rtol=1e-6
    )


@pytest.mark.parametrize("kind", KINDS)
def test_squares_of_gradients_are_no_information(kind):
    states, _ = results()
    for name in ("plain", "masked", "injected"):
        with pytest.raises(ValueError, match="are no Fisher information"):
            get_information(states[f"{kind}, {name}"], 10)


def test_what_is_not_finite_moves_nothing_and_is_counted():
    wide = STREAM["wide"].at[1, 0, 0].set(jnp.nan)
    huge = STREAM["square"].at[2, 0, 0].set(1e200)  # whose square is not
    states, updates = run({**STREAM, "wide": wide, "square": huge})
    for kind in KINDS:
        state = states[f"{kind}, plain"][0]
        assert (state.num_skipped, state.step) == (2, 2)
        for leaf in jax.tree.leaves(
            (updates[f"{kind}, plain"], states[f"{kind}, plain"])
        ):
            assert bool(jnp.all(jnp.isfinite(leaf)))
        for leaf in jax.tree.leaves(updates[f"{kind}, plain"]):
            assert not np.any(leaf[1:3])


@pytest.mark.parametrize("kind", KINDS)
def test_init_needs_no_arrays_and_map_params_sees_what_is_like_them(kind):
    optimizer = KINDS[kind](**SMALL)
    state = optimizer.init(PARAMS)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), PARAMS)
    types = jax.tree.map(jax.typeof, state)
    assert jax.tree.map(jax.typeof, optimizer.init(shapes)) == types
    evaluated = jax.eval_shape(optimizer.init, PARAMS)
    assert jax.tree.structure(evaluated) == jax.tree.structure(state)
    mapped = optax.tree.map_params(optimizer, lambda x: x + 1, state)
    np.testing.assert_array_equal(mapped[0].momentum["wide"], np.ones((3, 6)))
    assert mapped[0].step == 0
    for name in state[0]._fields:
        assert optax.tree.get(state, name) is not None


@pytest.mark.slow_cases
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("soap", "bfloat16"), ("shampoo", "float16"), ("soap", "float32")],
)
def test_types_are_stable_through_a_conditional_and_compiled_once(kind, dtype):
    narrow = {"store": "bfloat16", "mu_dtype": "bfloat16"} if dtype != "float32" else {}
    optimizer = KINDS[kind](**SMALL, **narrow, weight_decay=0.1, mask=SHOWN)
    params = jax.tree.map(lambda x: x.astype(dtype), PARAMS)
    state = optimizer.init(params)
    part = state[0].information.squares.parts["square"]
    assert {x.dtype for x in part} == {jnp.dtype("float32")}
    kept = jax.tree.leaves(state[0].factorisation)
    assert {x.dtype for x in kept} == {jnp.dtype(narrow.get("store", "float32"))}

    @functools.partial(cases.compiled, donate_argnums=1)
    def step(params, state, take):
        def update():
            return optimizer.update(params, state, params)

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


@pytest.mark.slow
def test_a_vmap_of_scans_is_each_run_alone():
    optimizers = [make(**SMALL) for make in KINDS.values()]

    def train(params):
        def step(carry, _):
            found = [
                (opt.update(p, state, p), p)
                for opt, (p, state) in zip(optimizers, carry, strict=True)
            ]
            return [(optax.apply_updates(p, u), s) for (u, s), p in found], None

        start = [(params, opt.init(params)) for opt in optimizers]
        return jax.lax.scan(step, start, length=3)[0]

    params = {name: PARAMS[name] for name in ("bias", "square")}
    both = jax.tree.map(lambda x: jnp.stack([x, 1.5 * x]), params)
    together, alone = cases.compiled(
        lambda both: (jax.vmap(train)(both), train(jax.tree.map(lambda x: x[1], both)))
    )(both)
    assert_close(jax.tree.map(lambda x: x[1], together), alone)


# ---- flax, unchanged


class Network(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(jnp.tanh(nn.Dense(4)(x)))


class Model(nnx.Module):
    def __init__(self, rngs):
        self.hidden = nnx.Linear(2, 4, rngs=rngs)
        self.out = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        return self.out(jnp.tanh(self.hidden(x)))


def loss_of(logits):
    labels = cases.NETWORK_BATCH[1]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


@pytest.mark.parametrize("kind", KINDS)
def test_the_plain_train_state_and_its_bytes(kind):
    module, x = Network(), cases.NETWORK_BATCH[0]
    params = module.init(jax.random.key(0), x)["params"]
    tx = KINDS[kind](**SMALL)
    state = train_state.TrainState.create(apply_fn=module.apply, params=params, tx=tx)

    @cases.compiled
    def step(state):
        value, gradients = jax.value_and_grad(
            lambda p: loss_of(state.apply_fn({"params": p}, x))
        )(state.params)
        return state.apply_gradients(grads=gradients), value

    losses = []
    for _ in range(4):
        state, value = step(state)
        losses.append(float(value))
    assert losses[-1] < losses[0]
    restored = serialization.from_bytes(state, serialization.to_bytes(state))
    chex.assert_trees_all_equal(step(restored)[0].params, step(state)[0].params)


@pytest.mark.parametrize("kind", KINDS)
def test_the_plain_nnx_optimizer(kind):
    model, x = Model(nnx.Rngs(0)), cases.NETWORK_BATCH[0]
    optimizer = nnx.Optimizer(model, KINDS[kind](**SMALL), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        value, gradients = nnx.value_and_grad(lambda model: loss_of(model(x)))(model)
        optimizer.update(model, gradients)
        return value

    losses = [float(step(model, optimizer)) for _ in range(4)]
    assert losses[-1] < losses[0]


# ---- what does not fit


@pytest.mark.parametrize("kind", KINDS)
def test_every_option_is_checked(kind):
    wrong = {
        "b1": (1.0, r"b1 must be in \[0, 1\); got 1.0"),
        "b2": (1.5, r"b2 must be in \[0, 1\]; got 1.5"),
        "eps": (-1.0, "eps must be finite and not negative; got -1.0"),
        "weight_decay": (-0.1, "weight_decay must be finite .* got -0.1"),
        "mu_dtype": ("int32", "mu_dtype is None or a floating-point type.* 'int32'"),
        "store": ("half-ish", "store is None or a floating-point type.* 'half-ish'"),
        "inverse_period": (
            0,
            "inverse_period must be a positive whole number .* got 0",
        ),
        "widest": (-1, "widest must be a whole number .* got -1.*static_args"),
    }
    own = {
        "soap": {"decomposition": (1, "decomposition is True or False; got 1")},
        "shampoo": {
            "exponent": (0.3, "exponent is 1/4 or 1/2; got 0.3; .*static_args"),
            "graft": ("lion", 'graft is None, "adam" or "sgd"; got \'lion\''),
            "damping": (-1e-3, "damping must be finite and not negative; got -0.001"),
        },
    }
    for name, (value, message) in (wrong | own[kind]).items():
        with pytest.raises(ValueError, match=message):
            KINDS[kind](**{name: value})
    static = optax.inject_hyperparams(KINDS[kind].func)
    with pytest.raises(ValueError, match=r"inverse_period must be .*static_args"):
        static(0.1, inverse_period=5).init(PARAMS)


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_and_updates_that_do_not_fit(kind):
    make = KINDS[kind]
    with pytest.raises(
        ValueError, match="real floating-point arrays; a has dtype int32"
    ):
        make().init({"a": jnp.zeros(2, jnp.int32)})
    with pytest.raises(ValueError, match="no parameter has the name 'layers'"):
        make(stacked=["layers"]).init(PARAMS)
    with pytest.raises(
        ValueError, match=r"three axes or more; square has shape \(3, 3\)"
    ):
        make(stacked=["square"]).init(PARAMS)
    state = make().init(PARAMS)
    other = {name: PARAMS[name] for name in SHAPES if name != "wide"}
    with pytest.raises(ValueError, match=r"initialised with another tree .* at wide"):
        make().update(other, state)
    with pytest.raises(ValueError, match="must be one tree; at wide"):
        make().update(PARAMS, state, other)
