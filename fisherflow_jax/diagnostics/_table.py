"""All diagnostics of several informations at once, as a table."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fisherflow_jax import information as ops
from fisherflow_jax._ground import trees
from fisherflow_jax._ground.tables import aligned
from fisherflow_jax.accumulation import each_batch
from fisherflow_jax.diagnostics._errors import (
    error_of,
    exact_products,
    probes_for,
    trace_ratio,
)
from fisherflow_jax.diagnostics._spectrum import effective_parameters, effective_rank
from fisherflow_jax.likelihoods import Likelihood

PyTree = Any


class Row(NamedTuple):
    """What one information is worth."""

    name: str
    numbers: int  # kept in arrays
    trace: float
    error: float  # relative, in Frobenius norm, against the exact information
    standard_error: float  # of the error
    effective_parameters: float
    effective_rank: float


class Table(NamedTuple):
    """Rows, and what the data and the estimate say by themselves."""

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
        text = f"{aligned([head, *rows])}\n{self.num_parameters} parameters"
        if self.empirical_share is None:
            return text
        share = f"trace(empirical) / trace(exact) {self.empirical_share:.3g}"
        return f"{text}; {share}"


def table(
    informations: Mapping[str, Any],
    apply_fn: Callable,
    likelihood: Likelihood,
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
    probes = probes_for(params, key, num_probes)
    products = exact_products(apply_fn, likelihood, params, batches, probes, key)
    rows = []
    for name, information in informations.items():
        error = error_of(information, params, probes, products)
        rows.append(
            Row(
                name=name,
                numbers=sum(jnp.size(x) for x in jax.tree.leaves(information)),
                trace=float(ops.trace(information, params)),
                error=float(error.value),
                standard_error=float(error.standard_error),
                effective_parameters=float(
                    effective_parameters(information, prior_precision, params)
                ),
                effective_rank=effective_rank(information, params),
            )
        )
    share = None
    if next(iter(each_batch(batches))).targets is not None:
        share = float(trace_ratio(apply_fn, likelihood, params, batches, key))
    return Table(tuple(rows), trees.size(params), share)
