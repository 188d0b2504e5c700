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
    leverage: jax.Array  # (), trace of the leverage block; zero to first order
    is_defined: jax.Array  # () bool: whether the rest has an information


@dataclasses.dataclass(frozen=True)
class Asked:
    """A model and the static part of what is asked of it; programs are its own."""

    model: Model
    first_order: bool = False
    on: Callable | None = None
    chunk_size: int | None = None


class Fitted(NamedTuple):
    """A belief and the factors of its information; arrays."""

    belief: Gaussian
    factors: Any


def begun(
    state: Any,
    model: tuple[Callable, Likelihood],
    first_order: bool | None,
    on: Callable | None = None,
    chunk_size: int | None = None,
) -> tuple[Asked, Fitted]:
    """What is asked, equal choices sharing their programs, and what is known.

    `first_order` None: unless leverages are at hand and mean what they say.
    """
    checked, likelihood = Model(*model), model[1]
    if chunk_size is not None:
        checks.whole(chunk_size, "chunk_size", of="examples")
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
    shapes = jax.eval_shape(ops.diagonal, belief.information, belief.mean)
    check_like(shapes, belief.mean)
    own = choices.shared(Asked(checked, first_order, on, chunk_size))
    temperature = getattr(state, "temperature", None)
    # the same program whatever is asked
    alone = choices.shared(Asked(checked))
    return own, choices.run(alone, _fitted, belief, temperature)


def _fitted(own: Asked, belief: Gaussian, temperature: Any) -> Fitted:
    # what rows change is the minimum of the objective, however wide the belief
    if temperature is not None:
        information = ops.scale(belief.information, temperature)
        belief = belief._replace(information=information)
    return Fitted(belief, products.factors_of(belief))


def results(
    begun: tuple[Asked, Fitted],
    data: Any,
    function: Callable,
    *rest: PyTree,
    name: str = "the data",
    bad_rows: str = "raise",
    to_batch: Callable | None = None,
    progress: bool | None = False,
) -> Iterator[Any]:
    """`function(own, fitted, batch, *rest)`, compiled once, of one batch after another.

    It returns what is wanted of all rows, and leverages of those whose removal must be
    defined, with whether it is; or None.
    """
    screening.check_option(bad_rows)
    if hasattr(data, "shape"):
        raise ValueError(
            f"{name} are a batch, (inputs, targets), with None for targets that are "
            f"not read, or a list of batches; got an array of shape {data.shape}."
        )
    own, fitted = begun
    alone = isinstance(data, tuple) and not isinstance(data, accumulation.Stacked)
    given = accumulation.counted(data, to_batch, progress, "influence")
    for number, (batch, count) in enumerate(given):
        where = name if alone else f"batch {number} of {name}"
        batch, _ = own.model.admitted(fitted.belief.mean, batch, bad_rows, where)
        check_rows(own.model, fitted.belief.mean, batch)
        wanted, removable = choices.run(own, function, fitted, batch, *rest)
        if removable is not None:
            _check_defined(where, *removable)
        if count < len(batch.weights):
            wanted = jax.tree.map(lambda x, count=count: x[:count], wanted)
        yield wanted


def side_by_side(found: Iterator[Any]) -> Any:
    """All of them, along the first axis."""
    return jax.tree.map(lambda *x: jnp.concatenate(x) if x[1:] else x[0], *found)


def _check_defined(where: str, leverages: jax.Array, defined: jax.Array) -> None:
    """Raises for a row whose removal leaves nothing determined, where it is at hand."""
    if checks.holds(defined):
        return
    row = int(np.argmin(np.asarray(defined)))
    others = int(np.sum(~np.asarray(defined))) - 1
    more = f", and so have {others} more" if others else ""
    raise ValueError(
        f"row {row} of {where} has a leverage block with an eigenvalue of 1 or more, "
        f"up to rounding (its trace is {float(leverages[row]):.4g}){more}: without it "
        "some direction of the parameters is not determined, or the information does "
        "not hold it as it is (another data set's, or too coarse a structure). Take a "
        "larger prior_precision, the full structure (ff.only chooses a layer), or "
        "first_order=True where it is an option."
    )


