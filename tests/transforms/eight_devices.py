"""Sharded training and accumulation against one device: `python eight_devices.py`.

A program of its own, since a process simulates devices from its start or not at all.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import fisherflow_jax as ff
from fisherflow_jax._ground.trees import parameter_name

COUNT, CLASSES = 16, 4
LIKELIHOOD = ff.likelihoods.categorical()
EXACT = {"rtol": 1e-9, "atol": 1e-12}


def draw(*shape, seed):
    return np.random.default_rng(seed).normal(size=shape) / np.sqrt(shape[0])


def explicitly(*axes):
    """A sharding where axes are explicit, and None where the compiler places all."""
    explicit = jax.sharding.get_abstract_mesh().explicit_axes
    return P(*axes) if explicit else None


def mlp(params, x):
    # two axes cut one product: in an explicit mesh it needs to be told its sharding
    hidden = jnp.tanh(x @ params["w"] + params["b"])
    return jnp.einsum(
        "bh,hc->bc", hidden, params["out"], out_sharding=explicitly("data")
    )


def transformer(params, x):
    """Layer normalisation, attention, and layers; knows nothing of shardings."""
    centred = x - jnp.mean(x, -1, keepdims=True)
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(centred), -1, keepdims=True) + 1e-3)
    normed = centred * scale * params["scale"] + params["shift"]
    q, k, v = jnp.einsum("btd,dnhk->nbthk", normed, params["qkv"])
    attention = jax.nn.softmax(jnp.einsum("bthk,bshk->bhts", q, k))
    mixed = jnp.einsum("bhts,bshk->bthk", attention, v)
    x = x + jnp.einsum("bthk,hkd->btd", mixed, params["o"])
    return jnp.tanh(x @ params["up"] + params["b"]) @ params["down"]


INPUTS = {"mlp": 3 * draw(COUNT, 4, seed=1), "transformer": draw(COUNT, 3, 4, seed=2)}
TARGETS = {
    "mlp": np.arange(COUNT) % CLASSES,
    "transformer": np.arange(COUNT * 3).reshape(COUNT, 3) % CLASSES,
}
APPLY = {"mlp": mlp, "transformer": transformer}
PARAMS = {
    "mlp": {
        "b": draw(8, seed=3),
        "out": draw(8, CLASSES, seed=4),
        "w": draw(4, 8, seed=5),
    },
    "transformer": {
        "b": draw(8, seed=6),
        "down": draw(8, CLASSES, seed=7),
        "o": draw(2, 2, 4, seed=8),
        "qkv": draw(4, 3, 2, 2, seed=9),
        "scale": np.ones(4),
        "shift": np.zeros(4),
        "up": draw(4, 8, seed=10),
    },
}
SHARDINGS = {
    "b": P("model"),
    "down": P("model", None),
    "o": P("model", None, None),
    "out": P("model", None),
    "qkv": P(None, None, "model", None),
    "scale": P(None),
    "shift": P(None),
    "up": P(None, "model"),
    "w": P(None, "model"),
}


def optimizers(apply_fn, layers):
    def descent(structure):
        estimator = ff.estimators.exact(apply_fn, LIKELIHOOD, structure)
        return ff.natural_gradient(0.1, estimator, damping=0.1, momentum=0.9)

    return {
        "kfac": ff.kfac(0.1, apply_fn, LIKELIHOOD, layers, key=0, inverse_period=2),
        "diagonal": descent(ff.structures.diagonal()),
        "block": optax.chain(
            descent(ff.structures.block()),
            ff.clip_by_kl(apply_fn, LIKELIHOOD, max_kl=0.01),
        ),
    }


LAYERS = {
    name: ff.layers.find_layers(APPLY[name], PARAMS[name], INPUTS[name])
    for name in APPLY
}
OPTIMIZERS = {name: optimizers(APPLY[name], LAYERS[name]) for name in APPLY}
# the diagonal of the other model is that of `check_sums`
TRAINED = {
    (name, title)
    for name in APPLY
    for title in OPTIMIZERS[name]
    if (name, title) != ("mlp", "diagonal")
}


def losses():
    loss = {name: ff.negative_log_likelihood(APPLY[name], LIKELIHOOD) for name in APPLY}
    if jax.sharding.get_abstract_mesh().explicit_axes:
        # what a model without shardings of its own needs where parameters have some
        loss["transformer"] = jax.sharding.auto_axes(
            loss["transformer"], out_sharding=P()
        )
    return loss


def train(
    params, batches, *, among=TRAINED, keep_layout=False, change=lambda carry: carry
):
    """Both models with their optimisers, three steps, compiled once."""
    gradient = jax.tree.map(jax.grad, losses())

    def step(carry, batches, take):
        def update():
            after = {}
            for name, by_optimizer in carry.items():
                after[name] = {}
                for title, (params, state) in by_optimizer.items():
                    updates, state = OPTIMIZERS[name][title].update(
                        gradient[name](params, batches[name]),
                        state,
                        params,
                        batch=batches[name],
                    )
                    params = optax.apply_updates(params, updates)
                    after[name][title] = params, state
            return after

        return jax.lax.cond(take, update, lambda: carry)

    carry = change(
        {
            name: {
                title: (params[name], optimizer.init(params[name]))
                for title, optimizer in OPTIMIZERS[name].items()
                if (name, title) in among
            }
            for name in params
        }
    )
    layout = jax.tree.map(lambda x: x.sharding, carry) if keep_layout else None
    step = jax.jit(step, out_shardings=layout)
    for _ in range(3):
        types = jax.tree.map(jax.typeof, carry)
        carry = step(carry, batches, jnp.array(True))
        assert jax.tree.map(jax.typeof, carry) == types
    assert step._cache_size() == 1
    return carry


def batches(put=lambda x: x):
    return {name: (put(INPUTS[name]), put(TARGETS[name])) for name in APPLY}


# where the compiler places everything, structures differ less than axes that are named
IN_AUTO_MESH = {("mlp", "block"), ("transformer", "kfac")}


def assert_close(left, right):
    def close(path, x, y):
        name = parameter_name(path)
        np.testing.assert_allclose(x, y, **EXACT, err_msg=name)

    jax.tree_util.tree_map_with_path(close, left, right)


def cut_a_factor(carry):
    """The state with one factor of K-FAC over two devices, where it is to stay."""
    params, state = carry["mlp"]["kfac"]
    factors = dict(optax.tree.get(state, "output_factors"))
    factors["w"] = jax.device_put(factors["w"], P(None, "model", None))
    state = optax.tree.set(state, output_factors=factors)
    return carry | {"mlp": carry["mlp"] | {"kfac": (params, state)}}


def check_training():
    alone = train(jax.tree.map(jnp.asarray, PARAMS), batches(jnp.asarray))
    for kind in (AxisType.Auto, AxisType.Explicit):
        mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind, kind))
        with jax.set_mesh(mesh):
            spread = {
                name: {k: jax.device_put(x, SHARDINGS[k]) for k, x in tree.items()}
                for name, tree in PARAMS.items()
            }
            data = batches(lambda x: jax.device_put(x, P("data")))
            if kind is AxisType.Auto:
                # of automatic axes the compiler chooses the layout of results
                shared = train(spread, data, among=IN_AUTO_MESH, keep_layout=True)
            else:
                shared = train(spread, data, change=cut_a_factor)
            for name, by_optimizer in shared.items():
                for title, carry in by_optimizer.items():
                    assert_close(carry, alone[name][title])


def summed(put):
    """A loss, its gradient and informations, of batches with padding that is NaN."""
    x, y = INPUTS["mlp"].copy(), TARGETS["mlp"]
    x[0], weights = np.nan, np.where(np.arange(COUNT) < 3, 0.0, 1.5)
    batch = put((x, y, weights))
    ragged = put((x[:8], y[:8], weights[:8]))
    params = jax.tree.map(jnp.asarray, PARAMS["mlp"])
    loss = losses()["mlp"]
    kinds = ff.structures.diagonal(), ff.structures.kronecker(LAYERS["mlp"])
    made = [ff.estimators.exact(mlp, LIKELIHOOD, kind) for kind in kinds]
    stack = tuple(np.stack([part, part]) for part in (x, y, weights))
    return {
        "loss": loss(params, batch),
        "gradient": jax.jit(jax.grad(loss))(params, batch),
        "once": jax.jit(made[0])(params, batch),
        "diagonal": ff.accumulate(made[0], params, [batch, ragged]),
        "kronecker": ff.accumulate(made[1], params, [batch]),
        "scanned": ff.accumulate(made[0], params, ff.Stacked(*put(stack, 1))),
    }


def check_sums():
    def alone(tree, axis=0):
        return jax.tree.map(jnp.asarray, tree)

    def over(*axes):
        def put(tree, axis=0):
            return jax.device_put(tree, P(*[None] * axis, axes))

        return put

    expected = summed(alone)
    mesh = jax.make_mesh(
        (4, 2), ("data", "model"), axis_types=(AxisType.Explicit, AxisType.Explicit)
    )
    with jax.set_mesh(mesh):
        assert_close(summed(over("data")), expected)
        # each device squares its own rows, on the mesh that is set as on another
        params = jax.tree.map(jnp.asarray, PARAMS["mlp"])
        estimator = ff.estimators.exact(mlp, LIKELIHOOD, ff.structures.diagonal())
        batch = INPUTS["mlp"], TARGETS["mlp"]
        shares = ff.accumulate(estimator, params, [batch], mesh=mesh)
        whole = ff.accumulate(estimator, params, [over("data", "model")(batch)])
        assert_close(shares, whole)


def flow_results(params, batch):
    """A state after all that a flow does, what a batch says, and the state's layout."""
    found = {}
    structures = {"diagonal": ff.structures.diagonal(), "full": ff.structures.full()}
    for name, structure in structures.items():
        walk = ff.memories.random_walk(0.1)
        flow = ff.fisher_flow(
            mlp, LIKELIHOOD, structure=structure, memory=walk, num_steps=2
        )
        start = flow.init(params)
        state, info = flow.update(start, batch)
        assert jax.tree.map(jax.typeof, state) == jax.tree.map(jax.typeof, start)
        if name == "full":
            found[name] = state, info.log_evidence
            continue
        state, _ = jax.jit(flow.update)(flow.advance(state), batch)
        value, score, information = flow.evaluate(state.mean, batch)
        state = flow.absorb(state, state.mean, information, COUNT)
        found[name] = state, info.log_evidence, value, score
    return found


