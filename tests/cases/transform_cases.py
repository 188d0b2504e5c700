"""A model whose information is given by its inputs, and small trees to precondition.

The rows of the inputs are the vectors themselves, so that the information of a batch is
`sum_i w_i x_i x_i^T`, whatever the parameters.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

import fisherflow_jax as ff
from fisherflow_jax.estimators import Estimator

# for programs that run a few times: compiled three times faster, not optimised
compiled = functools.partial(
    jax.jit,
    compiler_options={
        "xla_backend_optimization_level": 0,
        "xla_llvm_disable_expensive_passes": True,
    },
)

SHAPES = {"a": (2,), "b": (2, 2)}
PARAMS = {"a": np.array([0.3, -0.2]), "b": np.array([[0.5, 1.0], [-1.0, 0.1]])}
SIZE = 6


def tree(flat, dtype=None):
    flat = jnp.asarray(flat, dtype)
    return {"a": flat[..., :2], "b": flat[..., 2:].reshape((*flat.shape[:-1], 2, 2))}


def flat(tree):
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


def draw(*shape, seed):
    return np.random.default_rng(seed).normal(size=shape)


GRADIENT = draw(SIZE, seed=0)
FIRST = draw(9, SIZE, seed=1), None
SECOND = (
    draw(8, SIZE, seed=2),
    None,
    np.array([1.0, 2.0, 0.5, 1.0, 0.0, 1.0, 3.0, 1.0]),
)


def weights(batch):
    return batch[2] if len(batch) == 3 else np.ones(len(batch[0]))


def sums(batch):
    """The information of a batch, dense, and its number of observations."""
    w = weights(batch)
    return np.einsum("n,ni,nj->ij", w, batch[0], batch[0]), w.sum()


def given(structure, *, on_call=None, random=False):
    """An estimator of that information, in a structure."""

    def compute(params, batch, key):
        if on_call is not None:
            jax.debug.callback(on_call)
        factor = 1.0 if key is None else jax.random.uniform(key, minval=0.5)
        rows = jnp.sqrt(factor * batch.weights)[:, None] * batch.inputs
        return structure.reduce(tree(rows, jax.tree.leaves(params)[0].dtype))

    return Estimator("given", compute, structure, random)


STRUCTURES = {
    "scalar": ff.structures.scalar(),
    "diagonal": ff.structures.diagonal(),
    "units": ff.structures.block(),
    "groups": ff.structures.block(lambda path: path),
    "full": ff.structures.full(),
    "low_rank": ff.structures.low_rank(SIZE),
}
UNITS = np.array(["a0", "a1", "b0", "b1", "b0", "b1"])
GROUPS = np.array(["a", "a", "b", "b", "b", "b"])


def kept(name, matrix):
    """What the structure `name` keeps of a matrix."""
    if name == "scalar":
        return np.trace(matrix) / SIZE * np.eye(SIZE)
    if name == "diagonal":
        return np.diag(np.diag(matrix))
    names = {"units": UNITS, "groups": GROUPS}.get(name)
    if names is None:
        return matrix
    return np.where(names[:, None] == names[None, :], matrix, 0)


def power_of(matrix, power, damping, root_damping=0.0):
    """`((F + damping)^-power + root_damping)^-1`."""
    values, columns = np.linalg.eigh(matrix + damping * np.eye(len(matrix)))
    return columns / (values ** (-power) + root_damping) @ columns.T


# ---- a small network, and a loss on the scale of its information


def network(params, x):
    return jnp.tanh(x @ params["w"] + params["b"]) @ params["out"]


def network_params(dtype=jnp.float32):
    shapes = {"b": (4,), "out": (4, 3), "w": (2, 4)}
    return {
        name: jnp.asarray(draw(*shape, seed=len(name)), dtype)
        for name, shape in shapes.items()
    }


MODEL = network, ff.likelihoods.categorical()
LOSS = ff.negative_log_likelihood(*MODEL)
NETWORK_BATCH = (
    np.asarray(draw(12, 2, seed=5), np.float32),
    np.arange(12, dtype=np.int32) % 3,
)


def diagonal_estimator():
    return ff.estimators.exact(*MODEL, ff.structures.diagonal())
