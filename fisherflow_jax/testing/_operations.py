"""Laws of operations: each against the dense matrix, in numpy."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fisherflow_jax import information as ops
from fisherflow_jax import structures
from fisherflow_jax._ground import trees
from fisherflow_jax.structures import Compensated, Full, Scalar
from fisherflow_jax.testing._laws import Dense, Law, equal, law, matrix, number, vector
from fisherflow_jax.testing._material import Material

DAMPING = 0.7
NOISE = 0.2
FACTOR = 0.4

vectors = functools.partial(law, vector)
numbers = functools.partial(law, number)
matrices = functools.partial(law, matrix)


def _declared(capability: str) -> Callable[[Material], str | None]:
    def applies(material: Material) -> str | None:
        if capability not in material.structure.supports:
            return f"the structure does not declare {capability!r}"
        return None

    return applies


def _invertible(material: Material) -> str | None:
    # marginal=True inverts the part that it keeps of a covariance
    if structures.capabilities.MARGINAL in material.structure.supports:
        return None
    if not ops.provides(ops.inverse, material.whole):
        kind = type(material.whole).__name__
        return f"{kind} registers no ff.information.inverse"
    return None


def _from_matvec(material: Material) -> list:
    structure = material.structure
    assert structure.from_matvec is not None, "from_matvec is missing"
    assert structure.from_full is not None, "from_full is missing"
    part = ops.to_dense(material.parts[0], material.params)
    full = Full(trees.unravel(part, material.params))
    read = structure.from_matvec(lambda v: ops.matvec(full, v), material.params)
    return [structure.from_full(full), read]


def _compensated(material: Material) -> Any:
    nothing = jax.tree.map(jnp.zeros_like, material.whole)
    pair = ops.add(Compensated(material.whole, nothing), material.parts[1])
    return ops.add(ops.scale(pair, 0.5), ops.scale(pair, 0.5))


def _number_of(material: Material) -> Scalar:
    return Scalar(jnp.asarray(NOISE, trees.float_dtype(material.params)))


def _damped(dense: Dense, damping: float = DAMPING) -> np.ndarray:
    return dense.whole + damping * np.eye(len(dense.whole))


def _solution(dense: Dense) -> np.ndarray:
    return np.linalg.solve(dense.whole, dense.vector)


def _damped_solution(dense: Dense) -> np.ndarray:
    return np.linalg.solve(_damped(dense), dense.vector)


def _moved(dense: Dense) -> np.ndarray:
    identity = np.eye(len(dense.whole))
    return np.linalg.inv(np.linalg.inv(dense.whole) + NOISE * identity)


def _sandwich(dense: Dense) -> np.ndarray:
    inverse = np.linalg.inv(dense.whole)
    return inverse @ dense.parts[1] @ inverse


# ---- with and without a template


WITH_LIKE: list[Callable] = [
    ops.logdet,
    ops.trace,
    ops.diagonal,
    ops.inverse_diagonal,
    ops.to_dense,
    ops.effective,
]


def _without_like(material: Material) -> list:
    """Pairs of what is computed with a template and without, where it is."""
    pairs = []
    for operation in WITH_LIKE:
        given = (_number_of(material),) if operation is ops.effective else ()
        try:
            bare = operation(material.whole, *given)
        except Exception:
            continue  # a structure that stores no shape
        pairs.append((operation(material.whole, *given, like=material.params), bare))
    return [(trees.ravel(given), trees.ravel(bare)) for given, bare in pairs]


def _judge_pairs(found: list, dense: Dense, tolerance: float) -> None:
    for given, bare in found:
        equal(bare, given, tolerance, "a result without like, against that with it,")


# ---- spectra, roots, restrictions


def _eigenvalues(material: Material) -> jax.Array:
    found = ops.eigenvalues(material.whole, material.params)
    return jnp.concatenate([jnp.ravel(x) for x in found])


def _judge_eigenvalues(found: Any, dense: Dense, tolerance: float) -> None:
    expected = np.linalg.eigvalsh(dense.whole)
    equal(np.sort(found), expected, tolerance, "the sorted eigenvalues")


def _whitened_and_colored(material: Material) -> Any:
    white = ops.whiten(material.whole, material.vector, material.params)
    return ops.color(material.whole, white, material.params)


def _white_products(material: Material) -> jax.Array:
    stack = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), material.vector)
    rows = ops.whitener(material.whole, like=material.params).matrix(stack)
    return rows @ rows.T


def _judge_products(found: Any, dense: Dense, tolerance: float) -> None:
    norm = dense.vector @ _solution(dense)
    expected = norm * np.array([[1.0, 2.0], [2.0, 4.0]])
    equal(found, expected, tolerance, "the products of whitened vectors")


def _shown(count: int) -> list[bool]:
    """Every other leaf is shown; of one leaf, that one."""
    return [index % 2 == 0 for index in range(count)]


def _restricted(material: Material) -> tuple:
    leaves, treedef = jax.tree.flatten(material.params)
    shown: list[Any] = [
        leaf if is_shown else optax.MaskedNode()
        for leaf, is_shown in zip(leaves, _shown(len(leaves)), strict=True)
    ]
    holed = jax.tree.unflatten(treedef, shown)
    part = material.structure.restrict(material.whole, holed, material.params)
    positions = jax.tree.map(
        lambda x, show: jnp.full(x.shape, show),
        material.params,
        jax.tree.unflatten(treedef, _shown(len(leaves))),
    )
    kept = np.flatnonzero(np.asarray(trees.ravel(positions)))
    return ops.to_dense(part, holed), kept


def _judge_restricted(found: Any, dense: Dense, tolerance: float) -> None:
    part, kept = found
    expected = dense.whole[np.ix_(kept, kept)]
    equal(part, expected, tolerance, "the restriction")


def _determinant(material: Material) -> jax.Array:
    prior = _number_of(material)
    logdet = ops.determinant(material.parts[0], prior, material.params)
    return logdet(prior, jnp.asarray(FACTOR, prior.value.dtype))


def _effective(dense: Dense) -> float:
    held = NOISE * np.trace(np.linalg.inv(dense.whole))
    return len(dense.whole) - min(held, len(dense.whole))


LAWS = [
    matrices(
        "isotropic",
        "isotropic(params, value) is value times the identity",
        lambda m: m.structure.isotropic(m.params, 2.5),
        lambda dense: 2.5 * np.eye(len(dense.whole)),
    ),
    vectors(
        "matvec",
        "matvec is the matrix times the vector",
        lambda m: ops.matvec(m.whole, m.vector),
        lambda dense: dense.whole @ dense.vector,
    ),
    vectors(
        "solve",
        "solve inverts the matrix",
        lambda m: ops.solve(m.whole, m.vector),
        _solution,
    ),
    vectors(
        "damped solve",
        "solve with damping inverts the matrix plus damping times the identity",
        lambda m: ops.solver(m.whole, DAMPING)(m.vector),
        _damped_solution,
    ),
    numbers(
        "logdet",
        "logdet is the log-determinant of the matrix",
        lambda m: ops.logdet(m.whole, m.params),
        lambda dense: np.linalg.slogdet(dense.whole)[1],
    ),
    numbers(
        "trace",
        "trace is that of the matrix",
        lambda m: ops.trace(m.whole, m.params),
        lambda dense: np.trace(dense.whole),
    ),
    vectors(
        "diagonal",
        "diagonal is that of the matrix",
        lambda m: ops.diagonal(m.whole, m.params),
        lambda dense: np.diag(dense.whole),
    ),
    vectors(
        "inverse_diagonal",
        "inverse_diagonal is the diagonal of the inverse: variances",
        lambda m: ops.inverse_diagonal(m.whole, m.params),
        lambda dense: np.diag(np.linalg.inv(dense.whole)),
    ),
    numbers(
        "quadratic_form",
        "quadratic_form is v^T I v",
        lambda m: ops.quadratic_form(m.whole, m.vector),
        lambda dense: dense.vector @ dense.whole @ dense.vector,
    ),
    Law(
        "without like",
        "without like an operation gives what it gives with it, or raises",
        _without_like,
        _judge_pairs,
    ),
    vectors(
        "spectral",
        "spectral rebuilds the matrix: B diag(values) B^T v is matvec",
        lambda m: ops.spectral(m.whole, m.params).times(m.vector),
        lambda dense: dense.whole @ dense.vector,
    ),
    Law(
        "eigenvalues",
        "eigenvalues are those of the matrix, each as often as it occurs",
        _eigenvalues,
        _judge_eigenvalues,
    ),
    vectors(
        "whiten and color",
        "color(whiten(v)) is solve(v)",
        _whitened_and_colored,
        _solution,
    ),
    Law(
        "white rows",
        "products of whitened vectors are v^T I^-1 w",
        _white_products,
        _judge_products,
    ),
    vectors(
        "factors",
        "factorise(I, damping).divide(v) is solve(v, damping)",
        lambda m: ops.factorise(
            m.whole, jnp.asarray(DAMPING, trees.float_dtype(m.params))
        ).divide(m.vector),
        _damped_solution,
    ),
    Law(
        "restrict",
        "a restriction has the rows and columns of what is shown",
        _restricted,
        _judge_restricted,
    ),
    numbers(
        "determinant",
        "determinant is log |s F + P| for a number P as prior",
        _determinant,
        lambda dense: np.linalg.slogdet(
            FACTOR * dense.parts[0] + NOISE * np.eye(len(dense.whole))
        )[1],
    ),
    numbers(
        "effective",
        "effective is d - trace(P I^-1), and not negative",
        lambda m: ops.effective(m.whole, _number_of(m), m.params),
        _effective,
    ),
    matrices(
        "inverse",
        "inverse is the inverse matrix, in the same structure",
        lambda m: ops.inverse(m.whole),
        lambda dense: np.linalg.inv(dense.whole),
        _invertible,
    ),
    matrices(
        "sandwich",
        "sandwich(I, M) is I^-1 M I^-1: the robust covariance",
        lambda m: ops.sandwich(m.whole, m.parts[1]),
        _sandwich,
        _declared(structures.capabilities.ROBUST),
    ),
    matrices(
        "propagate",
        "propagate(I, Q) is (I^-1 + Q)^-1",
        lambda m: ops.propagate(m.whole, _number_of(m)),
        _moved,
        _declared(structures.capabilities.RANDOM_WALK),
    ),
    matrices(
        "from_matvec",
        "from_matvec keeps of an operator what from_full keeps of its matrix",
        _from_matvec,
        None,
        _declared(structures.capabilities.OBSERVED),
    ),
    matrices(
        "compensated",
        "a compensated sum has the value of the plain one",
        _compensated,
        lambda dense: dense.whole + dense.parts[1],
        _declared(structures.capabilities.COMPENSATED),
    ),
]
