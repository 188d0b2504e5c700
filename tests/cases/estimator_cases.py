"""Small models, and the Fisher information of each from an explicit Jacobian."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

import fisherflow_jax as ff
from fisherflow_jax._ground.trees import parameter_name

COUNT = 7  # no multiple of the chunk sizes that are tried
WEIGHTS = np.array([1.0, 0.0, 2.5, 1.0, 0.0, 2.0, 0.25])


class Model(NamedTuple):
    name: str
    apply_fn: Callable
    likelihood: Any
    params: Any
    inputs: np.ndarray
    targets: np.ndarray
    output_fisher: Callable  # outputs (n, m), m numbers an example -> (n, m, m)

    def __repr__(self) -> str:
        return self.name

    @property
    def batch(self) -> tuple:
        return self.inputs, self.targets


def dense_information(factory, model, structure, batch, **options):
    """In one structure, or in a dictionary of them by one program."""
    build = functools.partial(factory, model.apply_fn, model.likelihood)

    @jax.jit
    def dense(params, batch):
        def one(structure):
            found = build(structure, **options)(params, batch)
            return ff.information.to_dense(found, params)

        if isinstance(structure, dict):
            return {name: one(each) for name, each in structure.items()}
        return one(structure)

    return dense(model.params, batch)


def network(params, x):
    hidden = jnp.tanh(x @ params["hidden"]["w"] + params["hidden"]["b"][None])
    return params["scale"] * (hidden @ params["out"])


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


INPUTS = draw(COUNT, 3, seed=1)


def network_params(outputs):
    return {
        "hidden": {"b": draw(2, seed=2), "w": draw(3, 2, seed=3)},
        "out": draw(2, outputs, seed=4),
        "scale": np.asarray(0.8),
    }


def softmax(z):
    exponentials = np.exp(z - z.max(-1, keepdims=True))
    return exponentials / exponentials.sum(-1, keepdims=True)


def diagonal_matrices(entries):
    return np.stack([np.diag(row) for row in entries])


def categorical_fisher(z):
    p = softmax(z)
    return diagonal_matrices(p) - p[:, :, None] * p[:, None, :]


def tokens_fisher(z):
    result = np.zeros((len(z), 6, 6))
    result[:, :3, :3] = categorical_fisher(z[:, :3])
    result[:, 3:, 3:] = categorical_fisher(z[:, 3:])
    return result


def bernoulli_fisher(z):
    p = 1 / (1 + np.exp(-z))
    return diagonal_matrices(p * (1 - p))


def location_scale_fisher(z):
    return diagonal_matrices(np.stack([np.exp(-2 * z[:, 1]), 2 + 0 * z[:, 1]], 1))


MODELS = [
    Model(
        "categorical",
        network,
        ff.likelihoods.categorical(),
        network_params(3),
        INPUTS,
        np.array([0, 2, 1, 1, 0, 2, 2]),
        categorical_fisher,
    ),
    Model(
        "tokens",
        lambda params, x: network(params, x).reshape((-1, 2, 3)),
        ff.likelihoods.categorical(),
        network_params(6),
        INPUTS,
        np.array([[0, 2], [1, 1], [0, 2], [2, 2], [1, 0], [0, 0], [2, 1]]),
        tokens_fisher,
    ),
    Model(
        "labels",
        network,
        ff.likelihoods.bernoulli(),
        network_params(3),
        INPUTS,
        (draw(COUNT, 3, seed=5) > 0).astype(np.float64),
        bernoulli_fisher,
    ),
    Model(
        "location_scale",
        network,
        ff.likelihoods.gaussian_location_scale(),
        network_params(2),
        INPUTS,
        draw(COUNT, seed=6),
        location_scale_fisher,
    ),
    Model(
        "poisson",
        lambda params, x: network(params, x)[:, 0],
        ff.likelihoods.poisson(),
        network_params(1),
        INPUTS,
        np.array([0.0, 3.0, 1.0, 0.0, 2.0, 1.0, 5.0]),
        lambda z: diagonal_matrices(np.exp(z)),
    ),
    Model(
        "gaussian",
        lambda params, x: network(params, x)[:, None, :],
        ff.likelihoods.gaussian(scale=0.7),
        network_params(2),
        INPUTS,
        draw(COUNT, 1, 2, seed=7),
        lambda z: np.broadcast_to(np.eye(2) / 0.49, (COUNT, 2, 2)),
    ),
]
NAMED = {model.name: model for model in MODELS}


def flat_outputs(model, params):
    return model.apply_fn(params, model.inputs).reshape((COUNT, -1))


@functools.cache
def jacobian(name):
    """Outputs `(n, m)`, and their Jacobian `(n, m, d)` in the order of ravel."""
    model = NAMED[name]
    flat, unravel = ravel_pytree(model.params)

    @jax.jit
    def both(flat):
        def outputs(flat):
            return flat_outputs(model, unravel(flat))

        return outputs(flat), jax.jacrev(outputs)(flat)

    return tuple(np.asarray(x) for x in both(flat))


def fisher(name, weights=None):
    """`sum_i w_i J_i^T L_i L_i^T J_i`, dense."""
    outputs, jacobians = jacobian(name)
    weights = np.ones(COUNT) if weights is None else weights
    inner = NAMED[name].output_fisher(outputs)
    return np.einsum("n,nad,nab,nbe->de", weights, jacobians, inner, jacobians)


@functools.cache
def scores(name):
    """The gradient of each example's log-probability, `(n, d)`."""
    model = NAMED[name]
    flat, unravel = ravel_pytree(model.params)

    @jax.jit
    @jax.jacrev
    def gradients(flat):
        outputs = model.apply_fn(unravel(flat), model.inputs)
        values = model.likelihood.log_prob(outputs, jnp.asarray(model.targets))
        return values.reshape((COUNT, -1)).sum(1)

    return np.asarray(gradients(flat))


# ---- structures, and what each keeps of a matrix over network_params(3)


def _unit(path, shape):
    columns = np.arange(int(np.prod(shape))) % (shape[-1] if shape else 1)
    return [f"{path}{column}" for column in columns]


def _mask(names_of_leaf):
    leaves = jax.tree_util.tree_leaves_with_path(network_params(3))
    names = [
        name
        for path, leaf in leaves
        for name in names_of_leaf(parameter_name(path), leaf.shape)
    ]
    return np.array([[left == right for left in names] for right in names])


def _group(path):
    return "hidden" if "hidden" in path else "rest"


STRUCTURES = {
    "scalar": ff.structures.scalar(),
    "diagonal": ff.structures.diagonal(),
    "units": ff.structures.block(),
    "groups": ff.structures.block(_group),
    "full": ff.structures.full(),
    "low_rank": ff.structures.low_rank(16),
}


def kept(name, matrix):
    """What the structure `name` keeps; low_rank has more than d = 15 directions."""
    size = len(matrix)
    if name == "scalar":
        return np.trace(matrix) / size * np.eye(size)
    if name == "diagonal":
        return np.diag(np.diag(matrix))
    if name == "units":
        return np.where(_mask(_unit), matrix, 0)
    if name == "groups":
        mask = _mask(lambda path, shape: [_group(path)] * int(np.prod(shape)))
        return np.where(mask, matrix, 0)
    return matrix


to_dense = jax.jit(ff.information.to_dense)


def dense(information, params):
    return np.asarray(to_dense(information, params))
