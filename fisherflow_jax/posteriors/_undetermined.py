"""What of a state is the prior's, and not the data's: shares, directions, warnings."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fisherflow_jax import information as ops
from fisherflow_jax._ground import checks, processes, trees
from fisherflow_jax._ground.warning import warn_once
from fisherflow_jax.posteriors._belief import Gaussian, gaussian

PyTree = Any

# The share of the prior from which on it is named: of the variance. Where a likelihood
# flattens out (separation, an empty cell, a class never seen), the mode comes to rest
# where the prior holds it, and there the data's information is the prior's times a
# logarithm of how vague that is, 10 to 40 times it. Beside a vague prior, of a standard
# deviation of 10 or more, the share is therefore that of the standard deviation.
_SHARE, _VAGUE_PRECISION = 0.1, 0.0101
# Below this share the data say more than the prior does, unless it is vague.
_MOSTLY = 0.5
# Directions are sought among so many parameters, and so many are printed.
MOST_PARAMETERS, _MOST_PRINTED, _MOST_TERMS = 500, 6, 8
_MOST_CHARACTERS = 200
# Entries that are left out, relative to the largest: of null directions, of others.
_SMALL, _SMALL_OF_OTHERS = 0.01, 0.25


class Direction(NamedTuple):
    """A direction in parameter space that the data do not determine.

    Made by `ff.diagnostics.undetermined`.

    Attributes:
      name: what is moved along it, `w[0] - w[1] - w[2]`.
      reason: what it may be.
      share: the prior's part of the information along it, in [0, 1].
      vector: numpy arrays like the parameters, the first entry named being 1.
    """

    name: str
    reason: str
    share: float
    vector: PyTree

    def __str__(self) -> str:
        return f"{self.name} ({self.reason})"


def _is_named(shares: np.ndarray, precisions: np.ndarray) -> np.ndarray:
    limits = np.where(precisions < _VAGUE_PRECISION, _SHARE**2, _SHARE)
    return ~(shares <= limits)  # NaN, of what cannot be inverted, is named


def _is_partly(shares: np.ndarray, precisions: np.ndarray) -> np.ndarray:
    """Of what is named, where the data say more than a prior that is not vague."""
    return (shares < _MOSTLY) & (precisions >= _VAGUE_PRECISION)


# ---- parameters


class Believed(NamedTuple):
    """A state's Gaussians, with their parameters' variances where these are at hand."""

    weights: jax.Array
    members: tuple[Gaussian, ...]
    variances: Sequence[PyTree] | None = None


class Shares(NamedTuple):
    """The prior's shares, which are to be named, and which of these are partly its."""

    values: np.ndarray
    named: np.ndarray
    partly: np.ndarray


def parameter_shares(believed: Believed) -> Shares | None:
    """Posterior over prior variance of each parameter.

    Of a mixture the weighted mean. None where the state keeps no prior, or holds
    nothing but the prior.
    """
    weights, members, variances = believed
    each, precisions = [], []
    for number, one in enumerate(members):
        if one.prior_precision is None:
            return None
        prior = _prior_variances(one)
        if variances is None:
            given, factor = ops.inverse_diagonal(one.information, one.mean), 1.0
        else:
            given = variances[number]
            factor = 1.0 if one.dispersion is None else float(one.dispersion)
        given = processes.on_host(trees.ravel(given)).astype(float)
        each.append(given / (factor * prior))
        precisions.append(1 / prior)
        if not _has_data(one, each[-1]):
            return None
    shares = np.minimum(np.asarray(weights, float) @ np.stack(each), 1.0)
    least = np.min(precisions, axis=0)
    return Shares(shares, _is_named(shares, least), _is_partly(shares, least))


