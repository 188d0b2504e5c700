"""Models of `layer_models` with parameters, inputs, and what is to be found in them.

`expected` says for each parameter what it is to be: `dense(I, O)`, `Bias("w")` or the
reason why it belongs to no layer.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import layer_models as models


class Sizes(NamedTuple):
    """How a kernel is to be found."""

    kind: str
    inputs: int
    outputs: int
    stacked: int = 1
    shared: int = 1
    turned: int = 0


class Bias(NamedTuple):
    kernel: str


dense = functools.partial(Sizes, "dense")
convolution = functools.partial(Sizes, "convolution")
embedding = functools.partial(Sizes, "embedding")


class Model(NamedTuple):
    apply_fn: Callable
    params: dict[str, np.ndarray]
    inputs: Any
    expected: dict[str, Any]


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def model(apply_fn, shapes, inputs, **expected):
    params = {
        name: draw(*shape, seed=i + 1) for i, (name, shape) in enumerate(shapes.items())
    }
    return Model(apply_fn, params, inputs, expected)


def treatments(layers):
    """What is found, in the words of `expected`; names of parameters in a dict."""
    names = [name.removeprefix("['").removesuffix("']") for name in layers.names]
    found = [(names[leaf], reason) for leaf, reason in layers.fallback]
    for layer in layers.layers:
        found.append(
            (
                names[layer.kernel],
                Sizes(
                    layer.kind,
                    layer.num_inputs,
                    layer.num_outputs,
                    layer.num_stacked,
                    layer.num_positions,
                    layer.num_turned,
                ),
            )
        )
        if layer.bias is not None:
            found.append((names[layer.bias], Bias(names[layer.kernel])))
    assert len(dict(found)) == len(found) == len(names)
    return dict(found)


X, STEPS = draw(3, 4), draw(3, 5, 4)  # three examples of four numbers, five positions
IDS = np.array([[0, 3, 3], [2, 1, 0]])
WB = {"w": (4, 3), "b": (3,)}
WV = {"w": (4, 4), "v": (4, 2)}
DENSE_WB = {"w": dense(4, 3), "b": Bias("w")}
W_DENSE, V_DENSE = {"w": dense(4, 4)}, {"v": dense(4, 2)}


FOUND = {
    "affine": model(models.affine, WB, X, **DENSE_WB),
    "jit": model(jax.jit(models.affine), WB, X, **DENSE_WB),
    "vmap": model(
        lambda p, x: jax.vmap(lambda one: models.affine(p, one[None])[0])(x),
        WB,
        X,
        **DENSE_WB,
    ),
    "checkpoint": model(
        jax.checkpoint(
            models.affine,
            policy=jax.checkpoint_policies.dots_saveable,
            prevent_cse=False,
        ),
        WB,
        X,
        **DENSE_WB,
    ),
    "matrix times vector": model(
        lambda p, x: p["s"][None] * (jnp.einsum("ij,bj->bi", p["w"], x) + p["b"]),
        {"w": (3, 4), "b": (1, 3), "s": (3,)},
        X,
        w=dense(4, 3),
        b=Bias("w"),
        s="used in mul",
    ),
    "positions": model(
        lambda p, x: jnp.tanh(x @ p["w"] + p["b"][None]) @ p["v"].T + p["c"],
        {"w": (4, 3), "b": (5, 3), "v": (2, 3), "c": ()},
        STEPS,
        w=dense(4, 3, shared=5),
        b="used in add",
        v=dense(3, 2, shared=5),
        c="used in add",
    ),
    "output used before its bias": model(
        lambda p, x: (lambda h: h + p["b"][None] + jnp.tanh(h))(x @ p["w"]),
        WB,
        X,
        w=dense(4, 3),
        b="used in add",
    ),
    "half precision": model(
        lambda p, x: (
            x.astype(jnp.bfloat16) @ p["w"].astype(jnp.bfloat16)
            + p["b"].astype(jnp.bfloat16)[None]
        ).astype(x.dtype),
        WB,
        X,
        **DENSE_WB,
    ),
    "reordered": model(
        models.reordered,
        {"w": (4, 3), "b": (3,), "v": (4, 3)},
        X,
        w=dense(4, 3),
        b=Bias("v"),
        v=dense(4, 3),
    ),
    "transformer": model(
        models.transformer,
        {
            "embed": (5, 4),
            "position": (3, 4),
            "scale": (4,),
            **dict.fromkeys("qkv", (4, 2, 3)),
            **dict.fromkeys(("bq", "bk", "bv"), (2, 3)),
            "o": (2, 3, 4),
            "bo": (4,),
            "head": (4, 5),
        },
        IDS,
        embed=embedding(5, 4, shared=3),
        position="used in add",
        scale="used in mul",
        **{name: dense(4, 6, shared=3) for name in "qkv"},
        **{f"b{name}": Bias(name) for name in "qkv"},
        o=dense(6, 4, shared=3),
        # added to the sum of the product and the residual
        bo=Bias("o"),
        head=dense(4, 5, shared=3),
    ),
    "convolutions": model(
        models.convolutions,
        {
            "strided": (3, 2, 2, 4),
            "b": (4,),
            "groups": (2, 1, 2, 4),
            "bgroups": (4,),
            "depth": (2, 2, 1, 4),
            "up": (3, 2, 3, 4),
        },
        draw(2, 6, 5, 2),
        strided=convolution(12, 4, shared=9),
        b=Bias("strided"),
        groups=convolution(4, 2, stacked=2, shared=6),
        bgroups="used in add",
        depth=convolution(4, 1, stacked=4, shared=6),
        up=convolution(24, 3, shared=24),
    ),
    "channels first": model(
        models.channels_first,
        {"w": (3, 2, 2), "b": (3,)},
        draw(2, 2, 6),
        w=convolution(4, 3, shared=3),
        b=Bias("w"),
    ),
    "scanned layers": model(
        models.scanned,
        {"w": (3, 4, 4), "b": (3, 4), "v": (4, 2), "u": (4, 4), "c": (4,)},
        X,
        w=dense(4, 4, stacked=3),
        b=Bias("w"),
        u=dense(4, 4),
        c="used in add",
        **V_DENSE,
    ),
    "scanned layers, checkpointed": model(
        functools.partial(models.scanned, wrap=jax.checkpoint),
        {"w": (3, 4, 4), "b": (3, 4), "v": (4, 2), "u": (4, 4), "c": (4,)},
        X,
        w=dense(4, 4, stacked=3),
        b=Bias("w"),
        u=dense(4, 4),
        c="used in add",
        **V_DENSE,
    ),
    "scanned layers, handed back": model(
        models.handed_back,
        {"w": (3, 4, 4), "b": (3, 4), "v": (4, 2)},
        X,
        w=dense(4, 4, stacked=3, shared=2),
        b="added at some uses of its layer only",
        **V_DENSE,
    ),
    "recurrent": model(
        models.recurrent,
        {"w": (4, 3), "u": (3, 3), "b": (3,)},
        STEPS,
        w=dense(4, 3, shared=5),
        u=dense(3, 3, shared=5),
        b=Bias("w"),
    ),
    "unrolled": model(
        models.unrolled,
        {"w": (4, 3), "u": (3, 3), "b": (3,)},
        STEPS,
        w=dense(4, 3, shared=5),
        u=dense(3, 3, shared=5),
        b=Bias("u"),
    ),
    "scan in scan": model(
        models.nested,
        {"w": (2, 4, 4), "u": (1, 4), "c": (4, 4)},
        STEPS,
        w=dense(4, 4, stacked=2, shared=5),
        u="used in add",
        c=dense(4, 4, shared=10),
    ),
    "ensemble": model(
        models.ensemble,
        {"w": (2, 4, 3), "b": (2, 3), "v": (2, 3, 2), "c": (2, 2)},
        X,
        # one input for all members: their outputs lie side by side
        w=dense(4, 6),
        b=Bias("w"),
        v=dense(3, 2, stacked=2),
        c=Bias("v"),
    ),
    "experts": model(
        models.experts,
        {"w": (2, 4, 3), "v": (2, 3, 2), "b": (2, 2)},
        STEPS,
        w=dense(4, 6, shared=5),
        # the positions are summed by the product itself
        v=dense(3, 2, stacked=2),
        b=Bias("v"),
    ),
    "broadcast to slices": model(
        lambda p, x: lax.scan(
            lambda h, w: (jnp.tanh(h @ w), None),
            x,
            jnp.broadcast_to(p["w"][None], (3, 4, 4)),
        )[0],
        {"w": (4, 4)},
        X,
        w=dense(4, 4, shared=3),
    ),
    "scanned experts": model(
        models.scanned_experts,
        {"w": (3, 2, 4, 4), "b": (3, 2, 4)},
        X,
        w=dense(4, 4, stacked=6),
        b=Bias("w"),
    ),
    "embeddings": model(
        models.embeddings,
        {
            "fill": (4, 2),
            "clip": (4, 2),
            "stacked": (3, 2, 260),
            "members": (2, 3, 2),
            "columns": (2, 3),
            "row": (3, 2),
        },
        np.array([[0, 4, 4], [-9, 3, 1]]),
        fill=embedding(4, 2, shared=3),
        clip=embedding(4, 2, shared=3),
        stacked=embedding(260, 2, stacked=3),
        members=embedding(3, 4, shared=3),
        columns=embedding(3, 2, shared=3),
        row=embedding(3, 2),
    ),
    "scaled": model(
        lambda p, x: jnp.tanh(-x @ (0.5 * p["w"] / 3.0) + p["b"][None]),
        WB,
        X,
        **DENSE_WB,
    ),
    "adapters": model(
        models.adapters,
        {
            "w": (4, 4),
            "b": (4,),
            "left": (4, 2),
            "right": (2, 4),
            "down": (2, 2, 1),
            "up": (1, 4),
            "square": (4, 4),
            "a": (3, 4, 1),
            "c": (3, 1, 4),
        },
        X,
        w=dense(4, 4),
        b=Bias("w"),
        left=dense(4, 2),
        right=dense(2, 4),
        down=dense(1, 4),
        up=dense(4, 1),
        # twice in a product, and once more
        square=dense(4, 4, shared=3),
        a=dense(4, 1, stacked=3, shared=2),
        c=dense(1, 4, stacked=3, shared=2),
    ),
    "adapted convolution": model(
        models.adapted_convolution,
        {"w": (2, 2, 3), "left": (4, 1), "right": (1, 3)},
        draw(3, 4, 2),
        w=convolution(4, 3, shared=2),
        left=convolution(4, 1, shared=2),
        right=convolution(1, 3, shared=2),
    ),
    "tied": model(
        lambda p, x: (
            jnp.tanh(jnp.tanh(x @ p["w"] + p["b"][None]) @ p["w"] + p["b"][None])
            @ p["v"]
        ),
        WV | {"b": (4,)},
        X,
        w=dense(4, 4, shared=2),
        b=Bias("w"),
        **V_DENSE,
    ),
}
