"""Factors and bases over eight devices: `python eight_devices_placed.py NAME AXES`.

A program of its own, since a process simulates devices from its start or not at all.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import fisherflow_jax as ff
from fisherflow_jax._ground.trees import parameter_name

WIDTH, HIDDEN, WORDS, BLOCKS, STEPS = 16, 32, 16, 2, 10
SPREAD = P("data")


def shapes(width, hidden, words, blocks):
    attention = dict.fromkeys("qkvo", (width, width))
    block = attention | {"up": (width, hidden), "down": (hidden, width)}
    return {
        "table": (words, width),
        "blocks": [block] * blocks,
        "head": (width, words),
    }


def is_shape(node):
    return isinstance(node, tuple)


def network(params, x):
    """A transformer without shardings of its own."""
    h = params["table"][x]
    for block in params["blocks"]:
        normed = h * jax.lax.rsqrt(jnp.mean(jnp.square(h), -1, keepdims=True) + 1e-5)
        q, k, v = (normed @ block[name] for name in "qkv")
        scores = jnp.einsum("bsd,btd->bst", q, k) / np.sqrt(h.shape[-1])
        h = h + jax.nn.softmax(scores) @ v @ block["o"]
        h = h + jnp.tanh(h @ block["up"]) @ block["down"]
    return h @ params["head"]


def drawn(tree):
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(size=shape) / np.sqrt(shape[0])),
        tree,
        is_leaf=is_shape,
    )


PARAMS = drawn(shapes(WIDTH, HIDDEN, WORDS, BLOCKS))
TOKENS = np.random.default_rng(1).integers(0, WORDS, (16, 8))
BATCH = TOKENS, np.roll(TOKENS, -1, 1)
LIKELIHOOD = ff.likelihoods.categorical()
LAYERS = ff.layers.find_layers(network, PARAMS, TOKENS)


def kfac(layers=LAYERS, **options):
    period = {"inverse_period": 3, "damping": 1e-2}
    return ff.kfac(0.1, network, LIKELIHOOD, layers, key=0, **(period | options))


# sides of more rows than a first gradient has rank have no eigenbasis of their own, in
# which two runs could agree
MAKE = {
    "kfac": kfac,
    "last": kfac,  # by a function of the shape, which no compiler would guess
    "turns": lambda **o: kfac(spread_inverses=True, **o),
    "packed": lambda **o: kfac(store="float32", **o),
    "ekfac": lambda **o: kfac(eigenvalue_correction=True, **o),
    "exact": lambda **o: kfac(factorise=ff.transforms.factorise, **o),
    "soap": lambda **o: ff.soap(0.01, inverse_period=3, widest=WIDTH, **o),
    "shampoo": lambda **o: ff.shampoo(0.01, inverse_period=3, damping=1e-2, **o),
}


def trained(optimizer, params, batch):
    """After some steps: parameters, the state at first and at last, and the step."""
    gradient = jax.grad(ff.negative_log_likelihood(network, LIKELIHOOD))
    if jax.sharding.get_abstract_mesh().explicit_axes:
        # what a model without shardings of its own needs where parameters have some
        own = jax.tree.map(lambda x: x.sharding, params)
        gradient = jax.sharding.auto_axes(gradient, out_sharding=own)

    @jax.jit
    def step(params, state, batch):
        updates, state = optimizer.update(
            gradient(params, batch), state, params, batch=batch
        )
        return optax.apply_updates(params, updates), state

    start = state = optimizer.init(params)
    for _ in range(STEPS):
        params, state = step(params, state, batch)
    return params, start, state, step


def first_divided(shape, number=8):
    """What `factor_sharding="data"` says, written down once more."""
    for axis, size in enumerate(shape):
        if size % number == 0:
            return (None,) * axis + ("data",)
    return ()


def last_divided(shape, number=8):
    """The last axis of matrices, if it divides."""
    if len(shape) == 3 and shape[-1] % number == 0:
        return (None, None, "data")
    return ()


def check_placed(state, params, rule):
    """Every array of a state lies as the rule says, or as its parameter does."""
    like_params = {"momentum", "trace"}
    for path, x in jax.tree_util.tree_leaves_with_path(state):
        fields = {getattr(key, "name", None) for key in path}
        expected = ("data",) if fields & like_params else rule(x.shape)
        if x.ndim:
            spec = getattr(x.sharding, "spec", ())
            spec = tuple(part[0] if is_shape(part) else part for part in spec)
            while spec and spec[-1] is None:
                spec = spec[:-1]
            assert spec == expected, (parameter_name(path), x.shape, spec, expected)


def without_layout(state, mesh):
    """The state as a restart may bring it: all but the momentum whole everywhere."""

    def put(path, x):
        kept = {getattr(key, "name", None) for key in path} & {"momentum", "trace"}
        return x if kept else jax.device_put(x, NamedSharding(mesh, P()))

    return jax.tree_util.tree_map_with_path(put, state)


def on_a_device(tree):
    device = jax.devices()[0]
    return sum(
        shard.data.nbytes
        for leaf in jax.tree.leaves(tree)
        for shard in leaf.addressable_shards
        if shard.device == device
    )


def check(name, kind):
    """The numbers of one device; and bytes, as told and as compiled."""
    expected, _, _, _ = trained(MAKE[name](), PARAMS, jax.tree.map(jnp.asarray, BATCH))
    loss = ff.negative_log_likelihood(network, LIKELIHOOD)
    before, after = (float(loss(p, BATCH)) for p in (PARAMS, expected))
    assert after < 0.8 * before, (before, after)  # of a run that diverges nothing holds
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    rows = NamedSharding(mesh, SPREAD)
    rule, given = first_divided, "data"
    if name == "last":
        rule, given = last_divided, lambda shape: P(*last_divided(shape))
    optimizer = MAKE[name](factor_sharding=given)
    if kind is AxisType.Explicit:
        jax.set_mesh(mesh)
    params, batch = jax.device_put((PARAMS, BATCH), rows)
    found, start, state, step = trained(optimizer, params, batch)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-5),
        found,
        expected,
    )
    check_placed(start, params, rule)
    check_placed(state, params, rule)
    check_bytes(optimizer, step, params, state, batch, mesh)
    if kind is AxisType.Auto:  # explicit axes keep the layout that a state has
        _, after = step(params, without_layout(state, mesh), batch)
        check_placed(after, params, rule)
    return max(
        float(np.abs(np.asarray(x) - np.asarray(y)).max())
        for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    )


def check_bytes(optimizer, step, params, state, batch, mesh):
    laid = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), params
    )
    told = ff.transforms.bytes_per_device(optimizer, laid, mesh)
    assert told == on_a_device(state), (told, on_a_device(state))
    compiled = step.lower(params, state, batch).compile().memory_analysis()
    others = on_a_device((params, batch))
    assert compiled.argument_size_in_bytes == told + others
    alone = sum(x.nbytes for x in jax.tree.leaves(state))
    assert told < alone / 7
    print(f"bytes of the state: {alone} in all, {told} a device", flush=True)


def check_large():
    """From shapes alone: of 1.2 billion parameters nothing of 1 MiB is whole."""
    tree = shapes(2048, 8192, 50304, 16)
    mesh = jax.make_mesh((8,), ("data",))
    rows = NamedSharding(mesh, SPREAD)
    params = jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s, jnp.float32, sharding=rows),
        tree,
        is_leaf=is_shape,
    )
    with jax.set_mesh(None):
        plain = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
        tokens = jax.ShapeDtypeStruct((8, 128), jnp.int32)
        layers = ff.layers.find_layers(network, plain, tokens)
    for make in (
        lambda **o: kfac(layers, **o),
        lambda **o: kfac(layers, eigenvalue_correction=True, **o),
        lambda **o: ff.soap(0.01, **o),
    ):
        optimizer = make(factor_sharding="data")
        with jax.set_mesh(mesh):
            state = jax.eval_shape(optimizer.init, params)
        for path, x in jax.tree_util.tree_leaves_with_path(state):
            if x.size * x.dtype.itemsize >= 2**20:
                share = np.prod(x.sharding.shard_shape(x.shape))
                assert share == x.size // 8, (parameter_name(path), x)


if __name__ == "__main__":
    assert jax.device_count() == 8
    if sys.argv[1] == "large":
        check_large()
    else:
        kinds = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}
        print("greatest difference:", check(sys.argv[1], kinds[sys.argv[2]]))
    print("the same")