def check_flows():
    """A flow among explicit axes knows nothing of them."""
    alone = jax.tree.map(jnp.asarray, PARAMS["mlp"])
    batch = INPUTS["mlp"], TARGETS["mlp"]
    expected = flow_results(alone, jax.tree.map(jnp.asarray, batch))
    mesh = jax.make_mesh((4, 2), ("data", "model"))
    with jax.set_mesh(mesh):
        spread = {k: jax.device_put(x, SHARDINGS[k]) for k, x in alone.items()}
        found = flow_results(spread, jax.device_put(batch, P("data")))
        assert jax.typeof(found["diagonal"][0].mean["w"]) == jax.typeof(spread["w"])
    assert_close(found, expected)


def check_layouts():
    """A diagonal lies as the parameters do, and remains there."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        put = jax.device_put(PARAMS["mlp"], NamedSharding(mesh, P()))
        put["out"] = jax.device_put(PARAMS["mlp"]["out"], P("data"))
        state = ff.adam(0.1).init(put)
        moment = state[0].information.squares.entries["out"]
        assert "data" in str(jax.typeof(moment))
        _, after = jax.jit(ff.adam(0.1).update)(put, state)
        assert jax.tree.map(jax.typeof, after) == jax.tree.map(jax.typeof, state)
        soap = ff.soap(0.1, widest=4, inverse_period=2)
        updates, kept = jax.jit(soap.update)(put, soap.init(put))
        assert jax.tree.map(jax.typeof, updates) == jax.tree.map(jax.typeof, put)
        kfac = OPTIMIZERS["mlp"]["kfac"]
        for optimizer, state in ((ff.adam(0.1), after), (soap, kept), (kfac, None)):
            check_bytes(optimizer, put, state, mesh)


def check_bytes(optimizer, params, state, mesh):
    """What is told from shapes alone is what lies on a device."""
    device = jax.devices()[0]
    made = [optimizer.init(params)] if state is None else [state]
    taken = [
        shard.data.nbytes
        for leaf in jax.tree.leaves(made)
        for shard in leaf.addressable_shards
        if shard.device == device
    ]
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), params
    )
    told = ff.transforms.bytes_per_device(optimizer, shapes, mesh)
    assert told == sum(taken), (told, sum(taken))
    unlaid = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    whole = ff.transforms.bytes_per_device(optimizer, unlaid)
    assert told < whole == sum(x.nbytes for x in jax.tree.leaves(made))


if __name__ == "__main__":
    assert jax.device_count() == 8
    check_layouts()
    check_sums()
    check_flows()
    check_training()
    print("the same")
