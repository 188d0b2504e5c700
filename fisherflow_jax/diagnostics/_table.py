"""Eigenvalues of an information, and several informations side by side."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fisherflow_jax import accumulation, likelihoods, structures
from fisherflow_jax import information as ops
from fisherflow_jax._ground import processes, tables, trees
from fisherflow_jax.diagnostics._errors import relative_errors, trace_ratio

PyTree = Any


def eigenvalues(information: Any, like: PyTree | None = None) -> np.ndarray:
    """All eigenvalues of an information, from the largest to the smallest.

    Args:
      information: of any structure.
      like: a tree with the parameters' shapes; only the scalar structure needs it.

    Returns:
      An array `(d,)` of float64. Cost: that of the dense matrix, d^3; for scalar and
      diagonal a sort, for block the sum of the blocks' cubes, for Kronecker that of its
      factors' cubes, and for low rank on a constant diagonal d rank^2.

    Raises:
      ValueError: where a matrix of more than 4096 rows would be needed.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> information = ff.structures.Full(jnp.array([[2.0, 1.0], [1.0, 2.0]]))
      >>> print(ff.diagnostics.eigenvalues(information).round(3))
      [3. 1.]
    """
    with jax.enable_x64(True):  # float32 would lose the small ones beside the large
        wide = jax.tree.map(
            lambda x: jnp.asarray(x.astype(float)), processes.on_host(information)
        )
        found = [np.ravel(x) for x in ops.eigenvalues(ops.plain(wide), like)]
    return np.sort(np.concatenate(found))[::-1]


def effective_parameters(
    information: Any, prior_precision: Any, like: PyTree | None = None
) -> jax.Array:
    r"""How many parameters the data rather than the prior determine.

    .. math:: \gamma = \mathrm{tr}\big(F (F + P)^{-1}\big)
       = \sum_j \frac{\lambda_j}{\lambda_j + p} \quad \text{for } P = p \, 1

    Args:
      information: F, without the prior.
      prior_precision: P: a positive number, a pytree prefix of numbers, or an
        information. On a Kronecker information one number a layer.
      like: a tree with the parameters' shapes; only the scalar structure needs it.

    Returns:
      A number between 0 and d. Cost: an inverse (d^3 for full); for Kronecker its
      factors' eigenvalues.

    Raises:
      ValueError: for a prior that is not positive or does not fit the parameters.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> information = ff.structures.Diagonal(jnp.array([0.0, 1.0, 9.0]))
      >>> print(ff.diagnostics.effective_parameters(information, 1.0).round(3))
      1.4

    References:
      MacKay, "Bayesian interpolation", 1992.
    """
    like = ops.diagonal(information, like) if like is None else like
    precision = structures.as_precision(prior_precision, like, beside=information)
    return _slope(information, precision, like)


# compiled as one: operation by operation, a first call takes several times as long
@jax.jit
def _slope(information: Any, precision: Any, like: PyTree) -> jax.Array:
    """Of log |s F + P| at s = 1, in which nothing cancels."""
    logdet = ops.determinant(information, precision, like)
    one = jnp.ones((), jax.eval_shape(ops.logdet, precision, like).dtype)
    return jax.grad(lambda factor: logdet(precision, factor))(one)


def effective_rank(information: Any, like: PyTree | None = None) -> float:
    r"""The exponential of the entropy of the normalised spectrum.

    .. math:: \exp\Big(-\sum_j q_j \log q_j\Big), \qquad
       q_j = \lambda_j \Big/ \sum_k \lambda_k

    between 1 (one direction) and d (all alike). It does not depend on the scale of the
    information, and needs no threshold and no prior.

    Args:
      information: of any structure, without a prior (which fills the spectrum).
      like: a tree with the parameters' shapes; only the scalar structure needs it.

    Returns:
      A number; 0 of an information that is zero. Cost: that of
      `ff.diagnostics.eigenvalues`.

    Raises:
      ValueError: as `ff.diagnostics.eigenvalues` does.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> information = ff.structures.Diagonal(jnp.array([5.0, 5.0, 0.0]))
      >>> round(ff.diagnostics.effective_rank(information), 3)
      2.0

    References:
      Roy, Vetterli, "The effective rank: a measure of effective dimensionality", 2007.
    """
    values = eigenvalues(information, like)
    positive = values[values > 0]  # what is not positive is rounding
    if positive.size == 0:
        return 0.0
    shares = positive / positive.sum()
    return float(np.exp(-np.sum(shares * np.log(shares))))


class Row(NamedTuple):
    """What one information is worth. Made by `ff.diagnostics.table`."""

    name: str
    numbers: int  # kept in arrays
    trace: float
    error: float  # relative, in Frobenius norm, against the exact information
    standard_error: float  # of the error
    effective_parameters: float
    effective_rank: float


class Table(NamedTuple):
    """Rows, and what the data and the estimate say by themselves.

    Made by `ff.diagnostics.table`.
    """

    rows: tuple[Row, ...]
    num_parameters: int
    empirical_share: float | None  # trace(empirical) / trace(exact); None: no targets

    def __str__(self) -> str:
        head = ("", "numbers", "trace", "error", "±", "eff. params", "eff. rank")
        rows = [
            (
                row.name,
                row.numbers,
                f"{row.trace:.4g}",
                f"{row.error:.3f}",
                f"{row.standard_error:.3f}",
                f"{row.effective_parameters:.1f}",
                f"{row.effective_rank:.1f}",
            )
            for row in self.rows
        ]
        text = f"{tables.aligned([head, *rows])}\n{self.num_parameters} parameters"
        if self.empirical_share is None:
            return text
        share = f"trace(empirical) / trace(exact) {self.empirical_share:.3g}"
        return f"{text}; {share}"


def table(
    informations: Mapping[str, Any],
    apply_fn: Callable,
    likelihood: likelihoods.Likelihood,
    params: PyTree,
    batches: Any,
    key: Any,
    *,
    prior_precision: Any = 1.0,
    num_probes: int = 32,
) -> Table:
    """How good each structure is here: one row an information.

    `ff.diagnostics.relative_error` against the exact information (with the same probes
    for all), `effective_parameters` beside a prior, `effective_rank`, and the
    `trace_ratio` of the empirical Fisher.

    Args:
      informations: by name; of any structures and estimators, sums over the same data,
        without a prior.
      apply_fn: `(params, inputs) -> outputs`.
      likelihood: from `ff.likelihoods`.
      params: where the informations were taken.
      batches: a batch, a list of batches, or `ff.Stacked`; no generator, since it
        is read more than once.
      key: an int or a key, for the probes.
      prior_precision: for the effective parameters; on a Kronecker information one
        number a layer.
      num_probes: of the relative errors.

    Returns:
      A `Table`, whose `str` is the table and `.rows` its numbers. Cost: that of its
      columns; the effective rank needs all eigenvalues.

    Raises:
      ValueError: as its columns do, and for no information.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> apply_fn = lambda params, x: x @ params
      >>> likelihood, params = ff.likelihoods.gaussian(), jnp.zeros(2)
      >>> batch = jnp.array([[1.0, 1.0], [1.0, -1.0], [2.0, 2.0]]), jnp.zeros(3)
      >>> kinds = {"diagonal": ff.structures.diagonal(), "full": ff.structures.full()}
      >>> informations = {
      ...     name: ff.estimators.exact(apply_fn, likelihood, kind)(params, batch)
      ...     for name, kind in kinds.items()
      ... }
      >>> print(
      ...     ff.diagnostics.table(
      ...         informations, apply_fn, likelihood, params, batch, key=0
      ...     )
      ... )
                numbers  trace  error      ±  eff. params  eff. rank
      diagonal        2     12  0.555  0.000          1.7        2.0
      full            4     12  0.000  0.000          1.6        1.6
      2 parameters; trace(empirical) / trace(exact) 0
    """
    if not informations:
        raise ValueError("informations is empty: there is nothing to compare.")
    if hasattr(batches, "__next__"):
        raise ValueError("the data are read more than once: give a list of batches.")
    params = trees.real_arrays(params, "params")
    model = apply_fn, likelihood
    found = relative_errors(informations, model, params, batches, key, num_probes)
    rows = []
    for name, information in informations.items():
        rows.append(
            Row(
                name=name,
                numbers=sum(jnp.size(x) for x in jax.tree.leaves(information)),
                trace=float(ops.trace(information, params)),
                error=float(found[name].value),
                standard_error=float(found[name].standard_error),
                effective_parameters=float(
                    effective_parameters(information, prior_precision, params)
                ),
                effective_rank=effective_rank(information, params),
            )
        )
    share = None
    if next(iter(accumulation.each_batch(batches))).targets is not None:
        share = float(trace_ratio(*model, params, batches, key))
    return Table(tuple(rows), trees.size(params), share)
