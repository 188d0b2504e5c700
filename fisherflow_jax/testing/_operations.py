"""Laws of operations: each against the dense matrix, in numpy."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fisherflow_jax import information as ops
from fisherflow_jax._ground import trees
from fisherflow_jax.structures import Compensated, Full, capabilities
from fisherflow_jax.testing._laws import NotApplicable
from fisherflow_jax.testing._material import Dense, Material

DAMPING = 0.7
NOISE = 0.2
FACTOR = 0.4


def _needs(m: Material, capability: str) -> None:
    if capability not in m.structure.supports:
        raise NotApplicable(f"the structure does not declare {capability!r}")


def _damped_solution(dense: Dense) -> np.ndarray:
    return np.linalg.solve(dense.whole + DAMPING * dense.identity, dense.vector)


def isotropic(m: Material) -> Any:
    """isotropic: isotropic(params, value) is value times the identity"""
    return m.matrix(m.structure.isotropic(m.params, 2.5)), 2.5 * m.dense.identity


def matvec(m: Material) -> Any:
    """matvec: matvec is the matrix times the vector"""
    return m.flat(ops.matvec(m.whole, m.vector)), m.dense.whole @ m.dense.vector


def solve(m: Material) -> Any:
    """solve: solve inverts the matrix"""
    return m.flat(ops.solve(m.whole, m.vector)), m.dense.solution


def damped_solve(m: Material) -> Any:
    """damped solve: solve with damping inverts the matrix plus damping times the
    identity"""
    solved = ops.solver(m.whole, DAMPING)(m.vector)
    return m.flat(solved), _damped_solution(m.dense)


def logdet(m: Material) -> Any:
    """logdet: logdet is the log-determinant of the matrix"""
    return ops.logdet(m.whole, m.params), np.linalg.slogdet(m.dense.whole)[1]


def trace(m: Material) -> Any:
    """trace: trace is that of the matrix"""
    return ops.trace(m.whole, m.params), np.trace(m.dense.whole)


def diagonal(m: Material) -> Any:
    """diagonal: diagonal is that of the matrix"""
    return m.flat(ops.diagonal(m.whole, m.params)), np.diag(m.dense.whole)


def inverse_diagonal(m: Material) -> Any:
    """inverse_diagonal: inverse_diagonal is the diagonal of the inverse: variances"""
    variances = ops.inverse_diagonal(m.whole, m.params)
    return m.flat(variances), np.diag(m.dense.inverse)


def quadratic_form(m: Material) -> Any:
    """quadratic_form: quadratic_form is v^T I v"""
    expected = m.dense.vector @ m.dense.whole @ m.dense.vector
    return ops.quadratic_form(m.whole, m.vector), expected


def without_like(m: Material) -> Any:
    """without like: without like an operation gives what it gives with it, or raises"""
    operations: list[Callable] = [
        ops.logdet,
        ops.trace,
        ops.diagonal,
        ops.inverse_diagonal,
        ops.to_dense,
        ops.effective,
    ]
    pairs = []
    for operation in operations:
        given = (m.scalar(NOISE),) if operation is ops.effective else ()
        try:
            bare = operation(m.whole, *given)
        except Exception:
            continue  # a structure that stores no shape
        pairs.append((bare, operation(m.whole, *given, like=m.params)))
    return [(trees.ravel(bare), trees.ravel(expected)) for bare, expected in pairs]


def spectral(m: Material) -> Any:
    """spectral: spectral rebuilds the matrix: B diag(values) B^T v is matvec"""
    product = ops.spectral(m.whole, m.params).times(m.vector)
    return m.flat(product), m.dense.whole @ m.dense.vector


def eigenvalues(m: Material) -> Any:
    """eigenvalues: eigenvalues are those of the matrix, each as often as it occurs"""
    found = [jnp.ravel(x) for x in ops.eigenvalues(m.whole, m.params)]
    return jnp.sort(jnp.concatenate(found)), np.linalg.eigvalsh(m.dense.whole)


def whiten_and_color(m: Material) -> Any:
    """whiten and color: color(whiten(v)) is solve(v)"""
    white = ops.whiten(m.whole, m.vector, m.params)
    return m.flat(ops.color(m.whole, white, m.params)), m.dense.solution


def white_rows(m: Material) -> Any:
    """white rows: products of whitened vectors are v^T I^-1 w"""
    stack = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), m.vector)
    rows = ops.whitener(m.whole, like=m.params).matrix(stack)
    norm = m.dense.vector @ m.dense.solution
    return rows @ rows.T, norm * np.array([[1.0, 2.0], [2.0, 4.0]])


def factors(m: Material) -> Any:
    """factors: factorise(I, damping).divide(v) is solve(v, damping)"""
    divided = ops.factorise(m.whole, m.number(DAMPING)).divide(m.vector)
    return m.flat(divided), _damped_solution(m.dense)


def restrict(m: Material) -> Any:
    """restrict: a restriction has the rows and columns of what is shown"""
    leaves, treedef = jax.tree.flatten(m.params)
    # every other leaf; of one leaf, that one
    shown: list[Any] = [
        optax.MaskedNode() if index % 2 else leaf for index, leaf in enumerate(leaves)
    ]
    holed = jax.tree.unflatten(treedef, shown)
    part = m.structure.restrict(m.whole, holed, m.params)
    sizes = [leaf.size for leaf in leaves]
    kept = np.flatnonzero(np.repeat(np.arange(len(leaves)) % 2 == 0, sizes))
    return ops.to_dense(part, holed), m.dense.whole[np.ix_(kept, kept)]


def embed(m: Material) -> Any:
    """embed: an embedded restriction has its own rows and columns again, and beside
    them the precision of what is new"""
    leaves, treedef = jax.tree.flatten(m.params)
    shown: list[Any] = [
        optax.MaskedNode() if index % 2 else leaf for index, leaf in enumerate(leaves)
    ]
    holed = jax.tree.unflatten(treedef, shown)
    part = m.structure.restrict(m.whole, holed, m.params)
    entries = jax.tree.map(lambda x: np.full(x.shape, NOISE, x.dtype), m.params)
    try:
        found = m.structure.embed(part, entries, holed)
    except ValueError:  # one number: a richer structure holds it
        found = ops.embed(part, entries, holed)
    sizes = [leaf.size for leaf in leaves]
    kept = np.repeat(np.arange(len(leaves)) % 2 == 0, sizes)
    if ops.facts(part).layers is not None:  # by name, as they were
        kept = np.ones_like(kept)
    expected = np.where(np.outer(kept, kept), m.dense.whole, 0.0)
    return m.matrix(found), expected + NOISE * np.diag(~kept)


def conditional_mean(m: Material) -> Any:
    """conditional mean: with entries S at zero the nearest is v_K + I_KK^-1 I_KS v_S"""
    places = np.arange(len(m.dense.vector))
    kept, held = places[places % 3 != 1], places[places % 3 == 1]
    mean, matrix = np.zeros(len(places)), m.dense.whole
    pushed = matrix[np.ix_(kept, held)] @ m.dense.vector[held]
    mean[kept] = m.dense.vector[kept]
    mean[kept] += np.linalg.solve(matrix[np.ix_(kept, kept)], pushed)
    flags = trees.unravel(jnp.asarray(places % 3 != 1), m.params)
    return m.flat(ops.conditional_mean(m.whole, flags, m.vector)), mean


def columns(m: Material) -> Any:
    """columns: within columns the matrix has the blocks that by_columns says"""
    found, pairs = ops.by_columns(m.whole, m.params), []
    with jax.ensure_compile_time_eval():
        places = trees.unravel(m.number(np.arange(len(m.dense.vector))), m.params)
        parts = [np.asarray(part, int) for part in found.split(places)]
    for group, part in zip(found.groups, parts, strict=True):
        for k, o in np.ndindex(part.shape[0], part.shape[2]):
            block, own = group.matrix[k], part[k, :, o]
            block = jnp.diag(block) if block.ndim == 1 else block
            shift = group.shifts[k] * jnp.eye(len(own), dtype=block.dtype)
            expected = m.dense.whole[np.ix_(own, own)]
            pairs.append((group.weights[k, o] * block + shift, expected))
    return pairs


def determinant(m: Material) -> Any:
    """determinant: determinant is log |s F + P| for a number P as prior"""
    prior = m.scalar(NOISE)
    found = ops.determinant(m.parts[0], prior, m.params)(prior, m.number(FACTOR))
    matrix = FACTOR * m.dense.parts[0] + NOISE * m.dense.identity
    return found, np.linalg.slogdet(matrix)[1]


def effective(m: Material) -> Any:
    """effective: effective is d - trace(P I^-1), and not negative"""
    found = ops.effective(m.whole, m.scalar(NOISE), m.params)
    return found, max(len(m.dense.vector) - NOISE * np.trace(m.dense.inverse), 0.0)


def inverse(m: Material) -> Any:
    """inverse: inverse is the inverse matrix, in the same structure"""
    # marginal=True inverts the part that it keeps of a covariance
    is_needed = capabilities.MARGINAL in m.structure.supports
    if not is_needed and not ops.provides(ops.inverse, m.whole):
        kind = type(m.whole).__name__
        raise NotApplicable(f"{kind} registers no ff.information.inverse")
    return m.matrix(ops.inverse(m.whole)), m.dense.inverse


def sandwich(m: Material) -> Any:
    """sandwich: sandwich(I, M) is I^-1 M I^-1: the robust covariance"""
    _needs(m, capabilities.ROBUST)
    expected = m.dense.inverse @ m.dense.parts[1] @ m.dense.inverse
    return m.matrix(ops.sandwich(m.whole, m.parts[1])), expected


def squares(m: Material) -> Any:
    """squares as reduced: squares(I, vectors) is what reduce makes of them"""
    _needs(m, capabilities.ROBUST)
    if not ops.provides(ops.squares, m.whole):
        kind = type(m.whole).__name__
        raise NotApplicable(f"{kind} registers no ff.information.squares")
    stack = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), m.vector)
    found = ops.squares(m.whole, stack)
    return m.matrix(found), m.matrix(m.structure.reduce(stack))


def propagate(m: Material) -> Any:
    """propagate: propagate(I, Q) is (I^-1 + Q)^-1"""
    _needs(m, capabilities.RANDOM_WALK)
    moved = ops.propagate(m.whole, m.scalar(NOISE))
    return m.matrix(moved), np.linalg.inv(m.dense.inverse + NOISE * m.dense.identity)


def from_matvec(m: Material) -> Any:
    """from_matvec: from_matvec keeps of an operator what from_full keeps of its
    matrix"""
    _needs(m, capabilities.OBSERVED)
    assert m.structure.from_matvec is not None, "from_matvec is missing"
    assert m.structure.from_full is not None, "from_full is missing"
    full = Full(trees.unravel(ops.to_dense(m.parts[0], m.params), m.params))
    read = m.structure.from_matvec(lambda v: ops.matvec(full, v), m.params)
    return m.matrix(read), m.matrix(m.structure.from_full(full))


def compensated(m: Material) -> Any:
    """compensated: a compensated sum has the value of the plain one"""
    _needs(m, capabilities.COMPENSATED)
    nothing = jax.tree.map(jnp.zeros_like, m.whole)
    pair = ops.add(Compensated(m.whole, nothing), m.parts[1])
    total = ops.add(ops.scale(pair, 0.5), ops.scale(pair, 0.5))
    return m.matrix(total), m.dense.whole + m.dense.parts[1]