# ---- within a program


class ByRow(NamedTuple):
    """A batch row by row, and the products of the model's rows."""

    own: Asked
    belief: Gaussian
    rows: Rows
    parts: tuple  # with a leading axis n
    row_of: Callable[[tuple], Batch]  # of slices of the parts, a batch of one
    size: int  # rows at a time

    @property
    def likelihood(self) -> Likelihood:
        """As the information is of: known but for the dispersion."""
        own = self.own.model.likelihood
        return own if own.nuisance is None else products.known(own, self.belief)

    def map(self, one: Callable, of_chunk: Callable = lambda found: found) -> Any:
        """`one(row)` of all rows, and what is made of a chunk of them."""
        each = jax.vmap(lambda parts: one(self.row_of(parts)))
        chunk = lambda parts: of_chunk(each(parts))  # noqa: E731
        return chunks.map_chunks(chunk, self.parts, self.size)


def by_row(own: Asked, fitted: Fitted, batch: Batch, num_rows: int = 0) -> ByRow:
    """`num_rows` cotangents of a row pulled back together; 0: one for each output."""
    own = dataclasses.replace(own, model=own.model.traced_once())
    belief, factors = fitted
    rows = products.rows_of(belief, own.model.apply_fn, batch.inputs, factors=factors)
    parts, rebuild = batches.unpack(batch)

    def row_of(parts: tuple) -> Batch:
        return rebuild(*jax.tree.map(lambda x: x[None], parts))

    def kept(parts: tuple) -> PyTree:
        example = batches.unshare(row_of(parts).inputs)
        return rows.left(example, lambda z: products.units(z)[: num_rows or None])

    one = jax.eval_shape(kept, jax.tree.map(lambda x: x[0], parts))
    count = sum(x.size for x in jax.tree.leaves(one))
    size = own.chunk_size or max(_ENTRIES // max(count, 1), 1)
    return ByRow(own, belief, rows, parts, row_of, size)


def by_labelled_row(
    own: Asked, fitted: Fitted, batch: Batch, num_rows: int = 0
) -> ByRow:
    """As `by_row`, of rows that have a loss."""
    if batch.targets is None:
        raise ValueError("the rows' targets are None, and without them have no loss.")
    return by_row(own, fitted, batch, num_rows)


def removed(by: ByRow, row: Batch) -> Removal:
    """Of a batch of one row."""
    example = batches.unshare(row.inputs)
    outputs = by.own.model.apply_fn(by.belief.mean, example)
    kernel = by.rows.own(example, products.units)
    gradient = jnp.zeros((outputs.size,), kernel.dtype)
    if row.targets is not None:
        gradient = gradient + loss_gradient(by.likelihood, outputs, row).ravel()
    cotangent, moved = gradient, kernel @ gradient
    leverage, is_defined = jnp.zeros((), kernel.dtype), jnp.array(True)
    if not by.own.first_order:
        root = _weighted_root(by.likelihood, outputs, row).reshape((-1, outputs.size))
        block = root @ kernel @ root.T
        leverage = jnp.trace(block)
        factor = linalg.cholesky(jnp.eye(len(block), dtype=block.dtype) - block)
        # up to rounding a leverage of one, where the rest determines nothing
        least = jnp.finfo(block.dtype).eps ** 0.25
        is_defined = jnp.all(jnp.diagonal(factor) > least)
        inner = linalg.cholesky_solve(factor, (root @ moved)[:, None])[:, 0]
        away = gradient + root.T @ inner
        cotangent = jnp.where(is_defined, away, jnp.nan)
        moved = kernel @ cotangent
    found = Removal(outputs[0], gradient, cotangent, moved, leverage, is_defined)
    found = batches.zero_if_missing(row, found)
    left_out = jnp.all(row.weights == 0)
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
    return columns * each.reshape((*each.shape, *(1,) * (columns.ndim - 1 - each.ndim)))
