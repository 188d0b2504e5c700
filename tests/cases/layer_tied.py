"""Models that use a kernel and its transpose, as a table and at the outputs."""

import jax
import jax.numpy as jnp
from jax import lax

from layer_cases import IDS, V_DENSE, WV, Bias, X, dense, embedding, model


def language(p, ids):
    """Scaled look-ups, and logits of which some are masked."""
    h = jnp.tanh(2.0 * p["embed"][ids] @ p["w"] + p["b"][None, None])
    logits = 0.5 * h @ p["embed"].T + p["c"][None, None]
    return jnp.where(jnp.arange(5)[None, None] == 3, -9.0, logits)


def two_sides(p, ids):
    """A table for both sides, under checkpoints and row by row."""

    @jax.checkpoint
    def encode(ids):
        return jnp.mean(p["embed"][ids], 0)

    def one(ids):
        h = jnp.tanh(p["embed"][ids[::-1]] + encode(ids)[None])
        return jax.vmap(lambda h: p["embed"] @ h)(h)

    return jax.vmap(one)(ids)


def recurrent(p, ids):
    """A table inside of a scan, from which it reads its own outputs."""

    def step(h, ids):
        h = jnp.tanh(p["embed"][:, ids].T + h)
        return h, h @ p["embed"]

    h = jnp.zeros((ids.shape[0], 4), p["embed"].dtype)
    return jnp.moveaxis(lax.scan(step, h, ids.T)[1], 0, 1)


def one_by_one(p, ids):
    """One id at a time."""
    h = jax.vmap(jax.vmap(lambda i: p["embed"][i]))(ids)
    return jnp.tanh(h) @ p["embed"].T


def inverted(p, x):
    """Layers that are undone by their own transposes."""

    def step(x, w):
        return jnp.tanh(jnp.tanh(x @ w) @ w.T), None

    x = jnp.tanh(x @ p["w"] + p["b"][None]) @ p["w"].T
    return lax.scan(step, x, p["stack"])[0] @ p["v"]


TABLE = {"embed": (5, 4)}
TIED = {
    "language": model(
        language,
        TABLE | {"w": (4, 4), "b": (4,), "c": (5,)},
        IDS,
        embed=embedding(5, 4, shared=3, turned=3),
        w=dense(4, 4, shared=3),
        b=Bias("w"),
        c="bias of a kernel that is used both ways",
    ),
    "two sides": model(
        two_sides, TABLE, IDS, embed=embedding(5, 4, shared=6, turned=3)
    ),
    "recurrent": model(
        recurrent, {"embed": (4, 5)}, IDS, embed=embedding(5, 4, shared=3, turned=3)
    ),
    "one by one": model(
        one_by_one, TABLE, IDS, embed=embedding(5, 4, shared=3, turned=3)
    ),
    "inverted": model(
        inverted,
        WV | {"b": (4,), "stack": (2, 4, 3)},
        X,
        w=dense(4, 4, turned=1),
        b="bias of a kernel that is used both ways",
        stack=dense(4, 3, stacked=2, turned=1),
        **V_DENSE,
    ),
}
