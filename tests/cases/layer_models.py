"""Models written by hand, of linear layers and of what only looks like one.

They pass under strict promotion, for a batch as for a single example.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name


def affine(p, x):
    return jnp.tanh(x @ p["w"] + jnp.broadcast_to(p["b"], (x.shape[0], 3)))


def transformer(p, ids):
    h = p["embed"][ids] + p["position"][None]
    scale = lax.rsqrt(jnp.mean(jnp.square(h), -1, keepdims=True) + 0.1)
    normed = h * scale * p["scale"][None, None]
    q, k, v = (
        jnp.einsum("btd,dhk->bthk", normed, p[name]) + p[f"b{name}"][None, None]
        for name in "qkv"
    )
    weights = jax.nn.softmax(jnp.einsum("bthk,bshk->bhts", q, k))
    mixed = jnp.einsum("bhts,bshk->bthk", weights, v)
    h = h + jnp.einsum("bthk,hkd->btd", mixed, p["o"]) + p["bo"][None, None]
    return h @ p["head"]


def convolutions(p, x):
    convolve = functools.partial(
        lax.conv_general_dilated, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    x = jnp.tanh(convolve(x, p["strided"], (2, 2), "SAME") + p["b"][None, None, None])
    x = jnp.tanh(convolve(x, p["groups"], (1, 1), "VALID", feature_group_count=2))
    x = x + p["bgroups"][None, None, None]
    x = convolve(x, p["depth"], (1, 1), "SAME", None, (2, 1), feature_group_count=4)
    x = lax.conv_transpose(jnp.tanh(x), p["up"], (2, 2), "SAME", transpose_kernel=True)
    return jnp.mean(x, (1, 2))


def channels_first(p, x):
    x = lax.conv_general_dilated(
        x, p["w"], (2,), [(2, -1)], dimension_numbers=("NCW", "OIW", "NWC")
    )
    return x + p["b"][None, None]


def scanned(p, x, wrap=lambda step: step):
    def body(h, layer):
        return jnp.tanh(h @ layer["w"] + layer["b"][None]), None

    start = x @ p["u"]
    h, _ = lax.scan(wrap(body), start, {"w": p["w"], "b": p["b"]}, reverse=True)
    return (h + p["c"][None]) @ p["v"]


def handed_back(p, x):
    """As `scanned`, checkpointed: its body hands back the layer that it was given.

    So does what is around it, where nothing else is done with what comes back, and a
    kernel is used once more.
    """

    @functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.nothing_saveable)
    def body(carry, layer):
        h, last = carry
        return (jnp.tanh(h @ layer["w"] + layer["b"][None]), last), layer

    def pair(carry, layers):
        return lax.scan(jax.checkpoint(body), carry, layers)

    halves = {name: p[name].reshape(1, *p[name].shape) for name in "wb"}
    (h, last), back = lax.scan(pair, (x, p["v"]), halves, reverse=True)
    w = back["w"].reshape(p["w"].shape)
    again = jnp.einsum("kbi,kio->kbo", jnp.stack([h, 2 * h, -h]), w)
    return (h + jnp.sum(again, 0)) @ last


def recurrent(p, x):
    def step(h, now):
        h = jnp.tanh(now @ p["w"] + h @ p["u"] + p["b"][None])
        return h, h

    start = jnp.zeros((x.shape[0], 3), x.dtype)
    last, hidden = lax.scan(step, start, x.swapaxes(0, 1))
    return last + jnp.sum(hidden, 0)


def unrolled(p, x):
    h = jnp.zeros((x.shape[0], 3), x.dtype)
    for t in range(x.shape[1]):
        h = jnp.tanh(x[:, t] @ p["w"] + (h @ p["u"] + p["b"][None]))
    return h


def nested(p, x):
    """A stack of recurrent layers: scans of steps in a scan of layers."""

    def layer(x, kernels):
        def step(h, now):
            h = jnp.tanh(now @ kernels["w"] + p["u"][None, 0] + h @ p["c"])
            return h, h

        return lax.scan(step, jnp.zeros_like(x[0]), x)[1], None

    return lax.scan(layer, x.swapaxes(0, 1), {"w": p["w"]})[0][-1]


def ensemble(p, x):
    def one(p, x):
        return jnp.tanh(x @ p["w"] + p["b"][None]) @ p["v"] + p["c"][None]

    return jnp.mean(jax.vmap(one, (0, None))(p, x), 0)


def experts(p, x):
    hidden = jnp.tanh(jnp.einsum("btd,edf->betf", x, p["w"]))
    return jnp.einsum("betf,efc->bec", hidden, p["v"]) + p["b"][None]


def scanned_experts(p, x):
    """Stacks within a stack: of experts, in a scan of layers."""

    def layer(h, kernels):
        h = jnp.einsum("bed,edf->bef", h, kernels["w"]) + kernels["b"][None]
        return jnp.tanh(h), None

    return lax.scan(layer, jnp.stack([x, -x], 1), p)[0]


def embeddings(p, ids):
    """Ids out of bounds, dropped or clipped; stacked tables; columns; one row."""
    dropped = p["fill"].at[ids].get(mode="fill", fill_value=0.5)
    clipped = p["clip"].at[ids].get(mode="clip")
    ids = jnp.clip(ids, 0, 2).astype(jnp.uint8)
    # features first, and more rows than the type of the ids can count
    order = lax.GatherDimensionNumbers((0,), (2,), (2,), (0,), (0,))
    stacked = lax.gather(p["stacked"], ids.T[:, :, None], order, (1, 2, 1))
    stacked = stacked.transpose(2, 1, 0)
    shared = jax.vmap(lambda table: table[ids])(p["members"])
    columns = p["columns"][:, ids].transpose(1, 2, 0)
    row = jnp.take(p["row"], ids[0, 0], axis=0)
    return jnp.tanh(
        dropped * clipped * stacked * shared[0] * shared[1] * columns * row[None, None]
    )


def reordered(p, x):
    """Views of all kinds on the way to a product."""
    w = jnp.flip(p["w"].reshape(2, 2, 3, 1), (1, 2)).squeeze(3).reshape(4, 3)
    w = lax.optimization_barrier(jnp.array(w, copy=True))
    b = checkpoint_name(p["b"][::-1, None], "bias")
    h = (x @ w + jnp.zeros(3)[None])[:, :, None]  # this sum hides the product
    g = jnp.flip((x @ jax.device_put(p["v"])).reshape(-1, 3, 1), 1) + b[None]
    return jnp.tanh(h * g)[..., 0]


def routed(p, x):
    """Tokens of all examples in the order of their experts, one of which has none."""
    rows = jnp.asarray(x).reshape(-1, 4)
    expert = jnp.asarray([0, 2, 3])[jnp.argmax(rows[:, :3], axis=1)]
    order = jnp.argsort(expert)
    sizes = jnp.bincount(expert, length=4).astype(jnp.int32)
    rows = jnp.tanh(lax.ragged_dot(rows[order], p["w"], sizes))
    low_rank = p["v"] + 2.0 * (p["left"] @ p["right"])
    rows = lax.ragged_dot(rows, low_rank, sizes)[jnp.argsort(order)]
    return rows.reshape(*x.shape[:2], 2) + p["b"][None, None]


def graph(p, x):
    """Nodes are the examples: mixed after a product, before it, and in a scan."""
    near = np.eye(x.shape[0]) + np.roll(np.eye(x.shape[0]), 1, 0)
    h = jnp.tanh(near @ (x @ p["u"]))
    h = jnp.tanh(near @ h @ p["w"] + p["b"][None])
    return lax.scan(lambda h, v: (jnp.tanh(near @ h @ v), None), h, p["v"])[0]


def adapters(p, x):
    """Kernels that are sums, multiples and products of parameters."""
    w = p["w"] + 0.5 * (p["left"] @ p["right"])
    h = jnp.tanh(x @ w + p["b"][None])
    # stored the other way round, in heads; half of it is fixed
    heads = jnp.einsum("hkr,rd->hkd", p["down"], p["up"]) / -4.0
    h = jnp.tanh(jnp.einsum("hkd,bd->bhk", heads + jnp.ones((2, 2, 4)), h))
    h = h.reshape(-1, 4) @ (p["square"] @ p["square"] - p["square"])

    @jax.checkpoint
    def body(h, layer):
        kernel = lax.stop_gradient(p["w"]) + 2.0 * (layer["a"] @ layer["c"])
        return jnp.tanh(h @ kernel), layer

    h, back = lax.scan(body, h, {"a": p["a"], "c": p["c"]}, reverse=True)
    # products of stacks, made outside of the scan that takes them
    kernels = jnp.flip(jnp.matmul(back["a"], back["c"]), 0)[::-1]
    return lax.scan(lambda h, kernel: (h + h @ (0.5 * kernel), None), h, kernels)[0]


def adapted_convolution(p, x):
    kernel = p["w"] + (p["left"] @ p["right"]).reshape(2, 2, 3)
    return lax.conv_general_dilated(
        x, kernel, (2,), "VALID", dimension_numbers=("NWC", "WIO", "NWC")
    )
