"""Nine models whose examples interact, of six examples with four features each.

Batch statistics over a named axis as equinox, linen, nnx and haiku have them, rows of
other examples, and graphs whose nodes are the examples. `vmap` names the axis.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

COUNT = 6


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


X = draw(COUNT, 4)
PARAMS = {"w": draw(4, 3, seed=1), "h": draw(3, 2, seed=2)}
SENDERS, RECEIVERS = np.array([0, 1, 2, 3, 4, 5, 0]), np.array([1, 2, 3, 4, 5, 0, 3])


class Interacting(NamedTuple):
    apply_fn: Callable
    params: Any
    seen: bool  # whether the program alone shows it


def with_rows(change):
    """A network of two layers, whose hidden rows are changed between them."""

    def apply_fn(p, x):
        return jnp.tanh(change(x @ p["w"])) @ p["h"]

    return Interacting(apply_fn, PARAMS, seen=False)


def mapped(one):
    def apply_fn(p, x):
        return jax.vmap(one, (None, 0), axis_name="batch")(p, x)

    return Interacting(apply_fn, PARAMS, seen=True)


def with_moments(p, x):
    """As equinox has it: the mean, and the mean of squares about it."""
    h = x @ p["w"]
    mean = lax.pmean(h, "batch")
    variance = lax.pmean(jnp.square(h - mean), "batch")
    return jnp.tanh((h - mean) * lax.rsqrt(variance + 0.1)) @ p["h"]


def with_sums(p, x):
    """As haiku has it: sums over replicas, of values and of their number."""
    h = x @ p["w"]
    total, count = lax.psum((h, 1.0), "batch")
    squares = lax.psum(jnp.square(h), "batch")
    variance = squares / count - jnp.square(total / count)
    return jnp.tanh((h - total / count) * lax.rsqrt(variance + 0.1)) @ p["h"]


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(3, param_dtype=float)(x)
        norm = nn.BatchNorm(False, axis_name="batch", param_dtype=float)
        return nn.Dense(2, param_dtype=float)(nn.tanh(norm(x)))


def linen():
    module, stats = Linen(), {"BatchNorm_0": {"mean": np.zeros(3), "var": np.ones(3)}}

    def one(params, x):
        variables = {"params": params, "batch_stats": stats}
        return module.apply(variables, x[None], mutable=["batch_stats"])[0][0]

    def initial(x):
        return module.init(jax.random.key(0), x)

    # mapped, for the axis has a name there too
    shapes = jax.eval_shape(jax.vmap(initial, 0, None, axis_name="batch"), X[:, None])
    return mapped(one)._replace(params=drawn_like(shapes["params"]))


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.hidden = nnx.Linear(4, 3, param_dtype=float, rngs=rngs)
        self.norm = nnx.BatchNorm(
            3, axis_name="batch", param_dtype=float, dtype=float, rngs=rngs
        )
        self.out = nnx.Linear(3, 2, param_dtype=float, rngs=rngs)

    def __call__(self, x):
        return self.out(nnx.tanh(self.norm(self.hidden(x))))


def nnx_module():
    graph, params, rest = nnx.split(Nnx(nnx.Rngs(0)), nnx.Param, ...)

    def one(params, x):
        return nnx.merge(graph, params, rest, copy=True)(x[None])[0]

    return mapped(one)._replace(params=drawn_like(params))


def drawn_like(shapes):
    leaves, treedef = jax.tree.flatten(shapes)
    drawn = [draw(*leaf.shape, seed=i) for i, leaf in enumerate(leaves)]
    return treedef.unflatten(drawn)


def pairs(h):
    """Of the examples 2 i and 2 i + 1, each is compared with the other."""
    other = jnp.flip(h.reshape(-1, 2, 3), 1).reshape(h.shape)
    return h - other


MODELS = {
    "equinox": mapped(with_moments),
    "linen": linen(),
    "nnx": nnx_module(),
    "haiku": mapped(with_sums),
    "roll": with_rows(lambda h: h - jnp.roll(h, 1, 0)),
    "first row": with_rows(lambda h: h - h[:1]),
    "pairs": with_rows(pairs),
    "graph, segments": with_rows(
        lambda h: jax.ops.segment_sum(h[SENDERS], RECEIVERS, COUNT) + h
    ),
    "graph, scattered": with_rows(lambda h: h.at[RECEIVERS].add(h[SENDERS])),
}
