"""Models that are written in parts have the information of those that are not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import fisherflow_jax as ff
from layer_cases import IDS, STEPS, X, draw

GAUSSIAN = ff.likelihoods.gaussian()


def affine(x, w, b):
    return x @ w + b.reshape((1,) * (x.ndim - 1) + b.shape)


def in_slices(p, x):
    one, other = (slice(None, 2), slice(2, None))
    h = jnp.tanh(affine(x, p["w"][:, one], p["b"][one]))
    return h * affine(x, p["w"][:, other], p["b"][other])


def at_once(p, x):
    h = affine(x, p["w"], p["b"])
    return jnp.tanh(h[..., :2]) * h[..., 2:]


def concatenated(p, x):
    w, b = jnp.concatenate([p["q"], p["k"]], 1), jnp.concatenate([p["b"], p["c"]])
    h = affine(x, w, b)
    return jnp.tanh(h[..., :3]) * h[..., 3:]


def separate(p, x):
    return jnp.tanh(affine(x, p["q"], p["b"])) * affine(x, p["k"], p["c"])


def unrolled(p, x):
    for i in range(3):
        x = jnp.tanh(affine(x, p["w"][i], p["b"][i]))
    return x


def scanned(p, x):
    def step(x, p):
        return jnp.tanh(affine(x, p["w"], p["b"])), None

    return lax.scan(step, x, p)[0]


def stacked(p, x):
    both = jnp.stack([p["first"], p["second"]])
    return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, both)[0]


def one_after_the_other(p, x):
    return jnp.tanh(jnp.tanh(x @ p["first"]) @ p["second"])


def one_by_one(p, ids):
    rows = jax.vmap(jax.vmap(lambda i: p["table"][i]))(ids)
    return jnp.tanh(rows) @ p["table"].T


def looked_up(p, ids):
    return jnp.tanh(p["table"][ids]) @ p["table"].T


PAIRS = {
    "slices": (in_slices, at_once, {"w": (4, 4), "b": (4,)}, STEPS),
    "concatenations": (
        concatenated,
        separate,
        dict.fromkeys("qk", (4, 3)) | dict.fromkeys("bc", (3,)),
        STEPS,
    ),
    "indices": (unrolled, scanned, {"w": (3, 4, 4), "b": (3, 4)}, X),
    "stacks": (
        stacked,
        one_after_the_other,
        dict.fromkeys(("first", "second"), (4, 4)),
        X,
    ),
    "ids": (one_by_one, looked_up, {"table": (5, 4)}, IDS),
}


@pytest.mark.slow_cases
@pytest.mark.parametrize(
    ("name", "batched"),
    [*((name, False) for name in PAIRS), ("slices", True), ("ids", True)],
)
def test_parts_change_nothing(name, batched):
    *models, shapes, inputs = PAIRS[name]
    params = {k: draw(*shape, seed=i) for i, (k, shape) in enumerate(shapes.items())}
    params = jax.tree.map(jnp.asarray, params)
    found = [
        ff.layers.find_layers(model, params, inputs, batched=batched)
        for model in models
    ]
    assert found[0].descriptions() == found[1].descriptions()

    def informations(params):
        return [
            ff.estimators.monte_carlo(model, GAUSSIAN, ff.structures.kronecker(layers))(
                params, (inputs, None), jax.random.key(0)
            )
            for model, layers in zip(models, found, strict=True)
        ]

    one, other = jax.jit(informations)(params)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, 1e-10, 1e-12),
        (one.input_factors, one.output_factors, one.other_entries),
        (other.input_factors, other.output_factors, other.other_entries),
    )
