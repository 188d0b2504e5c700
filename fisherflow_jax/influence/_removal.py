r"""Removing a row: one Newton step, solved where the row's k outputs are.

With s the gradient of the row's loss, :math:`J^\top \gamma`, and :math:`F = J^\top L
L^\top J` its information, the step away from the row is

.. math:: (I - F)^{-1} J^\top \gamma = I^{-1} J^\top \tilde\gamma, \qquad
   \tilde\gamma = \gamma + L (1 - H)^{-1} L^\top K \gamma, \quad
   H = L^\top K L, \quad K = J I^{-1} J^\top,

so that a solve with the leverage block H is all that the removal costs.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.linalg import cho_solve

from fisherflow_jax import accumulation, products
from fisherflow_jax import information as ops
from fisherflow_jax._ground import batch as batches
from fisherflow_jax._ground import checks, choices, chunks, linalg, screening, trees
from fisherflow_jax._ground.batch import Batch
from fisherflow_jax.likelihoods import Likelihood, cholesky_root, root_columns
from fisherflow_jax.model import Model, check_rows, log_likelihood
from fisherflow_jax.posteriors import Gaussian, check_like
from fisherflow_jax.products import Rows

PyTree = Any
# Numbers of pulled-back rows held at once when no chunk_size is given: 16 MiB.
_ENTRIES = 2**22


class Removal(NamedTuple):
    """What removing a row does, or rows one by one with a leading axis n."""

    outputs: jax.Array  # (...), of the row, with it
    gradient: jax.Array  # (k,), of its loss with respect to its outputs
    cotangent: jax.Array  # (k,): the parameters move by I^-1 J^T cotangent
    moved: jax.Array  # (k,), the change of its outputs
    leverage: jax.Array  # (), trace of the leverage block
    is_defined: jax.Array  # () bool: whether the rest has an information


@dataclasses.dataclass(frozen=True)
class Asked:
    """A model and the static part of what is asked of it; programs are its own."""

    model: Model
    first_order: bool = False
    on: Callable | None = None
    chunk_size: int | None = None

    def __post_init__(self) -> None:
        if self.chunk_size is not None:
            checks.whole(self.chunk_size, "chunk_size", of="examples")

    def once(self) -> "Asked":
        """For one program, in which the model is traced once a shape."""
        return dataclasses.replace(self, model=self.model.traced_once())


class Fitted(NamedTuple):
    """A belief and the factors of its information; arrays."""

    belief: Gaussian
    factors: Any

    def rows(self, model: Model, inputs: PyTree) -> Rows:
        return products.rows_of(
            self.belief, model.apply_fn, inputs, factors=self.factors
        )

    def likelihood(self, model: Model) -> Likelihood:
        """As the information is of: known but for the dispersion."""
        own = model.likelihood
        return own if own.nuisance is None else products.known(own, self.belief)


def begun(
    state: Any,
    apply_fn: Callable,
    likelihood: Likelihood,
    first_order: bool | None,
    on: Callable | None = None,
    chunk_size: int | None = None,
) -> tuple[Asked, Fitted]:
    """What is asked, equal choices sharing their programs, and what is known.

    `first_order` None: unless leverages are at hand and mean what they say.
    """
    model = Model(apply_fn, likelihood)
    refusal = "the rows behind a bank have other weights in each of its members"
    belief = products.one_belief(state, refusal)
    if first_order is None:
        first_order = likelihood.random_root or not ops.facts(belief.information).whole
    if likelihood.random_root and not first_order:
        raise ValueError(
            "a leverage needs a root of the output Fisher information, and that of "
            f"{likelihood.name} is drawn at random: effects and self_influence do "
            "without it, with first_order=True."
        )
    check_like(
        jax.eval_shape(ops.diagonal, belief.information, belief.mean), belief.mean
    )
    own = choices.shared(Asked(model, first_order, on, chunk_size))
    return own, Fitted(belief, choices.run(own, _factors, belief))


def _factors(own: Asked, belief: Gaussian) -> Any:
    return products.factors_of(belief)


def each_batch(
    own: Asked,
    params: PyTree,
    data: Any,
    name: str = "the data",
    *,
    to_batch: Callable | None = None,
    progress: bool | None = False,
    bad_rows: str = "raise",
) -> Iterator[tuple[Batch, int, str]]:
    """Batches that the model can be run on row by row, without their bad rows.

    With the rows that each was given with, which padding follows, and its name.
    """
    screening.check_option(bad_rows)
    alone = isinstance(data, tuple) and not isinstance(data, accumulation.Stacked)
    given = accumulation.counted(data, to_batch, progress, "influence")
    for number, (batch, count) in enumerate(given):
        where = name if alone else f"batch {number} of {name}"
        batch, _ = own.model.admitted(params, batch, bad_rows, where)
        check_rows(own.model, params, batch)
        yield batch, count, where


def rows_of(batch: Batch) -> tuple[tuple, Callable[[tuple], Batch]]:
    """The parts of a batch with an axis of rows, and a batch of one from a slice."""
    parts, rebuild = batches.unpack(batch)
    return parts, lambda one: rebuild(*jax.tree.map(lambda x: x[None], one))


def by_rows(
    own: Asked, fitted: Fitted, batch: Batch, num_rows: int = 0
) -> tuple[tuple, Callable[[tuple], Batch], Rows, int]:
    """As `rows_of`, with products of the model's rows, and how many rows at a time.

    `num_rows` cotangents of each are pulled back together; 0: one for each output.
    """
    (parts, row_of), rows = rows_of(batch), fitted.rows(own.model, batch.inputs)

    def kept(parts: tuple) -> PyTree:
        def cotangents(outputs: jax.Array) -> jax.Array:
            return products.units(outputs)[: num_rows or None]

        return rows.left(batches.unshare(row_of(parts).inputs), cotangents)

    one = jax.eval_shape(kept, jax.tree.map(lambda x: x[0], parts))
    size = max(sum(x.size for x in jax.tree.leaves(one)), 1)
    return parts, row_of, rows, own.chunk_size or max(_ENTRIES // size, 1)


def removals(own: Asked, fitted: Fitted, batch: Batch) -> Removal:
    """Of every row of a batch, `(n, ...)`."""
    own = own.once()
    parts, row_of, rows, size = by_rows(own, fitted, batch)

    def one(parts: tuple) -> Removal:
        return removed(own, fitted, rows, row_of(parts))

    return chunks.map_chunks(jax.vmap(one), parts, size)


def removed(own: Asked, fitted: Fitted, rows: Rows, row: Batch) -> Removal:
    """Of a batch of one row."""
    example, likelihood = batches.unshare(row.inputs), fitted.likelihood(own.model)
    outputs = own.model.apply_fn(fitted.belief.mean, example)
    kernel = rows.own(example, products.units)
    wide = outputs.astype(kernel.dtype)
    gradient = jnp.zeros_like(wide).ravel()
    if row.targets is not None:
        gradient = gradient + loss_gradient(likelihood, outputs, row).ravel()
    moved, cotangent = kernel @ gradient, gradient
    nothing = jnp.zeros((), kernel.dtype)
    leverage, is_defined = nothing, jnp.array(True)
    if not likelihood.random_root:
        root = _weighted_root(likelihood, outputs, row).reshape((-1, wide.size))
        block = root @ kernel @ root.T
        leverage = jnp.trace(block)
        factor = linalg.cholesky(jnp.eye(len(block), dtype=block.dtype) - block)
        # up to rounding a leverage of one, where the rest determines nothing
        least = jnp.finfo(block.dtype).eps ** 0.25
        is_defined = jnp.all(jnp.diagonal(factor) > least)
        if not own.first_order:
            away = gradient + root.T @ cho_solve((factor, True), root @ moved)
            cotangent = jnp.where(is_defined, away, jnp.nan)
            moved = kernel @ cotangent
    found = Removal(outputs[0], gradient, cotangent, moved, leverage, is_defined)
    left_out = jnp.all(row.weights == 0)
    found = batches.zero_if_missing(row, found)
    return found._replace(is_defined=found.is_defined | left_out)


def loss_gradient(likelihood: Likelihood, outputs: jax.Array, row: Batch) -> jax.Array:
    """Of the row's loss, weighted and summed over its targets, in wide numbers."""

    def loss(outputs: jax.Array) -> jax.Array:
        return -log_likelihood(lambda outputs, _: outputs, likelihood, outputs, row)

    return batches.zero_if_missing(row, jax.grad(loss)(trees.widen(outputs)))