def _prior_variances(one: Gaussian) -> np.ndarray:
    if not ops.facts(one.prior_precision).elementwise:
        variances = ops.inverse_diagonal(one.prior_precision, one.mean)
        return processes.on_host(trees.ravel(variances)).astype(float)
    values = processes.on_host(ops.spectral(one.prior_precision, one.mean).values)
    flat = [np.ravel(x).astype(float) for x in jax.tree.leaves(values)]
    return np.broadcast_to(1 / np.concatenate(flat), (trees.size(one.mean),))


def _has_data(one: Gaussian, shares: np.ndarray) -> bool:
    if one.num_observations is not None:
        return bool(one.num_observations > 0)
    return not np.all(shares > 0.999)


# ---- directions


def undetermined(
    state: Any, names: Sequence[str] | None = None
) -> tuple[Direction, ...]:
    """As `ff.diagnostics.undetermined`, by the state alone."""
    one = gaussian(state)
    names = trees.entry_names(one.mean) if names is None else names
    count = one.num_observations
    if one.prior_precision is None or (count is not None and not count > 0):
        return ()
    known = (ops.facts(x) for x in (one.information, one.prior_precision))
    dense = not all(fact.elementwise for fact in known)
    if not dense or len(names) > MOST_PARAMETERS:
        return _single_parameters(one, names)
    return _combinations(getattr(state, "information", one.information), one, names)


def _single_parameters(one: Gaussian, names: Sequence[str]) -> tuple[Direction, ...]:
    found = parameter_shares(Believed(jnp.ones(1), (one,)))
    if found is None:
        return ()
    shares, named, _ = found
    return tuple(
        _direction(one.mean, names, np.eye(1, len(names), int(index))[0], shares[index])
        for index in sorted(np.flatnonzero(named), key=lambda index: -shares[index])
    )


