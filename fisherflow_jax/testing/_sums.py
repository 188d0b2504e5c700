"""Laws of sums: what is reduced, added, scaled and fused."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fisherflow_jax import information as ops
from fisherflow_jax._ground import trees
from fisherflow_jax.structures import Diagonal, Full, OuterProducts
from fisherflow_jax.testing._laws import NotApplicable, equal, positive_semi_definite
from fisherflow_jax.testing._material import Material, joined, times

WEIGHTS = (1.0, 0.5, 0.25)
NUMBER = 1.5


def its_own_part(m: Material) -> Any:
    """its own part: reduce keeps what from_full keeps of the matrix sum_k v_k v_k^T"""
    if m.structure.from_full is None:
        raise NotApplicable(
            "the structure has no from_full, so its part of a matrix is not declared"
        )
    assert not any(
        isinstance(leaf, OuterProducts) for leaf in jax.tree.leaves(m.stacks[0])
    ), "vectors kept as outer products have no matrix here"
    flat = trees.ravel(m.stacks[0], 1)
    full = Full(trees.unravel(flat.T @ flat, m.params))
    return m.matrix(m.structure.from_full(full)), m.dense.parts[0]


def positive(m: Material) -> Any:
    """positive: what reduce returns is symmetric and positive semi-definite"""
    positive_semi_definite(m.dense.parts[0], m.tolerance)


def squares(m: Material) -> Any:
    """squares: vectors twice as long have four times the information"""
    doubled = m.structure.reduce(times(m.stacks[0], 2.0))
    return m.matrix(doubled), 4 * m.dense.parts[0]


def zero_vectors(m: Material) -> Any:
    """zero vectors: vectors of zeros have no information, and nothing of it is NaN"""
    nothing = m.structure.reduce(times(m.stacks[0], 0.0))
    return m.matrix(nothing), 0 * m.dense.parts[0]


def sums_over_parts(m: Material) -> Any:
    """sums over parts: information is a sum over observations: all at once or part by
    part"""
    at_once = m.structure.reduce(joined(*m.stacks[:2]))
    return m.matrix(ops.add(*m.parts[:2])), m.matrix(at_once)


def addition(m: Material) -> Any:
    """addition: add(a, b) is the sum of the matrices"""
    return m.matrix(ops.add(*m.parts[:2])), m.dense.parts[0] + m.dense.parts[1]


def swapped(m: Material) -> Any:
    """swapped: add(a, b) is add(b, a)"""
    return m.matrix(ops.add(*m.parts[1::-1])), m.matrix(ops.add(*m.parts[:2]))


def any_order(m: Material) -> Any:
    """any order: sums of three do not depend on their order"""
    a, b, c = m.parts
    total = m.matrix(ops.add(ops.add(a, b), c))
    others = [ops.add(a, ops.add(b, c)), ops.add(ops.add(c, a), b)]
    return [(m.matrix(other), total) for other in others]


def copies(m: Material) -> Any:
    """copies: an information added to itself is twice as much"""
    return m.matrix(ops.add(m.parts[0], m.parts[0])), 2 * m.dense.parts[0]


def nothing_to_add(m: Material) -> Any:
    """nothing to add: isotropic(params, 0) added on either side changes nothing"""
    zero, part = m.structure.isotropic(m.params, 0.0), m.parts[0]
    sides = [ops.add(zero, part), ops.add(part, zero)]
    return [(m.matrix(side), m.dense.parts[0]) for side in sides]


def a_number_to_add(m: Material) -> Any:
    """a number to add: add takes a Scalar, which is how a numeric prior arrives"""
    total = ops.add(m.parts[0], m.scalar(NUMBER))
    return m.matrix(total), m.dense.parts[0] + NUMBER * m.dense.identity


def a_diagonal_to_add(m: Material) -> Any:
    """a diagonal to add: the sum with a Diagonal is that of the matrices, or it is
    refused"""
    entries = 1.0 + np.arange(len(m.dense.vector)) % 3
    diagonal = Diagonal(trees.unravel(m.number(entries), m.params))
    try:
        total = ops.add(m.parts[0], diagonal)
    except (TypeError, ValueError):
        return None
    return m.matrix(total), m.dense.parts[0] + np.diag(entries)


def scale(m: Material) -> Any:
    """scale: scale(a, 0.3) is the matrix times 0.3"""
    return m.matrix(ops.scale(m.whole, 0.3)), 0.3 * m.dense.whole


def total(m: Material) -> Any:
    """total: total(stack, weights) is the weighted sum of the stack"""
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *m.parts)
    found = m.matrix(ops.total(stacked, m.number(WEIGHTS)))
    folded = m.matrix(functools.reduce(ops.add, map(ops.scale, m.parts, WEIGHTS)))
    operators = np.tensordot(WEIGHTS, np.stack(m.dense.parts), 1)

    def judge(both: np.ndarray) -> None:
        # a structure may sum a stack with less loss than one by one
        found, folded = np.asarray(both, np.float64)
        errors = [np.max(np.abs(found - x), initial=0) for x in (folded, operators)]
        nearest = folded if errors[0] <= errors[1] else operators
        equal(found, nearest, m.tolerance, "total")

    return jnp.stack([found, folded]), judge


def fuse(m: Material) -> Any:
    """fuse: fuse(start, workers) counts the start once and each worker's gain once"""
    gains = m.parts[1:]
    fused = ops.fuse(m.whole, [ops.add(m.whole, gain) for gain in gains])
    return m.matrix(fused), m.matrix(functools.reduce(ops.add, gains, m.whole))
