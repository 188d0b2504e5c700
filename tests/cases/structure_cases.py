"""Every structure, and in numpy what it keeps of a matrix: the tests' reference."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

import fisherflow_jax as ff
from fisherflow_jax.structures._compensated import Compensated

# Leaves of 0 to 3 dimensions, nested; numpy, so that importing computes nothing.
PARAMS = {
    "conv": np.zeros((2, 1, 3)),
    "deep": (np.zeros(()), np.zeros(2)),
    "kernel": np.zeros((3, 2)),
}
SIZE = 15
PRIOR = 0.5

# In the order of ravel: conv 0-5, deep[0] 6, deep[1] 7-8, kernel 9-14.
UNITS = [[0, 3], [1, 4], [2, 5], [6], [7], [8], [9, 11, 13], [10, 12, 14]]
SHARED_NAMES = [[0, 1, 2, 3, 4, 5, 9, 10, 11, 12, 13, 14], [6, 7, 8]]


class Case(NamedTuple):
    name: str
    structure: ff.structures.Structure
    kept: Callable[[np.ndarray], np.ndarray]  # dense (d, d) -> dense (d, d)
    compensated: bool = False

    def __repr__(self) -> str:
        return self.name


def only(groups: list[list[int]]) -> Callable[[np.ndarray], np.ndarray]:
    mask = np.zeros((SIZE, SIZE), bool)
    for group in groups:
        mask[np.ix_(group, group)] = True
    return lambda matrix: np.where(mask, matrix, 0.0)


def leading(rank: int) -> Callable[[np.ndarray], np.ndarray]:
    """The leading directions whole, and of the rest the diagonal."""

    def kept(matrix: np.ndarray) -> np.ndarray:
        values, basis = np.linalg.eigh(matrix)
        top = (basis[:, -rank:] * values[-rank:]) @ basis[:, -rank:].T
        return top + np.diag(np.diag(matrix - top))

    return kept


STRUCTURES = [
    Case(
        "scalar",
        ff.structures.scalar(),
        lambda matrix: np.trace(matrix) / SIZE * np.eye(SIZE),
    ),
    Case(
        "diagonal",
        ff.structures.diagonal(),
        lambda matrix: np.diag(np.diag(matrix)),
    ),
    Case("units", ff.structures.block(), only(UNITS)),
    Case(
        "block-names",
        ff.structures.block(
            {"conv": "outer", "deep": ("inner", "inner"), "kernel": "outer"}
        ),
        only(SHARED_NAMES),
    ),
    Case("full", ff.structures.full(), lambda matrix: matrix),
    Case("low_rank-4", ff.structures.low_rank(4), leading(4)),
    Case("low_rank-more-than-d", ff.structures.low_rank(20), lambda matrix: matrix),
]
LOW_RANK = [case for case in STRUCTURES if case.name.startswith("low_rank")]
DENSE_PARTS = [case for case in STRUCTURES if case not in LOW_RANK]  # linear in matrix
COMPENSATED = [
    case._replace(name=f"compensated-{case.name}", compensated=True)
    for case in DENSE_PARTS
    if case.name in ("scalar", "diagonal", "units", "full")
]
# Whatever the structure, a pair does what its rounded value does.
CASES = [*STRUCTURES, COMPENSATED[-1]]
NAMED = {case.name: case for case in STRUCTURES + COMPENSATED}


def tree(flat: Any) -> Any:
    """A vector `(*batch, d)` as a tree like PARAMS, independently of the package."""
    flat, leaves, start = jnp.asarray(flat), [], 0
    for shape in ((2, 1, 3), (), (2,), (3, 2)):
        stop = start + int(np.prod(shape))
        leaves.append(flat[..., start:stop].reshape(flat.shape[:-1] + shape))
        start = stop
    return {"conv": leaves[0], "deep": (leaves[1], leaves[2]), "kernel": leaves[3]}


def flat(vector: Any) -> np.ndarray:
    return np.asarray(ravel_pytree(vector)[0])


ROWS = 18


def rows(count: int = ROWS, seed: int = 0) -> np.ndarray:
    """Vectors `(ROWS, d)` of different scale, all zero but `count` of them."""
    vectors = np.random.default_rng(seed).normal(size=(ROWS, SIZE))
    vectors[count:] = 0.0
    return vectors * np.geomspace(0.3, 3.0, SIZE)


@functools.cache
def _builder(case: Case) -> Callable:
    def build(vectors):
        reduced = case.structure.reduce(tree(vectors))
        result = ff.information.add(reduced, ff.structures.Scalar(jnp.asarray(PRIOR)))
        if not case.compensated:
            return result
        # a large low part, so that an operation that forgets it is far off
        high, low = (ff.information.scale(result, part) for part in (0.75, 0.25))
        return Compensated(high, low)

    return jax.jit(build)


def information(case: Case, count: int = ROWS, seed: int = 0) -> Any:
    """What the case's structure keeps of `rows`, and a prior of PRIOR."""
    return _builder(case)(rows(count, seed))


@jax.jit
def dense(information: Any) -> jax.Array:
    return ff.information.to_dense(information, PARAMS)


def matrix(case: Case, count: int = ROWS, seed: int = 0) -> np.ndarray:
    """The reference of `information`."""
    vectors = rows(count, seed)
    return case.kept(vectors.T @ vectors) + PRIOR * np.eye(SIZE)
