"""Small models, and posteriors about them in every structure, made by hand."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.flatten_util import ravel_pytree

import fisherflow_jax as ff
from fisherflow_jax.structures import EigenKronecker, Kronecker


def mlp(params, x):
    hidden = jnp.tanh(x @ params["w"] + params["b"])
    return params["scale"] * (hidden @ params["v"])


def conv(params, x):
    x = lax.conv_general_dilated(
        x, params["k"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return jnp.mean(jnp.tanh(x + params["b"]), (1, 2)) @ params["v"]


def tokens(params, ids):
    """Logits `(n, T, 5)`; each position sees the mean of what came before."""
    hidden = params["table"][ids] + params["b"]
    past = jnp.cumsum(hidden, 1) / jnp.arange(1.0, ids.shape[1] + 1)[:, None]
    return jnp.tanh(past @ params["w"]) @ params["head"]


def linear(params, x):
    return x @ params["w"] + params["b"]


class Model(NamedTuple):
    """A model with parameters and inputs."""

    apply_fn: Callable
    params: Any
    inputs: Any


def _params(shapes: dict, seed: int) -> dict:
    rng = np.random.default_rng(seed)
    return {k: jnp.asarray(rng.normal(size=s)) for k, s in shapes.items()}


RNG = np.random.default_rng(7)
MODELS = {
    "mlp": Model(
        mlp,
        _params({"w": (3, 4), "b": (4,), "v": (4, 3), "scale": (3,)}, 0),
        jnp.asarray(RNG.normal(size=(5, 3))),
    ),
    "conv": Model(
        conv,
        _params({"k": (2, 2, 1, 3), "b": (3,), "v": (3, 3)}, 1),
        jnp.asarray(RNG.normal(size=(4, 3, 4, 1))),
    ),
    "tokens": Model(
        tokens,
        _params({"table": (5, 3), "b": (3,), "w": (3, 3), "head": (3, 5)}, 2),
        jnp.array([[1, 1, 4], [0, 2, 0], [3, 3, 3]]),
    ),
    "linear": Model(
        linear,
        _params({"w": (4, 3), "b": (3,)}, 3),
        jnp.asarray(RNG.normal(size=(6, 4))),
    ),
}


def positive(rng: np.random.Generator, stacked: int, size: int) -> jax.Array:
    """`(K, D, D)`, positive definite."""
    rows = rng.normal(size=(stacked, size + 2, size))
    return jnp.asarray(np.einsum("kri,krj->kij", rows, rows))


def orthonormal(rng: np.random.Generator, stacked: int, size: int) -> jax.Array:
    """`(K, D, D)`."""
    return jnp.asarray(np.linalg.qr(rng.normal(size=(stacked, size, size)))[0])


def kronecker(model: Model, corrected: bool) -> Any:
    rng = np.random.default_rng(5)
    layers = ff.layers.find_layers(*model)
    inputs, outputs, values, in_bases, out_bases = {}, {}, {}, {}, {}
    for name, (layer, *rest) in layers.alike.items():
        count = 1 + len(rest)
        sizes = layer.num_inputs + (layer.bias is not None), layer.num_outputs
        wide = layer.kind == "embedding"
        inputs[name] = positive(rng, count, sizes[0])
        if wide:
            inputs[name] = jnp.diagonal(inputs[name], axis1=1, axis2=2)
        outputs[name] = positive(rng, count, sizes[1])
        values[name] = jnp.asarray(rng.uniform(0.5, 4.0, size=(count, *sizes)))
        in_bases[name] = None if wide else orthonormal(rng, count, sizes[0])
        out_bases[name] = orthonormal(rng, count, sizes[1])
    shifts = {name: jnp.full(x.shape[:1], 0.3) for name, x in inputs.items()}
    others = {
        layers.names[leaf]: jnp.asarray(rng.uniform(1, 2, size=layers.shapes[leaf]))
        for leaf, _ in layers.fallback
    }
    number = jnp.asarray(3.0)
    if corrected:
        return EigenKronecker(
            values, in_bases, out_bases, shifts, others, number, layers
        )
    return Kronecker(inputs, outputs, shifts, others, number, layers)


@functools.cache
def state(name: str, structure: str) -> ff.Posterior:
    """A posterior with an information of no special form."""
    model = MODELS[name]
    if structure in ("kronecker", "eigen"):
        information = kronecker(model, structure == "eigen")
        return _posterior(model.params, information)
    made = {
        "scalar": ff.structures.scalar(),
        "diagonal": ff.structures.diagonal(),
        "block": ff.structures.block(),
        "full": ff.structures.full(),
        "low_rank": ff.structures.low_rank(4),
    }[structure]
    flat, unravel = ravel_pytree(model.params)
    stack = np.random.default_rng(1).normal(size=(flat.size + 5, flat.size))

    @jax.jit
    def build(stack):
        return _posterior(model.params, made.reduce(jax.vmap(unravel)(stack)))

    return build(stack)


@jax.jit
def _posterior(params: Any, information: Any) -> ff.Posterior:
    return ff.posterior(params, information, prior_precision=0.4)


@functools.cache
def jacobian(name: str) -> np.ndarray:
    """`(n, ..., k, d)`."""
    model = MODELS[name]
    flat, unravel = ravel_pytree(model.params)
    return np.asarray(
        jax.jit(jax.jacrev(lambda p: model.apply_fn(unravel(p), model.inputs)))(flat)
    )


def covariance(posterior: ff.Posterior) -> np.ndarray:
    """`(d, d)`."""
    dense = jax.jit(ff.information.to_dense)(posterior.information, posterior.mean)
    return np.linalg.inv(np.asarray(dense))


def explicit(name: str, posterior: ff.Posterior) -> np.ndarray:
    """`J Cov J^T` of the outputs on the last axis, `(n, ..., k, k)`."""
    rows = jacobian(name)
    return np.einsum("...id,de,...je->...ij", rows, covariance(posterior), rows)
