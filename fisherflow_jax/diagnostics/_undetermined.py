"""Why the data do not determine a direction: told by the data themselves."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fisherflow_jax import posteriors
from fisherflow_jax._ground import batch as given
from fisherflow_jax._ground import processes, trees
from fisherflow_jax.accumulation import each_batch
from fisherflow_jax.likelihoods import LOG, LOGIT, SOFTMAX, Likelihood
from fisherflow_jax.model import Model, derivative, once
from fisherflow_jax.posteriors import Direction

PyTree = Any

# Outputs rest where they move by less than this share of what the parameters of a
# direction move one by one: the small entries that its name leaves out.
_AT_REST = 0.05
# Numbers of the outputs' derivatives by the parameters, 256 MB.
_MOST_NUMBERS = 2**25
# Of a separating direction of unit entries, and of what it moves.
_SEPARATES, _ROUNDING = 1e-4, 1e-7


def undetermined(
    state: Any,
    apply_fn: Any = None,
    likelihood: Any = None,
    batches: Any = None,
    *,
    names: Sequence[str] | None = None,
) -> tuple[Direction, ...]:
    r"""The directions in parameter space that the prior determines, and not the data.

    Those of :math:`P v = \lambda I v` (`ff.information.null_directions`) with
    :math:`\lambda > 0.1`: the prior gives more than a tenth of the information. Beside
    a vague prior (standard deviation of 10 or more) :math:`\sqrt\lambda > 0.1`: where a
    likelihood flattens out, the estimate runs away until the prior holds it, at
    :math:`F / P \approx |\eta|`, a logarithm of how vague the prior is. They are shown
    as combinations of few parameters that span the same space.

    By the state alone the reason is `no data` (of one parameter), `collinear` (of
    several), or `little data`. The model and the data tell more. With
    :math:`\dot z_i = J_i v`, how output i moves along the direction:

    - `no output responds`: no parameter of it moves any output (a column of zeros);
    - `collinear`: they do, and together they move none, or all logits of a row alike;
    - `class 2 is never seen`: along it the others keep their log-odds;
    - `an empty cell`: the outputs are logarithms of means, and every count is zero in
      the rows that it moves;
    - `separation`: there is a c with :math:`v^\top c \ne 0` along which no row's
      log-probability falls, :math:`(J_i c)_{y_i} \ge (J_i c)_k` for every other class
      k: found by linear programming;
    - else as without data: little data.

    Args:
      state: anything with `.mean` and `.information`, and a prior: a flow's state or
        `ff.posterior(...)`. Under `random_walk` memory a drift takes the prior's
        place, and nothing is found.
      apply_fn, likelihood: the model; None: by the state alone.
      batches: a loader, a list of batches or an `ff.Stacked`; one batch as a tuple.
      names: one a parameter, in ravelled order; None: paths in the tree.

    Returns:
      A tuple of `Direction(name, reason, share, vector)`, that of the largest share
      first, empty for a state without data. Cost: two eigendecompositions, d^3; of
      scalar and diagonal states, which keep no combinations, and above 500 parameters:
      the diagonal of the inverse, each parameter by itself. With data: d tangent
      passes, and of classes two linear programs a direction that nothing else explains.

    Raises:
      TypeError: for a mixture, and for what is no state.
      ValueError: for a model without data, data of more than 2^25 derivatives (rows
        times outputs times parameters), and as `ff.accumulate` does.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> x = jnp.array([[1.0, 1.0, 0.0], [1.0, 0.0, 1.0], [1.0, 0.0, 1.0]])
      >>> state = ff.posterior(
      ...     jnp.zeros(3), ff.structures.full().reduce(10.0 * x), prior_precision=1e-4
      ... )
      >>> for direction in ff.diagnostics.undetermined(state):
      ...     print(direction)
      theta[0] - theta[1] - theta[2] (collinear)

    References:
      Albert, Anderson, "On the existence of maximum likelihood estimates in logistic
      regression models", 1984.
      Konis, "Linear programming algorithms for detecting separated data in binary
      logistic regression models", 2007.
    """
    found = posteriors.undetermined(state, names)
    if apply_fn is None and likelihood is None and batches is None:
        return found
    if batches is None:
        raise ValueError(
            "what kind a direction is of, the data tell: give apply_fn, likelihood and "
            "batches, or the state alone."
        )
    model = Model(apply_fn, likelihood)  # raises for what is none
    if not found:
        return found
    rows = _rows(model, posteriors.gaussian(state).mean, batches)
    cone = None

    def told(direction: Direction) -> Direction:
        nonlocal cone
        vector = np.asarray(trees.ravel(direction.vector), float)
        reason = _reason(rows, vector)
        if reason is None and rows.possible is not None:
            cone = _Cone.of(rows) if cone is None else cone
            reason = "separation" if cone.reaches(vector) else None
        return direction._replace(reason=reason or direction.reason)

    return tuple(map(told, found))


class _Rows(NamedTuple):
    """Targets that count, one by one, with the derivatives of their outputs.

    Attributes:
      slopes: `(N, C, d)`; of classes they sum to zero over these.
      possible: `(N, C)` bool, of classes: which of them a target is, or may be.
      empty: `(N,)` bool, of counts: whether they are zero.
      eps: the rounding of the derivatives.
    """

    slopes: np.ndarray
    possible: np.ndarray | None
    empty: np.ndarray | None
    eps: float


def _rows(model: Model, mean: PyTree, batches: Any) -> _Rows:
    run = once(model.apply_fn)
    basis = trees.unravel(
        jnp.eye(trees.size(mean), dtype=trees.float_dtype(mean)), mean
    )

    @jax.jit
    def jacobian(mean: PyTree, inputs: PyTree) -> jax.Array:
        def along(vector: PyTree) -> jax.Array:
            return derivative(run, mean, inputs, vector)[1]

        return jax.vmap(along, out_axes=-1)(basis)

    parts, number = [], 0
    for batch in each_batch(batches):
        batch, _ = model.admitted(mean, processes.fetched(batch), "raise")
        outputs = model.outputs(mean, batch.inputs)
        number += outputs.size * trees.size(mean)
        if number > _MOST_NUMBERS:
            raise ValueError(
                "undetermined looks at every output's derivative by every parameter, "
                f"up to {_MOST_NUMBERS} numbers: give fewer rows, some of each kind."
            )
        slopes = jacobian(mean, given.unshare(batch.inputs))
        parts.append(
            _of_batch(model.likelihood, batch, processes.on_host(slopes).astype(float))
        )
    columns: list[Any] = [
        None if column[0] is None else np.concatenate(column)
        for column in zip(*parts, strict=True)
    ]
    slopes, possible, empty = columns
    return _Rows(slopes, possible, empty, float(jnp.finfo(outputs.dtype).eps))


def _of_batch(likelihood: Likelihood, batch: given.Batch, slopes: np.ndarray) -> tuple:
    """Slopes, possible classes and zeros of the targets that count."""
    scale, targets = likelihood.scale, np.asarray(batch.targets)
    used = np.asarray(batch.weights) != 0
    of_one = slopes.shape[targets.ndim : -1]  # of the outputs of a target
    if scale not in (LOGIT, SOFTMAX, LOG) or len(of_one) != (scale is SOFTMAX):
        used = used.reshape(len(used), -1).any(1)
        return slopes[used].reshape(used.sum(), -1, slopes.shape[-1]), None, None
    shape = used.shape + (1,) * (targets.ndim - used.ndim)
    used = np.broadcast_to(used.reshape(shape), targets.shape)
    targets, slopes = targets[used], slopes[used]
    if scale is LOG:
        return slopes[:, None], None, targets == 0
    if scale is LOGIT:
        slopes = np.stack([np.zeros_like(slopes), slopes], 1)
        possible = np.stack([targets < 1, targets > 0], 1)
    else:
        possible = targets[:, None] == np.arange(slopes.shape[1])
    return slopes - slopes.mean(1, keepdims=True), possible, None


def _reason(rows: _Rows, vector: np.ndarray) -> str | None:
    """What the rows tell of a direction, if anything."""
    sizes, moves = np.abs(rows.slopes) @ np.abs(vector), rows.slopes @ vector
    rest = _AT_REST * sizes.max(initial=0.0)
    if not rest:
        return "no output responds"
    moved = np.abs(moves).max(1) > rest
    if not moved.any():
        return "collinear"
    if rows.empty is not None and rows.empty[moved].all():
        return f"an empty cell: {moved.sum()} rows, all of them zero"
    if rows.possible is not None:
        seen = rows.possible.any(0)
        apart = np.abs(moves - moves[:, seen].mean(1, keepdims=True)).max(0) > rest
        if not apart[seen].any():
            classes = ", ".join(map(str, np.flatnonzero(apart)))
            return f"class {classes} is never seen"
    return None


class _Cone(NamedTuple):
    """Ways along which no row's log-probability falls, `{B a: D a >= 0}`."""

    basis: np.ndarray  # (d, r), of what moves the rows at all
    rises: np.ndarray  # (m, r)

    @classmethod
    def of(cls, rows: _Rows) -> "_Cone":
        """Of the rises of a possible class over each other class."""
        assert rows.possible is not None
        at, own = np.nonzero(rows.possible)
        rises = rows.slopes[at, own][:, None] - rows.slopes[at]
        rises = np.unique(rises.reshape(-1, rises.shape[-1]), axis=0)
        scale = np.abs(rises).max(0, initial=0.0)
        scale = np.where(scale > 0, scale, 1.0)
        _, values, right = np.linalg.svd(rises / scale, full_matrices=False)
        kept = values > max(rises.shape) * rows.eps * values.max(initial=0.0)
        basis = right[kept].T / scale[:, None]
        return cls(basis, rises @ basis)

    def reaches(self, vector: np.ndarray) -> bool:
        """Whether the value of the direction rises or falls along one of them."""
        from scipy import optimize

        slope = vector @ self.basis
        slope = slope / max(np.abs(slope).max(initial=0.0), np.finfo(float).tiny)
        limits = np.full(len(self.rises), _ROUNDING)
        for sign in (1.0, -1.0):
            found = optimize.linprog(
                -sign * slope, A_ub=-self.rises, b_ub=limits, bounds=(-1, 1)
            )
            if found.status == 0 and -found.fun > _SEPARATES:
                return True
        return False
