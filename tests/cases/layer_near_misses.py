"""Models with parameters that look like a layer's, or like its bias, and are not."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from layer_cases import IDS, V_DENSE, W_DENSE, WV, X, dense, model


def square(p, x):
    """Uses `v` once, as a dense layer after what the case is about."""
    return jnp.tanh(x) @ p["v"]


@jax.custom_vjp
def custom_product(w, x):
    return x @ w


custom_product.defvjp(
    lambda w, x: (x @ w, (w, x)), lambda res, g: (res[1].T @ g, g @ res[0].T)
)


def other_uses(p, x):
    """Each parameter in a way that makes it no layer's."""
    convolve = functools.partial(
        lax.conv_general_dilated, dimension_numbers=("NWC", "WIO", "NWC")
    )
    cut = jnp.sum(x @ p["cut"].T.reshape(4, 3))
    h = cut + x @ jnp.sort(p["sorted"]) + x @ jax.nn.relu(p["positive"])
    h = h + x @ (p["product"] @ p["product"]).reshape(2, 2, 4).swapaxes(0, 1).reshape(
        4, 4
    )
    h = h + p["integers"].astype(jnp.int32).astype(x.dtype)[None]
    _, rows = lax.scan(lambda c, row: (c, row[::-1]), 0, p["returned"])
    h = h + rows[:1] + lax.scan(lambda c, r: (c * r[None], None), h, p["stack"])[0]
    pairs = jnp.concatenate([h, h])[:, :, None]
    groups = convolve(pairs, p["filter"], (1,), "SAME", batch_group_count=2)
    shuffled = p["shuffled"].T.reshape(1, 1, 6)
    groups2 = convolve(h[:, None, :2], shuffled, (1,), "SAME", feature_group_count=2)
    image = convolve(p["image"], x[0][:, None, None], (1,), "SAME")
    elements = p["elements"][jnp.zeros(3, int), jnp.arange(3)]
    empty = jnp.sum(x @ p["empty"]) + jnp.sum(x @ p["unequal"][0] @ p["unequal"][0])
    empty = empty + jnp.sum(x @ p["unequal"][1]) + jnp.sum(x @ p["strided"][::2])
    empty = empty + jnp.sum(p["short"][:1][jnp.zeros(2, int)]) + jnp.sum(p["short"][:0])
    h = jnp.tanh(
        h
        + jnp.sum(groups)
        + jnp.sum(groups2)
        + jnp.sum(image)
        + jnp.sum(elements)
        + empty
    )
    return h


