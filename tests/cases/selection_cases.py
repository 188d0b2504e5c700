"""Small models of three likelihoods, states in every structure, dense references."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

import fisherflow_jax as ff

RNG = np.random.default_rng(0)
POOL = jnp.asarray(RNG.normal(size=(30, 3)))
SEEN, ELSEWHERE = POOL[:10] * 0.7, jnp.asarray(RNG.normal(size=(5, 3))) + 1
LIKELIHOODS = {
    "gaussian": ff.likelihoods.gaussian(scale=0.5),
    "bernoulli": ff.likelihoods.bernoulli(),
    "categorical": ff.likelihoods.categorical(),
}


def apply_fn(params, x):
    hidden = jnp.tanh(x @ params["w"] + params["b"])
    return (
        (hidden @ params["v"])[:, 0]
        if params["v"].shape[1] == 1
        else (hidden @ params["v"])
    )


def params(likelihood: str) -> dict:
    rng = np.random.default_rng(1)
    shapes = {"w": (3, 4), "b": (4,), "v": (4, 3 if likelihood == "categorical" else 1)}
    return {k: jnp.asarray(rng.normal(size=s)) for k, s in shapes.items()}


def structure(name: str, at: dict) -> Any:
    if name == "kronecker":
        layers = ff.layers.find_layers(apply_fn, at, POOL)
        return ff.structures.kronecker(layers)
    return (
        ff.structures.low_rank(4)
        if name == "low_rank"
        else getattr(ff.structures, name)()
    )


STRUCTURES = ["scalar", "diagonal", "block", "kronecker", "full", "low_rank"]


@functools.cache
def state(name: str, likelihood: str) -> ff.Posterior:
    at, own = params(likelihood), LIKELIHOODS[likelihood]
    estimator = ff.estimators.exact(apply_fn, own, structure(name, at))
    return ff.posterior(at, estimator(at, (SEEN, None)), prior_precision=0.3)


@functools.cache
def target(likelihood: str) -> Any:
    at, own = params(likelihood), LIKELIHOODS[likelihood]
    estimator = ff.estimators.exact(apply_fn, own, ff.structures.full())
    return estimator(at, (ELSEWHERE, None))


@functools.cache
def informations(likelihood: str) -> np.ndarray:
    """`F_x` of the pool, `(n, d, d)`, from explicit Jacobians."""
    flat, unravel = ravel_pytree(params(likelihood))
    rows = jax.jit(jax.jacrev(lambda p: apply_fn(unravel(p), POOL)))(flat)
    rows = np.asarray(rows).reshape((len(POOL), -1, flat.size))
    outputs = np.asarray(apply_fn(params(likelihood), POOL)).reshape((len(POOL), -1))
    if likelihood == "gaussian":
        fisher = np.full((len(POOL), 1, 1), 4.0)
    elif likelihood == "bernoulli":
        p = 1 / (1 + np.exp(-outputs))
        fisher = (p * (1 - p))[..., None]
    else:
        p = np.exp(outputs) / np.exp(outputs).sum(1, keepdims=True)
        fisher = np.einsum("ni,ij->nij", p, np.eye(3)) - p[:, :, None] * p[:, None]
    return np.einsum("nrd,nrs,nse->nde", rows, fisher, rows)


def dense(information: Any, like: Any) -> np.ndarray:
    return np.asarray(jax.jit(ff.information.to_dense)(information, like))


def brute_force(
    base: np.ndarray,
    added: np.ndarray,
    count: int,
    middle: np.ndarray | None = None,
    costs: np.ndarray | float = 1.0,
    replace: bool = False,
) -> tuple[list[int], list[float], np.ndarray]:
    """Picks, gains and what remains, recomputed from dense matrices at each choice."""

    def worth(matrix: np.ndarray) -> float:
        if middle is None:
            return np.linalg.slogdet(matrix)[1] / 2
        return -np.trace(middle @ np.linalg.inv(matrix))

    def all_gains() -> np.ndarray:
        return np.array([worth(base + one) - worth(base) for one in added])

    picks: list[int] = []
    gains: list[float] = []
    for _ in range(count):
        found = all_gains()
        ratios = found / costs
        if not replace:
            ratios[picks] = -np.inf
        best = int(np.argmax(ratios))
        picks.append(best)
        gains.append(found[best])
        base = base + added[best]
    return picks, gains, all_gains()