@jax.jit
def _directions(
    information: Any, precision: Any, like: PyTree, tolerance: float
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Two dense matrices, and the null directions with their shares."""
    found = ops.null_directions(information, precision, like, tolerance=tolerance)
    matrix, prior = (ops.to_dense(x, like) for x in (information, precision))
    return matrix, prior, found.shares, trees.ravel(found.vectors, 1)


def _combinations(
    information: Any, one: Gaussian, names: Sequence[str]
) -> tuple[Direction, ...]:
    dtype = trees.float_dtype(jax.tree.leaves(information))
    tolerance = len(names) * float(jnp.finfo(dtype).eps)
    with jax.enable_x64(True):  # what compensated sums keep, float32 would lose
        wide, precision, like = jax.tree.map(
            lambda x: jnp.asarray(x.astype(float)),
            processes.on_host((information, one.prior_precision, one.mean)),
        )
        parts = _directions(ops.plain(wide), precision, like, tolerance)
        matrix, prior, shares, rows = map(np.asarray, parts)
    if not _has_data(one, shares):
        return ()
    precisions = _along(prior, rows) / np.sum(np.square(rows), 1)
    named = _is_named(shares, precisions)
    entries = np.diagonal(matrix)
    scale = np.sqrt(np.where(entries > 0, entries, 1.0))
    num_null = int(np.sum(shares[named] > 0.9))
    basis = _few_entries(rows[named] * scale, num_null) / scale
    of_prior, whole = _along(prior, basis), _along(matrix, basis)
    rounding = tolerance * np.sum(np.square(basis * scale), 1)
    shares = (of_prior + rounding) / np.maximum(whole, of_prior + rounding)
    lost = rounding > of_prior
    order = np.argsort(-shares, kind="stable")
    return tuple(
        _direction(one.mean, names, basis[k], shares[k], dtype if lost[k] else None)
        for k in order
    )


def _along(matrix: np.ndarray, rows: np.ndarray) -> np.ndarray:
    return np.einsum("ki,ij,kj->k", rows, matrix, rows)


def _few_entries(rows: np.ndarray, num_null: int) -> np.ndarray:
    """Rows that span the same space, reduced by elimination with full pivoting.

    The first, of which the data say nothing, still span theirs: the others are reduced
    by them, and not they by the others.
    """
    rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    for k in range(len(rows)):
        first, stop = (0, num_null) if k < num_null else (num_null, len(rows))
        left = np.abs(rows[k:stop])
        row, column = map(int, np.unravel_index(np.argmax(left), left.shape))
        rows[[k, k + row]] = rows[[k + row, k]]
        rows[k] /= rows[k, column]
        others = np.arange(len(rows))[first:]
        others = others[others != k]
        rows[others] -= rows[others, column, None] * rows[k]
    null = np.arange(len(rows))[:, None] < num_null
    return np.where(np.abs(rows) < np.where(null, _SMALL, _SMALL_OF_OTHERS), 0.0, rows)


def _direction(
    mean: PyTree,
    names: Sequence[str],
    row: np.ndarray,
    share: float,
    lost_in: Any = None,
) -> Direction:
    where = np.flatnonzero(row)
    row = row / row[where[0]]
    terms = [_term(row[index], names[index]) for index in where[:_MOST_TERMS]]
    if len(where) > _MOST_TERMS:
        terms.append(f" + {len(where) - _MOST_TERMS} more")
    several = len(where) > 1
    if lost_in is not None:
        reason = f"collinear in {lost_in}" if several else f"lost in {lost_in}"
    elif share > 0.99:
        reason = "collinear" if several else "no data"
    else:
        reason = f"little data: the prior's share is {share:.2g}"
    return Direction(
        name="".join(terms).removeprefix(" + "),
        reason=reason,
        share=float(share),
        vector=jax.tree.map(np.asarray, trees.unravel(jnp.asarray(row), mean)),
    )


def _term(value: float, name: str) -> str:
    size = f"{abs(value):.2g}"
    return f" {'-' if value < 0 else '+'} {'' if size == '1' else size + ' '}{name}"


def by_share(
    directions: Sequence[Direction], one: Gaussian
) -> tuple[list[Direction], list[Direction]]:
    """Those that the prior determines, and in part: the data say more than it does."""
    if one.prior_precision is None:
        precisions = np.full(1, np.inf)
    else:
        precisions = 1 / _prior_variances(one)
    moved = (_entries(each) != 0 for each in directions)
    least = [np.min(precisions, where=x, initial=np.inf) for x in moved]
    found = _is_partly(np.array([x.share for x in directions]), np.array(least))
    pairs = [*zip(directions, found, strict=True)]
    return [x for x, part in pairs if not part], [x for x, part in pairs if part]


def _entries(direction: Direction) -> np.ndarray:
    return np.concatenate(list(map(np.ravel, jax.tree.leaves(direction.vector))))


# ---- what is said


def listed(what: Sequence[Any]) -> str:
    """The first few in words, and how many more."""
    shown = list(map(str, what[:_MOST_PRINTED]))
    while len(shown) > 1 and sum(map(len, shown)) > _MOST_CHARACTERS:
        shown.pop()
    rest = len(what) - len(shown)
    return ", ".join(shown) + f" and {rest} more" * (rest > 0)


def events(state: Any) -> dict[str, int]:
    """What a state has counted, or in a mixture the most of a member, by name."""
    members = getattr(state, "members", None if hasattr(state, "mean") else state)
    if members is not None:
        each = [events(member) for member in members]
        return {name: max(one.get(name, 0) for one in each) for name in each[0]}
    counted = {"batches_refused": getattr(state, "num_skipped", None)}
    if (happened := getattr(state, "events", None)) is not None:
        counted |= happened._asdict()
    return {k: int(np.asarray(v).max()) for k, v in counted.items() if v is not None}


def warn_of_refused(state: Any) -> None:
    """Warns, once a state, of batches that it refused."""
    if checks.is_traced(state):
        return
    if number := events(state).get("batches_refused"):
        warn_once(
            state,
            f"{number} batches were refused, for a result that was not finite: the "
            "state holds nothing of them. flow.update raises for such a batch outside "
            "of jax.jit, and says which value is to blame.",
        )


def warn_of_parameters(state: Any, error: PyTree, believed: Believed) -> None:
    """Warns, once a state, of refused batches and of what the prior determines."""
    warn_of_refused(state)
    if checks.is_traced((state, error)):
        return
    if not all(checks.holds(x == x) for x in jax.tree.leaves(error)):  # a NaN is not
        warn_once(
            state,
            "the information cannot be inverted in this precision (its condition is "
            f"above 1 / eps): {listed(undetermined(state))}. What is asked for is NaN "
            "and no number to trust: centre and scale the columns, or use float64.",
        )
        return
    if (found := parameter_shares(believed)) is not None:
        warn_determined(state, *doubts(trees.entry_names(error), found))


def warn_of_values(
    state: Any, one: Gaussian, gradients: PyTree, solved: PyTree
) -> None:
    """As `warn_of_parameters`, of values with some gradients `(k, ...)`.

    `solved` are these times the inverse information.
    """
    warn_of_refused(state)
    precision = one.prior_precision
    if precision is None or checks.is_traced((state, solved)):
        return
    by_prior = jax.vmap(ops.solver(precision))(gradients)
    rows, *both = (
        processes.on_host(trees.ravel(tree, 1)).astype(float)
        for tree in (gradients, solved, by_prior)
    )
    squared = np.sum(np.square(rows), 1)
    variance, prior = (np.sum(rows * each, 1) for each in both)
    with np.errstate(invalid="ignore"):  # a value that no parameter moves
        shares = np.where(prior > 0, variance / prior, 0.0)
        along = squared / prior
        found = Shares(shares, _is_named(shares, along), _is_partly(shares, along))
    if _has_data(one, shares):
        values = [f"value {k} of what is asked for" for k in range(len(shares))]
        warn_determined(state, *doubts(values, found), topic="")


def doubts(names: Sequence[str], found: Shares) -> tuple[list[str], list[str], Any]:
    """What the prior determines, what it determines in part, and its shares there."""
    wholly = [names[k] for k in np.flatnonzero(found.named & ~found.partly).tolist()]
    some = np.flatnonzero(found.named & found.partly).tolist()
    return wholly, [names[k] for k in some], found.values[some]


def warn_determined(
    state: Any,
    wholly: Sequence[Any],
    some: Sequence[Any],
    shares: Sequence[float] | np.ndarray,
    topic: str = "determined",
) -> None:
    """Warns, once a state, of what the prior determines, wholly and in part."""
    common = [one for one in wholly if _is_common(one)]
    lost = [one for one in wholly if not _is_common(one)]
    said = []
    if lost:
        said.append(
            f"determined by the prior: {listed(lost)}. The data say little or nothing "
            "there, and intervals are the prior's."
        )
    if common:
        said.append(
            f"determined by the prior: {listed(common)}. Of what is added up there "
            "only differences are determined, as between classes of a model without "
            "a reference class: ask for differences."
        )
    if some:
        low, high = (f"{end:.2g}" for end in (min(shares), max(shares)))
        share = low if low == high else f"{low} to {high}"
        said.append(
            f"determined partly by the prior: {listed(some)}. Its share is {share}: "
            "it draws estimates to its mean and narrows intervals. Where nothing is "
            "redundant, a smaller prior_precision or more data leave it less."
        )
    if lost or some:
        ways = "Leave out what is redundant, gather data that vary there, or"
        said.append(
            f"{ways if lost else 'Else'} ask for combinations that the data "
            "determine, of classes the differences."
        )
    said.append("ff.diagnostics.undetermined(state) lists all that they do not.")
    if wholly or some:
        warn_once(state, " ".join(said), topic)


def _is_common(what: Any) -> bool:
    """Whether a direction adds one number to parameters, whose differences stay."""
    if not isinstance(what, Direction):  # the name of a parameter
        return False
    entries = _entries(what)
    moved = entries[entries != 0]
    return len(moved) > 1 and bool(np.allclose(moved, moved[0], rtol=1e-3))