NEAR_MISSES = {
    "soft and hard look-ups": model(
        lambda p, ids: (
            p["embed"][ids] + jax.nn.softmax(p["embed"][ids] @ p["w"]) @ p["embed"]
        ),
        {"embed": (5, 4), "w": (4, 5)},
        IDS,
        w=dense(4, 5, shared=3),
        embed="used in several orientations or kinds",
    ),
    "reshaped and turned": model(
        lambda p, x: (
            x @ p["w"] @ p["w"].T.reshape(2, 2, 2, 2).swapaxes(1, 2).reshape(4, 4)
        ),
        {"w": (4, 4)},
        X,
        w="used in several orientations or kinds",
    ),
    "bias at one use": model(
        lambda p, x: square(p, jnp.tanh(x @ p["w"] + p["b"][None]) @ p["w"]),
        WV | {"b": (4,)},
        X,
        w=dense(4, 4, shared=2),
        b="added at some uses of its layer only",
        **V_DENSE,
    ),
    "bias of two": model(
        lambda p, x: square(
            p, jnp.tanh(x @ p["w"] + p["b"][None]) @ p["u"] + p["b"][None]
        ),
        WV | {"u": (4, 4), "b": (4,)},
        X,
        u=dense(4, 4),
        b="added to the outputs of several layers",
        **W_DENSE,
        **V_DENSE,
    ),
    "kernel as bias": model(
        lambda p, x: square(p, x @ p["w"] + p["u"]) + x @ p["u"].T,
        WV | {"u": (1, 4)},
        X,
        u="used as a kernel and as a bias",
        **W_DENSE,
        **V_DENSE,
    ),
    "elsewhere too": model(
        lambda p, x: square(p, x @ p["w"]) + jnp.sum(jnp.square(p["w"])),
        WV,
        X,
        w="used in square",
        **V_DENSE,
    ),
    "weight norm": model(
        lambda p, x: square(p, x @ (p["w"] / jnp.linalg.norm(p["w"]))),
        WV,
        X,
        w="used in mul",
        **V_DENSE,
    ),
    "products": model(
        lambda p, x: square(
            p,
            x @ (p["a"] @ p["b"] @ p["c"])  # of three
            + x @ (p["masked"] * jnp.eye(4))
            + x @ ((1.0 + p["moved"]) @ p["w"])
            + x @ jnp.tanh(p["s"] + 2.0 * p["t"]),
        ),
        WV | dict.fromkeys(("a", "b", "c", "masked", "moved", "s", "t"), (4, 4)),
        X,
        **dict.fromkeys("abcw", "multiplied by another parameter"),
        masked="used in mul",
        moved="used in add",
        s="used in add",
        t="used in mul",
        **V_DENSE,
    ),
    "custom derivative": model(
        lambda p, x: square(p, custom_product(p["w"], x)),
        WV,
        X,
        w="used in custom_vjp_call",
        **V_DENSE,
    ),
    "cond": model(
        lambda p, x: square(
            p, lax.cond(x[0, 0] > 0, lambda: x @ p["w"], lambda: x - x @ p["w"])
        ),
        WV,
        X,
        w="used in cond",
        **V_DENSE,
    ),
    "carried": model(
        lambda p, x: square(
            p,
            lax.scan(lambda c, _: ((c[0] @ c[1], 2 * c[1]), 0), (x, p["w"]), length=2)[
                0
            ][0],
        ),
        WV,
        X,
        w="carried through scan",
        **V_DENSE,
    ),
    "stopped": model(
        lambda p, x: (
            square(p, x @ p["w"] + x @ lax.stop_gradient(p["w"]))
            + lax.stop_gradient(p["s"])[None]
        ),
        WV | {"s": (2,)},
        X,
        s="no gradient passes",
        **W_DENSE,
        **V_DENSE,
    ),
    "broadcast kernel": model(
        lambda p, x: square(p, x @ jnp.broadcast_to(p["w"][None], (4, 4))),
        {"w": (4,), "v": (4, 2), "z": (3,)},
        X,
        w="broadcast before dot_general",
        z="unused",
        **V_DENSE,
    ),
    "an output": model(
        lambda p, x: p["w"][None], {"w": (2,)}, X, w="returned as an output"
    ),
    "other uses": model(
        other_uses,
        {
            "sorted": (4, 4),
            "integers": (4,),
            "cut": (4, 3),
            "returned": (2, 4),
            "filter": (2, 1, 2),
            "image": (1, 4, 1),
            "elements": (2, 4),
            "positive": (4, 4),
            "stack": (2, 4),
            "product": (4, 4),
            "shuffled": (2, 3),
            "empty": (4, 0),
            "unequal": (2, 4, 4),
            "strided": (8, 2),
            "short": (2, 3),
        },
        X,
        sorted="used in sort",
        integers="converted to int32",
        cut="reshaped to (4, 3) across what it was made of",
        returned="used in slice",
        filter="used in a convolution with groups of the batch",
        image="convolved as an image",
        elements="looked up by more than the ids of whole rows",
        positive="used in custom_jvp_call",
        stack="used in mul",
        product="multiplied by another parameter",
        shuffled="reshaped before conv_general_dilated",
        empty="without entries",
        unequal="its stacked kernels are not used equally often",
        strided="used in slice",
        short="used in slice",
    ),
}