def _weighted_root(likelihood: Likelihood, outputs: jax.Array, row: Batch) -> jax.Array:
    """The columns `(R, 1, ...)` of the root of a row's output Fisher, with weights."""
    own, (weight, each) = cholesky_root(likelihood), batches.roots_of_weights(row)
    if each is not None and own.observing is not None:
        own, each = own.observing(each), None
    columns = trees.widen(root_columns(own, outputs)) * weight[0]
    if each is None:
        return columns
    return columns * each.reshape(
        (1, *each.shape, *(1,) * (columns.ndim - 1 - each.ndim))
    )


def over_batches(
    begun: tuple[Asked, Fitted], data: Any, function: Callable, **options: Any
) -> Any:
    """`function(own, fitted, batch)` of all rows, side by side, and checked.

    It returns what is wanted, and the leverages of rows whose removal must be defined,
    with whether it is; or None.
    """
    (own, known), found = begun, []
    for batch, count, where in each_batch(own, known.belief.mean, data, **options):
        wanted, removable = choices.run(own, function, known, batch)
        if removable is not None:
            check_defined(removable, where)
        found.append(jax.tree.map(lambda x, count=count: x[:count], wanted))
    if len(found) == 1:
        return found[0]
    return jax.tree.map(lambda *x: jnp.concatenate(x), *found)


def check_defined(removable: tuple[jax.Array, jax.Array], where: str) -> None:
    """Raises for a row whose removal leaves nothing determined, where it is at hand."""
    leverages, defined = removable
    if checks.holds(defined):
        return
    row = int(np.argmin(np.asarray(defined)))
    others = int(np.sum(~np.asarray(defined))) - 1
    more = f", and so have {others} more" if others else ""
    raise ValueError(
        f"row {row} of {where} has a leverage block with an eigenvalue of 1 or more "
        f"(its trace is {float(leverages[row]):.4g}){more}: without it some direction "
        "of the parameters is not determined, or the information does not hold it as "
        "it is (another data set's, or too coarse a structure). Take a larger "
        "prior_precision, the full structure (ff.only chooses a layer), or "
        "first_order=True where it is an option."
    )
