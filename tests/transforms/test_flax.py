"""Training states of flax, and checkpoints."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint
import pytest
from flax import nnx, serialization
from flax.training import train_state

import fisherflow_jax as ff
import transform_cases as cases
from fisherflow_jax.transforms import get_information

X, Y = (jnp.asarray(part) for part in cases.NETWORK_BATCH)
LIKELIHOOD = ff.likelihoods.categorical()


def kfac(apply_fn, params, **options):
    layers = ff.layers.find_layers(apply_fn, params, X)
    options = {"damping": 0.01, "inverse_period": 2, "key": 0} | options
    return ff.kfac(0.05, apply_fn, LIKELIHOOD, layers, **options)


class Network(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = jnp.tanh(nn.Dense(4)(x))
        return nn.Dense(3)(x)


@pytest.fixture(scope="module")
def linen():
    """A training state after two steps, and the compiled step."""
    module = Network()
    variables = cases.compiled(module.init)(jax.random.key(0), X)

    def apply_fn(params, x):
        return module.apply({"params": params}, x)

    loss = ff.negative_log_likelihood(apply_fn, LIKELIHOOD)

    @cases.compiled
    def step(state, batch):
        value, grads = jax.value_and_grad(loss)(state.params, batch)
        return state.apply_gradients(grads=grads, batch=batch), value

    params = variables["params"]
    # everything that K-FAC may keep: factors, second moments and eigenbases
    tx = kfac(apply_fn, params, eigenvalue_correction=True)
    state = ff.flax.TrainState.create(apply_fn=apply_fn, params=params, tx=tx)
    losses = []
    for _ in range(3):
        state, value = step(state, (X, Y))
        losses.append(float(value))
    assert losses[2] < losses[0]
    return state, step


@pytest.mark.slow
def test_a_training_state_that_passes_the_batch_on(linen):
    state, _ = linen
    information = get_information(state.opt_state, 12)
    entries = jax.eval_shape(ff.information.diagonal, information, state.params)
    assert entries["Dense_0"]["kernel"].shape == (2, 4)
    assert float(ff.information.trace(information)) > 0


def test_the_plain_train_state_drops_the_batch(linen):
    state, _ = linen
    plain = train_state.TrainState.create(
        apply_fn=state.apply_fn, params=state.params, tx=state.tx
    )
    with pytest.raises(
        ValueError, match=r"TrainState\.apply_gradients is one \(ff.flax.TrainState"
    ):
        plain.apply_gradients(grads=state.params, batch=(X, Y))


def test_the_training_state_is_that_of_flax_otherwise(linen):
    class Counting(ff.flax.TrainState):
        seen: int = 0

    state, _ = linen
    grads = optax.tree.ones_like(state.params)
    kinds = [train_state.TrainState, Counting]
    adam = {"apply_fn": None, "params": state.params, "tx": optax.adam(0.1)}
    theirs, ours = (kind.create(**adam) for kind in kinds)
    theirs = theirs.apply_gradients(grads=grads)
    ours = ours.apply_gradients(grads=grads, batch=(X, Y), seen=12)
    jax.tree.map(np.testing.assert_array_equal, theirs.params, ours.params)
    assert type(ours) is Counting and (ours.step, ours.seen) == (1, 12)
    assert ours.tx is adam["tx"]
    # the loss and a key reach the update, too
    told = []

    def update(updates, state, params=None, **extra):
        told.append(extra)
        return updates, state

    tx = optax.GradientTransformationExtraArgs(lambda params: (), update)
    ours = ff.flax.TrainState.create(**(adam | {"tx": tx}))
    ours.apply_gradients(grads=grads, batch=(X, Y), value=0.5, key=3)
    assert told == [{"batch": (X, Y), "value": 0.5, "key": 3}]


def test_orbax_restores_and_continues_bit_for_bit(linen, tmp_path):
    state, step = linen
    checkpointer = orbax.checkpoint.StandardCheckpointer()
    saved = {"params": state.params, "opt_state": state.opt_state}
    checkpointer.save(tmp_path / "run", saved)
    checkpointer.wait_until_finished()
    shapes = jax.tree.map(orbax.checkpoint.utils.to_shape_dtype_struct, saved)
    restored = checkpointer.restore(tmp_path / "run", shapes)
    checkpointer.close()
    assert_continues(step, state, state.replace(**restored))


def test_flax_serialization_continues_bit_for_bit(linen):
    state, step = linen
    written = serialization.to_bytes(state)
    blank = ff.flax.TrainState.create(
        apply_fn=state.apply_fn,
        params=optax.tree.zeros_like(state.params),
        tx=state.tx,
    )
    restored = serialization.from_bytes(blank, written)
    assert restored.step == 3
    assert_continues(step, state, restored)


def assert_continues(step, state, restored):
    for x, y in zip(
        jax.tree.leaves(step(restored, (X, Y))),
        jax.tree.leaves(step(state, (X, Y))),
        strict=True,
    ):
        np.testing.assert_array_equal(x, y)


def test_nnx_optimizer():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.hidden = nnx.Linear(2, 4, rngs=rngs)
            self.out = nnx.Linear(4, 3, rngs=rngs)

        def __call__(self, x):
            return self.out(jnp.tanh(self.hidden(x)))

    model = Model(nnx.Rngs(0))
    graph, params = nnx.split(model, nnx.Param)

    def apply_fn(params, x):
        return nnx.merge(graph, params)(x)

    tx = kfac(apply_fn, params)
    assert tx.init(params)[0].step == 0  # on a State, too
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, batch):
        def loss(model):
            return optax.softmax_cross_entropy_with_integer_labels(
                model(batch[0]), batch[1]
            ).mean()

        value, grads = nnx.value_and_grad(loss)(model)
        optimizer.update(model, grads, batch=batch)
        return value

    losses = [float(step(model, optimizer, (X, Y))) for _ in range(3)]
    assert losses[2] < losses[0]
    with pytest.raises(ValueError, match=r"nnx\.as_pure\(optimizer\.opt_state\)"):
        get_information(optimizer.opt_state, 12)
    information = get_information(nnx.as_pure(optimizer.opt_state), 12)
    # the inputs of the hidden layer and its bias's ones, whatever the parameters
    rows = np.concatenate([X, np.ones((12, 1))], axis=1)
    (name,) = (n for n in information.input_factors if "hidden" in n)
    np.testing.assert_allclose(
        information.input_factors[name][0], rows.T @ rows, rtol=1e-5
    )


@pytest.mark.slow
def test_nnx_keeps_blocks_of_named_groups():
    """Two steps, as of a plain tree: flax keeps no named tuple beside a parameter."""
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    graph, params = nnx.split(model, nnx.Param)

    def apply_fn(params, x):
        return nnx.merge(graph, params)(x)

    def plain_fn(params, x):
        return x @ params["kernel"] + params["bias"]

    def descent(apply_fn):
        structure = ff.structures.block(lambda name: name[:1])
        estimator = ff.estimators.exact(apply_fn, LIKELIHOOD, structure)
        return ff.natural_gradient(0.1, estimator, inverse_period=2)

    tx = descent(plain_fn)
    plain = jax.tree.map(jnp.copy, nnx.to_pure_dict(params))
    state = tx.init(plain)
    optimizer = nnx.Optimizer(model, descent(apply_fn), wrt=nnx.Param)
    step = nnx.jit(lambda model, opt, g: opt.update(model, g, batch=(X, Y)))
    for _ in range(2):
        gradients = jax.tree.map(jnp.sin, nnx.state(model, nnx.Param))
        step(model, optimizer, gradients)
        updates, state = tx.update(
            jax.tree.map(jnp.sin, plain), state, plain, batch=(X, Y)
        )
        plain = optax.apply_updates(plain, updates)
    found = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5)
