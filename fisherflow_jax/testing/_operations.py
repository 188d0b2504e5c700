"""Laws of operations: each against the dense matrix, in numpy."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fisherflow_jax import information as ops
from fisherflow_jax._ground import trees
from fisherflow_jax.structures import Scalar, Structure
from fisherflow_jax.structures import _structure as capabilities
from fisherflow_jax.structures._compensated import compensate
from fisherflow_jax.structures._full import from_matrix
from fisherflow_jax.testing._law import Dense, Law
from fisherflow_jax.testing._laws import equal
from fisherflow_jax.testing._material import Material, flat

DAMPING = 0.7
NOISE = 0.2


def _vector_law(
    name: str,
    rule: str,
    operation: Callable[[Material], Any],
    expected: Callable[[Dense], np.ndarray],
) -> Law:
    """A law whose operation returns a vector like the parameters."""
    return Law(
        name,
        rule,
        lambda _, m: flat(operation(m), m.params, f"what {name} returns"),
        lambda found, dense, tolerance: equal(
            found, expected(dense), tolerance, f"{name}"
        ),
    )


def _number_law(
    name: str,
    rule: str,
    operation: Callable[[Material], jax.Array],
    expected: Callable[[Dense], float],
) -> Law:
    def measure(_: Structure, material: Material) -> jax.Array:
        value = operation(material)
        assert jnp.shape(value) == (), f"{name} is a number; got {jnp.shape(value)}"
        return value

    return Law(
        name,
        rule,
        measure,
        lambda found, dense, tolerance: equal(found, expected(dense), tolerance, name),
    )


def _damped(dense: Dense) -> np.ndarray:
    return dense.whole + DAMPING * np.eye(len(dense.whole))


def _matrix_law(
    name: str,
    rule: str,
    operation: Callable[[Structure, Material], Any],
    expected: Callable[[Dense], np.ndarray],
    applies: Callable[[Structure, type], str | None],
) -> Law:
    return Law(
        name,
        rule,
        lambda s, m: ops.to_dense(operation(s, m), m.params),
        lambda found, dense, tolerance: equal(found, expected(dense), tolerance, name),
        applies,
    )


def _declared(capability: str) -> Callable[[Structure, type], str | None]:
    def applies(structure: Structure, kind: type) -> str | None:
        if capability not in structure.supports:
            return f"the structure does not declare {capability!r}"
        return None

    return applies


def _registered(operation: Any) -> Callable[[Structure, type], str | None]:
    def applies(structure: Structure, kind: type) -> str | None:
        if operation.dispatch(kind) is operation.dispatch(object):
            return f"{kind.__name__} registers no ff.information.{operation.__name__}"
        return None

    return applies


def _invertible(structure: Structure, kind: type) -> str | None:
    # marginal=True inverts the part that it keeps of a covariance
    if capabilities.MARGINAL in structure.supports:
        return None
    return _registered(ops.inverse)(structure, kind)


def _isotropic(structure: Structure, material: Material) -> list[jax.Array]:
    made = structure.isotropic(material.params, 2.5)
    return [ops.to_dense(made, material.params)]


def _judge_isotropic(found: Any, dense: Dense, tolerance: float) -> None:
    expected = 2.5 * np.eye(len(dense.whole))
    equal(found[0], expected, tolerance, "isotropic(params, 2.5)")


def _from_matvec(structure: Structure, material: Material) -> list[jax.Array]:
    assert structure.from_matvec is not None, "from_matvec is missing"
    assert structure.from_full is not None, "from_full is missing"
    full = from_matrix(
        ops.to_dense(material.parts[0], material.params), material.params
    )
    read = structure.from_matvec(lambda v: ops.matvec(full, v), material.params)
    kept = structure.from_full(full)
    return [ops.to_dense(x, material.params) for x in (kept, read)]


def _judge_read(found: Any, dense: Dense, tolerance: float) -> None:
    equal(found[1], found[0], tolerance, "from_matvec, against from_full,")


def _compensated(structure: Structure, material: Material) -> Any:
    pair = ops.add(compensate(material.whole), material.parts[1])
    return ops.add(ops.scale(pair, 0.5), ops.scale(pair, 0.5))


def _number_of(material: Material) -> Scalar:
    return Scalar(jnp.asarray(NOISE, trees.float_dtype(material.params)))


def _moved(dense: Dense) -> np.ndarray:
    identity = np.eye(len(dense.whole))
    return np.linalg.inv(np.linalg.inv(dense.whole) + NOISE * identity)


def _sandwich(dense: Dense) -> np.ndarray:
    inverse = np.linalg.inv(dense.whole)
    return inverse @ dense.parts[1] @ inverse


LAWS = [
    Law(
        "isotropic",
        "isotropic(params, value) is value times the identity",
        _isotropic,
        _judge_isotropic,
    ),
    _vector_law(
        "matvec",
        "matvec is the matrix times the vector",
        lambda m: ops.matvec(m.whole, m.vector),
        lambda dense: dense.whole @ dense.vector,
    ),
    _vector_law(
        "solve",
        "solve inverts the matrix",
        lambda m: ops.solve(m.whole, m.vector),
        lambda dense: np.linalg.solve(dense.whole, dense.vector),
    ),
    _vector_law(
        "damped solve",
        "solve with damping inverts the matrix plus damping times the identity",
        lambda m: ops.solver(m.whole, DAMPING)(m.vector),
        lambda dense: np.linalg.solve(_damped(dense), dense.vector),
    ),
    _number_law(
        "logdet",
        "logdet is the log-determinant of the matrix",
        lambda m: ops.logdet(m.whole, m.params),
        lambda dense: np.linalg.slogdet(dense.whole)[1],
    ),
    _number_law(
        "trace",
        "trace is that of the matrix",
        lambda m: ops.trace(m.whole, m.params),
        lambda dense: np.trace(dense.whole),
    ),
    _vector_law(
        "diagonal",
        "diagonal is that of the matrix",
        lambda m: ops.diagonal(m.whole, m.params),
        lambda dense: np.diag(dense.whole),
    ),
    _vector_law(
        "inverse_diagonal",
        "inverse_diagonal is the diagonal of the inverse: variances",
        lambda m: ops.inverse_diagonal(m.whole, m.params),
        lambda dense: np.diag(np.linalg.inv(dense.whole)),
    ),
    _number_law(
        "quadratic_form",
        "quadratic_form is v^T I v",
        lambda m: ops.quadratic_form(m.whole, m.vector),
        lambda dense: dense.vector @ dense.whole @ dense.vector,
    ),
    _matrix_law(
        "inverse",
        "inverse is the inverse matrix, in the same structure",
        lambda _, m: ops.inverse(m.whole),
        lambda dense: np.linalg.inv(dense.whole),
        _invertible,
    ),
    _matrix_law(
        "sandwich",
        "sandwich(I, M) is I^-1 M I^-1: the robust covariance",
        lambda _, m: ops.sandwich(m.whole, m.parts[1]),
        _sandwich,
        _declared(capabilities.ROBUST),
    ),
    _matrix_law(
        "propagate",
        "propagate(I, Q) is (I^-1 + Q)^-1",
        lambda _, m: ops.propagate(m.whole, _number_of(m)),
        _moved,
        _declared(capabilities.RANDOM_WALK),
    ),
    Law(
        "from_matvec",
        "from_matvec keeps of an operator what from_full keeps of its matrix",
        _from_matvec,
        _judge_read,
        _declared(capabilities.OBSERVED),
    ),
    _matrix_law(
        "compensated",
        "a compensated sum has the value of the plain one",
        _compensated,
        lambda dense: dense.whole + dense.parts[1],
        _declared(capabilities.COMPENSATED),
    ),
]
