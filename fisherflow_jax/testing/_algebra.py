"""Laws of sums: what is reduced, added, scaled and fused."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fisherflow_jax import information as ops
from fisherflow_jax._ground import trees
from fisherflow_jax.structures import OuterProducts, Scalar, Structure
from fisherflow_jax.structures._full import from_matrix
from fisherflow_jax.testing._law import Dense, Law
from fisherflow_jax.testing._laws import equal
from fisherflow_jax.testing._material import Material, joined, times

WEIGHTS = (1.0, 0.5, 0.25)
NUMBER = 1.5


def _dense(information: Any, material: Material) -> jax.Array:
    return ops.to_dense(information, material.params)


def _fold(parts: list) -> Any:
    total = parts[0]
    for part in parts[1:]:
        total = ops.add(total, part)
    return total


# ---- what reduce keeps


def _gram(structure: Structure, material: Material) -> jax.Array | None:
    stack = material.stacks[0]
    if any(isinstance(leaf, OuterProducts) for leaf in jax.tree.leaves(stack)):
        return None
    flat = trees.ravel(stack, 1)
    return flat.T @ flat


def _from_full(structure: Structure, material: Material) -> jax.Array:
    gram = _gram(structure, material)
    assert gram is not None, "vectors kept as outer products have no matrix here"
    assert structure.from_full is not None
    whole = from_matrix(gram, material.params)
    return _dense(structure.from_full(whole), material)


def _judge_from_full(found: Any, dense: Dense, tolerance: float) -> None:
    equal(dense.parts[0], found, tolerance, "reduce, against from_full of the matrix,")


def _has_from_full(structure: Structure, kind: type) -> str | None:
    if structure.from_full is None:
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


def _nothing(structure: Structure, material: Material) -> None:
    return None


def _squares(structure: Structure, material: Material) -> jax.Array:
    return _dense(structure.reduce(times(material.stacks[0], 2.0)), material)


def _zero_vectors(structure: Structure, material: Material) -> jax.Array:
    return _dense(structure.reduce(times(material.stacks[0], 0.0)), material)


def _all_at_once(structure: Structure, material: Material) -> tuple:
    stacks, parts = material.stacks, material.parts
    at_once = structure.reduce(joined(stacks[0], stacks[1]))
    return _dense(at_once, material), _dense(ops.add(parts[0], parts[1]), material)


def _judge_pair(found: Any, dense: Dense, tolerance: float) -> None:
    equal(found[1], found[0], tolerance, "the sum of the parts, against all at once,")


# ---- add and scale


def _add(structure: Structure, material: Material) -> jax.Array:
    return _dense(ops.add(material.parts[0], material.parts[1]), material)


def _order(structure: Structure, material: Material) -> list[jax.Array]:
    a, b, c = material.parts
    sums = [
        ops.add(ops.add(a, b), c),
        ops.add(a, ops.add(b, c)),
        ops.add(ops.add(c, a), b),
    ]
    return [_dense(total, material) for total in sums]


def _judge_order(found: Any, dense: Dense, tolerance: float) -> None:
    equal(found[1], found[0], tolerance, "a + (b + c), against (a + b) + c,")
    equal(found[2], found[0], tolerance, "(c + a) + b, against (a + b) + c,")


def _swapped(structure: Structure, material: Material) -> list[jax.Array]:
    a, b, _ = material.parts
    return [_dense(ops.add(a, b), material), _dense(ops.add(b, a), material)]


def _copies(structure: Structure, material: Material) -> jax.Array:
    return _dense(ops.add(material.parts[0], material.parts[0]), material)


def _add_zero(structure: Structure, material: Material) -> list[jax.Array]:
    zero, part = structure.isotropic(material.params, 0.0), material.parts[0]
    return [
        _dense(ops.add(zero, part), material),
        _dense(ops.add(part, zero), material),
    ]


def _judge_zero(found: Any, dense: Dense, tolerance: float) -> None:
    for total in found:
        equal(total, dense.parts[0], tolerance, "the sum with nothing")


def _number(structure: Structure, material: Material) -> jax.Array:
    dtype = trees.float_dtype(material.params)
    number = Scalar(jnp.asarray(NUMBER, dtype))
    return _dense(ops.add(material.parts[0], number), material)


def _judge_number(found: Any, dense: Dense, tolerance: float) -> None:
    expected = dense.parts[0] + NUMBER * np.eye(len(dense.whole))
    equal(found, expected, tolerance, f"the sum with the number {NUMBER}")


def _scale(structure: Structure, material: Material) -> jax.Array:
    return _dense(ops.scale(material.whole, 0.3), material)


# ---- stacks and workers


def _total(structure: Structure, material: Material) -> list[jax.Array]:
    dtype = trees.float_dtype(material.params)
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *material.parts)
    total = ops.total(stacked, jnp.asarray(WEIGHTS, dtype))
    scaled = [
        ops.scale(part, weight)
        for part, weight in zip(material.parts, WEIGHTS, strict=True)
    ]
    return [_dense(total, material), _dense(_fold(scaled), material)]


def _judge_total(found: Any, dense: Dense, tolerance: float) -> None:
    total, folded = found
    operators = np.tensordot(WEIGHTS, np.stack(dense.parts), 1)
    # a structure may sum a stack with less loss than one by one
    expected = min(
        folded, operators, key=lambda x: np.max(np.abs(total - x), initial=0)
    )
    equal(total, expected, tolerance, f"the total with weights {WEIGHTS}")


def _fuse(structure: Structure, material: Material) -> list[jax.Array]:
    start = material.whole
    workers = [ops.add(start, part) for part in material.parts[1:]]
    fused = ops.fuse(start, workers)
    return [
        _dense(_fold([start, *material.parts[1:]]), material),
        _dense(fused, material),
    ]


def _equals_scaled(factor: float, of_whole: bool, what: str):
    def judge(found: Any, dense: Dense, tolerance: float) -> None:
        matrix = dense.whole if of_whole else dense.parts[0]
        equal(found, factor * matrix, tolerance, what)

    return judge


LAWS = [
    Law(
        "its own part",
        "reduce keeps what from_full keeps of the matrix sum_k v_k v_k^T",
        _from_full,
        _judge_from_full,
        _has_from_full,
    ),
    Law(
        "positive",
        "what reduce returns is symmetric and positive semi-definite",
        _nothing,
        _judge_positive,
    ),
    Law(
        "squares",
        "vectors twice as long have four times the information",
        _squares,
        _equals_scaled(4.0, False, "the information of 2 v"),
    ),
    Law(
        "zero vectors",
        "vectors of zeros have no information, and nothing of it is NaN",
        _zero_vectors,
        lambda found, dense, tolerance: equal(
            found, np.zeros_like(found), tolerance, "the information of zeros"
        ),
    ),
    Law(
        "sums over parts",
        "information is a sum over observations: all at once or part by part",
        _all_at_once,
        _judge_pair,
    ),
    Law(
        "addition",
        "add(a, b) is the sum of the matrices",
        _add,
        lambda found, dense, tolerance: equal(
            found, dense.parts[0] + dense.parts[1], tolerance, "the sum"
        ),
    ),
    Law("swapped", "add(a, b) is add(b, a)", _swapped, _judge_pair),
    Law(
        "any order", "sums of three do not depend on their order", _order, _judge_order
    ),
    Law(
        "copies",
        "an information added to itself is twice as much",
        _copies,
        _equals_scaled(2.0, False, "the sum of two copies"),
    ),
    Law(
        "nothing to add",
        "isotropic(params, 0) added on either side changes nothing",
        _add_zero,
        _judge_zero,
    ),
    Law(
        "a number to add",
        "add takes a Scalar, which is how a numeric prior arrives",
        _number,
        _judge_number,
    ),
    Law(
        "scale",
        "scale(a, 0.3) is the matrix times 0.3",
        _scale,
        _equals_scaled(0.3, True, "the scaled information"),
    ),
    Law(
        "total",
        "total(stack, weights) is the weighted sum of the stack",
        _total,
        _judge_total,
    ),
    Law(
        "fuse",
        "fuse(start, workers) counts the start once and each worker's gain once",
        _fuse,
        _judge_pair,
    ),
]
