"""The table of layers as a static node of states: JAX, Optax, flax and Orbax."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint
import pytest
from flax import serialization

import fisherflow_jax as ff
from layer_cases import draw

PARAMS = {"b": draw(3, seed=1), "gain": draw(3, seed=2), "w": draw(2, 3, seed=3)}
X = draw(6, 2, seed=4)
BATCH = X, np.arange(6) % 3


def apply_fn(params, x):
    return params["gain"] * (x @ params["w"] + params["b"])


LAYERS = ff.layers.find_layers(apply_fn, PARAMS, X)
# most of the time goes into compiling, and tiny arrays gain nothing from it
FAST = {"xla_backend_optimization_level": 0}
jit = functools.partial(jax.jit, compiler_options=FAST)
LIKELIHOOD = ff.likelihoods.categorical()
ESTIMATOR = ff.estimators.exact(apply_fn, LIKELIHOOD, ff.structures.kronecker(LAYERS))
INFORMATION = jit(ESTIMATOR)(PARAMS, BATCH)
GRADIENTS = jax.tree.map(np.ones_like, PARAMS)


def scaled(damping=0.1):
    return ff.scale_by_fisher(
        ESTIMATOR, memory=ff.memories.exponential(0.9), damping=damping
    )


def same(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for x, y in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_array_equal(x, y)
        assert np.asarray(x).dtype == np.asarray(y).dtype


@pytest.fixture(scope="module")
def state():
    """After one step."""
    update = jit(scaled().update)
    return update(GRADIENTS, scaled().init(PARAMS), PARAMS, batch=BATCH)[1]


def tables(tree):
    """The layers tables within a tree."""
    found = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, ff.layers.Layers))
    return [x for x in found if isinstance(x, ff.layers.Layers)]


def test_it_has_no_leaves_and_a_hash():
    again = ff.layers.find_layers(apply_fn, PARAMS, X)
    assert jax.tree.leaves(LAYERS) == [] and again is not LAYERS
    assert again == LAYERS and hash(again) == hash(LAYERS)
    assert jax.tree.structure(again) == jax.tree.structure(LAYERS)


def test_transformations_of_jax_keep_it():
    @jit
    def run(information, flag):
        doubled = jax.lax.cond(
            flag, lambda x: ff.information.scale(x, 2.0), lambda x: x, information
        )
        stacked = jax.vmap(lambda c: ff.information.scale(information, c))(jnp.ones(3))
        last, _ = jax.lax.scan(lambda c, _: (c, None), doubled, length=2)
        return last, stacked

    doubled, stacked = run(INFORMATION, True)
    same(doubled, jax.tree.map(lambda x: 2 * x, INFORMATION)._replace(**kept(doubled)))
    assert stacked.layers == doubled.layers == LAYERS
    assert stacked.input_factors["w"].shape == (3, 1, 3, 3)
    shapes = jax.eval_shape(lambda x: x, INFORMATION)
    assert shapes.layers == LAYERS
    assert jax.tree.structure(shapes) == jax.tree.structure(INFORMATION)


def kept(information):
    """What `scale` treats in its own way: the factors share one multiple."""
    return {
        "input_factors": information.input_factors,
        "output_factors": information.output_factors,
        "num_observations": information.num_observations,
    }


def test_equal_tables_compile_once():
    count = 0

    @jit
    def run(information):
        nonlocal count
        count += 1
        return information.num_observations

    run(INFORMATION)
    run(INFORMATION._replace(layers=ff.layers.find_layers(apply_fn, PARAMS, X)))
    assert count == 1


def test_tree_functions_of_optax(state):
    mapped = optax.tree.map_params(scaled(), lambda x: x * 0, state)
    assert tables(mapped) == tables(state) == [LAYERS]
    assert list(optax.tree.get(state, "input_factors")) == ["w"]
    changed = optax.tree.set(state, damping=jnp.asarray(0.5))
    assert optax.tree.get(changed, "damping") == 0.5
    assert tables(changed) == [LAYERS]


@pytest.mark.slow_cases
@pytest.mark.parametrize(
    "wrap",
    [
        lambda: optax.MultiSteps(scaled(), 2).gradient_transformation(),
        lambda: optax.masked(scaled(), {"b": True, "gain": True, "w": True}),
        lambda: optax.apply_if_finite(scaled(), 3),
        lambda: optax.inject_hyperparams(
            lambda damping, scale: optax.chain(scaled(damping), optax.scale(scale))
        )(damping=0.1, scale=-1.0),
    ],
    ids=["MultiSteps", "masked", "apply_if_finite", "inject_hyperparams"],
)
def test_wrappers_of_optax(wrap):
    wrapped = wrap()
    state = wrapped.init(PARAMS)
    assert LAYERS in tables(state)

    @jit
    def run(state):
        for _ in range(2):
            updates, state = wrapped.update(
                GRADIENTS, state, PARAMS, batch=BATCH, model_params=PARAMS
            )
        return updates, state

    updates, after = run(state)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(updates))


def test_flax_serialization_is_bit_for_bit(state):
    written = serialization.to_bytes(state)
    same(serialization.from_bytes(scaled().init(PARAMS), written), state)
    as_dict = serialization.to_state_dict(INFORMATION)
    assert as_dict["layers"]["b"].startswith("a bias of w ")
    same(serialization.from_state_dict(INFORMATION, as_dict), INFORMATION)


def test_a_checkpoint_of_other_layers_is_refused():
    written = serialization.to_bytes(INFORMATION)
    other = ff.layers.find_layers(
        lambda p, x: p["gain"] * jnp.tanh(x @ p["w"] + 2 * p["b"]), PARAMS, X
    )
    with pytest.raises(ValueError, match=r" b is a bias of .* no layer \(used in"):
        serialization.from_bytes(INFORMATION._replace(layers=other), written)


def test_orbax_is_bit_for_bit(state, tmp_path):
    saved = {"params": PARAMS, "opt_state": state}
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "run", saved)
        checkpointer.wait_until_finished()
        shapes = jax.tree.map(orbax.checkpoint.utils.to_shape_dtype_struct, saved)
        restored = checkpointer.restore(tmp_path / "run", shapes)
    same(restored["opt_state"], state)


class Network(nn.Module):
    """With all that makes examples interact."""

    train: bool = True

    @nn.compact
    def __call__(self, x):
        h = nn.BatchNorm(not self.train, momentum=0.8)(nn.Dense(4)(x))
        return nn.Dense(3)(nn.Dropout(0.3, deterministic=not self.train)(nn.relu(h)))


@pytest.mark.slow
def test_training_with_batch_norm_and_dropout_of_flax():
    """Statistics and the key of the masks are handed over in `ff.Shared`."""
    module = Network()
    key = jax.random.key(0)
    x = draw(24, 2, seed=7)
    targets = (x[:, 0] > 0).astype(int) + (x[:, 1] > 0)
    shapes = jax.eval_shape(module.init, {"params": key, "dropout": key}, x)
    drawn = jax.tree.map(lambda leaf: draw(*leaf.shape, seed=8), shapes["params"])
    start = jax.tree.map(lambda leaf: np.zeros(leaf.shape), shapes["batch_stats"])

    def run(params, inputs):
        variables = {"params": params, "batch_stats": inputs["statistics"]}
        return module.apply(
            variables,
            inputs["x"],
            rngs={"dropout": inputs["mask"]},
            mutable=["batch_stats"],
        )

    def outputs(params, inputs):
        return run(params, inputs)[0]

    def inputs_of(statistics, key):
        return {
            "x": x,
            "statistics": ff.Shared(statistics),
            "mask": ff.Shared(key),
        }

    layers = ff.layers.find_layers(outputs, drawn, inputs_of(start, key))
    assert layers.batched and len(layers.layers) == 2
    optimizer = ff.kfac(0.05, outputs, LIKELIHOOD, layers, damping=0.1, key=1)
    loss = ff.negative_log_likelihood(outputs, LIKELIHOOD)

    @jit
    def train(params):
        def step(carry, key):
            params, statistics, state = carry
            batch = inputs_of(statistics, key), targets
            value, gradients = jax.value_and_grad(loss)(params, batch)
            updates, state = optimizer.update(gradients, state, params, batch=batch)
            plain = jax.tree.map(
                lambda part: part.tree if isinstance(part, ff.Shared) else part,
                batch[0],
                is_leaf=lambda part: isinstance(part, ff.Shared),
            )
            statistics = run(params, plain)[1]["batch_stats"]
            params = optax.apply_updates(params, updates)
            return (params, statistics, state), value

        carry = params, start, optimizer.init(params)
        return jax.lax.scan(step, carry, jax.random.split(key, 40))

    (params, statistics, _), losses = train(drawn)
    assert np.all(np.isfinite(losses))
    assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5])
    evaluated = Network(train=False).apply(
        {"params": params, "batch_stats": statistics}, x
    )
    assert np.mean(np.argmax(evaluated, 1) == targets) > 0.8
