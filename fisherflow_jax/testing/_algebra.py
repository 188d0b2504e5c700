"""Laws of sums: what is reduced, added, scaled and fused."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fisherflow_jax import information as ops
from fisherflow_jax._ground import trees
from fisherflow_jax.structures import Diagonal, Full, OuterProducts, Scalar
from fisherflow_jax.testing._laws import Dense, Law, equal, law, matrix
from fisherflow_jax.testing._material import Material, joined, times

WEIGHTS = (1.0, 0.5, 0.25)
NUMBER = 1.5

sums = functools.partial(law, matrix)


def from_full(material: Material) -> Any:
    stack, structure = material.stacks[0], material.structure
    assert not any(
        isinstance(leaf, OuterProducts) for leaf in jax.tree.leaves(stack)
    ), "vectors kept as outer products have no matrix here"
    flat = trees.ravel(stack, 1)
    assert structure.from_full is not None
    return structure.from_full(Full(trees.unravel(flat.T @ flat, material.params)))


def _has_from_full(material: Material) -> str | None:
    if material.structure.from_full is None:
        return "the structure has no from_full, so its part of a matrix is not declared"
    return None


def _judge_positive(found: Any, dense: Dense, tolerance: float) -> None:
    matrix = dense.parts[0]
    equal(matrix, matrix.T, tolerance, "the matrix, against its transpose,")
    if not len(matrix):
        return
    values = np.linalg.eigvalsh((matrix + matrix.T) / 2)
    assert values[0] >= -tolerance * max(abs(values[-1]), 1e-30), (
        f"the smallest eigenvalue is {values[0]:.3g}, beside the largest, "
        f"{values[-1]:.3g}"
    )


def _reduce_times(material: Material, factor: float) -> Any:
    return material.structure.reduce(times(material.stacks[0], factor))


def _in_any_order(material: Material) -> list:
    a, b, c = material.parts
    return [
        ops.add(ops.add(a, b), c),
        ops.add(a, ops.add(b, c)),
        ops.add(ops.add(c, a), b),
    ]


def _add_zero(material: Material) -> list:
    zero, part = material.structure.isotropic(material.params, 0.0), material.parts[0]
    return [ops.add(zero, part), ops.add(part, zero)]


def _add_number(material: Material) -> Any:
    number = Scalar(jnp.asarray(NUMBER, trees.float_dtype(material.params)))
    return ops.add(material.parts[0], number)


def _entries(count: int) -> np.ndarray:
    return 1.0 + np.arange(count) % 3


def _add_diagonal(material: Material) -> Any:
    """The sum, or None where it is refused."""
    flat = _entries(trees.size(material.params))
    dtype = trees.float_dtype(material.params)
    entries = trees.unravel(jnp.asarray(flat, dtype), material.params)
    try:
        total = ops.add(material.parts[0], Diagonal(entries))
    except (TypeError, ValueError):
        return None
    return ops.to_dense(total, material.params)


def _judge_diagonal(found: Any, dense: Dense, tolerance: float) -> None:
    if found is not None:
        expected = dense.parts[0] + np.diag(_entries(len(dense.whole)))
        equal(found, expected, tolerance, "the sum with a Diagonal")


def _total(material: Material) -> list[jax.Array]:
    dtype = trees.float_dtype(material.params)
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *material.parts)
    total = ops.total(stacked, jnp.asarray(WEIGHTS, dtype))
    scaled = map(ops.scale, material.parts, WEIGHTS)
    return [
        ops.to_dense(x, material.params)
        for x in (total, functools.reduce(ops.add, scaled))
    ]


def _judge_total(found: Any, dense: Dense, tolerance: float) -> None:
    total, folded = found
    operators = np.tensordot(WEIGHTS, np.stack(dense.parts), 1)
    # a structure may sum a stack with less loss than one by one
    expected = min(
        folded, operators, key=lambda x: np.max(np.abs(total - x), initial=0)
    )
    equal(total, expected, tolerance, f"the total with weights {WEIGHTS}")


def _fuse(material: Material) -> list:
    start, parts = material.whole, material.parts[1:]
    workers = [ops.add(start, part) for part in parts]
    return [functools.reduce(ops.add, parts, start), ops.fuse(start, workers)]


LAWS = [
    sums(
        "its own part",
        "reduce keeps what from_full keeps of the matrix sum_k v_k v_k^T",
        from_full,
        lambda dense: dense.parts[0],
        _has_from_full,
    ),
    Law(
        "positive",
        "what reduce returns is symmetric and positive semi-definite",
        lambda material: None,
        _judge_positive,
    ),
    sums(
        "squares",
        "vectors twice as long have four times the information",
        lambda m: _reduce_times(m, 2.0),
        lambda dense: 4 * dense.parts[0],
    ),
    sums(
        "zero vectors",
        "vectors of zeros have no information, and nothing of it is NaN",
        lambda m: _reduce_times(m, 0.0),
        lambda dense: 0 * dense.parts[0],
    ),
    sums(
        "sums over parts",
        "information is a sum over observations: all at once or part by part",
        lambda m: [
            m.structure.reduce(joined(*m.stacks[:2])),
            ops.add(*m.parts[:2]),
        ],
    ),
    sums(
        "addition",
        "add(a, b) is the sum of the matrices",
        lambda m: ops.add(*m.parts[:2]),
        lambda dense: dense.parts[0] + dense.parts[1],
    ),
    sums(
        "swapped",
        "add(a, b) is add(b, a)",
        lambda m: [ops.add(*m.parts[:2]), ops.add(*m.parts[1::-1])],
    ),
    sums("any order", "sums of three do not depend on their order", _in_any_order),
    sums(
        "copies",
        "an information added to itself is twice as much",
        lambda m: ops.add(m.parts[0], m.parts[0]),
        lambda dense: 2 * dense.parts[0],
    ),
    sums(
        "nothing to add",
        "isotropic(params, 0) added on either side changes nothing",
        _add_zero,
        lambda dense: dense.parts[0],
    ),
    sums(
        "a number to add",
        "add takes a Scalar, which is how a numeric prior arrives",
        _add_number,
        lambda dense: dense.parts[0] + NUMBER * np.eye(len(dense.whole)),
    ),
    Law(
        "a diagonal to add",
        "the sum with a Diagonal is that of the matrices, or it is refused",
        _add_diagonal,
        _judge_diagonal,
    ),
    sums(
        "scale",
        "scale(a, 0.3) is the matrix times 0.3",
        lambda m: ops.scale(m.whole, 0.3),
        lambda dense: 0.3 * dense.whole,
    ),
    Law(
        "total",
        "total(stack, weights) is the weighted sum of the stack",
        _total,
        _judge_total,
    ),
    sums(
        "fuse",
        "fuse(start, workers) counts the start once and each worker's gain once",
        _fuse,
    ),
]
