"""Every row left out in turn: leverage, self-influence, leave-one-out predictions."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fisherflow_jax import products
from fisherflow_jax._ground import batch as batches
from fisherflow_jax._ground import trees
from fisherflow_jax._ground.batch import Batch
from fisherflow_jax.influence import _removal as removal
from fisherflow_jax.influence._removal import Asked, Fitted
from fisherflow_jax.likelihoods import Likelihood
from fisherflow_jax.model import log_likelihood

PyTree = Any


class LeaveOneOut(NamedTuple):
    """Each row as the fit of all others sees it, to one Newton step.

    Made by `ff.influence.leave_one_out`.
    """

    outputs: jax.Array  # (n, ...), of the linearised model without the row
    log_prob: jax.Array  # (n,), of the row's targets given these, in nats
    leverage: jax.Array  # (n,), trace of the leverage block
    cooks_distance: jax.Array  # (n,)


def leave_one_out(
    state: Any,
    apply_fn: Callable,
    likelihood: Likelihood,
    data: Any,
    *,
    chunk_size: int | None = None,
    bad_rows: str = "raise",
    to_batch: Callable[[Any], Any] | None = None,
    progress: bool | None = None,
) -> LeaveOneOut:
    r"""Predictions of each row by the fit of all others, without fitting again.

    .. math:: z_n^{(-n)} = z_n + J_n \Delta_n, \qquad
       \Delta_n = (I - F_n)^{-1} \nabla \ell_n

    One Newton step of the loss without row n from the estimate, in the linearised
    model. For least squares, ridge included, it is exact: `y - outputs` are the PRESS
    residuals, :math:`e_n / (1 - h_n)`. The sum of `log_prob` is the leave-one-out
    estimate of the log-likelihood of new data, with the plug-in prediction.

    What the textbooks have follows. With residuals e, p parameters, n rows and
    :math:`s^2` = `state.dispersion` of `gaussian(scale=None)`, the variance without a
    row is :math:`s_{(n)}^2 = ((n - p) s^2 - e_n^2 / (1 - h_n)) / (n - p - 1)`, the
    externally studentised residual :math:`t_n = e_n / (s_{(n)} \sqrt{1 - h_n})`, DFFITS
    :math:`t_n \sqrt{h_n / (1 - h_n)}`; and DFBETAS are minus `effects(..., on=
    contrasts)`, over :math:`s_{(n)} \sqrt{(X^\top X)^{-1}_{jj}}`.

    Args:
      state: anything with `.mean` and `.information`, made of these rows; the mean is
        the converged estimate.
      apply_fn: `(params, inputs) -> outputs`.
      likelihood: from `ff.likelihoods`; with an unknown dispersion that of the state,
        which is of all rows.
      data: a batch `(inputs, targets)` or `(inputs, targets, weights)`, a list or
        loader of batches, or `ff.Stacked`. A row goes with all its multiplicity.
      chunk_size: rows at a time; None: as many as keep 16 MiB.
      bad_rows: "raise", or "drop": a row with a value that is not finite, or a target
        that cannot be, has leverage and distance zero.
      to_batch: makes a batch of what a loader gives, if it is none.
      progress: whether a loader shows a bar, as in `ff.accumulate`.

    Returns:
      A `LeaveOneOut(outputs, log_prob, leverage, cooks_distance)`. Cook's distance is
      :math:`\Delta^\top I \Delta / p`, over the dispersion where that is estimated.
      Cost: a factorisation, a backward pass for each of the k outputs of a row, k
      solves (none with scalar, diagonal and Kronecker structures), and k^3.

    Raises:
      ValueError: without targets; for bad rows, unless they are dropped; for a row
        whose leverage block has an eigenvalue of 1 or more (under jit NaN); for a
        likelihood whose root is drawn; and as `ff.scores` does.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> model = lambda p, x: x @ p, ff.likelihoods.gaussian()
      >>> x, y = jnp.array([[1.0], [1.0], [2.0]]), jnp.array([1.0, 2.0, 6.0])
      >>> information = ff.estimators.exact(*model, ff.structures.full())(
      ...     jnp.zeros(1), (x, y)
      ... )
      >>> state = ff.Posterior(jnp.array([2.5]), information, jnp.array(1.0))
      >>> found = ff.influence.leave_one_out(state, *model, (x, y))
      >>> print(found.outputs.round(2))  # 3 = 2 * (1 + 2) / 2 without the last row
      [2.8 2.6 3. ]
      >>> print(found.leverage.round(2))
      [0.17 0.17 0.67]

    References:
      Cook, "Detection of influential observation in linear regression", 1977.
      Pregibon, "Logistic regression diagnostics", 1981.
      Rad, Maleki, "A scalable estimate of the out-of-sample prediction error via
      approximate leave-one-out cross-validation", 2020.
    """
    own = removal.begun(state, (apply_fn, likelihood), False, chunk_size=chunk_size)
    options: dict[str, Any] = {"to_batch": to_batch, "progress": progress}
    found = removal.results(own, data, _left_out, bad_rows=bad_rows, **options)
    return removal.side_by_side(found)


def _left_out(own: Asked, fitted: Fitted, batch: Batch) -> tuple:
    belief, by = fitted.belief, removal.by_labelled_row(own, fitted, batch)
    likelihood = products.known(own.model.likelihood, belief)
    scale: Any = 1.0 if belief.dispersion is None else belief.dispersion
    share = trees.size(belief.mean) * scale

    def one(row: Batch) -> tuple[LeaveOneOut, jax.Array]:
        found = removal.removed(by, row)
        outputs = found.outputs + found.moved.reshape(found.outputs.shape)
        log_prob = log_likelihood(lambda z, _: z, likelihood, outputs[None], row)
        distance = found.cotangent @ found.moved / share
        wanted = LeaveOneOut(outputs, log_prob, found.leverage, distance)
        return batches.zero_if_missing(row, wanted), found.is_defined

    wanted, defined = by.map(one)
    return wanted, (wanted.leverage, defined)


def leverage(
    state: Any,
    apply_fn: Callable,
    likelihood: Likelihood,
    data: Any,
    *,
    chunk_size: int | None = None,
    bad_rows: str = "raise",
    to_batch: Callable[[Any], Any] | None = None,
    progress: bool | None = None,
) -> jax.Array:
    r"""How much of its own prediction each row decides.

    .. math:: h_n = \operatorname{tr} H_n = \operatorname{tr}(I^{-1} F_n), \qquad
       H_n = L_n^\top J_n I^{-1} J_n^\top L_n

    For least squares the diagonal of the hat matrix. Over the rows that the state was
    made of it sums to the number of parameters that they determine
    (`ff.information.effective`), if the structure is the full one.

    Args:
      state, apply_fn, likelihood, chunk_size, bad_rows, to_batch, progress: as in
        `leave_one_out`.
      data: as there; targets are not read, and may be None.

    Returns:
      `(n,)`, at least 0; each eigenvalue of the block is below 1 for a row that a full
      information with a prior holds. Cost: as `leave_one_out`.

    Raises:
      ValueError: for bad rows, unless they are dropped, for a likelihood whose root is
        drawn, and as `ff.predictions.linearized_outputs` does.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> model = lambda p, x: x @ p, ff.likelihoods.gaussian()
      >>> information = ff.structures.Full(jnp.array([[2.0, 0.0], [0.0, 4.0]]))
      >>> state = ff.Posterior(jnp.zeros(2), information, jnp.array(1.0))
      >>> x = jnp.array([[1.0, 0.0], [1.0, 1.0]])
      >>> print(ff.influence.leverage(state, *model, (x, None)).round(2))
      [0.5  0.75]

    References:
      Hoaglin, Welsch, "The hat matrix in regression and ANOVA", 1978.
    """
    own = removal.begun(state, (apply_fn, likelihood), False, chunk_size=chunk_size)
    options: dict[str, Any] = {"to_batch": to_batch, "progress": progress}
    found = removal.results(own, data, _leverages, bad_rows=bad_rows, **options)
    return removal.side_by_side(found)


def _leverages(own: Asked, fitted: Fitted, batch: Batch) -> tuple:
    by = removal.by_row(own, fitted, batch._replace(targets=None))
    return by.map(lambda row: removal.removed(by, row).leverage), None


def self_influence(
    state: Any,
    apply_fn: Callable,
    likelihood: Likelihood,
    data: Any,
    *,
    first_order: bool | None = None,
    chunk_size: int | None = None,
    bad_rows: str = "raise",
    to_batch: Callable[[Any], Any] | None = None,
    progress: bool | None = None,
) -> jax.Array:
    r"""By how much the loss of each row rises when it is removed, in nats.

    .. math:: \nabla \ell_n^\top (I - F_n)^{-1} \nabla \ell_n, \qquad
       \text{to first order } \nabla \ell_n^\top I^{-1} \nabla \ell_n

    The diagonal of `effects(state, ..., data, data)`, and never negative. Rows whose
    labels are wrong have large values; so do their losses alone, which find them as
    well. An unknown dispersion is the state's estimate. Rows drawn with chances
    proportional to the root of it, and weighted by their inverse, make the subsample of
    least variance in the metric of the information.

    Args:
      state, apply_fn, likelihood, data, chunk_size, bad_rows, to_batch, progress: as in
        `leave_one_out`.
      first_order: without the leverage of the row; None: as in `effects`.

    Returns:
      `(n,)`. Cost: as `leave_one_out`.

    Raises:
      ValueError: as `leave_one_out` does; to first order for no leverage.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> model = lambda p, x: x @ p, ff.likelihoods.gaussian()
      >>> information = ff.structures.Full(jnp.array([[4.0]]))
      >>> state = ff.Posterior(jnp.zeros(1), information, jnp.array(1.0))
      >>> batch = jnp.ones((1, 1)), jnp.array([3.0])
      >>> print(ff.influence.self_influence(state, *model, batch))  # 3^2 / (4 - 1)
      [3.0]

    References:
      Pruthi, Liu, Kale, Sundararajan, "Estimating training data influence by tracing
      gradient descent", 2020.
    """
    model = apply_fn, likelihood
    own = removal.begun(state, model, first_order, chunk_size=chunk_size)
    options: dict[str, Any] = {"to_batch": to_batch, "progress": progress}
    found = removal.results(own, data, _own_effects, bad_rows=bad_rows, **options)
    return removal.side_by_side(found)


def _own_effects(own: Asked, fitted: Fitted, batch: Batch) -> tuple:
    by = removal.by_labelled_row(own, fitted, batch)
    likelihood = products.known(own.model.likelihood, fitted.belief)

    def one(row: Batch) -> tuple[jax.Array, Any]:
        found = removal.removed(by, row)
        # of the loss in nats: the information is of unit dispersion
        gradient = removal.loss_gradient(likelihood, found.outputs[None], row).ravel()
        wanted = jnp.sum(gradient * found.moved)
        return wanted, (found.leverage, found.is_defined)

    return by.map(one)
