"""Eight simulated devices give the numbers of one."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

PROGRAM = """
import jax, jax.numpy as jnp, numpy as np, optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import fisherflow_jax as ff
import transform_cases as cases
from fisherflow_jax.transforms import adam, clip_by_kl, scale_by_fisher

shapes = {"b": (8,), "out": (8, 3), "w": (2, 8)}
params = {k: np.asarray(cases.draw(*s, seed=0), np.float32) for k, s in shapes.items()}
x = np.asarray(cases.draw(16, 2, seed=5), np.float32)
batch = x, np.arange(16, dtype=np.int32) % 3
optimizer = optax.chain(
    scale_by_fisher(
        ff.estimators.exact(*cases.MODEL, ff.structures.diagonal()),
        memory=ff.memories.exponential(0.9), damping=0.1, period=2,
        momentum=optax.ema(0.9)),
    clip_by_kl(*cases.MODEL, max_kl=0.01),
    optax.scale(-1.0))

def loss(params, batch):
    logits = cases.network(params, batch[0])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()

@jax.jit
def step(carry, batch):
    params, state = carry
    grads = jax.grad(loss)(params, batch)
    updates, state = optimizer.update(grads, state, params, batch=batch)
    return optax.apply_updates(params, updates), state

def train(params, batch):
    carry = params, optimizer.init(params)
    mesh = jax.sharding.get_mesh()
    if not mesh.empty:  # to where the first step would bring it
        carry = jax.tree.map(
            lambda x: x if x.ndim else jax.device_put(x, NamedSharding(mesh, P())),
            carry)
    for _ in range(3):
        before, carry = carry, step(carry, batch)
        types = [jax.tree.map(jax.typeof, c) for c in (before, carry)]
        assert types[0] == types[1], types
    return carry

alone = train(params, batch)
assert jax.device_count() == 8
for kind, spec in (
    (AxisType.Auto, P("data")), (AxisType.Explicit, P())
):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    with jax.set_mesh(mesh):
        put = lambda tree, spec: jax.tree.map(
            lambda x: jax.device_put(x, NamedSharding(mesh, spec)), tree)
        spread = put(params, P()) | put({"out": params["out"]}, spec)
        shared = train(spread, put(batch, P("data")))
        for one, many in zip(jax.tree.leaves(alone), jax.tree.leaves(shared)):
            np.testing.assert_allclose(np.asarray(many), np.asarray(one), rtol=1e-4,
                                       atol=1e-6)
        if kind is AxisType.Explicit:
            # states are laid out as the parameters are, and stay so
            spread = spread | put({"out": params["out"]}, P("data"))
            state = adam(0.1).init(spread)
            moment = state[0].information.squares.entries["out"]
            assert "data" in str(jax.typeof(moment))
            _, after = jax.jit(adam(0.1).update)(spread, state)
            assert jax.tree.map(jax.typeof, after) == jax.tree.map(jax.typeof, state)
print("the same")
"""


def test_a_sharded_batch_and_sharded_parameters_in_auto_and_explicit_meshes():
    environment = dict(os.environ)
    environment["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
    environment["JAX_PLATFORMS"] = "cpu"
    environment["PYTHONPATH"] = str(Path(__file__).parents[1])
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PROGRAM)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "the same" in result.stdout
