"""Models that use slices of a kernel, or concatenations of kernels."""

import jax
import jax.numpy as jnp
from jax import lax

from layer_cases import IDS, STEPS, Bias, X, dense, embedding, model


def fused(p, x):
    """Queries, keys and values of one kernel, by slices and by indices."""
    q, k, v = (
        x @ w + b[None, None]
        for w, b in zip(
            jnp.split(p["qkv"], [2, 4], 1), jnp.split(p["b"], [2, 4]), strict=True
        )
    )
    h = jnp.tanh(q * k) @ jnp.ones((2, 3)) + v
    one, two = (x @ p["indexed"][:, i] for i in range(2))
    return h + one * two


def apart(p, x):
    """Slices of the inputs' side, of other inputs, and some left out."""
    h = jnp.tanh(x[:, :3] @ p["w"][:3]) + jnp.cos(x[:, :1]) @ p["w"][3:4]
    h = h * jnp.tanh(h @ p["u"][:, 1:4]) + (h @ p["u"][:, 4:])
    return jnp.tanh(h) @ p["v"].T[:, :2]


def unrolled(p, x):
    """Stacked layers, one after the other."""
    for i in range(3):
        x = jnp.tanh(x @ p["w"][i] + p["b"][i][None])
    return x @ p["v"]


def together(p, x):
    """Kernels side by side, with their biases; one is the transpose of its leaf."""
    w = jnp.concatenate([p["q"], p["k"].T, p["v"], jnp.zeros((4, 1))], 1)
    b = jnp.concatenate([p["bq"], p["bk"], p["bv"], jnp.zeros(1)])
    h = x @ w + b[None, None]
    q, k, v = jnp.split(h[..., :-1], [3, 5], -1)
    return jnp.tanh(jnp.tanh(q) * v) + k.sum(-1, keepdims=True)


def below(p, x):
    """Kernels one below the other; heads side by side; stacked ones scanned."""
    h = jnp.concatenate([x, jnp.sin(x)], 1) @ jnp.concatenate([p["a"], p["b"]])
    h = jnp.einsum("ni,iho->nho", h, jnp.concatenate([p["one"], p["two"]], 1))
    h = h.reshape(x.shape[0], 4)
    layers = jnp.stack([p["first"], p["second"]])
    return lax.scan(lambda h, w: (jnp.tanh(h @ w), None), h, layers)[0]


def gates(p, x):
    """A recurrent cell whose gates are one product."""
    hidden = jnp.concatenate([p["hi"], p["hf"]], 1)
    entering = jnp.concatenate([p["ii"], p["if"]], 1)
    bias = jnp.concatenate([p["bi"], p["bf"]])

    def step(h, x):
        y = h @ hidden + bias[None] + x @ entering
        i, f = jnp.split(y, 2, -1)
        h = jnp.tanh(i) + jax.nn.sigmoid(f) * h
        return h, None

    return lax.scan(step, jnp.zeros((x.shape[0], 3)), jnp.moveaxis(x, 1, 0))[0]


def scanned(p, x):
    """Slices and concatenations of what a scan slices, under a checkpoint."""

    @jax.checkpoint
    def step(h, p):
        gate, up = jnp.split(p["fused"], 2, 1)
        h = jnp.tanh(h @ gate) * (jnp.sin(h) @ up)
        return h @ jnp.concatenate([p["left"], p["right"]], 1), None

    return lax.scan(step, x, p)[0]


def padded(p, ids):
    """A table of which the last rows are no outputs, and halves of one kernel."""
    h = jax.vmap(lambda one: jnp.tanh(p["table"][one] @ p["w"][:, 1:]))(ids)
    h = h + jnp.tanh(h) @ p["w"][:, :4]
    return h @ p["table"][:3].T


PARTS = {
    "scanned": model(
        scanned,
        {"fused": (2, 4, 6), "left": (2, 3, 3), "right": (2, 3, 1)},
        X,
        fused=dense(4, 6, stacked=2, shared=2),
        left=dense(3, 3, stacked=2),
        right=dense(3, 1, stacked=2),
    ),
    "padded": model(
        padded,
        {"table": (5, 4), "w": (4, 5)},
        IDS,
        table=embedding(5, 4, shared=3, turned=3),
        w=dense(4, 5, shared=6),
    ),
    "fused": model(
        fused,
        {"qkv": (4, 7), "b": (7,), "indexed": (4, 2, 3)},
        STEPS,
        qkv=dense(4, 7, shared=5),
        b=Bias("qkv"),
        indexed=dense(4, 3, stacked=2, shared=5),
    ),
    "apart": model(
        apart,
        {"w": (5, 3), "u": (3, 7), "v": (4, 3)},
        X,
        w="used in several orientations or kinds",
        u=dense(3, 7),
        v=dense(3, 4),
    ),
    "unrolled": model(
        unrolled,
        {"w": (3, 4, 4), "b": (3, 4), "v": (4, 2)},
        X,
        w=dense(4, 4, stacked=3),
        b=Bias("w"),
        v=dense(4, 2),
    ),
    "together": model(
        together,
        {"q": (4, 3), "k": (2, 4), "v": (4, 3), "bq": (3,), "bk": (2,), "bv": (3,)},
        STEPS,
        q=dense(4, 3, shared=5),
        k=dense(4, 2, shared=5),
        v=dense(4, 3, shared=5),
        **{f"b{name}": Bias(name) for name in "qkv"},
    ),
    "below": model(
        below,
        {
            "a": (4, 3),
            "b": (4, 3),
            "one": (3, 1, 2),
            "two": (3, 1, 2),
            "first": (4, 4),
            "second": (4, 4),
        },
        X,
        **dict.fromkeys("ab", dense(4, 3)),
        **dict.fromkeys(("one", "two"), dense(3, 2)),
        **dict.fromkeys(("first", "second"), dense(4, 4)),
    ),
    "gates": model(
        gates,
        {
            **dict.fromkeys(("hi", "hf"), (3, 3)),
            **dict.fromkeys(("ii", "if"), (4, 3)),
            **dict.fromkeys(("bi", "bf"), (3,)),
        },
        STEPS,
        **dict.fromkeys(("hi", "hf"), dense(3, 3, shared=5)),
        **dict.fromkeys(("ii", "if"), dense(4, 3, shared=5)),
        bi=Bias("hi"),
        bf=Bias("hf"),
    ),
}
